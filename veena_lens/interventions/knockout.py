"""Attention knockout: chosen heads may not look from some positions to others (Geva et al. 2023, arXiv 2304.14767).

The row's other weights are renormalised, as if the keys were masked. It is a bias on the scores, so the fused kernel
takes it and no pattern is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from veena_lens.config import HookedVLMConfig
from veena_lens.interventions.attention import places
from veena_lens.interventions.base import require_layer, require_units, show
from veena_lens.positions import parse


@dataclass(frozen=True)
class KnockOut:
    """Attention of `heads` (default: all) in `layer` from `queries` to `keys` becomes 0.

    A query that loses every key keeps its attention as it was spread among them: there is nothing to put in its
    place. Keys in a row that has none (no picture) do nothing there.
    """

    layer: int
    heads: Sequence[int] | None = None
    keys: Any = "image"
    queries: Any = "query+generated"
    is_bias = True

    def __post_init__(self) -> None:
        parse(self.queries)
        parse(self.keys)

    @property
    def positions(self) -> Any:
        """The query positions."""
        return self.queries

    def __repr__(self) -> str:
        return show(self)

    def site(self, cfg: HookedVLMConfig) -> str:
        """hook_attn_scores of the layer, reached as a bias."""
        layer = require_layer(self.layer, cfg.n_layers, "KnockOut")
        require_units(self.heads, cfg.n_heads, "KnockOut", "head")
        return f"blocks.{layer}.attn.hook_attn_scores"

    def edit(
        self,
        activation: Float[Tensor, "batch n_heads query_pos key_pos"],
        at: Bool[Tensor, "batch query_pos"],
        keys: Bool[Tensor, "batch key_pos"] | None = None,
    ) -> Float[Tensor, "batch n_heads query_pos key_pos"]:
        """The scores with the chosen ones lowered beyond reach."""
        place = places(self.heads, at, keys, activation.shape[1], activation.shape[-1])
        return torch.where(place, torch.finfo(activation.dtype).min / 2, activation)

    def bias(
        self,
        at: Bool[Tensor, "batch query_pos"],
        keys: Bool[Tensor, "batch key_pos"],
        n_heads: int,
        dtype: torch.dtype,
    ) -> Float[Tensor, "batch n_heads query_pos key_pos"]:
        """A shift that no score survives at the chosen places, 0 elsewhere; finite, so that no row turns NaN."""
        return places(self.heads, at, keys, n_heads, keys.shape[-1]).to(dtype) * (torch.finfo(dtype).min / 2)
