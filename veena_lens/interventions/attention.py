"""Strengthen (or weaken) the attention that chosen heads pay to chosen keys, in the field's four readings.

renorm multiplies the weights and renormalises the row, which is the same function as adding log(factor) to
the logits: a bias that the fused kernel takes, so no pattern is made. scale, mul and abs differ and act on
the explicit pattern or scores of the chosen layer only.

Attention knockout: chosen heads may not look from some positions to others (Geva et al. 2023, arXiv 2304.14767).

The row's other weights are renormalised, as if the keys were masked. It is a bias on the scores, so the fused kernel
takes it and no pattern is made.

Heads that look least at chosen keys are turned down, query by query (SPIN).

Which heads these are follows from the pattern of the very pass that is edited, so the choice moves with each token.
A head's output is its row of the pattern times the values: scaling the row scales the output.
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
    (PAI). A factor of 1 changes nothing in any mode. Keys in a row that has none (no image) do nothing there.
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


@dataclass(frozen=True)
class KnockOutAttention:
    """Attention of `heads` (default: all) in `layer` from `queries` to `keys` becomes 0.

    A query that loses every key keeps its attention as it was spread among them: there is nothing to put in its
    place. Keys in a row that has none (no image) do nothing there.
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
        layer = require_layer(self.layer, cfg.n_layers, "KnockOutAttention")
        require_units(self.heads, cfg.n_heads, "KnockOutAttention", "head")
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


@dataclass(frozen=True)
class SuppressHeads:
    """The output of the heads of `layer` with the least attention mass on `keys`, times `factor`, at `queries`.

    At each query int(keep * n_heads) heads stay as they are. Rows without keys (no image) stay as they are, and so
    does everything where keep or factor is 1.
    Raises: ValueError for a keep outside [0, 1], or a factor that is not finite.
    Source: Sarkar et al. 2025, arXiv 2505.16411 (SPIN).
    """

    layer: int
    keep: float | int = 0.95
    factor: float | int = 0.0
    keys: Any = "image"
    queries: Any = "last+generated"

    def __post_init__(self) -> None:
        parse(self.queries)
        parse(self.keys)
        if not 0 <= self.keep <= 1:
            raise ValueError(f"SuppressHeads: keep={self.keep} must be a share of the heads, 0 to 1.")
        if not math.isfinite(self.factor):
            raise ValueError(f"SuppressHeads: factor={self.factor} must be finite.")

    @property
    def positions(self) -> Any:
        """The query positions."""
        return self.queries

    def __repr__(self) -> str:
        return show(self)

    def site(self, cfg: HookedVLMConfig) -> str:
        """hook_pattern of the layer."""
        return f"blocks.{require_layer(self.layer, cfg.n_layers, 'SuppressHeads')}.attn.hook_pattern"

    def edit(
        self,
        activation: Float[Tensor, "batch n_heads query_pos key_pos"],
        at: Bool[Tensor, "batch query_pos"],
        keys: Bool[Tensor, "batch key_pos"] | None = None,
    ) -> Float[Tensor, "batch n_heads query_pos key_pos"]:
        """The pattern with the rows of the chosen heads scaled (keys None: every key)."""
        n_heads = activation.shape[1]
        n_quiet = n_heads - int(self.keep * n_heads + 1e-9)  # 0.7 * 10 is a little under 7
        keys = at.new_ones(len(at), activation.shape[-1]) if keys is None else keys.to(at.device)
        mass = (activation * keys[:, None, None, :].to(activation)).sum(-1)
        rank = mass.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
        quiet = (rank < n_quiet) & at[:, None] & keys.any(-1)[:, None, None]
        return torch.where(quiet[..., None], activation * self.factor, activation)
