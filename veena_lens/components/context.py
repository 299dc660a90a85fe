"""What the blocks of one forward pass share: masks, rotary tables, past keys, and who reads attention.

Masks are made once per pass and window size. With neither padding nor a past the mask is left out and the
kernel's own causal rule applies, as Hugging Face does, so that the same kernel runs on the same arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from veena_lens.components.kv_cache import KVCache, SharedPrefix
from veena_lens.components.masks import AreaMask, AttentionMask, Mask, causal_mask
from veena_lens.components.rotary import RotaryTables


@runtime_checkable
class AttentionReader(Protocol):
    """Whoever reads the attention of a pass without a pattern being made for it."""

    def read(
        self,
        layer: int,
        q: Float[Tensor, "batch n_heads query_pos d_head"],
        k: Float[Tensor, "batch n_key_value_heads key_pos d_head"],
        mask: Mask,
        bias: Tensor | None,
        pattern: Float[Tensor, "batch n_heads query_pos key_pos"] | None,
    ) -> None:
        """Take a layer's rotated queries, keys, mask and bias, and its pattern where one was made anyway."""
        ...


@dataclass(eq=False)
class Context:
    """Shared by the blocks of one pass.

    key_mask: False at pads; None without any. n_past, n_new: positions before this chunk, and of it.
    is_causal: False in a vision tower. rotary: gives a layer's rotary tables; None without rotary positions.
    kv_cache: holds earlier chunks' keys and values and takes this one's. windows: a layer's sliding window, None: full.
    biases: gives what is added to the scores of a layer in turn, each [batch heads query_pos key_pos].
    rows: reads the queries and keys of each layer. prefix: keys and values of positions that all rows share.
    deepstack: what is added at the input of a layer, zero away from the image tokens.
    image_runs: numbers, for every key, the image whose tokens read each other in both directions (-1: none); new
        positions past its end are text.
    ungrouped: whether keys and values have one copy per query head.
    areas: numbers the area of each position; in the layers of `within_areas` a query reads its own area alone.
    """

    key_mask: Bool[Tensor, "batch key_pos"] | None
    n_past: int = 0
    n_new: int = 0
    is_causal: bool = True
    rotary: Callable[[int], RotaryTables] | None = None
    kv_cache: KVCache | None = None
    windows: Callable[[int], int | None] = lambda layer: None
    biases: Callable[[int], list[Tensor]] = lambda layer: []
    rows: AttentionReader | None = None
    prefix: SharedPrefix | None = None
    deepstack: Mapping[int, Float[Tensor, "#batch pos d_model"]] = field(default_factory=dict)
    image_runs: Int[Tensor, "#batch known"] | None = None
    areas: Int[Tensor, "batch key_pos"] | None = None
    within_areas: Callable[[int], bool] = lambda layer: False
    ungrouped: bool = False
    _masks: dict[Any, Mask] = field(default_factory=dict)

    def mask(self, layer: int, device: torch.device) -> Mask:
        """Return the mask of a layer, on its device."""
        window = self.windows(layer)
        n_key = self.n_past + self.n_new
        if window is not None and window >= n_key:
            window = None
        areas = self.areas if self.within_areas(layer) else None
        key = (window, areas is not None, device)
        if key not in self._masks:
            self._masks[key] = self._make(window, device) if areas is None else self._of_areas(areas.to(device))
        return self._masks[key]

    def _of_areas(self, areas: Int[Tensor, "batch pos"]) -> AreaMask:
        real = torch.ones_like(areas, dtype=torch.bool) if self.key_mask is None else self.key_mask.to(areas.device)
        return AreaMask(areas, real)

    def _make(self, window: int | None, device: torch.device) -> AttentionMask:
        padded = self.key_mask is not None and not bool(self.key_mask.all())
        if not self.is_causal:
            allowed = self.key_mask[:, None, None, :].to(device) if padded and self.key_mask is not None else None
            return AttentionMask(allowed, is_causal=False)
        if not padded and window is None and self.image_runs is None:
            if self.n_past == 0:
                return AttentionMask(None, is_causal=self.n_new > 1)
            if self.n_new == 1:
                return AttentionMask(None, is_causal=False)
        allowed = causal_mask(self.n_past, self.n_new, window, device, self.image_runs)
        if padded and self.key_mask is not None:
            allowed = allowed & self.key_mask[:, None, None, :].to(device)
        return AttentionMask(allowed, is_causal=False)

    def with_deepstack(
        self, layer: int, resid: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return the residual that enters a layer with the features of inner tower layers added."""
        added = self.deepstack.get(layer)
        return resid if added is None else resid + added.to(resid.device)

    def tables(self, layer: int, device: torch.device) -> RotaryTables | None:
        """Return the rotary tables of a layer, on a device."""
        if self.rotary is None:
            return None
        cos, sin = self.rotary(layer)
        return cos.to(device), sin.to(device)
