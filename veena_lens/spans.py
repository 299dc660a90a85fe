"""Where the parts of a row lie: spans of its tokens, and how each image lies in crops and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True)
class Spans:
    """Where things lie in one row, as positions of the padded sequence.

    images: one slice per image. query: the text after the last image (the whole prompt without images), without the
    answer. last: the last prompt token. answer: the answer's tokens; None without an answer.
    """

    images: list[slice]
    query: slice
    last: int
    answer: slice | None = None

    def moved(self, by: int) -> Spans:
        """Return the same spans, `by` positions further right."""

        def move(s: slice) -> slice:
            return slice(s.start + by, s.stop + by)

        answer = None if self.answer is None else move(self.answer)
        return Spans([move(i) for i in self.images], move(self.query), self.last + by, answer)

    def __repr__(self) -> str:
        def show(s: slice) -> str:
            return f"{s.start}:{s.stop}"

        images = ", ".join(map(show, self.images))
        answer = "" if self.answer is None else f", answer={show(self.answer)}"
        return f"Spans(images=[{images}], query={show(self.query)}, last={self.last}{answer})"


@runtime_checkable
class ImageRecord(Protocol):
    """How one image lies in the crops of the tower and in the tokens of the text.

    The layouts of `veena_lens.images` make such records; `StoredImage` stands for one that was read from a file.
    """

    @property
    def grid(self) -> tuple[int, int]:
        """Return (height, width) in tokens."""
        ...

    @property
    def n_tokens(self) -> int:
        """Return the number of image tokens that the image fills."""
        ...

    @property
    def n_crops(self) -> int:
        """Return the number of crops that the tower reads of it."""
        ...

    @property
    def patch_grid(self) -> tuple[int, int] | None:
        """Return (height, width) in patches of its only crop, where crops have any size; None where all have one."""
        ...

    def grid_places(self) -> Sequence[int]:
        """Return the offsets of the grid's cells among the image's tokens, row by row."""
        ...

    def token_crops(self) -> Sequence[int] | None:
        """Return the crop of each token: 0 the whole view, 1 .. the tiles, -1 a newline; None without tiles."""
        ...


@dataclass(frozen=True, kw_only=True)
class StoredImage:
    """An image as plain numbers, without what only its layout knows.

    grid: (height, width) in tokens. n_crops: number of crops. places: offsets of the grid's cells among the image's
    tokens; None where the tokens are the cells. crops: the crop of each token; None without tiles. patch_grid: (height,
    width) in patches of its only crop, where crops have any size.
    """

    grid: tuple[int, int]
    n_crops: int = 1
    places: tuple[int, ...] | None = None
    crops: tuple[int, ...] | None = None
    patch_grid: tuple[int, int] | None = None

    @property
    def n_tokens(self) -> int:
        """Return the number of image tokens, as far as crops or cells tell it."""
        return len(self.grid_places() if self.crops is None else self.crops)

    def grid_places(self) -> Sequence[int]:
        return range(self.grid[0] * self.grid[1]) if self.places is None else self.places

    def token_crops(self) -> tuple[int, ...] | None:
        return self.crops
