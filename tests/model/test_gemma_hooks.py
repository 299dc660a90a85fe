"""Every hook point of Gemma-3 is live and exact: norms on both sides, an image's tokens that read each other.

The logits are those of the plain model of `tests/gemma_reference.py` with the same edit.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import counted, hf_model, raw_inputs, relative_error
from tests.gemma_cases import GEMMA_BY_NAME, GemmaCase
from tests.gemma_reference import reference_gradients, reference_logits, reference_values
from tests.model.checks import assert_edits_act, disagreeing, tokens_of
from veena_lens.hook_table import canonical, hooks_of
from veena_lens.interventions import BoostAttention, KnockOutAttention, Steer

HOOKS = GemmaCase(
    name="hooks", rows=("2 i 1", "1 i 1 b 3", "4"), text=dict(num_hidden_layers=2, layer_types=None, sliding_window=5)
)
VALUES = [HOOKS, *(GEMMA_BY_NAME[f"gemma3-{name}"] for name in ("narrow-window", "touching-pictures", "scaled-rope"))]
VALUES += [GEMMA_BY_NAME[f"gemma3-{name}"] for name in ("right-padding", "untied", "many-tokens", "text-plain")]
everything = lambda name: True  # noqa: E731


def plain_of(case: GemmaCase) -> tuple[Any, Any, dict[str, Tensor]]:
    """What the plain model takes: configuration, weights, a processor's tensors."""
    return hf_model(case).config, hf_model(case).state_dict(), raw_inputs(case)


def test_every_hook_point_fires_once_in_the_order_of_the_table_with_its_shape(model_of) -> None:
    model = model_of(HOOKS, casts="none")
    cfg, inputs = model.cfg, model.inputs_from_hf(**raw_inputs(HOOKS))
    calls: list[tuple[str, tuple[int, ...]]] = []
    with torch.no_grad():
        model.run_with_hooks(
            inputs, fwd_hooks=[(everything, lambda v, hook: calls.append((hook.name, tuple(v.shape))))]
        )
    expected = {}
    for name, row in hooks_of(cfg).items():
        part = cfg.vision if name.startswith("vision.") else cfg
        pos = 16 if part is cfg.vision else 4 if name.startswith("connector.") else inputs.shape[1]
        sizes = dict(batch=3, crop=3, n_image_tokens=12, pos=pos, query_pos=pos, key_pos=pos)
        sizes |= {x: getattr(part, x) for x in ("d_model", "d_mlp", "d_head", "n_heads", "n_key_value_heads")}
        sizes |= dict(d_vocab=cfg.d_vocab, d_in=cfg.connector.d_in)
        expected[name] = tuple(int(axis) if axis.isdigit() else sizes[axis] for axis in row.axis_names)
    assert dict(calls) == expected and len(calls) == len(expected)
    assert [name for name, _ in calls if "_input" not in name] == [n for n in expected if "_input" not in n]
    assert {canonical(name) for name in model.hook_dict} == set(expected)


@pytest.mark.parametrize("case", VALUES, ids=str)
def test_every_value_equals_the_plain_model(case: GemmaCase, model_of) -> None:
    model, plain = model_of(case, casts="none"), plain_of(case)
    inputs = model.inputs_from_hf(**plain[2])
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, names_filter=everything)
    values = reference_values(*plain)
    assert set(values) == {n for n in hooks_of(model.cfg) if not case.text_only() or n in cache.cache_dict}
    assert disagreeing(cache, values, values, model, tokens_of(inputs)) == {}


def test_edit_of_every_hook_point_acts_as_the_mathematics_says(model_of) -> None:
    plain = plain_of(HOOKS)
    assert_edits_act(model_of(HOOKS, casts="none"), plain[2], partial(reference_logits, *plain))


