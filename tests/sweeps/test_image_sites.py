"""Sweeps of sites on images, of several metrics at once, and within a budget of memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.cases import BY_NAME
from tests.pairs import pair_of
from tests.sweeps.engines import KW, agree
from veena_lens import HookedVLM
from veena_lens.hook_table import hooks_of
from veena_lens.interventions import Box
from veena_lens.sweeps import patch_sweep, steer_sweep
from veena_lens.sweeps.metrics import log_prob, logit_diff, project

TILED = replace(BY_NAME["llava-next-llama"], name="tiled", rows=("3 i40x75 5", "2 i90x30 1 i28x28 4"))
CASES = {"fixed": BY_NAME["clip-llama"], "tiled": TILED, "bidirectional": BY_NAME["gemma3-touching-pictures"]}
NAMES = ("qwen2_vl-plain", "qwen2_5_vl-plain", "qwen3_vl-plain", "qwen3_vl-image-and-video", "onevision-resampled")
CASES |= {name: BY_NAME[name] for name in (*NAMES, "onevision-image-and-video")}


@pytest.fixture
def pair(model_of):
    """(model, clean, corrupted) of a case, in pure float64; the text is the same."""
    return lambda kind: pair_of(model_of, CASES[kind], has_other_words=False)


@pytest.mark.parametrize("kind", CASES)
def test_every_site_on_images_equals_whole_forwards(kind: str, pair) -> None:
    model, clean, corrupted = pair(kind)
    sites = [n for n, row in hooks_of(model.cfg).items() if row.of_tower and "_input" not in n]
    sites = [n for n in sites if "blocks." not in n or "blocks.1." in n]
    in_tower = [n for n in sites if n.startswith("vision.")]
    kw: dict[str, Any] = dict(least=1e-9, sites=in_tower)
    agree(model, clean[1], corrupted[1], positions="all", **kw)
    agree(model, clean[1], corrupted[1], positions="all", **kw | dict(sites=[n for n in sites if n not in in_tower]))
    agree(model, clean[1], corrupted[1], positions=[0, -1], direction="noising", **kw | dict(sites=in_tower[:3]))


def test_sites_of_the_tower_and_the_connector_are_swept_together_where_their_positions_are_the_same(pair) -> None:
    model, clean, corrupted = pair("bidirectional")
    named = [n for n in hooks_of(model.cfg) if n.startswith(("vision.", "connector."))]
    agree(model, clean[0], corrupted[0], sites=named, positions=[1, -1])
    agree(model, clean[0], corrupted[0], sites=["vision.blocks.1.attn.hook_z"], positions=[3], units=[0, 3])


@pytest.mark.parametrize("kind", CASES)
def test_every_image_token_of_the_features_equals_whole_forwards(kind: str, pair) -> None:
    model, clean, corrupted = pair(kind)
    sites = ["hook_image_features", *(f"deepstack.{i}.hook_out" for i in range(model.cfg.n_deepstack))]
    fast = agree(model, clean[1], corrupted[1], 1e-9, sites=sites, positions="each")
    assert fast.values.shape == (len(sites), int(clean[1].image_mask.sum()))
    whole = agree(model, clean[1], corrupted[1], 1e-9, sites=sites[:1], positions="image")
    assert whole.axes == ("site",)


def test_each_position_of_the_tower_is_patched_alone(pair) -> None:
    model, clean, corrupted = pair("fixed")
    fast = agree(model, clean[0], corrupted[0], 1e-9, sites=["vision.blocks.0.hook_mlp_out"], positions="each")
    assert fast.axes == ("site", "pos") and fast.values.shape[1] == model.cfg.vision.n_positions
    with pytest.raises(ValueError, match="one by one"):  # the second row has two images
        agree(model, clean, corrupted, sites=["vision.blocks.0.hook_mlp_out"], positions="each")


def test_features_in_a_box_of_pixels_are_patched_together() -> None:
    from veena_lens.checkpoints.files import bundled_pairs

    model = HookedVLM.from_pretrained("tiny-llava-emotion", dtype=torch.float64, casts="none")
    clean, corrupted = (model.prepare(text="who?", images=p.open()) for p in bundled_pairs("test")[0])
    metric = logit_diff(model.to_single_token(" happy"), model.to_single_token(" sad"))
    parts = {
        name: agree(model, clean, corrupted, sites=["hook_image_features"], positions=box, metric=metric).scores.item()
        for name, box in {"all": Box(0, 0, 192, 192), "corner": Box(0, 0, 20, 20)}.items()
    }
    assert parts["all"] == pytest.approx(1.0, abs=1e-9) and abs(parts["corner"]) < 0.5


def test_several_metrics_read_the_same_runs(pair, monkeypatch) -> None:
    from veena_lens.sweeps import engine as running

    model, clean, corrupted = pair("fixed")
    direction = torch.randn(model.cfg.d_model, dtype=torch.float64)
    metrics = {
        "difference": logit_diff(5, 6),
        "probability": log_prob(7),
        "first": project("blocks.0.hook_resid_post", direction),
        "last": project("blocks.1.hook_resid_post", direction, "query"),
    }
    calls, real = [], running.run_staircase
    monkeypatch.setattr(running, "run_staircase", lambda *args: calls.append(1) or real(*args))
    together = patch_sweep(model, clean, corrupted, metric=metrics, positions="query", progress=False)
    n_calls = len(calls)
    for name, metric in metrics.items():
        alone = patch_sweep(model, clean, corrupted, metric=metric, positions="query", progress=False)
        torch.testing.assert_close(together[name].values, alone.values, rtol=1e-12, atol=1e-13)
        plain = patch_sweep(model, clean, corrupted, metric=metric, positions="query", progress=False, engine="naive")
        torch.testing.assert_close(alone.values, plain.values, rtol=1e-10, atol=1e-12)
    assert len(calls) == n_calls * (1 + len(metrics))
    steered = steer_sweep(model, clean, direction, metrics, progress=False)
    assert set(steered) == set(metrics) and steered["first"].axes == ("pair", "layer", "alpha")


def test_metrics_at_once_resume_from_their_files(pair, tmp_path) -> None:
    model, clean, corrupted = pair("fixed")
    metrics = {"a": logit_diff(5, 6), "b": log_prob(9)}
    first = patch_sweep(model, clean, corrupted, metric=metrics, progress=False, out=tmp_path)
    again = patch_sweep(model, clean, corrupted, metric=metrics, progress=False, out=tmp_path)
    assert all(torch.equal(first[name].values, again[name].values) for name in metrics)


def test_a_budget_of_memory_bounds_the_rows_that_travel_together(pair, monkeypatch) -> None:
    from veena_lens.sweeps import engine as running
    from veena_lens.sweeps import plan as planning

    model, clean, corrupted = pair("fixed")
    plan = patch_sweep(model, clean, corrupted, plan_only=True)
    sizes, real = [], running.run_staircase
    monkeypatch.setattr(running, "run_staircase", lambda *args: sizes.append(len(args[2])) or real(*args))
    metric = KW["metric"]
    free = patch_sweep(model, clean, corrupted, metric=metric, progress=False)
    assert max(sizes) == 12
    sizes.clear()
    tight = patch_sweep(model, clean, corrupted, metric=metric, progress=False, max_bytes=3 * plan.row_bytes)
    assert max(sizes) == 3
    torch.testing.assert_close(free.values, tight.values, rtol=1e-12, atol=1e-13)
    with pytest.raises(ValueError, match="single row"):
        patch_sweep(model, clean, corrupted, metric=metric, progress=False, max_bytes=plan.row_bytes - 1)
    for left, most in ((6 * plan.row_bytes, 4), (None, 12)):  # 0.8 of six rows, as a power of two
        sizes.clear()
        monkeypatch.setattr(planning, "free_memory", lambda device, left=left: left)
        auto = patch_sweep(model, clean, corrupted, metric=metric, progress=False, max_bytes="auto")
        assert max(sizes) == most
        torch.testing.assert_close(free.values, auto.values, rtol=1e-12, atol=1e-13)
    monkeypatch.setattr(planning, "free_memory", lambda device: plan.row_bytes - 1)
    with pytest.raises(MemoryError, match=r"are free on cpu, and the longest row needs about"):
        patch_sweep(model, clean, corrupted, metric=metric, progress=False, max_bytes="auto")
    with pytest.raises(ValueError, match="max_bytes='all' must be a number of bytes"):
        patch_sweep(model, clean, corrupted, metric=metric, progress=False, max_bytes="all")


@pytest.mark.parametrize(
    ("kw", "telling"),
    [
        (dict(sites=["vision.blocks.0.hook_resid_pre"], positions="query"), "decoder reads"),
        (dict(sites=["vision.blocks.0.hook_resid_pre"], positions=99), "has 5 positions"),
        (dict(sites=["vision.blocks.0.hook_resid_pre", "blocks.0.hook_resid_pre"], positions="all"), "one after"),
        (dict(sites=["unembed.hook_in"]), "unembed"),
        (dict(metric=lambda logits: logits[:, 0] * float("nan")), "not finite on unpatched runs"),
        (dict(metric={}), "dictionary"),
        (dict(metric="logit"), "function"),
    ],
)
def test_what_cannot_be_swept_is_refused(kw: dict[str, Any], telling: str, pair) -> None:
    model, clean, corrupted = pair("fixed")
    with pytest.raises(ValueError, match=telling):
        patch_sweep(model, clean, corrupted, **(KW | kw))


def test_images_of_other_shapes_are_refused(pair) -> None:
    model, rows, _ = pair("tiled")
    with pytest.raises(ValueError, match="grid"):
        patch_sweep(model, rows[0], rows[1], sites=["vision.hook_embed"], positions="all", metric=log_prob(3))
