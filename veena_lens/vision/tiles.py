"""Pictures cut into square tiles, each a run of tokens of its own among text, and a whole view last (Idefics3).

The picture is resized to a whole number of tiles in both directions, so that every token reads an equal share of its
height and width. Tiles follow row by row; between them the text holds tokens that tell row and column. A small picture
is its whole view alone. The tower takes the whole view first, as tile 0. Pure functions of numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from veena_lens.vision.anyres import Size, cell_boxes


@dataclass(frozen=True, kw_only=True)
class TileLayout:
    """Where a picture's tokens come from: `tiles` in (rows, columns), (0, 0) for a picture that is not cut, and
    `side`, the tokens a side of each tile and of the whole view."""

    tiles: Size
    side: int

    @property
    def n_tiles(self) -> int:
        """Tiles that the tower sees, the whole view included."""
        return 1 + self.tiles[0] * self.tiles[1]

    @property
    def n_tokens(self) -> int:
        """Image tokens of all tiles; the text between them is not counted."""
        return self.n_tiles * self.side**2

    @property
    def grid(self) -> Size:
        """(height, width) in tokens through the tiles, or of the whole view where there are none."""
        return max(self.tiles[0], 1) * self.side, max(self.tiles[1], 1) * self.side

    def grid_places(self) -> list[int]:
        """Offsets of the grid's tokens among the picture's, row by row."""
        rows, columns = max(self.tiles[0], 1), max(self.tiles[1], 1)
        shape = (rows, columns, self.side, self.side)
        offsets = torch.arange(rows * columns * self.side**2).view(*shape)
        return offsets.transpose(1, 2).flatten().tolist()

    def token_tiles(self) -> list[int]:
        """The tile of every token: 1 .. row by row, then 0, the whole view."""
        return [(i + 1) % self.n_tiles for i in range(self.n_tiles) for _ in range(self.side**2)]

    def patch_cells(self, merge: int) -> Int[Tensor, "tile row column"]:
        """The grid's cell in which every patch of every tile lies, `merge` patches a side making one token; -1 in the
        whole view of a picture that is cut."""
        rows, columns = self.grid
        cells = torch.arange(rows * columns).view(rows, columns)
        cells = cells.repeat_interleave(merge, 0).repeat_interleave(merge, 1)
        cut = rearrange(cells, "(r y) (c x) -> (r c) y x", y=self.side * merge, x=self.side * merge)
        return cut if self.n_tiles == 1 else torch.cat([torch.full_like(cut[:1], -1), cut])

    def boxes(self, picture: Size) -> Float[Tensor, "n_tokens 4"]:
        """(left, top, right, bottom) of every token in pixels of the original picture of (height, width)."""
        size = (picture[1], picture[0])
        out = cell_boxes(size, (self.side, self.side)).repeat(self.n_tiles, 1)  # right for the whole view
        if self.n_tiles > 1:
            out[self.grid_places()] = cell_boxes(size, self.grid)
        return out


def reading_order(tile_grids: Int[Tensor, "image 2"]) -> Int[Tensor, " picture"]:
    """The tower's pictures (of every image the whole view, then its tiles) in the order in which the text reads them:
    the whole view after the tiles. Its inverse is `tower_order`."""
    order, first = [], 0
    for rows, columns in tile_grids.tolist():
        n = 1 + rows * columns
        order += [*range(first + 1, first + n), first]
        first += n
    return torch.tensor(order, dtype=torch.long)


def tower_order(tile_grids: Int[Tensor, "image 2"]) -> Int[Tensor, " picture"]:
    """Pictures as a processor gives them, in the text's order, in the order in which the tower takes them."""
    return torch.argsort(reading_order(tile_grids))
