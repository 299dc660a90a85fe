"""Strengthen (or weaken) the attention that chosen heads pay to chosen keys, in the field's four readings.

renorm multiplies the weights and renormalises the row, which is the same function as adding log(factor) to
the logits: a bias that the fused kernel takes, so no pattern is made. scale, mul and abs differ and act on
the explicit pattern or scores of the chosen layer only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from veena_lens.config import HookedVLMConfig
from veena_lens.interventions.base import require_layer, require_units, show
from veena_lens.positions import parse

MODES = ("renorm", "logit", "scale", "mul", "abs")


def places(
    heads: Sequence[int] | None,
    at: Bool[Tensor, "batch query_pos"],
    keys: Bool[Tensor, "batch key_pos"] | None,
    n_heads: int,
    n_key: int,
) -> Bool[Tensor, "batch n_heads query_pos key_pos"]:
    """True at the chosen heads (None: all), queries and keys (None: all)."""
    chosen = torch.ones(n_heads, dtype=torch.bool, device=at.device)
    if heads is not None:
        chosen = torch.zeros_like(chosen)
        chosen[[int(h) for h in heads]] = True
    keys = at.new_ones(len(at), n_key) if keys is None else keys.to(at.device)
    return at[:, None, :, None] & keys[:, None, None, :] & chosen[None, :, None, None]


@dataclass(frozen=True)
class BoostAttention:
    """Attention of `heads` in `layer` from `queries` to `keys`, strengthened by `factor`.

    renorm == logit: A' = factor A on the keys, the row renormalised (s' = s + log factor).
    scale: A' = factor A, not renormalised. mul: s' = factor s (VAF, AdaptVis). abs: s' = s + (factor - 1)|s|
    (PAI). A factor of 1 changes nothing in any mode. Keys in a row that has none (no picture) do nothing there.
    Raises: ValueError for an unknown mode, or a factor that is not positive in renorm and logit.
    """

    layer: int
    heads: Sequence[int] | None = None
    keys: Any = "image"
    queries: Any = "query+generated"
    factor: float | int = 2.0
    mode: str = "renorm"

    def __post_init__(self) -> None:
        parse(self.queries)
        parse(self.keys)
        if self.mode not in MODES:
            raise ValueError(f"BoostAttention: mode={self.mode!r} must be one of {', '.join(MODES)}.")
        if not math.isfinite(self.factor) or (self.factor <= 0 and self.is_bias):
            raise ValueError(f"BoostAttention: factor={self.factor} must be a positive number in mode {self.mode!r}.")

    @property
    def is_bias(self) -> bool:
        """True where the boost is an additive bias on the scores."""
        return self.mode in ("renorm", "logit")

    @property
    def positions(self) -> Any:
        """The query positions."""
        return self.queries

    def __repr__(self) -> str:
        return show(self)

    def site(self, cfg: HookedVLMConfig) -> str:
        """hook_pattern for scale, else hook_attn_scores of the layer (reached as a bias in renorm and logit)."""
        layer = require_layer(self.layer, cfg.n_layers, "BoostAttention")
        require_units(self.heads, cfg.n_heads, "BoostAttention", "head")
        return f"blocks.{layer}.attn.{'hook_pattern' if self.mode == 'scale' else 'hook_attn_scores'}"

    def edit(
        self,
        activation: Float[Tensor, "batch n_heads query_pos key_pos"],
        at: Bool[Tensor, "batch query_pos"],
        keys: Bool[Tensor, "batch key_pos"] | None = None,
    ) -> Float[Tensor, "batch n_heads query_pos key_pos"]:
        """Boosted scores or pattern at the chosen heads, queries and keys (None: every key)."""
        place = places(self.heads, at, keys, activation.shape[1], activation.shape[-1])
        # A masked score stays as it is: multiplying the largest negative number would overflow.
        place = place & (activation > torch.finfo(activation.dtype).min)
        if self.mode == "abs":
            boosted = activation + (self.factor - 1) * activation.abs()
        elif self.is_bias:
            boosted = activation + math.log(self.factor)
        else:
            boosted = activation * self.factor
        return torch.where(place, boosted, activation)

    def bias(
        self,
        at: Bool[Tensor, "batch query_pos"],
        keys: Bool[Tensor, "batch key_pos"],
        n_heads: int,
        dtype: torch.dtype,
    ) -> Float[Tensor, "batch n_heads query_pos key_pos"]:
        """log(factor) at the chosen places, 0 elsewhere."""
        return places(self.heads, at, keys, n_heads, keys.shape[-1]).to(dtype) * math.log(self.factor)
