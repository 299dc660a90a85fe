"""The one result type: a tensor that knows its axes, their labels, its name and its unit.

Sweeps, attention, lenses and metrics all return `Scores`, so that one way to select, average, rank, tabulate,
draw and save serves them all. Entries that exist only to pad unequal rows are False in `mask` and count nowhere.

Words that messages share.

Opening the files that the package writes, with errors that name the file and what to do.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Shaped
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd


def counted(n: int, singular: str, plural: str | None = None) -> str:
    """A number with its noun in agreement: "1 row", "2,048 rows"; `plural` where an s is not enough."""
    return f"{n:,} {singular if n == 1 else plural or singular + 's'}"


@contextmanager
def opened(path: str | Path, what: str, device: str = "cpu") -> Iterator[Any]:
    """A safetensors file that should hold `what` ("a circuit"), open for reading.

    Raises: FileNotFoundError without the file; ValueError for one that was cut short or is no safetensors file, also
    where that shows while it is read."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No {what.split(' ', 1)[-1]} at {path}.")
    try:
        with safe_open(str(path), framework="pt", device=device) as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) cannot be read as {what}: {error}. It was cut short or is another "
            "kind of file; copy it again, or save it anew."
        ) from error


FORMAT = "veena_lens.Scores/1"
POSITION_AXES = ("pos", "query", "key")
MOST_LINES = 8
Label = str | int | float | bool | None


