"""Pictures that visitors give: samples by name, or uploads that are checked before they are decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from pathlib import Path

from PIL import Image

from veena_lens.app.explorer.state import Limits
from veena_lens.app.view.panels import data_url
from veena_lens.checkpoints.files import Picture, bundled_pictures
from veena_lens.images.files import open_image


@dataclass(frozen=True, kw_only=True, eq=False)
class Shown:
    """An image, and how Python gets at it again: a sample's name, or a file's."""

    image: Image.Image
    name: str
    is_sample: bool

    @property
    def code(self) -> str:
        """An expression that opens it."""
        return f"sample({self.name!r})" if self.is_sample else repr(self.name)


@lru_cache(maxsize=1)
def samples() -> dict[str, Picture]:
    """Sample images by a readable name."""
    chosen = [p for p in bundled_pictures() if p.context is None and p.split in ("test", "emoji", "held-out style")]
    return {f"{p.emotion}, {p.identity}": p for p in chosen}


def open_sample(name: str) -> Shown:
    """Raises: ValueError for a name that there is not."""
    found = samples().get(name)
    if found is None:
        raise ValueError(f"No sample image {name!r}.")
    return Shown(image=found.open(), name=found.file, is_sample=True)


def open_upload(path: str, limits: Limits) -> Shown:
    """An uploaded file as an image.

    Raises: ValueError for a file that is too large, too many pixels, or no image."""
    file = Path(path)
    size = file.stat().st_size
    if size > limits.upload_bytes:
        raise ValueError(f"{file.name} has {size:,} bytes; the limit here is {limits.upload_bytes:,}.")
    try:
        with Image.open(file) as header:
            pixels = header.width * header.height
    except Exception:  # whatever a decoder says of broken bytes; open_image tells it in our words
        pixels = 0
    if pixels > limits.pixels:
        raise ValueError(f"{file.name} has {pixels:,} pixels; the limit here is {limits.pixels:,}. Shrink it first.")
    try:
        image = open_image(file)
    except (ValueError, FileNotFoundError) as error:
        reason = str(error).replace(str(file), file.name)
        raise ValueError(f"{reason} Give a PNG, JPEG or WebP.") from error
    return Shown(image=image, name=file.name, is_sample=False)


def chosen(uploads: Sequence[str] | None, sample: str | None, limits: Limits) -> list[Shown]:
    """The uploads, or else the sample. Raises: ValueError for too many, or one that cannot be read."""
    if uploads:
        if len(uploads) > limits.pictures:
            raise ValueError(f"{len(uploads)} images were given; the limit here is {limits.pictures}.")
        return [open_upload(path, limits) for path in uploads]
    return [open_sample(sample)] if sample else []


def thumbnails(pictures: Sequence[tuple[Image.Image, str]], width: int = 120) -> str:
    """A row of small images over their captions."""
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
