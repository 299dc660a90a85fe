"""Packs several questions on one picture into one row: they share the image tokens and do not see each other.

A question sees the prefix and itself; its positions go on from the end of the prefix, in every stream of them.
The loss equals that of the unpacked sequences, at about half the tokens an answer.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["Branch", "Packed", "Row", "pack"]


@dataclass(frozen=True)
class Branch:
    """A question with its answer: token ids, and the loss weight of each token (0 where nothing is predicted)."""

    ids: list[int]
    weights: list[float]


@dataclass(frozen=True)
class Row:
    """What all branches share, and the branches; `positions` are the prefix's, where they are not 0, 1, 2, ..."""

    prefix: list[int]
    branches: list[Branch]
    positions: Int[Tensor, "streams prefix"] | None = None


@dataclass(frozen=True, kw_only=True)
class Packed:
    input_ids: Int[Tensor, "batch pos"]
    position_ids: Int[Tensor, "*streams batch pos"]
    attention_mask: Float[Tensor, "batch 1 pos pos"]
    weights: Float[Tensor, "batch pos"]

    def to(self, device: str) -> "Packed":
        """The same on a device."""
        return Packed(**{name: value.to(device) for name, value in vars(self).items()})


def pack(rows: list[Row], pad_id: int) -> Packed:
    """Rows padded on the right, with the four-dimensional mask that keeps branches apart (0 allowed, lowest not)."""
    length = max(len(row.prefix) + sum(len(branch.ids) for branch in row.branches) for row in rows)
    ids = torch.full((len(rows), length), pad_id)
    streams = 1 if rows[0].positions is None else len(rows[0].positions)
    positions = torch.zeros(streams, len(rows), length, dtype=torch.long)
    weights = torch.zeros(len(rows), length)
    segment = torch.full((len(rows), length), -1)
    for i, row in enumerate(rows):
        start = len(row.prefix)
        ids[i, :start] = torch.tensor(row.prefix)
        positions[:, i, :start] = torch.arange(start) if row.positions is None else row.positions
        after = int(positions[:, i, start - 1].max()) + 1
        segment[i, :start] = 0
        for number, branch in enumerate(row.branches, start=1):
            end = start + len(branch.ids)
            ids[i, start:end] = torch.tensor(branch.ids)
            weights[i, start:end] = torch.tensor(branch.weights)
            positions[:, i, start:end] = after + torch.arange(len(branch.ids))
            segment[i, start:end] = number
            start = end
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    query, key = segment[:, :, None], segment[:, None, :]
    # Padding sees itself, since a row of the softmax without any key gives nan.
    allowed = causal & ((key == query) | (key == 0))
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    positions = positions[0] if rows[0].positions is None else positions
    return Packed(input_ids=ids, position_ids=positions, attention_mask=mask[:, None], weights=weights)
