"""Every hook point is live: it fires with its documented shape, and an edit acts as the mathematics says.

The plain model of `tests/reference.py` recomputes everything downstream of an edit; casts are off, so that
both agree to rounding in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import BY_NAME, Case, counted, hf_model, raw_inputs, relative_error
from tests.model.checks import assert_edits_act, disagreeing, tokens_of
from tests.model.noise import logits_edited, make_noisy_in_place, noisy, replace_with_noisy
from tests.reference import reference_logits, reference_values
from veena_lens.hook_table import HOOK_TABLE, aliases, canonical, hooks_of, layer_of

NAMES = [
    "clip-llama",
    "equal-rows",
    "both-biases-tied",
    "wide-heads",
    "image-28-patch-7",
    "feature-list-full-ends",
    "feature-zero",
    "siglip-default-strategy",
    "window-qwen2",
    "right-padding",
    "text-llama-bias",
    "text-mistral",
]
FEW = ["clip-llama", "siglip-qwen2", "text-mistral"]
everything = lambda name: True  # noqa: E731


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest) -> Case:
    return BY_NAME[request.param]


def dimensions(model: Any, inputs: Any, name: str) -> tuple[int, ...]:
    """Sizes that the table's axes stand for."""
    cfg = model.cfg
    batch, pos = inputs.shape
    sizes: dict[str, int] = dict(batch=batch, d_vocab=cfg.d_vocab, n_image_tokens=int(inputs.image_mask.sum()))
    part = cfg
    if name.startswith("vision."):
        part, pos = cfg.vision, cfg.vision.n_positions
    if cfg.vision is not None:
        sizes |= dict(crop=len(inputs.pixel_values), d_in=cfg.connector.d_in, d_hidden=cfg.connector.d_hidden)
    if name.startswith("connector."):
        pos = cfg.vision.n_features
    sizes |= dict(pos=pos, query_pos=pos, key_pos=pos)
    for axis in ("d_model", "d_mlp", "d_head", "n_heads", "n_key_value_heads"):
        sizes[axis] = getattr(part, axis)
    return tuple(int(axis) if axis.isdigit() else sizes[axis] for axis in hooks_of(cfg)[name].axis_names)


def test_hook_points_are_exactly_the_documented_ones(case: Case, model_of) -> None:
    model = model_of(case, casts="none")
    assert {canonical(name) for name in model.hook_dict} == set(hooks_of(model.cfg))
    for name in hooks_of(model.cfg):
        assert model.hook_dict[name].name == name


def test_every_hook_point_fires_with_its_documented_shape(case: Case, model_of) -> None:
    model = model_of(case, casts="none")
    inputs = model.inputs_from_hf(**raw_inputs(case))
    seen: dict[str, tuple[int, ...]] = {}
    calls: list[str] = []

    def note(value: Tensor, hook: Any) -> None:
        seen[hook.name] = tuple(value.shape)
        calls.append(hook.name)

    with torch.no_grad():
        model.run_with_hooks(inputs, fwd_hooks=[(everything, note)])
    assert seen == {name: dimensions(model, inputs, name) for name in hooks_of(model.cfg)}
    assert len(calls) == len(set(calls)), "a hook point fired twice in one pass"


def test_hook_points_fire_in_the_order_of_the_table(model_of) -> None:
    model = model_of(BY_NAME["clip-llama"], casts="none")
    order: list[str] = []
    with torch.no_grad():
        model.run_with_hooks(
            model.inputs_from_hf(**raw_inputs(BY_NAME["clip-llama"])),
            fwd_hooks=[(lambda name: "_input" not in name, lambda value, hook: order.append(hook.name))],
        )
    of_a_block = [name for name in order if name.startswith("blocks.1.")]
    table = [name for name in hooks_of(model.cfg) if name.startswith("blocks.1.") and "_input" not in name]
    assert of_a_block == table


def test_every_value_equals_the_plain_model(case: Case, model_of) -> None:
    model, raw = model_of(case, casts="none"), counted(raw_inputs(case))
    values = reference_values(hf_model(case).config, hf_model(case).state_dict(), raw)
    inputs = model.inputs_from_hf(**raw)
    with torch.no_grad():
        logits, cache = model.run_with_cache(inputs, names_filter=everything)
    assert disagreeing(cache, values, hooks_of(model.cfg), model, tokens_of(inputs)) == {}
    assert relative_error(logits, values["unembed.hook_out"], raw["attention_mask"].bool()) < 1e-10


