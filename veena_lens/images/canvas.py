"""An image as a whole view and a canvas of tiles that fill one run of tokens (LLaVA-NeXT, LLaVA-OneVision).

The image is fitted into the best of several canvases; crop 0 is the whole image squeezed to one square, the others cut
the canvas row by row. Features of the canvas lose its letterbox ("unpadding"), a large grid of them may be resampled
to a smaller one, every row ends with a newline vector, and the whole view's features stand first. Pure functions of
sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from veena_lens.images.base import Size, cell_boxes

SHRINK_FROM = 1.1  # grids that are longer by less, on the geometric mean of their sides, are not resampled


@dataclass(frozen=True, kw_only=True)
class AnyresImage:
    """An image that is cut into tiles, and where its tokens come from.

    size: (height, width) of the original image in pixels. canvas: the same of the canvas. tiles: (rows, columns) of
    tiles. base: side of the whole view in tokens. pad: features cut from (top, left). kept: those that are left, in
    (rows, columns). rows, cols: the grid that they are resampled to (equal to `kept` where it is small enough).
    patch_size: side of a patch in pixels.
    """

    size: Size
    canvas: Size
    tiles: Size
    base: int
    pad: Size
    kept: Size
    rows: int
    cols: int
    patch_size: int

    @property
    def n_crops(self) -> int:
        """Return the number of crops that the tower reads: the whole view and the tiles."""
        return 1 + self.tiles[0] * self.tiles[1]

    @property
    def n_tokens(self) -> int:
        """Return the number of tokens in the sequence: whole view, grid, and a newline per row."""
        return self.base**2 + self.rows * (self.cols + 1)

    @property
    def grid(self) -> Size:
        """Return (height, width) in tokens, through the tiles."""
        return self.rows, self.cols

    @property
    def patch_grid(self) -> None:
        return None

    @property
    def is_resampled(self) -> bool:
        """Return True where a token of the grid is a mean of several features."""
        return self.kept != (self.rows, self.cols)

    def grid_places(self) -> list[int]:
        """Return the offsets of the grid's cells among the image's tokens, row by row, without newlines."""
        return [self.base**2 + r * (self.cols + 1) + c for r in range(self.rows) for c in range(self.cols)]

    def token_crops(self) -> list[int]:
        """Return the crop in which each token's centre lies: 0 the whole view, 1 .. row by row, -1 a newline."""
        crops = [0] * self.base**2 + [-1] * (self.n_tokens - self.base**2)
        for place, i in zip(self.grid_places(), range(self.rows * self.cols), strict=True):
            y, x = divmod(i, self.cols)
            at = (self._centre(y, 0) + self.pad[0], self._centre(x, 1) + self.pad[1])
            crops[place] = 1 + at[0] // self.base * self.tiles[1] + at[1] // self.base
        return crops

    def crop_starts(self) -> list[int]:
        """Return, for each crop, the offset of the first token that reads any of it; `n_tokens` if none does.

        A token of a resampled grid reads its neighbours too, and so crops in which it does not lie.
        """
        starts = [0] + [self.n_tokens] * (self.n_crops - 1)
        rows, cols = (self._first_readers(axis) for axis in (0, 1))
        for y, row in enumerate(rows):
            for x, col in enumerate(cols):
                if row is not None and col is not None:
                    starts[1 + y * self.tiles[1] + x] = self.base**2 + row * (self.cols + 1) + col
        return starts

    def patch_cells(self) -> Int[Tensor, "crop patch"]:
        """Return the cell of the grid in which each patch lies; -1 for the whole view and the letterbox."""
        cells = torch.full((self.n_crops, self.base, self.base), -1)
        y, x = torch.meshgrid(torch.arange(self.kept[0]), torch.arange(self.kept[1]), indexing="ij")
        row, column = ((2 * y + 1) * self.rows // (2 * self.kept[0]), (2 * x + 1) * self.cols // (2 * self.kept[1]))
        y, x = y + self.pad[0], x + self.pad[1]
        cells[1 + y // self.base * self.tiles[1] + x // self.base, y % self.base, x % self.base] = (
            row * self.cols + column
        )
        return cells.flatten(1)

    def boxes(self, size: Size | None = None, image_processor: Any = None) -> Float[Tensor, "n_tokens 4"]:
        """Return the pixel box of each token; newlines have none (NaN). Both arguments are known from the layout."""
        height, width = self.size
        out = torch.full((self.n_tokens, 4), float("nan"))
        out[: self.base**2] = cell_boxes((width, height), (self.base, self.base))
        scale = min(self.canvas[1] / width, self.canvas[0] / height)
        fitted = fitted_size(self.size, self.canvas)
        top, left = (self.canvas[0] - fitted[0]) // 2, (self.canvas[1] - fitted[1]) // 2
        kept = (self.kept[1] * self.patch_size, self.kept[0] * self.patch_size)
        boxes = cell_boxes(kept, (self.rows, self.cols))
        boxes += torch.tensor([self.pad[1], self.pad[0]] * 2) * self.patch_size - torch.tensor([left, top] * 2)
        limit = torch.tensor([width, height] * 2, dtype=boxes.dtype)
        out[self.grid_places()] = (boxes / scale).clamp(min=0).minimum(limit)
        return out

    def pack(
        self, features: Float[Tensor, "crop pos d_model"], newline: Float[Tensor, " d_model"]
    ) -> Float[Tensor, "n_tokens d_model"]:
        """Return the features of the crops as the text reads them: whole view, then rows with a newline each."""
        whole, rest = features[0], features[1:]
        g, (ny, nx) = self.base, self.tiles
        canvas = rest.view(ny, nx, g, g, -1).transpose(1, 2).reshape(ny * g, nx * g, -1)
        y, x = self.pad
        grid = canvas[y : y + self.kept[0], x : x + self.kept[1]]
        if self.is_resampled:
            grid = resampled_grid(grid[None], (self.rows, self.cols))[0]
        ends = newline.to(grid).expand(self.rows, 1, -1)
        return torch.cat([whole, torch.cat([grid, ends], 1).flatten(0, 1)])

    def _centre(self, cell: int, axis: int) -> int:
        """Return the kept row (axis 0) or column in which a cell's centre lies."""
        return (2 * cell + 1) * self.kept[axis] // (2 * (self.rows, self.cols)[axis])

    def _first_readers(self, axis: int) -> list[int | None]:
        """Return, for each row (axis 0) or column of tiles, the first row or column of tokens that reads any of it."""
        found: list[int | None] = [None] * self.tiles[axis]
        size, n = self.kept[axis], (self.rows, self.cols)[axis]
        for cell in range(n):
            first = last = cell
            if self.is_resampled:  # bilinearly, between the two nearest
                first = math.floor(max((cell + 0.5) * size / n - 0.5, 0.0))
                last = min(first + 1, size - 1)
            for at in (first, last):
                tile = (at + self.pad[axis]) // self.base
                found[tile] = cell if found[tile] is None else found[tile]
        return found


def anyres_image(
    size: Size, pinpoints: Sequence[Size], tile_size: int, patch_size: int, max_tiles: int = 0
) -> AnyresImage:
    """Cut an image into tiles. The rounding to seven digits decides token counts: it is the checkpoints' own.

    Args:
        size: (height, width) of the image in pixels.
        pinpoints: (height, width) of the canvases to choose from.
        tile_size: side of a tile in pixels.
        patch_size: side of a patch in pixels.
        max_tiles: a grid with clearly more features than this number of tiles has is resampled to about their number;
            0 never resamples.

    Raises:
        ValueError: the image has no pixels, or is so narrow that nothing is left of it.
    """
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"An image of {width} x {height} pixels has nothing to show.")
    canvas = best_canvas(size, pinpoints)
    tiles = (math.ceil(canvas[0] / tile_size), math.ceil(canvas[1] / tile_size))
    base = tile_size // patch_size
    rows, cols = tiles[0] * base, tiles[1] * base
    pad_y = pad_x = 0
    if width / height > cols / rows:
        pad_y = (rows - int(round(height * (cols / width), 7))) // 2
    else:
        pad_x = (cols - int(round(width * (rows / height), 7))) // 2
    kept = (rows - 2 * pad_y, cols - 2 * pad_x)
    grid = _resampled_size(kept, max_tiles * base**2)
    if kept[0] * kept[1] and not grid[0] * grid[1]:
        raise ValueError(
            f"An image of {width} x {height} pixels leaves {kept[1]} x {kept[0]} features, which resampled to "
            f"{max_tiles} tiles have no {'row' if not grid[0] else 'column'} left. Give it a less extreme shape."
        )
    return AnyresImage(
        size=size,
        canvas=canvas,
        tiles=tiles,
        base=base,
        pad=(pad_y, pad_x),
        kept=kept,
        rows=grid[0],
        cols=grid[1],
        patch_size=patch_size,
    )


