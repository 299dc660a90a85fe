"""Positions of patches by the share of a picture's height and width at which they lie (Idefics3).

A square table of positions is read at floor(side * share): a picture that fills only a part of the square that it is
padded to still spreads over the whole table. The rounding of the shares to float32, which now and then puts a patch
into the bucket before its own, is the checkpoints' own.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

ALMOST_ONE = 1.0 - 1e-6  # the last share that still falls into the last bucket


def fraction_positions(real: Bool[Tensor, "picture height width"], side: int) -> Int[Tensor, "picture patch"]:
    """Row of the table of side * side positions for every patch, patches of padding getting row 0.

    real: True at the patches that a picture has; its first column and row tell its height and width."""
    edges = torch.arange(1 / side, 1.0, 1 / side, device=real.device)

    def buckets(n_real: Int[Tensor, " picture"], length: int) -> Int[Tensor, "picture length"]:
        at = torch.arange(length, dtype=torch.float32, device=real.device)
        shares = (at[None] * (1.0 / n_real)[:, None]).clamp(max=ALMOST_ONE)
        return torch.bucketize(shares, edges, right=True)

    rows = buckets(real[:, :, 0].sum(1), real.shape[1])
    columns = buckets(real[:, 0, :].sum(1), real.shape[2])
    places = rows[:, :, None] * side + columns[:, None, :]
    return torch.where(real, places, torch.zeros_like(places)).flatten(1)
