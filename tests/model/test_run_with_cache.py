"""run_with_cache: what it keeps, what it slices, where it stops, and that it tells the truth beside other hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import BY_NAME, QWEN, Case, counted_inputs, relative_error
from veena_lens import ActivationCache
from veena_lens.hook_table import hooks_of

everything = lambda name: True  # noqa: E731

# Of Qwen an image and a video, two thin images, text alone.
ANY_SIZE = {
    f"{family}-cache": Case(name="cache", family=family, rows=("2 i4x4 3 v2x2x4 2", "1 i2x6 2 i6x2 3", "4"))
    for family in QWEN
}


@pytest.fixture
def ready(model_of):
    """(model, inputs) of a case by name; `counted` positions make a padded row equal the row alone."""

    def get(name: str, **kw: Any) -> tuple[Any, Any]:
        case = ANY_SIZE.get(name) or BY_NAME[name]
        model = model_of(case, **dict(casts="none") | kw if name in ANY_SIZE else kw)
        return model, model.inputs_from_hf(**counted_inputs(case))

    return get


# --- names -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["clip-llama", *ANY_SIZE])
def test_no_filter_caches_exactly_the_default_hooks(name: str, ready) -> None:
    model, inputs = ready(name)
    _, cache = model.run_with_cache(inputs)
    assert set(cache.keys()) == {name for name, row in hooks_of(model.cfg).items() if row.by_default}
    left_out = set(hooks_of(model.cfg)) - set(cache.keys())
    large = {"hook_q_input", "hook_k_input", "hook_v_input", "hook_mlp_in", "hook_result"}
    if model.cfg.n_heads == model.cfg.n_key_value_heads:
        large.add("hook_attn_in")
    assert {name.rsplit(".", 1)[1] for name in left_out} == large


@pytest.mark.parametrize(
    "names_filter, expected",
    [
        ("blocks.1.attn.hook_z", {"blocks.1.attn.hook_z"}),
        ("blocks.0.attn.hook_k_input", {"blocks.0.hook_k_input"}),
        (["hook_embed", "vision.blocks.0.hook_mlp_in"], {"hook_embed", "vision.blocks.0.hook_mlp_in"}),
        (("hook_embed",), {"hook_embed"}),
        (
            lambda name: name.endswith("1.hook_resid_post"),
            {"blocks.1.hook_resid_post", "vision.blocks.1.hook_resid_post"},
        ),
        ([], set()),
        (lambda name: False, set()),
    ],
    ids=["str", "other-spelling", "list", "tuple", "predicate", "empty-list", "nothing"],
)
def test_filter_caches_exactly_what_it_names(names_filter: Any, expected: set[str], ready) -> None:
    model, inputs = ready("clip-llama")
    _, cache = model.run_with_cache(inputs, names_filter=names_filter)
    assert set(cache.keys()) == expected


@pytest.mark.parametrize(
    "wrong, near",
    [
        ("blocks.1.attn.hook_zz", "blocks.1.attn.hook_z"),
        ("blocks.7.attn.hook_z", "blocks.1.attn.hook_z"),
        ("vision.blocks.0.hook_resid", "vision.blocks.0.hook_resid_pre"),
        ("blocks.0.attn.hook_patern", "blocks.0.attn.hook_pattern"),
    ],
)
def test_unknown_name_raises_with_near_names(wrong: str, near: str, ready) -> None:
    model, inputs = ready("clip-llama")
    for names_filter in (wrong, [wrong], ["hook_embed", wrong]):
        with pytest.raises(ValueError, match=f"{wrong}.*{near}"):
            model.run_with_cache(inputs, names_filter=names_filter)
    with pytest.raises(ValueError, match=f"{wrong}.*{near}"):
        model.run_with_hooks(inputs, fwd_hooks=[(wrong, lambda value, hook: None)])


# --- slices ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "pos_slice", [-1, 3, slice(2, 5), slice(None, None, 3), slice(-4, None), [1, 5, 6], (2, 6)], ids=str
)
@pytest.mark.parametrize("name", ["one-kv-head", *ANY_SIZE])
def test_pos_slice_slices_only_positions_of_the_decoder(name: str, pos_slice: Any, ready) -> None:
    model, inputs = ready(name)
    _, whole = model.run_with_cache(inputs, names_filter=everything)
    logits, cache = model.run_with_cache(inputs, names_filter=everything, pos_slice=pos_slice)
    places = torch.arange(inputs.shape[1])
    if isinstance(pos_slice, int):
        places = places[[pos_slice]]
    elif isinstance(pos_slice, tuple):
        places = places[slice(*pos_slice)]
    else:
        places = places[pos_slice]
    assert torch.equal(logits, model(inputs))
    assert set(cache.keys()) == set(whole.keys())
    for each, row in hooks_of(model.cfg).items():
        axes, value = row.axis_names, whole[each]
        if axes[0] == "batch":
            value = value.index_select(axes.index("query_pos" if "query_pos" in axes else "pos"), places)
        assert torch.equal(cache[each], value), each


def test_slice_of_transformer_lens_means_the_same(ready) -> None:
    from transformer_lens.utilities import Slice

    model, inputs = ready("clip-llama")
    _, one = model.run_with_cache(inputs, pos_slice=Slice((1, 4)))
    _, other = model.run_with_cache(inputs, pos_slice=slice(1, 4))
    for name in one:
        assert torch.equal(one[name], other[name])


@pytest.mark.parametrize("name", ["one-row-no-padding", *ANY_SIZE])
def test_remove_batch_dim_leaves_images_alone(name: str, ready) -> None:
    model, inputs = ready(name)
    inputs = inputs[0]
    _, whole = model.run_with_cache(inputs, names_filter=everything)
    _, cache = model.run_with_cache(inputs, names_filter=everything, remove_batch_dim=True)
    after = ActivationCache(dict(whole.cache_dict), model, inputs=inputs).remove_batch_dim()
    assert len(cache["vision.hook_embed"]) == inputs.n_images[0] and not cache.has_batch_dim
    for each, row in hooks_of(model.cfg).items():
        expected = whole[each][0] if row.of_text else whole[each]
        assert torch.equal(cache[each], expected) and torch.equal(after[each], expected), each


def test_remove_batch_dim_and_pos_slice_together(ready) -> None:
    model, inputs = ready("one-row-no-padding")
    _, whole = model.run_with_cache(inputs)
    _, cache = model.run_with_cache(inputs, remove_batch_dim=True, pos_slice=-1)
    assert torch.equal(cache["blocks.1.attn.hook_z"], whole["blocks.1.attn.hook_z"][0, -1:])
    assert torch.equal(cache["blocks.1.attn.hook_pattern"], whole["blocks.1.attn.hook_pattern"][0, :, -1:])


def test_remove_batch_dim_refuses_two_rows(ready) -> None:
    model, inputs = ready("clip-llama")
    with pytest.raises(ValueError, match="2"):
        model.run_with_cache(inputs, remove_batch_dim=True)


@pytest.mark.parametrize("name", ["clip-llama", *ANY_SIZE])
def test_device_moves_what_is_kept(name: str, ready) -> None:
    model, inputs = ready(name)
    _, cache = model.run_with_cache(inputs, device="meta")
    assert {value.device.type for value in cache.values()} == {"meta"}
    assert model(inputs).device.type == "cpu"


# --- parts of the model ------------------------------------------------------------------------------
@pytest.mark.parametrize("stop", [0, 1, 2, -1, -2])
@pytest.mark.parametrize("name", ["window-qwen2", *ANY_SIZE])
def test_stop_at_layer_gives_the_residual_before_that_layer(name: str, stop: int, ready) -> None:
    """Before what deep-stack features add at that layer's input."""
    model, inputs = ready(name)
    _, whole = model.run_with_cache(inputs)
    resid, cache = model.run_with_cache(inputs, stop_at_layer=stop)
    layer = stop % model.cfg.n_layers
    assert torch.equal(resid, whole["resid_pre", layer])
    ran = {int(name.split(".")[1]) for name in cache if name.startswith("blocks.")}
    assert ran == set(range(layer))
    assert "unembed.hook_out" not in cache and "hook_embed" in cache and "hook_image_features" in cache
    assert torch.equal(model(inputs, stop_at_layer=stop), resid)


