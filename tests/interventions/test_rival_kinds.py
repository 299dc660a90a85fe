"""SteerKeepingNorm and SuppressHeads: equal to their formulas by hand, at every step of generation and in every
engine."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import BY_NAME, relative_error
from tests.circuits.tiny import ready as tiny
from tests.pairs import ready_of
from tests.sweeps.engines import texts_agree
from veena_lens.interventions import SteerKeepingNorm, SuppressHeads
from veena_lens.positions import position_mask

NAME = "three-images-and-none"
VECTOR = torch.arange(48, dtype=torch.float64) - 20


@pytest.fixture
def ready(model_of):
    return ready_of(model_of, BY_NAME[NAME])


def test_a_turn_by_hand_in_the_plane() -> None:
    """x = (0, 2) turned towards (1, 0) by 1 is (sqrt 2, sqrt 2); x = (-2, 0) points away, so its push is doubled."""
    x = torch.tensor([[[0.0, 2.0], [-2.0, 0.0], [0.0, 2.0]]], dtype=torch.float64)
    at = torch.tensor([[True, True, False]])
    v = torch.tensor([3.0, 0.0], dtype=torch.float64)
    root = math.sqrt(2)
    expected = torch.tensor([[[root, root], [2.0, 0.0], [0.0, 2.0]]], dtype=torch.float64)
    torch.testing.assert_close(SteerKeepingNorm(0, v, 1.0).edit(x, at), expected)
    plain = SteerKeepingNorm(0, v, 0.5, adaptive=False).edit(x, at)
    torch.testing.assert_close(plain[0, 1], x[0, 1], msg="half a push back does not turn it round")


@pytest.mark.parametrize("adaptive", [True, False])
def test_a_turn_keeps_every_norm_and_equals_its_formula(adaptive: bool, ready) -> None:
    model, inputs = ready
    with torch.no_grad():
        _, plain = model.run_with_cache(inputs)
        with model.intervene([SteerKeepingNorm(1, VECTOR, 0.7, "query", adaptive)]):
            _, turned = model.run_with_cache(inputs)
    x, y, at = plain["mlp_out", 1], turned["mlp_out", 1], position_mask(inputs, "query")
    unit = VECTOR / VECTOR.norm()
    for row, pos in at.nonzero().tolist():
        old = x[row, pos] / x[row, pos].norm()
        weight = 1 + max(0.0, -float(old @ unit)) if adaptive else 1.0
        new = old + 0.7 * weight * unit
        assert relative_error(y[row, pos], new / new.norm() * x[row, pos].norm()) < 1e-12
    assert torch.equal(y[~at], x[~at])


def test_the_heads_that_look_least_at_the_picture_are_quiet_query_by_query(ready) -> None:
    model, inputs = ready
    queries, images = position_mask(inputs, "query"), inputs.image_mask
    n_quiet = 3

    def by_hand(pattern: Tensor, hook: Any) -> Tensor:
        out = pattern.clone()
        for row, query in queries.nonzero().tolist():
            if not bool(images[row].any()):
                continue
            mass = [float(pattern[row, head, query, images[row]].sum()) for head in range(6)]
            for head in sorted(range(6), key=lambda h: mass[h])[:n_quiet]:
                out[row, head, query] *= 0.25
        return out

    with torch.no_grad():
        expected = model.run_with_hooks(inputs, fwd_hooks=[("blocks.1.attn.hook_pattern", by_hand)])
        plain = model(inputs)
        with model.intervene([SuppressHeads(1, 0.5, 0.25, queries="query")]):
            ours = model(inputs)
    assert relative_error(ours, expected, inputs.attention_mask) < 1e-12
    bare = next(i for i, spans in enumerate(inputs.spans) if not spans.images)
    assert relative_error(ours[bare], plain[bare], inputs.attention_mask[bare]) < 1e-13


def test_a_scaled_row_of_the_pattern_is_a_scaled_output_of_the_head(ready) -> None:
    model, inputs = ready
    with torch.no_grad():
        _, plain = model.run_with_cache(inputs)
        with model.intervene([SuppressHeads(1, 0.0, 0.25, queries="last")]):
            _, quiet = model.run_with_cache(inputs)
    for row, spans in enumerate(inputs.spans):
        scale = 0.25 if spans.images else 1.0
        assert relative_error(quiet["z", 1][row, spans.last], scale * plain["z", 1][row, spans.last]) < 1e-12


@pytest.mark.parametrize(
    "item",
    [SteerKeepingNorm(0, VECTOR, 0.0), SuppressHeads(0, keep=1.0), SuppressHeads(1, keep=0.3, factor=1.0)],
    ids=repr,
)
def test_a_setting_that_is_off_changes_nothing(item: Any, ready) -> None:
    model, inputs = ready
    with torch.no_grad():
        plain = model(inputs)
        with model.intervene([item]):
            assert relative_error(model(inputs), plain, inputs.attention_mask) < 1e-13


@pytest.mark.parametrize("name", ["clip-llama", "window-mistral", "llava-next", "qwen2_vl-image-and-video"])
def test_generation_sweeps_of_both_engines_agree(name: str, model_of) -> None:
    model, inputs = tiny(model_of, name)
    entries = [[SteerKeepingNorm(0, VECTOR[: model.cfg.d_model], 3.0)], [SuppressHeads(1, 0.3)], []]
    if model.cfg.d_model > 48:
        entries[0] = [SteerKeepingNorm(0, torch.linspace(-1, 2, model.cfg.d_model, dtype=torch.float64), 3.0)]
    row = next(i for i, spans in enumerate(inputs.spans) if spans.images)
    texts_agree(model, inputs[row], entries, max_new_tokens=6, eos_token_id=[])


@pytest.mark.parametrize(
    ("make", "telling"),
    [
        (lambda: SteerKeepingNorm(2, VECTOR), "layer 2.*0 to 1"),
        (lambda: SteerKeepingNorm(0, torch.ones(7)), "7 entries.*48"),
        (lambda: SteerKeepingNorm(0, torch.zeros(48)), "not zero"),
        (lambda: SteerKeepingNorm(0, VECTOR * math.nan), "finite"),
        (lambda: SteerKeepingNorm(0, VECTOR, math.inf), "strength=inf"),
        (lambda: SteerKeepingNorm(0, VECTOR, positions="lats"), "lats"),
        (lambda: SuppressHeads(2), "layer 2.*0 to 1"),
        (lambda: SuppressHeads(0, keep=1.2), "keep=1.2"),
        (lambda: SuppressHeads(0, factor=math.nan), "factor=nan"),
        (lambda: SuppressHeads(0, keys="pictures"), "pictures"),
    ],
)
def test_what_cannot_act_is_refused_before_anything_runs(make: Any, telling: str, ready) -> None:
    model, inputs = ready
    with pytest.raises(ValueError, match=telling), model.intervene([make()]):
        model(inputs)


def test_quiet_heads_without_any_picture_are_refused(model_of) -> None:
    model, inputs = tiny(model_of, "text-qwen3")
    with model.intervene([SuppressHeads(0)]), pytest.raises(ValueError, match="has an image"):
        model(inputs)
