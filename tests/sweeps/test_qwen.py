"""The suffix engine on Qwen2-VL (Qwen2.5-VL has its decoder) and Qwen3-VL: three streams, deep-stack features."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.cases import Case, raw_inputs
from veena_lens.hook_table import hooks_of
from veena_lens.sweeps import SweepResult, patch_sweep, steer_sweep
from veena_lens.sweeps.metrics import logit_diff, project

ROWS = ("2 i4x4 1 v2x2x4 3", "1 i2x6 3")
CASES = {family: Case(name="sweeps", family=family, rows=ROWS) for family in ("qwen2_vl", "qwen3_vl")}


@pytest.fixture(params=list(CASES))
def pair(request: pytest.FixtureRequest, model_of) -> tuple[Any, Any, Any]:
    """A model in pure float64, and two batches that differ in images and text."""
    case = CASES[request.param]
    model, raw = model_of(case, casts="none"), raw_inputs(case)
    other = {name: torch.randn_like(value) if "pixel" in name else value for name, value in raw.items()}
    other["input_ids"] = raw["input_ids"].clone()
    other["input_ids"][:, -2] = (raw["input_ids"][:, -2] + 3) % 90 + 2
    return model, model.inputs_from_hf(**raw), model.inputs_from_hf(**other)


def agree(model: Any, clean: Any, corrupted: Any, **kw: Any) -> SweepResult:
    kw = {"metric": logit_diff(5, 6), "progress": False} | kw
    fast, plain = (patch_sweep(model, clean, corrupted, engine=engine, **kw) for engine in ("suffix", "naive"))
    assert float(plain.values.std()) > 1e-6, "no patch did anything"
    assert fast.axes == plain.axes
    torch.testing.assert_close(fast.values, plain.values, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(fast.scores, plain.scores, rtol=1e-10, atol=1e-10)
    return fast


@pytest.mark.parametrize("row, positions", [(0, "query"), (1, "image")], ids=["image-and-video", "one-image"])
def test_every_site_of_the_decoder_can_be_swept(row: int, positions: str, pair) -> None:
    """Norms of q and k and deep-stack additions of every layer among them."""
    model, clean, corrupted = pair
    sites = ["hook_embed", *(name for name in hooks_of(model.cfg) if name.startswith("blocks."))]
    parts = {name.split(".", 2)[-1] for name in sites}
    third = model.cfg.n_deepstack > 0
    assert ("attn.q_norm.hook_scale" in parts) == ("hook_deepstack" in parts) == third
    result = agree(model, clean[row], corrupted[row], sites=sites, positions=positions)
    moved = (result.values - result.corrupted).abs() > 1e-9
    still = [site for site, acts in zip(sites, moved.tolist(), strict=True) if not acts]
    # Past the last attention an image token is read by nobody.
    last = f"blocks.{model.cfg.n_layers - 1}."
    unread = ("attn.hook_q", "rot_q", "q_norm", "q_input", "scores", "pattern", "z", "result", "attn_out")
    unread += ("resid_mid", "resid_post", "ln2", "mlp")
    if positions == "image":
        still = [site for site in still if not (site.startswith(last) and any(part in site for part in unread))]
    assert still == []


@pytest.mark.parametrize("positions, direction", [("last", "denoising"), ("query", "noising"), (3, "denoising")])
def test_head_sweep_of_a_batch_equals_whole_forwards(positions: Any, direction: str, pair) -> None:
    model, clean, corrupted = pair
    if isinstance(positions, int):  # an image token
        clean, corrupted = clean[0], corrupted[0]
        assert bool(clean.without_padding().image_mask[0, positions])
    agree(model, clean, corrupted, positions=positions, direction=direction)


@pytest.mark.parametrize(
    "sites, direction",
    [
        ("resid", "noising"),
        ("heads", "denoising"),
        (["blocks.2.hook_deepstack", "blocks.1.hook_resid_post"], "denoising"),
    ],
    ids=str,
)
def test_sweep_of_every_position_equals_whole_forwards(sites: Any, direction: str, pair) -> None:
    model, clean, corrupted = pair
    if isinstance(sites, list) and not model.cfg.n_deepstack:
        sites = sites[1:]
    options = dict(layers=[1]) | (dict(units=[1]) if sites == "heads" else {}) if isinstance(sites, str) else {}
    result = agree(model, clean[0], corrupted[0], sites=sites, positions="each", direction=direction, **options)
    assert result.axes[-1] == "pos" and result.values.shape[-1] == int(clean[0].lengths[0])


def test_metric_on_an_activation_agrees(pair) -> None:
    model, clean, corrupted = pair
    site = "blocks.2.hook_deepstack" if model.cfg.n_deepstack else "blocks.2.hook_resid_pre"
    metric = project(site, torch.randn(48, dtype=torch.float64), "query")
    agree(model, clean[0], corrupted[0], sites="resid", positions="image", metric=metric)


def test_residuals_after_the_last_addition_restore_the_other_run(pair) -> None:
    """Earlier residuals of all positions do not: what deep-stack features add later is the corrupted image's."""
    model, clean, corrupted = pair
    result = patch_sweep(
        model, clean, corrupted, sites="resid", positions="all", metric=logit_diff(5, 6), progress=False
    )
    restored = (result.scores - 1).abs() < 1e-9
    first = model.cfg.n_deepstack + 1 if model.cfg.n_deepstack else 0
    assert restored.all(0).tolist() == [layer >= first for layer in range(model.cfg.n_layers)]


def test_steering_sweep_equals_whole_forwards(pair) -> None:
    model, clean, _ = pair
    vectors = torch.randn(model.cfg.n_layers, 48, dtype=torch.float64)
    for positions in ("query", "image"):
        fast, plain = (
            steer_sweep(
                model, clean, vectors, logit_diff(5, 6), alphas=[0, 2], positions=positions, engine=e, progress=False
            )
            for e in ("suffix", "naive")
        )
        torch.testing.assert_close(fast.values, plain.values, rtol=1e-10, atol=1e-12)
        assert float((fast.values[..., 1] - fast.values[..., 0]).abs().max()) > 1e-3
