"""Every hook point is live: it fires with its documented shape, and an edit acts as the mathematics says.

The plain model of `tests/reference.py` recomputes everything downstream of an edit; casts are off, so that both agree
to rounding in float64. Activations of a tower are [crop patch ...]; images of unequal size are padded to the longest,
and only what exists is compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import BY_NAME, QWEN, Case, counted_inputs, raw_inputs, relative_error
from tests.model.checks import (
    assert_edits_act,
    disagreeing,
    logits_edited,
    make_noisy_in_place,
    noisy,
    plain_logits,
    plain_model,
    plain_values,
    position_first,
    real_places,
    replace_with_noisy,
)
from tests.model.hooked import ABSENT, COMPARED, COUNTS, EDITED, IN_PLACE, PRESENT, SMALL, Counts, pairs_of
from tests.reference import reference_gradients
from veena_lens.hook_table import HOOK_TABLE, aliases, canonical, hooks_of, layer_of

OF_IMAGES = ("vision.", "connector.", "hook_image", "deepstack.")
FEW = [BY_NAME[name] for name in ("clip-llama", "siglip-qwen2", "text-mistral")] + list(SMALL.values())
everything = lambda name: True  # noqa: E731
edited = pytest.mark.parametrize("case", EDITED, ids=str)
small = pytest.mark.parametrize("case", SMALL.values(), ids=str)
of_qwen = pytest.mark.parametrize("case", [SMALL[family] for family in QWEN], ids=str)


def dimensions(model: Any, inputs: Any, name: str, counts: Counts) -> tuple[int, ...]:
    """Sizes that the table's axes stand for."""
    cfg = model.cfg
    part, (batch, pos) = cfg, inputs.shape
    sizes: dict[str, int] = dict(batch=batch, d_vocab=cfg.d_vocab, crop=counts.crops, n_image_tokens=counts.tokens)
    if cfg.connector is not None:
        sizes |= dict(d_in=cfg.connector.d_in, d_hidden=cfg.connector.d_hidden)
    if name.startswith("vision."):
        part, pos = cfg.vision, counts.patches
    elif name.startswith("connector."):
        pos = counts.features
    sizes |= dict(pos=pos, query_pos=pos, key_pos=pos)
    for axis in ("d_model", "d_mlp", "d_head", "n_heads", "n_key_value_heads"):
        sizes[axis] = getattr(part, axis)
    return tuple(int(axis) if axis.isdigit() else sizes[axis] for axis in hooks_of(cfg)[name].axis_names)


def counts_of(case: Case, model: Any, inputs: Any) -> Counts:
    """Those of the table, else of LLaVA's configuration."""
    if str(case) in COUNTS:
        return COUNTS[str(case)]
    if model.cfg.vision is None:
        return Counts(0, 0, 0, 0)
    vision, tokens = model.cfg.vision, int(inputs.image_mask.sum())
    return Counts(len(inputs.pixel_values), tokens, vision.n_positions, vision.n_features)


@edited
def test_hook_points_are_exactly_the_documented_ones(case: Case, model_of) -> None:
    model = model_of(case, casts="none")
    names = set(hooks_of(model.cfg))
    assert {canonical(name) for name in model.hook_dict} == names
    assert all(model.hook_dict[name].name == name for name in names)
    assert PRESENT.get(case.family, set()) - names == set()
    assert ABSENT.get(case.family, set()) & names == set()
    if case.family == "idefics3":
        assert [n for n in hooks_of(model.cfg) if n.startswith(("connector.", "vision.ln"))] == [
            "vision.ln_post.hook_scale", "vision.ln_post.hook_normalized", "connector.hook_in", "connector.hook_out",
        ]  # fmt: skip


@edited
def test_every_hook_point_fires_once_in_the_order_of_the_table_with_its_shape(case: Case, model_of) -> None:
    model = model_of(case, casts="none")
    inputs = model.inputs_from_hf(**raw_inputs(case))
    calls: list[tuple[str, tuple[int, ...]]] = []
    with torch.no_grad():
        model.run_with_hooks(
            inputs, fwd_hooks=[(everything, lambda v, hook: calls.append((hook.name, tuple(v.shape))))]
        )
    counts = counts_of(case, model, inputs)
    expected = {name: dimensions(model, inputs, name, counts) for name in hooks_of(model.cfg)}
    assert dict(calls) == expected
    assert len(calls) == len(expected), "a hook point fired twice in one pass"
    in_order = [
        [name for name in names if not name.endswith(("_input", "hook_attn_in"))] for names in (dict(calls), expected)
    ]
    assert in_order[0] == in_order[1]


