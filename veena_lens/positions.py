"""Which positions of a sequence: the words of the API ("last", "query+generated") parsed once into masks.

Words name parts of a row whatever its padding: they are resolved against `MultimodalInputs`, row by row.
"generated" means answer tokens: those of `with_answer`, and those that `generate` adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool
from torch import Tensor

from veena_lens.inputs import MultimodalInputs

PositionsLike: TypeAlias = str | int | slice | Sequence[int] | Tensor
BEYOND_PROMPT = ("generated", "answer", "all", "text")  # words that reach the tokens `generate` adds
WORDS = ("last", "query", "image", "text", "generated", "answer", "prompt", "all")


def parse(positions: Any) -> Any:
    """Check a selection of positions and give it back in its plain form (words as a tuple).

    Raises: ValueError for an unknown word, TypeError for anything that selects nothing."""
    if isinstance(positions, str):
        words = tuple(w.strip() for w in positions.split("+"))
        unknown = [w for w in words if w not in WORDS]
        if unknown:
            raise ValueError(
                f"positions {positions!r}: unknown word {unknown[0]!r}; known: {', '.join(WORDS)}, joined with '+'."
            )
        return words
    if isinstance(positions, (int, slice)):
        return positions
    if isinstance(positions, Tensor):
        return positions if positions.dtype == torch.bool else [int(p) for p in positions.flatten().tolist()]
    if isinstance(positions, Sequence):
        return [int(p) for p in positions]
    raise TypeError(
        f"positions of type {type(positions).__name__}: give words such as 'last' or 'query+generated', an int, "
        "a slice, a list of ints, or a bool mask [batch pos]."
    )


def position_mask(inputs: MultimodalInputs, positions: Any, image: int | None = None) -> Bool[Tensor, "batch pos"]:
    """True at the chosen positions of every row, never at pads.

    Numbers and slices count over the padded sequence, as indexing a tensor would. `image` narrows the word
    "image" to one image of each row.
    Raises: ValueError for an unknown word, IndexError for a number outside the sequence.
    """
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
    else:
        for word in chosen:
            _mark(mask, inputs, word, image)
    return mask & inputs.attention_mask


def _mark(mask: Bool[Tensor, "batch pos"], inputs: MultimodalInputs, word: str, image: int | None) -> None:
    """Set what one word names."""
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


def reaches_generated(positions: Any) -> bool:
    """True when a selection names positions that only generation or an answer has."""
    chosen = parse(positions)
    return isinstance(chosen, tuple) and any(word in BEYOND_PROMPT for word in chosen)


def padded_places(chosen: Bool[Tensor, "batch pos"]) -> tuple[Tensor, Tensor]:
    """(index, mask) [batch n]: the True places of each row, padded at the end with place 0."""
    counts = chosen.sum(-1)
    n = int(counts.max()) if chosen.numel() else 0
    index = torch.argsort((~chosen).long(), dim=-1, stable=True)[:, :n]
    mask = torch.arange(n, device=chosen.device)[None] < counts[:, None]
    return index * mask, mask
