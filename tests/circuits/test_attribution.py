"""Attribution patching against exact patching, finite differences and the completeness of integrated gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.cases import BY_NAME
from tests.circuits.runs import GEMMA3, KINDS, LLAVA, NEXT, QWEN3, TEXT, difference, pair_of
from veena_lens.circuits.attribution import attribution_patching, check_attribution, image_attribution
from veena_lens.interventions import Ablate, Steer
from veena_lens.scores import Scores
from veena_lens.sweeps import patch_sweep
from veena_lens.sweeps.metrics import logit_diff, project

EXACT: dict[str, Any] = dict(rtol=1e-9, atol=1e-10)


def exact(model: Any, clean: Any, corrupted: Any, **kw: Any) -> torch.Tensor:
    """The change of the metric under each patch, pair by pair, in the shape of the estimate."""
    found = []
    for i in range(len(clean)):
        swept = patch_sweep(model, clean[i], corrupted[i], progress=False, **kw)
        if kw.get("direction") == "noising":
            found.append(swept.clean - swept.values)
        else:
            found.append(swept.values - swept.corrupted)
    return torch.stack(found)


@pytest.mark.parametrize(("name", "direction"), [*((name, "denoising") for name in (*KINDS, NEXT)), (LLAVA, "noising")])
def test_estimate_is_exact_where_the_metric_is_linear_in_the_site(name: str, direction: str, model_of) -> None:
    model, clean, corrupted = pair_of(model_of, name)
    last = model.cfg.n_layers - 1
    vector = torch.randn(model.cfg.d_model, dtype=torch.float64)
    metric = project(f"blocks.{last}.hook_resid_post", vector, "query")
    for sites in ("mlp_out",) if model.cfg.post_norms else ("mlp_out", "neurons"):  # a norm's scale is no constant
        kw = dict(sites=sites, layers=[last], positions="query", direction=direction, metric=metric)
        kw |= dict(units=[0, 5, 2]) if sites == "neurons" else {}
        guess = attribution_patching(model, clean, corrupted, **kw)
        truth = exact(model, clean, corrupted, **kw)
        assert guess.axes == (("pair", "layer", "neuron") if sites == "neurons" else ("pair", "layer"))
        torch.testing.assert_close(guess.values, truth, **EXACT)
        assert float(truth.abs().min()) > 1e-8


@pytest.mark.parametrize("sites", ["heads", "neurons", "attn_out", "mlp_out", "resid"])
@pytest.mark.parametrize("name", [LLAVA, QWEN3, TEXT])
def test_estimate_is_the_slope_of_exact_patching(name: str, sites: str, model_of) -> None:
    """Towards a source that lies a little away, patching moves the metric by the estimate, to second order."""
    model, clean, corrupted = pair_of(model_of, name)
    layers, units = [0, model.cfg.n_layers - 1], [0, 3] if sites in ("heads", "neurons") else None
    guess = attribution_patching(
        model, clean, corrupted, sites, "last+query", difference, layers=layers, units=units, max_rows=2
    )
    part = {"heads": "attn.hook_z", "neurons": "mlp.hook_post", "resid": "hook_resid_pre"}.get(sites, f"hook_{sites}")
    for at, layer in enumerate(layers):
        site, step = f"blocks.{layer}.{part}", 1e-5
        _, cache = model.run_with_cache(clean, names_filter=site)
        for k, unit in enumerate(units or [None]):

            def move(by: float, tensor: torch.Tensor, hook: Any, unit: Any = unit, cache: Any = cache) -> torch.Tensor:
                out = tensor.clone()
                for row, spans in enumerate(corrupted.spans):
                    there = clean.spans[row].query
                    new = tensor[row, spans.query] + by * (cache[hook.name][row, there] - tensor[row, spans.query])
                    where = (spans.query,) if unit is None else (spans.query, unit)
                    out[(row, *where)] = new if unit is None else new[:, unit]
                return out

            ends = []
            for by in (step, -step):
                hook = [(site, lambda t, hook, by=by, move=move: move(by, t, hook))]
                with torch.no_grad():
                    logits = model.run_with_hooks(corrupted, fwd_hooks=hook)
                ends.append(
                    torch.stack([difference(logits[i, s.last][None])[0] for i, s in enumerate(corrupted.spans)])
                )
            slope = (ends[0] - ends[1]) / (2 * step)
            mine = guess.values[:, at] if unit is None else guess.values[:, at, k]
            torch.testing.assert_close(mine, slope, rtol=1e-5, atol=1e-8)
            assert float(slope.abs().max()) > 1e-6


@pytest.mark.parametrize(("name", "sites"), [(LLAVA, "heads"), (QWEN3, "neurons"), (LLAVA, "attn_out")])
def test_integrated_gradients_are_complete(name: str, sites: str, model_of) -> None:
    model, clean, corrupted = pair_of(model_of, name)
    part = {"heads": "attn.hook_z", "neurons": "mlp.hook_post"}.get(sites, "hook_attn_out")
    named = [f"blocks.{layer}.{part}" for layer in range(model.cfg.n_layers)]
    kw: dict[str, Any] = dict(positions="query", metric=difference)
    truth = exact(model, clean, corrupted, sites=named, **kw)
    guess = attribution_patching(model, clean, corrupted, sites, steps=16, **kw)
    total = guess.values if sites == "attn_out" else guess.values.sum(-1)
    torch.testing.assert_close(total, truth, rtol=5e-3, atol=2e-3 * float(truth.abs().max()))
    once = attribution_patching(model, clean, corrupted, sites, **kw)
    first = once.values if sites == "attn_out" else once.values.sum(-1)
    assert float((first - truth).abs().max()) > 10 * float((total - truth).abs().max())


def test_positions_one_by_one_add_up_to_positions_together(model_of) -> None:
    model, clean, corrupted = pair_of(model_of, LLAVA)
    one = attribution_patching(model, clean[0], corrupted[0], positions="each", metric=difference)
    together = attribution_patching(model, clean[0], corrupted[0], positions="all", metric=difference)
    assert one.axes == ("pair", "layer", "head", "pos") and one.shape[-1] == int(clean.lengths[0])
    torch.testing.assert_close(one.values.sum(-1), together.values, **EXACT)
    assert float(one.values[..., -1].abs().max()) > 1e-6


@pytest.mark.parametrize("name", [LLAVA, NEXT, QWEN3])
def test_a_padded_batch_of_pairs_equals_pairs_alone(name: str, model_of) -> None:
    model, clean, corrupted = pair_of(model_of, name)
    for steps in (0, 2):
        kw: dict[str, Any] = dict(sites="heads", positions="query", metric=difference, steps=steps)
        together = attribution_patching(model, clean, corrupted, **kw)
        alone = [
            attribution_patching(model, clean[i].without_padding(), corrupted[i].without_padding(), **kw).values
            for i in range(len(clean))
        ]
        torch.testing.assert_close(together.values, torch.cat(alone), **EXACT)
        assert bool(torch.isfinite(together.values).all())


def test_a_run_patched_with_itself_gives_nothing(model_of) -> None:
    model, clean, _ = pair_of(model_of, QWEN3)
    for steps in (0, 3):
        assert not attribution_patching(model, clean, clean, metric=difference, steps=steps).values.any()
        assert not image_attribution(model, clean[:2], clean[:2], metric=difference, steps=steps).values.any()


def test_named_sites_and_a_metric_read_inside(model_of) -> None:
    """A site after the metric's has no effect; one before it is exact where what lies between is linear."""
    model, clean, corrupted = pair_of(model_of, LLAVA)
    metric = project("blocks.0.hook_resid_post", torch.randn(48, dtype=torch.float64), "query")
    names = ["blocks.0.hook_mlp_out", "blocks.0.attn.hook_pattern", "blocks.1.hook_attn_out", "hook_embed"]
    equal = [0, 2]  # pattern keys must correspond: rows of one length on both sides
    guess = attribution_patching(model, clean[equal], corrupted[equal], names, "query", metric)
    assert guess.axes == ("site", "pair") and guess.labels["site"] == names
    truth = exact(model, clean[equal], corrupted[equal], sites=names[:1], positions="query", metric=metric)
    torch.testing.assert_close(guess.values[0], truth.flatten(), **EXACT)
    assert not guess.values[2].any() and bool(guess.values[3].any())


