"""Tiny models of every layout for the circuit tools, in float64 without casts, and neutral twins of their rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from tests.cases import BY_NAME
from tests.pairs import ready_of

# Grouped queries, biases, windows, both paddings, several images, tiles, any size, deep-stack features, text alone.
NAMES = (
    "clip-llama",
    "attention-bias",
    "window-mistral",
    "right-padding",
    "three-images-and-none",
    "text-qwen3",
    "llava-next",
    "onevision-resampled",
    "gemma3-unequal-rows",
    "qwen2_vl-image-and-video",
    "qwen3_vl-plain",
    "qwen3_vl-deepstack-every-decoder-layer",
)
PICTURED = tuple(name for name in NAMES if not name.startswith("text"))


# Three rows: two images of odd sizes, none, one.
NEXT = replace(BY_NAME["llava-next-llama"], name="three", rows=("3 i40x75 2 i90x30 4", "3", "2 i56x56 5"))


def ready(model_of: Callable[..., Any], name: str) -> tuple[Any, Any]:
    """(model, inputs) of a case."""
    return ready_of(model_of, NEXT if name == "llava-next" else BY_NAME[name])


def twin(inputs: Any) -> Any:
    """The same rows about other images; without images, with other words."""
    generator = torch.Generator().manual_seed(7)
    if inputs.pixel_values is None:
        return replace(inputs, tokens=torch.where(inputs.attention_mask, 3 + (inputs.tokens * 7) % 90, inputs.tokens))
    pixels = inputs.pixel_values
    return replace(inputs, pixel_values=torch.randn(pixels.shape, generator=generator, dtype=pixels.dtype))


def directions(model: Any, seed: int = 3) -> torch.Tensor:
    """One random vector a layer, of different lengths."""
    cfg, generator = model.cfg, torch.Generator().manual_seed(seed)
    scale = torch.arange(1, cfg.n_layers + 1, dtype=torch.float64)[:, None]
    return scale * torch.randn(cfg.n_layers, cfg.d_model, generator=generator, dtype=torch.float64)


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=-1, keepdim=True)
