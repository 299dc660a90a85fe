"""Make images of arrays: where the axes or the range of the numbers leave a doubt, the array is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

CHANNELS = (1, 3, 4)


def array_image(array: np.ndarray) -> Image.Image:
    """Return an array as an image of mode L, RGB or RGBA.

    Args:
        array: [height width], [height width channels] or [channels height width] with 1, 3 or 4 channels; a leading
            batch axis of length 1 is dropped. Bytes, booleans, integers in 0 .. 255, 16-bit integers, floats in
            0 .. 1 or 0 .. 255.

    Raises:
        ValueError: the array has another shape or none that is certain, no pixels, or numbers of an unknown range.
    """
    levels = _levels(_channels_last(array), f"An array {list(array.shape)} of {array.dtype}")
    return Image.fromarray(levels[..., 0] if levels.ndim == 3 and levels.shape[-1] == 1 else levels)


def grey_of_16_bits(levels: np.ndarray, transparent: Any = None) -> Image.Image:
    """Return grey levels 0 .. 65,535 as an image of 8 bits, with transparency where they equal `transparent`."""
    grey = Image.fromarray(_of_16_bits(levels))
    if isinstance(transparent, int):
        shown = np.where(levels == transparent, 0, 255).astype(np.uint8)
        return Image.merge("LA", (grey, Image.fromarray(shown)))
    return grey


def grey_of_numbers(levels: np.ndarray, what: str) -> Image.Image:
    """Return grey levels in integers or floats as an image of 8 bits. Raises: ValueError for an unknown range."""
    if levels.dtype.kind != "f" and levels.size and 255 < levels.max() <= 65_535 and levels.min() >= 0:
        return Image.fromarray(_of_16_bits(levels))  # as Pillow before version 10 opens files of 16 bits
    return Image.fromarray(_levels(levels, what))


def _of_16_bits(levels: np.ndarray) -> np.ndarray:
    return ((levels.astype(np.uint32) * 255 + 32_767) // 65_535).astype(np.uint8)


def _channels_last(array: np.ndarray) -> np.ndarray:
    """Return an array with its channels last. Raises: ValueError for another shape, or two axes that may be it."""
    shape = list(array.shape)
    if array.ndim == 4 and shape[0] == 1:
        array = array[0]
    if array.ndim > 3:
        raise ValueError(f"An image must be one array of at most 3 axes, not {shape}: give a list, one per image.")
    if array.ndim < 2 or 0 in array.shape:
        raise ValueError(f"An array {shape} has no pixels: an image is [height width channels].")
    if array.ndim == 2:
        return array
    first, last = array.shape[0] in CHANNELS, array.shape[-1] in CHANNELS
    if first == last:
        which = "both its first and its last axis may be" if first else "neither its first nor its last axis is"
        raise ValueError(
            f"An array {shape}: {which} that of 1, 3 or 4 channels. Give a PIL image: Image.fromarray(array) takes "
            "bytes [height width channels]."
        )
    return np.moveaxis(array, 0, -1) if first else array


def _levels(array: np.ndarray, what: str) -> np.ndarray:
    """Return numbers as bytes 0 .. 255. Raises: ValueError where their range is not certain."""
    kind = array.dtype.kind
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if kind == "b":
        return array.astype(np.uint8) * 255
    if kind not in "iuf":
        raise ValueError(f"{what} does not hold numbers; an image holds bytes 0 .. 255, or floats 0 .. 1.")
    if not np.isfinite(array).all():
        raise ValueError(f"{what} holds numbers that are not finite (NaN or infinity).")
    least, most = array.min(), array.max()
    if array.dtype == np.uint16 and most > 255:
        return _of_16_bits(array)
    if least < 0 or most > 255:
        raise ValueError(
            f"{what} holds numbers from {least:g} to {most:g}; an image holds bytes 0 .. 255, or floats 0 .. 1. "
            "Values that a processor has normalised go to inputs_from_hf."
        )
    if (array.dtype == np.uint16 and most > 0) or (kind == "f" and 1 < most < 2):
        raise ValueError(
            f"{what} reaches only {most:g}: its range may be 0 .. 255 or {'0 .. 1' if kind == 'f' else '0 .. 65,535'}. "
            "Scale it to bytes 0 .. 255 (uint8)."
        )
    scaled = array * 255.0 if kind == "f" and most <= 1 else array
    return np.rint(scaled).astype(np.uint8)
