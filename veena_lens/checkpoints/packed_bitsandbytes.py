"""Weights of bitsandbytes (Dettmers et al. 2022, arXiv 2208.07339; 2023, arXiv 2305.14314), by its own modules."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb  # type: ignore[import-not-found]
import torch
from jaxtyping import Float
from torch import Tensor

from veena_lens.checkpoints.quantised import Packed, bias_parameter
from veena_lens.components.quantised import QuantisedLinear

BLOCK = 64  # numbers that share a scale


@dataclass(frozen=True, eq=False)
class FourBits(Packed):
    """Blocks of 64 numbers share a scale; a fused weight's parts need not begin at a block, so it is not cut."""

    data: Tensor
    statistics: dict[str, Tensor]
    shape: tuple[int, ...]
    compute_dtype: torch.dtype

    def dense(self) -> Float[Tensor, "out in"]:
        state = bnb.functional.QuantState.from_dict(dict(self.statistics), device=self.data.device)
        return _dense_blocks(self.data, state)

    def rows(self, part: tuple[int, int] | None) -> Packed | None:
        # Where rows are no whole number of blocks, the package's kernel for CPUs takes wrong scales (0.50).
        whole = self.shape[1] % BLOCK == 0 or self.data.device.type != "cpu"
        return self if part is None and whole else None

    def linear(self, bias: Tensor | None, dtype: torch.dtype) -> QuantisedLinear:
        out_features, in_features = self.shape
        inner = bnb.nn.Linear4bit(
            in_features, out_features, bias=False, compute_dtype=self.compute_dtype, device="meta"
        )
        inner.weight = bnb.nn.Params4bit.from_prequantized(
            self.data, dict(self.statistics), device=self.data.device, module=inner
        )
        # On some processors a first forward pass would put the bytes in another order, which `dense` could not read.
        inner.support_avx512bf16_for_cpu = False
        inner.bias = bias_parameter(bias)

        def dense(module: Any) -> Tensor:
            return _dense_blocks(module.weight.data, module.weight.quant_state).to(dtype)

        return QuantisedLinear(inner, dense, in_features, out_features)


@dataclass(frozen=True, eq=False)
class EightBits(Packed):
    """Rows of integers, each with the largest absolute value that 127 stands for."""

    data: Tensor
    largest: Float[Tensor, " out"]
    threshold: float

    def dense(self) -> Float[Tensor, "out in"]:
        return _dense_rows(self.data, self.largest)

    def rows(self, part: tuple[int, int] | None) -> Packed | None:
        if part is None:
            return self
        size = len(self.data) // part[1]
        at = slice(part[0] * size, (part[0] + 1) * size)
        return EightBits(self.data[at].clone(), self.largest[at].clone(), self.threshold)

    def linear(self, bias: Tensor | None, dtype: torch.dtype) -> QuantisedLinear:
        out_features, in_features = self.data.shape
        inner = bnb.nn.Linear8bitLt(
            in_features, out_features, bias=False, has_fp16_weights=False, threshold=self.threshold, device="meta"
        )
        inner.weight = bnb.nn.Int8Params(
            self.data, requires_grad=False, has_fp16_weights=False, CB=self.data, SCB=self.largest
        )
        inner.bias = bias_parameter(bias)

        def dense(module: Any) -> Tensor:
            largest = module.weight.SCB if module.weight.SCB is not None else module.state.SCB  # moved at first use
            return _dense_rows(module.weight.data, largest).to(dtype)

        return QuantisedLinear(inner, dense, in_features, out_features)


def _dense_blocks(data: Tensor, state: Any) -> Float[Tensor, "out in"]:
    """Read as one row a block, which every kernel of the package reads rightly."""
    shape, flat = tuple(state.shape), copy(state)
    n = shape[0] * shape[1]
    flat.shape = torch.Size([n // state.blocksize, state.blocksize] if n % state.blocksize == 0 else [1, n])
    return bnb.functional.dequantize_4bit(data, flat).reshape(shape)


def _dense_rows(data: Tensor, largest: Tensor) -> Float[Tensor, "out in"]:
    return data.float() * (largest[:, None] / 127)
