"""Which pairs and images each part of a run takes: plain selections, before any model is there.

Identities are parted into directions, mechanism, validation and test, and never cross. Where a part is larger than its
bound, emotions and identities are taken in turn, so that none prevails.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

if TYPE_CHECKING:
    from veena_lens.emotion.pairs.loading import Pair
    from veena_lens.emotion.settings import Settings

T = TypeVar("T")


def part_identities(pairs: Any, settings: Settings) -> dict[str, Any]:
    """Return the parts of a run by name: directions, mechanism and validation (2 : 1 : 1 of the development
    identities), test, and elsewhere (other styles, and images without twins).

    Where the set names no split "test", a quarter of the identities is set aside for it.
    Raises: ValueError for fewer than four identities."""
    pairs = pairs.without_context() if settings.question is None else pairs.without_context().asked(settings.question)
    splits = {e.split for e in pairs.examples}
    if "test" in splits:
        test = pairs.select(split="test")
        rest = (
            pairs.select(split="development")
            if "development" in splits
            else pairs.select(split=sorted(s for s in splits if s not in ("test", "held-out style", "emoji")))
        )
        others = sorted(s for s in splits if s not in ("test", "development"))
        elsewhere = pairs.select(split=others) if others and "development" in splits else pairs.of([])
    else:
        rest, test = pairs.split((3, 1), settings.seed)
        elsewhere = pairs.of([])
    found = sorted({p.identity for p in rest})
    if len(found) < 3 or not len(test):
        raise ValueError(
            f"run: {len(found)} identities for directions, mechanism and validation and {len(test)} test pairs; at "
            "least three identities and a test part are needed, so that none is on two sides."
        )
    directions, mechanism, validation = rest.split((2, 1, 1), settings.seed)
    return {
        "directions": directions, "mechanism": mechanism, "validation": validation, "test": test,
        "elsewhere": elsewhere,
    }  # fmt: skip


def some_pairs(pairs: Any, most: int | None) -> Any:
    """Return at most so many pairs, emotions and identities in turn; None takes all."""
    if most is None or len(pairs) <= most:
        return pairs
    return pairs.sample(most) if hasattr(pairs, "sample") else spread_over(list(pairs), most)


def spread_over(pairs: list[Any], n: int) -> list[Any]:
    """Return at most `n` pairs, identities and emotions taken in turn so that none prevails."""
    if len(pairs) <= n:
        return pairs
    order: dict[Any, list[Any]] = {}
    for pair in pairs:
        order.setdefault(pair.identity, []).append(pair)
    queues, out = list(order.values()), []
    turn = 0
    while len(out) < n:
        queue = queues[turn % len(queues)]
        if queue:
            out.append(queue.pop((turn // len(queues) + turn) % len(queue)))
        turn += 1
    return out


def spread_examples(part: Any, most: int | None) -> list[Any]:
    """Return each image once, neutral ones too; at most `most` (None: all), emotions in turn and identities in turn."""
    once: dict[tuple[str, str], Any] = {}
    for e in part.examples:
        once.setdefault((str(e.picture), e.emotion), e)
    found = list(once.values())
    if most is None or len(found) <= most:
        return found
    queues: dict[str, list[Any]] = {}
    for e in found:
        queues.setdefault(e.emotion, []).append(e)
    out: list[Any] = []
    for turn in range(len(found)):
        for k, queue in enumerate(queues.values()):
            if turn < len(queue) and len(out) < most:
                out.append(queue[(turn + k) % len(queue)])
    return out


def distinct(pairs: Sequence[Pair]) -> tuple[list[Any], Int[Tensor, "pair 2"]]:
    """Return the different examples of these pairs, and which two make up each pair: a neutral image runs once."""
    numbers: dict[Any, int] = {}
    examples, index = [], []
    for pair in pairs:
        row = []
        for example in (pair.emotional, pair.neutral):
            picture = example.picture
            key = (id(picture) if hasattr(picture, "size") else str(picture), example.prompt)
            if key not in numbers:
                numbers[key] = len(examples)
                examples.append(example)
            row.append(numbers[key])
        index.append(row)
    return examples, torch.tensor(index)


def elsewhere(part: Any, settings: Settings) -> dict[str, list[Any]]:
    """Return images of other kinds (held-out styles, emoji), by split and style, without contexts."""
    found: dict[str, list[Any]] = {}
    for example in part.examples:
        name = example.style if example.split in ("", example.style) else f"{example.split}: {example.style}"
        found.setdefault(name, []).append(example)
    return {name: _most(examples, settings.test_pictures) for name, examples in found.items()}


def _most(examples: list[Any], most: int | None) -> list[Any]:
    return examples if most is None else examples[:most]


def spaced(grid: list[T], n: int) -> list[T]:
    """Return `n` entries of a grid, evenly spaced from its first to its last."""
    if len(grid) <= n:
        return grid
    if n == 1:
        return [grid[len(grid) // 2]]
    return [grid[round(i * (len(grid) - 1) / (n - 1))] for i in range(n)]
