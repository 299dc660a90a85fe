"""How pictures fill image tokens: a fixed number each, tiles packed together or apart, or patches of any size.

Given a processor's pixel tensors and the token counts of each row, says which row owns which picture, how many
tokens each image fills, and which of them are the cells of its grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from veena_lens.checkpoints.any_size import Source, match_tokens
from veena_lens.checkpoints.tiled import in_tower_order, tile_grids, tiles_of
from veena_lens.config import HookedVLMConfig
from veena_lens.inputs import is_any_of
from veena_lens.vision.packing import layout_of
from veena_lens.vision.positions import multimodal_positions
from veena_lens.vision.tiles import TileLayout


@dataclass(frozen=True, eq=False)
class ImageSet:
    """The images of a batch. `lengths`, `grids` and `places` have one entry a row and, in it, one an image.

    Pictures of any size bring `picture_grids` and the `positions` of all tokens in three streams."""

    pixels: Tensor | None
    picture_rows: Tensor | None
    image_rows: Tensor | None
    lengths: list[list[int]]
    grids: tuple[tuple[tuple[int, int], ...], ...]
    places: tuple[tuple[tuple[int, ...], ...], ...]
    extras: dict[str, Tensor] = field(default_factory=dict)
    tiles: tuple[tuple[tuple[int, ...], ...], ...] = ()
    picture_images: Tensor | None = None
    picture_grids: Tensor | None = None
    patch_mask: Tensor | None = None
    positions: Tensor | None = None


@dataclass(frozen=True)
class _Image:
    """What one image fills."""

    n_tokens: int
    grid: tuple[int, int]
    places: tuple[int, ...]
    n_pictures: int = 1
    tiles: tuple[int, ...] = ()


def arrange_images(
    cfg: HookedVLMConfig, tokens: Tensor, mask: Tensor, pixel_values: Any, extras: Mapping[str, Any]
) -> ImageSet:
    """The images of a batch of tokens [batch pos].

    Raises: ValueError when pictures and tokens do not fit, or a picture has a size that the tower does not take."""
    counts = (is_any_of(tokens, cfg.image_token_ids) & mask).sum(-1).tolist()
    given = [extras.get(key) for key in ("image_grid_thw", "pixel_values_videos", "video_grid_thw")]
    if pixel_values is None and (cfg.image_layout != "dynamic" or all(x is None for x in given)):
        if sum(counts):
            ids = ", ".join(map(str, cfg.image_token_ids))
            raise ValueError(f"The prompt holds {sum(counts)} image tokens (id {ids}) but no picture was given.")
        none: tuple[tuple[Any, ...], ...] = ((),) * len(counts)
        return ImageSet(None, None, None, [[] for _ in counts], none, none)
    if cfg.image_layout == "dynamic":
        return _of_any_size(cfg, tokens, mask, pixel_values, extras)
    if cfg.image_layout == "tiles":
        return _in_tiles(cfg, tokens, mask, pixel_values, extras)
    pixels = torch.as_tensor(pixel_values)
    if cfg.image_layout == "anyres":
        images, pixels, kept = _anyres(cfg, pixels, extras)
    else:
        images, kept = [_fixed(cfg)] * _require_pixels(cfg, pixels), {}
    owners = _owners(images, counts)
    rows = [[image for image, owner in zip(images, owners, strict=True) if owner == row] for row in range(len(counts))]
    return ImageSet(
        pixels,
        torch.tensor([o for image, o in zip(images, owners, strict=True) for _ in range(image.n_pictures)]),
        torch.tensor(owners, dtype=torch.long),
        [[image.n_tokens for image in row] for row in rows],
        tuple(tuple(image.grid for image in row) for row in rows),
        tuple(tuple(image.places for image in row) for row in rows),
        kept,
        tuple(tuple(image.tiles for image in row) for row in rows) if cfg.image_layout == "anyres" else (),
        torch.tensor([i for row in rows for i, image in enumerate(row) for _ in range(image.n_pictures)]),
    )


def _fixed(cfg: HookedVLMConfig) -> _Image:
    assert cfg.vision is not None
    n, (height, width) = cfg.vision.n_features, cfg.vision.grid
    first = n - height * width  # a class token stands first; a strategy that drops a patch leaves no whole grid
    return _Image(n, (height, width), tuple(range(first, n)) if first >= 0 else ())


def _anyres(
    cfg: HookedVLMConfig, pixels: Tensor, extras: Mapping[str, Any]
) -> tuple[list[_Image], Tensor, dict[str, Tensor]]:
    sizes = extras.get("image_sizes")
    if sizes is None:
        raise ValueError("Any-resolution pictures need image_sizes, (height, width) of each original picture.")
    sizes = torch.as_tensor(sizes).long().reshape(-1, 2)
    if pixels.ndim != 5 or len(pixels) != len(sizes):
        raise ValueError(
            f"pixel_values must be [images tiles channel height width] for {len(sizes)} image_sizes, not "
            f"{list(pixels.shape)}; the checkpoint's own processor makes them so."
        )
    layouts = [layout_of(cfg, size) for size in sizes.tolist()]
    tiles = []
    for image, layout in zip(pixels, layouts, strict=True):
        if layout.n_tiles > len(image):
            raise ValueError(
                f"A picture of {layout.picture[1]} x {layout.picture[0]} pixels needs {layout.n_tiles} tiles; "
                f"pixel_values hold {len(image)}. Processor and checkpoint do not match (image_grid_pinpoints)."
            )
        tiles.append(image[: layout.n_tiles])
    flat = torch.cat(tiles)
    _require_pixels(cfg, flat)
    images = [
        _Image(x.n_tokens, (x.rows, x.cols), tuple(x.grid_places()), x.n_tiles, tuple(x.token_tiles())) for x in layouts
    ]
    return images, flat, {"image_sizes": sizes}


def _of_any_size(
    cfg: HookedVLMConfig, tokens: Tensor, mask: Tensor, pixel_values: Any, extras: Mapping[str, Any]
) -> ImageSet:
    assert cfg.vision is not None
    merge = cfg.vision.merge_size
    sources = [
        Source("image", cfg.image_token_id, pixel_values, extras.get("image_grid_thw"), False),
        Source(
            "video",
            cfg.video_token_id,
            extras.get("pixel_values_videos"),
            extras.get("video_grid_thw"),
            cfg.video_frames_apart,
        ),
    ]
    found = match_tokens(cfg.vision, tokens, mask, sources)
    frames = [frame for row in found.frames for frame in row]
    owners = torch.tensor([i for i, row in enumerate(found.frames) for _ in row], dtype=torch.long)
    return ImageSet(
        pad_sequence([frame.patches for frame in frames], batch_first=True),
        owners,
        owners,
        [[frame.grid[0] * frame.grid[1] // merge**2 for frame in row] for row in found.frames],
        tuple(tuple((frame.grid[0] // merge, frame.grid[1] // merge) for frame in row) for row in found.frames),
        (),
        picture_images=torch.tensor([i for row in found.frames for i in range(len(row))]),
        picture_grids=torch.tensor([frame.grid for frame in frames]),
        positions=multimodal_positions(mask, found.groups),
    )


def _in_tiles(
    cfg: HookedVLMConfig, tokens: Tensor, mask: Tensor, pixel_values: Any, extras: Mapping[str, Any]
) -> ImageSet:
    assert cfg.vision is not None and cfg.image_token_id is not None
    pixels, real = tiles_of(cfg.vision, pixel_values, extras)
    size = cfg.vision.n_features
    grids = [tile_grids(row[keep].tolist(), cfg.image_token_id, size) for row, keep in zip(tokens, mask, strict=True)]
    flat = torch.tensor([grid for row in grids for grid in row], dtype=torch.long).reshape(-1, 2)
    pixels, real = in_tower_order(pixels, real, flat)
    rows = [[TileLayout(tiles=grid, side=cfg.vision.token_grid[0]) for grid in row] for row in grids]
    if not len(flat):  # padding and nothing else
        none: tuple[tuple[Any, ...], ...] = ((),) * len(rows)
        return ImageSet(None, None, None, [[] for _ in rows], none, none)
    owned = [(i, image) for i, row in enumerate(rows) for image, x in enumerate(row) for _ in range(x.n_tiles)]
    return ImageSet(
        pixels,
        torch.tensor([row for row, _ in owned]),
        torch.tensor([i for i, row in enumerate(rows) for _ in row]),
        [[x.n_tokens for x in row] for row in rows],
        tuple(tuple(x.grid for x in row) for row in rows),
        tuple(tuple(tuple(x.grid_places()) for x in row) for row in rows),
        {"tile_grids": flat},
        tuple(tuple(tuple(x.token_tiles()) for x in row) for row in rows),
        torch.tensor([image for _, image in owned]),
        patch_mask=real,
    )


def _owners(images: Sequence[_Image], counts: Sequence[int]) -> list[int]:
    """The row of each image, in reading order. Raises: ValueError when they do not fill the rows exactly."""
    owners, at = [], 0
    for row, count in enumerate(counts):
        filled = 0
        while filled < count and at < len(images):
            filled += images[at].n_tokens
            owners.append(row)
            at += 1
        if filled != count:
            break
    if at != len(images) or sum(image.n_tokens for image in images) != sum(counts):
        each = sorted({image.n_tokens for image in images})
        fill = f"a picture of this model fills {each[0]}" if len(each) == 1 else f"the pictures fill {each}"
        raise ValueError(
            f"Rows hold {list(counts)} image tokens; {fill}, and {len(images)} pictures were given. Use the "
            "checkpoint's own processor, one picture for each placeholder."
        )
    return owners


def _require_pixels(cfg: HookedVLMConfig, pixels: Tensor) -> int:
    """The number of pictures. Raises: ValueError for a size that the tower does not take."""
    assert cfg.vision is not None
    want = (cfg.vision.n_channels, cfg.vision.image_size, cfg.vision.image_size)
    if pixels.ndim != 4 or tuple(pixels.shape[1:]) != want or not pixels.is_floating_point():
        raise ValueError(
            f"pixel_values must be floats [pictures {want[0]} {want[1]} {want[2]}], not {pixels.dtype} "
            f"{list(pixels.shape)}; the checkpoint's own processor makes them so."
        )
    return len(pixels)
