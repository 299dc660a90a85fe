"""Figures drawn by matplotlib: one function per specification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image

from veena_lens.plots import theme
from veena_lens.plots.charts import Curves, Heatmap
from veena_lens.plots.image_overlay import ImageMaps, MapPanel
from veena_lens.plots.positions import PositionMaps
from veena_lens.plots.theme import Scale, ShownFigure

DASHES = ("-", "--", "-.", ":")
OPACITY = 0.6
DRAWN_SIZE = 768  # pixels


def draw_heatmap(spec: Heatmap) -> ShownFigure:
    """Draw a heat map."""
    rows, columns = spec.table.shape
    wide = spec.text is not None
    label_room = 0.075 * max(len(theme.printable(label)) for label in spec.y)
    width = min(max(1.7 + label_room + columns * (0.85 if wide else 0.44), 4.2), 16.0)
    height = min(max(1.2 + rows * (0.3 if wide else 0.36), 2.2), 14.0)
    figure = theme.new_figure(width, height)
    axes = figure.add_subplot()
    scale = spec.scale
    image = axes.imshow(spec.table, cmap=scale.colormap, norm=scale.norm, aspect="auto", interpolation="nearest")
    theme.set_ticks(axes, "x", spec.x)
    theme.set_ticks(axes, "y", spec.y)
    axes.set(xlabel=theme.printable(spec.x_name), ylabel=theme.printable(spec.y_name))
    axes.set_title(theme.printable(spec.title))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    bar.set_label(theme.printable(theme.with_unit(spec.name, spec.unit)))
    bar.outline.set_visible(False)
    texts = spec.text or spec.numbers
    if texts is not None:
        _write(axes, spec.table, scale, [[theme.printable(cell) for cell in row] for row in texts])
    return figure


def _write(axes: Axes, table: np.ndarray, scale: Scale, texts: Sequence[Sequence[str]]) -> None:
    """Put a text in each cell, black or white as the cell's colour asks."""
    for row, line in enumerate(texts):
        for column, text in enumerate(line):
            red, green, blue = scale.rgb(table[row, column])
            bright = 0.299 * red + 0.587 * green + 0.114 * blue > 0.55
            colour = "black" if bright or not np.isfinite(table[row, column]) else "white"
            axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=colour)


def draw_curves(spec: Curves) -> ShownFigure:
    """Draw curves with their bands."""
    numeric = all(isinstance(place, (int, float, np.number)) for place in spec.x)
    places = np.asarray(spec.x, dtype=np.float64) if numeric else np.arange(len(spec.x))
    figure = theme.new_figure(6.4, 3.6)
    axes = figure.add_subplot()
    for index, row in enumerate(spec.table):
        colour = theme.LINE_COLOURS[index % len(theme.LINE_COLOURS)]
        dash = DASHES[index // len(theme.LINE_COLOURS) % len(DASHES)]
        label = None if spec.lines is None else theme.printable(spec.lines[index])
        marker = "o" if len(places) <= 40 else None
        axes.plot(places, row, color=colour, linestyle=dash, marker=marker, markersize=3.5, label=label)
        if spec.band is not None:
            low, high = spec.band[0][index], spec.band[1][index]
            axes.fill_between(places, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.grid(axis="y")
    if spec.zero and np.nanmin(spec.table) < 0 < np.nanmax(spec.table):
        axes.axhline(0, color="#808080", linewidth=0.8)
    if not numeric:
        theme.set_ticks(axes, "x", spec.x)
    elif all(float(place).is_integer() for place in places):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel=theme.printable(spec.x_name), ylabel=theme.printable(spec.label))
    axes.set_title(theme.printable(spec.title))
    if spec.lines is not None:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0)
    return figure


