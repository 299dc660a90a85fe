"""Pictures that the tower sees as one tile where others are cut: an image among several, or a frame of a video.

LLaVA-OneVision cuts a picture into tiles only where it is alone in its prompt. One among several is padded to a
square and fills the tower's grid; a frame is squeezed to a square and its grid halved. A newline vector ends a
picture, and the last frame of a video. Pure functions of sizes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veena_lens.images.anyres import Size, cell_boxes, resampled_grid


@dataclass(frozen=True, kw_only=True)
class SingleLayout:
    """`base` is the side of the tower's grid, `side` that of the grid of tokens; `is_padded`: to a square (else
    squeezed into one)."""

    picture: Size
    base: int
    side: int
    has_newline: bool
    is_padded: bool

    n_tiles = 1

    @property
    def rows(self) -> int:
        return self.side

    @property
    def cols(self) -> int:
        return self.side

    @property
    def n_tokens(self) -> int:
        """Tokens in the sequence: the grid, and a newline where it has one."""
        return self.side**2 + self.has_newline

    def grid_places(self) -> list[int]:
        """Offsets of the grid's tokens among the picture's."""
        return list(range(self.side**2))

    def token_tiles(self) -> list[int]:
        """0 for every token of the grid, -1 for the newline."""
        return [0] * self.side**2 + [-1] * self.has_newline

    def tile_starts(self) -> list[int]:
        """The offset of the first token that reads the tile."""
        return [0]

    def patch_cells(self) -> Int[Tensor, "tile row column"]:
        """The cell of the grid in which every patch's centre lies."""
        at = (2 * torch.arange(self.base) + 1) * self.side // (2 * self.base)
        return (at[:, None] * self.side + at)[None]

    def boxes(self) -> Float[Tensor, "n_tokens 4"]:
        """(left, top, right, bottom) of every token in pixels of the original picture; cells in the padding are cut
        to nothing, a newline has none (NaN)."""
        height, width = self.picture
        out = torch.full((self.n_tokens, 4), float("nan"))
        n, grid = self.side**2, (self.side, self.side)
        if not self.is_padded:
            out[:n] = cell_boxes((width, height), grid)
            return out
        longest = max(height, width)
        boxes = cell_boxes((longest, longest), grid)
        boxes -= torch.tensor([(longest - width) // 2, (longest - height) // 2] * 2)
        out[:n] = boxes.clamp(min=0).minimum(torch.tensor([width, height] * 2, dtype=boxes.dtype))
        return out


def image_among_several(picture: Size, base: int) -> SingleLayout:
    """An image that shares its prompt with others."""
    return SingleLayout(picture=picture, base=base, side=base, has_newline=True, is_padded=True)


def frame(picture: Size, base: int, is_last: bool) -> SingleLayout:
    """A frame of a video."""
    return SingleLayout(picture=picture, base=base, side=math.ceil(base / 2), has_newline=is_last, is_padded=False)


def pack_single(
    features: Float[Tensor, "one pos d_model"], layout: SingleLayout, newline: Float[Tensor, " d_model"]
) -> Float[Tensor, "n_tokens d_model"]:
    """Features of one tile as the sequence reads them."""
    out = features[0]
    if layout.side != layout.base:
        grid = features.unflatten(1, (layout.base, layout.base))
        out = resampled_grid(grid, (layout.side, layout.side))[0].flatten(0, 1)
    return torch.cat([out, newline.to(out)[None]]) if layout.has_newline else out
