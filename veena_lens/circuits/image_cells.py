"""The cells of an image's token grid: which tokens make them, and windows that slide over them.

Tools of attention draw maps over the cells; occlusion covers the cells of one window after another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from veena_lens.inputs import MultimodalInputs
from veena_lens.long_runs import counting
from veena_lens.scores import Scores
from veena_lens.sweeps.measuring import parts, wide


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


# --- windows of the grid --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Windows:
    """Windows of cells that slide over a grid; the last ones lie flush with the border."""

    size: tuple[int, int]  # height, width
    stride: int

    @property
    def meta(self) -> dict[str, Any]:
        """Return the windows as results state them."""
        return {"window": list(self.size), "stride": self.stride}

    def on(self, grid: Sequence[int]) -> list[Bool[Tensor, "height width"]]:
        """Return the cells of each window, row by row."""
        steps = []
        for n, side in zip(grid, self.size, strict=True):
            end = max(n - side, 0)
            steps.append(sorted({*range(0, end + 1, self.stride), end}))
        found = []
        for y in steps[0]:
            for x in steps[1]:
                cells = torch.zeros(*grid, dtype=torch.bool)
                cells[y : y + self.size[0], x : x + self.size[1]] = True
                found.append(cells)
        return found


def windows_of(who: str, window: int | tuple[int, int], stride: int) -> Windows:
    """Return the windows of a side, or (height, width). Raises: ValueError for a size or stride below one cell."""
    height, width = (window, window) if isinstance(window, int) else window
    if height < 1 or width < 1 or stride < 1:
        raise ValueError(f"{who}: window={window} and stride={stride} count cells of the grid, at least 1.")
    return Windows((height, width), stride)


def mapped(
    grids: Sequence[Sequence[int]],
    windows: Windows,
    max_rows: int,
    progress: bool,
    run: Callable[[int], tuple[Tensor, Callable[[Sequence[Tensor]], Tensor]]],
) -> tuple[list[Float[Tensor, "_ _"]], Float[Tensor, " pair"]]:
    """Return the map of each pair, and its metric with nothing covered.

    run: gives for a pair that metric [1], and a function from windows [cells] to the metric with each covered."""
    every = [windows.on(grid) for grid in grids]
    with counting(sum(map(len, every)), "occlusions", progress) as advance:
        maps, base = [], []
        for pair, chosen in enumerate(every):
            plain, covered = run(pair)
            found = []
            for some in parts(len(chosen), max_rows):
                found.append(covered([chosen[k] for k in some]))
                advance(len(some))
            base.append(plain)
            maps.append(spread(wide(plain) - wide(torch.cat(found)), torch.stack(chosen)))
    return maps, torch.cat(base)


def spread(
    change: Float[Tensor, " window"], windows: Bool[Tensor, "window height width"]
) -> Float[Tensor, "height width"]:
    """Return each cell's mean over the windows that cover it; NaN where none does."""
    inside = windows.to(change.device)
    total = torch.where(inside, change[:, None, None], torch.zeros_like(change[:, None, None])).sum(0)
    return total / inside.sum(0)
