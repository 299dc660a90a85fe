"""Which keys a query may read: causal masks with windows and images, and areas of an image (windows of a tower).

Inside areas each position reads its own area alone, in both directions. Positions keep their order, so that a pattern
reads as the image lies; only the fused kernel sees the areas one by one, gathered to rows, at the cost of their own
positions instead of all. The mask over all positions is made where a hook listens to scores or pattern.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True, eq=False)
class AttentionMask:
    """`allowed` True where a query may read a key, None for all (or, with `is_causal`, for the causal rule)."""

    allowed: Bool[Tensor, "batch one query_pos key_pos"] | None
    is_causal: bool

    def explicit(self, n_query: int, n_key: int, device: torch.device) -> Bool[Tensor, ...] | None:
        """Return the mask as a tensor, None when every key is allowed."""
        if self.allowed is not None or not self.is_causal:
            return self.allowed
        return torch.ones(n_query, n_key, dtype=torch.bool, device=device).tril(n_key - n_query)


@dataclass(frozen=True, eq=False)
class AreaMask:
    """Numbers of the areas of a row, and which positions are real; the others read nothing and are not read."""

    numbers: Int[Tensor, "batch pos"]
    real: Bool[Tensor, "batch pos"]
    is_causal: bool = False

    @cached_property
    def allowed(self) -> Bool[Tensor, "batch one pos pos"]:
        """Return True where a query may read a key."""
        same = self.numbers[:, :, None] == self.numbers[:, None]
        return (same & self.real[:, :, None] & self.real[:, None])[:, None]

    def explicit(self, n_query: int, n_key: int, device: torch.device) -> Bool[Tensor, ...]:
        """Return the mask as a tensor."""
        return self.allowed

    @cached_property
    def members(self) -> Int[Tensor, "area size"]:
        """Return the places of each area's positions among those of all rows, -1 past its end."""
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
    """Return softmax(q k^T scale) v inside each area; zeros where a position does not exist."""
    members, batch = mask.members, len(q)
    there = members >= 0
    flat = [rearrange(x, "b h p d -> (b p) h d") for x in (q, k, v)]
    parts = [x[members.clamp(min=0)].transpose(1, 2) for x in flat]
    keys = None if bool(there.all()) else there[:, None, None]
    out = F.scaled_dot_product_attention(*parts, attn_mask=keys, scale=scale).transpose(1, 2)
    whole = torch.zeros_like(flat[0]).index_put((members[there],), out[there])
    return rearrange(whole, "(b p) h d -> b h p d", b=batch)


Mask: TypeAlias = AttentionMask | AreaMask


def causal_mask(
    n_past: int,
    n_new: int,
    window: int | None,
    device: torch.device,
    image_runs: Int[Tensor, "#batch known"] | None = None,
) -> Bool[Tensor, "#batch one query_pos key_pos"]:
    """Return True where a query at positions n_past .. may read a key: itself or earlier, or of its own image of
    `image_runs` (as in `Context`); never further back than the sliding window."""
    n_key = n_past + n_new
    query = torch.arange(n_past, n_key, device=device)[:, None]
    key = torch.arange(n_key, device=device)[None]
    allowed = (key <= query)[None, None]
    if image_runs is not None:
        own = F.pad(image_runs.to(device), (0, max(0, n_key - image_runs.shape[1])), value=-1)[:, :n_key]
        mine = own[:, n_past:, None]
        allowed = allowed | ((mine == own[:, None]) & (mine >= 0))[:, None]
    return allowed if window is None else allowed & (key > query - window)


def softmax_dtype(dtype: torch.dtype) -> torch.dtype | None:
    """Return float32 for half types, None (the dtype of the scores) else."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else None


def masked_softmax(
    scores: Float[Tensor, "batch heads query_pos key_pos"], allowed: Bool[Tensor, ...] | None
) -> Float[Tensor, "batch heads query_pos key_pos"]:
    """Return the softmax over keys; a query with no allowed key (a pad) gets zeros, as the fused kernel gives."""
    pattern = scores.softmax(-1, dtype=softmax_dtype(scores.dtype)).to(scores.dtype)
    if allowed is not None:
        pattern = pattern * allowed.any(-1, keepdim=True)
    return pattern


# --- biases on scores ----------------------------------------------------------------------------------------
def is_cut(scores: Float[Tensor, "*axes"]) -> Bool[Tensor, "*axes"]:
    """Return True at scores that stand for minus infinity: those of keys that a query does not read."""
    return scores <= torch.finfo(scores.dtype).min / 4


def add_bias(scores: Float[Tensor, "*#axes"], bias: Float[Tensor, "*#axes"]) -> Float[Tensor, ...]:
    """Return masked scores with a bias added; minus infinity in the bias takes a key away from a query.

    A key that is masked or was taken away before stays so, whatever is added. A query that would lose its last key
    keeps those that it has."""
    lowest = torch.finfo(scores.dtype).min
    gone, cut = is_cut(scores), is_cut(bias)
    taken = cut & ~gone & ~(gone | cut).all(-1, keepdim=True)
    out = torch.where(gone, scores, scores + bias.masked_fill(cut, 0).to(scores.dtype))
    return out.masked_fill(taken, lowest)


def join_biases(biases: Sequence[Float[Tensor, ...]], allowed: Bool[Tensor, ...] | None) -> Float[Tensor, ...] | None:
    """Return the one bias that equals several added in turn, minus infinity where a query reads nothing; None of none.

    allowed: True where the mask lets a query read a key; None for everywhere."""
    if not biases:
        return None
    first = biases[0]
    total = first.new_zeros(first.shape)
    if allowed is not None:
        total = total.masked_fill(~allowed.to(total.device), torch.finfo(total.dtype).min)
    for bias in biases:
        total = add_bias(total, bias)
    return total.masked_fill(is_cut(total), float("-inf"))
