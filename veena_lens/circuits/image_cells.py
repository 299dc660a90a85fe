"""Where the tokens of an image lie, and which of them make the cells of its token grid."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from veena_lens.inputs import MultimodalInputs
from veena_lens.scores import Scores


@dataclass(frozen=True, eq=False)
class Cells:
    """Positions of one image's grid in each row, padded at the lower right; `sizes`: [height, width] per row."""

    index: Int[Tensor, "batch height width"]
    mask: Bool[Tensor, "batch height width"]
    sizes: list[list[int]]


def image_cells(inputs: MultimodalInputs, image: int, view: str, who: str) -> Cells:
    """Return where image number `image` of each row has its token grid.

    view: "grid" is the image's whole grid (through tiles); "whole" the small whole view beside the tiles, the grid
    itself where there are no tiles. who: the caller, for messages.
    Raises: ValueError where no row has such an image; IndexError where its tokens make no whole grid."""
    if view not in ("grid", "whole"):
        raise ValueError(f"{who}: grid={view!r} must be 'grid' or 'whole'.")
    if not any(0 <= image < n for n in inputs.n_images):
        raise ValueError(f"{who}: no row has an image {image}; images per row: {inputs.n_images}.")
    found = [_cells_of(inputs, row, image, view) if image < n else None for row, n in enumerate(inputs.n_images)]
    sizes = [[0, 0] if cells is None else list(cells.shape) for cells in found]
    height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
    index = torch.zeros(len(found), height, width, dtype=torch.long, device=inputs.device)
    mask = torch.zeros_like(index, dtype=torch.bool)
    for row, cells in enumerate(found):
        if cells is not None:
            index[row, : cells.shape[0], : cells.shape[1]] = cells
            mask[row, : cells.shape[0], : cells.shape[1]] = True
    return Cells(index, mask, sizes)


def _cells_of(inputs: MultimodalInputs, row: int, image: int, view: str) -> Int[Tensor, "height width"]:
    tiles = inputs.token_tiles[row][image] if inputs.token_tiles else ()
    if view == "grid" or not tiles:
        return inputs.grid_tokens(row, image)
    places = image_places(inputs, row, image)
    first = places[torch.tensor(tiles, device=places.device) == 0]
    side = round(len(first) ** 0.5)
    return first.view(side, side)


def image_places(inputs: MultimodalInputs, row: int, image: int) -> Int[Tensor, " n"]:
    """Return the positions of an image's tokens in the padded row, in order."""
    span = inputs.spans[row].images[image]
    return torch.arange(span.start, span.stop, device=inputs.device)[inputs.image_mask[row, span]]


def over_cells(scores: Scores, cells: Cells) -> Scores:
    """Return Scores (batch, layer, head, height, width, ...) with the cells that a row lacks masked, and 0."""
    if bool(cells.mask.all()):
        return scores
    there = cells.mask[:, None, None].to(scores.values.device)
    there = there.view(*there.shape, *[1] * (scores.values.ndim - there.ndim)).expand(scores.shape) & scores.exists
    return replace(scores, values=torch.where(there, scores.values, 0.0), mask=there)
