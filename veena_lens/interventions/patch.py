"""Patch and ablate: put another activation in place of a run's own.

`Patch` takes it from another run (activation patching, Vig et al. 2020; Meng et al. 2022). `Ablate` takes a
component's value away: it becomes zero, its mean over reference runs, or a given value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from veena_lens.activation_cache import ActivationCache
from veena_lens.config import HookedVLMConfig
from veena_lens.hook_table import canonical, row_of
from veena_lens.inputs import MultimodalInputs
from veena_lens.interventions.base import (
    PLACES,
    Intervention,
    Place,
    places_of_run,
    require_fill,
    require_site,
    require_source,
    selection,
    show_units,
)
from veena_lens.interventions.numbers import floats, like, settle_units
from veena_lens.positions import parse, position_mask, reaches_generated


@dataclass(frozen=True, eq=False)
class Patch(Intervention):
    """Replace the activation of a hook point at `positions` by another run's.

    name: the hook point. heads, neurons: which to replace; None for all.
    source: a cache of the other run, or its activation as a tensor, which gradients reach; one row serves every row.
        With a cache, words such as "query" are read in the source's inputs, and the k-th chosen position there goes to
        the k-th one here, so that runs of unequal length can be patched into each other.
    positions: words, numbers, a slice, a mask, a Box or a Tile.
    Raises: MissingActivation (a KeyError) when the cache lacks the activation; ValueError for what does not fit.
    """

    name: str
    source: Any
    heads: Any = None
    neurons: Any = None
    positions: Any = "last"
    _values: Tensor = field(init=False, repr=False)
    _chosen: Tensor | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        parse(self.positions)
        settle_units(self)
        if isinstance(self.source, ActivationCache):
            values = self.source[self.name]
            if not self.source.has_batch_dim:
                values = values[None]
            if self.source.inputs is not None and row_of(canonical(self.name)).of_text:
                object.__setattr__(self, "_chosen", position_mask(self.source.inputs, self.positions).cpu())
        elif isinstance(self.source, Tensor):
            values = self.source
        else:
            raise TypeError(f"Patch: source must be an ActivationCache or a tensor, not {type(self.source).__name__}.")
        object.__setattr__(self, "_values", values)

    @property
    def n_rows(self) -> int | None:
        """Return the number of rows of the source; None at hooks that count images or image tokens."""
        return len(self._values) if row_of(canonical(self.name)).of_text else None

    @property
    def is_whole(self) -> bool:
        """Return True where the source is a bare tensor of whole rows, whose positions are those of the run itself."""
        return self._chosen is None

    def site(self, cfg: HookedVLMConfig) -> str:
        """Return the hook point. Raises: ValueError for a source of another model's shape."""
        site = require_site(cfg, self.name, self.heads, self.neurons, "Patch")
        require_source(cfg, self.name, self._values.shape, "Patch")
        return site

    @property
    def caches(self) -> Sequence[ActivationCache]:
        """Return the source, where it is a cache."""
        return (self.source,) if isinstance(self.source, ActivationCache) else ()

    def fits(self, cfg: HookedVLMConfig, inputs: MultimodalInputs, at: Bool[Tensor, "rows pos"]) -> None:
        """Raise ValueError, before a run, for a source that does not fit its rows, images or positions."""
        if self.n_rows not in (None, 1, len(inputs)):
            raise ValueError(
                f"{self!r}: its source has {self.n_rows} rows, the run {len(inputs)}; give a source of one row, or of "
                "as many as the run has."
            )
        axes, shape = row_of(canonical(self.name)).axis_names, list(self._values.shape)
        if "key_pos" in axes and self._chosen is not None and isinstance(self.source, ActivationCache):
            self._require_same_keys(inputs)
        sizes = places_of_run(cfg, inputs, self.name, inputs.shape[1])
        chosen = self._chosen
        answers = {0 if s.answer is None else s.answer.stop - s.answer.start for s in inputs.spans}
        n_answer = answers.pop() if len(answers) == 1 else 0  # of unequal ones the prompts would lie elsewhere
        for axis, size in sizes.items():
            found = shape[axes.index(axis)]
            is_row = axis == "batch" and found == 1
            # Without a cache of keys and values, generation runs its own tokens again behind the source's.
            is_grown = chosen is None and axis.endswith("pos") and size - n_answer <= found <= size
            if found == size or is_row or is_grown or (chosen is not None and axis != "batch"):
                continue
            raise ValueError(
                f"Patch: the source of {self.name} is {shape}, of {axis} {found}; this run has {axis} {size}. Give one "
                "row or as many as the run's, and a cache with its inputs to patch runs of different length."
            )
        if chosen is not None:
            self._require_counts(chosen.expand(len(at), -1) if len(chosen) == 1 else chosen, at.cpu())

    def _require_same_keys(self, inputs: MultimodalInputs) -> None:
        """Raise ValueError where the prompts of source and run differ in length: their keys are not the same."""
        prompts = [x.shape[1] - _longest_answer(x) for x in (self.source.inputs, inputs)]
        if prompts[0] != prompts[1]:
            raise ValueError(f"Patch: {self.name} has keys at other positions in the source; patch hook_z instead.")

    def _require_counts(self, chosen: Bool[Tensor, "rows _"], at: Bool[Tensor, "rows pos"]) -> None:
        """Raise ValueError where a row asks for more positions than its source has chosen."""
        if not reaches_generated(self.positions) and bool((at.sum(-1) > chosen.sum(-1)).any()):
            raise ValueError(
                f"Patch: positions {self.positions!r} are {at.sum(-1).tolist()} in the run's rows but only "
                f"{chosen.sum(-1).tolist()} in the source's."
            )

    def edit(
        self,
        activation: Float[Tensor, ...],
        at: Bool[Tensor, "rows pos"],
        before: Int[Tensor, " rows"] | None = None,
    ) -> Float[Tensor, ...]:
        """Return the source's value at the chosen places, else the activation.

        before: how many positions of each row were chosen in earlier chunks of cached decoding. Behind the source's
        last chosen position nothing is patched."""
        values, at = self._aligned(activation, at, before)
        return torch.where(selection(self.name, activation, at, self.heads, self.neurons), values, activation)

    def edit_at(self, activation: Float[Tensor, ...], place: Place) -> Float[Tensor, ...]:
        """Return the edit of one chunk, which goes on where earlier chunks left the source."""
        before = None if place.earlier is None else place.earlier().to(activation.device)
        return self.edit(activation, place.at, before)

    def _aligned(self, activation: Tensor, at: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the source's values moved to the positions that `at` marks, and those of them that it has."""
        values = like(self._values, activation)
        axes = row_of(canonical(self.name)).axis_names
        if values.shape[0] == 1 and activation.shape[0] > 1 and axes[0] == "batch":
            values = values.expand(activation.shape[0], *values.shape[1:])
        chosen = self._chosen
        if chosen is None:
            if before is not None:
                return activation, torch.zeros_like(at)
            return (values, at) if values.shape == activation.shape else self._grown(activation, values, at)
        chosen = chosen.to(at.device)
        if len(chosen) == 1 and len(at) > 1:
            chosen = chosen.expand(len(at), -1)
        if "key_pos" in axes:  # those of the longer run are keys that come later
            values = F.pad(values, (0, activation.shape[-1] - values.shape[-1]))
        if torch.equal(chosen, at):
            return values, at
        start = at.new_zeros(len(at), dtype=torch.long) if before is None else before.to(at.device)
        rank = start[:, None] + at.long().cumsum(-1) - 1  # the k-th chosen position of the row
        have = chosen.sum(-1)
        self._require_counts(chosen, at)
        at = at & (rank < have[:, None])
        places = torch.argsort((~chosen).long(), dim=-1, stable=True)
        index = places.gather(1, rank.clamp(0, places.shape[1] - 1))
        axis = axes.index("pos") if "pos" in axes else axes.index("query_pos")
        moved = values.movedim(axis, 1)[torch.arange(len(at), device=at.device)[:, None], index]
        return moved.movedim(1, axis), at

    def _grown(self, activation: Tensor, values: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Return the source's values in front of what a longer run has at its end, and the chosen positions that it
        has.

        Raises: ValueError where the source is not a shorter run of the same rows."""
        axes = row_of(canonical(self.name)).axis_names
        longer = [i for i, axis in enumerate(axes) if axis in ("pos", "query_pos", "key_pos")]
        lengths = {values.shape[i] for i in longer}
        rest = [i for i in range(values.ndim) if i not in longer]
        if axes[0] != "batch" or len(lengths) > 1 or any(values.shape[i] != activation.shape[i] for i in rest):
            raise ValueError(
                f"Patch: the source of {self.name} is {list(values.shape)}, the run's {list(activation.shape)}; "
                "give a cache with its inputs to patch runs of different length."
            )
        n = min(*lengths, at.shape[1])
        out, index = activation.clone(), tuple(slice(n) if i in longer else slice(None) for i in range(values.ndim))
        out[index] = values[index]
        at = at.clone()
        at[:, n:] = False
        return out, at

    def __repr__(self) -> str:
        parts = show_units(heads=self.heads, neurons=self.neurons, positions=self.positions)
        return f"Patch({self.name!r}, source={list(self._values.shape)}, {parts})"


def _longest_answer(inputs: MultimodalInputs) -> int:
    return max(0 if s.answer is None else s.answer.stop - s.answer.start for s in inputs.spans)


@dataclass(frozen=True, eq=False)
class Ablate(Intervention):
    """Set the activation of a hook point to a value at `positions`.

    name: the hook point. heads, neurons: which to set; None for all.
    value: "zero"; "mean", over the rows and chosen positions of the `reference` cache; or numbers, a tensor that
        gradients reach or an array, that broadcast to the activation. One with positions has those of the prompt.
    positions: words, numbers, a slice, a mask, a Box or a Tile.
    Raises: ValueError for "mean" without a reference, or another word.
    """

    name: str
    heads: Any = None
    neurons: Any = None
    positions: Any = "all"
    value: Any = "zero"
    reference: Any = None
    _fill: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        parse(self.positions)
        settle_units(self)
        if not isinstance(self.value, (str, type(None))):
            fill = floats(self.value, "Ablate: value")
            if bool(fill.isnan().any()):
                raise ValueError("Ablate: value holds numbers that are not a number (NaN).")
            object.__setattr__(self, "value", fill)
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
        if axes[0] == "crop":
            lengths = cache.inputs.crop_lengths(in_tokens=self.name.startswith("connector."))
            real = value if lengths is None else [one[:n] for one, n in zip(value, lengths, strict=True)]
            return torch.cat(list(real)).mean(0)
        chosen = position_mask(cache.inputs, self.positions).to(value.device)
        if not bool(chosen.any()):
            raise ValueError(f"Ablate: positions {self.positions!r} select nothing in the reference runs.")
        return value[chosen].mean(0)

    def site(self, cfg: HookedVLMConfig) -> str:
        """Return the hook point. Raises: ValueError for a value that does not fit this model."""
        site = require_site(cfg, self.name, self.heads, self.neurons, "Ablate")
        require_fill(cfg, self.name, self._fill.shape, "Ablate")
        return site

    @property
    def caches(self) -> Sequence[ActivationCache]:
        """Return the reference, where it is a cache."""
        return (self.reference,) if isinstance(self.reference, ActivationCache) else ()

    @property
    def is_whole(self) -> bool:
        """Return True where the value has positions, those of whole rows."""
        return any(size > 1 for size in self._places().values())

    def _places(self) -> dict[str, int]:
        """Return the sizes of the axes of the value that count positions, crops or rows."""
        axes = row_of(canonical(self.name)).axis_names
        found = zip(reversed(axes), reversed(self._fill.shape), strict=False)
        return {axis: size for axis, size in found if axis in PLACES}

    def fits(self, cfg: HookedVLMConfig, inputs: MultimodalInputs, at: Bool[Tensor, "rows pos"]) -> None:
        """Raise ValueError, before a run, for a value of other rows, images or positions than the run's."""
        sizes = places_of_run(cfg, inputs, self.name, inputs.shape[1])
        for axis, found in self._places().items():
            if found not in (1, sizes[axis]):
                raise ValueError(
                    f"Ablate: the value is {list(self._fill.shape)}, of {axis} {found}; this run has {axis} "
                    f"{sizes[axis]} at {self.name}. Give a value of that size, or without this axis."
                )

    def edit(self, activation: Float[Tensor, ...], at: Bool[Tensor, "rows pos"]) -> Float[Tensor, ...]:
        """Return the value at the chosen places, else the activation; a value with positions ends with the prompt."""
        fill, axes = like(self._fill, activation), row_of(canonical(self.name)).axis_names
        along = [i for i in range(-fill.ndim, 0) if axes[i].endswith("pos") and fill.shape[i] > 1]
        if any(fill.shape[i] < activation.shape[i] for i in along):
            whole = activation.clone()
            index = [slice(fill.shape[i] if i in along else None) for i in range(-activation.ndim, 0)]
            whole[tuple(index)] = fill
            fill = whole
        mask = selection(self.name, activation, at, self.heads, self.neurons)
        return torch.where(mask, fill, activation)

    def edit_at(self, activation: Float[Tensor, ...], place: Place) -> Float[Tensor, ...]:
        """Return the edit of one chunk; behind the prompt a value with positions changes nothing."""
        return activation if self.is_whole and place.earlier is not None else self.edit(activation, place.at)

    def __repr__(self) -> str:
        value = f"{list(self.value.shape)}" if isinstance(self.value, Tensor) else repr(self.value)
        parts = show_units(heads=self.heads, neurons=self.neurons, positions=self.positions)
        return f"Ablate({self.name!r}, {parts}, value={value})"
