"""Attention of chosen query rows, at the memory of a plain forward: `model.attention`, `model.record_attention`.

The question asked most is where one token looks. A pattern of every row costs [n_heads pos pos] per layer; here
each layer hands over its rotated queries and keys, only the rows asked for are multiplied and kept, and the layer
itself stays fused. Chunks of cached decoding append their rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from veena_lens.components.masks import Mask, masked_softmax
from veena_lens.model.span import PassSpan
from veena_lens.positions import as_int, listed, padded_places, position_mask
from veena_lens.scores import Scores

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM


class AttentionRows:
    """Collects rows while a model runs; `scores()` gives [batch layer head query key]."""

    def __init__(
        self, queries: Any, keys: Any, layers: Sequence[int], heads: Sequence[int], n_kv: int, scale: float
    ) -> None:
        self.queries, self.keys = queries, keys
        self.layers, self.heads = list(layers), list(heads)
        self.n_kv, self.scale = n_kv, scale
        self._parts: dict[int, list[Tensor]] = {layer: [] for layer in self.layers}
        self._query_places: list[Tensor] = []
        self._query_masks: list[Tensor] = []
        self._key_places: Tensor | None = None
        self._key_mask: Tensor | None = None
        self._now: tuple[Tensor, Tensor] | None = None

    def begin(self, span: PassSpan) -> None:
        """Begin a chunk: find its query rows and, at the first chunk, the keys."""
        if self._key_places is None or span.is_prefill:
            self._parts = {layer: [] for layer in self.layers}
            self._query_places, self._query_masks = [], []
            self._key_places, self._key_mask = padded_places(position_mask(span.inputs, self.keys))
        index, mask = padded_places(span.mask(self.queries))
        self._now = (index, mask) if index.shape[1] else None
        if self._now is not None:
            self._query_places.append(index + span.start)
            self._query_masks.append(mask)

    def read(
        self,
        layer: int,
        q: Float[Tensor, "batch n_heads query_pos d_head"],
        k: Float[Tensor, "batch n_key_value_heads key_pos d_head"],
        mask: Mask,
        bias: Tensor | None,
        pattern: Float[Tensor, "batch n_heads query_pos key_pos"] | None,
    ) -> None:
        """Read a layer's queries, keys and mask, or its pattern where one was made anyway (and maybe edited)."""
        if layer not in self._parts or self._now is None or self._key_places is None:
            return
        with torch.no_grad():
            rows = self.weights(self._now[0].to(q.device), q, k, mask, bias, pattern)
            keys = self._key_places.to(q.device)[:, None, None, :].expand(-1, *rows.shape[1:3], -1)
            self._parts[layer].append(rows.gather(-1, keys))

    def weights(
        self,
        index: Int[Tensor, "batch n"],
        q: Float[Tensor, "batch n_heads query_pos d_head"],
        k: Float[Tensor, "batch n_key_value_heads key_pos d_head"],
        mask: Mask,
        bias: Tensor | None,
        pattern: Float[Tensor, "batch n_heads query_pos key_pos"] | None,
    ) -> Float[Tensor, "batch head n key_pos"]:
        """Return the attention weights of the chosen heads at the query rows `index`."""
        rows = self._attend(_gather(q, index), k, index, mask, bias) if pattern is None else _gather(pattern, index)
        return rows[:, self.heads]

    def _attend(self, q: Tensor, k: Tensor, index: Tensor, mask: Mask, bias: Tensor | None) -> Tensor:
        grouped = rearrange(q, "b (g r) n d -> b g (r n) d", g=k.shape[1])
        scores = rearrange(grouped @ k.mT, "b g (r n) t -> b (g r) n t", n=q.shape[2]) * self.scale
        if bias is not None:
            scores = scores + _gather(bias.expand(len(q), scores.shape[1], -1, -1), index)
        allowed = None
        n_key = k.shape[2]
        if mask.allowed is not None:
            full = mask.allowed.expand(len(q), 1, -1, -1)
            allowed = _gather(full, index) if full.shape[2] > 1 else full
        elif mask.is_causal:
            allowed = (torch.arange(n_key, device=q.device) <= index[..., None])[:, None]
        if allowed is not None:
            scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
        return masked_softmax(scores, allowed)

    def scores(self) -> Scores:
        """Return attention [batch layer head query key]; `mask` is False at the padding of unequal rows.

        Raises: ValueError when nothing was recorded."""
        if not self._query_masks or self._key_mask is None or self._key_places is None:
            raise ValueError(f"No attention was recorded: queries={self.queries!r} matched no token of the inputs.")
        device = self._parts[self.layers[0]][0].device
        values = torch.stack([torch.cat([p.to(device) for p in self._parts[layer]], 2) for layer in self.layers], 1)
        query_mask = torch.cat([m.to(device) for m in self._query_masks], 1)
        places = torch.cat([p.to(device) for p in self._query_places], 1)
        # Chunks of decoding pad each row on its own; real rows go first.
        order = torch.argsort((~query_mask).long(), dim=-1, stable=True)
        n = int(query_mask.sum(-1).max())
        order = order[:, :n]
        values = values.gather(3, order[:, None, None, :, None].expand(-1, *values.shape[1:3], -1, values.shape[-1]))
        query_mask, places = query_mask.gather(1, order), places.gather(1, order)
        key_mask, key_places = self._key_mask.to(device), self._key_places.to(device)
        exists = query_mask[:, None, None, :, None] & key_mask[:, None, None, None, :]
        labels: dict[str, list[Any]] = {"layer": self.layers, "head": self.heads}
        for axis, where, real in (("query", places, query_mask), ("key", key_places, key_mask)):
            if len(where) and bool(real.all()) and bool((where == where[:1]).all()):
                labels[axis] = where[0].tolist()
        return Scores(
            values=values * exists,
            axes=("batch", "layer", "head", "query", "key"),
            labels=labels,
            name="attention",
            unit="weight",
            mask=None if bool(exists.all()) else exists.expand(values.shape),
            meta={
                "queries": _show(self.queries),
                "keys": _show(self.keys),
                "query_positions": places.tolist(),
                "key_positions": key_places.tolist(),
            },
        )


