"""Images in square tiles that are runs of tokens among text, the whole view last (Idefics3, SmolVLM).

The image is resized to a whole number of tiles in both directions, so that every token reads an equal share of its
height and width; a small image is its whole view alone. The tower takes the whole view first, as crop 0.

A processor writes a marker before each tile's run of image tokens: the fake token F and the tile's name, which is one
token or several. A row of tiles ends with a line break, and the whole view stands last, closed by F:

    F<row_1_col_1>i..iF<row_1_col_2>i..i\nF<row_2_col_1>i..iF<row_2_col_2>i..i\n\nF<global-img>i..iF

The tokens alone tell which tiles belong together, whatever a tokenizer makes of the names: the last tile of a row is
the whole view of its last image, and the others that bear its name are those of the images before. Tiles that do not
stand so (prompts written by hand, frames of a video) are whole views of images of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from veena_lens.config import HookedVLMConfig, VisionConfig
from veena_lens.images.base import ArrangedBatch, LayoutDefaults, Size, cell_boxes, crop_shape, has_crops
from veena_lens.inputs import MultimodalInputs


@dataclass(frozen=True, kw_only=True)
class TiledImage:
    """An image in tiles, and where its tokens come from.

    tiles: (rows, columns) of tiles, (0, 0) for an image that is not cut. side: tokens per side of each tile and of the
    whole view. merge: patches per side of what makes one token.
    """

    tiles: Size
    side: int
    merge: int = 1

    @property
    def n_crops(self) -> int:
        """Return the number of crops that the tower reads: the whole view and the tiles."""
        return 1 + self.tiles[0] * self.tiles[1]

    @property
    def n_tokens(self) -> int:
        """Return the number of image tokens of all crops; the text between them is not counted."""
        return self.n_crops * self.side**2

    @property
    def grid(self) -> Size:
        """Return (height, width) in tokens through the tiles, or of the whole view if there are none."""
        return max(self.tiles[0], 1) * self.side, max(self.tiles[1], 1) * self.side

    @property
    def patch_grid(self) -> None:
        return None

    def grid_places(self) -> list[int]:
        """Return the offsets of the grid's cells among the image's tokens, row by row."""
        rows, columns = max(self.tiles[0], 1), max(self.tiles[1], 1)
        shape = (rows, columns, self.side, self.side)
        offsets = torch.arange(rows * columns * self.side**2).view(*shape)
        return offsets.transpose(1, 2).flatten().tolist()

    def token_crops(self) -> list[int]:
        """Return the crop of each token: 1 .. row by row, then 0, the whole view."""
        return [(i + 1) % self.n_crops for i in range(self.n_crops) for _ in range(self.side**2)]

    def crop_starts(self) -> list[int]:
        """Return the offset of the first token of each crop."""
        crops = self.token_crops()
        return [crops.index(crop) for crop in range(self.n_crops)]

    def patch_cells(self) -> Int[Tensor, "crop patch"]:
        """Return the grid's cell in which each patch lies; -1 in the whole view of an image that is cut."""
        rows, columns = self.grid
        cells = torch.arange(rows * columns).view(rows, columns)
        cells = cells.repeat_interleave(self.merge, 0).repeat_interleave(self.merge, 1)
        cut = rearrange(cells, "(r y) (c x) -> (r c) y x", y=self.side * self.merge, x=self.side * self.merge)
        if self.n_crops > 1:
            cut = torch.cat([torch.full_like(cut[:1], -1), cut])
        return cut.flatten(1)

    def boxes(self, size: Size, image_processor: Any = None) -> Float[Tensor, "n_tokens 4"]:
        """Return the pixel box of each token, for an original image of (height, width)."""
        width_first = (size[1], size[0])
        out = cell_boxes(width_first, (self.side, self.side)).repeat(self.n_crops, 1)  # right for the whole view
        if self.n_crops > 1:
            out[self.grid_places()] = cell_boxes(width_first, self.grid)
        return out


