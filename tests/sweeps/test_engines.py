"""The suffix engine equals whole forwards, for every site, selection of positions and kind of decoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.cases import BY_NAME, counted, raw_inputs
from veena_lens.sweeps import SweepResult, patch_sweep, steer_sweep
from veena_lens.sweeps.metrics import kl, log_prob, logit_diff, project, soft_hit

DECODERS = ["three-images-and-none", "window-qwen2", "rope-llama3"]
SITES = [
    "blocks.0.hook_resid_pre",
    "blocks.0.hook_resid_mid",
    "blocks.1.hook_resid_post",
    "blocks.0.attn.hook_q",
    "blocks.0.attn.hook_k",
    "blocks.1.attn.hook_v",
    "blocks.1.attn.hook_rot_q",
    "blocks.1.attn.hook_rot_k",
    "blocks.0.attn.hook_attn_scores",
    "blocks.1.attn.hook_pattern",
    "blocks.0.attn.hook_z",
    "blocks.1.attn.hook_result",
    "blocks.0.hook_q_input",
    "blocks.1.hook_k_input",
    "blocks.1.hook_v_input",
    "blocks.1.hook_mlp_in",
    "blocks.0.mlp.hook_pre",
    "blocks.1.ln1.hook_scale",
    "blocks.1.ln2.hook_normalized",
    "hook_embed",
]


@pytest.fixture
def pair(model_of):
    """A model in pure float64, and two batches that differ in their images (or tokens) only."""

    def get(name: str) -> tuple[Any, Any, Any]:
        model = model_of(BY_NAME[name], casts="none")
        raw = counted(raw_inputs(BY_NAME[name]))
        other = dict(raw)
        if "pixel_values" in raw:
            other["pixel_values"] = torch.randn(raw["pixel_values"].shape, dtype=torch.float64)
        ids = raw["input_ids"].clone()
        ids[:, -2] = (ids[:, -2] + 3) % 90 + 2
        other["input_ids"] = ids
        return model, model.inputs_from_hf(**raw), model.inputs_from_hf(**other)

    return get


def both(model: Any, clean: Any, corrupted: Any, **kw: Any) -> tuple[SweepResult, SweepResult]:
    kw = {"metric": logit_diff(5, 6), "progress": False} | kw
    fast, plain = (patch_sweep(model, clean, corrupted, engine=engine, **kw) for engine in ("suffix", "naive"))
    assert float(plain.values.std()) > 1e-6, "no patch did anything"
    return fast, plain


def agree(fast: SweepResult, plain: SweepResult) -> None:
    assert fast.axes == plain.axes
    torch.testing.assert_close(fast.values, plain.values, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(fast.scores, plain.scores, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("positions", ["last", "query", "last+query", -2], ids=str)
@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("name", DECODERS)
def test_head_sweep_equals_whole_forwards(name: str, direction: str, positions: Any, pair) -> None:
    model, clean, corrupted = pair(name)
    if isinstance(positions, int):
        clean, corrupted = clean[0], corrupted[0]
    agree(*both(model, clean, corrupted, positions=positions, direction=direction))


@pytest.mark.parametrize("sites", ["resid", "attn_out", "mlp_out", "neurons", "heads"])
def test_sweep_of_every_position_equals_whole_forwards(sites: str, pair) -> None:
    model, clean, corrupted = pair("three-images-and-none")
    units = [0, 7] if sites == "neurons" else [1] if sites == "heads" else None
    fast, plain = both(model, clean[0], corrupted[0], sites=sites, positions="each", units=units)
    agree(fast, plain)
    assert fast.axes[-1] == "pos" and fast.values.shape[-1] == int(clean[0].lengths[0])


@pytest.mark.parametrize("name", DECODERS)
def test_every_site_of_the_decoder_can_be_swept(name: str, pair) -> None:
    model, clean, corrupted = pair(name)
    fast, plain = both(model, clean[0], corrupted[0], sites=SITES, positions="query")
    agree(fast, plain)
    assert fast.axes == ("site",) and fast.labels["site"] == SITES


@pytest.mark.parametrize("max_rows", [1, 3, 1000])
def test_the_size_of_a_batch_of_rows_changes_nothing(max_rows: int, pair) -> None:
    model, clean, corrupted = pair("three-images-and-none")
    agree(*both(model, clean, corrupted, positions="query", max_rows=max_rows))


def test_metrics_on_logits_and_on_activations_agree(pair) -> None:
    model, clean, corrupted = pair("three-images-and-none")
    direction = torch.randn(48, dtype=torch.float64)
    with torch.no_grad():
        reference = model(clean[0])[0, -1]
    for metric in (
        log_prob(9),
        kl(reference),
        soft_hit([5, 6], [[7], [8, 9]]),
        project("blocks.1.hook_resid_post", direction, "query"),
        project("blocks.0.hook_resid_post", direction, "last"),
    ):
        agree(*both(model, clean[0], corrupted[0], metric=metric, positions="query"))


def test_patching_everything_restores_the_other_run(pair) -> None:
    model, clean, corrupted = pair("three-images-and-none")
    result = patch_sweep(
        model, clean, corrupted, sites="resid", positions="all", layers=[0], metric=logit_diff(5, 6), progress=False
    )
    torch.testing.assert_close(result.scores, torch.ones_like(result.scores), rtol=1e-9, atol=1e-9)
    same = patch_sweep(model, clean, clean, metric=logit_diff(5, 6), progress=False)
    torch.testing.assert_close(same.values, same.clean[:, None, None].expand(same.values.shape), rtol=1e-12, atol=1e-12)


def test_all_heads_together_are_the_attention_output(pair) -> None:
    model, clean, corrupted = pair("rope-llama3")
    metric = logit_diff(5, 6)
    z = patch_sweep(
        model, clean[0], corrupted[0], sites=["blocks.1.attn.hook_z"], positions="last", metric=metric, progress=False
    )
    out = patch_sweep(model, clean[0], corrupted[0], sites="attn_out", layers=[1], metric=metric, progress=False)
    torch.testing.assert_close(z.values.flatten(), out.values.flatten(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", DECODERS)
def test_steering_sweep_equals_whole_forwards(name: str, pair) -> None:
    model, clean, _ = pair(name)
    vectors = torch.randn(model.cfg.n_layers, 48, dtype=torch.float64)
    fast, plain = (
        steer_sweep(
            model, clean, vectors, logit_diff(5, 6), alphas=[0, 0.5, 2], positions="query", engine=e, progress=False
        )
        for e in ("suffix", "naive")
    )
    torch.testing.assert_close(fast.values, plain.values, rtol=1e-10, atol=1e-12)
    unsteered = fast.values[..., 0]
    torch.testing.assert_close(unsteered, fast.clean[:, None].expand(unsteered.shape), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.15)])
def test_lower_precision_agrees_within_its_rounding(dtype: torch.dtype, tolerance: float, model_of) -> None:
    model = model_of(BY_NAME["three-images-and-none"], dtype=dtype)
    raw = counted(raw_inputs(BY_NAME["three-images-and-none"]))
    clean = model.inputs_from_hf(**raw)
    corrupted = model.inputs_from_hf(**{**raw, "pixel_values": -raw["pixel_values"]})
    fast, plain = both(model, clean, corrupted, metric=lambda logits: (logits[:, 5] - logits[:, 6]).float())
    assert float((fast.values - plain.values).abs().max()) < tolerance


def test_an_interrupted_sweep_resumes_where_it_was(pair, tmp_path, monkeypatch) -> None:
    from veena_lens.sweeps import engine as running

    model, clean, corrupted = pair("three-images-and-none")
    kw: dict[str, Any] = dict(positions="query", metric=logit_diff(5, 6), progress=False, max_rows=3, out=tmp_path)
    real, calls = running.run_staircase, []

    def dies(*args: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **more)

    monkeypatch.setattr(running, "run_staircase", dies)
    with pytest.raises(KeyboardInterrupt):
        patch_sweep(model, clean, corrupted, **kw)
    result = patch_sweep(model, clean, corrupted, **kw)
    n_chunks = len(clean) * 4  # 12 heads in chunks of 3
    assert len(calls) == n_chunks + 1, "chunks that were kept ran again"
    agree(result, patch_sweep(model, clean, corrupted, **{**kw, "out": None}))


def test_a_result_comes_back_from_its_file(pair, tmp_path) -> None:
    model, clean, corrupted = pair("rope-llama3")
    result = patch_sweep(model, clean, corrupted, metric=logit_diff(5, 6), progress=False)
    back = SweepResult.load(result.save(tmp_path / "sweep.safetensors"))
    assert torch.equal(back.values, result.values) and back.axes == result.axes == ("pair", "layer", "head")
    frame = back.to_frame()
    assert len(frame) == result.values.numel() and {"layer", "head", "value", "metric"} <= set(frame.columns)


def test_the_plan_tells_what_is_saved(pair) -> None:
    model, clean, corrupted = pair("rope-llama3")
    plan = patch_sweep(model, clean, corrupted, plan_only=True)
    n, heads = clean[0].lengths, 6
    assert plan.n_rows == len(clean) * 2 * heads
    assert plan.token_layers == len(clean) * heads * (2 + 1) and plan.saving > 1, n
    whole = patch_sweep(model, clean, corrupted, sites=["hook_embed"], positions=0, plan_only=True)
    assert whole.n_whole >= 1 and "whole run" in repr(whole)


@pytest.mark.parametrize(
    ("kw", "telling"),
    [
        (dict(sites="haeds"), "haeds"),
        (dict(sites=["vision.blocks.0.hook_resid_pre"]), "decoder"),
        (dict(layers=[7]), "layer 7"),
        (dict(direction="up"), "denoising"),
        (dict(engine="fast"), "engine"),
        (dict(metric=None), "metric"),
        (dict(metric=lambda logits: logits), "one number per row"),
        (dict(positions="lats"), "lats"),
        (dict(max_rows=0), "max_rows"),
    ],
)
def test_bad_sweeps_are_refused(kw: dict[str, Any], telling: str, pair) -> None:
    model, clean, corrupted = pair("rope-llama3")
    with pytest.raises(ValueError, match=telling):
        patch_sweep(model, clean, corrupted, **({"metric": logit_diff(5, 6), "progress": False} | kw))
