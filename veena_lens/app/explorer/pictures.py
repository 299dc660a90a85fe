"""Images that visitors give: samples by name, or uploads that are checked before they are decoded."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from veena_lens.app.explorer.programs import Made
from veena_lens.app.explorer.state import Limits
from veena_lens.app.view.panels import data_url
from veena_lens.checkpoints.files import Picture, bundled_pictures
from veena_lens.images.files import open_image
from veena_lens.images.resizing import processed_pixels

if TYPE_CHECKING:
    from veena_lens import HookedVLM

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")  # decoders of further kinds need not meet a stranger's bytes


def sample(file: str) -> Image.Image:
    """Open an image that travels with the package."""
    return next(p for p in bundled_pictures() if p.file == file).open()


@dataclass(frozen=True, kw_only=True, eq=False)
class GivenImage:
    """An image, and how Python opens it again: by a sample's name, or a file's."""

    image: Image.Image
    name: str
    is_sample: bool
    path: str = ""  # of an upload

    @property
    def made(self) -> Made:
        """Return the image with the expression that opens it."""
        if self.is_sample:
            return Made(self.image, f"sample({self.name!r})", functions=(sample,))
        return Made(self.image, repr(self.name))


@lru_cache(maxsize=1)
def samples() -> dict[str, Picture]:
    """Return sample images by a readable name."""
    chosen = [p for p in bundled_pictures() if p.context is None and p.split in ("test", "emoji", "held-out style")]
    return {f"{p.emotion}, {p.identity}": p for p in chosen}


def open_sample(name: str) -> GivenImage:
    """Open a sample by its readable name. Raises: ValueError for an unknown name."""
    found = samples().get(name)
    if found is None:
        raise ValueError(f"No sample image is named {name!r}; choose one from the list.")
    return GivenImage(image=sample(found.file), name=found.file, is_sample=True)


def open_upload(path: str, limits: Limits) -> GivenImage:
    """Open an uploaded file.

    Raises: ValueError for a file that is too large, has too many pixels, or is not an image."""
    file = Path(path)
    size = file.stat().st_size
    if size > limits.upload_bytes:
        raise ValueError(f"{file.name} has {size:,} bytes; the limit here is {limits.upload_bytes:,}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit follows
            with Image.open(file, formats=FORMATS) as header:
                pixels = header.width * header.height
    except Image.DecompressionBombError as error:
        raise ValueError(f"{file.name} has too many pixels; the limit here is {limits.pixels:,}.") from error
    except Exception as error:  # whatever a decoder says of broken bytes
        reason = str(error).replace(str(file), file.name) or type(error).__name__
        raise ValueError(f"{file.name} cannot be read as an image: {reason}. Give a PNG, JPEG or WebP.") from error
    if pixels > limits.pixels:
        raise ValueError(f"{file.name} has {pixels:,} pixels; the limit here is {limits.pixels:,}. Shrink it first.")
    try:
        image = open_image(file)
    except MemoryError:
        raise
    except Exception as error:
        reason = str(error).replace(str(file), file.name) or type(error).__name__
        named = reason if file.name in reason else f"{file.name} cannot be read as an image: {reason}"
        raise ValueError(f"{named.rstrip('.')}. Give a PNG, JPEG or WebP.") from error
    return GivenImage(image=image, name=file.name, is_sample=False, path=str(file))


def chosen(uploads: Sequence[str] | None, sample: str | None, limits: Limits) -> list[GivenImage]:
    """Open the uploads, or else the sample. Raises: ValueError for too many, or one that cannot be read."""
    if uploads:
        if len(uploads) > limits.images:
            raise ValueError(f"{len(uploads)} images were given; the limit here is {limits.images}.")
        return [open_upload(path, limits) for path in uploads]
    return [open_sample(sample)] if sample else []


def require_processable(model: HookedVLM, pictures: Sequence[GivenImage], limits: Limits) -> None:
    """Check what a model's processor would make of a prompt's images, before it does: a narrow strip becomes large.

    Raises: ValueError for more pixels than twice the limit, which a photograph that is padded to a square may reach."""
    processor = None if model.cfg.vision is None else getattr(model.processor, "image_processor", None)
    most = 2 * max(limits.pixels, Limits().pixels)
    for picture in pictures if processor is not None else ():
        width, height = picture.image.size
        made = processed_pixels(model.cfg, processor, (height, width), is_among_several=len(pictures) > 1)
        if made > most:
            raise ValueError(
                f"{picture.name} of {width} x {height} pixels becomes {made:,} in the model's processor; the limit "
                f"here is {most:,}. Crop it to a less extreme shape."
            )


def thumbnails(pictures: Sequence[tuple[Image.Image, str]], width: int = 120) -> str:
    """Return a row of small images over their captions."""
    shown = []
    for image, caption in pictures:
        small = image.copy()
        small.thumbnail((2 * width, 2 * width))
        text = escape(caption, quote=True)
        shown.append(
            f'<figure class="veena-thumb"><img src="{data_url(small)}" alt="{text}" width="{width}">'
            f"<figcaption>{text}</figcaption></figure>"
        )
    return f'<div class="veena-thumbs">{"".join(shown)}</div>' if shown else ""