@pytest.mark.parametrize("case", COMPARED, ids=str)
def test_every_value_equals_the_plain_model(case: Case, model_of) -> None:
    model, raw = model_of(case, casts="none"), counted_inputs(case)
    inputs, values = model.inputs_from_hf(**raw), plain_values(case)
    with torch.no_grad():
        logits, cache = model.run_with_cache(inputs, names_filter=everything)
    assert set(values) == {n for n in hooks_of(model.cfg) if case.has_images or not n.startswith(OF_IMAGES)}
    assert disagreeing(model, inputs, cache, values) == {}
    assert torch.equal(logits, cache["unembed.hook_out"])


@pytest.mark.parametrize(
    "case, edits",
    [(case, [replace_with_noisy]) for case in EDITED]
    + [(case, [make_noisy_in_place]) for case in [*(BY_NAME[name] for name in IN_PLACE), *SMALL.values()]],
    ids=lambda value: value[0].__name__ if isinstance(value, list) else str(value),
)
def test_edit_of_every_hook_point_acts_as_the_mathematics_says(
    case: Case, edits: list[Callable[..., Any]], model_of
) -> None:
    """q, k, v, rotated q and k, scores, pattern, z and result of every layer among them, and the tower's."""
    assert_edits_act(model_of(case, casts="none"), case, edits)


@edited
def test_two_edits_together_act_as_the_mathematics_says(case: Case, model_of) -> None:
    model, raw = model_of(case, casts="none"), counted_inputs(case)
    inputs, keep = model.inputs_from_hf(**raw), raw["attention_mask"]
    wrong = {}
    for pair in pairs_of(case, set(hooks_of(model.cfg))):
        with torch.no_grad():
            ours = model.run_with_hooks(inputs, fwd_hooks=[(name, replace_with_noisy) for name in pair])
        edits = {name: lambda value, name=name: noisy(name, value) for name in pair}
        error = relative_error(ours, plain_logits(case, edits), keep)
        if not error < 1e-10:
            wrong[pair] = error
    assert wrong == {}


@edited
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
@pytest.mark.parametrize("case", FEW, ids=str)
def test_listening_changes_no_bit(case: Case, dtype: torch.dtype, casts: str, model_of) -> None:
    """With gradients on as without; each hook point is heard alone where that is most likely to show."""
    model = model_of(case, dtype, casts)
    inputs = model.inputs_from_hf(**raw_inputs(case, dtype))
    with torch.no_grad():
        plain = model(inputs)
        assert torch.equal(model(inputs), plain), "two runs differ"
        for answer in (lambda value, hook: value, lambda value, hook: None):
            assert torch.equal(model.run_with_hooks(inputs, fwd_hooks=[(everything, answer)]), plain)
        assert torch.equal(model.run_with_cache(inputs)[0], plain)
        assert torch.equal(model.run_with_cache(inputs, names_filter=everything)[0], plain)
        alone = hooks_of(model.cfg) if dtype == torch.float32 or case.family in ("llava", "text") else ()
        changed = [n for n in alone if not torch.equal(model.run_with_cache(inputs, names_filter=n)[0], plain)]
    assert changed == []
    assert torch.equal(model(inputs), plain), "with gradients on"
    assert torch.equal(model.run_with_cache(inputs, names_filter=everything)[0], plain)


@edited
def test_materialised_attention_agrees_with_fused(case: Case, model_of) -> None:
    """An edit that changes no number still leaves the fused kernel."""
    model, raw = model_of(case, casts="none"), raw_inputs(case)
    inputs = model.inputs_from_hf(**raw)
    with torch.no_grad():
        fused = model(inputs)
        for ends in ("hook_attn_scores", "hook_pattern", "hook_result", ("hook_attn_scores", "hook_pattern")):
            edits = [(lambda name, ends=ends: name.endswith(ends), lambda value, hook: value.clone())]
            explicit = model.run_with_hooks(inputs, fwd_hooks=edits)
            assert relative_error(explicit, fused, raw["attention_mask"]) < 1e-12, ends


