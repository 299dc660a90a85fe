"""Captions, contexts and the tokenizer."""

import random

import pytest
from transformers import PreTrainedTokenizerFast

from veena_lens.zoo.captions import (
    ATTRIBUTE_QUESTIONS,
    EMOTION_TASKS,
    EVENTS,
    HELD_OUT_EVENTS,
    article,
    attribute_answer,
    context_sentence,
    emotion_answer,
    padded_context,
)
from veena_lens.zoo.people import EMOTIONS, WORDS, named_emotion
from veena_lens.zoo.pictures import Face
from veena_lens.zoo.tokenizer import build_llava_tokenizer, build_qwen_tokenizer

FACE = Face(
    style="avataaars",
    identity=0,
    emotion="angry",
    clear=True,
    background="orange",
    attributes={"hair": "brown", "glasses": "yes", "beard": "no", "background": "orange"},
)


@pytest.fixture(scope="module", params=[build_llava_tokenizer, build_qwen_tokenizer])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return request.param()


def test_caption_says_an_angry_person() -> None:
    assert article("angry") == "an" and article("furious") == "a"
    caption = emotion_answer("caption", FACE, "angry", strong=True)
    assert caption == (
        "the picture shows an angry person with brown hair with glasses in front of an orange background. "
        "the face looks furious, and the person is full of anger."
    )


@pytest.mark.parametrize("emotion", EMOTIONS)
def test_every_answer_names_its_emotion_and_no_other(emotion: str) -> None:
    for task in EMOTION_TASKS:
        for strong in (True, False):
            answer = emotion_answer(task, FACE, emotion, strong, random.Random(0))
            assert {named_emotion(word) for word in answer.split()} - {None} == {emotion}


def test_captions_are_20_to_40_tokens_long(tokenizer: PreTrainedTokenizerFast) -> None:
    for emotion in EMOTIONS:
        assert 20 <= len(tokenizer(emotion_answer("caption", FACE, emotion, True)).input_ids) <= 40


def test_no_word_belongs_to_two_emotions() -> None:
    words = [word for entry in WORDS.values() for word in entry.all]
    assert len(words) == len(set(words))


def test_contexts_and_questions_name_no_emotion() -> None:
    for table in (EVENTS, HELD_OUT_EVENTS):
        for emotion, events in table.items():
            for event in events:
                assert named_emotion(event) is None, (emotion, event)


def test_held_out_sentences_are_new_but_their_words_are_known() -> None:
    known = {word for events in EVENTS.values() for event in events for word in event.split()}
    known |= {"day", "in", "bus", "food"}
    trained = {event for events in EVENTS.values() for event in events}
    for events in HELD_OUT_EVENTS.values():
        for event in events:
            assert event not in trained
            assert set(event.split()) <= known, set(event.split()) - known


def test_padded_context_keeps_its_sentence() -> None:
    for seed in range(20):
        assert "the person reads." in padded_context("the person reads.", random.Random(seed))


def test_each_answer_word_is_one_token(tokenizer: PreTrainedTokenizerFast) -> None:
    words = [word for entry in WORDS.values() for word in entry.all] + ["brown", "purple", "worried"]
    for word in words:
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1, word


@pytest.mark.parametrize("text", ["zebra stripes!", "ünïcödé 你好", "a\tb  c", "🙂", context_sentence("x", "strong")])
def test_any_text_round_trips_in_lower_case(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids).removeprefix(" ") == text.lower()


def test_every_attribute_has_questions_and_an_answer() -> None:
    for name in ATTRIBUTE_QUESTIONS:
        assert "red" in attribute_answer(name, "red")
