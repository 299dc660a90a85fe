"""Intervals that the tables share: whole identities are drawn with replacement, ratios are ratios of drawn means."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from veena_lens.circuits.statistics import group_index

BOUNDS = ("low", "mean", "high")


def drawn_weights(groups: Sequence[Hashable], draws: int = 2000, seed: int = 0) -> Float[Tensor, "draw n"]:
    """How often each entry counts in each draw of whole groups; the same seed and groups give the same draws, so that
    differences of two methods on the same entries are paired."""
    index = group_index(groups, len(groups), "intervals", at_least=1)
    n = int(index.max()) + 1
    chosen = torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros(draws, n, dtype=torch.float64).scatter_add_(1, chosen, torch.ones(draws, n).double())
    return counts[:, index]


def share(
    values: Float[Tensor, "n ..."], weights: Float[Tensor, "draw n"], level: float | int = 0.95
) -> Float[Tensor, "... 3"]:
    """(low, mean, high) of the mean over entries; NaN entries are left out."""
    return ratio(values, None, weights, level)


def ratio(
    above: Float[Tensor, "n ..."],
    below: Float[Tensor, " n"] | None,
    weights: Float[Tensor, "draw n"],
    level: float | int = 0.95,
) -> Float[Tensor, "... 3"]:
    """(low, mean, high) of sum(above) / sum(below) over entries (below None: their number), percentile intervals."""
    flat = above.double().reshape(len(above), -1)
    there = ~flat.isnan()
    top = torch.where(there, flat, 0.0)
    bottom = there.double() * (1.0 if below is None else below.double()[:, None])
    mean = top.sum(0) / bottom.sum(0)
    drawn = (weights @ top) / (weights @ bottom)
    tail = (1 - level) / 2
    low, high = drawn.nanquantile(torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0)
    return torch.stack([low, mean, high], -1).reshape(*above.shape[1:], 3)
