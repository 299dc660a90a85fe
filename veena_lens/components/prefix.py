"""Keys and values that many rows share, and each row's own tail.

A sweep's rows are copies of one sequence that differ from some position on. They meet the shared prefix as
further queries of one sequence: one product over its keys for all rows, never an expanded copy. The tail's own
keys join in the same softmax.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from veena_lens.components.context import causal_mask


class SharedPrefix:
    """`keys`, `values`: a [pos n_key_value_heads d_head] tensor a layer, of positions 0 .. start - 1, after rotary.

    `blocks`: which picture's tokens read each other in both directions, as in `Context`; none may begin before
    `start` and go on after it."""

    def __init__(
        self,
        keys: list[Tensor],
        values: list[Tensor],
        start: int,
        windows: Callable[[int], int | None],
        blocks: Int[Tensor, "#batch known"] | None = None,
    ) -> None:
        self._keys, self._values, self.start, self.windows, self.blocks = keys, values, start, windows, blocks

    def scores(
        self,
        layer: int,
        q: Float[Tensor, "row n heads d_head"],
        k: Float[Tensor, "row tail kv d_head"],
        scale: float,
        bias: Float[Tensor, "row heads n key_pos"] | None = None,
    ) -> Float[Tensor, "row heads n key_pos"]:
        """Scaled, masked logits of the last n positions of the tail over prefix and own tail."""
        rows, n = q.shape[:2]
        kv = k.shape[2]
        grouped = rearrange(q, "r n (g h) d -> g (r h n) d", g=kv)
        shared = grouped @ rearrange(self._keys[layer].to(q), "t g d -> g d t")
        shared = rearrange(shared, "g (r h n) t -> r (g h) n t", r=rows, n=n)
        mine = rearrange(q, "r n (g h) d -> r g (h n) d", g=kv) @ rearrange(k, "r n g d -> r g d n")
        mine = rearrange(mine, "r g (h n) t -> r (g h) n t", n=n)
        scores = torch.cat([shared, mine], -1) * scale
        if bias is not None:
            scores = scores + bias.to(scores)
        allowed = causal_mask(self.start, k.shape[1], self.windows(layer), q.device, self.blocks)[:, :, -n:]
        return scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)

    def values(
        self, layer: int, pattern: Float[Tensor, "row heads n key_pos"], v: Float[Tensor, "row tail kv d_head"]
    ) -> Float[Tensor, "row n heads d_head"]:
        """Head outputs: pattern times values, prefix and tail."""
        rows, _, n, _ = pattern.shape
        kv = v.shape[2]
        grouped = rearrange(pattern[..., : self.start], "r (g h) n t -> g (r h n) t", g=kv)
        shared = grouped @ rearrange(self._values[layer].to(v), "t g d -> g t d")
        shared = rearrange(shared, "g (r h n) d -> r n (g h) d", r=rows, n=n)
        mine = rearrange(pattern[..., self.start :], "r (g h) n t -> r g (h n) t", g=kv) @ rearrange(
            v, "r n g d -> r g n d"
        )
        return shared + rearrange(mine, "r g (h n) d -> r n (g h) d", n=n)
