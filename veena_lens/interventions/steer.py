"""Steering: add a direction to the residual stream (Turner et al. 2023, arXiv 2308.10248; CAA, arXiv 2312.06681)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from veena_lens.config import HookedVLMConfig
from veena_lens.interventions.base import require_layer, shown
from veena_lens.positions import parse


@dataclass(frozen=True, eq=False)  # holds a tensor: identity, not ==
class Steer:
    """resid_post of `layer` += alpha * vector at `positions`; alpha is in units of `vector`.

    Raises: ValueError for a vector that is not [d_model], is not finite, or for unknown positions.
    """

    layer: int
    vector: Float[Tensor, ...]
    alpha: float | int = 1.0
    positions: Any = "last+generated"

    def __post_init__(self) -> None:
        parse(self.positions)
        if self.vector.ndim != 1:
            raise ValueError(f"Steer: the vector must be [d_model], not {list(self.vector.shape)}; pick one layer's.")
        if not torch.isfinite(self.vector).all():
            raise ValueError("Steer: the vector holds values that are not finite.")
        if not math.isfinite(self.alpha):
            raise ValueError(f"Steer: alpha={self.alpha} must be finite.")

    def site(self, cfg: HookedVLMConfig) -> str:
        """blocks.{layer}.hook_resid_post."""
        if len(self.vector) != cfg.d_model:
            raise ValueError(f"Steer: the vector has {len(self.vector)} entries; the model's d_model is {cfg.d_model}.")
        return f"blocks.{require_layer(self.layer, cfg.n_layers, 'Steer')}.hook_resid_post"

    def edit(
        self, activation: Float[Tensor, "batch pos d_model"], at: Bool[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """activation + alpha * vector where `at`, else as it was."""
        return torch.where(at[..., None], activation + self.alpha * self.vector.to(activation), activation)

    def __repr__(self) -> str:
        norm = float(self.vector.float().norm())
        vector = f"[{len(self.vector)}] of norm {norm:.3g}"
        return f"Steer(layer={self.layer}, vector={vector}, alpha={self.alpha:g}, positions={shown(self.positions)})"
