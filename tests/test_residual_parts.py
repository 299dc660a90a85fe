"""Parts of the residual stream where a norm follows attention and MLP: heads and neurons still sum to what is added."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import BY_NAME, native_model
from tests.pairs import ready_of
from veena_lens.activation_cache import MissingActivation
from veena_lens.circuits import head_intention


def run(name: str = "plain") -> tuple[Any, Any, Any]:
    """(model, inputs, cache) in pure float64."""
    model, inputs = ready_of(native_model, BY_NAME[f"gemma3-{name}"])
    with torch.no_grad():
        return model, inputs, model.run_with_cache(inputs)[1]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_components_heads_and_neurons_sum_to_the_residual() -> None:
    _, inputs, cache = run()
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
    model, inputs, _ = run()
    _, cache = model.run_with_cache(inputs, names_filter=lambda name: name.endswith(("hook_z", "resid_post")))
    with pytest.raises(MissingActivation, match="ln1_post.hook_scale"):
        cache.stack_head_results()
    with pytest.raises(MissingActivation, match="ln1_post.hook_scale"):
        head_intention(cache, torch.ones(48).double())


def test_a_result_of_a_head_is_edited_before_the_norm() -> None:
    model, inputs, cache = run()
    with torch.no_grad():
        edit = ("blocks.1.attn.hook_result", lambda value, hook: value * 2)
        out, doubled = model.run_with_hooks(inputs, fwd_hooks=[edit]), 2 * cache["result", 1].sum(2)
        normed = model.blocks[1].ln1_post(doubled)
        wanted = model.run_with_hooks(inputs, fwd_hooks=[("blocks.1.hook_attn_out", lambda value, hook: normed)])
    close(out[inputs.attention_mask], wanted[inputs.attention_mask])


def test_biases_that_a_norm_follows_are_no_constant() -> None:
    _, inputs, cache = run("attention-bias")
    with pytest.raises(ValueError, match="decompose_resid"):
        cache.get_full_resid_decomposition()
    keep = inputs.attention_mask
    close(cache.decompose_resid().sum(0)[keep], cache["resid_post", 2][keep])
    close(cache.stack_head_results(incl_remainder=True).sum(0)[keep], cache["resid_post", 2][keep])


def test_logit_attributions_sum_to_the_logit() -> None:
    model, inputs, cache = run()
    parts = cache.decompose_resid(pos_slice=-1)
    close(cache.logit_attrs(parts, 9, pos_slice=-1).sum(0), model(inputs)[:, -1, 9])


def test_weights_under_their_names_in_transformer_lens() -> None:
    """`w` is what multiplies: 1 + the stored weight. `W_E` is the stored embedding, without its scale."""
    model, inputs, cache = run()
    found = model.tl_parameters()
    for name in ("ln1", "ln1_post", "ln2", "ln2_post"):
        assert torch.equal(found[f"blocks.2.{name}.w"], 1 + getattr(model.blocks[2], name).weight)
    assert torch.equal(found["ln_final.w"], 1 + model.ln_final.weight)
    assert torch.equal(found["embed.W_E"], model.embed.weight) and torch.equal(model.W_U, model.W_E.T)
    text = inputs.attention_mask & ~inputs.image_mask
    close(cache["hook_embed"][text], model.W_E[inputs.tokens[text]] * model.embed.factor(torch.float64))
