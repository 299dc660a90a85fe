"""Specific or general: whether a head or neuron serves one class or all, and whether that is more than chance.

x_c,e = max(0, mean score of component c over samples of class e); the preferred class is its argmax. Choosing it on
the samples that are then judged makes noise look specific (pure noise of 4 classes: tau 0.84 in the mean), so indices
can be cross-fitted, and `specificity_test` compares with shuffled labels. All classes and components at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from veena_lens.circuits.statistics import Table, group_index, table_of
from veena_lens.scores import Scores

INDICES = ("tau", "contrast", "d_prime", "entropy")
SPECIFIC, GENERAL, BETWEEN, WEAK = "specific", "general", "between", "within control"


def class_means(scores: Scores, classes: Sequence[Hashable], axis: str = "pair") -> Scores:
    """Return the mean of the entries of each class along `axis`, which gives way to a last axis "category", by name.

    scores: entries along `axis`. classes: the class of each entry.
    Returns Scores in the unit of `scores`; NaN, masked, where a class has no entry that exists.
    Raises: ValueError for an unknown axis, a wrong number of classes, or fewer than two different ones.
    """
    table, names, index = _classed(scores, classes, axis, "class_means")
    means = _moments(table, index, len(names))[0]
    return table.back(means, f"mean of {scores.name}".strip(), scores.unit, {"category": names})


def most_selective_class(scores: Scores, classes: Sequence[Hashable], axis: str = "pair") -> Scores:
    """Return the class of the largest mean, as its number in meta["classes"]; axes: those of `scores` without `axis`.

    -1 where no class has a positive mean: max(0, mean) then prefers none. classes: the class of each entry.
    Raises: as `class_means`."""
    table, names, index = _classed(scores, classes, axis, "most_selective_class")
    means = _moments(table, index, len(names))[0].nan_to_num(-math.inf)
    best = torch.where(means.amax(0) > 0, means.argmax(0), -1)
    return table.back(best, f"preferred class of {scores.name}".strip(), "", classes=names)


def specificity_index(
    scores: Scores,
    classes: Sequence[Hashable],
    index: str = "tau",
    axis: str = "pair",
    *,
    cross_fitted: bool = False,
    groups: Sequence[Hashable] | None = None,
    splits: int = 10,
    seed: int = 0,
) -> Scores:
    """Return how much each component prefers one class.

    x_e = max(0, mean over class e), e* = argmax, "other" = all but e*.
    "tau": sum_e (1 - x_e / x_e*) / (E - 1) = 1 - mean_other / max, in [0, 1]. "contrast": (x_e* - mean_other) /
    (x_e* + mean_other). "d_prime": (mu_e* - mu_other) / sqrt((var_e* + var_other) / 2) of the unclipped scores, other
    classes weighted alike. "entropy": 1 - H(x / sum x) / log E. A component without a positive mean has 0 (d_prime
    keeps its value).

    scores: entries along `axis`. classes: the class of each entry. index: one of those above. cross_fitted: e* is
    chosen on one half of the samples and judged on the other, both ways; the index may then be negative and is not
    clipped. There tau is (x_e* - mean_other) / max_e x_e, the same number where e* is the largest in both halves. Of
    noise without preference tau and d_prime then average 0; contrast, whose denominator holds x_e* alone, does not.
    groups: such as identities, which stay in one half; default each entry its own. splits: halvings that are averaged.
    seed: of the halvings.
    Returns Scores with the axes of `scores` without `axis`; dimensionless; NaN, masked, where a class has no entry.
    Raises: as `class_means`; ValueError for an unknown index, entropy cross-fitted (it chooses no class), a class or
    group too small to halve.
    Source: Yanai et al. 2005, Bioinformatics 21 (tau); Green and Swets 1966 (d'); the cross-fitting is ours.
    """
    who = "specificity_index"
    _require_index(index, who)
    table, names, numbers = _classed(scores, classes, axis, who)
    about: dict[str, Any] = {"index": index, "classes": names, "cross_fitted": cross_fitted}
    if cross_fitted:
        if index == "entropy":
            raise ValueError(f"{who}: entropy chooses no class to cross-fit; take tau or contrast.")
        about |= {"splits": splits, "seed": seed}
        values = _cross_fitted(table, numbers, len(names), index, _halves(numbers, names, groups, splits, seed))
    else:
        values = INDEX[index](*_moments(table, numbers, len(names)), None)
    return table.back(values, f"{index} of {scores.name}".strip(), "", specificity=about)


def specificity_test(
    scores: Scores,
    classes: Sequence[Hashable],
    index: str = "tau",
    axis: str = "pair",
    *,
    groups: Sequence[Hashable] | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> Scores:
    """Return the one-sided p of the index (not cross-fitted) when the class labels are shuffled.

    p = (1 + number of shuffles with an index at least as large) / (1 + draws): what choosing the best class does to
    noise is in the null too.

    scores, classes, index, axis: as in `specificity_index`. groups: labels are shuffled within each group; default over
    all entries. draws: shuffles. seed: of the draws.
    Returns Scores with the axes of `scores` without `axis`; go on with `benjamini_hochberg`.
    Raises: as `specificity_index`; ValueError for groups within which no label can be shuffled.
    Source: Good 2005, Permutation, Parametric and Bootstrap Tests of Hypotheses; p with the 1: Phipson and Smyth 2010.
    """
    who = "specificity_test"
    _require_index(index, who)
    if draws < 1:
        raise ValueError(f"{who}: draws={draws} must be at least 1.")
    table, names, numbers = _classed(scores, classes, axis, who)
    blocks = group_index(groups, table.n, who) if groups is not None else torch.zeros(table.n, dtype=torch.long)
    pure = [int(b) for b in blocks.unique() if len(numbers[blocks == b].unique()) < 2]
    if len(pure) == int(blocks.max()) + 1:
        raise ValueError(f"{who}: every group holds one class, so that no label can be shuffled within groups.")
    seen = INDEX[index](*_moments(table, numbers, len(names)), None)
    generator = torch.Generator().manual_seed(seed)
    hits = torch.zeros_like(seen)
    for _ in range(draws):
        shuffled = numbers[_within(blocks, generator)]
        drawn = INDEX[index](*_moments(table, shuffled, len(names), spread=index == "d_prime"), None)
        hits += drawn >= seen - 1e-12
    p = torch.where(seen.isnan(), seen, (1 + hits) / (1 + draws))
    about = {"index": index, "draws": draws, "seed": seed, "within_groups": groups is not None}
    return table.back(p, f"p of {index}", "p", specificity_test=about)


def causal_specificity(drops: Scores, cause: str = "category", effect: str = "answer") -> Scores:
    """Return one number per matrix K[e, e'], the drop of answer e' on samples of class e when a component is ablated:

    (mean of the diagonal - mean off it) / (|mean of the diagonal| + |mean off it|), in [-1, 1]; 0 where all is 0. 1: it
    serves the class's own answer alone; 0: every answer alike. `cause` and `effect` name the two axes, which must have
    the same labels; entries that do not exist are left out. Axes: the others of `drops`.
    Raises: ValueError for unknown axes, different labels, or fewer than two classes.
    Source: our own.
    """
    who = "causal_specificity"
    for axis in (cause, effect):
        if axis not in drops.axes:
            raise ValueError(f"{who}: no axis {axis!r}; the axes are {drops.axes}.")
    names = list(drops.labels[cause])
    if names != list(drops.labels[effect]) or len(names) < 2:
        raise ValueError(
            f"{who}: the labels of {cause!r} are {names}, of {effect!r} {list(drops.labels[effect])}; they must be the "
            "same two or more classes in the same order."
        )
    at = [drops.axes.index(axis) for axis in (cause, effect)]
    values = drops.values.detach().double().movedim(at, (-2, -1))
    there = drops.exists.movedim(at, (-2, -1)) & ~values.isnan()
    diagonal = torch.eye(len(names), dtype=torch.bool, device=values.device)
    on, off = (_mean(values, there & where, (-2, -1)) for where in (diagonal, ~diagonal))
    out = _ratio(on - off, on.abs() + off.abs())
    axes = tuple(axis for axis in drops.axes if axis not in (cause, effect))
    mask = ~out.isnan() if bool(out.isnan().any()) else None
    labels = {axis: drops.labels[axis] for axis in axes}
    return Scores(out, axes, labels, "causal specificity", "", mask, {**drops.meta, "classes": names})


def specificity_labels(
    index: Scores,
    p: Scores,
    means: Scores,
    control: float | int | Scores,
    *,
    specific: float | int = 0.5,
    general: float | int = 0.3,
    level: float | int = 0.05,
) -> Scores:
    """Label each component "specific", "general", "between" or "within control", as a number in meta["labels"].

    within control: its largest class mean is at most `control` (a number, or Scores over the same axes: the upper
    bound of what a random direction or shuffled pairs give). specific: index at least `specific` and p < `level`.
    general: index at most `general` and every class mean above control. Between: neither. `index` should be a
    cross-fitted tau, `means` those of `class_means`, `p` that of `specificity_test`, adjusted where there are many.
    Axes: those of `index`.
    Raises: ValueError where the axes do not agree.
    Source: our own.
    """
    if p.axes != index.axes or means.axes != (*index.axes, "category") or p.shape != index.shape:
        raise ValueError(
            f"specificity_labels: axes {index.axes} of the index, {p.axes} of p and {means.axes} of the means (index's "
            "and then 'category') must agree."
        )
    if isinstance(control, Scores) and control.shape != index.shape:
        raise ValueError(f"specificity_labels: control has the axes {control.axes}, the index {index.axes}.")
    bound = control.values if isinstance(control, Scores) else torch.tensor(float(control)).to(means.values)
    names = [SPECIFIC, GENERAL, BETWEEN, WEAK]
    kind = torch.full(index.shape, 2, device=index.values.device)
    kind[(index.values <= general) & (means.values > bound[..., None]).all(-1)] = 1
    kind[(index.values >= specific) & (p.values < level)] = 0
    kind[means.values.amax(-1) <= bound] = 3
    meta = {**index.meta, "labels": names, "counts": {n: int((kind == i).sum()) for i, n in enumerate(names)}}
    return replace(index, values=kind, name="specificity", unit="", meta=meta)


# --- the indices --------------------------------------------------------------------------------------------
# Each takes class means and variances [class cell], and the classes chosen elsewhere [cell] or None.


def _tau(means: Tensor, variances: Tensor, chosen: Tensor | None) -> Float[Tensor, " cell"]:
    x = means.clamp(min=0)
    best, others = _best_and_others(x, chosen)
    return _ratio(best - others, x.amax(0))


def _contrast(means: Tensor, variances: Tensor, chosen: Tensor | None) -> Float[Tensor, " cell"]:
    best, others = _best_and_others(means.clamp(min=0), chosen)
    return _ratio(best - others, best + others)


def _d_prime(means: Tensor, variances: Tensor, chosen: Tensor | None) -> Float[Tensor, " cell"]:
    chosen = means.argmax(0) if chosen is None else chosen
    best, others = _best_and_others(means, chosen)
    own, rest = _best_and_others(variances, chosen)
    # The variance of other classes together: within them, and between their means.
    rest = rest + _best_and_others((means - others).square(), chosen)[1]
    return _ratio(best - others, ((own + rest) / 2).sqrt())


def _entropy(means: Tensor, variances: Tensor, chosen: Tensor | None) -> Float[Tensor, " cell"]:
    x = means.clamp(min=0)
    share = _ratio(x, x.sum(0).expand_as(x))
    entropy = -torch.special.xlogy(share, share).sum(0)
    return torch.where(x.sum(0) == 0, 0.0, 1 - entropy / math.log(len(means)))


INDEX: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "tau": _tau,
    "contrast": _contrast,
    "d_prime": _d_prime,
    "entropy": _entropy,
}


def _best_and_others(x: Float[Tensor, "class cell"], chosen: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return x of the chosen class (default: the largest), and the mean of the others."""
    best = x.amax(0) if chosen is None else x.gather(0, chosen[None])[0]
    return best, (x.sum(0) - best) / (len(x) - 1)


def _ratio(top: Tensor, bottom: Tensor) -> Tensor:
    """Return top / bottom, 0 where bottom is 0 (then top is too, or there is no spread to measure it by)."""
    return torch.where(bottom == 0, 0.0, top / torch.where(bottom == 0, 1.0, bottom))


def _mean(values: Tensor, there: Tensor, dims: tuple[int, int]) -> Tensor:
    return torch.where(there, values, 0.0).sum(dims) / there.sum(dims)


def _require_index(index: str, who: str) -> None:
    if index not in INDICES:
        raise ValueError(f"{who}: index={index!r} must be one of {', '.join(INDICES)}.")


# --- samples ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Half:
    """Two disjoint sets of samples."""

    first: Bool[Tensor, " n"]
    second: Bool[Tensor, " n"]


def _classed(
    scores: Scores, classes: Sequence[Hashable], axis: str, who: str
) -> tuple[Table, list[str], Int[Tensor, " n"]]:
    """Return the table, the classes' names in order, and the number of each entry's class."""
    table = table_of(scores, axis, who)
    if len(classes) != table.n:
        raise ValueError(f"{who}: {len(classes)} classes for {table.n} entries; give the class of each.")
    names = sorted({str(c) for c in classes})
    if len(names) < 2:
        raise ValueError(f"{who}: all entries are of class {names[0]!r}; specificity needs two classes or more.")
    index = torch.tensor([names.index(str(c)) for c in classes])
    return table, names, index


def _moments(
    table: Table,
    index: Int[Tensor, " n"],
    n_classes: int,
    kept: Bool[Tensor, " n"] | None = None,
    spread: bool = True,
) -> tuple[Float[Tensor, "class cell"], Float[Tensor, "class cell"]]:
    """Return mean and (unbiased) variance of each class over the entries that exist, and that are `kept`.

    Without `spread` the variances, which cost as much again, are left at 0."""
    device = table.values.device
    member = torch.nn.functional.one_hot(index, n_classes).T.double().to(device)
    if kept is not None:
        member = member * kept.to(device)
    counts = member @ table.there.double()
    means = (member @ table.values) / counts
    if not spread:
        return means, torch.zeros_like(means)
    squares = member @ (table.values.square())
    variances = (squares - counts * means.square()) / (counts - 1).clamp(min=1)
    return means, variances.clamp(min=0)


def _halves(
    index: Int[Tensor, " n"], names: Sequence[str], groups: Sequence[Hashable] | None, splits: int, seed: int
) -> list[_Half]:
    """Draw halvings in which both halves hold every class; whole groups stay together where given."""
    if splits < 1:
        raise ValueError(f"specificity_index: splits={splits} must be at least 1.")
    generator = torch.Generator().manual_seed(seed)
    counts = torch.bincount(index, minlength=len(names))
    if int(counts.min()) < 2:
        small = names[int(counts.argmin())]
        raise ValueError(f"specificity_index: class {small!r} has 1 entry; cross-fitting needs 2 of each.")
    blocks = group_index(groups, len(index), "specificity_index")
    found: list[_Half] = []
    for _ in range(100 * splits):
        first = _half_of_groups(blocks, generator) if groups is not None else _half_of_classes(index, generator)
        if all(len(index[half].unique()) == len(names) for half in (first, ~first)):
            found.append(_Half(first, ~first))
        if len(found) == splits:
            return found
    raise ValueError("specificity_index: the groups cannot be halved so that both halves hold every class.")


def _half_of_groups(blocks: Int[Tensor, " n"], generator: torch.Generator) -> Bool[Tensor, " n"]:
    n = int(blocks.max()) + 1
    return torch.isin(blocks, torch.randperm(n, generator=generator)[: n // 2])


def _half_of_classes(index: Int[Tensor, " n"], generator: torch.Generator) -> Bool[Tensor, " n"]:
    """Draw half of each class; the odd one of a class goes to either side."""
    first = torch.zeros(len(index), dtype=torch.bool)
    for one in index.unique():
        mine = (index == one).nonzero().flatten()
        odd = int(torch.randint(2, (1,), generator=generator)) if len(mine) % 2 else 0
        first[mine[torch.randperm(len(mine), generator=generator)][: len(mine) // 2 + odd]] = True
    return first


def _cross_fitted(
    table: Table, numbers: Int[Tensor, " n"], n_classes: int, index: str, halves: Sequence[_Half]
) -> Float[Tensor, " cell"]:
    """Return the index on one half for the class chosen on the other, both ways, the mean over halvings."""
    total = torch.zeros(table.values.shape[1], dtype=torch.float64, device=table.values.device)
    for half in halves:
        moments = [
            _moments(table, numbers, n_classes, kept, spread=index == "d_prime") for kept in (half.first, half.second)
        ]
        for choose, judge in (moments, moments[::-1]):
            total += INDEX[index](*judge, choose[0].nan_to_num(-math.inf).argmax(0))
    return total / (2 * len(halves))


def _within(blocks: Int[Tensor, " n"], generator: torch.Generator) -> Int[Tensor, " n"]:
    """Draw a permutation that moves entries within their block alone."""
    keys = torch.rand(len(blocks), generator=generator, dtype=torch.float64) + blocks.double()
    order = torch.argsort(blocks, stable=True)
    out = torch.empty_like(order)
    out[order] = torch.argsort(keys)
    return out
