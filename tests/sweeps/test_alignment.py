"""Which positions of two runs correspond: unequal images, masks of a batch, tiles."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.cases import BY_NAME, counted_inputs, native_model
from tests.pairs import pair_of
from tests.sweeps.engines import agree
from veena_lens import HookedVLM
from veena_lens.checkpoints.files import bundled_pairs
from veena_lens.interventions import Box, Tile
from veena_lens.sweeps import patch_sweep, steer_sweep
from veena_lens.sweeps.metrics import log_prob, logit_diff

KW: dict[str, Any] = dict(metric=log_prob(3), progress=False)


@pytest.fixture(scope="module")
def unequal() -> tuple[Any, Any, Any]:
    """Any-resolution rows whose images have other grids and numbers of tiles; the text after them is the same."""
    case = replace(BY_NAME["llava-next-llama"], name="unequal", rows=("2 i40x75 3", "4 i90x30 3"))
    model, raw = native_model(case, casts="none"), counted_inputs(case)
    raw["input_ids"][:, -3:] = torch.tensor([7, 8, 9])
    inputs = model.inputs_from_hf(**raw)
    clean, corrupted = (inputs[row].without_padding() for row in (0, 1))
    assert clean.grids != corrupted.grids and clean.shape != corrupted.shape
    assert all(run.spans[0].query == slice(run.shape[1] - 3, run.shape[1]) for run in (clean, corrupted))
    return model, clean, corrupted


@pytest.mark.parametrize("positions", ["last", "query", -2, Tile(0)], ids=str)
@pytest.mark.parametrize("sites", ["resid", "heads", ["blocks.1.attn.hook_v", "blocks.1.hook_mlp_out"]], ids=str)
def test_runs_with_unequal_pictures_are_patched_at_text_and_whole_views(positions: Any, sites: Any, unequal) -> None:
    model, clean, corrupted = unequal
    for direction in ("denoising", "noising"):
        kw: dict[str, Any] = dict(sites=sites, positions=positions, direction=direction, **KW)
        kw |= dict(units=[0, 3]) if sites == "heads" else {}
        agree(model, clean, corrupted, 1e-9, **kw)


def test_the_last_residual_of_an_unequal_run_is_that_run(unequal) -> None:
    """At the last layer's end, the last position alone decides: the patched run says what its source says."""
    model, clean, corrupted = unequal
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    result = patch_sweep(model, clean, corrupted, [last], "last", **KW)
    torch.testing.assert_close(result.scores, torch.ones_like(result.scores), rtol=1e-10, atol=1e-10)


def test_the_whole_view_of_unequal_pictures_can_be_patched_as_features(unequal) -> None:
    model, clean, corrupted = unequal
    agree(model, clean, corrupted, 1e-9, sites=["hook_image_features"], positions=Tile(0), **KW)


@pytest.mark.parametrize(
    ("sites", "positions"),
    [
        ("resid", "image"),
        ("resid", "each"),
        ("heads", Tile(1)),
        (["hook_image_features"], "each"),
        (["hook_image_features"], "image"),
        (["connector.hook_out"], "all"),
        (["vision.blocks.0.hook_resid_pre"], 0),
    ],
    ids=str,
)
def test_unequal_pictures_are_refused_with_both_grids_and_the_way_out(sites: Any, positions: Any, unequal) -> None:
    model, clean, corrupted = unequal
    with pytest.raises(ValueError, match=r"the run that is patched has .*source .*resize") as error:
        patch_sweep(model, clean, corrupted, sites, positions, **KW)
    for run in (clean, corrupted):
        height, width = run.grids[0][0]
        assert f"{height} x {width} tokens ({len(run.crop_rows)} tiles)" in str(error.value)
    assert "'last' or 'query'" in str(error.value)


def test_grids_of_one_size_and_other_shape_do_not_correspond() -> None:
    """2 x 6 patches and 6 x 2 fill the same number of tokens, but the k-th of them lies elsewhere."""
    model = HookedVLM.from_pretrained("tiny-qwen2vl-emotion", dtype=torch.float64, casts="none")
    picture = bundled_pairs("test")[0][0].open()
    wide, tall = picture.resize((192, 96)), picture.resize((96, 192))
    clean, corrupted = (model.prepare(text="who?", images=p) for p in (wide, tall))
    assert clean.shape == corrupted.shape and clean.grids != corrupted.grids
    with pytest.raises(ValueError, match="one grid"):
        patch_sweep(model, clean, corrupted, "resid", "image", **KW)
    with pytest.raises(ValueError, match="one grid"):
        patch_sweep(model, clean, corrupted, "resid", "each", **KW)
    with pytest.raises(ValueError, match="one grid"):
        patch_sweep(model, clean, corrupted, ["hook_image_features"], Box(0, 0, 96, 96), **KW)
    agree(model, clean, corrupted, 1e-9, sites="mlp_out", positions="last", **KW)


def rows_of(name: str) -> tuple[Any, Any, Any]:
    return pair_of(native_model, BY_NAME[name], has_other_words=False)


def test_a_mask_over_a_padded_batch_counts_in_every_row() -> None:
    model, clean, corrupted = rows_of("three-images-and-none")
    with_picture = [i for i in range(len(clean)) if clean.n_images[i]]
    clean, corrupted = clean[with_picture], corrupted[with_picture]
    lengths = clean.lengths.tolist()
    mask = torch.zeros(clean.shape, dtype=torch.bool)
    for row, spans in enumerate(clean.spans):
        mask[row, spans.last - 1 : spans.last + 1] = True
    kw: dict[str, Any] = dict(sites="resid", layers=[1], metric=logit_diff(5, 6), progress=False)
    fast = agree(model, clean, corrupted, 1e-9, positions=mask, **kw)
    for row, n in enumerate(lengths):
        alone = patch_sweep(model, clean[row], corrupted[row], positions=[n - 2, n - 1], **kw)
        mine = fast.values if len(lengths) == 1 else fast.values[row]
        torch.testing.assert_close(mine, alone.values, rtol=1e-10, atol=1e-12)
    vector = torch.randn(model.cfg.d_model, dtype=torch.float64)
    steered = steer_sweep(model, clean, vector, logit_diff(5, 6), positions=mask, progress=False)
    assert bool((steered.values[..., 0] != steered.clean.view(-1, *[1] * (steered.values.ndim - 2))).any())
    with pytest.raises(ValueError, match="mask of positions must be"):
        patch_sweep(model, clean, corrupted, positions=mask[:, 1:], **kw)


def test_sites_with_other_numbers_of_positions_are_swept_together_as_wholes() -> None:
    model, clean, corrupted = rows_of("clip-llama")
    sites = ["vision.blocks.0.hook_resid_pre", "connector.hook_out"]  # the tower has a class token more
    agree(model, clean[0], corrupted[0], 1e-9, sites=sites, positions="all")
    with pytest.raises(ValueError, match="same positions; these have"):
        patch_sweep(model, clean[0], corrupted[0], sites, "each", logit_diff(5, 6), progress=False)
