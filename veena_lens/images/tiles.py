"""Pictures in tiles (Idefics3, SmolVLM): which runs of image tokens are the tiles of one image, and its pixels.

A processor writes a marker before each tile's run of image tokens: the fake token F and the tile's name, which is one
token or several. A row of tiles ends with a line break, and the whole view stands last, closed by F:

    F<row_1_col_1>i..iF<row_1_col_2>i..i\nF<row_2_col_1>i..iF<row_2_col_2>i..i\n\nF<global-img>i..iF

The tokens alone tell which tiles belong together, whatever a tokenizer makes of the names: the last tile of a row is
the whole view of its last image, and the others that bear its name are those of the images before. Tiles that do not
stand so (prompts written by hand, frames of a video) are whole views of images of their own.

Pictures cut into square tiles, each a run of tokens of its own among text, and a whole view last (Idefics3).

The picture is resized to a whole number of tiles in both directions, so that every token reads an equal share of its
height and width. Tiles follow row by row; between them the text holds tokens that tell row and column. A small picture
is its whole view alone. The tower takes the whole view first, as tile 0. Pure functions of numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from veena_lens.config import VisionConfig
from veena_lens.images.anyres import Size, cell_boxes
from veena_lens.inputs import MultimodalInputs


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


def reading_order(tile_grids: Int[Tensor, "image 2"]) -> Int[Tensor, " crop"]:
    """The tower's pictures (of every image the whole view, then its tiles) in the order in which the text reads them:
    the whole view after the tiles. Its inverse is `tower_order`."""
    order, first = [], 0
    for rows, columns in tile_grids.tolist():
        n = 1 + rows * columns
        order += [*range(first + 1, first + n), first]
        first += n
    return torch.tensor(order, dtype=torch.long)


def tower_order(tile_grids: Int[Tensor, "image 2"]) -> Int[Tensor, " crop"]:
    """Pictures as a processor gives them, in the text's order, in the order in which the tower takes them."""
    return torch.argsort(reading_order(tile_grids))


Grid = tuple[int, int]  # tiles of an image in (rows, columns); (0, 0): it is not cut
LONGEST_NAME = 24  # tokens of "<row_6_col_6>", each character one of its own, and to spare


@dataclass(frozen=True)
class _Tile:
    """Tokens of one tile: its first and one past the last, the place of F before it and the name in between."""

    start: int
    stop: int
    fake: int | None
    name: tuple[int, ...]


def tile_grids(tokens: Sequence[int], image_token_id: int, size: int) -> list[Grid]:
    """Tiles of each image of one row of tokens, every tile filling `size` of them.

    Raises: ValueError for a run of image tokens that is no whole number of tiles."""
    starts = _starts(tokens, image_token_id, size)
    if not starts or starts[-1] + size >= len(tokens):
        return [(0, 0)] * len(starts)
    fake = tokens[starts[-1] + size]
    tiles, stop = [], 0
    for start in starts:
        tiles.append(_tile(tokens, start, start + size, stop, fake))
        stop = start + size
    whole, found, mine = tiles[-1].name, [], []
    for tile in tiles:
        mine.append(tile)
        if tile.name == whole and tile.fake is not None and tokens[tile.stop] == fake:
            grid = _grid(mine)
            found += [(0, 0)] * len(mine) if grid is None else [grid]
            mine = []
    return found + [(0, 0)] * len(mine)


def _starts(tokens: Sequence[int], image_token_id: int, size: int) -> list[int]:
    """The first token of every tile."""
    starts: list[int] = []
    run = 0
    for at, token in enumerate([*tokens, None]):
        if token == image_token_id:
            run += 1
            continue
        if run % size:
            raise ValueError(
                f"A run of {run} image tokens is no whole number of tiles: each fills {size} in this model. Processor "
                "and checkpoint do not match (image_seq_len), or the prompt was not made by the processor."
            )
        starts += range(at - run, at, size)
        run = 0
    return starts


def _tile(tokens: Sequence[int], start: int, stop: int, after: int, fake: int) -> _Tile:
    """A tile with what stands before it, no further back than `after`, where the tile before it ends."""
    for at in range(start - 1, max(after, start - 1 - LONGEST_NAME) - 1, -1):
        if tokens[at] == fake:
            return _Tile(start, stop, at, tuple(tokens[at + 1 : start]))
    return _Tile(start, stop, None, ())


