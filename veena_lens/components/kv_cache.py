"""Keys and values of past positions, stored after rotary as in Hugging Face.

`KVCache` grows by one chunk of positions per pass, as generation does; `keep_rows` drops finished rows or repeats rows.
`SharedPrefix` holds what the rows of a sweep share: copies of one sequence that differ from some position on. They
read the prefix as further queries of one sequence, with one product over its keys for all rows and no expanded copy;
the keys of each row's own tail join in the same softmax.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from veena_lens.components.masks import causal_mask


class KVCache:
    """Grows by one chunk of positions per forward pass; `mask` marks its real (unpadded) keys."""

    def __init__(self, n_layers: int) -> None:
        self._keys: list[Tensor | None] = [None] * n_layers
        self._values: list[Tensor | None] = [None] * n_layers
        self.mask: Bool[Tensor, "batch pos"] | None = None

    @classmethod
    def of(cls, held: Sequence[tuple[Tensor, Tensor]], mask: Bool[Tensor, "batch pos"] | None) -> KVCache:
        """Return a cache of keys and values [batch pos kv d_head], one pair per layer, empty where they have no pos."""
        cache = cls(len(held))
        cache.mask = mask
        for layer, (k, v) in enumerate(held):
            if k.shape[1]:
                cache._keys[layer], cache._values[layer] = k, v
        return cache

    def holds(self, layer: int) -> bool:
        """Return True where something of a layer is held."""
        return self._keys[layer] is not None

    @property
    def length(self) -> int:
        """Return the number of positions held, pads included (0 when empty)."""
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
            k, v = torch.cat([past_k.to(k), k], 1), torch.cat([past_v.to(v), v], 1)
        self._keys[layer], self._values[layer] = k, v
        return k, v

    def layer(self, layer: int) -> tuple[Float[Tensor, "batch pos kv d_head"], Float[Tensor, "batch pos kv d_head"]]:
        """Return a layer's keys and values. Raises: ValueError where nothing was appended."""
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


class SharedPrefix:
    """Keys and values of positions 0 .. start - 1, which all rows share.

    keys, values: one [pos n_key_value_heads d_head] tensor per layer, keys after rotary.
    windows: a layer's sliding window, None: full.
    image_runs: which image's tokens read each other in both directions, as in `Context`; none may begin before `start`
        and go on after it."""

    def __init__(
        self,
        keys: list[Tensor],
        values: list[Tensor],
        start: int,
        windows: Callable[[int], int | None],
        image_runs: Int[Tensor, "#batch known"] | None = None,
    ) -> None:
        self._keys, self._values = keys, values
        self.start, self.windows, self.image_runs = start, windows, image_runs

    def scores(
        self,
        layer: int,
        q: Float[Tensor, "row n heads d_head"],
        k: Float[Tensor, "row tail kv d_head"],
        scale: float,
    ) -> Float[Tensor, "row heads n key_pos"]:
        """Return the scaled, masked scores of the last n positions of the tail over prefix and own tail."""
        rows, n = q.shape[:2]
        kv = k.shape[2]
        grouped = rearrange(q, "r n (g h) d -> g (r h n) d", g=kv)
        shared = grouped @ rearrange(self._keys[layer].to(q), "t g d -> g d t")
        shared = rearrange(shared, "g (r h n) t -> r (g h) n t", r=rows, n=n)
        mine = rearrange(q, "r n (g h) d -> r g (h n) d", g=kv) @ rearrange(k, "r n g d -> r g d n")
        mine = rearrange(mine, "r g (h n) t -> r (g h) n t", n=n)
        scores = torch.cat([shared, mine], -1) * scale
        allowed = causal_mask(self.start, k.shape[1], self.windows(layer), q.device, self.image_runs)[:, :, -n:]
        return scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)

    def values(
        self, layer: int, pattern: Float[Tensor, "row heads n key_pos"], v: Float[Tensor, "row tail kv d_head"]
    ) -> Float[Tensor, "row n heads d_head"]:
        """Return head outputs: pattern times values, of prefix and tail."""
        rows, _, n, _ = pattern.shape
        kv = v.shape[2]
        grouped = rearrange(pattern[..., : self.start], "r (g h) n t -> g (r h n) t", g=kv)
        shared = grouped @ rearrange(self._values[layer].to(v), "t g d -> g t d")
        shared = rearrange(shared, "g (r h n) d -> r n (g h) d", r=rows, n=n)
        mine = rearrange(pattern[..., self.start :], "r (g h) n t -> r g (h n) t", g=kv) @ rearrange(
            v, "r n g d -> r g n d"
        )
        return shared + rearrange(mine, "r g (h n) d -> r n (g h) d", n=n)
