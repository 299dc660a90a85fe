"""Intervals and tests over pairs, the same for every circuit score: bootstrap, sign flips, Benjamini-Hochberg.

Rows of one person are not independent, so whole groups (identities) are resampled or flipped. Everything is one
matrix product over all heads or neurons at once, in float64, chunked so that memory stays bounded; a seed fixes the
draws. Entries that do not exist (`Scores.mask`), or are NaN, are left out.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from veena_lens.scores import Scores

ROOM = 2**24  # numbers held at once
BOUNDS = ("low", "mean", "high")


@dataclass(frozen=True, eq=False)
class Table:
    """Scores with one axis in front and all others flattened: `values` [n cell] in float64, 0 where not `there`."""

    scores: Scores
    axis: str
    values: Float[Tensor, "n cell"]
    there: Bool[Tensor, "n cell"]

    @property
    def n(self) -> int:
        return len(self.values)

    def chunks(self, weight: int) -> Iterator[slice]:
        """Return slices of cells such that `weight` numbers per cell fit in memory."""
        size = max(1, ROOM // max(1, weight))
        return (slice(start, start + size) for start in range(0, self.values.shape[1], size))

    def back(self, cells: Tensor, name: str, unit: str, more: dict[str, Sequence] | None = None, **meta: Any) -> Scores:
        """Return Scores over the axes that are left, NaN masked; `cells` [cell], or [new cell] with a new last axis."""
        axes = tuple(a for a in self.scores.axes if a != self.axis)
        shape = [len(self.scores.labels[a]) for a in axes]
        labels: dict[str, Sequence] = {a: self.scores.labels[a] for a in axes}
        if more:
            (new,) = more
            axes, labels, cells = (*axes, new), {**labels, **more}, cells.T
            shape.append(len(more[new]))
        values = cells.reshape(shape)
        gone = values.isnan() if values.is_floating_point() else torch.zeros_like(values, dtype=torch.bool)
        mask = ~gone if bool(gone.any()) else None
        return Scores(values, axes, labels, name, unit, mask, {**self.scores.meta, **meta})


def table_of(scores: Scores, axis: str, who: str, at_least: int = 2) -> Table:
    """Return the table of scores along an axis; of a sweep, of its effects.

    Raises: ValueError for an unknown axis, or fewer than `at_least` entries along it."""
    scores = scores.effects()
    if axis not in scores.axes:
        raise ValueError(f"{who}: no axis {axis!r}; the axes are {scores.axes}: name the one whose entries vary.")
    at, n = scores.axes.index(axis), len(scores.labels[axis])
    if n < at_least:
        raise ValueError(f"{who}: {n} entries along {axis!r}; at least {at_least} are needed.")
    values = scores.values.detach().double().movedim(at, 0).reshape(n, -1)
    there = scores.exists.movedim(at, 0).reshape(n, -1) & ~values.isnan()
    return Table(scores, axis, torch.where(there, values, 0.0), there)


def group_index(groups: Sequence[Hashable] | None, n: int, who: str, at_least: int = 2) -> Int[Tensor, " n"]:
    """Return the number of each entry's group, counted in the order in which groups first come; by default its own.

    Raises: ValueError for a wrong number of groups, or fewer than `at_least` different ones."""
    if groups is None:
        return torch.arange(n)
    if len(groups) != n:
        raise ValueError(f"{who}: {len(groups)} groups for {n} entries; give one per entry.")
    numbers: dict[Hashable, int] = {}
    index = torch.tensor([numbers.setdefault(group, len(numbers)) for group in groups])
    if len(numbers) < at_least:
        raise ValueError(f"{who}: all entries are of {len(numbers)} group; at least {at_least} are needed.")
    return index


def bootstrap(
    scores: Scores,
    axis: str = "pair",
    groups: Sequence[Hashable] | None = None,
    draws: int = 2000,
    level: float | int = 0.95,
    seed: int = 0,
) -> Scores:
    """Return the mean over `axis` with its interval: `axis` gives way to a last axis "bound" (low, mean, high).

    Whole groups are drawn with replacement; the interval holds the percentiles of the drawn means, taken a little
    further out for few groups, at Phi(-sqrt(n/(n-1)) t): plain percentiles are as narrow as a normal interval with the
    biased variance.

    scores: of a sweep its effects count. groups: such as identities; default each entry its own. draws: resamples.
    level: of the interval, in (0, 1). seed: of the draws.
    Returns Scores in the unit of `scores`; NaN, masked, where fewer than two groups exist.
    Raises: ValueError for an unknown axis, fewer than two entries or groups, or a level outside (0, 1).
    Source: Efron and Tibshirani 1993; the expansion is Hesterberg 2015, The American Statistician 69, section 4.
    """
    if not 0 < level < 1:
        raise ValueError(f"bootstrap: level={level} must lie between 0 and 1, such as 0.95.")
    _require_draws(draws, "bootstrap")
    table = table_of(scores, axis, "bootstrap")
    index = group_index(groups, table.n, "bootstrap").to(table.values.device)
    n = int(index.max()) + 1
    sums = table.values.new_zeros(n, table.values.shape[1]).index_add_(0, index, table.values)
    counts = torch.zeros_like(sums).index_add_(0, index, table.there.double())
    chosen = torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(seed)).to(sums.device)
    weights = sums.new_zeros(draws, n).scatter_add_(1, chosen, torch.ones_like(chosen, dtype=torch.float64))
    tail = _expanded_tail(level, n)
    at = torch.tensor([tail, 1 - tail], dtype=torch.float64, device=sums.device)
    out = sums.new_full((3, sums.shape[1]), math.nan)
    for cells in table.chunks(draws):
        means = (weights @ sums[:, cells]) / (weights @ counts[:, cells])
        low, high = means.nanquantile(at, dim=0)
        out[:, cells] = torch.stack([low, sums[:, cells].sum(0) / counts[:, cells].sum(0), high])
    out[:, (counts > 0).sum(0) < 2] = math.nan
    about = {"axis": axis, "entries": table.n, "groups": n, "draws": draws, "level": level, "seed": seed}
    return table.back(out, scores.name, scores.unit, {"bound": list(BOUNDS)}, bootstrap=about)


def sign_flip_test(
    scores: Scores,
    axis: str = "pair",
    draws: int = 1000,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
) -> Scores:
    """Return the two-sided p of the mean over `axis` when signs are flipped at random: the null is no difference.

    p = (1 + number of draws with |mean| at least as large) / (1 + draws). Where all patterns of signs are no more
    than `draws` they are enumerated, and p = share of patterns, the observed one among them.

    scores: of a sweep its effects count. draws: patterns of signs. seed: of the draws. groups: whose entries flip
    together; default each entry alone.
    Returns Scores with the axes of `scores` without `axis`; NaN, masked, where fewer than two entries exist.
    Raises: ValueError for an unknown axis, or fewer than two entries or groups.
    Source: Fisher 1935, The Design of Experiments, section 21; p with the 1: Phipson and Smyth 2010.
    """
    _require_draws(draws, "sign_flip_test")
    table = table_of(scores, axis, "sign_flip_test")
    index = group_index(groups, table.n, "sign_flip_test").to(table.values.device)
    n = int(index.max()) + 1
    sums = table.values.new_zeros(n, table.values.shape[1]).index_add_(0, index, table.values)
    is_exact = n < 60 and 2 ** (n - 1) <= draws
    signs = _every_sign(n) if is_exact else _random_signs(n, draws, seed)
    signs = signs.to(sums.device)
    p = sums.new_empty(sums.shape[1])
    for cells in table.chunks(len(signs)):
        mine = sums[:, cells]
        # Equal sums may differ in their last bits by the order of addition.
        seen = mine.sum(0).abs() - 1e-12 * mine.abs().sum(0)
        hits = ((signs @ mine).abs() >= seen).sum(0)
        p[cells] = hits / len(signs) if is_exact else (1 + hits) / (1 + draws)
    p[table.there.sum(0) < 2] = math.nan
    about = {"axis": axis, "groups": n, "draws": len(signs), "exact": is_exact, "seed": seed}
    return table.back(p, f"p of {scores.name}".strip(), "p", sign_flip=about)


def benjamini_hochberg(p: Scores, q: float | int = 0.05) -> Scores:
    """Adjust p-values for all entries of `p` together: an entry is a discovery where the result is at most `q`.

    adjusted_(i) = min over j >= i of m p_(j) / j, m the number of entries that exist. Among the discoveries the
    expected share of false ones is at most q where the tests are independent or positively dependent.

    p: p-values in [0, 1]. q: the false discovery rate, in (0, 1).
    Returns Scores with the axes of `p`; meta["discoveries"] counts entries of at most q, `significant` gives the mask.
    Raises: ValueError for values outside [0, 1], or q outside (0, 1).
    Source: Benjamini and Hochberg 1995, J. R. Stat. Soc. B 57.
    """
    if not 0 < q < 1:
        raise ValueError(f"benjamini_hochberg: q={q} must lie between 0 and 1, such as 0.05.")
    flat = p.values.detach().double().flatten()
    there = p.exists.flatten() & ~flat.isnan()
    known = flat[there]
    if bool(((known < 0) | (known > 1)).any()):
        raise ValueError(f"benjamini_hochberg: {p.name or 'p'} has values outside [0, 1]; give p-values.")
    order = known.argsort(descending=True, stable=True)
    m = len(known)
    ranks = torch.arange(m, 0, -1, dtype=torch.float64, device=flat.device)
    adjusted = torch.full_like(flat, math.nan)
    mine = torch.empty_like(known)
    mine[order] = (known[order] * m / ranks).cummin(0).values.clamp(max=1) if m else known
    adjusted[there] = mine
    about = {**p.meta, "q": q, "tests": m, "discoveries": int((mine <= q).sum())}
    mask = None if bool(there.all()) else there.view(p.shape)
    return replace(p, values=adjusted.view(p.shape), name=f"adjusted {p.name}".strip(), mask=mask, meta=about)


def significant(p: Scores, q: float | int = 0.05) -> Scores:
    """Return True where an entry of `p` is significant at false discovery rate `q` (`benjamini_hochberg`), same axes.

    Raises: as `benjamini_hochberg`."""
    adjusted = benjamini_hochberg(p, q)
    found = (adjusted.values <= q) & adjusted.exists
    return replace(adjusted, values=found, name="discovery", unit="")


def sign_consistency(scores: Scores, axis: str = "pair") -> Scores:
    """Return the share of entries along `axis` that have the majority's sign, in [0, 1]; zeros have none.

    Axes: those of `scores` without `axis`; NaN, masked, where no entry exists.
    Raises: ValueError for an unknown axis.
    """
    table = table_of(scores, axis, "sign_consistency", at_least=1)
    positive, negative = (table.values > 0).sum(0), (table.values < 0).sum(0)
    share = torch.maximum(positive, negative).double() / table.there.sum(0)
    return table.back(share, f"sign consistency of {scores.name}".strip(), "share")


def _require_draws(draws: int, who: str) -> None:
    if draws < 1:
        raise ValueError(f"{who}: draws={draws} must be at least 1.")


def _every_sign(n: int) -> Float[Tensor, "pattern n"]:
    """Return every pattern of n signs up to a common one, the first sign fixed: |sum| has the same distribution."""
    bits = torch.arange(2 ** (n - 1))[:, None] >> torch.arange(n - 1) & 1
    return torch.cat([torch.ones(len(bits), 1, dtype=torch.float64), 1.0 - 2 * bits.double()], 1)


def _random_signs(n: int, draws: int, seed: int) -> Float[Tensor, "draw n"]:
    return 1.0 - 2 * torch.randint(2, (draws, n), generator=torch.Generator().manual_seed(seed)).double()


def _expanded_tail(level: float, n: int) -> float:
    """Return Phi(-sqrt(n / (n - 1)) t), t the quantile of Student's distribution with n - 1 degrees of freedom."""
    return NormalDist().cdf(-math.sqrt(n / (n - 1)) * student_quantile((1 + level) / 2, n - 1))


