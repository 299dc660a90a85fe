"""Hooks as users and other packages put them: points of their own, wrapped points, compiled models, wrong results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from tests.cases import BY_NAME, counted, native_model, raw_inputs, relative_error
from tests.pairs import ready_of
from veena_lens.interventions import BoostAttention, Steer

NAME = "three-images-and-none"
SITE, PATTERN = "blocks.0.hook_resid_post", "blocks.1.attn.hook_pattern"


@pytest.fixture
def ready(model_of: Any) -> tuple[Any, Any]:
    return ready_of(model_of, BY_NAME[NAME])


@pytest.fixture
def own() -> tuple[Any, Any]:
    """A model that a test may rebuild."""
    import copy

    model = copy.deepcopy(native_model(BY_NAME[NAME], torch.float64, "none"))
    return model, model.inputs_from_hf(**counted(raw_inputs(BY_NAME[NAME])))


class Wrapper(nn.Module):
    """What SAELens puts in a hook point's place: a module with points of its own."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.hook_sae_input, self.hook_sae_acts_post, self.hook_sae_output = HookPoint(), HookPoint(), HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        return self.hook_sae_output(self.hook_sae_acts_post(self.hook_sae_input(x) * self.scale) / self.scale)


# --- points of one's own --------------------------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("site", [SITE, PATTERN, "blocks.1.attn.hook_z", "blocks.0.mlp.hook_post"])
def test_module_in_a_points_place_is_run_cached_and_hooked(site: str, own: tuple[Any, Any]) -> None:
    model, inputs = own
    plain, there = model.run_with_cache(inputs)
    parent, _, leaf = site.rpartition(".")
    setattr(model.get_submodule(parent), leaf, Wrapper(2.0))
    model.setup()
    logits, cache = model.run_with_cache(inputs)
    assert relative_error(logits, plain, inputs.attention_mask) < 1e-12
    assert torch.equal(cache[f"{site}.hook_sae_acts_post"], 2 * there[site]) and site not in cache
    name = f"{site}.hook_sae_acts_post"
    _, named = model.run_with_cache(inputs, names_filter=name, pos_slice=-1 if site == SITE else None)
    assert torch.equal(named[name], cache[name][:, -1:] if site == SITE else cache[name])
    zeroed = model.run_with_hooks(inputs, fwd_hooks=[(name, lambda x, hook: 0 * x)])
    assert relative_error(zeroed, plain, inputs.attention_mask) > 1e-4
    with model.intervene([Steer(1, torch.ones(48))]):
        assert not torch.equal(model(inputs), logits)
    if site == SITE:
        assert torch.equal(cache.at("last", name), cache[name][:, -1])
        with pytest.raises(ValueError, match="No hook point"):
            model.intervene([Steer(0, torch.ones(48))])


@torch.no_grad()
def test_point_added_by_hand_is_cached(own: tuple[Any, Any]) -> None:
    model, inputs = own
    block = model.blocks[0]
    block.mlp.hook_in, inner = HookPoint(), block.mlp.forward
    block.mlp.forward = lambda x: inner(block.mlp.hook_in(x))
    block.hook_mine = HookPoint()  # never called
    model.setup()
    _, cache = model.run_with_cache(inputs)
    assert cache["blocks.0.mlp.hook_in"].shape == (*inputs.shape, 48) and "blocks.0.hook_mine" not in cache
    model.run_with_hooks(inputs, fwd_hooks=[("blocks.0.hook_mine", lambda x, hook: x)])


# --- who listens ----------------------------------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("site", [PATTERN, "blocks.1.attn.hook_attn_scores", "blocks.0.attn.hook_result"])
@pytest.mark.parametrize("how", ["pre hook", "forward", "global"])
def test_every_kind_of_listener_is_served(how: str, site: str, own: tuple[Any, Any]) -> None:
    model, inputs = own
    point, plain, seen = model.hook_dict[site], model(inputs), []
    _, cache = model.run_with_cache(inputs, names_filter=site)

    def note(module: nn.Module, args: Any, out: Any = None) -> None:
        if module is point:
            seen.append(args[0].clone())

    if how == "pre hook":
        handle = point.register_forward_pre_hook(note)
    elif how == "global":
        handle = nn.modules.module.register_module_forward_hook(note)
    else:
        point.forward = lambda x: (seen.append(x.clone()), x)[1]
        handle = None
    assert torch.equal(model(inputs), plain) and len(seen) == 1 and torch.equal(seen[0], cache[site])
    if handle is not None:
        handle.remove()
        handle = point.register_forward_pre_hook(lambda module, args: (0 * args[0],))
        assert relative_error(model(inputs), plain, inputs.attention_mask) > 1e-4
        handle.remove()
        assert torch.equal(model(inputs), plain) and len(seen) == 1


