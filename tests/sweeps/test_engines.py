"""The suffix engine equals whole forwards, for every site, selection of positions and kind of decoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.cases import BY_NAME
from tests.interrupting import stop_at
from tests.pairs import pair_of
from tests.sweeps.engines import BIDIRECTIONAL, FEATURES, KW, LLAVA, MULTIMODAL, agree, steering_agrees
from veena_lens.hook_table import hooks_of
from veena_lens.images.layout import reached_from
from veena_lens.sweeps import SweepResult, patch_sweep, steer_sweep
from veena_lens.sweeps import engine as running
from veena_lens.sweeps.metrics import kl, log_prob, logit_diff, project, soft_hit

CAUSAL = LLAVA | MULTIMODAL
PLACES = [
    (feature, direction, at)
    for feature in LLAVA
    for direction in ("denoising", "noising")
    for at in ("last", "query", "last+query", -2)
]
PLACES += [(feature, "denoising", "last") for feature in MULTIMODAL]
PLACES += [(feature, "noising", "query") for feature in MULTIMODAL]
PLACES += [(feature, "denoising", "an image token") for feature in MULTIMODAL]


@pytest.fixture
def pair(model_of):
    """(model, clean, corrupted) of a feature, in pure float64."""
    return lambda feature: pair_of(model_of, FEATURES[feature])


@pytest.mark.parametrize(("feature", "direction", "positions"), PLACES, ids=str)
def test_head_sweep_equals_whole_forwards(feature: str, direction: str, positions: Any, pair) -> None:
    model, clean, corrupted = pair(feature)
    if positions == "an image token":
        clean, corrupted = clean[0], corrupted[0]
        positions = clean.without_padding().spans[0].images[0].start
    elif isinstance(positions, int):
        clean, corrupted = clean[0], corrupted[0]
    agree(model, clean, corrupted, positions=positions, direction=direction)


EVERY: list[Any] = [("several images", s, {}) for s in ("resid", "attn_out", "mlp_out")]
EVERY += [("several images", "neurons", dict(units=[0, 7])), ("several images", "heads", dict(units=[1]))]
for _feature, _sites in zip(
    MULTIMODAL, (["blocks.1.hook_resid_post"], ["blocks.2.hook_deepstack", "blocks.1.hook_resid_post"]), strict=True
):
    EVERY += [
        (_feature, "resid", dict(layers=[1], direction="noising")),
        (_feature, "heads", dict(layers=[1], units=[1])),
    ]
    EVERY += [(_feature, _sites, {})]


@pytest.mark.parametrize(("feature", "sites", "options"), EVERY, ids=str)
def test_sweep_of_every_position_equals_whole_forwards(feature: str, sites: Any, options: Any, pair) -> None:
    model, clean, corrupted = pair(feature)
    fast = agree(model, clean[0], corrupted[0], sites=sites, positions="each", **options)
    assert fast.axes[-1] == "pos" and fast.values.shape[-1] == int(clean[0].lengths[0])


# Past the last attention an image token is read by nobody.
UNREAD = ("attn.hook_q", "rot_q", "q_norm", "q_input", "scores", "pattern", "z", "result", "attn_out")
UNREAD += ("resid_mid", "resid_post", "ln1_post", "ln2", "mlp")
PLACED = [(feature, 0, "query") for feature in CAUSAL] + [(feature, 1, "image") for feature in MULTIMODAL]
PLACED += [(feature, 0, "in an image") for feature in BIDIRECTIONAL]


@pytest.mark.parametrize(("feature", "row", "positions"), PLACED, ids=str)
def test_every_site_of_the_decoder_equals_whole_forwards(feature: str, row: int, positions: Any, pair) -> None:
    """Norms of queries, keys and outputs and deep-stack additions among them, on two metrics at once."""
    model, clean, corrupted = pair(feature)
    clean, corrupted = clean[row].without_padding(), corrupted[row].without_padding()
    sites = ["hook_embed", *(name for name in hooks_of(model.cfg) if name.startswith("blocks."))]
    parts = {name.split(".", 2)[-1] for name in sites}
    assert ("attn.q_norm.hook_scale" in parts) == (feature == "deep-stack features" or feature in BIDIRECTIONAL)
    assert ("hook_deepstack" in parts) == (model.cfg.n_deepstack > 0)
    last = model.cfg.n_layers - 1
    if feature not in MULTIMODAL:
        sites = [name for name in sites if not name.startswith("blocks.2.")]
    at = positions
    if positions == "in an image":
        inside = clean.spans[0].images[0].stop - 2
        at = [inside, inside + 1]
    stream = project(f"blocks.{last}.hook_resid_post", torch.ones(model.cfg.d_model).double())
    metrics = {"logits": logit_diff(5, 6), "stream": stream}
    result = agree(model, clean, corrupted, sites=sites, positions=at, metric=metrics)["logits"]
    assert result.axes == ("site",) and result.labels["site"] == sites
    moved = ((result.values - result.corrupted).abs() > 1e-9).tolist()
    still = [site for site, acts in zip(sites, moved, strict=True) if not acts]
    if positions == "image":
        still = [site for site in still if not (site.startswith(f"blocks.{last}.") and any(p in site for p in UNREAD))]
    assert still == [] or feature in BIDIRECTIONAL, "narrow windows hide images from the answer"


@pytest.mark.parametrize(
    ("feature", "row"), [("bidirectional images beside each other", 0), ("bidirectional images that touch", 1)]
)
def test_positions_of_a_part_of_an_image_equal_whole_forwards(feature: str, row: int, pair) -> None:
    """An edit of an image's last token reaches its first one."""
    model, clean, corrupted = pair(feature)
    a, b = clean[row].without_padding(), corrupted[row].without_padding()
    span = a.spans[0].images[-1]
    for positions in ([span.stop - 1], [span.start + 1, span.stop], slice(span.start + 2, span.stop + 1), "image"):
        for direction in ("denoising", "noising"):
            agree(model, a, b, sites="resid", positions=positions, direction=direction)
    vectors = torch.randn(model.cfg.n_layers, 48, dtype=torch.float64)
    steering_agrees(model, a, vectors, alphas=[0.5, 2], positions=[span.stop - 1])


