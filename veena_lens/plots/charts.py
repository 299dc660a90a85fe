"""Curves: one line a row of a table, over layers or positions, told apart by colour and by dash.

Heat maps: one coloured cell an entry of a table, signed values on a scale that is symmetric about zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from veena_lens.plots import theme

MOST_NUMBERS = 160


def heatmap(
    values: Float[Tensor, "y x"] | np.ndarray,
    *,
    x: Sequence | None = None,
    y: Sequence | None = None,
    x_name: str = "",
    y_name: str = "",
    title: str = "",
    name: str = "",
    unit: str = "",
    center: int | float | None | Literal["auto"] = "auto",
    limits: Sequence[int | float] | None = None,
    text: Sequence[Sequence[str]] | None = None,
    numbers: bool | None = None,
) -> Figure:
    """A coloured cell an entry of `values`, row 0 at the top; NaN is an entry that does not exist (grey).

    `center=0` takes a diverging scale, symmetric about 0; None a sequential one; "auto" (the default) the
    diverging one about 0 if values of both signs occur. `name` and `unit` stand at the colour bar. Each cell
    shows its `text`, or its value if `numbers` (default: where cells are few).
    Raises ValueError where `values` is not a table or labels and entries differ in number.
    """
    table = theme.to_numpy(values)
    if table.ndim != 2:
        raise ValueError(f"heatmap wants values [y x], found shape {list(table.shape)}; select or reduce first.")
    rows, columns = table.shape
    if not table.size:
        raise ValueError(f"heatmap wants at least one cell, found shape {list(table.shape)}.")
    x, y = theme.check_labels(x, columns, "x"), theme.check_labels(y, rows, "y")
    if text is not None and (len(text), {len(row) for row in text}) != (rows, {columns}):
        raise ValueError(f"text must hold {rows} rows of {columns} strings, one a cell.")

    norm, colours = colour_scale(table, center, limits)
    numbers = table.size <= MOST_NUMBERS if numbers is None else numbers
    wide = text is not None
    label_room = 0.075 * max(len(theme.printable(label)) for label in y)
    width = min(max(1.7 + label_room + columns * (0.85 if wide else 0.44), 4.2), 16.0)
    height = min(max(1.2 + rows * (0.3 if wide else 0.36), 2.2), 14.0)
    with theme.themed():
        figure = theme.new_figure(width, height)
        axes = figure.add_subplot()
        image = axes.imshow(table, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
        theme.set_ticks(axes, "x", x)
        theme.set_ticks(axes, "y", y)
        axes.set(xlabel=theme.printable(x_name), ylabel=theme.printable(y_name), title=theme.printable(title))
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
        bar.set_label(theme.printable(theme.with_unit(name, unit)))
        bar.outline.set_visible(False)
        if text is not None:
            _write(axes, table, colours, norm, [[theme.printable(cell) for cell in row] for row in text])
        elif numbers:
            _write(axes, table, colours, norm, _shorten(table))
    return figure


def colour_scale(
    table: np.ndarray, center: int | float | None | Literal["auto"], limits: Sequence[int | float] | None
) -> tuple[Normalize, Colormap]:
    """The scale from value to [0, 1] and the colours, diverging about `center` or sequential."""
    known = table[np.isfinite(table)]
    low, high = limits or ((known.min(), known.max()) if known.size else (0.0, 1.0))
    if center == "auto":
        center = 0.0 if low < 0 < high else None
    if center is not None and limits is None:
        reach = max(abs(low - center), abs(high - center)) or 1.0
        low, high = center - reach, center + reach
    if low == high:
        high = low + 1.0
    colours = colormaps[theme.UNSIGNED if center is None else theme.SIGNED].with_extremes(bad=theme.MISSING)
    return Normalize(low, high), colours


def _write(axes: Axes, table: np.ndarray, colours: Colormap, norm: Normalize, texts: Sequence[Sequence[str]]) -> None:
    """Put a text in each cell, black or white as the cell's colour asks."""
    for row, line in enumerate(texts):
        for column, text in enumerate(line):
            red, green, blue, _ = colours(norm(table[row, column]))
            bright = 0.299 * red + 0.587 * green + 0.114 * blue > 0.55
            colour = "black" if bright or not np.isfinite(table[row, column]) else "white"
            axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=colour)


def _shorten(table: np.ndarray) -> list[list[str]]:
    """Every value with as many decimals as the largest needs to show two digits; at most four."""
    known = np.abs(table[np.isfinite(table)])
    largest = known.max() if known.size else 0.0
    decimals = 2 if largest == 0 else int(np.clip(1 - np.floor(np.log10(largest)), 0, 4))
    decimals = 2 if 0.1 <= largest < 10 else decimals
    rounded = np.round(table, decimals) + 0.0  # no -0.00
    return [[f"{value:.{decimals}f}" if np.isfinite(value) else "" for value in row] for row in rounded]


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
