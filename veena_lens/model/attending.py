"""`model.attention` and `model.watch_attention`: where chosen tokens look, in a forward pass or while generating."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from veena_lens.model.attention_rows import AttentionRows
from veena_lens.model.run import Run
from veena_lens.scores import Scores


class Attending:
    """Mixin of HookedVLM."""

    cfg: Any
    _rows: AttentionRows | None

    def attention(
        self,
        inputs: Any,
        queries: Any = "last",
        keys: Any = "image",
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
    ) -> Scores:
        """Attention weights of chosen query rows: Scores over (batch, layer, head, query, key).

        queries, keys: words ("last", "query", "image", "generated", "all", joined with +), positions, a slice,
        a mask, a Box of pixels or a Tile. Only these rows are computed; every layer stays fused, so memory is that
        of a plain forward.
        `.meta` holds the positions of the rows; interventions in force are honoured.
        Raises: ValueError for an empty selection, or for image keys without a picture.
        """
        prepared = self._as_inputs(inputs)  # type: ignore[attr-defined]
        run = Run(prepared, 0, prepared.shape[1])
        for what, chosen in (("queries", queries), ("keys", keys)):
            if not bool(run.mask(chosen).any()):
                raise ValueError(f"attention: {what}={chosen!r} selects no position in {prepared!r}.")
        with torch.no_grad(), self.watch_attention(queries, keys, layers, heads) as seen:
            last = max(seen.layers) + 1
            self(prepared, stop_at_layer=last if last < self.cfg.n_layers else None, return_type=None)  # type: ignore[operator]
        return seen.scores()

    @contextmanager
    def watch_attention(
        self,
        queries: Any = "generated",
        keys: Any = "image",
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
    ) -> Iterator[AttentionRows]:
        """Collect attention rows of whatever runs inside the block, `generate` included; read `.scores()` after.

        "generated" queries are the tokens being generated (each row is that token's own look back)."""
        cfg = self.cfg
        chosen_layers = [_index(i, cfg.n_layers, "layer") for i in (range(cfg.n_layers) if layers is None else layers)]
        chosen_heads = [_index(i, cfg.n_heads, "head") for i in (range(cfg.n_heads) if heads is None else heads)]
        if not chosen_layers or not chosen_heads:
            raise ValueError("attention: give at least one layer and one head (None means all).")
        rows = AttentionRows(queries, keys, chosen_layers, chosen_heads, cfg.n_key_value_heads, cfg.score_scale)
        with self.watching(rows):
            yield rows

    @contextmanager
    def watching(self, rows: AttentionRows) -> Iterator[AttentionRows]:
        """Let `rows` read the attention of whatever runs inside the block."""
        before, self._rows = self._rows, rows
        try:
            yield rows
        finally:
            self._rows = before


def _index(i: int, n: int, what: str) -> int:
    """A layer or head index, negative ones counted from the end. Raises: ValueError outside."""
    resolved = i + n if i < 0 else i
    if not 0 <= resolved < n:
        raise ValueError(f"attention: {what} {i} does not exist; the model has {n}.")
    return resolved
