"""Amplify or damp neurons: a'_n = factor * a_n, the same as scaling rows of W_out at those positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from veena_lens.config import HookedVLMConfig
from veena_lens.interventions.base import Intervention, require_layer, require_units, selection, show
from veena_lens.interventions.numbers import is_one, number, settle_units
from veena_lens.positions import parse


@dataclass(frozen=True)
class ScaleNeurons(Intervention):
    """Multiply the activations (mlp.hook_post) of `neurons` in `layer` by `factor` at `positions`.

    neurons: their numbers. factor: 1 changes nothing. positions: words, numbers, a slice, a mask, a Box or a Tile.
    signs: one number per neuron, which is then scaled only where its activation has that number's sign (never for 0).
    Raises: ValueError for no neurons, a factor that is not finite, or another number of signs than of neurons.
    """

    layer: SupportsIndex
    neurons: Any
    factor: Any = 2.0
    positions: Any = "last+generated"
    signs: Sequence[float | int] | None = None

    def __post_init__(self) -> None:
        parse(self.positions)
        if self.signs is not None and len(self.signs) != len(self.neurons):
            raise ValueError(f"ScaleNeurons: {len(self.signs)} signs for {len(self.neurons)} neurons; give one each.")
        object.__setattr__(self, "factor", number(self.factor, "ScaleNeurons", "factor"))
        settle_units(self)

    def __repr__(self) -> str:
        return show(self)

    def site(self, cfg: HookedVLMConfig) -> str:
        """Return blocks.{layer}.mlp.hook_post."""
        require_units(self.neurons, cfg.d_mlp, "ScaleNeurons", "neuron")
        return f"blocks.{require_layer(self.layer, cfg.n_layers, 'ScaleNeurons')}.mlp.hook_post"

    def edit(
        self, activation: Float[Tensor, "batch pos d_mlp"], at: Bool[Tensor, "rows pos"]
    ) -> Float[Tensor, "batch pos d_mlp"]:
        """Return factor * activation at the chosen places, else the activation."""
        mask = selection("blocks.0.mlp.hook_post", activation, at, neurons=self.neurons)
        if self.signs is not None:
            wanted = activation.new_zeros(activation.shape[-1])
            wanted[list(self.neurons)] = activation.new_tensor([float(s) for s in self.signs])
            mask = mask & (activation * wanted > 0)
        return torch.where(mask, activation * self.factor, activation)

    @property
    def changes_nothing(self) -> bool:
        """Return True for a factor of 1."""
        return is_one(self.factor)