def student_quantile(p: float, df: int) -> float:
    """Return the quantile of Student's t, exact for 1 and 2 degrees of freedom, else to about 1 % by an expansion.

    Source: Abramowitz and Stegun 1964, 26.7.5."""
    if df == 1:
        return math.tan(math.pi * (p - 0.5))
    if df == 2:
        return (2 * p - 1) / math.sqrt(2 * p * (1 - p))
    z = NormalDist().inv_cdf(p)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / df ** (i + 1) for i, term in enumerate(terms))


# --- means and ratios of paired entries ------------------------------------------------------------


def drawn_weights(groups: Sequence[Hashable], draws: int = 2000, seed: int = 0) -> Float[Tensor, "draw n"]:
    """Return how often each entry counts in each draw of whole groups; the same seed and groups give the same draws,
    so that differences of two methods on the same entries are paired."""
    index = group_index(groups, len(groups), "drawn_weights", at_least=1)
    n = int(index.max()) + 1
    chosen = torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros(draws, n, dtype=torch.float64).scatter_add_(1, chosen, torch.ones(draws, n).double())
    return counts[:, index]


def mean_interval(
    values: Float[Tensor, "n ..."], weights: Float[Tensor, "draw n"], level: float | int = 0.95
) -> Float[Tensor, "... 3"]:
    """Return (low, mean, high) of the mean over entries; NaN entries are left out."""
    return ratio_interval(values, None, weights, level)


