"""Layouts of tiles: which token reads what, and where its box lies, whatever the image and the grid's size."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from veena_lens.images.anyres import OneCropImage, image_among_several, video_frame
from veena_lens.images.canvas import AnyresImage, anyres_image, fitted_size

# An image, and a model of 1 to 4 x 4 tiles of 1 to 6 patches a side whose grid is resampled or not.
side = st.integers(1, 120)
settings_of_a_layout = st.tuples(
    st.tuples(side, side), st.integers(1, 4), st.integers(1, 6), st.integers(2, 9), st.sampled_from([0, 1, 2, 3, 9])
)


def made(drawn: tuple[tuple[int, int], int, int, int, int]) -> AnyresImage:
    """The layout of drawn settings; the test is left where nothing would be left of a thin image."""
    picture, most, base, patch, max_tiles = drawn
    pins = [(base * patch * a, base * patch * b) for a in range(1, most + 1) for b in range(1, most + 1)]
    try:
        return anyres_image(picture, pins, base * patch, patch, max_tiles)
    except ValueError as error:
        assume("less extreme" not in str(error))
        raise


@settings(max_examples=60)
@given(drawn=settings_of_a_layout)
def test_a_tile_starts_at_the_first_token_that_it_changes(drawn: Any) -> None:
    layout = made(drawn)
    generator = torch.Generator().manual_seed(0)
    tiles = torch.randn(layout.n_crops, layout.base**2, 2, generator=generator, dtype=torch.float64)
    newline = torch.zeros(2, dtype=torch.float64)
    before = layout.pack(tiles, newline)
    assert before.shape == (layout.n_tokens, 2) == (len(layout.token_crops()), 2)
    starts = layout.crop_starts()
    for tile in range(layout.n_crops):
        other = tiles.clone()
        other[tile] += 1.0
        changed = (layout.pack(other, newline) != before).any(-1).nonzero().flatten().tolist()
        # A cell centre on a feature's own centre reads a neighbour with weight 0: there the start is early.
        assert changed == [] or starts[tile] <= changed[0]
        assert (
            starts[tile] == layout.n_tokens
            or not layout.is_resampled
            or changed == []
            or (changed[0] - starts[tile] <= layout.cols + 2)
        )
        if not layout.is_resampled:
            assert starts[tile] == (changed[0] if changed else layout.n_tokens)
            own = [i for i, t in enumerate(layout.token_crops()) if t == tile]
            assert own == changed


@settings(max_examples=60)
@given(drawn=settings_of_a_layout)
def test_a_token_of_the_grid_lies_where_the_features_that_it_reads_lie(drawn: Any) -> None:
    """Features that say where their patch is in the image are resampled to the centre of the token's box."""
    layout = made(drawn)
    assume(layout.rows * layout.cols)
    height, width = layout.size
    scale = min(layout.canvas[1] / width, layout.canvas[0] / height)
    fitted = fitted_size(layout.size, layout.canvas)
    top, left = (layout.canvas[0] - fitted[0]) // 2, (layout.canvas[1] - fitted[1]) // 2
    n = layout.base
    y, x = torch.meshgrid(torch.arange(layout.tiles[0] * n), torch.arange(layout.tiles[1] * n), indexing="ij")
    at = torch.stack([(x + 0.5) * layout.patch_size - left, (y + 0.5) * layout.patch_size - top], -1).double() / scale
    tiles = at.view(layout.tiles[0], n, layout.tiles[1], n, 2).transpose(1, 2).reshape(-1, n * n, 2)
    whole = torch.zeros(1, n * n, 2, dtype=torch.float64)
    places = layout.grid_places()
    said = layout.pack(torch.cat([whole, tiles]), torch.zeros(2, dtype=torch.float64))[places]
    boxes = layout.boxes()[places].double()
    centres = torch.stack([boxes[:, 0] + boxes[:, 2], boxes[:, 1] + boxes[:, 3]], -1) / 2
    # Boxes are cut at the image's edge, and cells at the border of the grid read no further than it.
    step = torch.tensor([layout.kept[1] / layout.cols, layout.kept[0] / layout.rows]) * layout.patch_size / scale
    assert bool(((said - centres).abs() <= step / 2 + 1e-3).all())
    inner = torch.zeros(layout.rows, layout.cols, dtype=torch.bool)
    inner[1:-1, 1:-1] = True
    inner = inner.flatten() & (boxes[:, 2] < width) & (boxes[:, 3] < height) & (boxes[:, :2] > 0).all(-1)
    torch.testing.assert_close(said[inner], centres[inner], rtol=0, atol=1e-3)


@settings(max_examples=30)
@given(drawn=settings_of_a_layout)
def test_patches_lie_in_the_cell_that_their_centre_lies_in(drawn: Any) -> None:
    layout = made(drawn)
    cells = layout.patch_cells()
    assert bool((cells[0] == -1).all()), "the whole view has cells of its own"
    inside = cells[cells >= 0]
    assert len(inside) == layout.kept[0] * layout.kept[1]
    if not layout.is_resampled:
        assert inside.sort().values.tolist() == list(range(layout.rows * layout.cols))
    else:
        assert set(inside.tolist()) == set(range(layout.rows * layout.cols)), "a shrunk grid has a patch in every cell"


@given(base=st.integers(1, 9), picture=st.tuples(st.integers(1, 99), st.integers(1, 99)), kind=st.integers(0, 2))
def test_pictures_of_one_tile_keep_places_boxes_and_patches_together(
    base: int, picture: tuple[int, int], kind: int
) -> None:
    layout: OneCropImage = (
        image_among_several(picture, base) if kind == 0 else video_frame(picture, base, is_last=kind == 2)
    )
    features = torch.arange(base * base, dtype=torch.float64).view(1, -1, 1)
    packed = layout.pack(features, torch.full((1,), -7.0, dtype=torch.float64))
    assert len(packed) == layout.n_tokens == len(layout.token_crops()) == len(layout.boxes())
    assert layout.has_newline == (layout.token_crops()[-1] == -1) == bool(packed[-1] == -7)
    assert layout.side == (base if kind == 0 else (base + 1) // 2)
    boxes = layout.boxes()[layout.grid_places()]
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    assert abs(float(areas.sum()) - picture[0] * picture[1]) < 1e-2 * picture[0] * picture[1]
    cells = layout.patch_cells()
    assert cells.shape == (1, base * base) and set(cells.flatten().tolist()) == set(range(layout.side**2))
