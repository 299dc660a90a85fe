"""Every tool gives a padded row what it gives the row alone, takes what the model takes, and half precision too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.circuits.tiny import directions, ready
from veena_lens.circuits import (
    attention_by_source,
    attention_sinks,
    direct_attribution,
    direct_attribution_map,
    head_intention,
    image_attention,
    logit_lens,
    neuron_trace,
)
from veena_lens.scores import Scores

Tool = Callable[[Any, Any, torch.Tensor], Scores]
TOOLS: dict[str, Tool] = {
    "head_intention": lambda m, i, S: head_intention(i, S, positions="query", model=m),
    "direct_attribution": lambda m, i, S: direct_attribution(i, S, positions="query", model=m),
    "neuron_trace": lambda m, i, S: neuron_trace(i, S, positions="query", kind="raw", model=m),
    "neuron_max": lambda m, i, S: neuron_trace(i, S, positions="query", kind="raw", model=m, reduce="max"),
    "attention_by_source": lambda m, i, S: attention_by_source(m, i, S, positions="query"),
    "logit_lens": lambda m, i, S: logit_lens(m, i, "last", tokens=[4, 9]),
}
PICTURES: dict[str, Tool] = {
    "direct_attribution_map": lambda m, i, S: direct_attribution_map(m, i, S, positions="query"),
    "image_attention": lambda m, i, S: image_attention(m, i, "query"),
}


@pytest.mark.parametrize("name", ["right-padding", "llava-next", "qwen3_vl-plain", "text-qwen3"])
def test_padded_row_equals_row_alone(name: str, model_of) -> None:
    model, inputs = ready(model_of, name)
    S = directions(model)
    for label, tool in {**TOOLS, **(PICTURES if inputs.pixel_values is not None else {})}.items():
        batch = tool(model, inputs, S)
        for row in range(len(inputs)):
            if label in PICTURES and not inputs.grids[row]:
                continue
            alone = tool(model, inputs[row].without_padding(), S)
            got = batch.values[row : row + 1]
            if label in PICTURES:
                height, width = inputs.grids[row][0]
                got = got[..., :height, :width]
            assert torch.allclose(got, alone.values, rtol=0, atol=1e-9), label
    sinks = attention_sinks(model, inputs, multiple=1.2, share=0.5, norm_multiple=None)
    for row in range(len(inputs)):
        alone = attention_sinks(model, inputs[row].without_padding(), multiple=1.2, share=0.5, norm_multiple=None)
        assert sinks.values[row][:, inputs.attention_mask[row]].equal(alone.values[0])


@pytest.mark.parametrize("name", ["three-images-and-none", "qwen3_vl-plain"])
def test_each_row_may_have_directions_of_its_own(name: str, model_of) -> None:
    """As when each row is scored on its directions alone."""
    model, inputs = ready(model_of, name)
    own = torch.stack([directions(model, seed) for seed in range(len(inputs))])
    tools = {label: tool for label, tool in TOOLS.items() if label != "logit_lens"}
    for label, tool in {**tools, "direct_attribution_map": PICTURES["direct_attribution_map"]}.items():
        batch = tool(model, inputs, own)
        for row in range(len(inputs)):
            alone = tool(model, inputs, own[row])
            there = alone.exists[row]
            assert torch.allclose(batch.values[row][there], alone.values[row][there], rtol=0, atol=1e-12), label
    with pytest.raises(ValueError, match=r"direction \[2, .* one per row and layer, or"):
        head_intention(inputs, own[:2], model=model)


def test_bare_tokens_and_caches_of_one_row_are_taken(model_of) -> None:
    model, inputs = ready(model_of, "text-qwen3")
    S, one = directions(model), inputs[1].without_padding()
    for tool in TOOLS.values():
        assert torch.equal(tool(model, one.tokens, S).values, tool(model, one, S).values)
    _, cache = model.run_with_cache(one, remove_batch_dim=True)
    assert not cache.has_batch_dim
    whole = head_intention(one, S, model=model)
    assert torch.allclose(head_intention(cache, S).values, whole.values, rtol=0, atol=1e-12)
    assert logit_lens(model, cache).shape[:2] == (1, model.cfg.n_layers)


def test_half_precision_is_summed_in_single() -> None:
    """The embedded model in bfloat16: every tool gives float32, near what the model in float32 gives."""
    from veena_lens import HookedVLM
    from veena_lens.checkpoints import bundled_pairs

    found: dict[torch.dtype, dict[str, torch.Tensor]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = HookedVLM.from_pretrained("tiny-llava-emotion", dtype=dtype)
        pictures = [p for p, _ in bundled_pairs()[:2]]
        inputs = model.prepare(text=[p.prompt for p in pictures], images=[[p.open()] for p in pictures])
        S = directions(model).to(dtype)
        found[dtype] = {label: tool(model, inputs, S).values for label, tool in {**TOOLS, **PICTURES}.items()}
        assert not attention_sinks(model, inputs).values.any()
    for label, exact in found[torch.float32].items():
        half = found[torch.bfloat16][label]
        assert half.dtype == torch.float32 and half.isfinite().all(), label
        assert (half - exact).norm() < 0.15 * exact.norm(), label