def ratio_interval(
    above: Float[Tensor, "n ..."],
    below: Float[Tensor, " n"] | None,
    weights: Float[Tensor, "draw n"],
    level: float | int = 0.95,
) -> Float[Tensor, "... 3"]:
    """Return (low, mean, high) of sum(above) / sum(below) over entries (below None: their number), percentile
    intervals."""
    flat = above.double().reshape(len(above), -1)
    there = ~flat.isnan()
    top = torch.where(there, flat, 0.0)
    bottom = there.double() * (1.0 if below is None else below.double()[:, None])
    mean = top.sum(0) / bottom.sum(0)
    drawn = (weights @ top) / (weights @ bottom)
    tail = (1 - level) / 2
    low, high = drawn.nanquantile(torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0)
    return torch.stack([low, mean, high], -1).reshape(*above.shape[1:], 3)


# --- shares of yes answers ------------------------------------------------------------------------


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
    """Return the share of yes, resampling groups; where all answers agree, Wilson's interval over the number of
    groups."""
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
    """Return the first share minus the second over the same questions, with its interval from resampling groups.

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
    """Return Wilson's 95 % interval of a share of `count` independent answers."""
    z = 1.959964
    centre = (value + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(value * (1 - value) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, centre - half), min(1.0, centre + half)
