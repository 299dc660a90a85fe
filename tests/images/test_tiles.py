"""Layouts of images in tiles, and positions of patches by their share of an image."""

from __future__ import annotations

import pytest
import torch

from veena_lens.images.tiles import TiledImage, reading_order, tower_order
from veena_lens.vision.clip import fraction_positions

SHAPES = [(0, 0), (1, 2), (3, 1), (2, 3)]


@pytest.mark.parametrize("tiles", SHAPES, ids=str)
def test_grid_goes_through_the_tiles_and_covers_the_picture(tiles: tuple[int, int]) -> None:
    side, (height, width) = 2, (30, 50)
    layout = TiledImage(tiles=tiles, side=side)
    rows, columns = layout.grid
    assert (rows, columns) == (max(tiles[0], 1) * side, max(tiles[1], 1) * side)
    places, of_tile, boxes = layout.grid_places(), layout.token_crops(), layout.boxes((height, width))
    assert len(of_tile) == len(boxes) == layout.n_tokens == layout.n_crops * side**2
    assert len(set(places)) == rows * columns and not boxes.isnan().any()
    for cell, place in enumerate(places):
        y, x = divmod(cell, columns)
        tile = 0 if layout.n_crops == 1 else 1 + y // side * tiles[1] + x // side
        assert of_tile[place] == tile
        expected = [x / columns * width, y / rows * height, (x + 1) / columns * width, (y + 1) / rows * height]
        torch.testing.assert_close(boxes[place], torch.tensor(expected))
    whole = boxes[[i for i, tile in enumerate(of_tile) if tile == 0]]
    assert whole[0, :2].tolist() == [0, 0] and whole[-1, 2:].tolist() == [width, height]


@pytest.mark.parametrize("tiles", SHAPES, ids=str)
def test_every_patch_of_a_tile_lies_in_the_cell_whose_token_reads_it(tiles: tuple[int, int]) -> None:
    side, merge = 2, 3
    layout = TiledImage(tiles=tiles, side=side, merge=merge)
    cells = layout.patch_cells().unflatten(1, (side * merge, side * merge))
    assert cells.shape == (layout.n_crops, side * merge, side * merge)
    of_tile, places = layout.token_crops(), layout.grid_places()
    for cell, place in enumerate(places):
        offset = place - of_tile.index(of_tile[place])  # among the tokens of its tile
        y, x = divmod(offset, side)
        mine = cells[of_tile[place], y * merge : (y + 1) * merge, x * merge : (x + 1) * merge]
        assert (mine == cell).all() and (cells == cell).sum() == merge**2
    assert (cells[0] == -1).all() == (layout.n_crops > 1)


def test_the_text_reads_the_whole_view_after_its_tiles() -> None:
    images = [TiledImage(tiles=tiles, side=2) for tiles in ((0, 0), (1, 2), (0, 0), (2, 1))]
    assert reading_order(images).tolist() == [0, 2, 3, 1, 4, 6, 7, 5]
    given = torch.arange(8) * 10
    assert torch.equal(given[tower_order(images)][reading_order(images)], given)
    assert reading_order([]).tolist() == []


def test_positions_of_a_whole_picture_are_its_own_places() -> None:
    for side in (1, 2, 8, 27, 32):
        found = fraction_positions(torch.ones(1, side, side, dtype=torch.bool), side)
        assert found.tolist() == [list(range(side**2))], side


def test_rounding_of_shares_may_put_a_patch_into_the_bucket_before_its_own() -> None:
    found = fraction_positions(torch.ones(1, 25, 25, dtype=torch.bool), 25).view(25, 25)[0]
    late = torch.arange(25) - found
    assert set(late.tolist()) == {0, 1}


def test_a_smaller_picture_spreads_over_the_whole_table() -> None:
    real = torch.zeros(2, 4, 4, dtype=torch.bool)
    real[0, :2, :1] = True
    real[1, :3, :4] = True
    first, second = fraction_positions(real, 4).view(2, 4, 4).tolist()
    assert [row[:1] for row in first[:2]] == [[0], [8]], "half of the height is two rows of the table"
    assert second[:3] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert first[2:] == [[0] * 4] * 2 and second[3] == [0] * 4, "padding gets the first"
