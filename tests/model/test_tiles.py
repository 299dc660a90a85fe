"""Images in tiles (Idefics3, SmolVLM): their grids, and rows of a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.cases import BY_NAME, raw_inputs


@pytest.mark.parametrize("name", ["idefics3-unequal-pictures", "smolvlm-long-names"])
def test_grid_of_an_image_goes_through_its_tiles(name: str, model_of) -> None:
    case = BY_NAME[name]
    model = model_of(case)
    inputs = model.inputs_from_hf(**raw_inputs(case))
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
    side = model.cfg.vision.token_grid[0]
    asked = [[word for word in row.split() if not word.isdigit()] for row in case.rows]
    assert inputs.n_images == [len(words) for words in asked]
    for row, words in enumerate(asked):
        for image, word in enumerate(words):
            tiles = [int(n) for n in word[1:].split("x")] if word[0] == "t" else [1, 1]
            height, width = (n * side for n in tiles)
            grid = cache.image_grid("resid_post", 1, row=row, image=image)
            assert inputs.grids[row][image] == grid.shape[:2] == (height, width)
            features = cache.image_grid("hook_image_features", row=row, image=image)
            assert torch.equal(features, cache.image_grid("hook_embed", row=row, image=image))
            mine = (inputs.crop_rows == row) & (inputs.crop_images == image)
            pictures = cache["connector.hook_out"][mine]
            assert len(pictures) == (1 if tiles == [1, 1] else 1 + tiles[0] * tiles[1])
            for y in range(height):
                for x in range(width):
                    tile = 0 if len(pictures) == 1 else 1 + y // side * tiles[1] + x // side
                    assert torch.equal(features[y, x], pictures[tile, y % side * side + x % side])
            whole = cache.image_grid("connector.hook_out", row=row, image=image)
            assert torch.equal(whole.flatten(0, 1), pictures[0])


def test_rows_of_a_cache_keep_their_own_images(model_of, tmp_path: Any) -> None:
    case = BY_NAME["idefics3-smaller-pictures"]
    model = model_of(case, casts="none")
    inputs = model.inputs_from_hf(**raw_inputs(case))
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
        _, alone = model.run_with_cache(inputs[1])
    row = cache.apply_slice_to_batch_dim([1])
    assert row.inputs.patch_mask is not None and torch.equal(row.inputs.patch_mask, inputs.patch_mask[2:])
    for name in ("vision.blocks.1.hook_resid_post", "vision.blocks.0.attn.hook_pattern", "hook_image_features"):
        torch.testing.assert_close(row[name], alone[name], rtol=1e-10, atol=1e-12)
    cache.save(tmp_path / "cache.safetensors")
    again = type(cache).load(tmp_path / "cache.safetensors")
    for image in (0, 1):
        grids = (c.image_grid("vision.blocks.1.hook_resid_post", row=0, image=image) for c in (cache, again))
        assert torch.equal(*grids)
