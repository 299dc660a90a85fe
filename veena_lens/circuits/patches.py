"""Which entries of an activation on pictures belong to which cell of a picture's token grid.

Where features enter the sequence an entry is an image token; at the tower's input it is a patch, and several patches
may make one cell (joined squares), lie in a tile, or in none of the grid (class token, whole view, letterbox).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veena_lens.circuits.gradients import Places
from veena_lens.circuits.measuring import padded
from veena_lens.inputs import MultimodalInputs
from veena_lens.vision.packing import layouts_of, tile_layouts

TOWER_SITE = "vision.hook_embed"
PICTURE_SITES = ("hook_image_features", "hook_embed", TOWER_SITE)


@dataclass(frozen=True, eq=False)
class Patches:
    """Entries of one picture: `places` along the position axis, the `cells` of the grid they make (-1: none), and at
    the tower the `pictures` (tiles) they lie in, counted within this image."""

    grid: tuple[int, int]
    places: Int[Tensor, " n"]
    cells: Int[Tensor, " n"]
    pictures: Int[Tensor, " n"] | None = None

    def map_of(self, values: Float[Tensor, " n"]) -> Float[Tensor, "height width"]:
        """Sums over the entries of each cell."""
        cells = self.cells.to(values.device)
        out = values.new_zeros(self.grid[0] * self.grid[1])
        return out.index_add(0, cells[cells >= 0], values[cells >= 0]).view(self.grid)


def patches_of(who: str, cfg: Any, inputs: MultimodalInputs, row: int, image: int, site: str) -> Patches:
    """The entries of one image at a site. Raises: ValueError where the row has no such image, or no whole grid."""
    if not 0 <= image < len(inputs.spans[row].images):
        raise ValueError(f"{who}: row {row} of {inputs!r} has no image {image}.")
    try:
        tokens = inputs.grid_tokens(row, image).flatten()
    except IndexError as error:
        raise ValueError(f"{who}: {error}") from error
    grid = inputs.grids[row][image]
    if site == TOWER_SITE:
        return _at_tower(cfg, inputs, row, image, grid)
    span = inputs.spans[row].images[image]
    places = torch.arange(span.start, span.stop, device=inputs.device)[inputs.image_mask[row, span]]
    cells = torch.full((inputs.shape[1],), -1, device=inputs.device)
    cells[tokens] = torch.arange(len(tokens), device=inputs.device)
    return Patches(grid, places, cells[places])


def _at_tower(cfg: Any, inputs: MultimodalInputs, row: int, image: int, grid: tuple[int, int]) -> Patches:
    """Patches as the tower takes them in."""
    vision, n = cfg.vision, grid[0] * grid[1]
    first = int(vision.has_class_token)  # stands before the patches
    if cfg.image_layout == "dynamic":  # squares of patches, one a token
        places = torch.arange(n * vision.merge_size**2)
        return Patches(grid, places, places // vision.merge_size**2, torch.zeros_like(places))
    owner = int((inputs.image_rows == row).nonzero().flatten()[image]) if inputs.image_rows is not None else 0
    if cfg.image_layout == "tiles":
        cells = tile_layouts(cfg, inputs)[owner].patch_cells(vision.merge_size).flatten(1)
        tile, place = torch.meshgrid(*(torch.arange(n) for n in cells.shape), indexing="ij")
        return Patches(grid, place.flatten(), cells.flatten(), tile.flatten())
    if vision.merge_size > 1 and cfg.image_layout == "fixed":  # patches row by row, squares of them one token
        rows, columns = (torch.arange(side) // vision.merge_size for side in vision.grid)
        cells = (rows[:, None] * grid[1] + columns).flatten()
        return Patches(grid, torch.arange(len(cells)) + first, cells, torch.zeros_like(cells))
    if cfg.image_layout != "anyres":
        return Patches(grid, torch.arange(n) + first, torch.arange(n), torch.zeros(n, dtype=torch.long))
    layout = layouts_of(cfg, inputs)[owner]
    side = layout.base
    tile = torch.arange(layout.n_tiles).repeat_interleave(side * side)
    places = torch.arange(side * side).repeat(layout.n_tiles) + first
    return Patches(grid, places, layout.patch_cells().flatten(), tile)


def batch_places(inputs: MultimodalInputs, patches: Sequence[Patches], image: int) -> Places:
    """The entries of a batch's rows, one `Patches` a row, for listening and editing."""
    index, exists = padded([p.places for p in patches])
    if all(p.pictures is not None for p in patches):
        assert inputs.picture_rows is not None and inputs.picture_images is not None
        owned = [(inputs.picture_rows == row) & (inputs.picture_images == image) for row in range(len(patches))]
        mine = [own.nonzero().flatten().cpu()[p.pictures] for own, p in zip(owned, patches, strict=True)]
        return Places(index, exists, pictures=padded(mine)[0])
    order = inputs.image_mask.flatten().long().cumsum(0).view(inputs.shape) - 1
    rows = torch.arange(len(index), device=order.device)[:, None]
    return Places(index, exists, tokens=order[rows, index.to(order.device)].clamp(min=0))