def _show(positions: Any) -> Any:
    return positions if isinstance(positions, (str, int)) else str(positions)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Return rows of the third axis of [batch a rows b], chosen for each batch row."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def attention(
    model: HookedVLM,
    inputs: Any,
    queries: Any,
    keys: Any,
    layers: Any = None,
    heads: Any = None,
) -> Scores:
    """Return attention weights of chosen query rows: see `HookedVLM.attention`."""
    span = PassSpan.whole(model.as_inputs(inputs))
    for what, chosen in (("queries", queries), ("keys", keys)):
        if not bool(span.mask(chosen).any()):
            raise ValueError(f"attention: {what}={chosen!r} selects no position in {span.inputs!r}.")
    with torch.no_grad(), record_attention(model, queries, keys, layers, heads) as seen:
        model(span.inputs, stop_at_layer=max(seen.layers) + 1, return_type=None)
    return seen.scores()


@contextmanager
def record_attention(
    model: HookedVLM,
    queries: Any,
    keys: Any,
    layers: Any = None,
    heads: Any = None,
) -> Iterator[AttentionRows]:
    """Collect attention rows of whatever runs inside the block: see `HookedVLM.record_attention`."""
    cfg = model.cfg
    chosen_layers = [_index(i, cfg.n_layers, "layer") for i in listed(layers, cfg.n_layers, "attention: layers")]
    chosen_heads = [_index(i, cfg.n_heads, "head") for i in listed(heads, cfg.n_heads, "attention: heads")]
    if not chosen_layers or not chosen_heads:
        raise ValueError("attention: give at least one layer and one head (None means all).")
    rows = AttentionRows(queries, keys, chosen_layers, chosen_heads, cfg.n_key_value_heads, cfg.score_scale)
    with model.recording(rows):
        yield rows


def _index(i: Any, n: int, what: str) -> int:
    """Return a layer or head index, negative ones counted from the end.

    Raises: ValueError outside; TypeError for what is not an integer."""
    i = as_int(i, f"attention: {what}")
    resolved = i + n if i < 0 else i
    if not 0 <= resolved < n:
        raise ValueError(f"attention: {what} {i} does not exist; the model has {n}.")
    return resolved
