"""Edits of attention act one after another, as they are listed: every mix equals plain torch on explicit scores."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.cases import BY_NAME, build_hf, counted, raw_inputs, relative_error
from veena_lens import HookedVLM
from veena_lens.interventions import Ablate, BoostAttention, KnockOutAttention, Patch, SuppressHeads
from veena_lens.positions import position_mask

NAME = "three-images-and-none"  # grouped keys, padded rows, one without an image
SCORES, PATTERN = "blocks.{}.attn.hook_attn_scores", "blocks.{}.attn.hook_pattern"
LOWEST = torch.finfo(torch.float64).min / 4


@pytest.fixture(scope="module")
def model() -> Any:
    return HookedVLM.from_hf(build_hf(BY_NAME[NAME], gain=5.0), casts="none")


@pytest.fixture(scope="module")
def inputs(model: Any) -> Any:
    return model.inputs_from_hf(**counted(raw_inputs(BY_NAME[NAME])))


@pytest.fixture(scope="module")
def source(model: Any, inputs: Any) -> Any:
    with torch.no_grad(), model.hooks([("hook_embed", lambda x, hook: x.flip(-1))]):
        return model.run_with_cache(inputs)[1]


# --- the edits, drawn as data -------------------------------------------------------------------------------
QUERIES = st.sampled_from(["last", "query", "all", -2, slice(-4, None)])
KEYS = st.sampled_from(["image", "text", "all", [-1, -3], slice(2, 12)])
HEADS = st.sampled_from([None, [0, 4], [5]])
FACTORS = {mode: [3.0, 0.25] for mode in ("renorm", "logit")} | {m: [3.0, 0.0, -1.0] for m in ("scale", "mul", "abs")}
LAYERS = st.integers(0, 1)


@st.composite
def edits(draw: Any) -> tuple[Any, ...]:
    kind = draw(st.sampled_from(["boost", "boost", "knock out", "knock out", "suppress", "patch", "ablate", "hook"]))
    where = dict(layer=draw(LAYERS), queries=draw(QUERIES), keys=draw(KEYS), heads=draw(HEADS))
    if kind == "boost":
        mode = draw(st.sampled_from(sorted(FACTORS)))
        return kind, where | dict(mode=mode, factor=draw(st.sampled_from(FACTORS[mode])))
    if kind == "suppress":
        return kind, where | dict(keep=draw(st.sampled_from([0.0, 0.5])), factor=draw(st.sampled_from([0.0, -2.0])))
    if kind == "knock out":
        return kind, where
    at = draw(st.sampled_from([SCORES, PATTERN]))
    return kind, where | dict(site=at.format(where["layer"]), value=draw(st.sampled_from([0.0, 0.2])))


def intervention(edit: tuple[Any, ...], source: Any) -> Any:
    kind, f = edit
    if kind == "boost":
        return BoostAttention(f["layer"], f["heads"], f["keys"], f["queries"], f["factor"], f["mode"])
    if kind == "knock out":
        return KnockOutAttention(f["layer"], f["heads"], f["keys"], f["queries"])
    if kind == "suppress":
        return SuppressHeads(f["layer"], f["keep"], f["factor"], f["keys"], f["queries"])
    if kind == "patch":
        return Patch(f["site"], source, heads=f["heads"], positions=f["queries"])
    return Ablate(f["site"], heads=f["heads"], positions=f["queries"], value=f["value"])


def by_hand(edit: tuple[Any, ...], x: Tensor, site: str, inputs: Any, source: Any) -> Tensor:
    """What one edit makes of the scores or the pattern, written a second time."""
    kind, f = edit
    heads = torch.zeros(6, dtype=torch.bool)
    heads[f["heads"] if f["heads"] is not None and kind != "suppress" else list(range(6))] = True
    rows = position_mask(inputs, f["queries"])[:, None, :, None] & heads[:, None, None]
    keys = position_mask(inputs, f["keys"])[:, None, None]
    alive = x > LOWEST
    if kind == "knock out":
        left = alive & ~(rows & keys)
        return torch.where(rows & keys & left.any(-1, keepdim=True), -math.inf, x)
    if kind == "boost":
        new = {
            "renorm": lambda: x + math.log(f["factor"]),
            "logit": lambda: x + math.log(f["factor"]),
            "mul": lambda: x * f["factor"],
            "abs": lambda: x + (f["factor"] - 1) * x.abs(),
            "scale": lambda: x * f["factor"],
        }[f["mode"]]()
        return torch.where(rows & keys & alive, new, x)
    if kind == "suppress":
        n_quiet = 6 - int(f["keep"] * 6)
        digits = (x * keys).sum(-1).clamp(min=1e-300)
        digits = 10 ** (torch.log10(digits) * 1e12).round().div(1e12)  # heads that attend alike are ranked by number
        rank = digits.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
        quiet = (rank < n_quiet)[..., None] & rows & keys.any(-1, keepdim=True)
        return torch.where(quiet, x * f["factor"], x)
    if kind == "patch":
        return torch.where(rows, source[site], x)
    return torch.where(rows, torch.tensor(f["value"], dtype=x.dtype), x)


def site_of(edit: tuple[Any, ...]) -> str:
    kind, f = edit
    if "site" in f:
        return f["site"]
    on_pattern = kind == "suppress" or f.get("mode") == "scale"
    return (PATTERN if on_pattern else SCORES).format(f["layer"])


def user_hook(x: Tensor, hook: Any) -> Tensor:
    return torch.where(x > LOWEST, 0.5 * x + 0.1, x)


@settings(max_examples=40)
@given(st.lists(edits(), min_size=2, max_size=4), st.integers(0, 3), st.booleans())
def test_every_mix_of_edits_acts_in_the_order_of_its_list(
    model: Any, inputs: Any, source: Any, mix: list[Any], split: int, listens: bool
) -> None:
    def reference(site: str) -> Any:
        def hook(x: Tensor, hook: Any) -> Tensor:
            for edit in mix:
                if site_of(edit) == site:
                    x = user_hook(x, None) if edit[0] == "hook" else by_hand(edit, x, site, inputs, source)
            return x

        return site, hook

    sites = sorted({site_of(edit) for edit in mix})
    with torch.no_grad():
        wanted, there = model.run_with_hooks(inputs, fwd_hooks=[reference(s) for s in sites]), None
        with ExitStack() as stack:  # nested blocks; neighbours that are interventions share one
            listed: list[Any] = []
            for place, edit in enumerate(mix):
                if edit[0] != "hook":
                    listed.append(intervention(edit, source))
                if listed and (edit[0] == "hook" or place == split or place == len(mix) - 1):
                    stack.enter_context(model.intervene(listed))
                    listed = []
                if edit[0] == "hook":
                    stack.enter_context(model.hooks([(site_of(edit), user_hook)]))
            if listens:
                ours, there = model.run_with_cache(inputs)
            else:
                ours = model(inputs)
    keep = inputs.attention_mask
    assert bool(torch.isfinite(wanted[keep]).all())
    assert relative_error(ours, wanted, keep) < 1e-10, [(kind, f) for kind, f in mix]
    assert there is None or not any(bool(there["pattern", layer].isnan().any()) for layer in (0, 1))


@torch.no_grad()
@pytest.mark.parametrize("mode, factor", [("abs", 0.0), ("abs", 3.0), ("mul", 0.0), ("mul", -1.0), ("scale", -2.0)])
def test_key_that_is_knocked_out_is_not_boosted_back(mode: str, factor: float, model: Any, inputs: Any) -> None:
    out = KnockOutAttention(1, keys="image", queries="last")
    boost = BoostAttention(1, keys="image", queries="last", factor=factor, mode=mode)
    for mix in ([out, boost], [boost, out]):
        with model.intervene(mix):
            seen = model.attention(inputs[[0, 2]], "last", "image", layers=[1]).values
            pattern = model.run_with_cache(inputs)[1]["pattern", 1]
        assert float(seen.abs().max()) == 0.0
        assert float(pattern[0, :, inputs.spans[0].last][:, inputs.image_mask[0]].abs().max()) == 0.0


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("times", [1, 2, 3])
def test_query_that_would_lose_its_last_key_keeps_its_attention(times: int, dtype: torch.dtype, model_of: Any) -> None:
    model = model_of(BY_NAME[NAME], dtype)
    inputs = model.inputs_from_hf(**counted(raw_inputs(BY_NAME[NAME])))
    plain, cache = model.run_with_cache(inputs)
    with model.intervene([KnockOutAttention(1, queries="last", keys="all")] * times):
        ours, (cached, seen) = model(inputs), model.run_with_cache(inputs)
    keep = inputs.attention_mask
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6 if dtype == torch.float32 else 2e-2
    assert relative_error(ours.double(), plain.double(), keep) < tolerance
    assert relative_error(cached.double(), plain.double(), keep) < tolerance
    assert torch.equal(
        seen["pattern", 1][keep[:, None].expand(-1, 6, -1)], cache["pattern", 1][keep[:, None].expand(-1, 6, -1)]
    )
    first = KnockOutAttention(1, keys="text", queries="last")
    with model.intervene([first]):
        wanted = model(inputs)
    with model.intervene([first, KnockOutAttention(1, keys="image", queries="last")]):
        assert (
            relative_error(model(inputs)[0].double(), wanted[0].double()) < tolerance
        )  # the second would take the rest


@torch.no_grad()
def test_reset_hooks_leaves_interventions_in_force(model: Any, inputs: Any) -> None:
    edits = [BoostAttention(1, factor=3.0, mode="mul"), KnockOutAttention(0, queries="last")]
    with model.intervene(edits):
        wanted = model(inputs)
        model.reset_hooks()
        assert torch.equal(model(inputs), wanted)
    assert model.is_untouched
