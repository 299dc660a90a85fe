"""Side effects: fluency under the untouched model, repetition, length, drift, other answers, time."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.emotion.asked import NAMES, QUESTIONS, bundled, examples
from veena_lens.emotion.enhance.contrastive_decoding import vcd
from veena_lens.emotion.judge.side_effects import (
    answer_lengths,
    attribute_accuracy,
    described_accuracy,
    distinct_n,
    kl_from_plain,
    latency_ratio,
    measure_side_effects,
    perplexity,
    repetition,
)
from veena_lens.emotion.methods import PLAIN, Method, next_logits
from veena_lens.interventions import Steer


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
    assert answer_lengths(texts).tolist() == [7, 1, 0]
    assert distinct_n(texts, 1)[0].item() == pytest.approx(3 / 7)
    assert distinct_n(texts, 2)[0].item() == pytest.approx(4 / 6)  # a-sad sad-sad sad-man man-a
    assert distinct_n(texts, 2).isnan().tolist() == [False, True, True]
    assert repetition(texts)[0].item() == pytest.approx(4 / 7)
    assert repetition(texts, window=1)[0].item() == pytest.approx(1 / 7)
    assert repetition(texts)[1].item() == 0 and repetition(texts)[2].isnan()
    with pytest.raises(ValueError, match="n=0"):
        distinct_n(texts, 0)
    with pytest.raises(ValueError, match="window=0"):
        repetition(texts, 0)


def test_drift_is_the_divergence_of_the_next_tokens_and_nothing_for_no_method() -> None:
    model = bundled(NAMES[0])
    torch.testing.assert_close(
        kl_from_plain(model, examples(), Method(name="nothing")), torch.zeros(3), atol=1e-9, rtol=0
    )
    p = next_logits(model, examples()).double().softmax(-1)
    q = next_logits(model, examples(), pushed()).double().softmax(-1)
    by_hand = (q * (q.log() - p.log())).sum(-1)
    assert by_hand.max() > 0.01
    found = kl_from_plain(model, examples(), pushed())
    torch.testing.assert_close(found.double(), by_hand, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(kl_from_plain(model, examples(), pushed(), batch_size=1), found, rtol=1e-3, atol=1e-6)


def test_drift_counts_rules_of_decoding_also_where_they_rule_tokens_out() -> None:
    """All but the best token ruled out: KL = -log p(best)."""

    def best_only(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.masked_fill(scores < scores.amax(-1, keepdim=True), -math.inf)

    model = bundled(NAMES[0])
    method = Method(name="best only", decoding=lambda model, inputs: [best_only])
    by_hand = -next_logits(model, examples()).double().log_softmax(-1).amax(-1)
    torch.testing.assert_close(kl_from_plain(model, examples(), method).double(), by_hand, rtol=1e-4, atol=1e-6)
    for lead_in in (None, "the person feels"):
        contrast = kl_from_plain(model, examples(), vcd(a=3.0, b=0.001, noise_step=900), lead_in)
        assert bool(contrast.isfinite().all()) and contrast.max() > 0


def test_an_attribute_counts_as_whole_words_and_any_true_one_will_do(monkeypatch) -> None:
    said = ["A redhead woman.", "He has light-brown hair", "dark brown hair."]
    monkeypatch.setattr("veena_lens.emotion.judge.side_effects.generate_answers", lambda *args, **settings: said)
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


def test_latency_is_the_ratio_of_times_a_step_by_a_clock_of_our_own(monkeypatch) -> None:
    """A forward takes 1, the rule 4 more, getting ready 3 for each batch."""
    now = [0.0]
    monkeypatch.setattr("veena_lens.emotion.judge.side_effects.time", SimpleNamespace(perf_counter=lambda: now[0]))

    def spend(time: float) -> None:
        now[0] += time

    def slow(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        spend(4)
        return scores

    def decoding(model: Any, inputs: Any) -> list[Any]:
        spend(3)
        return [slow]

    model = bundled(NAMES[0])
    with model.hooks([("hook_embed", lambda value, hook: spend(1))]):
        settings = dict(repeats=2, max_new_tokens=3)
        assert latency_ratio(model, examples()[:1], PLAIN, **settings) == 1
        found = latency_ratio(model, examples()[:1], Method(name="slow", decoding=decoding), **settings)
    assert found == pytest.approx((3 * (1 + 4) + 3) / 3)
    with pytest.raises(ValueError, match="repeats=0"):
        latency_ratio(model, examples(), PLAIN, repeats=0)


def test_a_description_is_right_where_every_attribute_that_it_names_is() -> None:
    truths = [
        {"hair": "red", "background": "gray"},
        {"hair": "gray", "background": "blue"},
        {"hair": "red", "background": "blue"},
        {"hair": "red"},
    ]
    templates = {"hair": ["{} hair", "hair is {}"], "background": ["{} background"]}
    texts = [
        "A person with red hair in front of a gray background.",
        "The hair is gray, before a gray background.",
        "red hair, or gray hair",
        "someone in a predicament",
    ]
    found = described_accuracy(texts, truths, templates)
    assert found[:3].tolist() == [1, 0.5, 0] and found[3].isnan()
    with pytest.raises(ValueError, match="'hair' need"):
        described_accuracy(texts, truths, {"hair": ["hair"]})
    with pytest.raises(ValueError, match="1 texts for 4 examples"):
        described_accuracy(texts[:1], truths, templates)


def test_tokens_to_skip_are_not_counted_and_still_stand_before_others() -> None:
    model, text = bundled(NAMES[0]), "the person feels happy."
    inputs = model.prepare(text=QUESTIONS[0], images=examples()[0].picture, answer=text)
    at = inputs.spans[0].answer
    with torch.no_grad():
        logs = model(inputs)[0].log_softmax(-1)
    tokens = inputs.tokens[0, at].tolist()
    said = {i: float(logs[at.start + i - 1, token]) for i, token in enumerate(tokens)}
    skip = tokens[1]
    kept = [value for i, value in said.items() if tokens[i] != skip]
    found = perplexity(model, examples()[:1], [text], skip=[skip])
    assert found.item() == pytest.approx(math.exp(-sum(kept) / len(kept)), rel=1e-4)
    assert perplexity(model, examples()[:1], [text], skip=tokens).isnan().all()


def test_side_effects_sum_up_what_was_given_and_leave_out_the_rest() -> None:
    model = bundled(NAMES[0])
    found = measure_side_effects(
        model, examples(), pushed(), neutral=examples(), questions=QUESTIONS, truths=["happy"] * 3, max_new_tokens=8
    )
    assert found.latency is None and found.drift is not None and found.attributes is not None
    assert found.drift == pytest.approx(kl_from_plain(model, examples(), pushed()).mean().item(), rel=1e-4)
    later = measure_side_effects(
        model, examples(), pushed(), ["sad"] * 3, neutral=examples(), lead_in="the person feels"
    )
    assert later.drift == pytest.approx(
        kl_from_plain(model, examples(), pushed(), "the person feels").mean().item(), rel=1e-4
    )
    assert found.to_dict()["method"] == "pushed" and "perplexity" in repr(found) and "latency" not in repr(found)
    described = [
        SimpleNamespace(picture=e.picture, prompt=e.prompt, attributes={"hair": hair})
        for e, hair in zip(examples(), ("red", "gray", "red"), strict=True)
    ]
    texts = ["red hair", "red hair", "a hat"]
    assert measure_side_effects(model, described, texts=texts, templates={"hair": ["{} hair"]}).described == 0.5
    with pytest.raises(ValueError, match="at least one example"):
        measure_side_effects(model, [])
