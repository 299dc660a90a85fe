"""Opening pictures safely, and where each image token lies in the original picture.

A path that cannot be read, or a picture of absurd size, stops before any computing. The boxes undo what the
image processor did: resizing, padding to a square, centre crop.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

MAX_PIXELS = 100_000_000


def open_picture(source: Any) -> Image.Image:
    """A picture as RGB: a PIL image, or a path to one (its orientation tag applied).

    Raises: TypeError for anything else; FileNotFoundError; ValueError for what cannot be read or is too large."""
    if isinstance(source, Image.Image):
        _require_size(source, "The picture")
        try:
            return source.convert("RGB")  # reads what a lazily opened file still holds
        except (OSError, SyntaxError) as error:
            raise ValueError(f"The picture cannot be read: {error}") from error
    if not isinstance(source, (str, Path)):
        raise TypeError(f"A picture must be a PIL image or a path, not {type(source).__name__}.")
    path = Path(source).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"No picture at {path}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit follows
            with Image.open(path) as picture:
                _require_size(picture, str(path))
                return ImageOps.exif_transpose(picture).convert("RGB")
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} is too large: {error}. The limit is {MAX_PIXELS:,} pixels; shrink it.") from error
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error


def _require_size(picture: Image.Image, what: str) -> None:
    width, height = picture.size
    if width < 1 or height < 1:
        raise ValueError(f"{what} has no pixels ({width} x {height}).")
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{what} has {width} x {height} = {width * height:,} pixels; the limit is {MAX_PIXELS:,}. Shrink it first."
        )


def patch_boxes(
    size: tuple[int, int], image_processor: Any, patch_size: int, grid: tuple[int, int]
) -> Float[Tensor, "n_tokens 4"]:
    """(left, top, right, bottom) of every cell of a fixed grid in pixels of the original picture.

    size: (width, height) of the original. Parts of a cell that lie in padding are cut off."""
    width, height = size
    scale_x = scale_y = 1.0
    off_x = off_y = 0.0
    if getattr(image_processor, "do_pad", False) and type(image_processor).__name__.startswith("Llava"):
        side = max(width, height)
        off_x, off_y = (side - width) // 2, (side - height) // 2
        padded = (side, side)
    else:
        padded = (width, height)
    resized = padded
    if getattr(image_processor, "do_resize", False):
        resized = _resized(padded, image_processor.size)
        scale_x, scale_y = resized[0] / padded[0], resized[1] / padded[1]
    crop_x = crop_y = 0
    if getattr(image_processor, "do_center_crop", False):
        crop = pair_of(image_processor.crop_size)
        crop_x, crop_y = (resized[0] - crop[0]) // 2, (resized[1] - crop[1]) // 2
    rows, cols = grid
    step = patch_size
    out = torch.empty(rows * cols, 4)
    for i in range(rows * cols):
        y, x = divmod(i, cols)
        box = [x * step + crop_x, y * step + crop_y, (x + 1) * step + crop_x, (y + 1) * step + crop_y]
        left, right = (b / scale_x - off_x for b in (box[0], box[2]))
        top, bottom = (b / scale_y - off_y for b in (box[1], box[3]))
        out[i] = torch.tensor([left, top, right, bottom])
    limit = torch.tensor([width, height, width, height], dtype=out.dtype)
    return out.clamp(min=0).minimum(limit)


def _getter(size: Any) -> Any:
    """Sizes are dictionaries or objects, by version of transformers."""
    return size.get if hasattr(size, "get") else lambda key: getattr(size, key, None)


def pair_of(size: Any) -> tuple[int, int]:
    """(width, height) of a size entry of an image processor."""
    get = _getter(size)
    if get("height") and get("width"):
        return int(get("width")), int(get("height"))
    side = get("shortest_edge")
    return int(side), int(side)


def _resized(size: tuple[int, int], target: Any) -> tuple[int, int]:
    """(width, height) after the processor's resize."""
    get = _getter(target)
    if get("height") and get("width"):
        return int(get("width")), int(get("height"))
    side = int(get("shortest_edge"))
    width, height = size
    if width <= height:
        return side, int(side * height / width)
    return int(side * width / height), side
