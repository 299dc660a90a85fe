"""A linear map whose weight is stored in few bits, in the place of a plain one.

The stored form and its kernel are a package's (bitsandbytes, torchao); nothing here imports one. `weight` reads as
a dequantised copy, so every view of weights (`W_Q`, `W_in`, ...) reads as numbers; writing to it changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


class QuantisedLinear(nn.Linear):
    """x W^T + b by `inner`, a package's module; `dense` gives W of it, in the dtype of the rest of the model."""

    def __init__(self, inner: nn.Module, dense: Callable[[Any], Tensor], in_features: int, out_features: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.inner, self._dense = inner, dense

    @property
    def weight(self) -> Float[Tensor, "out in"]:  # type: ignore[override]
        """Return a dequantised copy."""
        with torch.no_grad():
            return self._dense(self.inner)

    @property
    def bias(self) -> Any:  # type: ignore[override]
        """Return the bias itself, which is not quantised; None without."""
        return self.inner.bias

    def forward(self, input: Float[Tensor, "*axes in"]) -> Float[Tensor, "*axes out"]:
        return self.inner(input)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, quantised"
