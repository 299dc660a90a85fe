"""RMS and layer norm with `hook_scale` (the denominator) and `hook_normalized`, rounding as Hugging Face does.

Hooks as in HookedTransformer: `hook_normalized` is before the weight for RMS norm, after weight and bias for
layer norm. The copies that split query, key and value inputs ask for go through `of_copies`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from veena_lens.components.hooks import carry, heard, listen, uncompiled
from veena_lens.config import TransformerConfig


@dataclass(frozen=True, eq=False)
class Normed:
    """A norm's output, and what hooks set inside it: scale and normalized, None where nobody edited.

    `points` are the values that listeners saw, in the graph: copies pass their gradients to them."""

    out: Any
    scale: Any = None
    normalized: Any = None
    unedited: Any = None  # normalized before the edit, to tell the edited elements
    unedited_scale: Any = None  # likewise
    points: tuple[Any, Any] = (None, None)  # (scale, normalized)


class Norm(nn.Module, ABC):
    """Interface of both norms: `weight`, `hook_scale`, `hook_normalized`; `run` also reports edits."""

    def __init__(self, width: int, eps: float, casts: str, bias: bool) -> None:
        super().__init__()
        self.eps, self.casts = eps, casts
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()

    @property
    def w(self) -> Float[Tensor, " width"]:
        """Return the weight, under HookedTransformer's name."""
        return self.weight

    @property
    def b(self) -> Float[Tensor, " width"]:
        """Return the bias, under HookedTransformer's name; zeros where the norm has none."""
        return torch.zeros_like(self.weight) if self.bias is None else self.bias

    @uncompiled
    def forward(self, x: Float[Tensor, "*axes width"]) -> Float[Tensor, "*axes width"]:
        return self.run(x).out

    @abstractmethod
    def run(self, x: Float[Tensor, "*axes width"]) -> Normed:
        """Compute the norm, its hooks called once."""

    def _hear_normalized(self, normalized: Tensor) -> tuple[Any, bool, Any]:
        """Return (value that goes on, whether it was edited, what listeners saw)."""
        if not heard(self.hook_normalized):
            return normalized, False, None
        out, edited = listen(self.hook_normalized, normalized.clone())
        return out, edited, out

    @abstractmethod
    def of_copies(
        self, x: Float[Tensor, "batch pos copy width"], seen: Normed
    ) -> Float[Tensor, "batch pos copy width"]:
        """Compute the norm of copies of the residual, honouring what hooks set for the residual itself: where its
        scale was edited it divides every copy, and elements of `normalized` that were edited hold for every copy."""


class RMSNorm(Norm):
    """x / sqrt(mean(x^2) + eps) * weight, in float32 and back as Llama does unless casts are off.

    With `adds_one` (Gemma) the factor is 1 + weight, applied before the cast back; `w` is then that factor, a copy."""

    def __init__(self, width: int, eps: float, casts: str = "hf", adds_one: bool = False) -> None:
        super().__init__(width, eps, casts, bias=False)
        self.adds_one = adds_one
        if adds_one:
            nn.init.zeros_(self.weight)

    @property
    def w(self) -> Float[Tensor, " width"]:
        """Return what the normalized value is multiplied by, under HookedTransformer's name: a view of the weight,
        or the copy 1 + weight."""
        return 1 + self.weight if self.adds_one else self.weight

    def _wide(self, x: Tensor) -> Tensor:
        return x.to(torch.float32) if self.casts == "hf" else x

    def run(self, x: Float[Tensor, "*axes width"]) -> Normed:
        wide = self._wide(x)
        inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        normalized, point, scale = wide * inverse, None, (None, None)
        if heard(self.hook_scale):
            # rsqrt(v) and 1 / sqrt(v) differ in the last bit: without an edit the former goes on.
            point, edited = listen(self.hook_scale, 1 / inverse)
            divided = wide / point
            normalized = divided if edited else carry(normalized, divided)
            scale = (point, 1 / inverse) if edited else (None, None)
        exact, normalized = normalized, normalized.to(x.dtype)
        out, edited, heard_out = self._hear_normalized(normalized)
        values = (out, normalized) if edited else (None, None)
        if self.adds_one and heard_out is not None:  # what nobody edited goes on unrounded
            out = carry(torch.where(out == normalized, exact, out.to(exact.dtype)), out.to(exact.dtype))
        elif self.adds_one:
            out = exact
        return Normed(self._weighted(out, x.dtype), scale[0], *values, scale[1], (point, heard_out))

    def _weighted(self, normalized: Float[Tensor, "*axes width"], dtype: torch.dtype) -> Float[Tensor, "*axes width"]:
        if not self.adds_one:
            return self.weight * normalized.to(dtype)
        return (normalized * (1.0 + self.weight.to(normalized.dtype))).to(dtype)

    def of_copies(
        self, x: Float[Tensor, "batch pos copy width"], seen: Normed
    ) -> Float[Tensor, "batch pos copy width"]:
        wide = self._wide(x)
        inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        normalized = wide * inverse
        if _has_gradient(seen.points[0]):
            normalized = carry(normalized, wide / (1 / inverse + _zero(seen.points[0])))
        if seen.scale is not None:
            normalized = torch.where(_edited_scale(seen), wide / seen.scale[:, :, None], normalized)
        normalized = normalized if self.adds_one else normalized.to(x.dtype)
        return self._weighted(_override(normalized, seen), x.dtype)