def test_stopping_stops_before_later_layers_compute(ready) -> None:
    model, inputs = ready("clip-llama")
    fired: list[str] = []
    with model.hooks([(everything, lambda value, hook: fired.append(hook.name))]):
        model(inputs, stop_at_layer=1)
    assert "blocks.0.hook_resid_post" in fired
    assert not [name for name in fired if name.startswith(("blocks.1.", "ln_final", "unembed"))]


@pytest.mark.parametrize("start", [0, 1, 2, -1])
def test_start_at_layer_continues_from_a_residual(start: int, ready) -> None:
    model, inputs = ready("equal-rows")
    logits, cache = model.run_with_cache(inputs)
    layers = model.cfg.n_layers
    layer = start if 0 <= start <= layers else start % layers
    resid = cache["resid_pre", layer] if layer < layers else cache["resid_post", -1]
    assert relative_error(model(resid, start_at_layer=start), logits) < 1e-12
    again, part = model.run_with_cache(resid, start_at_layer=start)
    assert relative_error(again, logits) < 1e-12
    assert not [n for n in part if n.startswith("vision.") or n == "hook_embed"]
    assert {int(n.split(".")[1]) for n in part if n.startswith("blocks.")} == set(range(layer, layers))


def test_start_and_stop_together_run_one_block(ready) -> None:
    model, inputs = ready("window-qwen2")
    _, cache = model.run_with_cache(inputs[1:])  # the longest row: no pads
    assert bool(inputs[1:].attention_mask.all())
    resid = model(cache["resid_pre", 1], start_at_layer=1, stop_at_layer=2)
    assert relative_error(resid, cache["resid_post", 1]) < 1e-12