@dataclass(frozen=True, eq=False)
class TilesLayout(LayoutDefaults):
    """Tiles of an image are runs of tokens among text, and the whole view comes last."""

    cfg: HookedVLMConfig

    @property
    def keys(self) -> tuple[str, ...]:
        return ("pixel_attention_mask",)

    def require_processor(self, processor: Any) -> None:
        side = processor.image_processor.max_image_size["longest_edge"]
        for name, found, wanted in (
            ("max_image_size", side, self.vision.image_size),
            ("image_seq_len", processor.image_seq_len, self.vision.n_features),
        ):
            if found != wanted:
                raise ValueError(
                    f"The processor's {name} is {found}, but the model's vision tower expects {wanted}. Use the "
                    "processor of this checkpoint."
                )

    def arrange(
        self,
        tokens: Int[Tensor, "batch pos"],
        mask: Bool[Tensor, "batch pos"],
        pixel_values: Any,
        extras: Mapping[str, Any],
    ) -> ArrangedBatch:
        assert self.cfg.image_token_id is not None
        pixels, real = crops_of(self.vision, pixel_values, extras)
        size, (side, _), merge = self.vision.n_features, self.vision.token_grid, self.vision.merge_size
        images = tuple(
            tuple(
                TiledImage(tiles=tiles, side=side, merge=merge)
                for tiles in tile_grids(row[keep].tolist(), self.cfg.image_token_id, size)
            )
            for row, keep in zip(tokens, mask, strict=True)
        )
        pixels, real = _whole_views_first(pixels, real, [image for row in images for image in row])
        if not any(images):  # padding and nothing else
            return ArrangedBatch(images=images)
        return ArrangedBatch(pixels=pixels, images=images, patch_mask=real)

    def pack(
        self,
        features: Float[Tensor, "crop pos d_model"],
        images: Sequence[TiledImage],
        newline: Float[Tensor, " d_model"] | None,
    ) -> Float[Tensor, "n_image_tokens d_model"]:
        """Put the whole view of every image behind its tiles."""
        return features[reading_order(images).to(features.device)].flatten(0, 1)

    def expects(self) -> str:
        return f"[crops {' '.join(map(str, crop_shape(self.vision)))}]"

    def fits(self, inputs: MultimodalInputs) -> bool:
        return has_crops(inputs, TiledImage, crop_shape(self.vision))

    def as_hf(self, inputs: MultimodalInputs, pixels: Float[Tensor, "crop ..."]) -> dict[str, Tensor]:
        """Return the crops row by row, zeros where a row has fewer than another, and the mask of real pixels where
        images are smaller than their square."""
        images: list[Any] = [image for row in inputs.layouts for image in row]
        order = reading_order(images).to(pixels.device)
        counts = [sum(image.n_crops for image in row) for row in inputs.layouts]
        given = {"pixel_values": pad_sequence(list(pixels[order].split(counts)), batch_first=True)}
        if inputs.patch_mask is None:
            return given
        height, width = pixels.shape[-2:]
        side = round(inputs.patch_mask.shape[1] ** 0.5)
        real = inputs.patch_mask[order].unflatten(1, (side, side)).long()
        real = real.repeat_interleave(height // side, 1).repeat_interleave(width // side, 2)
        real = F.pad(real, (0, width - real.shape[2], 0, height - real.shape[1]))
        return given | {"pixel_attention_mask": pad_sequence(list(real.split(counts)), batch_first=True)}

    def draw(self, counts: Sequence[int], generator: torch.Generator) -> tuple[dict[str, Tensor], list[int]]:
        """Draw whole views, as a processor gives images that it does not cut."""
        n = sum(counts)
        pixels = torch.randn(n, *crop_shape(self.vision), generator=generator)
        return {"pixel_values": pixels[None]}, [self.vision.n_features] * n


# --- the order of crops ------------------------------------------------------------------------------------
def reading_order(images: Sequence[TiledImage]) -> Int[Tensor, " crop"]:
    """Return the tower's crops (of every image the whole view, then its tiles) in the order in which the text reads
    them: the whole view after the tiles. Its inverse is `tower_order`."""
    order, first = [], 0
    for image in images:
        order += [*range(first + 1, first + image.n_crops), first]
        first += image.n_crops
    return torch.tensor(order, dtype=torch.long)


def tower_order(images: Sequence[TiledImage]) -> Int[Tensor, " crop"]:
    """Return crops as a processor gives them, in the text's order, in the order in which the tower takes them."""
    return torch.argsort(reading_order(images))


def _whole_views_first(
    pixels: Tensor, real: Tensor | None, images: Sequence[TiledImage]
) -> tuple[Tensor, Tensor | None]:
    """Return crops and their patches with the whole view of every image first.

    Raises:
        ValueError: the tokens stand for another number of crops.
    """
    order = tower_order(images).to(pixels.device)
    if len(order) != len(pixels):
        raise ValueError(
            f"The image tokens stand for {len(order)} tiles, and {len(pixels)} were given (tiles of zeros are padding "
            "and do not count). Use the checkpoint's own processor, one image for each placeholder."
        )
    return pixels[order], None if real is None else real[order]


def crops_of(vision: VisionConfig, pixel_values: Any, extras: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Return (pixels [crop channel height width], real patches [crop patch]) of a processor's tensors, in its order.

    Crops that are zero everywhere are padding and left out. Real patches are None if every crop is whole.

    Args:
        vision: the tower's configuration.
        pixel_values: [rows tiles channel height width].
        extras: the processor's further tensors; pixel_attention_mask marks real pixels.

    Raises:
        ValueError: the tensors have another shape, or the mask of a crop leaves nothing of it.
    """
    size = crop_shape(vision)
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
        raise ValueError(f"pixel_attention_mask leaves no image at the top left of tiles {bad}: pad on the right.")
    return flat[exists], None if bool(real.all()) else real.flatten(1)


# --- which tiles belong to one image -----------------------------------------------------------------------
LONGEST_NAME = 24  # tokens of "<row_6_col_6>", one per character, and to spare


@dataclass(frozen=True)
class _Tile:
    """The tokens of one tile: its first and one past the last, the place of F before it and the name in between."""

    start: int
    stop: int
    fake: int | None
    name: tuple[int, ...]


def tile_grids(tokens: Sequence[int], image_token_id: int, size: int) -> list[Size]:
    """Return the tiles (rows, columns) of each image of one row of tokens; (0, 0) for an image that is not cut.

    Args:
        tokens: the row's real tokens.
        image_token_id: the id of image tokens.
        size: image tokens per tile.

    Raises:
        ValueError: a run of image tokens is not a whole number of tiles.
    """
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
    """Return the place of the first token of every tile."""
    starts: list[int] = []
    run = 0
    for at, token in enumerate([*tokens, None]):
        if token == image_token_id:
            run += 1
            continue
        if run % size:
            raise ValueError(
                f"A run of {run} image tokens is not a whole number of tiles: each fills {size} in this model. "
                "Processor and checkpoint do not match (image_seq_len), or the prompt was not made by the processor."
            )
        starts += range(at - run, at, size)
        run = 0
    return starts


def _tile(tokens: Sequence[int], start: int, stop: int, after: int, fake: int) -> _Tile:
    """Return a tile with what stands before it, no further back than `after`, where the tile before it ends."""
    for at in range(start - 1, max(after, start - 1 - LONGEST_NAME) - 1, -1):
        if tokens[at] == fake:
            return _Tile(start, stop, at, tuple(tokens[at + 1 : start]))
    return _Tile(start, stop, None, ())


def _grid(tiles: Sequence[_Tile]) -> Size | None:
    """Return (rows, columns) of the tiles before a whole view, (0, 0) without any; None if they do not form a grid."""
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
