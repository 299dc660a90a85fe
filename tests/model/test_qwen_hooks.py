"""Every hook point of the Qwen-VL models is live and exact, with images of unequal size and a video.

Every hook on q, k, v, scores, pattern and z of a Qwen decoder can be edited with effect, replacing the value or
writing into it, and the logits are those of the plain model of `tests/qwen_reference.py` with the same edit.
Activations of the tower are [image patch ...], padded to the longest image: only real patches are compared.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import hf_model, raw_inputs, relative_error
from tests.model.checks import assert_edits_act, disagreeing, position_first
from tests.model.noise import logits_edited, noisy, replace_with_noisy
from tests.qwen_cases import QWEN_BY_NAME, QwenCase
from tests.qwen_reference import reference_gradients, reference_logits, reference_values
from veena_lens.hook_table import canonical, hooks_of

ROWS = ("2 i4x4 3 v2x2x4 2", "1 i2x2 1 i2x6 3", "4")
CASES = {
    "qwen2_vl": QwenCase(name="hooks", kind="qwen2_vl", rows=ROWS, text=dict(num_hidden_layers=2)),
    "qwen2_5_vl": QwenCase(
        name="hooks",
        kind="qwen2_5_vl",
        rows=ROWS,
        text=dict(num_hidden_layers=2),
        vision=dict(depth=2, window_size=8),
    ),
    "qwen3_vl": QwenCase(
        name="hooks", kind="qwen3_vl", rows=ROWS, vision=dict(depth=2, deepstack_visual_indexes=[0, 1])
    ),
}
ODD = {
    "qwen2_vl": ("merge-3", "one-kv-head"),
    "qwen2_5_vl": ("slow-videos", "window-no-multiple-of-a-patch"),
    "qwen3_vl": ("temporal-1", "thin-pictures", "position-table-9x9", "tied"),
}
VALUES = [
    *CASES.values(),
    *(QwenCase(name="hooks-right", kind=kind, rows=ROWS, padding="right") for kind in CASES),
    *(QWEN_BY_NAME[f"{kind}-{name}"] for kind, names in ODD.items() for name in names),
]
PARTS = ("q", "k", "v", "rot_q", "rot_k", "attn_scores", "pattern", "z", "result")
everything = lambda name: True  # noqa: E731


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> QwenCase:
    return CASES[request.param]


def plain_of(case: QwenCase) -> tuple[Any, Any, dict[str, Tensor]]:
    """What the plain model takes: configuration, weights, a processor's tensors."""
    return hf_model(case).config, hf_model(case).state_dict(), raw_inputs(case)


def real(inputs: Any, name: str, axes: tuple[str, ...], n: int) -> Tensor | None:
    """True at the first two axes' places that exist: tokens of a row, patches or joined squares of an image."""
    if axes[0] == "n_image_tokens":
        return None
    if axes[0] == "batch":
        return inputs.attention_mask
    cells = [h * w for row in inputs.grids for h, w in row]
    if not name.startswith("connector."):
        cells = inputs.crop_grids.prod(-1).tolist()
    return torch.tensor([[i < count for i in range(n)] for count in cells])


def test_names_are_exactly_the_documented_ones(case: QwenCase, model_of) -> None:
    model = model_of(case, casts="none")
    names = set(hooks_of(model.cfg))
    assert {canonical(name) for name in model.hook_dict} == names
    layers, third = range(model.cfg.n_layers), case.kind == "qwen3_vl"
    for layer in layers:
        assert {f"blocks.{layer}.attn.hook_{part}" for part in PARTS} <= names
        norms = {f"blocks.{layer}.attn.{x}_norm.hook_{what}" for x in "qk" for what in ("scale", "normalized")}
        assert norms <= names if third else not norms & names
    assert {f"vision.blocks.1.attn.hook_{part}" for part in PARTS} <= names
    assert {n for n in names if "deepstack" in n} == (
        {"deepstack.0.hook_out", "deepstack.1.hook_out", "blocks.1.hook_deepstack", "blocks.2.hook_deepstack"}
        if third
        else set()
    )
    assert ("vision.hook_pos_embed" in names) == third
    assert {"vision.ln_post.hook_scale", "vision.ln_post.hook_normalized"} <= names
    assert not [n for n in names if "ln_pre" in n]


