"""Head views: where one token looks in the picture, a small map a head, with what each head gives to the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Real
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from veena_lens.inputs import MultimodalInputs
from veena_lens.plots import theme
from veena_lens.plots.head_data import PART_COLOURS, HeadMaps, head_maps
from veena_lens.plots.pictures import cell_boxes, colour_bar, lay, picture_scale, show


def head_view(
    picture: Image.Image,
    attention: Any,
    inputs: MultimodalInputs | None = None,
    *,
    layer: int | None = None,
    heads: Sequence[int] | None = None,
    query: int | None = None,
    row: int = 0,
    image_index: int = 0,
    grid: str = "grid",
    sinks: Any = None,
    tokens: Sequence[str] | None = None,
    token: str | None = None,
    patch_boxes: Real[Tensor, "n 4"] | np.ndarray | None = None,
    limits: Sequence[int | float] | None = None,
    scale: str = "shared",
    title: str | None = None,
    columns: int = 4,
) -> Figure:
    """The attention of one token over the picture in one layer: the picture, then a map a head.

    attention: Scores of `model.attention(inputs, queries=..., keys="all")`, with their `inputs`, or of
    `circuits.picture_attention` and its kin. Under each map stand the head's shares, parts that sum to 1: picture
    (all tokens of image number `image_index`), query (text after the last picture), other, and sinks, where `sinks`
    are the Scores of `circuits.find_sinks`; sinks are crossed out in the map and count in no other part. Maps alone
    know "picture" and "elsewhere". layer, query (a position), row: which ones, where there are several. heads:
    which ones (default: all). grid="whole" shows the whole view of a tiled picture. tokens: the texts of the row's
    positions (`model.to_str_tokens(inputs[row])`), to name the token; token: its name itself. Cells lie on
    `patch_boxes`, by default those of the inputs. scale: "shared" colours all maps alike, "each" every one up to
    its own largest weight, which its title tells.
    Raises: ValueError for Scores of another kind, what they do not hold, or a choice that is missing.
    """
    data = head_maps(
        attention, inputs, layer=layer, heads=heads, query=query, row=row, image_index=image_index, grid=grid,
        sinks=sinks, tokens=tokens, token=token,
    )  # fmt: skip
    boxes = data.boxes if patch_boxes is None else patch_boxes
    data = data.scaled(scale)
    norm, colours = picture_scale(data.maps, limits)
    count = 1 + len(data.heads)
    columns = max(1, min(columns, count))
    rows = -(-count // columns)
    side = 2.3
    height = side * min(max(picture.height / picture.width, 0.4), 2.5)
    with theme.themed():
        figure = theme.new_figure(columns * side + 1.0, rows * (height + 0.95) + 0.5)
        grids = figure.add_gridspec(2 * rows, columns, height_ratios=[height, 0.14] * rows)
        panels, bars = [], []
        for place in range(count):
            y, x = divmod(place, columns)
            panels.append(figure.add_subplot(grids[2 * y, x]))
            bars.append(figure.add_subplot(grids[2 * y + 1, x]))
        for axes in (*panels, *bars):
            axes.set_axis_off()
        show(panels[0], picture)
        panels[0].set_title("picture", fontsize=9)
        _key(bars[0], data)
        for i, head in enumerate(data.heads):
            lay(panels[i + 1], picture, data.maps[i], None, boxes, norm, colours)
            _cross_out(panels[i + 1], picture, data.maps[i], boxes)
            panels[i + 1].set_title(f"head {head}{data.largest(i)}", fontsize=9)
            _shares(bars[i + 1], data, i)
        figure.suptitle(
            theme.printable(data.title if title is None else title), x=0.01, ha="left", fontweight="bold", fontsize=11
        )
        colour_bar(figure, panels, norm, colours, f"attention ({data.unit})", aspect=40)
        engine: Any = figure.get_layout_engine()
        engine.set(hspace=0.0, h_pad=0.03)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once: every further drawing would move the panels a little
    return figure


def _cross_out(panel: Axes, picture: Image.Image, values: np.ndarray, boxes: Any) -> None:
    """A cross on every cell that is left out of its map."""
    left, top, right, bottom = cell_boxes(picture, values, None, boxes)[np.isnan(values).flatten()].T
    panel.plot((left + right) / 2, (top + bottom) / 2, "x", color="white", markersize=6, markeredgewidth=1.2)


def _shares(axes: Axes, data: HeadMaps, head: int) -> None:
    """A bar of the head's parts, and their numbers below it."""
    start = 0.0
    for part, of in data.shares.items():
        wide = float(np.clip(of[head], 0, 1))
        axes.barh(0, wide, left=start, color=PART_COLOURS[part], height=1.0)
        start += wide
    axes.set(xlim=(0, 1), ylim=(-0.5, 0.5))
    words = data.words(head).split(", ")
    half = -(-len(words) // 2) if len(words) > 2 else len(words)
    lines = [", ".join(words[:half]), ", ".join(words[half:])]
    axes.text(
        0, -0.8, "\n".join(line for line in lines if line), ha="left", va="top", fontsize=8, linespacing=1.2,
    )  # fmt: skip


def _key(axes: Axes, data: HeadMaps) -> None:
    """Which colour of the bars is which part."""
    axes.set(xlim=(0, 1), ylim=(-0.5, 0.5))
    step = 1 / max(2, -(-len(data.shares) // 2))
    for i, part in enumerate(data.shares):
        y, x = -0.9 - 1.6 * (i // 2), 2 * step * (i % 2) if step < 0.5 else 0.5 * (i % 2)
        axes.plot(x + 0.03, y, marker="s", color=PART_COLOURS[part], markersize=5, clip_on=False)
        axes.text(x + 0.09, y, part, ha="left", va="center", fontsize=8)
