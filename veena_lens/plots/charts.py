"""Heat maps and curves as specifications: what is shown, checked and labelled, whoever draws it.

`plots` draws them with matplotlib, `plots.interactive` with plotly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from veena_lens.plots import theme
from veena_lens.plots.theme import Center, Limits, Scale

MOST_NUMBERS = 160
Table = Float[Tensor, "row column"] | Float[Tensor, " column"] | np.ndarray


@dataclass(frozen=True, eq=False, kw_only=True)
class Heatmap:
    """One coloured cell per entry of `table`, with the texts that stand in the cells (None: none)."""

    table: np.ndarray
    x: Sequence
    y: Sequence
    x_name: str
    y_name: str
    title: str
    name: str
    unit: str
    scale: Scale
    text: Sequence[Sequence[str]] | None
    numbers: Sequence[Sequence[str]] | None


@dataclass(frozen=True, eq=False, kw_only=True)
class Curves:
    """One line per row of `table`, with a band (low, high) about each."""

    table: np.ndarray
    x: Sequence
    lines: Sequence | None
    x_name: str
    title: str
    label: str
    band: tuple[np.ndarray, np.ndarray] | None
    zero: bool


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
    center: Center = "auto",
    limits: Limits = None,
    text: Sequence[Sequence[str]] | None = None,
    numbers: bool | None = None,
) -> Heatmap:
    """Draw one coloured cell per entry of `values`, row 0 at the top; NaN is an entry that does not exist (grey).

    Args:
        values: the table [y x].
        x, y: labels of the columns and rows (default: 0, 1, ...); x_name, y_name: what they count.
        title: above the figure.
        name, unit: of the values, at the colour bar.
        center: 0 takes a diverging scale, symmetric about 0; None a sequential one; "auto" the diverging one about 0
            if values of both signs occur.
        limits: (low, high) of the colour scale (default: those of the values).
        text: what stands in each cell, rows of strings.
        numbers: write each cell's value in it (default: where cells are few).

    Raises: ValueError where `values` is not a table or labels and entries differ in number.
    """
    table = theme.to_numpy(values)
    if table.ndim != 2:
        raise ValueError(f"heatmap: values must be [y x], not of shape {list(table.shape)}; select or reduce first.")
    rows, columns = table.shape
    if not table.size:
        raise ValueError(f"heatmap: values of shape {list(table.shape)} have no cells; give at least one cell.")
    x, y = theme.check_labels(x, columns, "x"), theme.check_labels(y, rows, "y")
    if text is not None and (len(text), {len(row) for row in text}) != (rows, {columns}):
        raise ValueError(f"heatmap: text must hold {rows} rows of {columns} strings, one per cell.")
    numbers = table.size <= MOST_NUMBERS if numbers is None else numbers
    return Heatmap(
        table=table,
        x=x,
        y=y,
        x_name=x_name,
        y_name=y_name,
        title=title,
        name=name,
        unit=unit,
        scale=Scale.of(table, center, limits),
        text=text,
        numbers=_shorten(table) if numbers else None,
    )


def curves(
    values: Table,
    *,
    x: Sequence | None = None,
    lines: Sequence | None = None,
    x_name: str = "",
    title: str = "",
    name: str = "",
    unit: str = "",
    spread: Table | None = None,
    interval: tuple[Any, Any] | None = None,
    zero: bool = True,
) -> Curves:
    """Draw one line per row of `values`; NaN leaves a gap.

    Args:
        values: [x] for one line, or [line x].
        x: places on the axis if they are numbers, else labels at even distances (default: 0, 1, ...); x_name: what
            they count.
        lines: names of the lines, shown in a legend.
        title: above the figure.
        name, unit: of the values, at the vertical axis.
        spread: half the width of a band about each line, in the shape of `values`.
        interval: the band's ends (low, high) instead.
        zero: draw the line y = 0 if it lies among the values.

    Raises: ValueError where labels and entries differ in number, or the band does not fit.
    """
    table = np.atleast_2d(theme.to_numpy(values))
    if table.ndim != 2 or not table.size:
        raise ValueError(
            f"curves: values must be [x] or [line x], not of shape {list(table.shape)}; select or reduce first."
        )
    return Curves(
        table=table,
        x=theme.check_labels(x, table.shape[1], "x"),
        lines=None if lines is None else theme.check_labels(lines, table.shape[0], "lines"),
        x_name=x_name,
        title=title,
        label=theme.with_unit(name, unit),
        band=_band(table, spread, interval),
        zero=zero,
    )


def _band(table: np.ndarray, spread: Any, interval: tuple[Any, Any] | None) -> tuple[np.ndarray, np.ndarray] | None:
    """Return (low, high) of each point, from what lies on either side of it or from both ends; None for neither."""
    if spread is not None and interval is not None:
        raise ValueError("curves: give spread, or interval=(low, high), not both.")
    if spread is None and interval is None:
        return None
    name, ends = ("spread", (spread, spread)) if interval is None else ("interval", interval)
    low, high = (np.atleast_2d(theme.to_numpy(end)) for end in ends if end is not None)
    for end in (low, high):
        if end.shape != table.shape:
            raise ValueError(
                f"curves: {name} has shape {list(end.shape)}, the values {list(table.shape)}; they must agree."
            )
    return (table - low, table + high) if interval is None else (low, high)


def _shorten(table: np.ndarray) -> list[list[str]]:
    """Return every value with as many decimals as the largest needs to show two digits; at most four."""
    known = np.abs(table[np.isfinite(table)])
    largest = known.max() if known.size else 0.0
    decimals = 2 if largest == 0 else int(np.clip(1 - np.floor(np.log10(largest)), 0, 4))
    decimals = 2 if 0.1 <= largest < 10 else decimals
    rounded = np.round(table, decimals) + 0.0  # no -0.00
    return [[f"{value:.{decimals}f}" if np.isfinite(value) else "" for value in row] for row in rounded]
