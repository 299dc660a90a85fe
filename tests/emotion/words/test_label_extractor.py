"""Judges: asked in batches, once a text, their answers read as lists."""

from collections.abc import Sequence

import pytest

from veena_lens.emotion import EmotionWheels, LabelExtractor, hit_rate, sample_hits
from veena_lens.emotion.words.lexicon import answer_to_list, read_labels

WHEELS = EmotionWheels.default()


def test_a_judge_is_asked_once_for_all_different_texts() -> None:
    asked: list[list[str]] = []

    def generate(prompts: list[str]) -> list[str]:
        asked.append(prompts)
        return ["[sad]" if "tear" in prompt else "Output: [happy, calm]" for prompt in prompts]

    judge = LabelExtractor(generate)
    texts = {"a": "a tear", "b": "a laugh", "c": "a tear"}
    assert hit_rate({"a": "sad", "b": "happy", "c": "angry"}, texts, extractor=judge) == pytest.approx(2 / 3)
    assert len(asked) == 1 and len(asked[0]) == 2
    assert "a tear" in asked[0][0] and "square brackets" in asked[0][0]
    assert judge("another tear") == ["sad"]
    assert sample_hits(["a tear", "a laugh"], ["sad", "sad"], extractor=judge) == [1.0, 0.0]


def test_labels_pass_by_a_judge_that_reads_texts() -> None:
    def refuse(text: str) -> Sequence[str]:
        raise AssertionError(text)

    assert hit_rate({"a": "sad"}, {"a": ["gloomy"]}, extractor=refuse) == 1.0
    assert sample_hits([["gloomy"]], ["sad"], extractor=refuse) == [1.0]


@pytest.mark.parametrize(
    ("answer", "items"),
    [
        ("[happy, sad]", ["happy", "sad"]),
        ("Output: [happy]", ["happy"]),
        ("input\uff1a['happy',\n'sad']", ["happy", "sad"]),
        ("[]", []),
        ("", []),
    ],
)
def test_answers_lose_line_ends_and_a_leading_word(answer: str, items: list[str]) -> None:
    assert answer_to_list(answer) == items


def test_a_judge_with_fewer_answers_than_texts_is_refused() -> None:
    with pytest.raises(ValueError, match="1 answers to 2 texts"):
        hit_rate({"a": "sad", "b": "sad"}, {"a": "x", "b": "y"}, extractor=LabelExtractor(lambda prompts: ["[sad]"]))
    with pytest.raises(ValueError, match="2 texts and 1 truths"):
        sample_hits(["sad", "sad"], ["sad"])


def test_the_lexicon_is_an_extractor_too() -> None:
    assert read_labels(["She is not sad", "joy", "joy"], WHEELS.extract) == [[], ["joyful"], ["joyful"]]