def test_an_edit_in_an_image_that_reads_itself_reaches_it_from_its_first_token(pair) -> None:
    model, clean, _ = pair("bidirectional images that touch")
    first, second = (reached_from(model.cfg, clean[row].without_padding()).tolist() for row in (0, 1))
    assert first == [0] * 8 + [8, 9, 10], "pictures that touch are one"
    assert second == [0, 1, 1, 1, 1, 5, 6, 6, 6, 6, 10, 11, 11, 11, 11, 15, 16]
    plan = patch_sweep(model, clean[1], clean[1], sites="resid", positions=[8], layers=[0], plan_only=True)
    assert plan.token_layers == (17 - 6) * 3


@pytest.mark.parametrize("max_rows", [1, 3, 1000])
def test_the_size_of_a_batch_of_rows_changes_nothing(max_rows: int, pair) -> None:
    agree(*pair("several images"), positions="query", max_rows=max_rows)


@pytest.mark.parametrize(
    ("feature", "options"),
    [("several images", dict(positions="query"))] + [(f, dict(positions="image", sites="resid")) for f in MULTIMODAL],
    ids=str,
)
def test_metrics_on_logits_and_on_activations_agree(feature: str, options: dict[str, Any], pair) -> None:
    model, clean, corrupted = pair(feature)
    direction = torch.randn(48, dtype=torch.float64)
    with torch.no_grad():
        reference = model(clean[0])[0, -1]
    metrics = [
        project("blocks.2.hook_deepstack" if model.cfg.n_deepstack else "blocks.1.hook_resid_post", direction, "query")
    ]
    if feature == "several images":
        metrics += [log_prob(9), kl(reference), soft_hit([5, 6], [[7], [8, 9]])]
        metrics += [project("blocks.0.hook_resid_post", direction, "last")]
    for metric in metrics:
        agree(model, clean[0], corrupted[0], metric=metric, **options)


@pytest.mark.parametrize("feature", ["several images", *MULTIMODAL])
def test_patching_every_position_restores_the_other_run(feature: str, pair) -> None:
    """Residuals before the last deep-stack addition do not: what is added later is the corrupted image's."""
    model, clean, corrupted = pair(feature)
    result = patch_sweep(model, clean, corrupted, sites="resid", positions="all", **KW)
    first = model.cfg.n_deepstack + 1 if model.cfg.n_deepstack else 0
    restored = (result.scores - 1).abs() < 1e-9
    assert restored.all(0).tolist() == [layer >= first for layer in range(model.cfg.n_layers)]


def test_patching_a_run_with_itself_changes_nothing(pair) -> None:
    model, clean, _ = pair("several images")
    same = patch_sweep(model, clean, clean, **KW)
    torch.testing.assert_close(same.values, same.clean[:, None, None].expand(same.values.shape), rtol=1e-12, atol=1e-12)


