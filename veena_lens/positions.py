"""Select positions of a sequence: parse the words of the API ("last", "query+generated") into masks.

Words name parts of a row whatever its padding; they are resolved against `MultimodalInputs`, row by row. "generated"
means the tokens of an answer: those of `with_answer`, and those that `generate` adds. A `Box` or a `Tile` selects image
tokens by their place in the image.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool
from torch import Tensor

from veena_lens.inputs import MultimodalInputs


@dataclass(frozen=True)
class Box:
    """Select the image tokens whose patch overlaps a box.

    left, top, right, bottom: in pixels of the original image.
    image: the number of the image in its row.

    Raises: ValueError for a box without area."""

    left: float | int
    top: float | int
    right: float | int
    bottom: float | int
    image: int = 0

    def __post_init__(self) -> None:
        if not (self.left < self.right and self.top < self.bottom):
            raise ValueError(f"{self!r} has no area: give left < right and top < bottom, in pixels.")


@dataclass(frozen=True)
class Tile:
    """Select the image tokens of one tile: 0 is the whole view, or an untiled image; 1 .. are the tiles row by row."""

    tile: int
    image: int = 0


PositionsLike: TypeAlias = str | int | slice | Sequence[int] | Tensor | Box | Tile
BEYOND_PROMPT = ("generated", "answer", "all", "text")  # words that reach the tokens `generate` adds
WORDS = ("last", "query", "image", "text", "generated", "answer", "prompt", "all")


def as_int(value: Any, what: str) -> int:
    """Return an integer of Python, numpy or torch as Python's.

    Raises: TypeError for anything else, truth values too; `what` names it."""
    is_truth = isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))
    try:
        if not is_truth:
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{what} is {value!r}, of type {type(value).__name__}; it must be an integer.")


def listed(units: Any, n: int, what: str) -> list[int]:
    """Return a choice of layers, heads or neurons as Python's integers, negative ones as they are.

    units: a list, tuple, range, array or tensor of integers, or a slice of 0 .. n - 1; None is all of them. what: their
    name in messages, such as "patch_sweep: layers".

    Raises: TypeError for anything else, a mask of truth values too."""
    if units is None or isinstance(units, slice):
        return list(range(n))[slice(None) if units is None else units]
    if isinstance(units, (str, bytes)) or not hasattr(units, "__iter__") or getattr(units, "ndim", 1) != 1:
        raise TypeError(f"{what}={units!r} must be integers: a list such as [0, 2], a range or a slice; None is all.")
    return [as_int(unit, f"{what}: an entry") for unit in units]


def parse(positions: Any) -> Any:
    """Check a selection of positions and return it in its plain form (words as a tuple).

    Raises: ValueError for an unknown word; TypeError for a type that cannot select positions, or for numbers that are
    not integers."""
    if isinstance(positions, str):
        words = tuple(w.strip() for w in positions.split("+"))
        unknown = [w for w in words if w not in WORDS]
        if unknown:
            raise ValueError(
                f"positions {positions!r}: unknown word {unknown[0]!r}; known: {', '.join(WORDS)}, joined with '+'."
            )
        return words
    if isinstance(positions, (Box, Tile)):
        return positions
    if isinstance(positions, slice):
        ends = (positions.start, positions.stop, positions.step)
        return slice(*(None if end is None else as_int(end, f"an end of the positions {positions}") for end in ends))
    if hasattr(positions, "__array__") and not isinstance(positions, Tensor):
        positions = torch.as_tensor(positions)
    if isinstance(positions, Tensor):
        if positions.dtype == torch.bool and positions.ndim:
            return positions
        positions = positions.flatten().tolist() if positions.ndim else positions.item()
    if isinstance(positions, Sequence):
        return [as_int(p, "a position") for p in positions]
    if hasattr(positions, "__index__") or isinstance(positions, (bool, float)):
        return as_int(positions, "positions")
    raise TypeError(
        f"positions of type {type(positions).__name__}: pass words such as 'last' or 'query+generated', an int, "
        "a slice, a list of ints, a bool mask [batch pos], a Box of pixels or a Tile."
    )


def position_mask(inputs: MultimodalInputs, positions: Any, image: int | None = None) -> Bool[Tensor, "batch pos"]:
    """Return a mask that is True at the chosen positions of every row, and never at pads.

    inputs: the sequence.
    positions: words, numbers, a slice, a mask, a `Box` or a `Tile`; numbers and slices count over the padded sequence.
    image: restricts the word "image" to this image of each row. None: all images.

    Raises: ValueError for an unknown word; IndexError for a number outside the sequence."""
    chosen = parse(positions)
    n, length = inputs.shape
    mask = torch.zeros(n, length, dtype=torch.bool, device=inputs.device)
    if isinstance(chosen, Tensor):
        if chosen.shape not in ((n, length), (length,)):
            raise ValueError(f"A mask of positions must be [{n} {length}] or [{length}], not {list(chosen.shape)}.")
        mask |= chosen.to(mask.device)
    elif isinstance(chosen, (int, list)):
        for p in [chosen] if isinstance(chosen, int) else chosen:
            if not -length <= p < length:
                raise IndexError(f"position {p} is outside a sequence of {length} positions.")
            mask[:, p] = True
    elif isinstance(chosen, slice):
        mask[:, chosen] = True
    elif isinstance(chosen, (Box, Tile)):
        for row in range(n):
            _mark_region(mask, inputs, row, chosen)
    else:
        for word in chosen:
            _mark(mask, inputs, word, image)
    return mask & inputs.attention_mask


def _mark(mask: Bool[Tensor, "batch pos"], inputs: MultimodalInputs, word: str, image: int | None) -> None:
    """Mark the positions that one word names."""
    images = inputs.image_mask
    for row, spans in enumerate(inputs.spans):
        if word == "last":
            mask[row, spans.last] = True
        elif word == "query":
            mask[row, spans.query] = True
        elif word in ("generated", "answer"):
            if spans.answer is not None:
                mask[row, spans.answer] = True
        elif word == "image":
            for span in spans.images if image is None else spans.images[image : image + 1]:
                mask[row, span] |= images[row, span]
        elif word == "text":
            mask[row] |= ~images[row]
        elif word == "prompt":
            mask[row, : spans.last + 1] = True
        else:
            mask[row] = True


def _mark_region(mask: Bool[Tensor, "batch pos"], inputs: MultimodalInputs, row: int, region: Box | Tile) -> None:
    """Mark the tokens of one row's image in a region; a row without that image stays unchanged.

    Raises: ValueError if the places of the tokens in the original image are unknown."""
    if not 0 <= region.image < len(inputs.spans[row].images):
        return
    span = inputs.spans[row].images[region.image]
    places = torch.arange(span.start, span.stop, device=mask.device)[inputs.image_mask[row, span]]
    if isinstance(region, Tile):
        tiles = inputs.token_tiles[row][region.image] if inputs.token_tiles else (0,) * len(places)
        inside = torch.tensor(tiles, device=mask.device) == region.tile
    else:
        boxes = None if inputs.patch_boxes is None else inputs.patch_boxes[row][region.image]
        if boxes is None:
            raise ValueError(
                f"{region!r}: the places of row {row}'s tokens in the original image are unknown. Make the inputs "
                "with model.prepare, or select positions by Tile, numbers or a mask."
            )
        left, top, right, bottom = boxes.to(mask.device).unbind(-1)  # newlines have no box (NaN) and never overlap
        inside = (left < region.right) & (right > region.left) & (top < region.bottom) & (bottom > region.top)
    mask[row, places[inside]] = True


def reaches_generated(positions: Any) -> bool:
    """Return True if a selection may include positions of an answer."""
    chosen = parse(positions)
    return isinstance(chosen, tuple) and any(word in BEYOND_PROMPT for word in chosen)


def padded_places(chosen: Bool[Tensor, "batch pos"]) -> tuple[Tensor, Tensor]:
    """Return (index, mask) [batch n]: the True positions of each row, padded at the end with position 0."""
    counts = chosen.sum(-1)
    n = int(counts.max()) if chosen.numel() else 0
    index = torch.argsort((~chosen).long(), dim=-1, stable=True)[:, :n]
    mask = torch.arange(n, device=chosen.device)[None] < counts[:, None]
    return index * mask, mask
