"""Pictures cut into tiles (LLaVA-1.6, LLaVA-OneVision), and which tokens they fill.

A processor gives the tiles of every image, padded to the most of any, with the images' original sizes; where images
that share a prompt are one tile each, it says how many each prompt has. Videos come as frames. Images and videos
may alternate in a row, so tokens are walked in reading order and take the next of their own kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from veena_lens.config import HookedVLMConfig
from veena_lens.images.packing import AMONG_SEVERAL, FRAME, LAST_FRAME, TILED, Arrangement, layout_of


@dataclass(frozen=True, eq=False)
class Tiles:
    """An image or a frame: its pixels [tile channel height width], layout, and how it is seen (`images.packing`)."""

    pixels: Tensor
    layout: Arrangement
    kind: int


def rows_of_tiles(
    cfg: HookedVLMConfig, tokens: Tensor, mask: Tensor, pixel_values: Any, extras: Mapping[str, Any]
) -> list[list[Tiles]]:
    """The images and frames of every row of tokens [batch pos], in reading order.

    Raises: ValueError when pixels, sizes and tokens do not fit."""
    waiting = {cfg.image_token_id: [[image] for image in _images(cfg, pixel_values, extras)]}
    if cfg.video_token_id is not None:
        waiting[cfg.video_token_id] = _videos(cfg, extras.get("pixel_values_videos"))
    given = {token: [sum(part.layout.n_tokens for part in whole) for whole in mine] for token, mine in waiting.items()}
    rows = []
    for row, keep in zip(tokens, mask, strict=True):
        found, left, kind = [], 0, None
        for token in (t for t in row[keep].tolist() if t in waiting):
            if not left:
                if not waiting[token]:
                    _refuse(cfg, tokens, mask, given)
                whole, kind = waiting[token].pop(0), token
                left = sum(part.layout.n_tokens for part in whole)
                found += whole
            if token != kind:
                _refuse(cfg, tokens, mask, given)
            left -= 1
        if left:
            _refuse(cfg, tokens, mask, given)
        rows.append(found)
    if any(waiting.values()):
        _refuse(cfg, tokens, mask, given)
    return rows


def _refuse(cfg: HookedVLMConfig, tokens: Tensor, mask: Tensor, given: Mapping[int | None, Sequence[int]]) -> NoReturn:
    """Raises: ValueError naming the tokens of every row and what the pictures fill."""
    parts = []
    for token, filled in given.items():
        kind = "video" if token == cfg.video_token_id else "image"
        counts = ((tokens == token) & mask).sum(-1).tolist()
        if filled or any(counts):
            parts.append(f"Rows hold {counts} {kind} tokens; the {len(filled)} pictures given as {kind}s fill {filled}")
    raise ValueError(
        f"{'. '.join(parts)}. Use the checkpoint's own processor, one picture for each placeholder"
        + (", and pass on its batch_num_images." if cfg.tiles_single_images_only else ".")
    )


def _images(cfg: HookedVLMConfig, pixel_values: Any, extras: Mapping[str, Any]) -> list[Tiles]:
    """The images, the tiles that pad them left out."""
    if pixel_values is None:
        return []
    pixels, sizes = torch.as_tensor(pixel_values), extras.get("image_sizes")
    if sizes is None:
        raise ValueError("Any-resolution pictures need image_sizes, (height, width) of each original picture.")
    sizes = torch.as_tensor(sizes).long().reshape(-1, 2)
    if pixels.ndim != 5 or len(pixels) != len(sizes):
        raise ValueError(
            f"pixel_values must be [images tiles channel height width] for {len(sizes)} image_sizes, not "
            f"{list(pixels.shape)}; the checkpoint's own processor makes them so."
        )
    kinds = _kinds(extras.get("batch_num_images"), len(sizes))
    images = []
    for image, size, kind in zip(pixels, sizes.tolist(), kinds, strict=True):
        layout = layout_of(cfg, size, kind)
        if layout.n_tiles > len(image):
            raise ValueError(
                f"A picture of {size[1]} x {size[0]} pixels needs {layout.n_tiles} tiles; pixel_values hold "
                f"{len(image)}. Processor and checkpoint do not match (image_grid_pinpoints)"
                + (", or batch_num_images was left out." if cfg.tiles_single_images_only else ".")
            )
        images.append(Tiles(image[: layout.n_tiles], layout, kind))
    return images


def _kinds(batch_num_images: Any, n_images: int) -> list[int]:
    """How each image is seen, given how many each prompt has; without that all are cut into tiles."""
    if batch_num_images is None:
        return [TILED] * n_images
    counts = torch.as_tensor(batch_num_images).flatten().tolist()
    if sum(counts) != n_images or min(counts, default=0) < 0:
        raise ValueError(
            f"batch_num_images {counts} must add up to the {n_images} pictures of pixel_values: the number of each "
            "prompt's pictures."
        )
    return [TILED if n == 1 else AMONG_SEVERAL for n in counts for _ in range(n)]


def _videos(cfg: HookedVLMConfig, pixel_values: Any) -> list[list[Tiles]]:
    """The frames of each video; their original size is not known and stands as the tower's."""
    if pixel_values is None:
        return []
    pixels = torch.as_tensor(pixel_values)
    if pixels.ndim != 5 or not pixels.shape[1]:
        raise ValueError(
            f"pixel_values_videos must be [videos frames channel height width], not {list(pixels.shape)}; videos of "
            "one batch have the same number of frames."
        )
    assert cfg.vision is not None
    size, n = [cfg.vision.image_size] * 2, pixels.shape[1]
    kinds = [FRAME] * (n - 1) + [LAST_FRAME]
    return [
        [Tiles(video[i : i + 1], layout_of(cfg, size, kind), kind) for i, kind in enumerate(kinds)] for video in pixels
    ]
