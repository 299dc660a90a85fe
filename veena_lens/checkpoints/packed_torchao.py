"""Weights of torchao: tensors of its own classes, which know how to be multiplied."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict  # type: ignore[import-not-found]

from veena_lens.checkpoints.quantised import Packed, bias_parameter
from veena_lens.components.quantised import QuantisedLinear


@dataclass(frozen=True, eq=False)
class TorchaoWeight(Packed):
    """One of torchao's tensors."""

    tensor: Any

    @classmethod
    def of(cls, parts: Mapping[str, Tensor], about: Mapping[str, Any], dtype: torch.dtype) -> TorchaoWeight:
        """A file's parts and its header's description, put together."""
        header = {"w.weight": json.dumps(about), "tensor_names": json.dumps(["w.weight"])}
        made = unflatten_tensor_state_dict({f"w._weight_{part}": t for part, t in parts.items()}, header)
        tensor = (made[0] if isinstance(made, tuple) else made)["w.weight"]
        return cls(tensor.to(dtype) if tensor.dtype != dtype else tensor)

    def dense(self) -> Float[Tensor, "out in"]:
        return self.tensor.dequantize()

    def rows(self, part: tuple[int, int] | None) -> Packed | None:
        if part is None:
            return self
        size = self.tensor.shape[0] // part[1]
        try:
            return TorchaoWeight(self.tensor[part[0] * size : (part[0] + 1) * size])
        except NotImplementedError:  # a class that cannot be cut
            return None

    def linear(self, bias: Tensor | None, dtype: torch.dtype) -> QuantisedLinear:
        out_features, in_features = self.tensor.shape
        inner: Any = nn.Linear(in_features, out_features, bias=False, device="meta")
        inner.weight = nn.Parameter(self.tensor, requires_grad=False)
        inner.bias = bias_parameter(bias)
        return QuantisedLinear(inner, lambda module: module.weight.dequantize().to(dtype), in_features, out_features)
