"""Boosts: gradients against finite differences of exact effects, effects against one intervention, best heads."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.circuits.tiny import ready
from tests.emotion.asked import bundled
from tests.emotion.twins import LLAVA, QWEN, slot, twins
from veena_lens.emotion.locate import boost_gradients as boosts
from veena_lens.emotion.locate.answer_slot import AnswerPosition
from veena_lens.emotion.locate.boost_gradients import head_boost_effects, head_boost_gradients, margins, top_heads
from veena_lens.emotion.methods import Method, next_logits
from veena_lens.interventions import BoostAttention
from veena_lens.scores import Scores

TINY = AnswerPosition(lead_in="", tokens={"a": (3, 4), "b": (5,), "c": (6, 7)})
TOLD = (None, "b", "a")


def tiny(model_of: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[Any]]:
    """A tiny model, and the rows of its case as examples of emotion "a" told nothing, another or the same."""
    model, inputs = ready(model_of, name)
    monkeypatch.setattr(boosts, "prepared", lambda model, some, lead_in: inputs[[x.row for x in some]])
    return model, [
        SimpleNamespace(row=i, emotion="a", context_emotion=TOLD[i % 3])
        for i, images in enumerate(inputs.image_mask.any(-1).tolist())
        if images
    ]


@pytest.mark.parametrize("mode", ["scale", "renorm"])
@pytest.mark.parametrize("name", ["clip-llama", "window-mistral", "qwen3_vl-plain"])
def test_gradients_equal_finite_differences(
    name: str, mode: str, model_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, some = tiny(model_of, name, monkeypatch)
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    found = head_boost_gradients(model, some, TINY, mode)
    assert found.axes == ("example", "layer", "head") and found.shape == (len(some), n_layers, n_heads)
    heads = [(layer, head) for layer in range(n_layers) for head in range(n_heads)]
    eps = 1e-4
    up, down = (head_boost_effects(model, some, TINY, heads, 1 + sign * eps, mode).values for sign in (1, -1))
    slopes = ((up - down) / (2 * eps)).reshape(found.shape)
    torch.testing.assert_close(found.values, slopes, rtol=1e-5, atol=1e-8)
    assert float(found.values.abs().max()) > 1e-4


def test_gradients_do_not_depend_on_the_batch(model_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, some = tiny(model_of, "clip-llama", monkeypatch)
    one, two = (head_boost_gradients(model, some, TINY, batch_size=size).values for size in (1, 2))
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


def test_positions_limit_what_is_strengthened(model_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, some = tiny(model_of, "clip-llama", monkeypatch)
    last, query = (head_boost_gradients(model, some, TINY, queries=at).values for at in ("last", "query+generated"))
    assert not torch.allclose(last[:, 0], query[:, 0])
    torch.testing.assert_close(last[:, -1], query[:, -1])  # of the last layer only the last row is read


def test_gradients_leave_the_parameters_and_no_hook(model_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, some = tiny(model_of, "clip-llama", monkeypatch)
    before = [p.requires_grad for p in model.parameters()]
    head_boost_gradients(model, some, TINY)
    assert [p.requires_grad for p in model.parameters()] == before
    assert all(p.grad is None for p in model.parameters())


def test_margin_is_over_the_contexts_emotion_where_it_is_another() -> None:
    row = torch.tensor([[0.0, 0, 0, 0.2, 0.1, 0.4, 0.1, 0.1]]).clamp_min(1e-9).log().double()
    some = [SimpleNamespace(emotion="a", context_emotion=told) for told in TOLD]
    alone = math.log(0.3 / ((0.4 + 0.2) / 2))
    told = math.log(0.3 / 0.4)
    assert margins(TINY, some, row.expand(3, -1)).tolist() == pytest.approx([alone, told, alone], abs=1e-5)


def test_a_factor_of_one_changes_nothing_and_an_effect_is_the_difference_of_two_runs() -> None:
    model = bundled(LLAVA)
    pair = twins()[0]
    some = [pair.emotional, pair.emotional.with_context("someone stole the bike of the person.", "angry", "plain")]
    heads = [(0, 7), (5, 1)]
    assert float(head_boost_effects(model, some, slot(), heads, 1.0).values.abs().max()) < 1e-5
    found = head_boost_effects(model, some, slot(), heads, 3.0, "renorm")
    assert found.labels["head"] == ["L0H7", "L5H1"] and found.meta == {"mode": "renorm"}
    for j, (layer, head) in enumerate(heads):
        boost = BoostAttention(layer=layer, heads=[head], queries="query+generated", factor=3.0, mode="renorm")
        edited, plain = (
            margins(slot(), some, next_logits(model, some, Method(name="m", interventions=x), slot().lead_in))
            for x in ([boost], [])
        )
        torch.testing.assert_close(found.values[:, j].float(), edited - plain, rtol=1e-3, atol=2e-4)
    assert float(found.values.abs().max()) > 1e-3


@pytest.mark.parametrize("name", [LLAVA, QWEN])
def test_gradients_of_the_embedded_models_rank_small_boosts(name: str) -> None:
    model, some = bundled(name), [pair.emotional for pair in twins()[:2]]
    gradients = head_boost_gradients(model, some, slot(name))
    assert gradients.shape == (2, 8, 8)
    heads = top_heads(gradients, 2)
    exact = head_boost_effects(model, some, slot(name), heads, 1.2)
    wanted = torch.stack([gradients.values[:, layer, head] for layer, head in heads], 1)
    assert bool((exact.values.mean(0) > 0).all())
    torch.testing.assert_close(exact.values / 0.2, wanted, rtol=0.5, atol=0.1)


def test_best_heads_by_hand() -> None:
    values = torch.tensor([[[1.0, 5.0], [2.0, 2.0]], [[3.0, -5.0], [2.0, torch.nan]]])
    labels = {"layer": [4, 6]}
    scores = Scores(values, ("example", "layer", "head"), labels, mask=~values.isnan())
    assert top_heads(scores, 3) == [(4, 0), (6, 0), (6, 1)]  # equals in their order
    assert top_heads(scores, 1, layers=[6]) == [(6, 0)]
    negated = replace(scores, values=-values)
    assert top_heads(negated, 1) == [(4, 1)]


def test_no_head_outside_the_given_layers_is_chosen() -> None:
    scores = Scores(torch.rand(2, 3, 2), ("example", "layer", "head"))
    assert {layer for layer, _ in top_heads(scores, 6, layers=[1])} == {1}
    assert len(top_heads(scores, 6, layers=[1])) == 2


def test_bad_input_is_named() -> None:
    model, some = bundled(LLAVA), [twins()[0].emotional]
    with pytest.raises(ValueError, match="mode='mul' must be one of scale, renorm"):
        head_boost_gradients(model, some, slot(), "mul")
    with pytest.raises(ValueError, match="list of heads is empty"):
        head_boost_effects(model, some, slot(), [])
    with torch.inference_mode(), pytest.raises(ValueError, match="needs gradients"):
        head_boost_gradients(model, some, slot())
    with pytest.raises(ValueError, match="there are no examples"):
        head_boost_gradients(model, [], slot())
    with pytest.raises(ValueError, match="there are no examples"):
        head_boost_effects(model, [], slot(), [(0, 0)])