# --- compiled models ------------------------------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("how", ["module", "forward", "method", "block"])
def test_compiled_model_sees_hooks_and_edits_that_come_and_go(how: str, own: tuple[Any, Any]) -> None:
    model, inputs = own
    torch._dynamo.reset()
    steer = [Steer(0, torch.ones(48), alpha=3.0, positions="all"), BoostAttention(1, factor=4.0, mode="mul")]
    plain, cached = model(inputs), model.run_with_cache(inputs)[1][PATTERN]
    with model.intervene(steer):
        wanted = model(inputs)
    if how == "module":
        run = torch.compile(model, backend="eager")
    elif how == "forward":
        run = torch.compile(model.forward, backend="eager")
    elif how == "method":
        model.compile(backend="eager")
        run = model
    else:
        for block in model.blocks:
            block.compile(backend="eager")
            block.mlp.compile(backend="eager")
        run = model
    with model.intervene(steer):
        assert torch.equal(run(inputs), wanted)
    assert torch.equal(run(inputs), plain)
    with model.intervene(steer):
        assert torch.equal(run(inputs), wanted)
    seen: list[Tensor] = []
    with model.hooks([(PATTERN, lambda x, hook: seen.append(x))]):
        assert torch.equal(run(inputs), plain)
    assert torch.equal(seen[0], cached)


# --- wrong results --------------------------------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("site", [SITE, "blocks.0.attn.hook_z", "vision.blocks.0.hook_mlp_out", PATTERN])
@pytest.mark.parametrize("wrong, error, words", [
    (lambda x: x.float(), ValueError, "torch.float32.*must be like.*torch.float64"),
    (lambda x: x[:1], ValueError, r"returned a tensor \[1, "), (lambda x: x[..., :1], ValueError, r", 1\], torch"),
    (lambda x: x.sum(), ValueError, r"returned a tensor \[\]"), (lambda x: x.numpy(), TypeError, "ndarray"),
    (lambda x: (x,), TypeError, "returned tuple"), (lambda x: 3, TypeError, "returned int; return None"),
], ids=["dtype", "rows", "width", "scalar", "array", "tuple", "number"])  # fmt: skip
def test_hook_that_returns_something_else_is_named(
    wrong: Any, error: Any, words: str, site: str, ready: tuple[Any, Any]
) -> None:
    model, inputs = ready
    match = f"(?s)The hook at {site}.*{words}"
    with pytest.raises(error, match=match):
        model.run_with_hooks(inputs, fwd_hooks=[(site, lambda x, hook: wrong(x))])
    model.add_hook(site, lambda x, hook: wrong(x))
    with pytest.raises(error, match=match):
        model(inputs)
    model.reset_hooks()
    with pytest.raises(TypeError, match=f"hook for {site} must be a function"):
        model.run_with_hooks(inputs, fwd_hooks=[(site, None)])


def test_backward_hook_that_returns_something_else_is_named(ready: tuple[Any, Any]) -> None:
    model, inputs = ready
    with pytest.raises(ValueError, match=f"hook at {SITE}"), model.hooks(bwd_hooks=[(SITE, lambda g, hook: g[:1])]):
        model(inputs, return_type="loss").backward()


# --- nothing returned -----------------------------------------------------------------------------------------
@torch.no_grad()
def test_return_type_none_runs_the_last_norm_and_not_the_unembedding(ready: tuple[Any, Any]) -> None:
    model, inputs = ready
    _, whole = model.run_with_cache(inputs)
    out, cache = model.run_with_cache(inputs, return_type=None)
    assert out is None and set(whole.keys()) - set(cache.keys()) == {"unembed.hook_in", "unembed.hook_out"}
    assert all(torch.equal(cache[name], whole[name]) for name in cache.keys())  # noqa: SIM118
    found = cache.decompose_resid(apply_ln=True, return_labels=False)
    torch.testing.assert_close(found, whole.decompose_resid(apply_ln=True, return_labels=False))
    heard: list[str] = []
    names = ["ln_final.hook_scale", "ln_final.hook_normalized"]
    model.run_with_hooks(
        inputs, return_type=None, fwd_hooks=[(n, lambda x, hook: heard.append(hook.name)) for n in names]
    )
    assert heard == names
