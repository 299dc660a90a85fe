"""Fluency: changes by hand, texts of nothing but emotion words, each text measured once, stops and restarts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.emotion.asked import bundled, examples
from veena_lens.emotion.judge import fluency as module
from veena_lens.emotion.judge.fluency import Fluency
from veena_lens.emotion.judge.side_effects import perplexity
from veena_lens.emotion.pairs.pair_set import Example
from veena_lens.emotion.words.wheels import EmotionWheels

MODEL = "tiny-llava-emotion"
SOME = [Example(picture=e.picture, emotion="happy", question=e.prompt) for e in examples()]
PLAIN = ["the person feels happy.", "the person feels sad.", "happy"]


def fluency(**more: Any) -> Fluency:
    return Fluency(bundled(MODEL), ["happy", "sad"], EmotionWheels.default(), **more)


def test_changes_are_differences_of_log_perplexity_without_emotion_words() -> None:
    texts = ["the person feels sad.", "soup dog wild", "the person feels"]
    measure = fluency()
    found = measure.changes(SOME, texts, PLAIN)
    mine, before = (perplexity(bundled(MODEL), SOME, t, skip=measure.skip).double().log() for t in (texts, PLAIN))
    assert before.isnan().tolist() == [False, False, True]
    before[2] = perplexity(bundled(MODEL), SOME[2:], ["happy"]).double().log()[0]  # nothing else was said: all counts
    torch.testing.assert_close(found, mine - before)
    assert found[1] > 1 > abs(found[0])


def test_a_text_of_emotion_words_alone_has_nothing_that_could_break() -> None:
    assert fluency().changes(SOME, ["sad", "happy sad", "sad"], PLAIN).tolist() == [0.0, 0.0, 0.0]
    assert fluency().changes(SOME[2:], ["happy"], ["happy"]).tolist() == [0.0]


def test_each_text_of_an_example_is_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, counts = module.perplexity, []

    def counted(model: Any, examples: Any, texts: Any, **settings: Any) -> Any:
        counts.append(len(texts))
        return real(model, examples, texts, **settings)

    monkeypatch.setattr(module, "perplexity", counted)
    measure = fluency(out=tmp_path)
    first = measure.changes(SOME[:2], ["a dog", "a dog"], PLAIN[:2])
    assert counts == [2, 2], "the same text of two pictures, and what was said before"
    again = measure.changes(SOME[:2], ["a dog", "a cat"], PLAIN[:2])
    assert counts == [2, 2, 1] and again[0] == first[0]
    assert torch.equal(fluency(out=tmp_path).changes(SOME[:2], ["a dog", "a dog"], PLAIN[:2]), first)
    assert counts == [2, 2, 1]
