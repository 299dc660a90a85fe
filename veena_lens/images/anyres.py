"""Any-resolution pictures (LLaVA-NeXT, LLaVA-OneVision): a whole view and a grid of tiles as one run of tokens.

The picture is fitted into the best of several canvases; tile 0 is the whole picture squeezed to one tile, the
others cut the canvas row by row. Features of the canvas lose its letterbox ("unpadding"), a large grid of them may
be resampled to a smaller one, every row ends with a newline vector, and the whole view's features stand first.
Pure functions of sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Size = tuple[int, int]  # (height, width)
SHRINK_FROM = 1.1  # grids that are longer by less, on the geometric mean of their sides, stay as they are


@dataclass(frozen=True, kw_only=True)
class AnyresLayout:
    """Where a picture's tokens come from. `base` is the side of the whole view in tokens, `canvas` is in pixels,
    `tiles` in tiles; `pad` are the features cut from (top, left), `kept` those that are left in (rows, columns), and
    `rows` x `cols` the grid that they are resampled to (the same where it is small enough)."""

    picture: Size
    canvas: Size
    tiles: Size
    base: int
    pad: Size
    kept: Size
    rows: int
    cols: int
    patch_size: int

    @property
    def n_tiles(self) -> int:
        """Tiles that the tower sees, the whole view included."""
        return 1 + self.tiles[0] * self.tiles[1]

    @property
    def n_tokens(self) -> int:
        """Tokens in the sequence: whole view, grid, and a newline a row."""
        return self.base**2 + self.rows * (self.cols + 1)

    @property
    def is_resampled(self) -> bool:
        """True where a token of the grid is a mean of several features."""
        return self.kept != (self.rows, self.cols)

    def grid_places(self) -> list[int]:
        """Offsets of the grid's tokens among the picture's, row by row, newlines left out."""
        return [self.base**2 + r * (self.cols + 1) + c for r in range(self.rows) for c in range(self.cols)]

    def token_tiles(self) -> list[int]:
        """The tile in which every token's centre lies: 0 the whole view, 1 .. row by row, -1 a newline."""
        tiles = [0] * self.base**2 + [-1] * (self.n_tokens - self.base**2)
        for place, i in zip(self.grid_places(), range(self.rows * self.cols), strict=True):
            y, x = divmod(i, self.cols)
            at = (self._centre(y, 0) + self.pad[0], self._centre(x, 1) + self.pad[1])
            tiles[place] = 1 + at[0] // self.base * self.tiles[1] + at[1] // self.base
        return tiles

    def tile_starts(self) -> list[int]:
        """Of each tile the offset of the first token that reads any of it; `n_tokens` where none does.

        A token of a resampled grid reads its neighbours too, and so tiles in which it does not lie."""
        starts = [0] + [self.n_tokens] * (self.n_tiles - 1)
        rows, cols = (self._first_readers(axis) for axis in (0, 1))
        for y, row in enumerate(rows):
            for x, col in enumerate(cols):
                if row is not None and col is not None:
                    starts[1 + y * self.tiles[1] + x] = self.base**2 + row * (self.cols + 1) + col
        return starts

    def patch_cells(self) -> Int[Tensor, "tile row column"]:
        """The cell of the grid in which every patch of every tile lies; -1 for the whole view and the letterbox."""
        cells = torch.full((self.n_tiles, self.base, self.base), -1)
        y, x = torch.meshgrid(torch.arange(self.kept[0]), torch.arange(self.kept[1]), indexing="ij")
        row, column = ((2 * y + 1) * self.rows // (2 * self.kept[0]), (2 * x + 1) * self.cols // (2 * self.kept[1]))
        y, x = y + self.pad[0], x + self.pad[1]
        cells[1 + y // self.base * self.tiles[1] + x // self.base, y % self.base, x % self.base] = (
            row * self.cols + column
        )
        return cells

    def boxes(self) -> Float[Tensor, "n_tokens 4"]:
        """(left, top, right, bottom) of every token in pixels of the original picture; newlines have none (NaN)."""
        height, width = self.picture
        out = torch.full((self.n_tokens, 4), float("nan"))
        out[: self.base**2] = cell_boxes((width, height), (self.base, self.base))
        scale = min(self.canvas[1] / width, self.canvas[0] / height)
        fitted = fitted_size(self.picture, self.canvas)
        top, left = (self.canvas[0] - fitted[0]) // 2, (self.canvas[1] - fitted[1]) // 2
        kept = (self.kept[1] * self.patch_size, self.kept[0] * self.patch_size)
        boxes = cell_boxes(kept, (self.rows, self.cols))
        boxes += torch.tensor([self.pad[1], self.pad[0]] * 2) * self.patch_size - torch.tensor([left, top] * 2)
        limit = torch.tensor([width, height] * 2, dtype=boxes.dtype)
        out[self.grid_places()] = (boxes / scale).clamp(min=0).minimum(limit)
        return out

    def _centre(self, cell: int, axis: int) -> int:
        """The kept row (axis 0) or column in which a cell's centre lies."""
        return (2 * cell + 1) * self.kept[axis] // (2 * (self.rows, self.cols)[axis])

    def _first_readers(self, axis: int) -> list[int | None]:
        """Of each row (axis 0) or column of tiles the first row or column of tokens that reads any of it."""
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


def cell_boxes(size: tuple[int, int], grid: Size) -> Float[Tensor, "n_tokens 4"]:
    """(left, top, right, bottom) of the cells of a grid that covers a whole picture, row by row.

    size: (width, height) of the picture; grid: (height, width)."""
    (width, height), (rows, cols) = size, grid
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    y, x = y.flatten().float(), x.flatten().float()
    step_y, step_x = height / max(rows, 1), width / max(cols, 1)
    return torch.stack([x * step_x, y * step_y, (x + 1) * step_x, (y + 1) * step_y], -1)


def best_canvas(picture: Size, pinpoints: Sequence[Size]) -> Size:
    """The canvas that keeps most of the picture's pixels, and among those wastes least."""
    height, width = picture
    best, kept, waste = pinpoints[0], -1, math.inf
    for canvas in pinpoints:
        scale = min(canvas[1] / width, canvas[0] / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        wasted = canvas[0] * canvas[1] - effective
        if effective > kept or (effective == kept and wasted < waste):
            best, kept, waste = canvas, effective, wasted
    return best


def fitted_size(picture: Size, canvas: Size) -> Size:
    """Size of the picture resized into a canvas with its aspect ratio kept."""
    height, width = picture
    by_width, by_height = canvas[1] / width, canvas[0] / height
    if by_width < by_height:
        return min(math.ceil(height * by_width), canvas[0]), canvas[1]
    return canvas[0], min(math.ceil(width * by_height), canvas[1])


def anyres_layout(
    picture: Size, pinpoints: Sequence[Size], tile_size: int, patch_size: int, max_tiles: int = 0
) -> AnyresLayout:
    """The layout of one picture. The rounding to seven digits decides token counts: it is the checkpoints' own.

    max_tiles: a grid with clearly more features than so many tiles have is resampled to about their number (0: never).
    Raises: ValueError for a picture without pixels, or one so narrow that nothing is left of it."""
    height, width = picture
    if height < 1 or width < 1:
        raise ValueError(f"A picture of {width} x {height} pixels has nothing to show.")
    canvas = best_canvas(picture, pinpoints)
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
            f"A picture of {width} x {height} pixels leaves {kept[1]} x {kept[0]} features, which resampled to "
            f"{max_tiles} tiles have no {'row' if not grid[0] else 'column'} left. Give it a less extreme shape."
        )
    return AnyresLayout(
        picture=picture,
        canvas=canvas,
        tiles=tiles,
        base=base,
        pad=(pad_y, pad_x),
        kept=kept,
        rows=grid[0],
        cols=grid[1],
        patch_size=patch_size,
    )


def _resampled_size(kept: Size, most: int) -> Size:
    """The grid that features are resampled to, where there are clearly more than `most` (0: any number)."""
    ratio = math.sqrt(kept[0] * kept[1] / most) if most else 0.0
    return (int(kept[0] // ratio), int(kept[1] // ratio)) if ratio > SHRINK_FROM else kept


def pack(
    features: Float[Tensor, "tile pos d_model"], layout: AnyresLayout, newline: Float[Tensor, " d_model"]
) -> Float[Tensor, "n_tokens d_model"]:
    """Features of a picture's tiles as the sequence reads them: whole view, then rows with a newline each."""
    base, rest = features[0], features[1:]
    g, (ny, nx) = layout.base, layout.tiles
    canvas = rest.view(ny, nx, g, g, -1).transpose(1, 2).reshape(ny * g, nx * g, -1)
    y, x = layout.pad
    grid = canvas[y : y + layout.kept[0], x : x + layout.kept[1]]
    if layout.is_resampled:
        grid = resampled_grid(grid[None], (layout.rows, layout.cols))[0]
    ends = newline.to(grid).expand(layout.rows, 1, -1)
    return torch.cat([base, torch.cat([grid, ends], 1).flatten(0, 1)])


def resampled_grid(
    grids: Float[Tensor, "n height width d_model"], size: Size
) -> Float[Tensor, "n new_height new_width d_model"]:
    """Grids of features at another size, bilinearly between cell centres, without smoothing first."""
    channels_first = grids.permute(0, 3, 1, 2).contiguous()  # the kernel that Hugging Face's layout in memory meets
    return F.interpolate(channels_first, size, mode="bilinear").permute(0, 2, 3, 1)