IN_PLACE = ["clip-llama", "both-biases-tied", "feature-list-full-ends", "siglip-default-strategy", "text-mistral"]
EDITS = [(name, replace_with_noisy) for name in NAMES] + [(name, make_noisy_in_place) for name in IN_PLACE]


@pytest.mark.parametrize("name, edit", EDITS)
def test_edit_of_every_hook_point_acts_as_the_mathematics_says(name: str, edit: Callable[..., Any], model_of) -> None:
    case = BY_NAME[name]
    raw = counted(raw_inputs(case))
    plain = partial(reference_logits, hf_model(case).config, hf_model(case).state_dict(), raw)
    assert_edits_act(model_of(case, casts="none"), raw, plain, [edit])


def test_two_edits_together_act_as_the_mathematics_says(case: Case, model_of) -> None:
    model, raw = model_of(case, casts="none"), counted(raw_inputs(case))
    config, state = hf_model(case).config, hf_model(case).state_dict()
    inputs, keep = model.inputs_from_hf(**raw), raw["attention_mask"]
    pairs = [
        ("blocks.0.attn.hook_pattern", "blocks.1.attn.hook_attn_scores"),
        ("blocks.0.attn.hook_attn_scores", "blocks.0.attn.hook_pattern"),
        ("blocks.1.attn.hook_z", "blocks.1.attn.hook_result"),
        ("blocks.0.ln1.hook_scale", "blocks.0.ln1.hook_normalized"),
        ("blocks.0.attn.hook_q", "blocks.0.attn.hook_rot_q"),
        ("blocks.0.hook_q_input", "blocks.0.attn.hook_q"),
        ("blocks.0.hook_q_input", "blocks.0.hook_k_input"),
        ("blocks.1.hook_mlp_in", "blocks.1.mlp.hook_post"),
        ("blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"),
        ("hook_embed", "ln_final.hook_scale"),
    ]
    wrong = {}
    for pair in pairs:
        edits = {name: lambda value, name=name: noisy(name, value) for name in pair}
        with torch.no_grad():
            ours = model.run_with_hooks(inputs, fwd_hooks=[(name, replace_with_noisy) for name in pair])
        error = relative_error(ours, reference_logits(config, state, raw, edits), keep)
        if not error < 1e-10:
            wrong[pair] = error
    assert wrong == {}


def test_same_tensor_returned_counts_as_no_edit(case: Case, model_of) -> None:
    model = model_of(case)
    inputs = model.inputs_from_hf(**raw_inputs(case))
    with torch.no_grad():
        plain = model(inputs)
        assert torch.equal(model.run_with_hooks(inputs, fwd_hooks=[(everything, lambda value, hook: value)]), plain)
        assert torch.equal(model.run_with_hooks(inputs, fwd_hooks=[(everything, lambda value, hook: None)]), plain)


@pytest.mark.parametrize(
    "dtype, casts",
    [(torch.float64, "hf"), (torch.float64, "none"), (torch.float32, "hf"), (torch.bfloat16, "hf")],
    ids=["float64", "float64-no-casts", "float32", "bfloat16"],
)
@pytest.mark.parametrize("name", FEW)
def test_listening_changes_no_bit(name: str, dtype: torch.dtype, casts: str, model_of) -> None:
    model = model_of(BY_NAME[name], dtype, casts)
    inputs = model.inputs_from_hf(**raw_inputs(BY_NAME[name], dtype))
    with torch.no_grad():
        plain = model(inputs)
        assert torch.equal(model(inputs), plain), "two runs differ"
        assert torch.equal(model.run_with_cache(inputs)[0], plain)
        changed = [
            each
            for each in hooks_of(model.cfg)
            if not torch.equal(model.run_with_cache(inputs, names_filter=each)[0], plain)
        ]
        assert changed == []
        assert torch.equal(model.run_with_cache(inputs, names_filter=everything)[0], plain)


@pytest.mark.parametrize("name", FEW)
def test_listening_with_gradients_on_changes_no_bit(name: str, model_of) -> None:
    model = model_of(BY_NAME[name])
    inputs = model.inputs_from_hf(**raw_inputs(BY_NAME[name]))
    with torch.no_grad():
        plain = model(inputs)
    assert torch.equal(model(inputs), plain)
    assert torch.equal(model.run_with_cache(inputs, names_filter=everything)[0], plain)


