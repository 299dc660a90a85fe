"""The one result type: a tensor that knows its axes, their labels, its name and its unit.

Sweeps, attention, lenses and metrics all return `Scores`, so that one way to select, average, rank, tabulate, draw and
save serves them all. Entries that exist only to pad unequal rows are False in `mask` and count nowhere. A helper that
every message needs, `counted`, stands at the end.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from veena_lens.long_runs import save_tensors
from veena_lens.own_files import opened, tensors_of
from veena_lens.score_parts import (
    FORMAT,
    Label,
    ReferenceRuns,
    few_labels,
    find_label,
    indexed,
    is_one_label,
    numbers_of,
    plain_labels,
    require_mask,
    words_of_scores,
)

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)  # holds tensors: identity, not ==
class Scores:
    """`values` over named `axes`, and what they mean.

    values: [*axes], any dtype. axes: their names, different identifiers. labels: the entries along an axis (text or
    numbers), by default 0, 1, ... name, unit: what the values are, for figures and tables. mask: bool, broadcastable to
    `values`, False where an entry does not exist; by default all do. meta: what was run, with which settings; a dict
    that JSON can hold. reference: the two runs that a sweep compares; `values` are then the raw metric, and tables,
    ranks and figures show the effects between the runs. columns: further entries per value (the text that was
    generated), in the order of `values.flatten()`, for tables and files; JSON must hold them.

    `scores[5]`, `scores[5, 2]` and `scores[:, 2]` go by label along the axes in order, as `select` does by name; a loop
    goes along the first axis; `len` counts its entries; `float` and numpy read the numbers that tables and figures
    show. `values[...]` goes by place.
    Raises: ValueError where axes, labels, mask, columns and values disagree.
    """

    values: Shaped[Tensor, ...]
    axes: tuple[str, ...]
    labels: Mapping[str, Sequence] = field(default_factory=dict)
    name: str = ""
    unit: str = ""
    mask: Bool[Tensor, ...] | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    reference: ReferenceRuns | None = None
    columns: Mapping[str, Sequence] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.axes, str):
            raise ValueError(f"Scores: axes={self.axes!r} is one string; expected a tuple such as ('layer', 'head').")
        axes, shape = tuple(self.axes), tuple(self.values.shape)
        if len(axes) != len(shape):
            raise ValueError(f"Scores: {len(axes)} axes {axes} for values of shape {list(shape)}; name each axis once.")
        for axis in axes:
            if axis == "value" or not axis.isidentifier() or axes.count(axis) > 1:
                raise ValueError(f"Scores: axis {axis!r} in {axes}; names must differ, be identifiers and not 'value'.")
        unknown = [axis for axis in self.labels if axis not in axes]
        if unknown:
            raise ValueError(f"Scores: labels for {unknown}, which are not axes; the axes are {axes}.")
        object.__setattr__(self, "axes", axes)
        object.__setattr__(self, "labels", {a: plain_labels(a, self.labels.get(a), n) for a, n in zip(axes, shape)})
        if self.mask is not None:
            require_mask(self.mask, shape)
        for column, entries in self.columns.items():
            if len(entries) != self.values.numel():
                raise ValueError(
                    f"Scores: {len(entries)} entries in column {column!r} for {self.values.numel()} values."
                )
        try:
            json.dumps([self.meta, {column: list(entries) for column, entries in self.columns.items()}])
        except (TypeError, ValueError) as error:
            raise ValueError(f"Scores: meta must be JSON-able, {error}; store tensors beside it.") from error

    # What is there

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of `values`."""
        return tuple(self.values.shape)

    @property
    def exists(self) -> Bool[Tensor, ...]:
        """Return `mask` in the shape of `values`; True everywhere where there is none."""
        if self.mask is None:
            return torch.ones(self.values.shape, dtype=torch.bool, device=self.values.device)
        return self.mask.to(self.values.device).expand(self.values.shape)

    @property
    def scores(self) -> Shaped[Tensor, ...]:
        """Return the effects of a sweep, 0 where a patch changes nothing and 1 where it restores (or breaks)
        everything, NaN where the two runs do not differ; the values themselves where no two runs are compared."""
        return self.values if self.reference is None else self.reference.effects(self.values, self._pair_axis)

    @property
    def clean(self) -> Float[Tensor, " pair"]:
        """Return the metric of the clean runs. Raises: AttributeError where no two runs are compared."""
        return self._runs("clean").clean

    @property
    def corrupted(self) -> Float[Tensor, " pair"]:
        """Return the metric of the corrupted runs. Raises: AttributeError where no two runs are compared."""
        return self._runs("corrupted").corrupted

    @property
    def direction(self) -> str:
        """Return "denoising" or "noising". Raises: AttributeError where no two runs are compared."""
        return self._runs("direction").direction

    @property
    def texts(self) -> list[Any]:
        """Return the generated texts, nested as `axes`. Raises: AttributeError where none were generated."""
        return self._nested("text", "texts")

    @property
    def tokens(self) -> list[Any]:
        """Return the ids of the generated tokens, nested as `axes`. Raises: AttributeError where none were
        generated."""
        return self._nested("tokens", "tokens")

    def effects(self) -> Scores:
        """Return the effects of a sweep as plain Scores; Scores that compare no two runs come back as they are."""
        if self.reference is None:
            return self
        return replace(self, values=self.scores, name=f"{self.direction} effect", reference=None)

    def to_frame(self) -> pd.DataFrame:
        """Return a tidy table, one row per entry that exists: a column per axis, then "value", then further columns.

        Of a sweep "value" is the effect and "metric" the raw value. "value" is left out where texts were not scored."""
        return self._rows(torch.arange(self.values.numel())[self.exists.cpu().flatten()])

    def top(self, k: int = 10, *, largest: bool = True, by: Literal["value", "abs"] = "value") -> pd.DataFrame:
        """Return the `k` entries with the largest (or smallest) value, or absolute value: rows of `to_frame()`.

        Raises: ValueError for a negative k or an unknown `by`."""
        if k < 0 or by not in ("value", "abs"):
            raise ValueError(f"top(k={k}, by={by!r}): k must be 0 or more and by 'value' or 'abs'.")
        numbers = _numbers(self.scores).flatten()
        numbers = numbers.abs() if by == "abs" else numbers
        there = self.exists.cpu().flatten() & ~numbers.isnan()
        order = numbers.argsort(descending=largest, stable=True)
        return self._rows(order[there[order]][:k])

    def _rows(self, flat: Shaped[Tensor, " n"]) -> pd.DataFrame:
        import pandas as pd

        columns: dict[str, Any] = {}
        for axis, places in zip(self.axes, torch.unravel_index(flat, self.values.shape) if self.axes else ()):
            columns[axis] = [self.labels[axis][place] for place in places.tolist()]
        if not (self.columns and bool(self.values.isnan().all())):
            columns["value"] = self.scores.detach().flatten().cpu()[flat].tolist()
        if self.reference is not None:
            columns["metric"] = self.values.detach().flatten().cpu()[flat].tolist()
        for column, entries in self.columns.items():
            columns[column] = [entries[place] for place in flat.tolist()]
        return pd.DataFrame(columns)

    def _runs(self, asked: str) -> ReferenceRuns:
        if self.reference is None:
            raise AttributeError(f"These Scores ({self.name!r}) have no {asked!r}: only sweeps compare two runs.")
        return self.reference

    @property
    def _pair_axis(self) -> int | None:
        return self.axes.index("pair") if "pair" in self.axes else None

    def _nested(self, column: str, asked: str) -> list[Any]:
        if column not in self.columns:
            raise AttributeError(f"These Scores ({self.name!r}) have no {asked!r}: only generation sweeps have.")
        nested = list(self.columns[column])
        for size in reversed(self.shape[1:]):
            nested = [nested[start : start + size] for start in range(0, len(nested), size)]
        return nested

    # Smaller ones

    def __getitem__(self, index: Any) -> Scores:
        """Return the entries with these labels, one index per axis in order: `scores[5]`, `scores[5, [1, 2]]`.

        A label drops its axis; a list, range or array of labels keeps it; `:` and `...` keep everything. Other slices
        count entries, of axes whose labels do so too (0, 1, ...).
        Raises: IndexError for more indices than axes; ValueError as `select`."""
        return self.select(**indexed(self.axes, self.labels, index))

    def __len__(self) -> int:
        """Return the number of entries along the first axis. Raises: TypeError for a single number."""
        if not self.axes:
            raise TypeError("These Scores are a single number, without a length; float(scores) gives it.")
        return self.shape[0]

    def __bool__(self) -> bool:
        """Return True: Scores are something, also with no entry or the number 0."""
        return True

    def __iter__(self) -> Iterator[Scores]:
        """Return the entries along the first axis in turn, each as Scores; `labels[axes[0]]` names them."""
        return (self._select(self.axes[0], place=i) for i in range(len(self)))

    def __float__(self) -> float:
        """Return a single number, of a sweep its effect. Raises: TypeError for several."""
        if self.values.numel() != 1:
            raise TypeError(f"These Scores hold {self.values.numel()} numbers over {self.axes}: index one of them.")
        return float(np.asarray(self).item())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return the numbers that tables and figures show, for numpy: `scores`, NaN where an entry does not exist."""
        return np.array(numbers_of(self.scores, None if self.mask is None else self.exists), dtype=dtype)

    def select(self, **chosen: Label | Sequence) -> Scores:
        """Return the entries with these labels: `select(layer=5, head=[1, 2])`.

        One label drops its axis, a list keeps it. On an axis labelled by integers of 0 or more, a negative integer
        counts from the end.
        Raises: ValueError for an axis or a label that does not occur, or a single label that occurs twice.
        """
        out = self
        for axis, wanted in chosen.items():
            out = out._select(self._axis(axis), wanted)
        return out

    def _select(self, axis: str, wanted: Any = (), place: int | None = None) -> Scores:
        """Return the entries with these labels, or the one at a place."""
        single = place is not None or is_one_label(wanted)
        labels, places = ([wanted] if single else list(wanted)), [] if place is None else [place]
        for label in labels if place is None else ():
            found = find_label(self.labels[axis], label)
            if not found or (single and len(found) > 1):
                trouble = f"occurs at entries {found}" if found else "does not occur"
                raise ValueError(
                    f"select({axis}={label!r}): this label {trouble}; labels: {few_labels(self.labels[axis])}."
                )
            places += found
        at = self.axes.index(axis)
        index = torch.tensor(places, dtype=torch.long)
        values = _take(self.values, at, index, single)
        mask = None if self.mask is None else _take(self.exists, at, index, single)
        labels = {**self.labels, axis: [self.labels[axis][place] for place in places]}
        chosen = self._with(values, mask, drop=(axis,) if single else (), labels=labels)
        reference, columns = self.reference, self.columns
        if reference is not None and axis == "pair":
            clean, corrupted = (x[index.to(x.device)] for x in (reference.clean, reference.corrupted))
            reference = ReferenceRuns(clean, corrupted, reference.direction)
        if columns:
            kept = _take(torch.arange(self.values.numel()).view(self.values.shape), at, index, single).flatten()
            columns = {name: [entries[place] for place in kept.tolist()] for name, entries in columns.items()}
        return replace(chosen, reference=reference, columns=columns)

    def mean(self, *axes: str) -> Scores:
        """Return the mean over `axes` of the entries that exist (of a sweep: of its effects); NaN, and masked, where
        none does.

        Raises: ValueError for no axis, or one that does not occur."""
        if not axes:
            raise ValueError(f"mean() wants the axes to average over; the axes are {self.axes}.")
        if self.reference is not None:
            return self.effects().mean(*axes)
        dims = sorted({self.axes.index(self._axis(axis)) for axis in axes})
        values = self.values if self.values.is_floating_point() else self.values.float()
        if self.mask is None:
            return self._with(values.mean(dims), None, drop=axes)
        count = self.exists.sum(dims)
        total = torch.where(self.exists, values, torch.zeros((), dtype=values.dtype, device=values.device)).sum(dims)
        return self._with(total / count, None if bool((count > 0).all()) else count > 0, drop=axes)

    def to(self, device: str | torch.device) -> Scores:
        """Return the same Scores with all tensors on a device."""
        mask, runs = None if self.mask is None else self.mask.to(device), self.reference
        if runs is not None:
            runs = ReferenceRuns(runs.clean.to(device), runs.corrupted.to(device), runs.direction)
        return replace(self, values=self.values.to(device), mask=mask, reference=runs)

    def _with(
        self, values: Tensor, mask: Tensor | None, drop: Sequence[str], labels: Mapping[str, Sequence] | None = None
    ) -> Scores:
        axes = tuple(axis for axis in self.axes if axis not in drop)
        labels = {axis: (labels or self.labels)[axis] for axis in axes}
        return replace(self, values=values, mask=mask, axes=axes, labels=labels, reference=None, columns={})

    def _axis(self, axis: str) -> str:
        if axis not in self.axes:
            raise ValueError(f"No axis {axis!r}; the axes are {self.axes}.")
        return axis

    # Figures and files

    def plot(
        self, interactive: bool = False, image: Any = None, tokens: Sequence[str] | None = None, **settings: Any
    ) -> Any:
        """Draw a curve (one axis) or a heat map (two), axes of length 1 aside.

        Effects of a sweep are averaged over "pair" and then "pos" as long as more than two axes are left. An axis
        "bound" (low, mean, high), as `circuits.bootstrap` gives, is drawn as a band about the curve.

        interactive: plotly's figure with the same data and colours (`veena_lens.plots.interactive`); default
        matplotlib's. image: the image that attention of heads lies over; then `plots.head_view` draws one map per
        head. Numbers over "pos" whose meta says where images lie (sweeps over each position) become maps over the
        image (bare cells without it), text a strip (`plots.position_maps`). tokens: the texts of the positions, to
        label an axis "pos", "query" or "key"; default meta["token_texts"]. settings: go to `plots.curves`,
        `plots.heatmap`, `plots.position_maps` or `plots.head_view`.
        Raises: ValueError for other than one or two long axes, or tokens that do not name the positions."""
        from veena_lens.plots.scores import plot_scores

        drawn = self.effects()
        for axis in ("pair", "pos") if self.reference is not None else ():
            if axis in drawn.axes and len(drawn.axes) > 2:
                drawn = drawn.mean(axis)
        return plot_scores(drawn, interactive, image, tokens, settings)

    def save(self, path: str | Path) -> Path:
        """Write everything to `path` (safetensors, the words as JSON in its header) in one step, and return it."""
        path = Path(path)
        words: dict[str, Any] = {part: getattr(self, part) for part in ("axes", "labels", "name", "unit", "meta")}
        tensors = {"values": self.values}
        if self.mask is not None:
            tensors["mask"] = self.mask
        if self.columns:
            words["columns"] = {column: list(entries) for column, entries in self.columns.items()}
        if self.reference is not None:
            words["direction"] = self.reference.direction
            tensors |= {"clean": self.reference.clean, "corrupted": self.reference.corrupted}
        save_tensors(path, tensors, {"format": FORMAT, "scores": json.dumps(words)})
        return path

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Return what `save` wrote, also a sweep that was saved before sweeps were Scores.

        Raises: FileNotFoundError; ValueError for a file that was cut short, or of another kind."""
        with opened(path, "Scores") as file:
            words, tensors = words_of_scores(file, path), tensors_of(file)
            values, axes, direction = tensors.pop("values"), tuple(words.pop("axes")), words.pop("direction", None)
            runs = None if direction is None else ReferenceRuns(tensors["clean"], tensors["corrupted"], direction)
            return cls(values, axes, mask=tensors.get("mask"), reference=runs, **words)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{axis} {size}" for axis, size in zip(self.axes, self.shape)) or "a single number"
        what = " ".join(part for part in (repr(self.name), f"({self.unit})" if self.unit else "") if part)
        lines = [f"Scores {what}: {sizes}; {str(self.values.dtype).removeprefix('torch.')} on {self.values.device}"]
        lines += [f"  {axis}: {few_labels(self.labels[axis])}" for axis in self.axes[:5]]
        there = _numbers(self.scores)[self.exists.cpu()]
        there = there[~there.isnan()]
        what = "" if self.reference is None else f"{self.direction} effect "
        if there.numel() == 1:
            lines.append(f"  {what}{there.item():.4g}")
        elif there.numel():
            lines.append(f"  {what}from {there.min():.4g} to {there.max():.4g}, mean {there.mean():.4g}")
        elif what:
            lines.append(f"  no {what.strip()}: the clean and corrupted runs do not differ")
        if self.mask is not None:
            lines.append(f"  {int(self.exists.sum())} of {self.values.numel()} entries exist")
        for text in self.columns.get("text", ())[:3]:
            lines.append(f"  {text[:72]!r}")
        return "\n".join(lines)


def _take(tensor: Tensor, at: int, index: Tensor, single: bool) -> Tensor:
    taken = tensor.index_select(at, index.to(tensor.device))
    return taken.squeeze(at) if single else taken


def _numbers(values: Tensor) -> Tensor:
    return values.detach().cpu().double()


def counted(n: int, singular: str, plural: str | None = None) -> str:
    """Return a number with its noun in agreement: "1 row", "2,048 rows"; `plural` where an s is not enough."""
    return f"{n:,} {singular if n == 1 else plural or singular + 's'}"
