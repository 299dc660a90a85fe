"""Edits of hook points for tests: the same noise in the library and in the plain model."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def noisy(name: str, value: Tensor) -> Tensor:
    """The value with the same noise at every call, whatever stands at the pads; scales stay positive, and
    attention weights that are zero stay zero (pads are not attended)."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
    if name.endswith(("hook_scale", "hook_pattern")):
        return value * (1 + 0.2 * noise.tanh())
    if name.endswith("hook_attn_scores"):  # masked scores are astronomically negative
        return value + noise
    return value + 0.1 * noise


def replace_with_noisy(value: Tensor, hook: Any) -> Tensor:
    return noisy(hook.name, value)


def make_noisy_in_place(value: Tensor, hook: Any) -> None:
    value.copy_(noisy(hook.name, value))


def logits_edited(model: Any, inputs: Any, name: str, fn: Callable[..., Any]) -> Tensor:
    with torch.no_grad():
        return model.run_with_hooks(inputs, fwd_hooks=[(name, fn)])
