"""Opening image files safely: one that cannot be read, or of absurd size, is refused before any computing."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 100_000_000


def open_image(source: Any) -> Image.Image:
    """Open an image as RGB.

    Args:
        source: a PIL image, or a path to one, whose orientation tag is applied.

    Raises:
        TypeError: anything else is given.
        FileNotFoundError: there is no such file.
        ValueError: the image cannot be read, or is too large.
    """
    if isinstance(source, Image.Image):
        _require_size(source, "The image")
        try:
            return source.convert("RGB")  # reads what a lazily opened file still holds
        except (OSError, SyntaxError) as error:
            raise ValueError(f"The image cannot be read: {error}") from error
    if not isinstance(source, (str, Path)):
        raise TypeError(f"An image must be a PIL image or a path, not {type(source).__name__}.")
    path = Path(source).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"No image at {path}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit follows
            with Image.open(path) as image:
                _require_size(image, str(path))
                return ImageOps.exif_transpose(image).convert("RGB")
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} is too large: {error}. The limit is {MAX_PIXELS:,} pixels; shrink it.") from error
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def _require_size(image: Image.Image, what: str) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise ValueError(f"{what} has no pixels ({width} x {height}).")
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{what} has {width} x {height} = {width * height:,} pixels; the limit is {MAX_PIXELS:,}. Shrink it first."
        )