def test_every_hook_point_fires_once_with_its_documented_shape(case: QwenCase, model_of) -> None:
    model = model_of(case, casts="none")
    cfg, inputs = model.cfg, model.inputs_from_hf(**raw_inputs(case))
    calls: list[tuple[str, tuple[int, ...]]] = []
    with torch.no_grad():
        model.run_with_hooks(
            inputs, fwd_hooks=[(everything, lambda v, hook: calls.append((hook.name, tuple(v.shape))))]
        )
    pictures, tokens = len(inputs.crop_grids), int(inputs.image_mask.sum())
    assert (pictures, tokens) == (5, 4 + 2 + 2 + 1 + 3)
    expected = {}
    for name, row in hooks_of(cfg).items():
        part = cfg.vision if name.startswith("vision.") else cfg
        pos = 16 if part is cfg.vision else 4 if name.startswith("connector.") else inputs.shape[1]
        sizes = dict(batch=3, crop=pictures, n_image_tokens=tokens, pos=pos, query_pos=pos, key_pos=pos)
        sizes |= {x: getattr(part, x) for x in ("d_model", "d_mlp", "d_head", "n_heads", "n_key_value_heads")}
        sizes |= dict(d_vocab=cfg.d_vocab, d_in=cfg.connector.d_in, d_hidden=cfg.connector.d_hidden)
        expected[name] = tuple(int(axis) if axis.isdigit() else sizes[axis] for axis in row.axis_names)
    assert dict(calls) == expected
    assert len(calls) == len(expected), "a hook point fired twice in one pass"


def test_hook_points_fire_in_the_order_of_the_table(case: QwenCase, model_of) -> None:
    model = model_of(case, casts="none")
    order: list[str] = []
    with torch.no_grad():
        model.run_with_hooks(
            model.inputs_from_hf(**raw_inputs(case)),
            fwd_hooks=[(lambda name: "_input" not in name, lambda value, hook: order.append(hook.name))],
        )
    assert order == [name for name in hooks_of(model.cfg) if "_input" not in name]


@pytest.mark.parametrize("case", VALUES, ids=str)
def test_every_value_equals_the_plain_model(case: QwenCase, model_of) -> None:
    model, plain = model_of(case, casts="none"), plain_of(case)
    inputs = model.inputs_from_hf(**plain[2])
    with torch.no_grad():
        logits, cache = model.run_with_cache(inputs, names_filter=everything)
    values = reference_values(*plain)
    assert set(values) == set(hooks_of(model.cfg))
    assert disagreeing(cache, values, values, model, partial(real, inputs)) == {}
    assert torch.equal(logits, cache["unembed.hook_out"])


def test_edit_of_every_hook_point_acts_as_the_mathematics_says(case: QwenCase, model_of) -> None:
    """q, k, v, rotated q and k, scores, pattern, z and result of every layer among them, and the tower's."""
    plain = plain_of(case)
    assert_edits_act(model_of(case, casts="none"), plain[2], partial(reference_logits, *plain))


def test_two_edits_together_act_as_the_mathematics_says(case: QwenCase, model_of) -> None:
    model, plain = model_of(case, casts="none"), plain_of(case)
    inputs, keep = model.inputs_from_hf(**plain[2]), plain[2]["attention_mask"]
    pairs = [
        ("blocks.0.hook_q_input", "blocks.0.hook_k_input"),
        ("blocks.1.hook_q_input", "blocks.1.attn.hook_q"),
        ("blocks.1.attn.hook_attn_scores", "blocks.1.attn.hook_pattern"),
        ("blocks.1.attn.hook_rot_k", "blocks.1.attn.hook_result"),
        ("vision.blocks.1.hook_v_input", "vision.ln_post.hook_scale"),
        ("vision.blocks.0.attn.hook_pattern", "blocks.1.hook_mlp_in"),
    ]
    if case.kind == "qwen3_vl":
        pairs += [
            ("blocks.1.attn.hook_q", "blocks.1.attn.q_norm.hook_scale"),
            ("blocks.1.attn.k_norm.hook_scale", "blocks.1.attn.k_norm.hook_normalized"),
            ("deepstack.0.hook_out", "blocks.1.hook_deepstack"),
            ("blocks.2.hook_resid_pre", "deepstack.1.hook_out"),
            ("blocks.1.hook_deepstack", "blocks.1.hook_k_input"),
        ]
    wrong = {}
    for pair in pairs:
        with torch.no_grad():
            ours = model.run_with_hooks(inputs, fwd_hooks=[(name, replace_with_noisy) for name in pair])
        edits = {name: lambda value, name=name: noisy(name, value) for name in pair}
        error = relative_error(ours, reference_logits(*plain, edits), keep)
        if not error < 1e-10:
            wrong[pair] = error
    assert wrong == {}


@pytest.mark.parametrize("block, second", [("blocks.1", 1), ("vision.blocks.0", 3)], ids=["decoder", "tower"])
def test_edited_scale_of_one_row_leaves_the_copies_of_another(
    block: str, second: int, case: QwenCase, model_of
) -> None:
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


