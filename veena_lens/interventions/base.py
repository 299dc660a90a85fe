"""What every intervention offers a model, and the checks they share.

An intervention names a hook point, positions and an edit of an activation; it knows nothing of the model that
applies it. Layers are resolved and checked once, when `intervene` is called.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor

from veena_lens.config import HookedVLMConfig


@runtime_checkable
class Intervention(Protocol):
    """Data with a site, positions and an edit."""

    positions: Any

    def site(self, cfg: HookedVLMConfig) -> str:
        """The hook point it edits. Raises: ValueError where it does not fit a model of this configuration."""
        ...

    def edit(self, activation: Float[Tensor, ...], at: Bool[Tensor, "batch pos"]) -> Float[Tensor, ...]:
        """The edited activation, a new tensor; `at` is True at the positions to edit."""
        ...


def require_layer(layer: int, n_layers: int, who: str) -> int:
    """A layer in 0 .. n_layers - 1, negative ones counted from the end.

    Raises: ValueError when it is outside."""
    resolved = layer + n_layers if layer < 0 else layer
    if not 0 <= resolved < n_layers:
        raise ValueError(f"{who}: layer {layer} does not exist; the model has layers 0 to {n_layers - 1}.")
    return resolved
