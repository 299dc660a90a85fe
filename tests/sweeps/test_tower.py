"""Edits of the tower run images again from their own block on, with the numbers of whole forwards."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cases import BY_NAME, native_model
from tests.pairs import pair_of
from tests.sweeps.engines import KW, agree
from veena_lens.hook_table import hooks_of
from veena_lens.sweeps import patch_sweep

FIXED = ["clip-llama", "feature-list", "feature-list-siglip", "three-images-and-none"]
QWEN = ["qwen2_vl-plain", "qwen2_5_vl-image-and-video", "qwen3_vl-plain", "qwen3_vl-image-and-video"]
ONEVISION = ["onevision-resampled", "onevision-image-and-video"]
TILES = ["idefics3-smaller-pictures", "smolvlm-long-names"]
TWO = replace(BY_NAME["llava-next-feature-list"], name="two", rows=("3 i90x30 4 i40x75 2",))


def runs(name: str) -> tuple[Any, Any, Any]:
    """A model in pure float64, and two rows with the same text and other pixels."""
    model, clean, corrupted = pair_of(native_model, TWO if name == "tiles" else BY_NAME[name], has_other_words=False)
    row = max(range(len(clean)), key=lambda i: clean.n_images[i])
    return model, clean[row].without_padding(), corrupted[row].without_padding()


def sites_of(model: Any) -> list[str]:
    return [n for n, hook in hooks_of(model.cfg).items() if not hook.of_text]


@pytest.mark.parametrize("name", [*FIXED, "tiles", *QWEN, *ONEVISION, *TILES])
def test_every_block_of_the_tower_equals_whole_forwards(name: str) -> None:
    """All depths in one batch: before the first block, in each block, after them and in the connector."""
    model, clean, corrupted = runs(name)
    parts = ("hook_resid_pre", "hook_mlp_out", "hook_resid_post", "attn.hook_z", "attn.hook_pattern")
    sites = [n for n in sites_of(model) if "blocks." not in n or n.split(".", 3)[3] in parts]
    sites = [n for n in sites if not n.startswith(("hook_image", "deepstack"))]
    assert len({n.split(".")[2] for n in sites if "blocks." in n}) == model.cfg.vision.n_layers > 1
    found = agree(model, clean, corrupted, 1e-9, sites=sites, positions="all")
    still = [n for n, x in zip(sites, found.values, strict=True) if abs(x - found.corrupted) < 1e-9]
    assert [n for n in still if "pos_embed" not in n] == []


@settings(max_examples=6)
@given(data=st.data())
def test_any_sites_and_places_of_pictures_equal_whole_forwards(data: st.DataObject) -> None:
    model, clean, corrupted = runs(
        data.draw(st.sampled_from([*FIXED, "tiles", *QWEN, *ONEVISION, *TILES]), label="case")
    )
    sites = data.draw(st.lists(st.sampled_from(sites_of(model)[:-1]), min_size=1, max_size=5, unique=True))
    sites = [n for n in sites if n.startswith(("vision.", "connector."))] or ["vision.blocks.1.hook_mlp_out"]
    if len({n.startswith("connector.") for n in sites}) > 1:  # squares joined are other positions than patches
        sites = [n for n in sites if n.startswith("vision.")]
    kw: dict[str, Any] = dict(
        positions=data.draw(st.sampled_from(["all", "each", 0, [1, -1], slice(0, 2)]), label="positions"),
        direction=data.draw(st.sampled_from(["denoising", "noising"]), label="direction"),
        **KW,
    )
    fast = patch_sweep(model, clean, corrupted, sites, max_rows=data.draw(st.integers(1, 30), label="rows"), **kw)
    plain = patch_sweep(model, clean, corrupted, sites, engine="naive", **kw)
    torch.testing.assert_close(fast.values, plain.values, rtol=1e-10, atol=1e-12)


def blocks_run(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(layer, images) of every block of the tower that runs from here on."""
    seen: list[tuple[int, int]] = []
    real = type(model.vision).step

    def step(self: Any, layer: int, resid: Any, *more: Any) -> Any:
        seen.append((layer, len(resid)))
        return real(self, layer, resid, *more)

    monkeypatch.setattr(type(model.vision), "step", step)
    return seen