def test_edits_of_pads_change_nothing(case: QwenCase, model_of) -> None:
    """Pads of the batch and of shorter images: whatever stands there reaches no real token."""
    model = model_of(case, casts="none")
    inputs = model.inputs_from_hf(**raw_inputs(case))
    with torch.no_grad():
        plain = model(inputs)
    changed, edited = {}, 0
    for name, row in hooks_of(model.cfg).items():
        axes = row.axis_names
        if axes[0] == "n_image_tokens":
            continue

        def edit(value: Tensor, hook: Any, axes: tuple[str, ...] = axes) -> None:
            nonlocal edited
            pads = ~real(inputs, hook.name, axes, position_first(value, axes).shape[1])
            new = position_first(value, axes)
            new[pads] = new[pads] * 3 + 1
            edited += int(pads.sum())

        error = relative_error(logits_edited(model, inputs, name, edit), plain, inputs.attention_mask)
        if not error < 1e-12:
            changed[name] = error
    assert changed == {} and edited > 1000


@pytest.mark.parametrize(
    "dtype, casts", [(torch.float64, "none"), (torch.float64, "hf"), (torch.float32, "hf"), (torch.bfloat16, "hf")]
)
def test_listening_changes_no_bit(dtype: torch.dtype, casts: str, case: QwenCase, model_of) -> None:
    model = model_of(case, dtype, casts)
    inputs = model.inputs_from_hf(**raw_inputs(case, dtype))
    with torch.no_grad():
        plain = model(inputs)
        assert torch.equal(model(inputs), plain), "two runs differ"
        assert torch.equal(model.run_with_hooks(inputs, fwd_hooks=[(everything, lambda value, hook: value)]), plain)
        assert torch.equal(model.run_with_cache(inputs, names_filter=everything)[0], plain)
        alone = hooks_of(model.cfg) if dtype == torch.float32 else ()
        changed = [n for n in alone if not torch.equal(model.run_with_cache(inputs, names_filter=n)[0], plain)]
    assert changed == []
    assert torch.equal(model(inputs), plain), "with gradients on"
    assert torch.equal(model.run_with_cache(inputs, names_filter=everything)[0], plain)


def test_materialised_attention_agrees_with_fused(case: QwenCase, model_of) -> None:
    model = model_of(case, casts="none")
    inputs = model.inputs_from_hf(**raw_inputs(case))
    with torch.no_grad():
        fused = model(inputs)
        for end in ("hook_attn_scores", "hook_pattern", "hook_result"):
            edits = [(lambda name, end=end: name.endswith(end), lambda value, hook: value.clone())]
            explicit = model.run_with_hooks(inputs, fwd_hooks=edits)
            assert relative_error(explicit, fused, inputs.attention_mask) < 1e-12, end


def test_edit_leaves_earlier_layers_and_positions_alone(case: QwenCase, model_of) -> None:
    model = model_of(case, casts="none")
    inputs = model.inputs_from_hf(**raw_inputs(case))
    at = inputs.shape[1] - 3

    def edit(value: Tensor, hook: Any) -> None:
        value[:, at:] += 3.0

    with torch.no_grad():
        _, plain = model.run_with_cache(inputs)
        with model.hooks([("blocks.1.attn.hook_z", edit)]):
            _, edited = model.run_with_cache(inputs)
    order = [name for name in hooks_of(model.cfg) if name in plain]
    here = order.index("blocks.1.attn.hook_z")
    assert all(torch.equal(plain[name], edited[name]) for name in order[:here])
    keep = inputs.attention_mask.clone()
    keep[:, at:] = False
    assert relative_error(edited["unembed.hook_out"], plain["unembed.hook_out"], keep) < 1e-12
    assert (edited["unembed.hook_out"] - plain["unembed.hook_out"])[:, at:].abs().amax(-1).min() > 1e-3


def test_gradient_at_every_hook_point_equals_the_plain_models(case: QwenCase, model_of) -> None:
    """The gradient of the loss with respect to the value that goes on from the hook point."""
    model, plain = model_of(case, casts="none"), plain_of(case)
    inputs, table = model.inputs_from_hf(**plain[2]), hooks_of(model.cfg)
    inputs_of_heads = tuple(name for name in table if name.endswith("_input"))
    for names, copies in (
        ([name for name, row in table.items() if row.by_default], ()),
        ([name for name in table if name.endswith(("_input", "hook_mlp_in"))], inputs_of_heads),
    ):
        loss, cache = model.run_with_cache(inputs, return_type="loss", incl_bwd=True, names_filter=names)
        model.zero_grad()
        assert loss.ndim == 0 and {name.removesuffix("_grad") for name in cache} == set(names)
        gradients = reference_gradients(*plain, copies)
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


def test_text_without_pictures_fires_no_picture_hook(case: QwenCase, model_of) -> None:
    model = model_of(case, casts="none")
    inputs = model.inputs_from_hf(**raw_inputs(case))[2:]
    assert inputs.pixel_values is None
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, names_filter=everything)
    of_pictures = ("vision.", "connector.", "hook_image", "deepstack.")
    assert set(cache) == {name for name in hooks_of(model.cfg) if not name.startswith(of_pictures)}
    for name in [name for name in cache if name.endswith("hook_deepstack")]:
        assert torch.equal(cache[name], cache[name.replace("hook_deepstack", "hook_resid_pre")])
