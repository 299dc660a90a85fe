"""Head views: where one token looks in the image, one small map per head, with the shares of its attention.

Every key belongs to one part: a sink, the image, the query (the text after the last image) or the rest, so that the
shares of a head sum to 1 where the Scores hold all keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict, Unpack

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from veena_lens.inputs import MultimodalInputs
from veena_lens.plots import theme
from veena_lens.plots.image_overlay import Boxes, ImageMaps, map_panel
from veena_lens.plots.theme import Limits, Scale

PART_COLOURS: dict[str, str] = {
    "image": "#D55E00", "query": "#0072B2", "other": "#8C8C8C", "sinks": "#000000", "elsewhere": "#8C8C8C"
}  # fmt: skip
PARTS = tuple(PART_COLOURS)


class HeadChoice(TypedDict, total=False):
    """Which part of the Scores a head view shows; see `head_view`."""

    layer: int | None
    heads: Sequence[int] | None
    query: int | None
    row: int
    image_index: int
    grid: str
    sinks: Any
    tokens: Sequence[str] | None
    token: str | None


@dataclass(frozen=True, kw_only=True, eq=False)
class _Chosen:
    """The same with its defaults."""

    layer: int | None = None
    heads: Sequence[int] | None = None
    query: int | None = None
    row: int = 0
    image_index: int = 0
    grid: str = "grid"
    sinks: Any = None
    tokens: Sequence[str] | None = None
    token: str | None = None


@dataclass(frozen=True, eq=False)
class HeadMaps:
    """`maps` [head height width], NaN at sinks and padding; `shares`: of each part one number per head, in the order of
    PARTS; `boxes`: left, top, right, bottom of each cell in pixels (None: not known); `tops`: each map's largest
    weight, where maps have scales of their own; `layer`: that of the heads, where it is known."""

    maps: np.ndarray
    heads: list[int]
    shares: Mapping[str, list[float]]
    title: str
    boxes: Tensor | None
    unit: str
    tops: Sequence[float] | None = None
    layer: int | None = None

    def scaled(self, scale: str) -> HeadMaps:
        """Return the same maps on one scale ("shared"), or each divided by its largest value ("each").

        Raises: ValueError for another word."""
        if scale not in ("shared", "each"):
            raise ValueError(f"head_view: scale={scale!r} must be 'shared' or 'each'.")
        if scale == "shared":
            return self
        tops = [float(np.nanmax(np.abs(values), initial=0.0)) for values in self.maps]
        maps = np.stack([values / (top or 1.0) for values, top in zip(self.maps, tops, strict=True)])
        return replace(self, maps=maps, unit="share of each map's largest", tops=tops)

    def shares_of(self, place: int) -> dict[str, float]:
        """Return the shares of the head at a place in `heads`."""
        return {part: of[place] for part, of in self.shares.items()}


def head_view(
    picture: Image.Image,
    attention: Any,
    inputs: MultimodalInputs | None = None,
    *,
    patch_boxes: Boxes | None = None,
    limits: Limits = None,
    scale: str = "shared",
    title: str | None = None,
    columns: int = 4,
    **chosen: Unpack[HeadChoice],
) -> ImageMaps:
    """Draw the attention of one token over the image in one layer: the image, then one map per head.

    Under each map stand the head's shares, parts that sum to 1: image (all tokens of image number `image_index`),
    query (text after the last image), other, and sinks, where `sinks` are given; sinks are crossed out in the map and
    count in no other part. Maps alone know "image" and "elsewhere".

    picture: the image as the user gave it.
    attention: Scores of `model.attention(inputs, queries=..., keys="all")`, with their `inputs`, or of
    `circuits.image_attention` and its kin.
    layer, query (a position), row, image_index: which ones, where there are several.
    heads: which ones (default: all).
    grid: "grid", or "whole" for the whole view of a tiled image.
    sinks: the Scores of `circuits.attention_sinks`.
    tokens: the texts of the row's positions (`model.to_str_tokens(inputs[row])`), to name the token; token: its name.
    patch_boxes: left, top, right, bottom of each cell in pixels (default: those of the inputs).
    limits: (low, high) of the colour scale (default: those of the maps).
    scale: "shared" colours all maps alike, "each" every one up to its largest weight, given in its title.
    title: above all (default: layer, token and position). columns: how many maps stand side by side.

    Raises: ValueError for Scores of another kind, what they do not hold, or a choice that is missing.
    """
    data = head_maps(attention, inputs, **chosen)
    boxes = data.boxes if patch_boxes is None else patch_boxes
    data = data.scaled(scale)
    panels = []
    for place, head in enumerate(data.heads):
        largest = "" if data.tops is None else f" (up to {data.tops[place]:.2g})"
        name = f"head {head}" if data.layer is None else f"L{data.layer}H{head}"
        about = {"title": f"{name}{largest}", "shares": data.shares_of(place), "crosses": True}
        panels.append(map_panel(picture, data.maps[place], None, boxes, **about))
    return ImageMaps(
        panels=panels,
        scale=Scale.over_image(data.maps, limits),
        label=f"attention ({data.unit})",
        unit=data.unit,
        title=data.title if title is None else title,
        columns=columns,
        side=2.3,
        original=picture,
        part_colours={part: PART_COLOURS[part] for part in data.shares},
    )


def head_maps(attention: Any, inputs: MultimodalInputs | None = None, **chosen: Unpack[HeadChoice]) -> HeadMaps:
    """Return what a head view shows; parameters and errors as for `head_view`."""
    asked = _Chosen(**chosen)
    axes, row = tuple(attention.axes), asked.row
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
    layer, attention = _one(attention, "layer", asked.layer)
    asked = replace(asked, layer=layer)
    if asked.heads is not None:
        attention = attention.select(head=list(asked.heads))
    if "key" in attention.axes:
        return _from_rows(attention, inputs, asked)
    if asked.sinks is not None:
        raise ValueError("head_view: sinks go with the Scores of model.attention; for maps take circuits.mask_sinks.")
    return _from_grids(attention, inputs, asked)


def _one(attention: Any, axis: str, wanted: int | None) -> tuple[int | None, Any]:
    """Return the entry of an axis that is asked for, or its only one. Raises: ValueError where it must be chosen."""
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


def _from_rows(attention: Any, inputs: MultimodalInputs | None, asked: _Chosen) -> HeadMaps:
    """Take the maps from rows of attention over keys, which need the inputs to know what a key is."""
    if inputs is None:
        raise ValueError("head_view: rows of model.attention need inputs=, which say where the image's tokens lie.")
    row = asked.row
    queries = attention.meta["query_positions"][row]
    real = attention.exists.movedim(attention.axes.index("query"), 0).flatten(1).any(1).tolist()
    known = [place for place, there in zip(queries, real, strict=True) if there]
    query = asked.query
    if query is None:
        if len(known) != 1:
            raise ValueError(f"head_view: query= must choose the position of one token, of {_few(known)}.")
        query = int(known[0])
    if query not in known:
        raise ValueError(f"head_view: query={query} was not recorded; recorded are {_few(known)}.")
    place = queries.index(query)
    at = attention.axes.index("query")
    weights = attention.values.select(at, place).detach().double().cpu()  # [head key]
    there = attention.exists.select(at, place).cpu()[0]
    keys = torch.tensor(attention.meta["key_positions"][row])[there]
    full = torch.zeros(len(weights), inputs.shape[1], dtype=torch.float64)
    full[:, keys] = weights[:, there]

    cells = _cells(inputs, row, asked.image_index, asked.grid).cpu()
    part = _parts(inputs, query, asked)
    seen = inputs.attention_mask[row].cpu() & (torch.arange(inputs.shape[1]) <= query)
    read = torch.zeros_like(seen)
    read[keys] = True
    if bool((read | ~seen).all()):
        names = [name for name in PARTS if name in part and (name != "sinks" or asked.sinks is not None)]
        shares = {name: full[:, part[name]].sum(-1).tolist() for name in names}
    elif bool(read[cells.flatten()].all()):
        of_image = full[:, part["image"]].sum(-1)
        shares = {"image": of_image.tolist(), "elsewhere": (1 - of_image).tolist()}
    else:
        raise ValueError("head_view: these rows do not hold all tokens of the image; read model.attention(keys='all').")
    maps = full[:, cells.flatten()].view(-1, *cells.shape)
    maps = torch.where(part["sinks"][cells], torch.nan, maps)
    title = _title(asked.layer, asked.token or _name(inputs, row, query, asked.tokens), query)
    boxes = _boxes(inputs, row, asked.image_index, cells)
    return HeadMaps(maps.numpy(), list(attention.labels["head"]), shares, title, boxes, "weight", layer=asked.layer)


def _parts(inputs: MultimodalInputs, query: int, asked: _Chosen) -> dict[str, Tensor]:
    """Return which positions of a row belong to which part, as seen from `query`; no position is in two."""
    row, n = asked.row, inputs.shape[1]
    part = {name: torch.zeros(n, dtype=torch.bool) for name in ("sinks", "image", "query")}
    if asked.sinks is not None:
        part["sinks"] = _sinks_of(asked.sinks, asked.layer, row, inputs)
    spans = inputs.spans[row]
    image = spans.images[asked.image_index]
    part["image"][image] = inputs.image_mask[row, image].cpu()
    part["query"][spans.query] = True
    part["image"] &= ~part["sinks"]
    part["query"] &= ~part["sinks"] & ~part["image"]
    seen = inputs.attention_mask[row].cpu() & (torch.arange(n) <= query)
    part["other"] = seen & ~part["sinks"] & ~part["image"] & ~part["query"]
    return part


def _from_grids(attention: Any, inputs: MultimodalInputs | None, asked: _Chosen) -> HeadMaps:
    """Take the maps from maps over the image, which do not know other keys."""
    if len(attention.axes) != 3:
        extra = [axis for axis in attention.axes if axis not in ("head", "height", "width")]
        raise ValueError(f"head_view: choose or average over {extra} first, as in .mean({extra[0]!r}).")
    row = asked.row
    there = attention.exists
    values = torch.where(there, attention.values.detach().double(), torch.nan).cpu()
    height, width = (attention.meta.get("sizes") or {row: values.shape[1:]})[row]
    if not height:
        raise ValueError(f"head_view: row {row} has no such image.")
    values = values[:, :height, :width]
    total = values.nansum((1, 2))
    shares = {"image": total.tolist()}
    if attention.name.startswith("attention"):
        shares["elsewhere"] = (1 - total).tolist()
    boxes = None
    if inputs is not None:
        image_index = attention.meta.get("image", asked.image_index)
        cells = _cells(inputs, row, image_index, attention.meta.get("grid", asked.grid)).cpu()
        if tuple(cells.shape) != (height, width):
            raise ValueError(
                f"head_view: the maps are {height} x {width}, the image of these inputs {list(cells.shape)}."
            )
        boxes = _boxes(inputs, row, image_index, cells)
    title = _title_of_grids(attention, inputs, asked)
    heads, unit = list(attention.labels["head"]), attention.unit or "weight"
    return HeadMaps(values.numpy(), heads, shares, title, boxes, unit, layer=asked.layer)


def _title_of_grids(attention: Any, inputs: MultimodalInputs | None, asked: _Chosen) -> str:
    """Return the name of the token that looks, or how many there are."""
    if asked.token is not None:
        return _title(asked.layer, asked.token, None)
    positions = attention.meta.get("positions", [[]])
    places = positions[asked.row] if asked.row < len(positions) else []
    if len(places) != 1:
        return _title(asked.layer, f"{len(places)} tokens" if places else "", None)
    is_known = inputs is not None or asked.tokens is not None
    name = _name(inputs, asked.row, places[0], asked.tokens) if is_known else ""
    return _title(asked.layer, name, places[0])


def _cells(inputs: MultimodalInputs, row: int, image: int, grid: str) -> Tensor:
    """Return the positions of the shown cells `[height width]`: the image's grid, or the whole view of a tiled one."""
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
    """Return True at the sinks of a row in a layer. Raises: ValueError for Scores of something else."""
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
    """Return what stands at a position: a text, or the cell of an image."""
    if inputs is not None:
        for image, span in enumerate(inputs.spans[row].images):
            if span.start <= position < span.stop and bool(inputs.image_mask[row, position]):
                found = (inputs.grid_tokens(row, image) == position).nonzero().tolist()
                return f"patch {found[0][0]}, {found[0][1]}" if found else f"a token of image {image}"
    if tokens is not None:
        if not 0 <= position < len(tokens):
            raise ValueError(
                f"head_view: got {len(tokens)} tokens, so position {position} has no name; give one per position."
            )
        return repr(tokens[position])
    return f"token {int(inputs.tokens[row, position])}" if inputs is not None else ""


def _title(layer: int | None, token: str, position: int | None) -> str:
    parts = ["" if layer is None else f"layer {layer}", f"attention of {token}" if token else "attention"]
    where = "" if position is None else f" at position {position}"
    return theme.printable(", ".join(part for part in parts if part) + where)
