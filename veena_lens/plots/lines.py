"""Curves: one line a row of a table, over layers or positions, told apart by colour and by dash."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from veena_lens.plots import theme

DASHES = ("-", "--", "-.", ":")


def curves(
    values: Float[Tensor, "line x"] | Float[Tensor, " x"] | np.ndarray,
    *,
    x: Sequence | None = None,
    lines: Sequence | None = None,
    x_name: str = "",
    title: str = "",
    name: str = "",
    unit: str = "",
    spread: Float[Tensor, "line x"] | Float[Tensor, " x"] | np.ndarray | None = None,
    interval: tuple[Any, Any] | None = None,
    zero: bool = True,
) -> Figure:
    """A line a row of `values`, with a band of +- `spread` or of `interval` (low, high); NaN leaves a gap.

    Numbers in `x` are places on the axis, other labels stand at even distances. `zero` draws the line y = 0
    if it lies among the values. Raises ValueError where labels and entries differ in number.
    """
    table = np.atleast_2d(theme.to_numpy(values))
    if table.ndim != 2 or not table.size:
        raise ValueError(f"curves wants values [x] or [line x], found shape {list(table.shape)}; select or reduce.")
    band = band_of(table, spread, interval)
    x = theme.check_labels(x, table.shape[1], "x")
    names = None if lines is None else theme.check_labels(lines, table.shape[0], "lines")
    numeric = all(isinstance(place, (int, float, np.number)) for place in x)
    places = np.asarray(x, dtype=np.float64) if numeric else np.arange(len(x))

    with theme.themed():
        figure = theme.new_figure(6.4, 3.6)
        axes = figure.add_subplot()
        for index, row in enumerate(table):
            colour = theme.LINE_COLOURS[index % len(theme.LINE_COLOURS)]
            dash = DASHES[index // len(theme.LINE_COLOURS) % len(DASHES)]
            label = None if names is None else theme.printable(names[index])
            marker = "o" if len(places) <= 40 else None
            axes.plot(places, row, color=colour, linestyle=dash, marker=marker, markersize=3.5, label=label)
            if band is not None:
                low, high = band[0][index], band[1][index]
                axes.fill_between(places, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.grid(axis="y")
        if zero and np.nanmin(table) < 0 < np.nanmax(table):
            axes.axhline(0, color="#808080", linewidth=0.8)
        if not numeric:
            theme.set_ticks(axes, "x", x)
        elif all(float(place).is_integer() for place in places):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel=theme.printable(x_name), ylabel=theme.printable(theme.with_unit(name, unit)))
        axes.set_title(theme.printable(title))
        if names is not None:
            axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0)
    return figure


def band_of(table: np.ndarray, spread: Any, interval: tuple[Any, Any] | None) -> tuple[np.ndarray, np.ndarray] | None:
    """(low, high) of each point, from what lies on either side of it or from both ends; None for neither.

    Raises: ValueError for both at once, or ends of another shape than the values."""
    if spread is not None and interval is not None:
        raise ValueError("curves: give spread, or interval=(low, high), not both.")
    if spread is None and interval is None:
        return None
    name, ends = ("spread", (spread, spread)) if interval is None else ("interval", interval)
    low, high = (np.atleast_2d(theme.to_numpy(end)) for end in ends if end is not None)
    for end in (low, high):
        if end.shape != table.shape:
            raise ValueError(f"{name} has shape {list(end.shape)}, the values {list(table.shape)}; they must agree.")
    return (table - low, table + high) if interval is None else (low, high)
