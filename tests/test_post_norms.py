"""Where a norm follows attention and MLP (Gemma), heads and neurons still sum to what is added to the residual."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import BY_NAME, counted, native_model, raw_inputs
from veena_lens.activation_cache import MissingActivation
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


def run(name: str = "plain") -> tuple[Any, Any, Any, Any]:
    """(model, inputs, twins of other images, cache) in pure float64."""
    model = native_model(BY_NAME[f"gemma3-{name}"], casts="none")
    raw = counted(raw_inputs(BY_NAME[f"gemma3-{name}"]))
    inputs = model.inputs_from_hf(**raw)
    twins = model.inputs_from_hf(**dict(raw, pixel_values=raw["pixel_values"].flip(-1) * 2))
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
    return model, inputs, twins, cache


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_components_heads_and_neurons_sum_to_the_residual() -> None:
    _model, inputs, _, cache = run()
    keep = inputs.attention_mask
    for layer, mlp_input in ((0, True), (1, False), (2, True), (3, False)):
        whole = cache["resid_mid" if mlp_input else "resid_pre", layer] if layer < 3 else cache["resid_post", 2]
        ln = f"ln{2 if mlp_input else 1}" if layer < 3 else None
        scale = cache["scale", layer, ln] if ln else cache["ln_final.hook_scale"]
        close(cache.decompose_resid(layer, mlp_input=mlp_input).sum(0)[keep], whole[keep])
        for neurons in (True, False):
            kw: dict[str, Any] = dict(layer=layer, mlp_input=mlp_input, expand_neurons=neurons)
            parts, labels = cache.get_full_resid_decomposition(**kw, return_labels=True)
            assert len(parts) == len(labels)
            close(parts.sum(0)[keep], whole[keep])
            onto = torch.randn(48, 2, dtype=torch.float64)
            close(cache.get_full_resid_decomposition(**kw, project_output_onto=onto).sum(0)[keep], (whole @ onto)[keep])
            applied = cache.get_full_resid_decomposition(**kw, apply_ln=True, project_output_onto=onto[:, 0])
            close(applied.sum(0)[keep], (whole / scale @ onto[:, 0])[keep])
    heads = cache.stack_head_results(3, return_labels=False).unflatten(0, (3, 4)).sum(1)
    close(heads[:, keep], torch.stack([cache["attn_out", i] for i in range(3)])[:, keep])
    rest = cache.stack_head_results(incl_remainder=True, pos_slice=-1, apply_ln=True)
    close(rest.sum(0), cache["ln_final.hook_normalized"][:, -1])
    neuron = cache.get_neuron_results(1, neuron_slice=[3, 5], pos_slice=-1)
    close(neuron, cache.get_neuron_results(1)[:, -1, [3, 5]])
    close(cache.get_neuron_results(2).sum(2)[keep], cache["mlp_out", 2][keep])
    accumulated = cache.accumulated_resid(incl_mid=True)
    close(accumulated[-1][keep], cache["resid_post", 2][keep])


def test_head_results_need_the_denominators() -> None:
    model, inputs, _, _ = run()
    _, cache = model.run_with_cache(inputs, names_filter=lambda name: name.endswith(("hook_z", "resid_post")))
    with pytest.raises(MissingActivation, match="ln1_post.hook_scale"):
        cache.stack_head_results()
    with pytest.raises(MissingActivation, match="ln1_post.hook_scale"):
        head_intention(cache, torch.ones(48).double())


def test_a_result_of_a_head_is_edited_before_the_norm() -> None:
    model, inputs, _, cache = run()
    with torch.no_grad():
        edit = ("blocks.1.attn.hook_result", lambda value, hook: value * 2)
        out, doubled = model.run_with_hooks(inputs, fwd_hooks=[edit]), 2 * cache["result", 1].sum(2)
        normed = model.blocks[1].ln1_post(doubled)
        wanted = model.run_with_hooks(inputs, fwd_hooks=[("blocks.1.hook_attn_out", lambda value, hook: normed)])
    close(out[inputs.attention_mask], wanted[inputs.attention_mask])


def test_biases_that_a_norm_follows_are_no_constant() -> None:
    model = native_model(BY_NAME["gemma3-attention-bias"], casts="none")
    inputs = model.inputs_from_hf(**counted(raw_inputs(BY_NAME["gemma3-attention-bias"])))
    _, cache = model.run_with_cache(inputs)
    with pytest.raises(ValueError, match="decompose_resid"):
        cache.get_full_resid_decomposition()
    keep = inputs.attention_mask
    close(cache.decompose_resid().sum(0)[keep], cache["resid_post", 2][keep])
    close(cache.stack_head_results(incl_remainder=True).sum(0)[keep], cache["resid_post", 2][keep])


@pytest.mark.parametrize("has_baseline", [True, False])
def test_pushes_of_heads_neurons_and_keys_sum_to_those_of_components(has_baseline: bool) -> None:
    model, inputs, twins, _cache = run("unequal-rows")
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
    model, inputs, twins, _ = run()
    kw: dict[str, Any] = dict(metric=logit_diff(5, 6), receivers="final", norm="frozen")
    senders = [*(f"L1H{h}" for h in range(4)), "1_attn_out", *(f"L2N{n}" for n in range(40)), "2_mlp_out"]
    found = path_patching(model, inputs[:2], twins[:2], senders, **kw).values[..., 0]
    close(found[:, :4].sum(1), found[:, 4])
    close(found[:, 5:-1].sum(1), found[:, -1])
    assert float(found[:, 4].abs().min()) > 1e-6 and float(found[:, -1].abs().min()) > 1e-6


def test_what_weights_say_alone_counts_the_factors_of_the_norms() -> None:
    model, _, _, _ = run()
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


def test_logit_attributions_sum_to_the_logit() -> None:
    model, inputs, _, cache = run()
    parts = cache.decompose_resid(pos_slice=-1)
    close(cache.logit_attrs(parts, 9, pos_slice=-1).sum(0), model(inputs)[:, -1, 9])


def test_what_neurons_would_add_is_refused_where_a_norm_follows() -> None:
    model, _, _, _ = run()
    with pytest.raises(ValueError, match="variant='factor'"):
        ena([(1, 3)], 2.0, variant="add", model=model, activations=[1.0])
    pairs = [SimpleNamespace(emotion=emotion) for emotion in ("happy", "sad")]
    with pytest.raises(ValueError, match="norms what its attention and MLP give"):
        plant_circuit(model, pairs, {"happy": ["happy"], "sad": ["sad"]}, general=1, neurons=1, layer=1)


def test_weights_under_their_names_in_transformer_lens() -> None:
    """`w` is what multiplies: 1 + the stored weight. `W_E` is the stored embedding, without its scale."""
    model, inputs, _, cache = run()
    found = model.tl_parameters()
    for name in ("ln1", "ln1_post", "ln2", "ln2_post"):
        assert torch.equal(found[f"blocks.2.{name}.w"], 1 + getattr(model.blocks[2], name).weight)
    assert torch.equal(found["ln_final.w"], 1 + model.ln_final.weight)
    assert torch.equal(found["embed.W_E"], model.embed.weight) and torch.equal(model.W_U, model.W_E.T)
    text = inputs.attention_mask & ~inputs.image_mask
    close(cache["hook_embed"][text], model.W_E[inputs.tokens[text]] * model.embed.factor(torch.float64))
