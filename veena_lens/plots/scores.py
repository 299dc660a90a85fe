"""Drawing `Scores`: a curve over one axis or a heat map over two, in matplotlib or plotly.

`Scores.plot` calls `plot_scores`. Scores lie above the figures in the order of imports, so they come here untyped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from veena_lens.score_parts import few_labels

POSITION_AXES = ("pos", "query", "key")
MOST_LINES = 8


def plot_scores(
    scores: Any, interactive: bool, image: Any, tokens: Sequence[str] | None, settings: dict[str, Any]
) -> Any:
    """Return a figure of Scores that have one or two axes longer than 1; see `Scores.plot` for the arguments.

    Raises: ValueError for more axes, none, or tokens that do not name the entries of a position axis."""
    if _lies_on_images(scores, settings):
        return _plot_positions(scores, interactive, image, tokens, settings)
    if image is not None:
        return _back_end(interactive).head_view(image, scores, tokens=tokens, **settings)
    if list(scores.labels.get("bound", ())) == ["low", "mean", "high"]:
        return _plot_bounds(scores, interactive, tokens, settings)
    long = tuple(axis for axis in scores.axes if len(scores.labels[axis]) > 1)
    if len(long) not in (1, 2):
        todo = "select or reduce some: .select(layer=5), .mean('head')" if long else "it is a single number"
        raise ValueError(f"plot() draws one axis or two; these Scores have {len(long)}, {long}: {todo}.")
    single = [f"{axis} {scores.labels[axis][0]}" for axis in scores.axes if axis not in long]
    name = scores.name.replace("_", " ")
    settings = {"title": ", ".join([name, *single]), "name": name, "unit": scores.unit, **settings}
    labels = {axis: _shown(scores, axis, tokens) for axis in long}
    table, plots = _table(scores, long), _back_end(interactive)
    if len(long) == 1:
        return plots.curves(table, **{"x": labels[long[0]], "x_name": long[0], **settings})
    y, x = long
    return plots.heatmap(table, **{"x": labels[x], "y": labels[y], "x_name": x, "y_name": y, **settings})


def _lies_on_images(scores: Any, settings: dict[str, Any]) -> bool:
    """Return True for numbers over positions of which some lie in images, that are to be drawn there."""
    long = [axis for axis in scores.axes if len(scores.labels[axis]) > 1]
    if "pos" not in long or len(long) > 2 or not set(settings) <= {"title", "name", "unit", "limits", "columns"}:
        return False
    there = set(scores.labels["pos"])
    return any(there & set(sum(grid["positions"], [])) for grid in scores.meta.get("image_grids", ()))


def _plot_positions(
    scores: Any, interactive: bool, image: Any, tokens: Sequence[str] | None, settings: dict[str, Any]
) -> Any:
    """Draw numbers over positions on the image and along the text."""
    long = [axis for axis in scores.axes if len(scores.labels[axis]) > 1]
    other = [axis for axis in long if axis != "pos"]
    single = [f"{axis} {scores.labels[axis][0]}" for axis in scores.axes if axis not in long]
    name, texts = scores.name.replace("_", " "), scores.meta.get("token_texts") if tokens is None else list(tokens)
    table = _table(scores, long)
    table = table[None] if not other else table if long[-1] == "pos" else table.T
    about = {
        "positions": scores.labels["pos"],
        "grids": scores.meta["image_grids"],
        "texts": texts,
        "rows": scores.labels[other[0]] if other else [""],
        "row_name": other[0] if other else "",
        "title": ", ".join([name, *single]),
        "name": name,
        "unit": scores.unit,
    }
    return _back_end(interactive).position_maps(table, image=image, **{**about, **settings})


def _plot_bounds(scores: Any, interactive: bool, tokens: Sequence[str] | None, settings: dict[str, Any]) -> Any:
    """Draw curves with their intervals, one line per entry of a first short axis; else a heat map of the means."""
    low, mean, high = (scores.select(bound=bound) for bound in ("low", "mean", "high"))
    long = tuple(axis for axis in mean.axes if len(scores.labels[axis]) > 1)
    if len(long) not in (1, 2) or (len(long) == 2 and len(scores.labels[long[0]]) > MOST_LINES):
        return plot_scores(mean, interactive, None, tokens, settings)
    about = {
        "x": _shown(scores, long[-1], tokens),
        "x_name": long[-1],
        "lines": None if len(long) == 1 else [f"{long[0]} {label}" for label in scores.labels[long[0]]],
        "name": scores.name.replace("_", " "),
        "unit": scores.unit,
    }
    ends = (_table(low, long), _table(high, long))
    return _back_end(interactive).curves(_table(mean, long), interval=ends, **{**about, **settings})


def _back_end(interactive: bool) -> Any:
    """Return the module that draws: plotly's twin of this package, or the package itself."""
    if interactive:
        from veena_lens.plots import interactive as hovered

        return hovered
    from veena_lens import plots

    return plots


def _table(scores: Any, axes: Sequence[str]) -> Tensor:
    """Return the numbers over some axes, NaN where an entry does not exist."""
    nan = torch.full((), math.nan, dtype=torch.float64)
    values = torch.where(scores.exists.cpu(), scores.values.detach().cpu().double(), nan)
    return values.reshape([len(scores.labels[axis]) for axis in axes])


def _shown(scores: Any, axis: str, tokens: Sequence[str] | None) -> Sequence:
    """Return the labels of an axis as a figure shows them: texts at positions, where they are known."""
    labels = scores.labels[axis]
    texts = scores.meta.get("token_texts") if tokens is None else list(tokens)
    if texts is None or axis not in POSITION_AXES:
        return labels
    if all(isinstance(label, int) and 0 <= label < len(texts) for label in labels):
        return [texts[label] for label in labels]
    if len(texts) == len(labels):
        return texts
    raise ValueError(
        f"plot: {len(texts)} tokens do not name the {len(labels)} entries of {axis!r}: {few_labels(labels)}."
    )