def test_materialised_attention_agrees_with_fused(case: Case, model_of) -> None:
    """An edit that changes no number still leaves the fused kernel."""
    model, raw = model_of(case, casts="none"), raw_inputs(case)
    inputs = model.inputs_from_hf(**raw)
    names = [n for n in model.hook_dict if n.endswith(("hook_attn_scores", "hook_pattern"))]
    with torch.no_grad():
        fused = model(inputs)
        explicit = model.run_with_hooks(inputs, fwd_hooks=[(n, lambda value, hook: value.clone()) for n in names])
        results = model.run_with_hooks(
            inputs, fwd_hooks=[(lambda n: n.endswith("hook_result"), lambda value, hook: value + 0)]
        )
    assert relative_error(explicit, fused, raw["attention_mask"]) < 1e-12
    assert relative_error(results, fused, raw["attention_mask"]) < 1e-12


@pytest.mark.parametrize("name", ["clip-llama", "window-qwen2", "right-padding"])
def test_edit_leaves_earlier_layers_alone(name: str, model_of) -> None:
    model = model_of(BY_NAME[name], casts="none")
    inputs = model.inputs_from_hf(**raw_inputs(BY_NAME[name]))
    with torch.no_grad():
        _, plain = model.run_with_cache(inputs)
        with model.hooks(fwd_hooks=[("blocks.1.attn.hook_z", make_noisy_in_place)]):
            _, edited = model.run_with_cache(inputs)
    order = list(hooks_of(model.cfg))
    for each in order[: order.index("blocks.1.attn.hook_z")]:
        if each in plain:
            assert torch.equal(plain[each], edited[each]), each
    for each in ("blocks.1.hook_attn_out", "blocks.1.hook_resid_post", "unembed.hook_out"):
        assert not torch.equal(plain[each], edited[each]), each


@pytest.mark.parametrize("name", ["clip-llama", "window-mistral"])
def test_edit_leaves_earlier_positions_alone(name: str, model_of) -> None:
    """The decoder is causal: what is done at position p reaches nothing before p."""
    model, raw = model_of(BY_NAME[name], casts="none"), raw_inputs(BY_NAME[name])
    inputs, at = model.inputs_from_hf(**raw), raw["input_ids"].shape[1] - 3

    def edit(value: Tensor, hook: Any) -> None:
        value[:, at:] = 3.0

    with torch.no_grad():
        plain = model(inputs)
        edited = model.run_with_hooks(inputs, fwd_hooks=[("blocks.0.hook_resid_pre", edit)])
    keep = raw["attention_mask"].bool()
    keep[:, at:] = False
    assert relative_error(edited, plain, keep) < 1e-12
    assert (edited[:, at:] - plain[:, at:]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("name", ["clip-llama", "siglip-qwen2"])
def test_both_names_of_split_inputs_mean_one_point(name: str, model_of) -> None:
    model = model_of(BY_NAME[name], casts="none")
    inputs = model.inputs_from_hf(**raw_inputs(BY_NAME[name]))
    for ours in ("blocks.1.hook_q_input", "blocks.0.hook_v_input", "vision.blocks.0.hook_k_input"):
        (theirs,) = aliases(ours)
        one, other = (logits_edited(model, inputs, n, replace_with_noisy) for n in (ours, theirs))
        assert torch.equal(one, other)
        with torch.no_grad():
            _, cache = model.run_with_cache(inputs, names_filter=[theirs])
        assert torch.equal(cache[ours], cache[theirs])


def test_fully_masked_scores_edited_by_a_user_stay_finite(model_of) -> None:
    model = model_of(BY_NAME["clip-llama"], casts="none")
    inputs = model.inputs_from_hf(**raw_inputs(BY_NAME["clip-llama"]))

    def forbid_everything(scores: Tensor, hook: Any) -> Tensor:
        return torch.full_like(scores, -torch.inf)

    logits = logits_edited(model, inputs, "blocks.1.attn.hook_attn_scores", forbid_everything)
    assert torch.isfinite(logits).all()


def test_text_without_pictures_fires_no_picture_hook(model_of) -> None:
    model = model_of(BY_NAME["no-picture-at-all"], casts="none")
    inputs = model.inputs_from_hf(**raw_inputs(BY_NAME["no-picture-at-all"]))
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, names_filter=everything)
    assert not [n for n in cache if n.startswith(("vision.", "connector.", "hook_image"))]
    assert {n for n in hooks_of(model.cfg) if not n.startswith(("vision.", "connector.", "hook_image"))} == set(cache)


def test_table_rows_have_names_axes_and_words() -> None:
    names = [row.name for row in HOOK_TABLE]
    assert len(set(names)) == len(names)
    for row in HOOK_TABLE:
        assert row.of_text + row.of_tower + row.of_features == 1, row
        assert (layer_of(row.name.format(l=3)) == 3) == ("{l}" in row.name)
