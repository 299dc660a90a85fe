"""Contexts: the same images under every condition, drawn alike whenever the seed is the same."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from veena_lens.emotion.pairs.contexts import EVENTS, HELD_OUT_EVENTS, STRENGTHS, context_conditions, context_sentence
from veena_lens.emotion.pairs.loading import Example

EMOTIONS = ("happy", "sad", "neutral")


def examples(n: int = 6, emotions: tuple[str, ...] = EMOTIONS) -> list[Example]:
    picture = Image.new("RGB", (4, 4))
    return [
        Example(picture=picture, emotion=emotions[i % len(emotions)], question="how?", identity=f"person {i}")
        for i in range(n)
    ]


def test_an_event_is_told_in_three_strengths() -> None:
    told = [context_sentence("the person won", strength) for strength in STRENGTHS]
    assert told == ["maybe the person won.", "the person won.", "everybody knows that the person won."]


def test_conditions_hold_the_same_pictures_in_the_same_order() -> None:
    given_ = [e.with_context("it rains.", "sad", "plain") for e in examples()]
    found = context_conditions(given_)
    assert list(found) == ["alone", "consistent", "conflict, weak", "conflict, plain", "conflict, strong"]
    for some in found.values():
        assert [e.without_context() for e in some] == examples()
    assert all(e.context is None for e in found["alone"])


@given(seed=st.integers(0, 50), n=st.integers(2, 12), held_out=st.booleans())
def test_conflict_names_another_emotion_of_the_set_and_consistent_its_own(seed: int, n: int, held_out: bool) -> None:
    found = context_conditions(examples(n), seed=seed, held_out=held_out)
    table, other_table = (HELD_OUT_EVENTS, EVENTS) if held_out else (EVENTS, HELD_OUT_EVENTS)
    shown = {e.emotion for e in examples(n)}
    for e in found["consistent"]:
        assert e.context_emotion == e.emotion
        assert e.context_strength == "plain"
    for strength in STRENGTHS:
        for e in found[f"conflict, {strength}"]:
            assert e.context_emotion in shown - {e.emotion}
            assert e.context in [context_sentence(event, strength) for event in table[e.context_emotion]]
            assert e.context not in [context_sentence(event, strength) for event in other_table[e.context_emotion]]


def test_strengths_differ_in_the_strength_alone() -> None:
    found = context_conditions(examples(20), seed=3)
    for weak, plain, strong in zip(*(found[f"conflict, {s}"] for s in STRENGTHS), strict=True):
        assert weak.context == f"maybe {plain.context}"
        assert strong.context == f"everybody knows that {plain.context}"


def test_draws_follow_seed_and_example_and_not_the_neighbours() -> None:
    everyone = examples(9)
    assert context_conditions(everyone, seed=1) == context_conditions(everyone, seed=1)
    assert context_conditions(everyone, seed=1) != context_conditions(everyone, seed=2)
    backwards = context_conditions(everyone[::-1], seed=1)
    assert {name: some[::-1] for name, some in backwards.items()} == context_conditions(everyone, seed=1)


def test_own_sentences_take_the_place_of_the_events() -> None:
    events = {"proud": ["the person won a prize"], "sad": ["the person lost a friend"]}
    found = context_conditions(examples(4, ("proud", "sad")), events=events, strengths=("strong",))
    assert list(found) == ["alone", "consistent", "conflict, strong"]
    assert found["conflict, strong"][0].context == "everybody knows that the person lost a friend."
    assert found["consistent"][0].context == "the person won a prize."


def test_what_cannot_be_told_is_refused() -> None:
    with pytest.raises(ValueError, match="no sentences for 'proud'.*events="):
        context_conditions(examples(4, ("proud", "sad")))
    with pytest.raises(ValueError, match=r"\['sad'\]; a conflict needs two"):
        context_conditions(examples(4, ("sad",)))
    with pytest.raises(ValueError, match=r"\['loud'\] must be some of weak, plain, strong"):
        context_conditions(examples(), strengths=("loud",))
