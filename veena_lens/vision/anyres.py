"""Any-resolution pictures (LLaVA-NeXT): a whole view and a grid of tiles, packed into one run of tokens.

The picture is fitted into the best of several canvases; tile 0 is the whole picture squeezed to one tile, the
others cut the canvas row by row. Features of the canvas lose its letterbox ("unpadding"), every row of them
ends with a newline vector, and the whole view's features stand first. Pure functions of sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Size = tuple[int, int]  # (height, width)


@dataclass(frozen=True)
class AnyresLayout:
    """Where a picture's tokens come from. `base` is the side of the whole view in tokens, `rows` and `cols` the
    unpadded grid, `pad` the tokens cut from (top, left), `tiles` the canvas in tiles, `canvas` in pixels."""

    picture: Size
    canvas: Size
    tiles: Size
    base: int
    rows: int
    cols: int
    pad: Size
    patch_size: int

    @property
    def n_tiles(self) -> int:
        """Tiles that the tower sees, the whole view included."""
        return 1 + self.tiles[0] * self.tiles[1]

    @property
    def n_tokens(self) -> int:
        """Tokens in the sequence: whole view, grid, and a newline a row."""
        return self.base**2 + self.rows * (self.cols + 1)

    def grid_places(self) -> list[int]:
        """Offsets of the grid's tokens among the picture's, row by row, newlines left out."""
        return [self.base**2 + r * (self.cols + 1) + c for r in range(self.rows) for c in range(self.cols)]

    def token_tiles(self) -> list[int]:
        """The tile of every token: 0 the whole view, 1 .. row by row, -1 a newline."""
        tiles = [0] * self.base**2 + [-1] * (self.n_tokens - self.base**2)
        for place, i in zip(self.grid_places(), range(self.rows * self.cols), strict=True):
            y, x = divmod(i, self.cols)
            row, column = (y + self.pad[0]) // self.base, (x + self.pad[1]) // self.base
            tiles[place] = 1 + row * self.tiles[1] + column
        return tiles

    def boxes(self) -> Float[Tensor, "n_tokens 4"]:
        """(left, top, right, bottom) of every token in pixels of the original picture; newlines have none (NaN)."""
        height, width = self.picture
        out = torch.full((self.n_tokens, 4), float("nan"))
        step_y, step_x = height / self.base, width / self.base
        for i in range(self.base**2):
            y, x = divmod(i, self.base)
            out[i] = torch.tensor([x * step_x, y * step_y, (x + 1) * step_x, (y + 1) * step_y])
        scale = min(self.canvas[1] / width, self.canvas[0] / height)
        fitted = fitted_size(self.picture, self.canvas)
        top, left = (self.canvas[0] - fitted[0]) // 2, (self.canvas[1] - fitted[1]) // 2
        for place, i in zip(self.grid_places(), range(self.rows * self.cols), strict=True):
            y, x = divmod(i, self.cols)
            y0 = ((y + self.pad[0]) * self.patch_size - top) / scale
            x0 = ((x + self.pad[1]) * self.patch_size - left) / scale
            side = self.patch_size / scale
            box = torch.tensor([x0, y0, x0 + side, y0 + side])
            out[place] = box.clamp(min=0).minimum(torch.tensor([width, height, width, height], dtype=box.dtype))
        return out


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


def anyres_layout(picture: Size, pinpoints: Sequence[Size], tile_size: int, patch_size: int) -> AnyresLayout:
    """The layout of one picture. The rounding to seven digits decides token counts: it is the checkpoints' own.

    Raises: ValueError for a picture without pixels."""
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
    return AnyresLayout(picture, canvas, tiles, base, rows - 2 * pad_y, cols - 2 * pad_x, (pad_y, pad_x), patch_size)


def pack(
    features: Float[Tensor, "tile pos d_model"], layout: AnyresLayout, newline: Float[Tensor, " d_model"]
) -> Float[Tensor, "n_tokens d_model"]:
    """Features of a picture's tiles as the sequence reads them: whole view, then rows with a newline each."""
    base, rest = features[0], features[1:]
    g, (ny, nx) = layout.base, layout.tiles
    canvas = rest.view(ny, nx, g, g, -1).transpose(1, 2).reshape(ny * g, nx * g, -1)
    y, x = layout.pad
    grid = canvas[y : y + layout.rows, x : x + layout.cols]
    ends = newline.to(grid).expand(layout.rows, 1, -1)
    return torch.cat([base, torch.cat([grid, ends], 1).flatten(0, 1)])