def test_all_heads_together_are_the_attention_output(pair) -> None:
    model, clean, corrupted = pair("scaled rotary positions")
    z = patch_sweep(model, clean[0], corrupted[0], sites=["blocks.1.attn.hook_z"], positions="last", **KW)
    out = patch_sweep(model, clean[0], corrupted[0], sites="attn_out", layers=[1], **KW)
    torch.testing.assert_close(z.values.flatten(), out.values.flatten(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("feature", "positions"), [(f, "query") for f in CAUSAL] + [(f, "image") for f in MULTIMODAL], ids=str
)
def test_steering_sweep_equals_whole_forwards(feature: str, positions: str, pair) -> None:
    model, clean, _ = pair(feature)
    vectors = torch.randn(model.cfg.n_layers, 48, dtype=torch.float64)
    fast = steering_agrees(model, clean, vectors, alphas=[0, 0.5, 2], positions=positions)
    unsteered = fast.values[..., 0]
    torch.testing.assert_close(unsteered, fast.clean[:, None].expand(unsteered.shape), rtol=1e-12, atol=1e-12)
    assert float((fast.values[..., 2] - unsteered).abs().max()) > 1e-3


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.15)])
def test_lower_precision_agrees_within_its_rounding(dtype: torch.dtype, tolerance: float, model_of) -> None:
    case = BY_NAME["three-images-and-none"]
    model, clean, corrupted = pair_of(model_of, case, has_other_words=False, dtype=dtype, casts="hf")
    kw: dict[str, Any] = KW | dict(metric=lambda logits: (logits[:, 5] - logits[:, 6]).float())
    fast, plain = (patch_sweep(model, clean, corrupted, engine=engine, **kw) for engine in ("suffix", "naive"))
    assert float(plain.values.std()) > 1e-6, "no patch did anything"
    assert float((fast.values - plain.values).abs().max()) < tolerance


def test_an_interrupted_sweep_resumes_where_it_was(pair, tmp_path, monkeypatch) -> None:
    model, clean, corrupted = pair("several images")
    kw: dict[str, Any] = KW | dict(positions="query", max_rows=3, out=tmp_path)
    calls = stop_at(monkeypatch, running, "run_staircase", 4)
    with pytest.raises(KeyboardInterrupt):
        patch_sweep(model, clean, corrupted, **kw)
    result = patch_sweep(model, clean, corrupted, **kw)
    n_chunks = len(clean) * 4  # 12 heads in chunks of 3
    assert len(calls) == n_chunks + 1, "chunks that were kept ran again"
    fresh = patch_sweep(model, clean, corrupted, **kw | dict(out=None))
    assert result.axes == fresh.axes
    torch.testing.assert_close(result.values, fresh.values, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(result.scores, fresh.scores, rtol=1e-10, atol=1e-10)


def test_an_interrupted_steering_sweep_resumes_where_it_was(pair, tmp_path, monkeypatch) -> None:
    model, inputs, _ = pair("several images")
    vectors = torch.randn(model.cfg.n_layers, model.cfg.d_model, dtype=torch.float64)
    kw: dict[str, Any] = KW | dict(alphas=[0.5, 1, 2], max_rows=2, out=tmp_path)
    calls = stop_at(monkeypatch, running, "run_staircase", 3)
    with pytest.raises(KeyboardInterrupt):
        steer_sweep(model, inputs, vectors, **kw)
    result = steer_sweep(model, inputs, vectors, **kw)
    assert len(calls) == len(inputs) * 3 + 1, "chunks that were kept ran again"
    fresh = steer_sweep(model, inputs, vectors, **kw | dict(out=None))
    torch.testing.assert_close(result.values, fresh.values, rtol=0, atol=0)
    other = steer_sweep(model, inputs, -vectors, **kw)  # another sweep, not the kept one
    assert not torch.equal(other.values, fresh.values)


def test_a_result_comes_back_from_its_file(pair, tmp_path) -> None:
    result = patch_sweep(*pair("scaled rotary positions"), **KW)
    back = SweepResult.load(result.save(tmp_path / "sweep.safetensors"))
    assert torch.equal(back.values, result.values) and back.axes == result.axes == ("pair", "layer", "head")
    frame = back.to_frame()
    assert len(frame) == result.values.numel() and {"layer", "head", "value", "metric"} <= set(frame.columns)


def test_the_plan_tells_what_is_saved(pair) -> None:
    model, clean, corrupted = pair("scaled rotary positions")
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
    with pytest.raises(ValueError, match=telling):
        patch_sweep(*pair("scaled rotary positions"), **(KW | kw))
