"""Head views: where one token looks in the image, a small map a head, with what each head gives to the rest.

What a head view shows, taken from Scores: a token's attention over an image, head by head, and where the rest goes.

Every key belongs to one part: a sink, the image, the query (the text after the last image) or the rest, so that
the shares of a head sum to 1 where the Scores hold all keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Real
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from veena_lens.inputs import MultimodalInputs
from veena_lens.plots import theme
from veena_lens.plots.image_overlay import cell_boxes, colour_bar, lay, picture_scale, show

PART_COLOURS: dict[str, str] = {
    "picture": "#D55E00", "query": "#0072B2", "other": "#8C8C8C", "sinks": "#000000", "elsewhere": "#8C8C8C"
}  # fmt: skip
PARTS = tuple(PART_COLOURS)


@dataclass(frozen=True, eq=False)
class HeadMaps:
    """`maps` [head height width], NaN at sinks and padding; `shares`: of each part one number a head, in the order of
    PARTS; `boxes`: each cell's left, top, right, bottom in pixels (None: not known)."""

    maps: np.ndarray
    heads: list[int]
    shares: Mapping[str, list[float]]
    title: str
    boxes: Tensor | None
    unit: str
    tops: Sequence[float] | None = None

    def scaled(self, scale: str) -> HeadMaps:
        """The same view on one scale ("shared"), or every map divided by its own largest value ("each").

        Raises: ValueError for another word."""
        if scale not in ("shared", "each"):
            raise ValueError(f"head_view: scale={scale!r} must be 'shared' or 'each'.")
        if scale == "shared":
            return self
        tops = [float(np.nanmax(np.abs(values), initial=0.0)) for values in self.maps]
        maps = np.stack([values / (top or 1.0) for values, top in zip(self.maps, tops, strict=True)])
        return replace(self, maps=maps, unit="share of each map's largest", tops=tops)

    def largest(self, head: int) -> str:
        """ " (up to ...)" where maps have scales of their own, else nothing."""
        return "" if self.tops is None else f" (up to {self.tops[head]:.2g})"

    def words(self, head: int) -> str:
        """The shares of one head, as they are written under its map."""
        return ", ".join(f"{part} {of[head]:.2f}" for part, of in self.shares.items())


def head_maps(
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
) -> HeadMaps:
    """See `plots.head_view`."""
    axes = tuple(attention.axes)
    if not {"head"} < set(axes) or not ({"query", "key"} <= set(axes) or {"height", "width"} <= set(axes)):
        raise ValueError(
            f"head_view: axes {axes}; give the Scores of model.attention(..., keys='all') or "
            "circuits.image_attention(...)."
        )
    for name in ("batch", "pair"):
        if name in axes:
            there = attention.labels[name]
            if not 0 <= row < len(there):
                raise ValueError(f"head_view: row {row} does not exist; there are {len(there)}.")
            attention = attention.select(**{name: there[row]})
    layer, attention = _one(attention, "layer", layer)
    if heads is not None:
        attention = attention.select(head=list(heads))
    if "key" in attention.axes:
        return _from_rows(attention, inputs, layer, query, row, image_index, grid, sinks, tokens, token)
    if sinks is not None:
        raise ValueError("head_view: sinks go with the Scores of model.attention; for maps take circuits.mask_sinks.")
    return _from_grids(attention, inputs, layer, row, image_index, grid, tokens, token)


def _one(attention: Any, axis: str, wanted: int | None) -> tuple[int | None, Any]:
    """The entry of an axis that is asked for, or its only one. Raises: ValueError where it must be chosen."""
    if axis not in attention.axes:
        return wanted, attention
    labels = attention.labels[axis]
    if wanted is None:
        if len(labels) > 1:
            raise ValueError(f"head_view: {axis}= must choose one of {_few(labels)}.")
        wanted = labels[0]
    chosen = attention.select(**{axis: wanted})
    return (labels[wanted] if isinstance(wanted, int) and wanted < 0 else wanted), chosen


def _few(labels: Sequence) -> str:
    return f"{list(labels)}" if len(labels) <= 12 else f"{labels[0]}, {labels[1]}, ... {labels[-1]} ({len(labels)})"