def test_start_at_layer_with_pads_takes_the_inputs_mask(ready) -> None:
    model, inputs = ready("clip-llama")
    logits, cache = model.run_with_cache(inputs)
    again = model(cache["resid_pre", 1], start_at_layer=1, attention_mask=inputs.attention_mask)
    assert relative_error(again, logits, inputs.attention_mask) < 1e-9


@pytest.mark.parametrize("wrong", [9, -9])
@pytest.mark.parametrize("bound", ["stop_at_layer", "start_at_layer"])
def test_layer_bound_outside_the_model_raises(bound: str, wrong: int, ready) -> None:
    model, inputs = ready("equal-rows")
    first = inputs if bound == "stop_at_layer" else torch.zeros(2, 4, model.cfg.d_model, dtype=torch.float64)
    with pytest.raises(ValueError, match=str(wrong)):
        model(first, **{bound: wrong})


# --- padding -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name", ["clip-llama", "three-images-and-none", "right-padding", "window-qwen2", "text-mistral"]
)
def test_cache_of_a_padded_batch_equals_that_of_each_row_alone(name: str, ready) -> None:
    model, inputs = ready(name, casts="none")
    _, batch = model.run_with_cache(inputs)
    for row in range(len(inputs)):
        keep = inputs.attention_mask[row]
        start, n = int(keep.nonzero()[0]), int(keep.sum())
        _, single = model.run_with_cache(inputs[row].without_padding())
        for each, table in hooks_of(model.cfg).items():
            axes = table.axis_names
            if axes[0] != "batch" or not table.by_default:
                continue
            ours = batch[each][row]
            for axis in ("pos", "query_pos", "key_pos"):
                if axis in axes:
                    ours = ours.narrow(axes.index(axis) - 1, start, n)
            theirs = single[each][0]
            if each.endswith("attn_scores"):
                ours, theirs = (x.clamp(min=-1e9) for x in (ours, theirs))
            assert relative_error(ours, theirs) < 1e-10, (row, each)


@pytest.mark.parametrize("name", ["three-images-and-none", "touching-images-first"])
def test_order_of_rows_does_not_matter(name: str, ready) -> None:
    model, inputs = ready(name)
    order = torch.tensor(list(reversed(range(len(inputs)))))
    logits = model(inputs)
    assert relative_error(model(inputs[order]), logits[order], inputs.attention_mask[order]) < 1e-9


# --- truth beside other hooks ------------------------------------------------------------------------
@pytest.mark.parametrize("pos_slice", [None, -1, slice(1, None), [2, 3]], ids=str)
@pytest.mark.parametrize("remove_batch_dim", [False, True])
def test_hook_that_writes_in_place_does_not_falsify_the_cache(pos_slice: Any, remove_batch_dim: bool, ready) -> None:
    """`resid_post` of a layer and `resid_pre` of the next are one tensor."""
    model, inputs = ready("one-row-no-padding")
    options = dict(pos_slice=pos_slice, remove_batch_dim=remove_batch_dim)
    _, plain = model.run_with_cache(inputs, **options)
    with model.hooks([("blocks.1.hook_resid_pre", lambda value, hook: value.mul_(0))]):
        _, cache = model.run_with_cache(inputs, **options)
    assert torch.equal(cache["resid_post", 0], plain["resid_post", 0])
    assert (cache["resid_pre", 1] == 0).all()


