"""A circuit written into a random model is found again, component by component, and shuffled labels find nothing.

Images of three classes carry a pattern each on top of noise; their neutral twins do not. Chosen heads and neurons
are given output weights that turn what the pattern does to them into a push along one direction.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import BY_NAME, IMAGE_TOKEN, hf_model
from tests.circuits.tiny import unit
from tests.odd_inputs import square_tokens
from veena_lens.circuits import (
    attention_by_source,
    benjamini_hochberg,
    bootstrap,
    direct_attribution_map,
    head_intention,
    image_attention_share,
    most_selective_class,
    neuron_trace,
    sign_flip_test,
    specificity_index,
    specificity_test,
    top_neurons,
)
from veena_lens.scores import Scores

EACH = 8
CLASSES = [name for name in ("anger", "fear", "joy") for _ in range(EACH)]
HEADS = {(0, 4): (0, 1, 2), (1, 1): (2,), (1, 5): (0,)}  # (layer, head) -> the classes that it serves
GAIN = 20.0


@dataclass(frozen=True, eq=False)
class World:
    model: Any
    emotional: Any
    neutral: Any
    direction: Tensor
    neurons: list[tuple[int, int]]


def inputs_of(model: Any, pixels: Tensor) -> Any:
    case = BY_NAME["clip-llama"]
    generator = torch.Generator().manual_seed(4)
    text = torch.randint(3, 100, (7,), generator=generator).tolist()
    row = [*text[:3], *[IMAGE_TOKEN] * square_tokens(case.config()), *text[3:]]
    tokens = torch.tensor([row] * len(pixels))
    return model.inputs_from_hf(input_ids=tokens, attention_mask=torch.ones_like(tokens), pixel_values=pixels)


@cache
def world() -> World:
    """The model with its planted circuit, and the pairs."""
    from veena_lens import HookedVLM

    model = copy.deepcopy(HookedVLM.from_hf(hf_model(BY_NAME["clip-llama"]), casts="none", copy=True))
    generator = torch.Generator().manual_seed(11)
    neutral = 0.3 * torch.randn(3 * EACH, 3, 28, 28, generator=generator, dtype=torch.float64)
    patterns = torch.randn(3, 3, 28, 28, generator=generator, dtype=torch.float64)
    noise = 0.1 * torch.randn(neutral.shape, generator=generator, dtype=torch.float64)
    emotional = neutral + patterns.repeat_interleave(EACH, 0) + noise
    sides = [inputs_of(model, pixels) for pixels in (emotional, neutral)]
    u = unit(torch.randn(model.cfg.d_model, generator=generator, dtype=torch.float64))
    neurons = []
    for layer in range(model.cfg.n_layers):
        moved = difference(model, sides, f"blocks.{layer}.attn.hook_z")
        with torch.no_grad():
            for (where, head), classes in HEADS.items():
                if where == layer:
                    means = moved[:, head].view(3, EACH, -1).mean(1)
                    readers = torch.linalg.pinv(means)  # [d_head class]: 1 on its own class, 0 on the others
                    gains = torch.tensor([GAIN if e in classes else 0.0 for e in range(3)], dtype=torch.float64)
                    push = readers @ gains
                    weight = model.blocks[layer].attn.W_O[head]
                    weight += torch.outer(push - weight @ u, u)
        moved = difference(model, sides, f"blocks.{layer}.mlp.hook_post")
        steady = moved.mean(0).abs() / moved.std(0)
        steady[moved.mean(0).abs() < moved.mean(0).abs().median()] = 0
        chosen = steady.topk(2).indices.tolist()
        with torch.no_grad():
            for neuron in chosen:
                row = model.blocks[layer].mlp.W_out[neuron]
                row += (GAIN / moved[:, neuron].mean() - row @ u) * u
        neurons += [(layer, neuron) for neuron in chosen]
    return World(model, *sides, u, neurons)


def difference(model: Any, sides: list[Any], name: str) -> Tensor:
    values = [model.run_with_cache(side, names_filter=name)[1][name][:, -1] for side in sides]
    return values[0] - values[1]


def swapped(scores: Scores, seed: int) -> Scores:
    """Emotional and neutral images exchanged in half of the pairs, at random: differences change their sign."""
    signs = 1.0 - 2 * torch.randint(2, (len(CLASSES),), generator=torch.Generator().manual_seed(seed)).double()
    values = scores.values * signs.view(-1, *[1] * (scores.values.ndim - 1))
    return Scores(values, scores.axes, scores.labels)


@cache
def head_pushes() -> Scores:
    w = world()
    return head_intention(w.emotional, w.direction, kind="projection", baseline=w.neutral, model=w.model)


@cache
def neuron_projections() -> Scores:
    w = world()
    return neuron_trace(w.emotional, w.direction, baseline=w.neutral, model=w.model)


def test_heads_with_the_largest_push_are_those_planted() -> None:
    top = head_pushes().mean("pair").top(3)
    assert {(row.layer, row.head) for row in top.itertuples()} == set(HEADS)
    cosine = head_intention(world().emotional, world().direction, baseline=world().neutral, model=world().model)
    best = cosine.mean("pair").top(1)
    assert (best.layer[0], best["head"][0]) == (0, 4)


def test_planted_heads_are_sure_and_swapped_pairs_find_none() -> None:
    low = bootstrap(head_pushes(), draws=500).select(bound="low").values
    p = benjamini_hochberg(sign_flip_test(head_pushes(), draws=2000), q=0.05)
    for layer, head in HEADS:
        assert low[layer, head] > 1.0 and p.values[layer, head] < 0.05
    found = [benjamini_hochberg(sign_flip_test(swapped(head_pushes(), seed))).meta["discoveries"] for seed in range(10)]
    assert sum(n > 0 for n in found) <= 1, found


def test_push_of_planted_heads_comes_from_the_picture() -> None:
    w = world()
    routes = attention_by_source(w.model, w.emotional, w.direction, baseline=w.neutral).mean("pair")
    shares = image_attention_share(routes).values
    assert all(shares[layer, head] > 0.9 for layer, head in HEADS)
    maps = direct_attribution_map(w.model, w.emotional, w.direction, baseline=w.neutral).mean("pair")
    assert torch.allclose(maps.values.sum((-1, -2)), routes.select(source="image").values, rtol=0, atol=1e-9)


def test_neurons_with_the_largest_push_are_those_planted() -> None:
    table = top_neurons(neuron_projections(), k=4)
    assert {(row.layer, row.neuron) for row in table.itertuples()} == set(world().neurons)
    assert table["value"].tolist() == pytest.approx([GAIN] * 4) and table["consistency"].min() > 0.9


def test_swapped_pairs_have_no_neurons() -> None:
    found = [
        benjamini_hochberg(sign_flip_test(swapped(neuron_projections(), seed))).meta["discoveries"]
        for seed in range(10)
    ]
    assert sum(n > 0 for n in found) <= 1, found
    assert len(top_neurons(swapped(neuron_projections(), 0), k=4, consistency=0.95)) < 4


def test_specific_heads_are_told_from_the_general_one() -> None:
    pushes = head_pushes()
    tau = specificity_index(pushes, CLASSES, cross_fitted=True).values
    p = benjamini_hochberg(specificity_test(pushes, CLASSES, draws=500)).values
    best = most_selective_class(pushes, CLASSES)
    for (layer, head), classes in HEADS.items():
        if len(classes) == 1:
            assert tau[layer, head] > 0.6 and p[layer, head] < 0.05
            assert int(best.values[layer, head]) == classes[0]
        else:
            assert tau[layer, head] < 0.3
    planted = Scores(torch.stack([pushes.values[:, layer, head] for layer, head in HEADS], 1), ("pair", "head"))
    found = []
    for seed in range(10):
        order = torch.randperm(len(CLASSES), generator=torch.Generator().manual_seed(seed)).tolist()
        shuffled = [CLASSES[i] for i in order]
        found.append(benjamini_hochberg(specificity_test(planted, shuffled, draws=200)).meta["discoveries"])
    assert sum(n > 0 for n in found) <= 1, found