LAYERED = [BY_NAME[name] for name in ("clip-llama", "window-qwen2", "right-padding")] + [
    SMALL[family] for family in (*QWEN, "gemma3")
]


@pytest.mark.parametrize("case", LAYERED, ids=str)
def test_edit_leaves_earlier_layers_alone(case: Case, model_of) -> None:
    model = model_of(case, casts="none")
    inputs = model.inputs_from_hf(**raw_inputs(case))
    with torch.no_grad():
        _, plain = model.run_with_cache(inputs)
        with model.hooks(fwd_hooks=[("blocks.1.attn.hook_z", make_noisy_in_place)]):
            _, after = model.run_with_cache(inputs)
    order = list(hooks_of(model.cfg))
    for each in order[: order.index("blocks.1.attn.hook_z")]:
        if each in plain:
            assert torch.equal(plain[each], after[each]), each
    for each in ("blocks.1.hook_attn_out", "blocks.1.hook_resid_post", "unembed.hook_out"):
        assert not torch.equal(plain[each], after[each]), each


@pytest.mark.parametrize(
    "case", [BY_NAME["clip-llama"], BY_NAME["window-mistral"], *(SMALL[family] for family in QWEN)], ids=str
)
def test_edit_leaves_earlier_positions_alone(case: Case, model_of) -> None:
    """The decoder is causal: what is done at position p reaches nothing before p."""
    model, raw = model_of(case, casts="none"), raw_inputs(case)
    inputs, at = model.inputs_from_hf(**raw), raw["input_ids"].shape[1] - 3

    def edit(value: Tensor, hook: Any) -> None:
        value[:, at:] = 3.0

    with torch.no_grad():
        plain = model(inputs)
        for name in ("blocks.0.hook_resid_pre", "blocks.1.attn.hook_z"):
            after = model.run_with_hooks(inputs, fwd_hooks=[(name, edit)])
            keep = raw["attention_mask"].bool()
            keep[:, at:] = False
            assert relative_error(after, plain, keep) < 1e-12
            assert (after[:, at:] - plain[:, at:]).abs().amax(-1).min() > 1e-3


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


@pytest.mark.parametrize(
    "case", [BY_NAME["no-picture-at-all"], BY_NAME["gemma3-no-picture-at-all"], *SMALL.values()], ids=str
)
def test_text_without_images_fires_no_hook_of_theirs(case: Case, model_of) -> None:
    """The last row holds no image."""
    model = model_of(case, casts="none")
    inputs = model.inputs_from_hf(**raw_inputs(case))[-1]
    assert inputs.pixel_values is None
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, names_filter=everything)
    assert set(cache) == {name for name in hooks_of(model.cfg) if not name.startswith(OF_IMAGES)}
    for name in [name for name in cache if name.endswith("hook_deepstack")]:
        assert torch.equal(cache[name], cache[name.replace("hook_deepstack", "hook_resid_pre")])


def test_table_rows_have_names_axes_and_words() -> None:
    names = [row.name for row in HOOK_TABLE]
    assert len(set(names)) == len(names)
    for row in HOOK_TABLE:
        assert row.of_text + row.of_tower + row.of_features == 1, row
        assert (layer_of(row.name.format(l=3)) == 3) == ("{l}" in row.name)


@of_qwen
@pytest.mark.parametrize("block, second", [("blocks.1", 1), ("vision.blocks.0", 3)], ids=["decoder", "tower"])
def test_edited_scale_of_one_row_leaves_the_copies_of_another(block: str, second: int, case: Case, model_of) -> None:
    """Edits of the norm and of the residual's copies meet in one layer, each in its own row."""
    model = model_of(case, casts="none")
    inputs = model.inputs_from_hf(**raw_inputs(case))

    def edit_scale(value: Tensor, hook: Any) -> None:
        value[0] *= 1.5

    def edit_copies(value: Tensor, hook: Any) -> None:
        value[second] = 2 * noisy(hook.name, value[second])

    edits = [(f"{block}.ln1.hook_scale", edit_scale), (f"{block}.hook_q_input", edit_copies)]
    with torch.no_grad():
        runs = (edits[:1], edits[1:], edits)
        scale, copies, together = (model.run_with_hooks(inputs, fwd_hooks=hooks) for hooks in runs)
        plain = model(inputs)
    for row, alone in ((0, scale), (1, copies)):
        keep = inputs.attention_mask[row]
        assert relative_error(together[row], alone[row], keep) < 1e-12
        assert relative_error(alone[row], plain[row], keep) > 1e-6