@pytest.mark.parametrize("name", ["three-images-and-none", "tiles", "qwen3_vl-image-and-video", *ONEVISION, TILES[1]])
def test_only_edited_pictures_pass_only_later_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, clean, corrupted = runs(name)
    n_pictures, last = len(clean.crop_rows), model.cfg.vision.n_layers - 1
    assert n_pictures > 1
    seen = blocks_run(model, monkeypatch)
    site = f"vision.blocks.{last}.hook_mlp_out"
    result = patch_sweep(model, clean, corrupted, [site], "each", **KW)
    whole = [(layer, n_pictures) for layer in range(last + 1)]
    assert seen[: 2 * len(whole)] == whole * 2, "the two runs that are compared"
    again = seen[2 * len(whole) :]
    assert {layer for layer, _ in again} == {last}
    assert sum(n for _, n in again) == result.values.numel(), "a row runs the one picture that it edits"
    plan = patch_sweep(model, clean, corrupted, [site], "each", plan_only=True)
    assert plan.tower_blocks == result.values.numel()
    assert plan.naive_tower == result.values.numel() * n_pictures * (last + 1)
    assert f"{plan.naive_tower - plan.tower_blocks:,} of {plan.naive_tower:,} saved" in repr(plan)


def test_the_connector_and_the_features_run_no_block_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, clean, corrupted = runs("three-images-and-none")
    n_pictures, n = len(clean.crop_rows), model.cfg.vision.n_layers
    seen = blocks_run(model, monkeypatch)
    patch_sweep(model, clean, corrupted, ["connector.hook_pre", "connector.hook_out"], "each", **KW)
    patch_sweep(model, clean, corrupted, ["hook_image_features"], "each", **KW)
    assert seen == [(layer, n_pictures) for layer in range(n)] * 4
    assert patch_sweep(model, clean, corrupted, ["connector.hook_pre"], "each", plan_only=True).tower_blocks == 0
    decoder = patch_sweep(model, clean, corrupted, plan_only=True)
    assert decoder.tower_blocks == 0 and decoder.naive_tower == decoder.n_rows * n_pictures * n


def test_a_tile_reaches_the_text_at_its_own_first_token() -> None:
    """The whole view's tokens stand before those of the other tiles, which leave them as they are."""
    model, clean, corrupted = runs("tiles")
    site = "vision.blocks.1.hook_mlp_out"
    both = patch_sweep(model, clean, corrupted, [site], "each", plan_only=True)
    n_patches, span = model.cfg.vision.n_positions, clean.spans[0].images[0]
    tiles = clean.token_tiles[0][0]
    first = [span.start + tiles.index(t) for t in range(max(tiles) + 1)]
    assert first == sorted(first) and first[1] > first[0]
    alone = patch_sweep(model, clean, corrupted, [site], [0], plan_only=True)
    assert alone.token_layers == (clean.shape[1] - first[0]) * model.cfg.n_layers, "together from the earliest"
    assert both.token_layers < n_patches * len(clean.crop_rows) * (clean.shape[1] - first[0]) * model.cfg.n_layers


def test_a_whole_view_that_stands_last_reaches_the_text_after_its_tiles() -> None:
    model, clean, corrupted = runs("smolvlm-long-names")
    site, n_layers = "vision.blocks.1.hook_mlp_out", model.cfg.n_layers
    tiles, span = torch.tensor(clean.token_tiles[0][0]), clean.spans[0].images[0]
    places = torch.arange(span.start, span.stop)[clean.image_mask[0, span]]
    first = [int(places[tiles == tile][0]) for tile in range(int(tiles.max()) + 1)]
    assert first[0] == max(first) and first[1] == min(first)
    each = patch_sweep(model, clean, corrupted, [site], "each", plan_only=True)
    other = int(clean.image_mask[0].nonzero()[-4])  # the second image, its whole view alone
    starts = [*first, other]
    assert len(starts) == len(clean.crop_rows) and each.n_rows == 16 * len(starts)
    assert each.token_layers == 16 * sum(clean.shape[1] - start for start in starts) * n_layers


def test_a_sweep_of_the_tower_keeps_within_a_budget_of_memory() -> None:
    model, clean, corrupted = runs("three-images-and-none")
    site = "vision.blocks.0.hook_resid_pre"
    plan = patch_sweep(model, clean, corrupted, [site], "all", plan_only=True)
    alone = patch_sweep(model, clean, corrupted, [site], "each", plan_only=True)
    assert plan.row_bytes >= alone.row_bytes > 0
    with pytest.raises(ValueError, match=f"needs about {plan.row_bytes:,}"):
        patch_sweep(model, clean, corrupted, [site], "all", max_bytes=plan.row_bytes - 1, **KW)
