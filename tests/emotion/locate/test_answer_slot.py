"""The answer slot: soft hits against their formula, tokens that count and those that do not."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.emotion.asked import bundled
from tests.emotion.twins import LLAVA, QWEN, directions, twins
from veena_lens.emotion.locate.answer_slot import AnswerPosition, answer_position, emotion_tokens
from veena_lens.emotion.methods import PLAIN, next_logits
from veena_lens.emotion.words.wheels import EmotionWheels

THREE = AnswerPosition(lead_in="x", tokens={"happy": (0, 1), "sad": (2,), "angry": (3,)})
LOGITS = torch.tensor([[0.1, 0.2, 0.3, 0.05, 0.35], [0.4, 0.1, 0.1, 0.3, 0.1]]).log()


def test_soft_hits_by_hand() -> None:
    happy = math.log(0.3) - math.log((0.3 + 0.05) / 2)
    sad = math.log(0.3) - math.log((0.3 + 0.05) / 2)
    angry = math.log(0.05) - math.log((0.3 + 0.3) / 2)
    assert THREE.soft_hits(LOGITS)[0].tolist() == pytest.approx([happy, sad, angry], abs=1e-6)
    assert THREE.log_probs(LOGITS)[1].exp().tolist() == pytest.approx([0.5, 0.1, 0.3], abs=1e-6)


def test_the_metric_of_an_emotion_is_its_column_of_soft_hits() -> None:
    logits = torch.randn(5, 9, dtype=torch.float64)
    for i, emotion in enumerate(THREE.emotions):
        torch.testing.assert_close(THREE.metric(emotion)(logits), THREE.soft_hits(logits)[:, i])


def test_given_others_are_the_only_ones() -> None:
    found = THREE.metric("happy", ["angry"])(LOGITS.double())
    assert found.tolist() == pytest.approx([math.log(0.3 / 0.05), math.log(0.5 / 0.3)], abs=1e-6)


def test_soft_hits_do_not_change_with_a_shift_of_all_logits() -> None:
    torch.testing.assert_close(THREE.soft_hits(LOGITS), THREE.soft_hits(LOGITS + 7), atol=1e-5, rtol=1e-5)


def test_an_unknown_emotion_or_other_is_named() -> None:
    with pytest.raises(ValueError, match="no tokens for 'proud'; known: happy, sad, angry"):
        THREE.metric("proud")
    with pytest.raises(ValueError, match="no tokens for 'proud'"):
        THREE.metric("happy", ["proud"])


class _Words:
    """A tokenizer of whole words, and of words cut in two at "-"."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, Any]:
        assert not add_special_tokens
        parts = text.replace("-", " ~").split()
        return {"input_ids": [self.known.setdefault(part, len(self.known)) for part in parts]}


class _Lexicon:
    def __init__(self, **words: tuple[str, ...]) -> None:
        self.words = words

    def lexicon(self, emotion: str) -> tuple[str, ...]:
        return self.words[emotion]

    def require(self, emotions: Any) -> None:
        assert set(emotions) <= set(self.words)


def made(**words: tuple[str, ...]) -> tuple[AnswerPosition, dict[str, int]]:
    model = SimpleNamespace(tokenizer=_Words())
    found = answer_position(model, list(words), _Lexicon(**words), "feels so")
    return found, model.tokenizer.known


def test_whole_words_count_and_parts_only_where_there_is_none() -> None:
    found, ids = made(happy=("glad", "over-joyed"), sad=("down-cast", "heart-broken"))
    assert found.tokens["happy"] == (ids["glad"],)
    assert found.tokens["sad"] == tuple(sorted((ids["down"], ids["heart"])))
    assert found.dropped == 0
    assert "happy 1, sad 2" in repr(found)


def test_tokens_that_two_emotions_share_are_dropped_from_both() -> None:
    found, ids = made(happy=("glad", "moved"), sad=("moved", "low"))
    assert found.tokens == {"happy": (ids["glad"],), "sad": (ids["low"],)}
    assert found.dropped == 1
    with pytest.raises(ValueError, match="no token after 'feels so' names sad alone"):
        made(happy=("glad", "moved"), sad=("moved",))


def test_a_slot_needs_two_emotions_and_a_tokenizer() -> None:
    model = bundled(LLAVA)
    with pytest.raises(ValueError, match=r"\['happy', 'happy'\] must name at least two"):
        answer_position(model, ["happy", "happy"])
    with pytest.raises(ValueError, match="a tokenizer"):
        answer_position(SimpleNamespace(tokenizer=None), ["happy", "sad"])
    with pytest.raises(ValueError, match="'hapyy'"):
        answer_position(model, ["hapyy", "sad"])


@pytest.mark.parametrize("name", [LLAVA, QWEN])
def test_tokens_of_the_embedded_models_read_as_words_of_their_emotion(name: str) -> None:
    model, wheels = bundled(name), EmotionWheels.default()
    found = answer_position(model, list(directions(name).emotions))
    for emotion, ids in found.tokens.items():
        words = [model.tokenizer.decode([token]).strip() for token in ids]
        assert emotion in words
        assert {wheels.basic(word) for word in words} == {emotion}


def test_soft_hits_tell_the_emotional_pictures_from_their_twins() -> None:
    model = bundled(LLAVA)
    found = answer_position(model, ["happy", "angry", "sad"])
    for pair in twins(2):
        logits = next_logits(model, [pair.emotional, pair.neutral], PLAIN, found.lead_in)
        column = found.soft_hits(logits)[:, found.emotions.index(pair.emotion)]
        assert float(column[0]) > 1 and float(column[0] - column[1]) > 1


def test_tokens_of_emotion_words_hold_those_of_the_slot() -> None:
    model, wheels = bundled(LLAVA), EmotionWheels.default()
    found = answer_position(model, ["happy", "angry"])
    every = emotion_tokens(model, ["happy", "angry"], wheels)
    assert {token for ids in found.tokens.values() for token in ids} <= every
    assert not every & set(model.tokenizer(" picture person the", add_special_tokens=False)["input_ids"])
