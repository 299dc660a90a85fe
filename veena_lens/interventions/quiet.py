"""Heads that look least at chosen keys are turned down, query by query (SPIN).

Which heads these are follows from the pattern of the very pass that is edited, so the choice moves with each token.
A head's output is its row of the pattern times the values: scaling the row scales the output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from veena_lens.config import HookedVLMConfig
from veena_lens.interventions.base import require_layer, show
from veena_lens.positions import parse


@dataclass(frozen=True)
class QuietHeads:
    """The output of the heads of `layer` with the least attention mass on `keys`, times `factor`, at `queries`.

    At each query int(keep * n_heads) heads stay as they are. Rows without keys (no picture) stay as they are, and so
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
            raise ValueError(f"QuietHeads: keep={self.keep} must be a share of the heads, 0 to 1.")
        if not math.isfinite(self.factor):
            raise ValueError(f"QuietHeads: factor={self.factor} must be finite.")

    @property
    def positions(self) -> Any:
        """The query positions."""
        return self.queries

    def __repr__(self) -> str:
        return show(self)

    def site(self, cfg: HookedVLMConfig) -> str:
        """hook_pattern of the layer."""
        return f"blocks.{require_layer(self.layer, cfg.n_layers, 'QuietHeads')}.attn.hook_pattern"

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