def draw_maps(spec: ImageMaps) -> ShownFigure:
    """Draw the original, if any, then the maps; below each its shares, below the original what their colours mean."""
    is_pair = spec.original is not None and not spec.part_colours
    count = len(spec.panels) + (spec.original is not None)
    columns = max(1, min(spec.columns, count))
    rows = -(-count // columns)
    image = spec.panels[0].image if spec.panels else spec.original
    assert image is not None
    height = spec.side * min(max(image.height / image.width, 0.4), 2.5)
    if spec.part_colours:
        figure = theme.new_figure(columns * spec.side + 1.0, rows * (height + 0.95) + 0.5)
        grid = figure.add_gridspec(2 * rows, columns, height_ratios=[height, 0.14] * rows)
        places = [divmod(place, columns) for place in range(count)]
        every = [(figure.add_subplot(grid[2 * y, x]), figure.add_subplot(grid[2 * y + 1, x])) for y, x in places]
        axes, bars = [above for above, _ in every], [below for _, below in every]
    else:
        figure = theme.new_figure(columns * spec.side + 1.1, rows * (height + 0.35) + 0.35)
        axes, bars = [figure.add_subplot(rows, columns, place + 1) for place in range(count)], []
    for panel in (*axes, *bars):
        panel.set_axis_off()
    size = None if is_pair else 9
    if spec.original is not None:
        _show(axes[0], spec.original)
        axes[0].set_title("image", fontsize=size)
    first = count - len(spec.panels)
    for place, panel in enumerate(spec.panels, start=first):
        _lay(axes[place], panel, spec.scale)
        axes[place].set_title(theme.printable(panel.title), fontsize=size)
        if bars:
            _share_bar(bars[place], panel, spec)
    if bars:
        _key(bars[0], spec)
    if spec.title:
        figure.suptitle(theme.printable(spec.title), x=0.01, ha="left", fontweight="bold", fontsize=11)
    _colour_bar(figure, axes, spec, aspect=40 if bars else 20)
    if bars:
        engine: Any = figure.get_layout_engine()
        engine.set(hspace=0.0, h_pad=0.03)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once: every further drawing would move the panels a little
    return figure


def draw_positions(spec: PositionMaps) -> ShownFigure:
    """Draw the maps over the image, below them the text as a strip, all on one scale."""
    maps, strip = spec.maps, spec.strip
    columns = max(1, min(maps.columns, len(maps.panels)))
    rows = -(-len(maps.panels) // columns)
    image = maps.panels[0].image
    high = maps.side * min(max(image.height / image.width, 0.4), 2.5) + 0.3
    below = 0.0 if strip is None else 0.1 + 0.22 * len(strip.table)
    wide = columns * maps.side + 1.1 if strip is None else max(columns * maps.side, 0.3 * strip.table.shape[1]) + 1.3
    room = 0.4 if strip is None else 1.5  # of the title, and of the words below the strip
    figure = theme.new_figure(min(wide, 16.0), min(rows * high + below + room, 20.0))
    heights = [high] * rows + ([below] if strip is not None else [])
    grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
    every: list[Axes] = []
    if strip is not None:
        axes = figure.add_subplot(grid[rows, :])
        look: dict[str, Any] = {"cmap": maps.scale.colormap, "norm": maps.scale.norm, "alpha": OPACITY}
        axes.imshow(strip.table, aspect="auto", interpolation="nearest", **look)
        theme.set_ticks(axes, "x", strip.x)
        theme.set_ticks(axes, "y", strip.y)
        axes.set(xlabel=theme.printable(strip.x_name), ylabel=theme.printable(strip.y_name))
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        every.append(axes)
    for place, panel in enumerate(maps.panels):
        axes = figure.add_subplot(grid[divmod(place, columns)])
        axes.set_axis_off()
        _lay(axes, panel, maps.scale)
        axes.set_title(theme.printable(panel.title), fontsize=9)
        every.append(axes)
    if maps.title:
        figure.suptitle(theme.printable(maps.title), x=0.01, ha="left", fontweight="bold", fontsize=11)
    _colour_bar(figure, every, maps, aspect=30)
    for axes in every:
        axes.set_anchor("W")  # a colour bar moves them to its side
    return figure


def _show(axes: Axes, image: Image.Image, as_grey: bool = False) -> None:
    """Draw the image in a panel, in its own colours or in pale grey below a map."""
    # Pixel edges lie on whole numbers, so that a box (0, 0, width, height) is exactly the image; what is drawn is
    # no larger than a figure can show.
    small = image.convert("RGB")
    small.thumbnail((DRAWN_SIZE, DRAWN_SIZE))
    pixels = np.asarray(small)
    if as_grey:
        grey = 80 + 0.68 * np.asarray(small.convert("L"), dtype=np.float64)
        pixels = np.repeat(grey.astype(np.uint8)[..., None], 3, 2)
    axes.imshow(pixels, extent=(0, image.width, image.height, 0), interpolation="bicubic")
    axes.set(xlim=(0, image.width), ylim=(image.height, 0), aspect="equal")


def _lay(axes: Axes, panel: MapPanel, scale: Scale) -> None:
    """Lay a map over the grey image, each cell on its patch; NaN shows the grey of what does not exist."""
    image = panel.image
    _show(axes, image, as_grey=True)
    look: dict[str, Any] = {"cmap": scale.colormap, "norm": scale.norm, "alpha": OPACITY}
    if panel.box is not None:
        left, top, right, bottom = panel.box
        axes.imshow(panel.grid, extent=(left, right, bottom, top), interpolation="nearest", **look)
    else:
        cells = [Rectangle((left, top), right - left, bottom - top) for left, top, right, bottom in panel.boxes]
        axes.add_collection(PatchCollection(cells, array=panel.grid.ravel(), linewidth=0, **look))
    axes.set(xlim=(0, image.width), ylim=(image.height, 0), aspect="equal")
    if panel.crosses:
        left, top, right, bottom = panel.boxes[np.isnan(panel.grid).flatten()].T
        axes.plot((left + right) / 2, (top + bottom) / 2, "x", color="white", markersize=6, markeredgewidth=1.2)


def _colour_bar(figure: Figure, axes: Sequence[Axes], spec: ImageMaps, aspect: int) -> None:
    """Draw one bar for all panels, as pale as the maps are."""
    # Opaque white below the half-transparent colours would pale the bar alone; the image's mean grey does not.
    mappable = ScalarMappable(spec.scale.norm, spec.scale.colormap)
    bar = figure.colorbar(mappable, ax=list(axes), fraction=0.04, pad=0.02, alpha=OPACITY, aspect=aspect)
    bar.ax.set_facecolor("#bfbfbf")
    bar.outline.set_visible(False)
    bar.set_label(theme.printable(spec.label))


def _share_bar(axes: Axes, panel: MapPanel, spec: ImageMaps) -> None:
    """Draw a bar of the head's parts, and their numbers below it."""
    start = 0.0
    for part, share in panel.shares.items():
        wide = float(np.clip(share, 0, 1))
        axes.barh(0, wide, left=start, color=spec.part_colours[part], height=1.0)
        start += wide
    axes.set(xlim=(0, 1), ylim=(-0.5, 0.5))
    words = panel.hover.split(", ")
    half = -(-len(words) // 2) if len(words) > 2 else len(words)
    lines = [", ".join(words[:half]), ", ".join(words[half:])]
    text = "\n".join(line for line in lines if line)
    axes.text(0, -0.8, text, ha="left", va="top", fontsize=8, linespacing=1.2)


def _key(axes: Axes, spec: ImageMaps) -> None:
    """Draw the key: which colour of the bars is which part."""
    axes.set(xlim=(0, 1), ylim=(-0.5, 0.5))
    step = 1 / max(2, -(-len(spec.part_colours) // 2))
    for i, (part, colour) in enumerate(spec.part_colours.items()):
        y, x = -0.9 - 1.6 * (i // 2), 2 * step * (i % 2) if step < 0.5 else 0.5 * (i % 2)
        axes.plot(x + 0.03, y, marker="s", color=colour, markersize=5, clip_on=False)
        axes.text(x + 0.09, y, part, ha="left", va="center", fontsize=8)
