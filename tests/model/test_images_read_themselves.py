"""Attention within an image whose tokens read each other (Gemma-3): its rows, and boosts in both directions."""

from __future__ import annotations

import pytest
import torch

from tests.cases import BY_NAME, counted, raw_inputs
from veena_lens.interventions import BoostAttention, KnockOutAttention, Steer


def test_attention_rows_of_an_image_equal_those_of_the_pattern(model_of) -> None:
    case = BY_NAME["gemma3-unequal-rows"]
    model = model_of(case, casts="none")
    inputs = model.inputs_from_hf(**counted(raw_inputs(case)))
    inputs = inputs[[0, 2, 3]]
    boosts = [
        BoostAttention(1, keys="image", queries="image", factor=4.0),
        KnockOutAttention(0, keys="image", queries="query"),
        Steer(0, torch.ones(48).double(), positions="image"),
    ]
    for interventions in ([], boosts):
        with torch.no_grad(), model.intervene(interventions):
            _, cache = model.run_with_cache(inputs)
            rows = model.attention(inputs, queries="image", keys="image")
        for row in range(len(inputs)):
            at = inputs.image_mask[row].nonzero().flatten()
            for layer in range(3):
                pattern = cache["pattern", layer][row][:, at][:, :, at]
                mine = rows.values[row, layer][:, : len(at), : len(at)]
                torch.testing.assert_close(mine, pattern, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", ["renorm", "scale", "mul", "abs"])
def test_boost_within_an_image_acts_on_its_later_tokens_too(mode: str, model_of) -> None:
    """In both directions: by a bias of the fused kernel as by an edit of the pattern or scores."""
    case = BY_NAME["gemma3-unequal-rows"]
    model = model_of(case, casts="none")
    inputs = model.inputs_from_hf(**counted(raw_inputs(case)))[[0]]
    span = inputs.spans[0].images[0]
    boost = BoostAttention(1, keys=[span.stop - 1], queries=[span.start], factor=3.0, mode=mode)
    with torch.no_grad():
        _, plain = model.run_with_cache(inputs)
        with model.intervene([boost]):
            _, cache = model.run_with_cache(inputs)
    before, after = (c["pattern", 1][0, :, span.start] for c in (plain, cache))
    keys = torch.arange(before.shape[-1])
    assert float((after - before)[:, span.stop - 1].abs().min()) > 1e-6
    if mode == "renorm":
        weighted = before * torch.where(keys == span.stop - 1, 3.0, 1.0)
        torch.testing.assert_close(after, weighted / weighted.sum(-1, keepdim=True), rtol=1e-10, atol=1e-12)
    others = [p for p in range(inputs.shape[1]) if p != span.start]
    torch.testing.assert_close(cache["pattern", 1][0][:, others], plain["pattern", 1][0][:, others])
