"""Keys and values of past positions, one pair a layer, stored after rotary (as in Hugging Face).

Generation appends to it step by step; `keep_rows` drops finished rows or repeats rows that share a prefix.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class KVCache:
    """Grows by one chunk of positions a forward pass; `mask` marks its real (unpadded) keys."""

    def __init__(self, n_layers: int) -> None:
        self._keys: list[Tensor | None] = [None] * n_layers
        self._values: list[Tensor | None] = [None] * n_layers
        self.mask: Bool[Tensor, "batch pos"] | None = None

    @property
    def length(self) -> int:
        """Positions held, pads included (0 when empty)."""
        return 0 if self.mask is None else self.mask.shape[1]

    def extend_mask(self, mask: Bool[Tensor, "batch new"]) -> Bool[Tensor, "batch pos"]:
        """Announce the next chunk; returns the mask over past and new keys."""
        self.mask = mask if self.mask is None else torch.cat([self.mask, mask], 1)
        return self.mask

    def append(
        self, layer: int, k: Float[Tensor, "batch new kv d_head"], v: Float[Tensor, "batch new kv d_head"]
    ) -> tuple[Float[Tensor, "batch pos kv d_head"], Float[Tensor, "batch pos kv d_head"]]:
        """Add a layer's new keys and values; returns all of them."""
        past_k, past_v = self._keys[layer], self._values[layer]
        if past_k is not None and past_v is not None:
            k, v = torch.cat([past_k, k], 1), torch.cat([past_v, v], 1)
        self._keys[layer], self._values[layer] = k, v
        return k, v

    def layer(self, layer: int) -> tuple[Float[Tensor, "batch pos kv d_head"], Float[Tensor, "batch pos kv d_head"]]:
        """A layer's keys and values. Raises: ValueError where nothing was appended."""
        k, v = self._keys[layer], self._values[layer]
        if k is None or v is None:
            raise ValueError(f"The cache holds nothing of layer {layer}.")
        return k, v

    def keep_rows(self, rows: Int[Tensor, " rows"]) -> None:
        """Select (or repeat) rows in place."""
        if self.mask is not None:
            self.mask = self.mask[rows]
        for store in (self._keys, self._values):
            for i, x in enumerate(store):
                store[i] = None if x is None else x[rows.to(x.device)]

    def __repr__(self) -> str:
        rows = 0 if self.mask is None else self.mask.shape[0]
        return f"KVCache({len(self._keys)} layers, {rows} rows, {self.length} positions)"