def test_relative_estimates_compare_to_the_scores_of_a_sweep(model_of) -> None:
    model, clean, corrupted = pair_of(model_of, LLAVA)
    metric = project("blocks.1.hook_resid_post", torch.randn(48, dtype=torch.float64))
    for direction in ("denoising", "noising"):
        kw: dict[str, Any] = dict(sites="mlp_out", layers=[1], metric=metric, direction=direction)
        guess = attribution_patching(model, clean, corrupted, relative=True, **kw)
        swept = patch_sweep(model, clean, corrupted, progress=False, **kw)
        torch.testing.assert_close(guess.values, swept.scores, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(torch.tensor(guess.meta["clean"], dtype=torch.float64), swept.clean)


def test_each_pair_may_have_a_metric_of_its_own(model_of) -> None:
    model, clean, corrupted = pair_of(model_of, LLAVA)
    own = [logit_diff(5 + i, 9) for i in range(3)]
    guess = attribution_patching(model, clean, corrupted, metric=own)
    for i in range(3):
        alone = attribution_patching(model, clean[i], corrupted[i], metric=own[i])
        torch.testing.assert_close(guess.values[i], alone.values[0], **EXACT)


@pytest.mark.parametrize("name", [LLAVA, NEXT, QWEN3, "qwen2_vl-plain"])
def test_image_map_is_complete_and_both_sites_agree(name: str, model_of) -> None:
    model, clean, _ = pair_of(model_of, name)
    rows = [i for i, n in enumerate(clean.n_images) if n]
    clean = clean[rows]
    assert clean.pixel_values is not None
    corrupted = replace(clean, pixel_values=torch.randn(clean.pixel_values.shape, dtype=torch.float64))
    features = image_attribution(model, clean, corrupted, difference, steps=1)
    merged = image_attribution(model, clean, corrupted, difference, steps=1, site="hook_embed")
    assert features.axes == ("pair", "height", "width")
    torch.testing.assert_close(features.values, merged.values, **EXACT)
    for i in range(len(clean)):
        assert len(features.exists[i].any(1).nonzero()) == clean.grids[i][0][0]
    one = [i for i in range(len(clean)) if clean.n_images[i] == 1]
    fine = image_attribution(model, clean[one], corrupted[one], difference, steps=12)
    total = fine.values.sum((1, 2)) + torch.tensor(fine.meta["elsewhere"], dtype=torch.float64)
    gap = torch.tensor(fine.meta["clean"]) - torch.tensor(fine.meta["corrupted"])
    torch.testing.assert_close(total, gap.double(), rtol=2e-2, atol=5e-3 * float(gap.abs().max()))
    tower = image_attribution(model, clean[one], corrupted[one], difference, steps=12, site="vision.hook_embed")
    total = tower.values.sum((1, 2)) + torch.tensor(tower.meta["elsewhere"], dtype=torch.float64)
    torch.testing.assert_close(total, gap.double(), rtol=2e-2, atol=5e-3 * float(gap.abs().max()))
    assert float((tower.values - fine.values).abs().max()) > 1e-3 * float(gap.abs().max())
    if model.cfg.n_deepstack:
        partial = image_attribution(model, clean[one], corrupted[one], difference, steps=12, deepstack=False)
        assert float((partial.values.sum((1, 2)) - gap).abs().max()) > 5e-2 * float(gap.abs().max())


def test_a_patch_that_the_answer_is_read_from_is_found(model_of) -> None:
    """A planted circuit: the metric reads one image token alone."""
    model, clean, corrupted = pair_of(model_of, LLAVA)
    place = int(clean.grid_tokens(2)[1, 0]) - int((~clean.attention_mask[2]).sum())
    metric = project("blocks.0.hook_resid_pre", torch.randn(48, dtype=torch.float64), place)
    found = image_attribution(model, clean[2], corrupted[2], metric).values[0]
    assert float(found[1, 0].abs()) > 1e-3
    found[1, 0] = 0
    assert not found.any()


@pytest.mark.parametrize("name", [LLAVA, NEXT, QWEN3, "qwen2_vl-plain"])
def test_a_patch_that_differs_alone_has_all_of_the_map_at_the_tower(name: str, model_of) -> None:
    """Only the pixels of one cell differ: at the tower's input every other entry is 0, in every layout."""
    model, clean, _ = pair_of(model_of, name)
    row = next(i for i, n in enumerate(clean.n_images) if n == 1)
    clean = clean[row]
    assert clean.pixel_values is not None
    pixels, (height, width) = clean.pixel_values.clone(), clean.grids[0][0]
    y, x = height - 1, width - 1
    if name in (LLAVA, NEXT):
        tile, side = 0, 2
        if name == NEXT:
            layout: Any = clean.layouts[0][0]
            down, right = y + layout.pad[0], x + layout.pad[1]
            tile, y_in, x_in = 1 + down // side * layout.tiles[1] + right // side, down % side, right % side
        else:
            y_in, x_in = y, x
        pixels[tile, :, 14 * y_in : 14 * y_in + 14, 14 * x_in : 14 * x_in + 14] += 1
    else:
        square = model.cfg.vision.merge_size**2
        at = (y * width + x) * square
        pixels[0, at : at + square] += 1
    found = image_attribution(model, clean, replace(clean, pixel_values=pixels), difference, site="vision.hook_embed")
    values = found.values[0].clone()
    assert float(values[y, x].abs()) > 1e-7
    values[y, x] = 0
    assert not values.any() and abs(found.meta["elsewhere"][0]) < 1e-14


def test_map_at_the_tower_sums_each_square_of_patches(model_of) -> None:
    model, clean, corrupted = pair_of(model_of, GEMMA3)
    clean, corrupted = clean[[0, 2]], corrupted[[0, 2]]
    found = image_attribution(model, clean, corrupted, difference, image=0, site="vision.hook_embed")
    seen: list[torch.Tensor] = []
    with torch.no_grad():
        _, cache = model.run_with_cache(clean, names_filter="vision.hook_embed")
    with model.hooks([("vision.hook_embed", lambda value, hook: seen.append(value))]):
        (gradient,) = torch.autograd.grad(difference(model(corrupted)[:, -1]).sum(), seen)
    product = ((cache["vision.hook_embed"] - seen[0].detach()) * gradient).sum(-1)
    first = [int((clean.crop_rows == row).nonzero()[0]) for row in range(2)]
    squares = product[first].view(2, 2, 2, 2, 2).sum((2, 4))  # row of cells, row in it, column of cells, column in it
    torch.testing.assert_close(found.values, squares, rtol=1e-9, atol=1e-12)
    assert max(abs(x) for x in found.meta["elsewhere"]) < 1e-10


def test_the_check_finds_the_exact_effects(model_of) -> None:
    model, clean, corrupted = pair_of(model_of, LLAVA)
    checked = check_attribution(model, clean, corrupted, metric=difference, top=5, sample=4)
    assert checked.axes == ("pair", "entry", "method") and checked.shape == (3, 9, 2)
    truth = exact(model, clean, corrupted, metric=difference)
    guess = attribution_patching(model, clean, corrupted, metric=difference)
    for k, entry in enumerate(checked.labels["entry"]):
        _, layer, _, head = entry.split()
        torch.testing.assert_close(checked.values[:, k, 1], truth[:, int(layer), int(head)], **EXACT)
        torch.testing.assert_close(checked.values[:, k, 0], guess.values[:, int(layer), int(head)], **EXACT)
    size = guess.values.mean(0).abs().flatten().sort(descending=True).values
    torch.testing.assert_close(checked.values[:, :5, 0].mean(0).abs(), size[:5], **EXACT)
    last = project("blocks.1.hook_resid_post", torch.randn(48, dtype=torch.float64))
    linear = check_attribution(model, clean, corrupted, "neurons", metric=last, layers=[1], top=4, sample=4)
    assert linear.meta["rank_correlation"] == pytest.approx(1) and linear.meta["sign_agreement"] == 1
    torch.testing.assert_close(linear.values[..., 0], linear.values[..., 1], **EXACT)


def test_the_check_reads_positions_and_named_sites(model_of) -> None:
    model, clean, corrupted = pair_of(model_of, LLAVA)
    each = check_attribution(model, clean[0], corrupted[0], "resid", "each", difference, top=3, sample=0)
    truth = exact(model, clean[0], corrupted[0], sites="resid", positions="each", metric=difference)
    for k, entry in enumerate(each.labels["entry"]):
        _, layer, _, pos = entry.split()
        torch.testing.assert_close(each.values[0, k, 1], truth[0, int(layer), int(pos)], **EXACT)
    named = check_attribution(
        model, clean, corrupted, ["blocks.0.hook_mlp_out", "hook_embed"], metric=difference, top=2
    )
    truth = exact(model, clean, corrupted, sites=["blocks.0.hook_mlp_out"], metric=difference)
    k = named.labels["entry"].index("site blocks.0.hook_mlp_out")
    torch.testing.assert_close(named.values[:, k, 1], truth.flatten(), **EXACT)


def test_units_of_a_named_site_are_those_of_the_group(model_of) -> None:
    model, clean, corrupted = pair_of(model_of, LLAVA)
    kw: dict[str, Any] = dict(positions="query", metric=difference, units=[0, 5])
    named = attribution_patching(model, clean, corrupted, ["blocks.1.attn.hook_z"], **kw)
    group = attribution_patching(model, clean, corrupted, "heads", layers=[1], **kw)
    assert named.axes == ("site", "pair", "head") and named.labels["head"] == [0, 5]
    assert torch.equal(named.values[0], group.values[:, 0])
    checked = check_attribution(model, clean, corrupted, ["blocks.1.attn.hook_z"], top=2, sample=0, **kw)
    assert checked.labels["entry"][0].startswith("site blocks.1.attn.hook_z head ")


def test_an_unknown_option_is_named_with_those_that_exist(model_of) -> None:
    model, clean, corrupted = pair_of(model_of, LLAVA)
    with pytest.raises(TypeError, match="no option is called 'max_row'; there are max_rows, progress"):
        attribution_patching(model, clean, corrupted, metric=difference, max_row=2)


def test_interventions_in_force_are_part_of_both_runs(model_of) -> None:
    model, clean, corrupted = pair_of(model_of, QWEN3)
    clean, corrupted = clean[:2], corrupted[:2]
    metric = project("blocks.2.hook_resid_post", torch.randn(48, dtype=torch.float64), "query")
    kw: dict[str, Any] = dict(sites="mlp_out", layers=[2], positions="query", metric=metric)
    push = torch.randn(48, dtype=torch.float64)
    with model.intervene([Steer(0, push, 3.0, "query"), Ablate("vision.blocks.0.hook_attn_out")]):
        inside = attribution_patching(model, clean, corrupted, **kw).values
        along = attribution_patching(model, clean, corrupted, steps=1, **kw).values
        truth = exact(model, clean, corrupted, engine="naive", **kw)
    torch.testing.assert_close(inside, truth, **EXACT)
    torch.testing.assert_close(along, truth, **EXACT)
    assert float((inside - attribution_patching(model, clean, corrupted, **kw).values).abs().max()) > 1e-4


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_lower_precision_agrees_within_its_rounding(dtype: torch.dtype, tolerance: float, model_of) -> None:
    model, clean, corrupted = pair_of(model_of, LLAVA)
    rough = model_of(BY_NAME[LLAVA], dtype=dtype)
    lower = [replace(side, pixel_values=side.pixel_values.to(dtype)) for side in (clean, corrupted)]
    for kw in (dict(sites="heads"), dict(sites="neurons", steps=2)):
        fine = attribution_patching(model, clean, corrupted, positions="query", metric=difference, **kw).values
        found = attribution_patching(rough, *lower, positions="query", metric=difference, **kw).values
        assert found.dtype == torch.float32
        assert float((found - fine).abs().max()) < tolerance * float(fine.abs().max())


def test_the_model_is_left_as_it_was(model_of) -> None:
    model, clean, corrupted = pair_of(model_of, LLAVA)
    model.embed.weight.requires_grad_(False)
    try:
        with torch.no_grad():
            attribution_patching(model, clean, corrupted, metric=difference, steps=1)
            with pytest.raises(ValueError, match="one number per row"):
                attribution_patching(model, clean, corrupted, metric=lambda logits: logits)
        wanted = {name: p.requires_grad for name, p in model.named_parameters()}
        assert not wanted.pop("embed.weight") and all(wanted.values())
        assert all(p.grad is None for p in model.parameters()) and not model.training
    finally:
        model.embed.weight.requires_grad_(True)


@pytest.mark.parametrize(
    ("kw", "telling"),
    [
        (dict(sites="haeds"), "haeds"),
        (dict(sites=["vision.blocks.0.hook_resid_pre"]), "image_attribution"),
        (dict(sites=["blocks.9.hook_resid_pre"]), "blocks.9"),
        (dict(sites=[]), "no site"),
        (dict(layers=[7]), "layer 7"),
        (dict(units=[6]), "head 6"),
        (dict(direction="up"), "denoising"),
        (dict(metric=None), "metric="),
        (dict(metric=[difference, difference]), "3 rows"),
        (dict(metric=lambda logits: logits), "one number per row"),
        (dict(metric=lambda logits: logits[:, 0].detach()), "no gradient"),
        (dict(metric=lambda logits: logits[:, 0] * torch.nan), "not finite"),
        (dict(metric=project("hook_embed", torch.ones(48))), "decoder block"),
        (dict(positions="lats"), "lats"),
        (dict(positions="each"), "one length"),
        (dict(steps=-1), "steps"),
        (dict(max_rows=0), "max_rows"),
        (dict(corrupted=1), "pairs need"),
    ],
)
def test_what_does_not_fit_is_refused(kw: dict[str, Any], telling: str, model_of) -> None:
    model, clean, corrupted = pair_of(model_of, LLAVA)
    corrupted = corrupted[:1] if kw.pop("corrupted", None) else corrupted
    with pytest.raises(ValueError, match=telling):
        attribution_patching(model, clean, corrupted, **({"metric": difference} | kw))


def test_positions_and_pictures_that_do_not_correspond_are_refused(model_of) -> None:
    model, clean, corrupted = pair_of(model_of, LLAVA)
    with pytest.raises(ValueError, match="one to one"):
        attribution_patching(model, clean[[0, 1]], corrupted[[1, 0]], positions="query", metric=difference)
    with pytest.raises(ValueError, match="has no image 0"):
        image_attribution(model, clean[1], corrupted[1], difference)
    with pytest.raises(ValueError, match="site="):
        image_attribution(model, clean[0], corrupted[0], difference, site="hook_image")
    wide, tall = (pair_of(model_of, "qwen2_vl-plain")[1][i] for i in (0, 1))
    with pytest.raises(ValueError, match="grids"):
        image_attribution(pair_of(model_of, "qwen2_vl-plain")[0], wide, tall, difference)
    with pytest.raises(ValueError, match="inference_mode"), torch.inference_mode():
        attribution_patching(model, clean, corrupted, metric=difference)


def test_heads_that_carry_the_emotion_are_found_in_the_embedded_model() -> None:
    from veena_lens import HookedVLM
    from veena_lens.checkpoints.files import bundled_pairs

    model = HookedVLM.from_pretrained("tiny-llava-emotion")
    pairs = [pair for pair in bundled_pairs("test") if pair[0].emotion == "happy"][:2]
    question = "name the emotions of the person in the picture."
    clean, corrupted = (
        model.prepare(text=[question] * 2, images=[[face.open()] for face in side]) for side in zip(*pairs, strict=True)
    )
    metric = logit_diff(model.to_single_token(" happy"), model.to_single_token(" neutral"))
    checked = check_attribution(model, clean, corrupted, metric=metric, steps=3, top=8, sample=8, layers=[2, 3, 4, 5])
    assert isinstance(checked, Scores) and checked.meta["rank_correlation"] > 0.6
    assert checked.meta["sign_agreement"] >= 0.75
