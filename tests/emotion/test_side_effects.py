"""Side effects: fluency under the untouched model, repetition, length, drift, other answers, time."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch

from veena_lens.checkpoints.bundle import bundled_pictures
from veena_lens.emotion.methods import PLAIN, Method, next_logits
from veena_lens.emotion.side_effects import (
    Asked,
    attribute_accuracy,
    distinct,
    drift,
    latency_ratio,
    lengths,
    measure_side_effects,
    perplexity,
    repetition,
)
from veena_lens.interventions import Steer

NAMES = ("tiny-llava-emotion", "tiny-qwen2vl-emotion")
QUESTIONS = ("How does this person feel?", "What do you see?", "Is this person happy or sad?")


@cache
def bundled(name: str) -> Any:
    from veena_lens import HookedVLM

    return HookedVLM.from_pretrained(name)


@cache
def examples() -> tuple[Asked, ...]:
    return tuple(Asked(picture=p.path, prompt=q) for p, q in zip(bundled_pictures()[:3], QUESTIONS, strict=True))


def pushed(alpha: float = 20.0) -> Method:
    vector = torch.randn(192, generator=torch.Generator().manual_seed(1))
    return Method(name="pushed", interventions=[Steer(3, vector / vector.norm(), alpha, "last+generated")])


@pytest.mark.parametrize("name", NAMES)
def test_perplexity_is_the_exponent_of_the_mean_surprise_of_the_texts_tokens(name: str) -> None:
    model, texts = bundled(name), ["the person feels happy.", "sad", "a man with a red hat smiles at me."]
    together = perplexity(model, examples(), texts, batch_size=3)
    for example, text, value in zip(examples(), texts, together.tolist(), strict=True):
        inputs = model.prepare(text=example.prompt, images=example.picture, answer=text)
        answer = inputs.spans[0].answer
        with torch.no_grad():
            logs = model(inputs)[0].log_softmax(-1)
        said = [float(logs[at - 1, inputs.tokens[0, at]]) for at in range(answer.start, answer.stop)]
        assert value == pytest.approx(math.exp(-sum(said) / len(said)), rel=1e-4)
    torch.testing.assert_close(perplexity(model, examples(), texts, batch_size=1), together, rtol=1e-4, atol=1e-5)


def test_perplexity_is_the_untouched_models_even_inside_a_block_of_interventions() -> None:
    model, texts = bundled(NAMES[0]), ["the person feels happy."] * 3
    plain = perplexity(model, examples(), texts)
    with model.intervene(list(pushed().interventions)):
        assert torch.equal(perplexity(model, examples(), texts), plain)
        said = model.prepare(text=QUESTIONS[0], images=examples()[0].picture)
        edited = model(said)
    assert not torch.equal(edited, model(said)), "the interventions act again after"


def test_a_text_without_tokens_has_no_perplexity() -> None:
    values = perplexity(bundled(NAMES[0]), examples(), ["happy", "", "sad"])
    assert values.isnan().tolist() == [False, True, False]


def test_words_out_of_order_surprise_more_than_what_the_model_said() -> None:
    model = bundled(NAMES[0])
    said = measure_side_effects(model, examples()[:1], texts=["this person feels happy."])
    shuffled = measure_side_effects(model, examples()[:1], texts=["happy feels person this."])
    assert shuffled.perplexity > 3 * said.perplexity


def test_numbers_of_texts_and_examples_must_match() -> None:
    with pytest.raises(ValueError, match="1 texts for 3 examples"):
        perplexity(bundled(NAMES[0]), examples(), ["happy"])
    with pytest.raises(ValueError, match="2 texts for 3 examples"):
        attribute_accuracy(bundled(NAMES[0]), examples(), ["a?", "b?"], ["x", "y", "z"])


def test_distinct_repetition_and_length_are_counted_by_hand() -> None:
    texts = ["A sad, sad man. A sad man!", "happy", ""]  # a sad sad man a sad man
    assert lengths(texts).tolist() == [7, 1, 0]
    assert distinct(texts, 1)[0].item() == pytest.approx(3 / 7)
    assert distinct(texts, 2)[0].item() == pytest.approx(4 / 6)  # a-sad sad-sad sad-man man-a
    assert distinct(texts, 2).isnan().tolist() == [False, True, True]
    assert repetition(texts)[0].item() == pytest.approx(4 / 7)
    assert repetition(texts, window=1)[0].item() == pytest.approx(1 / 7)
    assert repetition(texts)[1].item() == 0 and repetition(texts)[2].isnan()
    with pytest.raises(ValueError, match="n=0"):
        distinct(texts, 0)
    with pytest.raises(ValueError, match="window=0"):
        repetition(texts, 0)


def test_drift_is_the_divergence_of_the_next_tokens_and_nothing_for_no_method() -> None:
    model = bundled(NAMES[0])
    assert drift(model, examples(), Method(name="nothing")).tolist() == [0, 0, 0]
    p = next_logits(model, examples()).double().softmax(-1)
    q = next_logits(model, examples(), pushed()).double().softmax(-1)
    by_hand = (p * (p.log() - q.log())).sum(-1)
    assert by_hand.max() > 0.01
    torch.testing.assert_close(drift(model, examples(), pushed()).double(), by_hand, rtol=1e-4, atol=1e-9)


def test_an_attribute_counts_as_whole_words_and_any_true_one_will_do(monkeypatch) -> None:
    said = ["A redhead woman.", "He has light-brown hair", "dark brown hair."]
    monkeypatch.setattr("veena_lens.emotion.side_effects.answers", lambda *args, **settings: said)
    found = attribute_accuracy(None, examples(), ["hair?"] * 3, ["red", ["blond", "light-brown"], "brown hair"])
    assert found.tolist() == [0, 1, 1]
    with pytest.raises(ValueError, match="'!'"):
        attribute_accuracy(None, examples(), ["hair?"] * 3, ["red", "!", "brown"])


def test_questions_are_asked_in_place_of_the_examples_prompts_and_under_the_method() -> None:
    model, asked = bundled(NAMES[0]), ["What do you see?"] * 3
    inputs = model.prepare(text=asked, images=[[e.picture] for e in examples()])
    plain = model.generate(inputs, max_new_tokens=16)
    assert attribute_accuracy(model, examples(), asked, plain).tolist() == [1, 1, 1]
    assert attribute_accuracy(model, examples(), asked, plain, pushed(200.0)).sum() < 3


def test_a_method_that_waits_is_slower_by_the_time_it_waits() -> None:
    import time

    class Slow:
        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            time.sleep(0.05)
            return scores

    model = bundled(NAMES[0])
    slow = Method(name="slow", decoding=lambda model, inputs: [Slow()])
    ratio = latency_ratio(model, examples()[:1], slow, repeats=3, max_new_tokens=4)
    same = latency_ratio(model, examples()[:1], PLAIN, repeats=3, max_new_tokens=4)
    assert ratio > 2 * same and 0.3 < same < 3
    with pytest.raises(ValueError, match="repeats=0"):
        latency_ratio(model, examples(), slow, repeats=0)


def test_side_effects_sum_up_what_was_given_and_leave_out_the_rest() -> None:
    model = bundled(NAMES[0])
    found = measure_side_effects(
        model, examples(), pushed(), neutral=examples(), questions=QUESTIONS, truths=["happy"] * 3, max_new_tokens=8
    )
    assert found.latency is None and found.drift is not None and found.attributes is not None
    assert found.drift == pytest.approx(drift(model, examples(), pushed()).mean().item(), rel=1e-4)
    assert found.to_dict()["method"] == "pushed" and "perplexity" in repr(found) and "latency" not in repr(found)
    with pytest.raises(ValueError, match="at least one example"):
        measure_side_effects(model, [])
