"""Hooks come and go as asked: contexts, permanent hooks, predicates, and nothing left after an exception."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import BY_NAME, build_hf, raw_inputs, relative_error


@pytest.fixture
def model() -> Any:
    """A model of one's own: permanent hooks are tested here."""
    from veena_lens import HookedVLM

    return HookedVLM.from_hf(build_hf(BY_NAME["clip-llama"]))


@pytest.fixture
def inputs(model) -> Any:
    return model.inputs_from_hf(**raw_inputs(BY_NAME["clip-llama"]))


def double(value: Tensor, hook: Any) -> Tensor:
    return value * 2


def hooked(model: Any) -> list[str]:
    return [
        n for n, h in model.hook_dict.items() if h._forward_hooks or h._backward_hooks or h.fwd_hooks or h.bwd_hooks
    ]


def test_context_removes_its_hooks(model, inputs) -> None:
    plain = model(inputs)
    with model.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", double)]):
        assert hooked(model) == ["blocks.0.hook_mlp_out"]
        assert relative_error(model(inputs), plain) > 1e-3
    assert hooked(model) == []
    assert torch.equal(model(inputs), plain)


def test_nested_contexts_remove_only_their_own(model, inputs) -> None:
    plain = model(inputs)
    with model.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", double)]):
        outer = model(inputs)
        with model.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", double), ("blocks.1.hook_attn_out", double)]):
            assert relative_error(model(inputs), outer) > 1e-3
        assert torch.equal(model(inputs), outer)
    assert torch.equal(model(inputs), plain)


def test_runs_inside_a_context_leave_its_hooks_in_place(model, inputs) -> None:
    with model.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", double)]):
        outer = model(inputs)
        model.run_with_cache(inputs)
        model.run_with_hooks(inputs, fwd_hooks=[("blocks.1.hook_attn_out", double)])
        assert torch.equal(model(inputs), outer)
    assert hooked(model) == []


@pytest.mark.parametrize("how", ["run_with_hooks", "hooks", "run_with_cache", "generate"])
def test_hook_that_raises_leaves_no_hook_behind(how: str, model, inputs) -> None:
    plain = model(inputs)

    def fail(value: Tensor, hook: Any) -> None:
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        if how == "run_with_hooks":
            model.run_with_hooks(inputs, fwd_hooks=[("blocks.0.hook_mlp_out", double), ("blocks.1.hook_mlp_out", fail)])
        else:
            with model.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", fail)]):
                if how == "run_with_cache":
                    model.run_with_cache(inputs)
                elif how == "generate":
                    model.generate(inputs, max_new_tokens=2, return_type="tokens")
                else:
                    model(inputs)
    assert hooked(model) == []
    assert torch.equal(model(inputs), plain)


def test_unknown_name_adds_no_hook_at_all(model, inputs) -> None:
    with pytest.raises(ValueError, match="hook_mpl_out.*hook_mlp_out"):
        with model.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", double), ("blocks.1.hook_mpl_out", double)]):
            pass
    with pytest.raises(ValueError, match="hook_mpl_out.*hook_mlp_out"):
        model.add_hook("blocks.1.hook_mpl_out", double)
    assert hooked(model) == []


def test_added_hook_stays_until_reset(model, inputs) -> None:
    plain = model(inputs)
    model.add_hook("blocks.0.hook_mlp_out", double)
    first = model(inputs)
    assert relative_error(first, plain) > 1e-3
    assert torch.equal(model(inputs), first)
    model.reset_hooks()
    assert hooked(model) == [] and torch.equal(model(inputs), plain)


def test_permanent_hook_survives_reset_and_contexts(model, inputs) -> None:
    plain = model(inputs)
    model.add_hook("blocks.0.hook_mlp_out", double, is_permanent=True)
    first = model(inputs)
    model.reset_hooks()
    with model.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", double)]):
        model(inputs)
    model.run_with_cache(inputs)
    assert torch.equal(model(inputs), first) and relative_error(first, plain) > 1e-3
    model.reset_hooks(including_permanent=True)
    assert torch.equal(model(inputs), plain)


def test_predicate_on_names_hooks_wherever_it_holds(model, inputs) -> None:
    fired: list[str] = []
    model.run_with_hooks(
        inputs,
        fwd_hooks=[(lambda name: name.endswith("hook_mlp_out"), lambda value, hook: fired.append(hook.name))],
    )
    assert sorted(fired) == sorted(
        [f"blocks.{i}.hook_mlp_out" for i in range(2)] + [f"vision.blocks.{i}.hook_mlp_out" for i in range(2)]
    )
    model.add_hook(lambda name: name == "hook_embed", double)
    assert hooked(model) == ["hook_embed"]


def test_later_hooks_see_what_earlier_ones_made(model, inputs) -> None:
    seen: list[Tensor] = []

    def note(value: Tensor, hook: Any) -> None:
        seen.append(value.clone())

    name = "blocks.0.hook_mlp_out"
    model.run_with_hooks(inputs, fwd_hooks=[(name, note), (name, double), (name, note)])
    assert torch.equal(seen[1], seen[0] * 2)


def test_cache_beside_an_edit_holds_the_edited_value(model, inputs) -> None:
    _, plain = model.run_with_cache(inputs)
    with model.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", double)]):
        logits, cache = model.run_with_cache(inputs)
        assert torch.equal(logits, model(inputs))
    assert torch.equal(cache["mlp_out", 0], 2 * plain["mlp_out", 0])
    assert relative_error(cache["resid_post", 0], plain["resid_mid", 0] + 2 * plain["mlp_out", 0]) < 1e-12


def test_backward_hook_edits_the_gradient(model, inputs) -> None:
    """A gradient doubled at a hook point is doubled in everything before it, and only there."""
    name = "blocks.1.hook_resid_pre"

    def grads() -> dict[str, Tensor]:
        model.zero_grad()
        model(inputs)[:, -1, 3].sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = grads()
    with model.hooks(bwd_hooks=[(name, lambda gradient, hook: gradient * 2)]):
        edited = grads()
    model.zero_grad()
    before, after = "blocks.0.mlp.down.weight", "blocks.1.mlp.down.weight"
    assert relative_error(edited[before], 2 * plain[before]) < 1e-9
    assert relative_error(edited[after], plain[after]) < 1e-12


def test_add_caching_hooks_fill_a_dictionary_in_later_runs(model, inputs) -> None:
    _, cache = model.run_with_cache(inputs)
    kept = model.add_caching_hooks(lambda name: name.endswith("hook_z"))
    model(inputs)
    model.reset_hooks()
    assert {n for n in cache if n.endswith("hook_z")} == set(kept)
    assert all(torch.equal(kept[n], cache[n]) for n in kept)


def test_idle_hook_points_cost_no_pattern(model, inputs, monkeypatch) -> None:
    """Without a listener the fused kernel runs: softmax is never called on [pos pos]."""
    called: list[tuple[int, ...]] = []
    real = torch.Tensor.softmax

    def spy(self: Tensor, *args: Any, **kw: Any) -> Tensor:
        called.append(tuple(self.shape))
        return real(self, *args, **kw)

    monkeypatch.setattr(torch.Tensor, "softmax", spy)
    with torch.no_grad():
        model(inputs)
        assert called == []
        model.run_with_cache(inputs, names_filter="blocks.1.attn.hook_pattern")
    length = inputs.shape[1]
    assert called == [(2, 6, length, length)], "only the layer that is heard makes its pattern"