def test_gradient_at_every_hook_point_equals_the_plain_models(model_of) -> None:
    model, plain = model_of(HOOKS, casts="none"), plain_of(HOOKS)
    inputs, keep = model.inputs_from_hf(**plain[2]), plain[2]["attention_mask"].bool()
    weights = torch.randn(int(keep.sum()), 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = reference_gradients(*plain, lambda logits: (logits[keep] * weights).sum())
    names = [n for n in hooks_of(model.cfg) if "_input" not in n and "hook_mlp_in" not in n]
    names = [n for n in names if not n.endswith(("attn_scores", "pattern", "result"))]
    cache, forward, backward = model.get_caching_hooks(names, incl_bwd=True)
    with model.hooks(forward, backward):
        (model(inputs)[keep] * weights).sum().backward()
    model.zero_grad()
    wrong = {}
    for name in names:
        mine, theirs = cache[f"{name}_grad"], expected[name]
        error = relative_error(mine, theirs, keep if hooks_of(model.cfg)[name].of_text else None)
        if not error < 1e-9:
            wrong[name] = error
    assert wrong == {}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_listening_changes_no_bit(dtype: torch.dtype, model_of) -> None:
    model = model_of(HOOKS, dtype)
    inputs = model.inputs_from_hf(**raw_inputs(HOOKS, dtype))
    with torch.no_grad():
        plain = model(inputs)
        heard = model.run_with_hooks(inputs, fwd_hooks=[(everything, lambda value, hook: None)])
    assert torch.equal(heard, plain)


def test_an_edit_of_one_row_leaves_the_rounding_of_another(model_of) -> None:
    """What nobody edited of a norm goes on as it was, unrounded, in bfloat16 too."""
    model = model_of(HOOKS, torch.bfloat16)
    inputs = model.inputs_from_hf(**raw_inputs(HOOKS, torch.bfloat16))

    def edit(value: Tensor, hook: Any) -> Tensor:
        out = value.clone()
        out[0] += 1
        return out

    with torch.no_grad():
        plain = model(inputs)
        for part in ("ln1", "ln1_post", "ln2", "ln2_post"):
            edited = model.run_with_hooks(inputs, fwd_hooks=[(f"blocks.0.{part}.hook_normalized", edit)])
            assert torch.equal(edited[1:], plain[1:]) and not torch.equal(edited[0], plain[0]), part


def test_attention_rows_of_a_picture_equal_those_of_the_pattern(model_of) -> None:
    model = model_of(GEMMA_BY_NAME["gemma3-unequal-rows"], casts="none")
    inputs = model.inputs_from_hf(**counted(raw_inputs(GEMMA_BY_NAME["gemma3-unequal-rows"])))
    inputs = inputs[[0, 2, 3]]
    boosts = [
        BoostAttention(1, keys="image", queries="image", factor=4.0),
        KnockOutAttention(0, keys="image", queries="query"),
        Steer(0, torch.ones(48).double(), positions="image"),
    ]
    for interventions in ([], boosts):
        with torch.no_grad(), model.intervene(interventions):
            _, cache = model.run_with_cache(inputs)
            rows = model.attention(inputs, queries="image", keys="image")
        for row in range(len(inputs)):
            at = inputs.image_mask[row].nonzero().flatten()
            for layer in range(3):
                pattern = cache["pattern", layer][row][:, at][:, :, at]
                mine = rows.values[row, layer][:, : len(at), : len(at)]
                torch.testing.assert_close(mine, pattern, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", ["renorm", "scale", "mul", "abs"])
def test_boost_within_a_picture_acts_on_its_later_tokens_too(mode: str, model_of) -> None:
    """In both directions: by a bias of the fused kernel as by an edit of the pattern or scores."""
    case = GEMMA_BY_NAME["gemma3-unequal-rows"]
    model = model_of(case, casts="none")
    inputs = model.inputs_from_hf(**counted(raw_inputs(case)))[[0]]
    span = inputs.spans[0].images[0]
    boost = BoostAttention(1, keys=[span.stop - 1], queries=[span.start], factor=3.0, mode=mode)
    with torch.no_grad():
        _, plain = model.run_with_cache(inputs)
        with model.intervene([boost]):
            _, cache = model.run_with_cache(inputs)
    before, after = (c["pattern", 1][0, :, span.start] for c in (plain, cache))
    keys = torch.arange(before.shape[-1])
    assert float((after - before)[:, span.stop - 1].abs().min()) > 1e-6
    if mode == "renorm":
        weighted = before * torch.where(keys == span.stop - 1, 3.0, 1.0)
        torch.testing.assert_close(after, weighted / weighted.sum(-1, keepdim=True), rtol=1e-10, atol=1e-12)
    others = [p for p in range(inputs.shape[1]) if p != span.start]
    torch.testing.assert_close(cache["pattern", 1][0][:, others], plain["pattern", 1][0][:, others])