class LayerNorm(Norm):
    """(x - mean) / sqrt(var + eps) * weight + bias, in the dtype of the input."""

    def __init__(self, width: int, eps: float, casts: str = "hf") -> None:
        super().__init__(width, eps, casts, bias=True)

    def _scale(self, x: Tensor) -> Tensor:
        return (x.var(-1, keepdim=True, unbiased=False) + self.eps).sqrt()

    def _divided(self, x: Tensor, scale: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / scale * self.weight + self.b

    def run(self, x: Float[Tensor, "*axes width"]) -> Normed:
        normalized, point, scale = F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps), None, (None,) * 2
        if heard(self.hook_scale):
            point, edited = listen(self.hook_scale, self._scale(x))
            divided = self._divided(x, point)
            normalized = divided if edited else carry(normalized, divided)
            scale = (point, self._scale(x)) if edited else (None, None)
        out, edited, heard_out = self._hear_normalized(normalized)
        values = (out, normalized) if edited else (None, None)
        return Normed(out, scale[0], *values, scale[1], (point, heard_out))

    def of_copies(
        self, x: Float[Tensor, "batch pos copy width"], seen: Normed
    ) -> Float[Tensor, "batch pos copy width"]:
        normalized = F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        if _has_gradient(seen.points[0]):
            normalized = carry(normalized, self._divided(x, self._scale(x) + _zero(seen.points[0])))
        if seen.scale is not None:
            normalized = torch.where(_edited_scale(seen), self._divided(x, seen.scale[:, :, None]), normalized)
        return _override(normalized, seen)


def _has_gradient(point: Tensor | None) -> bool:
    return point is not None and torch.is_grad_enabled() and point.requires_grad


def _edited_scale(seen: Normed) -> Tensor:
    """Return where the residual's scale was edited, one for all copies: other rows of a batch are left to
    themselves."""
    return (seen.scale != seen.unedited_scale)[:, :, None]


def _zero(point: Tensor) -> Tensor:
    """Return zeros, one for each copy, whose gradient goes to what a listener saw."""
    return (point - point.detach())[:, :, None]


def _override(normalized: Tensor, seen: Normed) -> Tensor:
    if seen.normalized is not None:
        edited = (seen.normalized != seen.unedited)[:, :, None]
        return torch.where(edited, seen.normalized[:, :, None], normalized)
    return normalized + _zero(seen.points[1]).to(normalized.dtype) if _has_gradient(seen.points[1]) else normalized


def make_norm(cfg: TransformerConfig) -> Norm:
    """Return the norm that a configuration asks for, over d_model."""
    if cfg.normalization_type == "RMS":
        return RMSNorm(cfg.d_model, cfg.norm_eps, cfg.casts, cfg.norm_weight_plus_one)
    return LayerNorm(cfg.d_model, cfg.norm_eps, cfg.casts)
