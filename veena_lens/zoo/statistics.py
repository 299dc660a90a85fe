"""Shares with their 95 % intervals, and confusion counts.

Answers on one identity are not independent, so intervals come from resampling identities, not answers.
"""

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np

__all__ = ["Difference", "Share", "confusion", "paired_difference", "share"]


@dataclass(frozen=True)
class Share:
    """A share of yes answers with its 95 % interval."""

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass(frozen=True)
class Difference:
    """A first share minus a second over the same questions, with its 95 % interval."""

    value: float
    low: float
    high: float


def share(yes: Sequence[bool], groups: Sequence[Hashable], seed: int = 0, resamples: int = 2000) -> Share:
    """The share of yes, resampling groups; where all answers agree, Wilson's interval over the number of groups."""
    if not yes:
        raise ValueError("A share of no answers is undefined.")
    by_group: dict[Hashable, list[bool]] = defaultdict(list)
    for answer, group in zip(yes, groups, strict=True):
        by_group[group].append(answer)
    hits = np.array([sum(row) for row in by_group.values()], dtype=float)
    sizes = np.array([len(row) for row in by_group.values()], dtype=float)
    value = float(hits.sum() / sizes.sum())
    if value in (0.0, 1.0) or len(hits) == 1:
        low, high = wilson(value, len(hits))
    else:
        chosen = np.random.default_rng(seed).integers(0, len(hits), (resamples, len(hits)))
        means = hits[chosen].sum(1) / sizes[chosen].sum(1)
        low, high = (float(x) for x in np.quantile(means, (0.025, 0.975)))
    return Share(value, low, high, len(yes))


def paired_difference(
    first: Sequence[bool], second: Sequence[bool], groups: Sequence[Hashable], seed: int = 0, resamples: int = 2000
) -> Difference:
    """First share minus second over the same questions, with its interval from resampling groups.

    Where no answer differs the interval is that of a share of no differences among the groups, to both sides."""
    differences: dict[Hashable, list[int]] = defaultdict(list)
    for ours, theirs, group in zip(first, second, groups, strict=True):
        differences[group].append(int(ours) - int(theirs))
    if not differences:
        raise ValueError("A difference of no answers is undefined.")
    sums = np.array([sum(row) for row in differences.values()], dtype=float)
    sizes = np.array([len(row) for row in differences.values()], dtype=float)
    value = float(sums.sum() / sizes.sum())
    if not any(any(row) for row in differences.values()):
        high = wilson(0.0, len(sums))[1]
        return Difference(0.0, -high, high)
    chosen = np.random.default_rng(seed).integers(0, len(sums), (resamples, len(sums)))
    means = sums[chosen].sum(1) / sizes[chosen].sum(1)
    low, high = (float(x) for x in np.quantile(means, (0.025, 0.975)))
    return Difference(value, low, high)


def wilson(value: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `count` independent answers."""
    z = 1.959964
    centre = (value + z * z / (2 * count)) / (1 + z * z / count)
    half = z * sqrt(value * (1 - value) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def confusion(truth: Sequence[str], told: Sequence[str | None]) -> dict[str, dict[str, int]]:
    """Counts by truth, then by the emotion told ("none" where no emotion word came)."""
    table: dict[str, Counter[str]] = defaultdict(Counter)
    for true, answer in zip(truth, told, strict=True):
        table[true][answer or "none"] += 1
    return {true: dict(row) for true, row in table.items()}