@dataclass(frozen=True, eq=False)  # holds tensors: identity, not ==
class Scores:
    """`values` over named `axes`; `labels` names the entries along an axis (default 0, 1, ...).

    `mask`, broadcastable to `values`, is False where an entry does not exist. `meta` is a dict that JSON can
    hold: what was run, with which settings. Raises ValueError where axes, labels, mask and values disagree.
    """

    values: Shaped[Tensor, ...]
    axes: tuple[str, ...]
    labels: Mapping[str, Sequence] = field(default_factory=dict)
    name: str = ""
    unit: str = ""
    mask: Bool[Tensor, ...] | None = None
    meta: dict[str, Any] = field(default_factory=dict)

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
            raise ValueError(f"Scores: labels for {unknown}, which are no axes; the axes are {axes}.")
        object.__setattr__(self, "axes", axes)
        object.__setattr__(self, "labels", {a: _labels(a, self.labels.get(a), n) for a, n in zip(axes, shape)})
        if self.mask is not None:
            _check_mask(self.mask, shape)
        try:
            json.dumps(self.meta)
        except (TypeError, ValueError) as error:
            raise ValueError(f"Scores: meta must be JSON-able, {error}; store tensors beside it.") from error

    # What is there

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    @property
    def exists(self) -> Bool[Tensor, ...]:
        """`mask` in the shape of `values`; True everywhere where there is none."""
        if self.mask is None:
            return torch.ones(self.values.shape, dtype=torch.bool, device=self.values.device)
        return self.mask.to(self.values.device).expand(self.values.shape)

    def to_frame(self) -> pd.DataFrame:
        """A tidy table: a column an axis and the column "value"; a row an entry that exists."""
        return self._rows(torch.arange(self.values.numel())[self.exists.cpu().flatten()])

    def top(self, k: int = 10, *, largest: bool = True, by: Literal["value", "abs"] = "value") -> pd.DataFrame:
        """The `k` entries with the largest (or smallest) value, or absolute value: rows of `to_frame()`, in order."""
        if k < 0 or by not in ("value", "abs"):
            raise ValueError(f"top(k={k}, by={by!r}): k must be 0 or more and by 'value' or 'abs'.")
        numbers = _numbers(self.values).flatten()
        numbers = numbers.abs() if by == "abs" else numbers
        there = self.exists.cpu().flatten() & ~numbers.isnan()
        order = numbers.argsort(descending=largest, stable=True)
        return self._rows(order[there[order]][:k])

    def _rows(self, flat: Shaped[Tensor, " n"]) -> pd.DataFrame:
        import pandas as pd

        columns: dict[str, Any] = {}
        for axis, places in zip(self.axes, torch.unravel_index(flat, self.values.shape) if self.axes else ()):
            columns[axis] = [self.labels[axis][place] for place in places.tolist()]
        columns["value"] = self.values.detach().flatten().cpu()[flat].tolist()
        return pd.DataFrame(columns)

    # Smaller ones

    def select(self, **chosen: Label | Sequence) -> Scores:
        """The entries with these labels: `select(layer=5, head=[1, 2])`; one label drops its axis, a list keeps it.

        On an axis labelled by integers of 0 or more, a negative integer counts from the end.
        """
        out = self
        for axis, wanted in chosen.items():
            out = out._select(self._axis(axis), wanted)
        return out

    def _select(self, axis: str, wanted: Label | Sequence) -> Scores:
        single = isinstance(wanted, (str, int, float, bool)) or wanted is None
        places: list[int] = []
        for label in [wanted] if single else wanted:  # type: ignore[union-attr]
            found = _find(self.labels[axis], label)
            if not found or (single and len(found) > 1):
                trouble = f"occurs at entries {found}" if found else "does not occur"
                raise ValueError(f"select({axis}={label!r}): this label {trouble}; labels: {_few(self.labels[axis])}.")
            places += found
        at = self.axes.index(axis)
        index = torch.tensor(places, dtype=torch.long)
        values = _take(self.values, at, index, single)
        mask = None if self.mask is None else _take(self.exists, at, index, single)
        labels = {**self.labels, axis: [self.labels[axis][place] for place in places]}
        return self._with(values, mask, drop=(axis,) if single else (), labels=labels)

    def mean(self, *axes: str) -> Scores:
        """The mean over `axes` of the entries that exist; NaN, and masked, where none does."""
        if not axes:
            raise ValueError(f"mean() wants the axes to average over; the axes are {self.axes}.")
        dims = sorted({self.axes.index(self._axis(axis)) for axis in axes})
        values = self.values if self.values.is_floating_point() else self.values.float()
        if self.mask is None:
            return self._with(values.mean(dims), None, drop=axes)
        count = self.exists.sum(dims)
        total = torch.where(self.exists, values, torch.zeros((), dtype=values.dtype, device=values.device)).sum(dims)
        return self._with(total / count, None if bool((count > 0).all()) else count > 0, drop=axes)

    def to(self, device: str | torch.device) -> Scores:
        return replace(self, values=self.values.to(device), mask=None if self.mask is None else self.mask.to(device))

    def _with(
        self, values: Tensor, mask: Tensor | None, drop: Sequence[str], labels: Mapping[str, Sequence] | None = None
    ) -> Scores:
        axes = tuple(axis for axis in self.axes if axis not in drop)
        labels = {axis: (labels or self.labels)[axis] for axis in axes}
        return replace(self, values=values, mask=mask, axes=axes, labels=labels)

    def _axis(self, axis: str) -> str:
        if axis not in self.axes:
            raise ValueError(f"No axis {axis!r}; the axes are {self.axes}.")
        return axis

    # Images and files

    def plot(
        self, interactive: bool = False, picture: Any = None, tokens: Sequence[str] | None = None, **settings: Any
    ) -> Any:
        """A curve (one axis) or a heat map (two), axes of length 1 aside; `settings` go to `veena_lens.plots`.

        An axis "bound" (low, mean, high), as `circuits.bootstrap` gives, is drawn as a band about the curve. image:
        where these are attention of heads, a map a head over it (`plots.head_view`). tokens: the texts of the
        positions, to label an axis "pos", "query" or "key". interactive: plotly's figure with the same data and
        colours, to hover over (`veena_lens.plots.interactive`)."""
        from veena_lens import plots as static
        from veena_lens.plots import interactive as hovered

        plots: Any = hovered if interactive else static
        if picture is not None:
            return plots.head_view(picture, self, tokens=tokens, **settings)
        if list(self.labels.get("bound", ())) == ["low", "mean", "high"]:
            return self._plot_bounds(plots, interactive, tokens, settings)
        long = tuple(axis for axis in self.axes if len(self.labels[axis]) > 1)
        if len(long) not in (1, 2):
            todo = "select or reduce some: .select(layer=5), .mean('head')" if long else "it is a single number"
            raise ValueError(f"plot() draws one axis or two; these Scores have {len(long)}, {long}: {todo}.")
        single = [f"{axis} {self.labels[axis][0]}" for axis in self.axes if axis not in long]
        title = ", ".join([self.name.replace("_", " "), *single])
        table = self._table(long)
        settings = {"title": title, "name": self.name.replace("_", " "), "unit": self.unit, **settings}
        labels = {axis: self._shown(axis, tokens) for axis in long}
        if len(long) == 1:
            return plots.curves(table, **{"x": labels[long[0]], "x_name": long[0], **settings})
        y, x = long
        return plots.heatmap(table, **{"x": labels[x], "y": labels[y], "x_name": x, "y_name": y, **settings})

    def _plot_bounds(
        self, plots: Any, interactive: bool, tokens: Sequence[str] | None, settings: dict[str, Any]
    ) -> Any:
        """Curves with their intervals, a line an entry of a first short axis; else a heat map of the means."""
        low, mean, high = (self.select(bound=bound) for bound in ("low", "mean", "high"))
        long = tuple(axis for axis in mean.axes if len(self.labels[axis]) > 1)
        if len(long) not in (1, 2) or (len(long) == 2 and len(self.labels[long[0]]) > MOST_LINES):
            return mean.plot(interactive, tokens=tokens, **settings)
        name = self.name.replace("_", " ")
        lines = None if len(long) == 1 else [f"{long[0]} {label}" for label in self.labels[long[0]]]
        about = {
            "x": self._shown(long[-1], tokens),
            "x_name": long[-1],
            "lines": lines,
            "name": name,
            "unit": self.unit,
        }
        ends = (low._table(long), high._table(long))
        return plots.curves(mean._table(long), interval=ends, **{**about, **settings})

    def _table(self, long: Sequence[str]) -> Tensor:
        """The numbers over some axes, NaN where none exists."""
        nan = torch.full((), math.nan, dtype=torch.float64)
        return torch.where(self.exists.cpu(), _numbers(self.values), nan).reshape([len(self.labels[a]) for a in long])

    def _shown(self, axis: str, tokens: Sequence[str] | None) -> Sequence:
        """Labels of an axis as a figure shows them: texts at positions, where they are known."""
        labels = self.labels[axis]
        texts = self.meta.get("token_texts") if tokens is None else list(tokens)
        if texts is None or axis not in POSITION_AXES:
            return labels
        if all(isinstance(label, int) and 0 <= label < len(texts) for label in labels):
            return [texts[label] for label in labels]
        if len(texts) == len(labels):
            return texts
        raise ValueError(
            f"plot: {len(texts)} tokens do not name the {len(labels)} entries of {axis!r}: {_few(labels)}."
        )

    def save(self, path: str | Path) -> Path:
        """Write everything to `path` (safetensors, the words as JSON in its header), replacing it in one step."""
        path = Path(path)
        words = {"axes": self.axes, "labels": self.labels, "name": self.name, "unit": self.unit, "meta": self.meta}
        tensors = {"values": self.values.detach().cpu().contiguous()}
        if self.mask is not None:
            tensors["mask"] = self.mask.cpu().contiguous()
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        save_file(tensors, draft, metadata={"format": FORMAT, "scores": json.dumps(words)})
        draft.replace(path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """What `save` wrote. Raises: FileNotFoundError; ValueError for a file cut short, or of another kind."""
        with opened(path, "Scores") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise ValueError(
                    f"{path} holds no Scores: its format is {header.get('format')!r}, expected {FORMAT!r}."
                )
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        words = json.loads(header["scores"])
        return cls(tensors["values"], tuple(words.pop("axes")), mask=tensors.get("mask"), **words)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{axis} {size}" for axis, size in zip(self.axes, self.shape)) or "a single number"
        what = " ".join(part for part in (repr(self.name), f"({self.unit})" if self.unit else "") if part)
        lines = [f"Scores {what}: {sizes}; {str(self.values.dtype).removeprefix('torch.')} on {self.values.device}"]
        lines += [f"  {axis}: {_few(self.labels[axis])}" for axis in self.axes[:5]]
        there = _numbers(self.values)[self.exists.cpu()]
        there = there[~there.isnan()]
        if there.numel():
            lines.append(f"  from {there.min():.4g} to {there.max():.4g}, mean {there.mean():.4g}")
        if self.mask is not None:
            lines.append(f"  {int(self.exists.sum())} of {self.values.numel()} entries exist")
        return "\n".join(lines)


def _labels(axis: str, labels: Sequence | None, count: int) -> list[Label]:
    """One plain label an entry: numbers of numpy and torch become Python's."""
    if labels is None:
        return list(range(count))
    plain = [label.item() if hasattr(label, "item") else label for label in labels]
    if len(plain) != count:
        raise ValueError(f"Scores: {len(plain)} labels for axis {axis!r}, which has {count} entries.")
    odd = next((label for label in plain if not isinstance(label, (str, int, float, bool, type(None)))), None)
    if odd is not None:
        raise ValueError(f"Scores: label {odd!r} of axis {axis!r} is a {type(odd).__name__}; use text or numbers.")
    return plain


def _check_mask(mask: Tensor, shape: tuple[int, ...]) -> None:
    if mask.dtype != torch.bool:
        raise ValueError(f"Scores: mask has dtype {mask.dtype}; expected torch.bool, True where an entry exists.")
    try:
        mask.expand(shape)
    except RuntimeError as error:
        raise ValueError(f"Scores: mask {list(mask.shape)} does not broadcast to values {list(shape)}.") from error


def _find(labels: Sequence, wanted: object) -> list[int]:
    wanted = wanted.item() if hasattr(wanted, "item") else wanted  # type: ignore[union-attr]
    # 1 == True and 1 == 1.0 in Python; a boolean label is asked for by a boolean.
    found = [
        i for i, label in enumerate(labels) if label == wanted and isinstance(label, bool) == isinstance(wanted, bool)
    ]
    if found or not isinstance(wanted, int) or isinstance(wanted, bool) or not -len(labels) <= wanted < 0:
        return found
    counts = all(isinstance(label, int) and not isinstance(label, bool) and label >= 0 for label in labels)
    return [len(labels) + wanted] if counts else []


def _take(tensor: Tensor, at: int, index: Tensor, single: bool) -> Tensor:
    taken = tensor.index_select(at, index.to(tensor.device))
    return taken.squeeze(at) if single else taken


def _numbers(values: Tensor) -> Tensor:
    return values.detach().cpu().double()


def _few(labels: Sequence, room: int = 72) -> str:
    """The labels on one line: all of them, or the first ones, an ellipsis and the last."""
    texts = [repr(label) for label in labels]
    if len(" ".join(texts)) <= room:
        return " ".join(texts)
    head: list[str] = []
    while len(" ".join([*head, texts[len(head)]])) < room - 16 and len(head) < len(texts) - 1:
        head.append(texts[len(head)])
    return f"{' '.join(head)} ... {texts[-1][:16]} ({len(texts)})"