def _from_rows(
    attention: Any,
    inputs: MultimodalInputs | None,
    layer: int | None,
    query: int | None,
    row: int,
    image_index: int,
    grid: str,
    sinks: Any,
    tokens: Sequence[str] | None,
    token: str | None,
) -> HeadMaps:
    """From rows of attention over keys, which need the inputs to know what a key is."""
    if inputs is None:
        raise ValueError("head_view: rows of model.attention need inputs=, which say where the image's tokens lie.")
    queries = attention.meta["query_positions"][row]
    real = attention.exists.movedim(attention.axes.index("query"), 0).flatten(1).any(1).tolist()
    known = [place for place, there in zip(queries, real, strict=True) if there]
    asked = query
    if asked is None:
        if len(known) != 1:
            raise ValueError(f"head_view: query= must choose the position of one token, of {_few(known)}.")
        asked = int(known[0])
    if asked not in known:
        raise ValueError(f"head_view: query={asked} is no position that was read; those are {_few(known)}.")
    place = queries.index(asked)
    at = attention.axes.index("query")
    weights = attention.values.select(at, place).detach().double().cpu()  # [head key]
    there = attention.exists.select(at, place).cpu()[0]
    keys = torch.tensor(attention.meta["key_positions"][row])[there]
    full = torch.zeros(len(weights), inputs.shape[1], dtype=torch.float64)
    full[:, keys] = weights[:, there]

    cells = _cells(inputs, row, image_index, grid).cpu()
    part = {name: torch.zeros(inputs.shape[1], dtype=torch.bool) for name in ("sinks", "picture", "query", "other")}
    if sinks is not None:
        part["sinks"] = _sinks_of(sinks, layer, row, inputs)
    spans = inputs.spans[row]
    image = spans.images[image_index]
    part["picture"][image] = inputs.image_mask[row, image].cpu()
    part["query"][spans.query] = True
    part["picture"] &= ~part["sinks"]
    part["query"] &= ~part["sinks"] & ~part["picture"]
    seen = inputs.attention_mask[row].cpu() & (torch.arange(inputs.shape[1]) <= asked)
    part["other"] = seen & ~part["sinks"] & ~part["picture"] & ~part["query"]
    read = torch.zeros_like(seen)
    read[keys] = True
    shares = {}
    if bool((read | ~seen).all()):
        names = [name for name in PARTS if name in part and (name != "sinks" or sinks is not None)]
        shares = {name: full[:, part[name]].sum(-1).tolist() for name in names}
    elif bool(read[cells.flatten()].all()):
        picture = full[:, part["picture"]].sum(-1)
        shares = {"picture": picture.tolist(), "elsewhere": (1 - picture).tolist()}
    else:
        raise ValueError("head_view: these rows do not hold all tokens of the image; read model.attention(keys='all').")
    maps = full[:, cells.flatten()].view(-1, *cells.shape)
    maps = torch.where(part["sinks"][cells], torch.nan, maps)
    title = _title(layer, token or _name(inputs, row, asked, tokens), asked)
    return HeadMaps(
        maps.numpy(), list(attention.labels["head"]), shares, title, _boxes(inputs, row, image_index, cells), "weight"
    )


def _from_grids(
    attention: Any,
    inputs: MultimodalInputs | None,
    layer: int | None,
    row: int,
    image_index: int,
    grid: str,
    tokens: Sequence[str] | None,
    token: str | None,
) -> HeadMaps:
    """From maps over the image, which say nothing of other keys."""
    if len(attention.axes) != 3:
        extra = [axis for axis in attention.axes if axis not in ("head", "height", "width")]
        raise ValueError(f"head_view: choose or average over {extra} first, as in .mean({extra[0]!r}).")
    there = attention.exists
    values = torch.where(there, attention.values.detach().double(), torch.nan).cpu()
    height, width = (attention.meta.get("sizes") or {row: values.shape[1:]})[row]
    if not height:
        raise ValueError(f"head_view: row {row} has no such image.")
    values = values[:, :height, :width]
    total = values.nansum((1, 2))
    shares = {"picture": total.tolist()}
    if attention.name.startswith("attention"):
        shares["elsewhere"] = (1 - total).tolist()
    boxes = None
    if inputs is not None:
        image_index = attention.meta.get("image", image_index)
        cells = _cells(inputs, row, image_index, attention.meta.get("grid", grid)).cpu()
        if tuple(cells.shape) != (height, width):
            raise ValueError(
                f"head_view: the maps are {height} x {width}, the image of these inputs {list(cells.shape)}."
            )
        boxes = _boxes(inputs, row, image_index, cells)
    if token is None:
        asked = attention.meta.get("positions", [[]])
        places = asked[row] if row < len(asked) else []
        if len(places) == 1:
            title = _title(
                layer, "" if inputs is None and tokens is None else _name(inputs, row, places[0], tokens), places[0]
            )
        else:
            title = _title(layer, f"{len(places)} tokens" if places else "", None)
    else:
        title = _title(layer, token, None)
    return HeadMaps(values.numpy(), list(attention.labels["head"]), shares, title, boxes, attention.unit or "weight")