@small
def test_edits_of_pads_change_nothing(case: Case, model_of) -> None:
    """Pads of the batch and of shorter images: whatever stands there reaches no real token."""
    model = model_of(case, casts="none")
    inputs = model.inputs_from_hf(**raw_inputs(case))
    with torch.no_grad():
        plain = model(inputs)
    changed, n_edited = {}, 0
    for name, row in hooks_of(model.cfg).items():
        axes = row.axis_names
        if axes[0] == "n_image_tokens" or (axes[0] == "crop" and not case.has("any size")):
            continue

        def edit(value: Tensor, hook: Any, axes: tuple[str, ...] = axes) -> None:
            nonlocal n_edited
            pads = ~real_places(inputs, hook.name, axes, position_first(value, axes).shape[1])
            new = position_first(value, axes)
            new[pads] = new[pads] * 3 + 1
            n_edited += int(pads.sum())

        error = relative_error(logits_edited(model, inputs, name, edit), plain, inputs.attention_mask)
        if not error < 1e-12:
            changed[name] = error
    assert changed == {} and n_edited > 1000


@small
def test_gradient_at_every_hook_point_equals_the_plain_models(case: Case, model_of) -> None:
    """The gradient of the loss with respect to the value that goes on from the hook point."""
    model, raw = model_of(case, casts="none"), counted_inputs(case)
    inputs, table = model.inputs_from_hf(**raw), hooks_of(model.cfg)
    inputs_of_heads = tuple(name for name in table if name.endswith("_input"))
    for names, copies in (
        ([name for name, row in table.items() if row.by_default], ()),
        ([name for name in table if name.endswith(("_input", "hook_mlp_in"))], inputs_of_heads),
    ):
        loss, cache = model.run_with_cache(inputs, return_type="loss", incl_bwd=True, names_filter=names)
        model.zero_grad()
        assert loss.ndim == 0 and {name.removesuffix("_grad") for name in cache} == set(names)
        plain = plain_model(case, {name: lambda value: value for name in copies}, tracked=True)
        gradients = reference_gradients(plain, raw)
        ours = {name: cache[f"{name}_grad"] for name in names}
        assert all(float(gradients[name].abs().max()) > 0 for name in names)
        wrong = {}
        for name in names:
            # What pads hold, and so the gradient of a weight that reads them, is not said.
            unread = cache[name] < -1e30 if name.endswith("attn_scores") else torch.zeros_like(ours[name]).bool()
            unread |= (cache[name] == 0) & name.endswith("hook_pattern")
            error = relative_error(ours[name].masked_fill(unread, 0), gradients[name].masked_fill(unread, 0))
            if not error < 1e-9:
                wrong[name] = error
        assert wrong == {}


def test_an_edit_of_one_row_leaves_the_rounding_of_another(model_of) -> None:
    """What nobody edited of a norm goes on as it was, unrounded, in bfloat16 too."""
    model = model_of(SMALL["gemma3"], torch.bfloat16)
    inputs = model.inputs_from_hf(**raw_inputs(SMALL["gemma3"], torch.bfloat16))

    def edit(value: Tensor, hook: Any) -> Tensor:
        out = value.clone()
        out[0] += 1
        return out

    with torch.no_grad():
        plain = model(inputs)
        for part in ("ln1", "ln1_post", "ln2", "ln2_post"):
            edited = model.run_with_hooks(inputs, fwd_hooks=[(f"blocks.0.{part}.hook_normalized", edit)])
            assert torch.equal(edited[1:], plain[1:]) and not torch.equal(edited[0], plain[0]), part
