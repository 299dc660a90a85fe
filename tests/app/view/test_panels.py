"""Panels draw the cells that the processor cut: unequal sizes, tiles with their whole view, several images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

from tests.app.view.large import SIDE, large_inputs, large_picture
from veena_lens import HookedVLM
from veena_lens.app.view.panels import data_url, panels_of


def test_cells_of_a_fixed_grid_are_its_tokens_row_by_row(model: Any, pair: Any) -> None:
    pictures = [p.open() for p in pair]
    inputs = model.prepare(text="compare them.", images=pictures)
    panels = panels_of(inputs, 0, pictures)
    assert [p.name for p in panels] == ["image 1", "image 2"] and [p.grid for p in panels] == [(8, 8), (8, 8)]
    for image, panel in enumerate(panels):
        assert torch.equal(panel.positions, inputs.grid_tokens(0, image).flatten())
        torch.testing.assert_close(panel.boxes[9], torch.tensor([1 / 8, 1 / 8, 2 / 8, 2 / 8]))


def test_pictures_of_unequal_sizes_have_their_merged_grids() -> None:
    model = HookedVLM.from_pretrained("tiny-qwen2vl-emotion")
    pictures = [Image.new("RGB", (192, 96), "white"), Image.new("RGB", (96, 192), "white")]
    inputs = model.prepare(text="compare them.", images=pictures)
    panels = panels_of(inputs, 0, pictures)
    assert [p.grid for p in panels] == list(inputs.grids[0])
    assert panels[0].grid[1] > panels[0].grid[0] and panels[1].grid[0] > panels[1].grid[1]
    for image, panel in enumerate(panels):
        assert torch.equal(panel.positions, inputs.grid_tokens(0, image).flatten())
        assert float(panel.boxes.min()) == 0 and float(panel.boxes.max()) == 1


def test_tiled_picture_gives_its_whole_view_and_its_tiles() -> None:
    inputs = large_inputs()
    whole, tiles = panels_of(inputs, 0, [large_picture()])
    assert (whole.name, whole.grid) == ("image, whole view", (SIDE, SIDE))
    assert (tiles.name, tiles.grid) == ("image, in tiles", (2 * SIDE, 2 * SIDE))
    assert torch.equal(tiles.positions, inputs.grid_tokens(0, 0).flatten())
    assert int(whole.positions[0]) == inputs.spans[0].images[0].start


def test_without_boxes_the_grid_itself_is_drawn(model: Any, pair: Any) -> None:
    inputs = model.prepare(text="what is this?", images=pair[0].open())
    (bare,) = panels_of(replace(inputs, patch_boxes=None), 0)
    (known,) = panels_of(inputs, 0, [pair[0].open()])
    torch.testing.assert_close(bare.boxes, known.boxes)
    assert bare.source == "" and known.source.startswith("data:image/png;base64,")


def test_another_number_of_pictures_is_refused(model: Any, pair: Any) -> None:
    inputs = model.prepare(text="what is this?", images=pair[0].open())
    with pytest.raises(ValueError, match="2 images were given; row 0 has 1"):
        panels_of(inputs, 0, [pair[0].open()] * 2)


def test_large_picture_travels_small_and_small_one_without_loss() -> None:
    assert data_url(large_picture()).startswith("data:image/webp;base64,")
    assert data_url(Image.new("RGB", (20, 10))).startswith("data:image/png;base64,")
    assert len(data_url(Image.new("RGB", (4000, 3000)))) < 60_000
