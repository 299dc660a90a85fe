"""Circuit tools where a norm follows attention and MLP: heads, neurons and keys sum to what is added there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import BY_NAME, native_model
from tests.pairs import pair_of
from veena_lens.circuits import (
    attention_by_source,
    copying_strength,
    direct_attribution,
    direct_attribution_map,
    head_intention,
    neuron_trace,
    path_patching,
    promoted_tokens,
)
from veena_lens.emotion import ena
from veena_lens.emotion.planted.circuit import plant_circuit
from veena_lens.sweeps.metrics import logit_diff


def run(name: str = "plain") -> tuple[Any, Any, Any]:
    """(model, inputs, twins of other images) in pure float64."""
    return pair_of(native_model, BY_NAME[f"gemma3-{name}"], has_other_words=False)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("has_baseline", [True, False])
def test_pushes_of_heads_neurons_and_keys_sum_to_those_of_components(has_baseline: bool) -> None:
    model, inputs, twins = run("unequal-rows")
    inputs, twins = inputs[[0, 2, 3]], twins[[0, 2, 3]]
    direction = torch.randn(3, 48, dtype=torch.float64)
    kw: dict[str, Any] = dict(positions="query", model=model, **(dict(baseline=twins) if has_baseline else {}))
    heads = head_intention(inputs, direction, kind="projection", **kw).values
    by_part = direct_attribution(inputs, direction, **kw)
    attention = torch.stack([by_part.select(component=f"{i}_attn_out").values for i in range(3)], 1)
    mlps = torch.stack([by_part.select(component=f"{i}_mlp_out").values for i in range(3)], 1)
    close(heads.sum(-1), attention)
    neurons = neuron_trace(inputs, direction, kind="direct" if has_baseline else "raw", **kw).values
    close(neurons.sum(-1), mlps)
    routed = attention_by_source(model, inputs, direction, positions="query", baseline=kw.get("baseline")).values
    close(routed.sum(-1), heads)
    maps = [direct_attribution_map(model, inputs[[0]], direction, positions="query", image=i).values for i in range(3)]
    whole = attention_by_source(model, inputs[[0]], direction, positions="query").select(source="image").values
    close(torch.stack(maps).sum(0).flatten(-2).sum(-1), whole)


def test_direct_paths_of_heads_and_neurons_sum_to_their_layers() -> None:
    model, inputs, twins = run()
    kw: dict[str, Any] = dict(metric=logit_diff(5, 6), receivers="final", norm="frozen")
    senders = [*(f"L1H{h}" for h in range(4)), "1_attn_out", *(f"L2N{n}" for n in range(40)), "2_mlp_out"]
    found = path_patching(model, inputs[:2], twins[:2], senders, **kw).values[..., 0]
    close(found[:, :4].sum(1), found[:, 4])
    close(found[:, 5:-1].sum(1), found[:, -1])
    assert float(found[:, 4].abs().min()) > 1e-6 and float(found[:, -1].abs().min()) > 1e-6


def test_what_weights_say_alone_counts_the_factors_of_the_norms() -> None:
    model, _, _ = run()
    block, unit = model.blocks[1], torch.randn(48, dtype=torch.float64)
    unit = unit / unit.norm()
    with torch.no_grad():
        row = block.mlp.down.weight[:, 7] * (1 + block.ln2_post.weight) * (1 + model.ln_final.weight)
        logits = row @ model.W_U
        W_V, W_O = block.attn.W_V[3], block.attn.W_O[3] * (1 + block.ln1_post.weight)
        copied = (unit * (1 + block.ln1.weight)) @ W_V @ W_O @ unit
    close(promoted_tokens(model, 1, 7, k=5).values[0], logits.topk(5).values)
    close(copying_strength(model, unit.expand(3, -1)).values[1, 3], copied)
    directions = model.tokens_to_residual_directions(torch.tensor([5, 9]))
    close(directions, model.W_U.T[[5, 9]] * (1 + model.ln_final.weight))


def test_what_neurons_would_add_is_refused_where_a_norm_follows() -> None:
    model, _, _ = run()
    with pytest.raises(ValueError, match="variant='factor'"):
        ena([(1, 3)], 2.0, variant="add", model=model, activations=[1.0])
    pairs = [SimpleNamespace(emotion=emotion) for emotion in ("happy", "sad")]
    with pytest.raises(ValueError, match="norms what its attention and MLP give"):
        plant_circuit(model, pairs, {"happy": ["happy"], "sad": ["sad"]}, general=1, neurons=1, layer=1)
