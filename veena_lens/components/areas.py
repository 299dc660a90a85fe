"""Attention inside areas: each position reads its own area alone, in both directions (windows of a picture).

Positions keep their order, so that a pattern reads as the picture lies; only the fused kernel meets the areas one
by one, gathered to rows, at the cost of its own positions and not of all. The mask over all positions is made
where a listener asks for scores or pattern.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True, eq=False)
class AreaMask:
    """`numbers` tells areas of a row apart, `real` which positions exist; others read nothing and are not read."""

    numbers: Int[Tensor, "batch pos"]
    real: Bool[Tensor, "batch pos"]
    is_causal: bool = False

    @cached_property
    def allowed(self) -> Bool[Tensor, "batch one pos pos"]:
        """True where a query may read a key."""
        same = self.numbers[:, :, None] == self.numbers[:, None]
        return (same & self.real[:, :, None] & self.real[:, None])[:, None]

    def explicit(self, n_query: int, n_key: int, device: torch.device) -> Bool[Tensor, ...]:
        """The mask as a tensor."""
        return self.allowed

    @cached_property
    def members(self) -> Int[Tensor, "area size"]:
        """Places of each area's positions among those of all rows, -1 past its end."""
        rows = torch.arange(len(self.numbers), device=self.numbers.device)[:, None]
        owner = (rows * (int(self.numbers.max()) + 1) + self.numbers).flatten()
        places = self.real.flatten().nonzero().flatten()
        order = owner[places].argsort(stable=True)
        _, sizes = owner[places][order].unique_consecutive(return_counts=True)
        parts = places[order].split(sizes.tolist())
        return pad_sequence(list(parts), batch_first=True, padding_value=-1)


def attend_in_areas(
    q: Float[Tensor, "batch heads pos d_head"],
    k: Float[Tensor, "batch heads pos d_head"],
    v: Float[Tensor, "batch heads pos d_head"],
    mask: AreaMask,
    scale: float,
) -> Float[Tensor, "batch heads pos d_head"]:
    """softmax(q k^T scale) v inside each area; zeros where a position does not exist."""
    members, batch = mask.members, len(q)
    there = members >= 0
    flat = [rearrange(x, "b h p d -> (b p) h d") for x in (q, k, v)]
    parts = [x[members.clamp(min=0)].transpose(1, 2) for x in flat]
    keys = None if bool(there.all()) else there[:, None, None]
    out = F.scaled_dot_product_attention(*parts, attn_mask=keys, scale=scale).transpose(1, 2)
    whole = torch.zeros_like(flat[0]).index_put((members[there],), out[there])
    return rearrange(whole, "(b p) h d -> b h p d", b=batch)