def test_writing_into_one_cached_value_leaves_the_rest(ready) -> None:
    """A user may edit a cached activation, as patch setters do, after the run."""
    model, inputs = ready("clip-llama")
    _, cache = model.run_with_cache(inputs)
    logits = model(inputs)
    for name in cache:
        cache[name].mul_(2)
    assert torch.equal(model(inputs), logits)


def test_cached_values_do_not_require_gradients(ready) -> None:
    model, inputs = ready("clip-llama")
    _, cache = model.run_with_cache(inputs)
    assert not any(value.requires_grad for value in cache.values())


# --- gradients ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["clip-llama", "siglip-qwen2", "text-mistral"])
def test_incl_bwd_gives_the_gradients_of_autograd(name: str, ready) -> None:
    """The gradient at a hook point is that of the loss with respect to the value that goes on from it."""
    model, inputs = ready(name, casts="none")
    wrong = {}
    for names in (
        [n for n, row in hooks_of(model.cfg).items() if row.by_default],
        [n for n, row in hooks_of(model.cfg).items() if not row.by_default],
    ):
        loss, cache = model.run_with_cache(inputs, return_type="loss", incl_bwd=True, names_filter=names)
        model.zero_grad()
        assert loss.ndim == 0
        assert {n.removesuffix("_grad") for n in cache} == set(names)
        for each in names:
            along, measured = slopes(model, inputs, each, cache)
            if abs(measured - along) > 1e-7 + 1e-4 * abs(along):
                wrong[each] = (along, measured)
    assert wrong == {}


def slopes(model: Any, inputs: Any, name: str, cache: Any) -> tuple[float, float]:
    """The loss's slope along a random direction of one activation: from its gradient, and by finite differences."""
    gradient, step = cache[f"{name}_grad"], 1e-4
    assert gradient.shape == cache[name].shape, name
    direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    if name.endswith("hook_attn_scores"):
        direction = direction * (cache[name] > -1e30)
    direction = direction / direction.norm()
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            edit = (name, lambda value, hook, sign=sign: value + sign * step * direction)
            losses.append(float(model.run_with_hooks(inputs, return_type="loss", fwd_hooks=[edit])))
    return float((gradient * direction).sum()), (losses[0] - losses[1]) / (2 * step)


def test_backward_hooks_fire_with_the_gradients_of_autograd(ready) -> None:
    model, inputs = ready("clip-llama")
    kept: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    names = ["blocks.0.hook_resid_post", "blocks.1.attn.hook_z", "connector.hook_out", "hook_embed"]

    def keep(value: Tensor, hook: Any) -> None:
        value.retain_grad()
        kept[hook.name] = value

    def note(gradient: Tensor, hook: Any) -> None:
        seen[hook.name] = gradient.clone()

    with model.hooks(fwd_hooks=[(n, keep) for n in names]):
        model(inputs)[:, -1, 5].sum().backward()
    with model.hooks(bwd_hooks=[(n, note) for n in names]):
        model(inputs)[:, -1, 5].sum().backward()
    model.zero_grad()
    assert set(seen) == set(names)
    for name in names:
        assert relative_error(seen[name], kept[name].grad) < 1e-9, name


@pytest.mark.parametrize("name", ["clip-llama", *ANY_SIZE])
def test_inference_mode_gives_the_same(name: str, ready) -> None:
    model, inputs = ready(name)
    logits, cache = model.run_with_cache(inputs, names_filter=everything)
    with torch.inference_mode():
        fast, quick = model.run_with_cache(inputs, names_filter=everything)
        edited = model.run_with_hooks(inputs, fwd_hooks=[("blocks.0.attn.hook_pattern", lambda v, hook: v.mul_(0))])
    assert torch.equal(fast, logits)
    assert all(torch.equal(cache[each], quick[each]) for each in cache)
    assert relative_error(edited, logits) > 1e-3