def best_canvas(size: Size, pinpoints: Sequence[Size]) -> Size:
    """Return the canvas that keeps most of an image's pixels, and among those wastes least."""
    height, width = size
    best, kept, waste = pinpoints[0], -1, math.inf
    for canvas in pinpoints:
        scale = min(canvas[1] / width, canvas[0] / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        wasted = canvas[0] * canvas[1] - effective
        if effective > kept or (effective == kept and wasted < waste):
            best, kept, waste = canvas, effective, wasted
    return best


def fitted_size(size: Size, canvas: Size) -> Size:
    """Return the size of an image that is resized into a canvas with its aspect ratio kept."""
    height, width = size
    by_width, by_height = canvas[1] / width, canvas[0] / height
    if by_width < by_height:
        return min(math.ceil(height * by_width), canvas[0]), canvas[1]
    return canvas[0], min(math.ceil(width * by_height), canvas[1])


def _resampled_size(kept: Size, most: int) -> Size:
    """Return the grid that features are resampled to if there are clearly more than `most` (0: any number)."""
    ratio = math.sqrt(kept[0] * kept[1] / most) if most else 0.0
    return (int(kept[0] // ratio), int(kept[1] // ratio)) if ratio > SHRINK_FROM else kept


def resampled_grid(
    grids: Float[Tensor, "n height width d_model"], size: Size
) -> Float[Tensor, "n new_height new_width d_model"]:
    """Return grids of features at another size, bilinearly between cell centres, without smoothing first."""
    channels_first = grids.permute(0, 3, 1, 2).contiguous()  # the kernel that Hugging Face's layout in memory meets
    return F.interpolate(channels_first, size, mode="bilinear").permute(0, 2, 3, 1)