def _cells(inputs: MultimodalInputs, row: int, image: int, grid: str) -> Tensor:
    """Positions of the shown cells [height width]: the image's grid, or the whole view of a tiled one."""
    if grid not in ("grid", "whole"):
        raise ValueError(f"head_view: grid={grid!r} must be 'grid' or 'whole'.")
    n = inputs.n_images[row]
    if not 0 <= image < n:
        raise ValueError(f"head_view: row {row} has no image {image}; it has {n}.")
    tiles = inputs.token_tiles[row][image] if inputs.token_tiles else ()
    if grid == "grid" or not tiles:
        return inputs.grid_tokens(row, image)
    span = inputs.spans[row].images[image]
    places = torch.arange(span.start, span.stop)[inputs.image_mask[row, span].cpu()]
    first = places[torch.tensor(tiles) == 0]
    side = round(len(first) ** 0.5)
    return first.view(side, side)


def _boxes(inputs: MultimodalInputs, row: int, image: int, cells: Tensor) -> Tensor | None:
    boxes = None if inputs.patch_boxes is None else inputs.patch_boxes[row][image]
    if boxes is None:
        return None
    span = inputs.spans[row].images[image]
    places = torch.arange(span.start, span.stop)[inputs.image_mask[row, span].cpu()]
    order = {int(place): i for i, place in enumerate(places)}
    return boxes.cpu()[[order[int(cell)] for cell in cells.flatten()]]


def _sinks_of(sinks: Any, layer: int | None, row: int, inputs: MultimodalInputs) -> Tensor:
    """True at the sinks of a row in a layer. Raises: ValueError for Scores of something else."""
    if tuple(sinks.axes) != ("batch", "layer", "pos") or sinks.values.dtype != torch.bool:
        raise ValueError(
            f"head_view: sinks must be the Scores of circuits.attention_sinks, not axes {tuple(sinks.axes)}."
        )
    if sinks.values.shape[2] != inputs.shape[1] or row >= len(sinks.values):
        raise ValueError(
            f"head_view: the sinks are of {list(sinks.values.shape)} [batch layer pos], not of these inputs."
        )
    return sinks.select(layer=layer).values[row].cpu()


def _name(inputs: MultimodalInputs | None, row: int, position: int, tokens: Sequence[str] | None) -> str:
    """What stands at a position: a text, or the cell of an image."""
    if inputs is not None:
        for image, span in enumerate(inputs.spans[row].images):
            if span.start <= position < span.stop and bool(inputs.image_mask[row, position]):
                found = (inputs.grid_tokens(row, image) == position).nonzero().tolist()
                return f"patch {found[0][0]}, {found[0][1]}" if found else f"a token of picture {image}"
    if tokens is not None:
        if not 0 <= position < len(tokens):
            raise ValueError(f"head_view: {len(tokens)} tokens name no position {position}; give one a position.")
        return repr(tokens[position])
    return f"token {int(inputs.tokens[row, position])}" if inputs is not None else ""


def _title(layer: int | None, token: str, position: int | None) -> str:
    parts = ["" if layer is None else f"layer {layer}", f"attention of {token}" if token else "attention"]
    where = "" if position is None else f" at position {position}"
    return theme.printable(", ".join(part for part in parts if part) + where)


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
    """The attention of one token over the image in one layer: the image, then a map a head.

    attention: Scores of `model.attention(inputs, queries=..., keys="all")`, with their `inputs`, or of
    `circuits.image_attention` and its kin. Under each map stand the head's shares, parts that sum to 1: image
    (all tokens of image number `image_index`), query (text after the last image), other, and sinks, where `sinks`
    are the Scores of `circuits.attention_sinks`; sinks are crossed out in the map and count in no other part. Maps
    alone know "picture" and "elsewhere". layer, query (a position), row: which ones, where there are several. heads:
    which ones (default: all). grid="whole" shows the whole view of a tiled image. tokens: the texts of the row's
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
