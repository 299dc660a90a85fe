"""Attention of chosen queries as it is computed, layer by layer, a bounded number of queries at a time.

Nothing of a size [n_heads pos pos] is ever kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from veena_lens.circuits.reading import ROOM
from veena_lens.inputs import MultimodalInputs
from veena_lens.model.attention_rows import AttentionRows

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM


class StreamedAttention(AttentionRows):
    """Hand each layer's attention of the chosen queries to `consume(layer, at, weights)` and keep none of it.

    `at` is a slice of the padded list of query positions, `weights` [batch head n key_pos]: as many queries at once as
    fit in memory."""

    def __init__(
        self,
        cfg: Any,
        queries: Any,
        layers: Sequence[int],
        heads: Sequence[int],
        consume: Callable[[int, slice, Float[Tensor, "batch head n key_pos"]], None],
    ) -> None:
        super().__init__(queries, "all", layers, heads, cfg.n_key_value_heads, cfg.score_scale)
        self.consume, self.n_heads = consume, cfg.n_heads

    def read(
        self,
        layer: int,
        q: Float[Tensor, "batch n_heads query_pos d_head"],
        k: Float[Tensor, "batch n_key_value_heads key_pos d_head"],
        mask: Any,
        bias: Tensor | None,
        pattern: Float[Tensor, "batch n_heads query_pos key_pos"] | None,
    ) -> None:
        """Take a layer's queries and keys, or its pattern where one was made anyway."""
        if layer not in self._parts or self._now is None:
            return
        index = self._now[0].to(q.device)
        size = max(1, ROOM // (len(q) * self.n_heads * k.shape[2]))
        with torch.no_grad():
            for start in range(0, index.shape[1], size):
                at = slice(start, start + size)
                self.consume(layer, at, self.weights(index[:, at], q, k, mask, bias, pattern))


class Collected:
    """Keep what is made of streamed attention: of each layer the mean over the queries that exist, or ("none") all.

    A mean is summed as queries come, so its memory does not grow with their number; NaN for a row without any."""

    def __init__(self, layers: Sequence[int], mask: Bool[Tensor, "batch n"], reduce: str) -> None:
        self.mask, self.reduce = mask, reduce
        self._parts: dict[int, list[Tensor]] = {layer: [] for layer in layers}

    def add(self, layer: int, at: slice, values: Float[Tensor, "batch ... n"]) -> None:
        """Take the values of the queries `at`, last axis."""
        parts = self._parts[layer]
        if self.reduce == "none":
            parts.append(values)
            return
        there = self.mask[:, at].to(values).view(len(self.mask), *[1] * (values.ndim - 2), -1)
        total = (values * there).sum(-1)
        parts[:] = [total if not parts else parts[0] + total]

    def result(self) -> Float[Tensor, "batch layer ..."]:
        """Return all layers together; queries, where kept, last."""
        device = next(iter(self._parts.values()))[0].device
        if self.reduce == "none":
            return torch.stack([torch.cat([p.to(device) for p in parts], -1) for parts in self._parts.values()], 1)
        total = torch.stack([parts[0].to(device) for parts in self._parts.values()], 1)
        return total / self.mask.sum(-1).to(total).view(-1, *[1] * (total.ndim - 1))


def stream_attention(
    model: HookedVLM,
    inputs: MultimodalInputs,
    queries: Any,
    layers: Sequence[int],
    heads: Sequence[int],
    consume: Callable[[int, slice, Float[Tensor, "batch head n key_pos"]], None],
    hooks: Sequence[tuple[str, Callable[..., None]]] = (),
) -> None:
    """Run the model once and hand its attention to `consume`, layer by layer; `hooks` listen too.

    queries: a selection of positions. consume: see `StreamedAttention`. Every layer stays fused."""
    attention = StreamedAttention(model.cfg, queries, layers, heads, consume)
    with torch.no_grad(), model.hooks(list(hooks)), model.recording(attention):
        model(inputs, return_type=None, stop_at_layer=max(layers) + 1)
