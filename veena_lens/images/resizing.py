"""How many pixels an image processor holds at once for an image, counted from sizes alone, before any are made.

A small image may become a large one: a narrow strip whose shorter edge is stretched to the tower's, or that is padded
to a square. What is counted here is the largest array on the way, per kind of layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from veena_lens.config import HookedVLMConfig
from veena_lens.images.base import Size
from veena_lens.images.canvas import best_canvas
from veena_lens.images.files import MAX_PIXELS

SIZES = ("size", "crop_size", "max_image_size", "pad_size")
NUMBERS = ("patch_size", "merge_size", "temporal_patch_size", "min_pixels", "max_pixels")
LARGEST_EDGE = 4096  # beyond which Idefics3's processor never stretches an image


def require_processable(
    cfg: HookedVLMConfig, image_processor: Any, size: Size, *, is_among_several: bool = False, what: str = "The image"
) -> None:
    """Check that a processor can make of an image what the model reads, within the limit of pixels.

    Args:
        cfg: the model's configuration.
        image_processor: the checkpoint's own.
        size: (height, width) of the image in pixels.
        is_among_several: whether its prompt has further images, which some models then pad to squares.
        what: names the image in messages.

    Raises:
        ValueError: the processor's sizes are not positive, or it would hold more than `MAX_PIXELS` pixels.
    """
    require_sizes(image_processor)
    held = processed_pixels(cfg, image_processor, size, is_among_several=is_among_several)
    if held > MAX_PIXELS:
        settings = {name: _entries(getattr(image_processor, name, None)) for name in SIZES[:3]}
        told = ", ".join(f"{name}={value}" for name, value in settings.items() if value)
        raise ValueError(
            f"{what} of {size[1]} x {size[0]} pixels becomes {held:,} in the processor ({told}); the limit is "
            f"{MAX_PIXELS:,}. Give it a less extreme shape, or use the processor of this checkpoint."
        )


def require_sizes(image_processor: Any) -> None:
    """Check that every size which a processor has is a positive whole number.

    Raises:
        ValueError: naming the others.
    """
    found: dict[str, Any] = {name: getattr(image_processor, name, None) for name in NUMBERS}
    for name in SIZES:
        found |= {f"{name}[{key!r}]": value for key, value in _entries(getattr(image_processor, name, None)).items()}
    for name, value in found.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(
                f"The image processor has {name}={value!r}; it must be a whole number of at least 1. Use the processor "
                "of this checkpoint."
            )


def processed_pixels(cfg: HookedVLMConfig, image_processor: Any, size: Size, *, is_among_several: bool = False) -> int:
    """Return the number of pixels of the largest array that a processor makes of an image, itself included.

    Args:
        cfg: the model's configuration.
        image_processor: the checkpoint's own.
        size: (height, width) of the image in pixels, at least 1 each.
        is_among_several: whether its prompt has further images.
    """
    count = KINDS.get(cfg.image_layout, _fixed)  # a layout of another package: what its processor resizes to
    sizes = [size, *count(cfg, image_processor, size, is_among_several)]
    return max(height * width for height, width in sizes)


def _fixed(cfg: HookedVLMConfig, image_processor: Any, size: Size, is_among_several: bool) -> list[Size]:
    sizes = [size]
    if getattr(image_processor, "do_pad", False) and type(image_processor).__name__.startswith("Llava"):
        sizes.append((max(size), max(size)))
    if getattr(image_processor, "do_resize", False):
        sizes.append(_resized(sizes[-1], _entries(getattr(image_processor, "size", None))))
    return [*sizes, *_crops(image_processor)]


def _anyres(cfg: HookedVLMConfig, image_processor: Any, size: Size, is_among_several: bool) -> list[Size]:
    if is_among_several and cfg.tiles_single_images_only:
        return [(max(size), max(size)), *_crops(image_processor)]
    pinpoints = getattr(image_processor, "image_grid_pinpoints", None) or cfg.image_pinpoints
    wanted = _entries(getattr(image_processor, "size", None))
    side = wanted.get("shortest_edge") or 1
    view = (wanted.get("height") or side, wanted.get("width") or side)
    return [best_canvas(size, [(height, width) for height, width in pinpoints]), view, *_crops(image_processor)]


def _tiles(cfg: HookedVLMConfig, image_processor: Any, size: Size, is_among_several: bool) -> list[Size]:
    edge = _entries(getattr(image_processor, "max_image_size", None)).get("longest_edge") or 1
    resized = size
    if getattr(image_processor, "do_resize", False):
        resized = _resized(size, _entries(getattr(image_processor, "size", None)))
    sizes = [resized, (edge, edge)]
    if getattr(image_processor, "do_image_splitting", False):
        height, width = resized
        if width >= height:
            columns = math.ceil(width / edge) * edge
            rows = math.ceil(max(int(columns * height / width), 1) / edge) * edge
        else:
            rows = math.ceil(height / edge) * edge
            columns = math.ceil(max(int(rows * width / height), 1) / edge) * edge
        sizes.append((rows, columns))
    return sizes


def _dynamic(cfg: HookedVLMConfig, image_processor: Any, size: Size, is_among_several: bool) -> list[Size]:
    wanted, (height, width) = _entries(getattr(image_processor, "size", None)), size
    least, most = wanted.get("shortest_edge") or 1, wanted.get("longest_edge") or math.inf
    unit = (getattr(image_processor, "patch_size", None) or 1) * (getattr(image_processor, "merge_size", None) or 1)
    scale = 1.0
    if height * width > most:
        scale = math.sqrt(most / (height * width))
    elif height * width < least:
        scale = math.sqrt(least / (height * width))
    return [(math.ceil(height * scale / unit) * unit, math.ceil(width * scale / unit) * unit)]


KINDS: dict[str, Callable[[HookedVLMConfig, Any, Size, bool], list[Size]]] = {
    "fixed": _fixed,
    "anyres": _anyres,
    "tiles": _tiles,
    "dynamic": _dynamic,
}


def _crops(image_processor: Any) -> list[Size]:
    if not getattr(image_processor, "do_center_crop", False):
        return []
    crop = _entries(getattr(image_processor, "crop_size", None))
    side = crop.get("shortest_edge") or 1
    return [(crop.get("height") or side, crop.get("width") or side)]


def _resized(size: Size, wanted: Mapping[str, int]) -> Size:
    """Return (height, width) after a resize to edges or to a fixed size."""
    (height, width), short, long = size, wanted.get("shortest_edge"), wanted.get("longest_edge")
    if wanted.get("height") and wanted.get("width"):
        return wanted["height"], wanted["width"]
    scale = 1.0
    if short:
        scale = short / min(size)
    if long and (not short or max(size) * scale > long):
        scale = min(long, LARGEST_EDGE if not short else long) / max(size)
    return max(int(height * scale), 1), max(int(width * scale), 1)


def _entries(size: Any) -> dict[str, Any]:
    """Return a size as a dictionary; it is one, or an object of its kind, or a number."""
    if size is None:
        return {}
    if isinstance(size, int):
        return {"shortest_edge": size}
    return {key: value for key, value in dict(size).items() if value is not None}
