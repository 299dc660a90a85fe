"""Read images safely, from files, bytes, arrays and Pillow's own objects: the one reader of all of them.

What cannot be read, or has an absurd size, is refused before any computing. A photograph that is read from a file or
its bytes is turned as its orientation tag says; an image in memory is what its pixels are, as for Hugging Face's
processors.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from veena_lens.images.arrays import array_image, grey_of_16_bits, grey_of_numbers

MAX_PIXELS = 100_000_000
ORIENTATION = 0x0112  # of EXIF
SHOWN = 120  # characters of a path in a message


def open_image(source: Any) -> Image.Image:
    """Open an image as RGB, transparent places on white.

    Args:
        source: as for `read_image`.

    Raises:
        TypeError, FileNotFoundError, ValueError: as `read_image`.
    """
    return to_rgb(read_image(source))


def read_image(source: Any) -> Image.Image:
    """Read an image in the mode in which it comes, so that a processor converts it in its own way.

    Grey levels of 16 bits are scaled to 8; Pillow's own conversion would cut them off at 255.

    Args:
        source: a PIL image; a path to a file or the file's bytes, whose orientation tag is applied; a data URI
            (`data:image/png;base64,...`); a dictionary of `bytes` and `path`, as undecoded data sets give it; an array
            [height width], [height width channels] or [channels height width] of bytes, 16-bit integers, or floats in
            0 .. 1 or 0 .. 255.

    Raises:
        TypeError: anything else is given.
        FileNotFoundError: there is no such file.
        ValueError: the image cannot be read, is too large, has no pixels, or its numbers have no known range.
    """
    if isinstance(source, Image.Image):
        return _loaded(source, "The image")
    if isinstance(source, np.ndarray):
        return _loaded(array_image(source), "The array")
    if isinstance(source, Mapping) and source and set(source) <= {"bytes", "path"}:
        data, path = source.get("bytes"), source.get("path")
        if data is None and path is None:
            raise ValueError("An image was given as a dictionary whose bytes and path are both None.")
        source = path if data is None else data
    if isinstance(source, (bytes, bytearray)):
        return _decoded(io.BytesIO(source), f"The image of {len(source):,} bytes")
    if isinstance(source, str) and (found := source[:SHOWN].partition(":"))[1]:
        if found[0].lower() == "data":
            return _data_uri(source)
        if found[2].startswith("//"):
            raise ValueError(
                f"{_shortened(source)} is an address; nothing is downloaded here. Give the path of a file, or open the "
                "image yourself (PIL)."
            )
    if isinstance(source, Tensor):
        raise TypeError(
            f"An image must be a PIL image or a path, not Tensor {list(source.shape)}: give raw pixels as an array, "
            "image.permute(1, 2, 0).cpu().numpy(), and a processor's pixel_values to inputs_from_hf."
        )
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(
            f"An image must be a PIL image or a path, not {type(source).__name__} (an array, the bytes of a file and a "
            "data URI are read too)."
        )
    return _decoded(_existing(source), "")


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image in RGB, transparent places on white, as Hugging Face's processors convert it."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def upright(image: Image.Image) -> Image.Image:
    """Return an image turned as its orientation tag says, without the tag; the image itself where it has none."""
    try:
        return ImageOps.exif_transpose(image) if image.getexif().get(ORIENTATION, 1) != 1 else image
    except Exception:  # a damaged tag says nothing
        return image


def _existing(source: Any) -> Path:
    """Return the path of a file that exists.

    Raises:
        FileNotFoundError: there is none.
    """
    try:
        path = Path(source).expanduser()
        if path.is_file():
            return path
        kind = " (a folder is there)" if path.is_dir() else ""
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, a home that is not known
        raise FileNotFoundError(f"No image at {_shortened(str(source))}: {_shortened(str(error))}.") from error
    raise FileNotFoundError(f"No image at {_shortened(str(path))}{kind}.")


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 20]}... ({len(text):,} characters)"


def _data_uri(uri: str) -> Image.Image:
    """Read an image that a URI holds itself."""
    head, _, body = uri.partition(",")
    kind, *settings = head[len("data:") :].lower().split(";")
    if not kind.startswith("image/") or "base64" not in settings or not body:
        raise ValueError(f"{_shortened(uri)} must begin with data:image/...;base64, and hold an image.")
    try:
        data = base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"The data URI {_shortened(head)} does not hold base64: {error}.") from error
    return _decoded(io.BytesIO(data), f"The image of the data URI ({len(data):,} bytes)")


def _decoded(file: Path | io.BytesIO, what: str) -> Image.Image:
    """Decode a file and turn it upright; `what` names it in messages."""
    what = what or str(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit follows
            image = Image.open(file)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{what} is too large: {error}. The limit is {MAX_PIXELS:,} pixels; shrink it.") from error
    except Exception as error:  # decoders answer broken bytes in as many ways as there are formats
        known = isinstance(file, Path) or not isinstance(error, UnidentifiedImageError)
        reason = error if known else "it is in no format that Pillow knows"
        raise ValueError(f"{what} cannot be read as an image: {reason}") from error
    with image:
        _require_size(image, what)
        try:
            image.load()
            turned = upright(image)
            whole = image.copy() if turned is image else turned  # independent of the file, which is closed here
        except Exception as error:
            raise ValueError(f"{what} cannot be read as an image: {error}") from error
    return _in_8_bits(whole, what)


def _loaded(image: Image.Image, what: str) -> Image.Image:
    """Return a PIL image with what a lazily opened file still holds."""
    _require_size(image, what)
    try:
        image.load()
    except Exception as error:  # Pillow answers closed and verified images in as many ways as there are formats
        reason = f"{error}".strip() or "it was closed, or verify() has used it up; open it again"
        raise ValueError(f"{what} cannot be read: {reason}") from error
    return _in_8_bits(image, what)


def _in_8_bits(image: Image.Image, what: str) -> Image.Image:
    """Return an image whose grey levels have 8 bits; others as they are."""
    if image.mode.startswith("I;16"):
        return grey_of_16_bits(np.asarray(image), image.info.get("transparency"))
    if image.mode in ("I", "F"):
        return grey_of_numbers(np.asarray(image), f"{what} (mode {image.mode})")
    return image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode]) if image.mode in ("La", "RGBa") else image


def _require_size(image: Image.Image, what: str) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise ValueError(f"{what} has no pixels ({width} x {height}).")
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{what} has {width} x {height} = {width * height:,} pixels; the limit is {MAX_PIXELS:,}. Shrink it first."
        )
