"""Steering: change the residual stream, or what an MLP adds to it, towards a direction.

`Steer` adds the direction (Turner et al. 2023, arXiv 2308.10248; CAA, arXiv 2312.06681). `SteerKeepingNorm` turns an
output towards it and keeps the output's norm (VISTA, VTI).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, SupportsIndex

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from veena_lens.config import HookedVLMConfig
from veena_lens.interventions.base import Intervention, require_layer, shown
from veena_lens.interventions.numbers import bare, direction, is_zero, like, number, settle_units
from veena_lens.positions import parse


@dataclass(frozen=True, eq=False)  # holds a tensor: identity, not ==
class Steer(Intervention):
    """Add alpha * vector to the residual stream after `layer` (resid_post) at `positions`.

    vector: [d_model], a tensor, an array or a list; gradients reach a tensor. alpha: in units of `vector`.
    positions: words, numbers, a slice, a mask, a Box or a Tile.

    Raises: ValueError for a vector that is not [d_model], is not finite, or for unknown positions; TypeError for a
    vector that is not numbers.
    """

    layer: SupportsIndex
    vector: Any
    alpha: Any = 1.0
    positions: Any = "last+generated"

    def __post_init__(self) -> None:
        parse(self.positions)
        settle_units(self)
        object.__setattr__(self, "vector", direction(self.vector, "Steer"))
        object.__setattr__(self, "alpha", number(self.alpha, "Steer", "alpha"))

    def site(self, cfg: HookedVLMConfig) -> str:
        """Return blocks.{layer}.hook_resid_post."""
        if len(self.vector) != cfg.d_model:
            raise ValueError(f"Steer: the vector has {len(self.vector)} entries; the model's d_model is {cfg.d_model}.")
        return f"blocks.{require_layer(self.layer, cfg.n_layers, 'Steer')}.hook_resid_post"

    def edit(
        self, activation: Float[Tensor, "batch pos d_model"], at: Bool[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return activation + alpha * vector where `at`, else the activation."""
        return torch.where(at[..., None], activation + self.alpha * like(self.vector, activation), activation)

    def __repr__(self) -> str:
        norm = bare(self.vector.float().norm())
        vector = f"[{len(self.vector)}] of norm {norm:.3g}"
        alpha = f"alpha={bare(self.alpha):g}"
        return f"Steer(layer={self.layer}, vector={vector}, {alpha}, positions={shown(self.positions)})"


@dataclass(frozen=True, eq=False)  # holds a tensor: identity, not ==
class SteerKeepingNorm(Intervention):
    """Turn what the MLP of `layer` adds (hook_mlp_out) towards a direction at `positions`; its norm is kept.

    With ^ for unit length, x becomes ||x|| (x^ + strength w v^)^, where w is 1 + max(0, cos(x, -v)) if `adaptive` (an
    output that points away is turned more), else 1.
    vector: [d_model], as for `Steer`. strength: 0 changes nothing. positions: words, numbers, a slice, a mask, a Box or
        a Tile.
    Raises: ValueError for a vector that is not [d_model], is zero or not finite, or a strength that is not finite.
    Source: Li et al. 2025, arXiv 2502.03628 (VISTA, adaptive); Liu et al. 2024, arXiv 2410.15778 (VTI, not).
    """

    layer: SupportsIndex
    vector: Any
    strength: Any = 0.1
    positions: Any = "all"
    adaptive: bool = True

    def __post_init__(self) -> None:
        parse(self.positions)
        settle_units(self)
        object.__setattr__(self, "vector", direction(self.vector, "SteerKeepingNorm"))
        object.__setattr__(self, "strength", number(self.strength, "SteerKeepingNorm", "strength"))
        if not bool(self.vector.any()):
            raise ValueError("SteerKeepingNorm: the vector must be finite and not zero, or it has no direction.")

    def site(self, cfg: HookedVLMConfig) -> str:
        """Return blocks.{layer}.hook_mlp_out."""
        if len(self.vector) != cfg.d_model:
            raise ValueError(
                f"SteerKeepingNorm: the vector has {len(self.vector)} entries; the model's d_model is {cfg.d_model}."
            )
        return f"blocks.{require_layer(self.layer, cfg.n_layers, 'SteerKeepingNorm')}.hook_mlp_out"

    def edit(
        self, activation: Float[Tensor, "batch pos d_model"], at: Bool[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return the turned output where `at`, else the output."""
        if is_zero(self.strength):
            return activation
        rows = at.any(-1)  # rows that other directions turn need no arithmetic
        chosen = activation[rows]
        x = chosen if chosen.dtype == torch.float64 else chosen.float()
        v = F.normalize(like(self.vector, x), dim=-1)
        away = F.cosine_similarity(x, -v, dim=-1).clamp(min=0)[..., None] if self.adaptive else 0.0
        turned = F.normalize(F.normalize(x, dim=-1) + self.strength * (1 + away) * v, dim=-1)
        turned = turned * x.norm(dim=-1, keepdim=True)
        out = activation.clone()
        out[rows] = torch.where(at[rows][..., None], turned.to(activation), chosen)
        return out

    def __repr__(self) -> str:
        rule = "" if self.adaptive else ", adaptive=False"
        return (
            f"SteerKeepingNorm(layer={self.layer}, vector=[{len(self.vector)}], strength={bare(self.strength):g}, "
            f"positions={shown(self.positions)}{rule})"
        )
