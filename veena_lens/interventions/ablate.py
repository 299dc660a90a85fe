"""Ablation: take a component's value away, to zero, to its mean over reference runs, or to a given value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from veena_lens.activation_cache import ActivationCache
from veena_lens.config import HookedVLMConfig
from veena_lens.hook_table import canonical, row_of
from veena_lens.interventions.base import require_site, selection, show_units
from veena_lens.interventions.fitting import require_fill
from veena_lens.positions import parse, position_mask


@dataclass(frozen=True, eq=False)
class Ablate:
    """Set `heads` or `neurons` (default: all) of a hook point to `value` at `positions`.

    value: "zero"; "mean", over the rows and chosen positions of a `reference` cache; or a tensor that
    broadcasts to the activation.
    Raises: ValueError for "mean" without a reference, or another word.
    """

    name: str
    heads: Sequence[int] | None = None
    neurons: Sequence[int] | None = None
    positions: Any = "all"
    value: Any = "zero"
    reference: Any = None
    _fill: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        parse(self.positions)
        if isinstance(self.value, Tensor):
            fill = self.value.detach()
        elif self.value == "zero":
            fill = torch.zeros(())
        elif self.value == "mean":
            fill = self._mean()
        else:
            raise ValueError(f"Ablate: value={self.value!r} must be 'zero', 'mean' or a tensor.")
        object.__setattr__(self, "_fill", fill)

    def _mean(self) -> Tensor:
        cache = self.reference
        if not isinstance(cache, ActivationCache):
            raise ValueError("Ablate: value='mean' needs reference=cache, an ActivationCache of the runs to average.")
        value, axes = cache[self.name], row_of(canonical(self.name)).axis_names
        if axes[0] == "batch" and not cache.has_batch_dim:
            value = value[None]
        if "pos" not in axes:
            return value.mean(0)
        if cache.inputs is None:
            raise ValueError("Ablate: the reference cache has no inputs, so its positions are not known.")
        if axes[0] == "picture":
            lengths = cache.inputs.picture_lengths(in_tokens=self.name.startswith("connector."))
            real = value if lengths is None else [one[:n] for one, n in zip(value, lengths, strict=True)]
            return torch.cat(list(real)).mean(0)
        chosen = position_mask(cache.inputs, self.positions).to(value.device)
        if not bool(chosen.any()):
            raise ValueError(f"Ablate: positions {self.positions!r} select nothing in the reference runs.")
        return value[chosen].mean(0)

    def site(self, cfg: HookedVLMConfig) -> str:
        """The hook point it is named by. Raises: ValueError for a value that does not fit this model."""
        site = require_site(cfg, self.name, self.heads, self.neurons, "Ablate")
        require_fill(cfg, self.name, self._fill.shape, "Ablate")
        return site

    def edit(self, activation: Float[Tensor, ...], at: Bool[Tensor, "rows pos"]) -> Float[Tensor, ...]:
        """The value at the chosen places, else the activation as it was."""
        mask = selection(self.name, activation, at, self.heads, self.neurons)
        return torch.where(mask, self._fill.to(activation), activation)

    def __repr__(self) -> str:
        value = f"{list(self.value.shape)}" if isinstance(self.value, Tensor) else repr(self.value)
        parts = show_units(heads=self.heads, neurons=self.neurons, positions=self.positions)
        return f"Ablate({self.name!r}, {parts}, value={value})"