def _grid(tiles: Sequence[_Tile]) -> Grid | None:
    """(rows, columns) of the tiles before a whole view, (0, 0) where there are none; None where they are no grid."""
    *cut, whole = tiles
    if not cut:
        return (0, 0)
    columns: list[int] = []
    for i, tile in enumerate(cut):
        if i and tile.fake == cut[i - 1].stop:
            columns[-1] += 1
        else:
            columns.append(1)
    named = all(tile.fake is not None and tile.name for tile in cut)
    if not named or len(set(columns)) > 1 or len(cut) == 1 or whole.fake == cut[-1].stop:
        return None
    return len(columns), columns[0]


def tiles_of(vision: VisionConfig, pixel_values: Tensor, extras: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """(pixels [picture channel height width], real patches [picture patch]) of a processor's tensors, in its order.

    Tiles that are zero everywhere are padding and left out. Real patches: None where every picture is whole.
    Raises: ValueError for tensors of another shape, or a picture of which its mask leaves nothing."""
    size = (vision.n_channels, vision.image_size, vision.image_size)
    pixels = torch.as_tensor(pixel_values)
    if pixels.ndim != 5 or tuple(pixels.shape[2:]) != size or not pixels.is_floating_point():
        raise ValueError(
            f"pixel_values must be floats [rows tiles {' '.join(map(str, size))}], not {pixels.dtype} "
            f"{list(pixels.shape)}; the checkpoint's own processor makes them so (max_image_size)."
        )
    flat = pixels.flatten(0, 1)
    exists = (flat != 0).flatten(1).any(1)
    given = extras.get("pixel_attention_mask")
    if given is None:
        return flat[exists], None
    mask = torch.as_tensor(given).to(flat.device)
    if mask.shape != (*pixels.shape[:2], *size[1:]):
        raise ValueError(
            f"pixel_attention_mask {list(mask.shape)} does not fit pixel_values {list(pixels.shape)}: it must be "
            "[rows tiles height width]."
        )
    p, (height, width) = vision.patch_size, vision.grid
    whole = mask.flatten(0, 1)[exists][:, : height * p, : width * p] != 0
    real = whole.unflatten(2, (width, p)).unflatten(1, (height, p)).any(4).any(2)
    if not bool(real[:, 0, 0].all()):
        bad = (~real[:, 0, 0]).nonzero().flatten().tolist()
        raise ValueError(f"pixel_attention_mask leaves no picture at the top left of tiles {bad}: pad on the right.")
    return flat[exists], None if bool(real.all()) else real.flatten(1)


def in_tower_order(pixels: Tensor, real: Tensor | None, grids: Tensor) -> tuple[Tensor, Tensor | None]:
    """Tiles and their patches with the whole view of every image first. Raises: ValueError for another number."""
    order = tower_order(grids).to(pixels.device)
    if len(order) != len(pixels):
        raise ValueError(
            f"The image tokens stand for {len(order)} tiles, and {len(pixels)} were given (tiles of zeros are padding "
            "and do not count). Use the checkpoint's own processor, one picture for each placeholder."
        )
    return pixels[order], None if real is None else real[order]


def tiles_as_hf(inputs: MultimodalInputs, pixels: Tensor) -> dict[str, Tensor]:
    """A processor's tensors again: `pixels` (those of the inputs, of any dtype) row by row, zeros where a row has fewer
    tiles than another, and the mask of real pixels where pictures are smaller than their square."""
    assert inputs.crop_rows is not None
    order = reading_order(inputs.extras["tile_grids"]).to(pixels.device)
    counts = torch.bincount(inputs.crop_rows, minlength=len(inputs)).tolist()
    given = {"pixel_values": pad_sequence(list(pixels[order].split(counts)), batch_first=True)}
    if inputs.patch_mask is None:
        return given
    height, width = pixels.shape[-2:]
    side = round(inputs.patch_mask.shape[1] ** 0.5)
    real = inputs.patch_mask[order].unflatten(1, (side, side)).long()
    real = real.repeat_interleave(height // side, 1).repeat_interleave(width // side, 2)
    real = F.pad(real, (0, width - real.shape[2], 0, height - real.shape[1]))
    return given | {"pixel_attention_mask": pad_sequence(list(real.split(counts)), batch_first=True)}
