"""Occlusion: what the metric loses when a window of the image is covered, cell by cell of its token grid.

No gradient and no patch from another run: an independent check of attribution maps. Pixels are covered before the
processor and the tower see them, which works alike for every layout; features are replaced where they enter the
decoder, which leaves out what the tower mixed into the neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from PIL import Image, ImageFilter, ImageStat
from torch import Tensor

from veena_lens.circuits.image_cells import image_places, mapped, windows_of
from veena_lens.images.files import open_image
from veena_lens.inputs import MultimodalInputs
from veena_lens.scores import Scores
from veena_lens.sweeps.alignment import bare
from veena_lens.sweeps.measuring import (
    Entering,
    Measure,
    entering_layers,
    measure_of,
    ranks,
    require_rows,
    side_by_side,
)

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM

FILLS = ("grey", "mean", "blur")
GREY = (128, 128, 128)


def occlude_pixels(
    model: HookedVLM,
    text: str | Sequence[str],
    images: Any,
    metric: Any = None,
    *,
    image: int = 0,
    fill: Any = "grey",
    window: int | tuple[int, int] = 1,
    stride: int = 1,
    relative: bool = False,
    max_rows: int = 16,
    progress: bool = True,
    **prepare: Any,
) -> Scores:
    """Return what the metric loses when a window of the image's pixels is covered: m - m_covered, per grid cell.

    A cell's value is the mean over the windows that cover it; the last row and column are always reached.

    text, images: as for `model.prepare` (to which `prepare` goes: chat, answer); the `image`-th image of each prompt
    is covered and prepared anew, window by window. metric: as in `patch_sweep`, or a list with one per prompt. fill:
    "grey", "mean" (the image's mean colour), "blur" (the image itself, Gaussian, radius an eighth of its longer side),
    or another image, put in at the same place (for several prompts a list of one each). window: side, or (height,
    width), in cells of the token grid. stride: in cells. relative: as a share of |m|; default the metric's unit.
    max_rows: windows that run together. progress: show a bar.
    Returns Scores with axes (pair, height, width), pair being the prompt; cells that no window covers, and grids of
    unequal size, are masked. meta: "baseline" (m, per prompt), "fill", "window".
    Raises: ValueError for a checkpoint without a processor, a prompt without that image, an unknown fill, a window or
    stride below 1, or a metric that is not one finite number per row; FileNotFoundError for a path without an image.
    Source: Zeiler & Fergus 2014, arXiv 1311.2901, section 4.2.
    """
    who = "occlude_pixels"
    require_rows(who, max_rows)
    windows = windows_of(who, window, stride)
    prompts, given = _prompts(who, text, images)
    measure = measure_of(who, model, metric, len(prompts))
    covers = _covers(who, fill, given, image)
    plains = [model.prepare(text=prompt, images=mine, **prepare) for prompt, mine in zip(prompts, given, strict=True)]
    grids = [_grid(who, plain, 0, image) for plain in plains]

    @torch.no_grad()
    def of_prompt(pair: int) -> tuple[Tensor, Callable[[Sequence[Tensor]], Tensor]]:
        boxes, mine = _cell_boxes(who, plains[pair], image, grids[pair]), given[pair]

        @torch.no_grad()
        def covered(chosen: Sequence[Tensor]) -> Tensor:
            rows = []
            for inside in chosen:
                hidden = mine[image].copy()
                _cover(hidden, covers[pair], boxes[inside])
                rows.append([*mine[:image], hidden, *mine[image + 1 :]])
            inputs = model.prepare(text=[prompts[pair]] * len(rows), images=rows, **prepare)
            return measure(inputs, [pair] * len(rows))

        return measure(plains[pair], [pair], plain=True), covered

    maps, base = mapped([grid.shape for grid in grids], windows, max_rows, progress, of_prompt)
    name = fill if isinstance(fill, str) and fill in FILLS else "another picture"
    return _result(maps, base, relative, {"fill": name, **windows.meta, "image": image})


def occlude_features(
    model: HookedVLM,
    inputs: MultimodalInputs,
    metric: Any = None,
    *,
    image: int = 0,
    fill: Any = "mean",
    window: int | tuple[int, int] = 1,
    stride: int = 1,
    deepstack: bool = True,
    views: bool = False,
    relative: bool = False,
    max_rows: int = 32,
    progress: bool = True,
) -> Scores:
    """Return what the metric loses when a window of image features is replaced where they enter the decoder.

    The image is encoded once; windows run together.

    inputs: rows that each hold the image. fill: "mean" (over the cells of that image), "zero", or a vector [d_model].
    deepstack: replace what inner tower layers add at the same tokens too, by their own mean (or zero). views: replace,
    for tiled images, the tokens of the whole view that overlap the window as well. metric, image, window, stride,
    relative, max_rows, progress, axes, unit and meta: as in `occlude_pixels`, pair being the row of `inputs`.
    Raises: ValueError for a row without that image, an unknown fill, `views` where boxes of the tokens are not known
    (inputs not made by `model.prepare`), a window or stride below 1, or a metric that does not fit.
    Source: as `occlude_pixels`; means in place of pixels: Fong & Vedaldi 2017, arXiv 1704.03296.
    """
    who = "occlude_features"
    require_rows(who, max_rows)
    windows = windows_of(who, window, stride)
    is_vector = isinstance(fill, Tensor) and fill.shape == (model.cfg.d_model,)
    if not is_vector and not (isinstance(fill, str) and fill in ("mean", "zero")):
        raise ValueError(f"{who}: fill={fill!r} must be 'mean', 'zero' or a vector [{model.cfg.d_model}].")
    measure = measure_of(who, model, metric, len(inputs))
    grids = [_grid(who, inputs, row, image) for row in range(len(inputs))]
    if views and inputs.patch_boxes is None:
        raise ValueError(f"{who}: views=True needs to know where tokens lie: make the inputs with model.prepare.")

    def of_row(row: int) -> tuple[Tensor, Callable[[Sequence[Tensor]], Tensor]]:
        alone = inputs[row].without_padding()
        with torch.no_grad(), entering_layers(model, alone, [0]) as entering:
            plain = measure(alone, [row], plain=True)
        cells = alone.grid_tokens(0, image)

        def covered(chosen: Sequence[Tensor]) -> Tensor:
            tokens = [cells[inside] for inside in chosen]
            if views:
                tokens = [_with_views(alone, image, cells, inside) for inside in tokens]
            return _without(measure, alone, row, entering[0], cells, tokens, fill, deepstack)

        return plain, covered

    maps, base = mapped([grid.shape for grid in grids], windows, max_rows, progress, of_row)
    about = {"fill": fill if isinstance(fill, str) else "a vector", **windows.meta}
    return _result(maps, base, relative, about | {"image": image, "deepstack": deepstack, "views": views})


def rank_agreement(map_a: Scores, map_b: Scores, *, draws: int = 1000, null: str = "shuffle", seed: int = 0) -> Scores:
    """Return Spearman's rank correlation of two maps over the cells that both have, with a two-sided permutation p.

    p = (1 + draws with |rho| at least as large) / (1 + draws).

    map_a, map_b: maps over the same axes, ([pair,] height, width) say. draws: permutations. null: "shuffle" permutes
    cells at random; "shift" moves one map over the other by every step of the grid, wrapping around, which keeps the
    smoothness of both (shuffled cells are independent, so that smooth maps seem to agree too surely). seed: of the
    draws.
    Returns Scores with axes ([pair,] statistic), statistics "rank_correlation", "p", "cells".
    Raises: ValueError for maps of other axes or shapes, an unknown null, fewer than 3 common cells, or shifts of maps
    that are not full grids.
    Source: Adebayo et al. 2018, arXiv 1810.03292, compare maps so; p: Phipson & Smyth 2010.
    """
    if null not in ("shuffle", "shift") or draws < 1:
        raise ValueError(f"rank_agreement: null={null!r} must be 'shuffle' or 'shift', draws={draws} at least 1.")
    if map_a.axes != map_b.axes or map_a.shape != map_b.shape:
        raise ValueError(
            f"rank_agreement: maps over {map_a.axes} {map_a.shape} and {map_b.axes} {map_b.shape}; both must have one "
            "shape."
        )
    by_pair = "pair" in map_a.axes
    place = map_a.axes.index("pair") if by_pair else 0
    both = [(m.values.double().cpu(), m.exists.cpu() & ~m.values.cpu().isnan()) for m in (map_a, map_b)]
    if not by_pair:
        both = [(values[None], exists[None]) for values, exists in both]
    (a, in_a), (b, in_b) = ((v.movedim(place, 0), e.movedim(place, 0)) for v, e in both)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for x, y, common in zip(a, b, in_a & in_b, strict=True):
        if int(common.sum()) < 3:
            raise ValueError(f"rank_agreement: the maps share {int(common.sum())} cells; a rank correlation needs 3.")
        if null == "shuffle":
            order = torch.rand(draws, int(common.sum()), generator=generator).argsort(-1)
            drawn = ranks(y[common])[order]
        else:
            if x.ndim != 2 or not bool(common.all()):
                raise ValueError("rank_agreement: null='shift' needs maps [height width] without missing cells.")
            moves = [(i, j) for i in range(x.shape[0]) for j in range(x.shape[1]) if i or j]
            table = ranks(y[common]).view(x.shape)
            drawn = torch.stack([table.roll(move, (0, 1)).flatten() for move in moves])
        one = _unit(ranks(x[common]))
        rho = float(one @ _unit(ranks(y[common])))
        at_least = (_unit(drawn) @ one).abs() >= abs(rho) - 1e-12
        rows.append([rho, (1 + int(at_least.sum())) / (1 + len(drawn)), float(common.sum())])
    values = torch.tensor(rows, dtype=torch.float64)
    labels: dict[str, Sequence[Any]] = {"statistic": ["rank_correlation", "p", "cells"]}
    if by_pair:
        labels["pair"] = map_a.labels["pair"]
    return Scores(
        values if by_pair else values[0],
        ("pair", "statistic") if by_pair else ("statistic",),
        labels,
        name="agreement",
        meta={"null": null, "draws": draws if null == "shuffle" else "every shift", "maps": [map_a.name, map_b.name]},
    )


# --- results ----------------------------------------------------------------------------------------


def _result(
    maps: Sequence[Float[Tensor, "_ _"]], base: Float[Tensor, " pair"], relative: bool, meta: dict[str, Any]
) -> Scores:
    values, mask = side_by_side(maps)
    mask = mask & ~values.isnan()
    values = torch.where(mask, values, torch.zeros_like(values))
    if relative:
        values = values / torch.where(base == 0, torch.nan, base.abs())[:, None, None]
    return Scores(
        values,
        ("pair", "height", "width"),
        name="occlusion",
        unit="share of the metric" if relative else "metric",
        mask=None if bool(mask.all()) else mask,
        meta={"baseline": base.tolist(), **meta},
    )


def _unit(x: Float[Tensor, "*draws n"]) -> Float[Tensor, "*draws n"]:
    """Return the values centred and of norm 1; zeros where constant."""
    x = x - x.mean(-1, keepdim=True)
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)


# --- images and prompts ---------------------------------------------------------------------------------


def _prompts(who: str, text: str | Sequence[str], images: Any) -> tuple[list[str], list[list[Image.Image]]]:
    """Return prompts, and each one's images opened."""
    single = isinstance(text, str)
    texts = [text] if isinstance(text, str) else list(text)
    given = [images] if single else list(images if images is not None else [])
    if len(given) != len(texts) or images is None:
        raise ValueError(f"{who}: {len(texts)} prompts and images for {len(given)}; give each prompt its images.")
    listed = [list(x) if isinstance(x, (list, tuple)) else [x] for x in given]
    return texts, [[open_image(x) for x in mine] for mine in listed]


def _covers(who: str, fill: Any, given: Sequence[Sequence[Image.Image]], image: int) -> list[Image.Image]:
    """Return for each prompt an image of the same size that shows what a covered place holds."""
    for pair, mine in enumerate(given):
        if not 0 <= image < len(mine):
            raise ValueError(f"{who}: prompt {pair} has {len(mine)} images; there is no image {image}.")
    fills = list(fill) if isinstance(fill, (list, tuple)) else [fill] * len(given)
    if len(fills) != len(given):
        raise ValueError(f"{who}: {len(fills)} images to put in for {len(given)} prompts.")
    out = []
    for one, mine in zip(fills, given, strict=True):
        one_image = mine[image]
        if isinstance(one, (Image.Image, Path)) or (isinstance(one, str) and one not in FILLS and Path(one).is_file()):
            other = open_image(one)
            out.append(
                other if other.size == one_image.size else other.resize(one_image.size, Image.Resampling.BICUBIC)
            )
        elif one == "grey":
            out.append(Image.new("RGB", one_image.size, GREY))
        elif one == "mean":
            red, green, blue = (round(x) for x in ImageStat.Stat(one_image).mean)
            out.append(Image.new("RGB", one_image.size, (red, green, blue)))
        elif one == "blur":
            out.append(one_image.filter(ImageFilter.GaussianBlur(max(one_image.size) / 8)))
        else:
            raise ValueError(f"{who}: fill={one!r} must be one of {', '.join(FILLS)}, or an image (PIL, or its path).")
    return out


def _grid(who: str, inputs: MultimodalInputs, row: int, image: int) -> Int[Tensor, "height width"]:
    """Return the positions of one image's cells. Raises: ValueError where there is no such image, or no whole grid."""
    try:
        return inputs.grid_tokens(row, image)
    except IndexError as error:
        raise ValueError(f"{who}: {error}") from error


def _cell_boxes(
    who: str, inputs: MultimodalInputs, image: int, grid: Int[Tensor, "height width"]
) -> Float[Tensor, "height width 4"]:
    """Return the pixels of each cell in the original image."""
    boxes = None if inputs.patch_boxes is None else inputs.patch_boxes[0][image]
    if boxes is None:
        raise ValueError(f"{who}: where the tokens lie in the image is not known for this checkpoint's processor.")
    places = image_places(inputs, 0, image).tolist()
    order = {place: k for k, place in enumerate(places)}
    return boxes[torch.tensor([order[p] for p in grid.flatten().tolist()])].view(*grid.shape, 4)


def _cover(shown: Image.Image, cover: Image.Image, boxes: Float[Tensor, "n 4"]) -> None:
    """Put the cover's pixels into the boxes, edges rounded outwards; a box without area (padding) holds none."""
    for left, top, right, bottom in boxes.tolist():
        if right > left and bottom > top:
            box = (int(left // 1), int(top // 1), int(-(-right // 1)), int(-(-bottom // 1)))
            shown.paste(cover.crop(box), box)


# --- features ---------------------------------------------------------------------------------------------


def _with_views(
    inputs: MultimodalInputs, image: int, cells: Int[Tensor, "height width"], inside: Int[Tensor, " n"]
) -> Int[Tensor, " m"]:
    """Return the window's tokens, and those outside the grid whose boxes overlap theirs."""
    assert inputs.patch_boxes is not None
    boxes = inputs.patch_boxes[0][image]
    places = image_places(inputs, 0, image)
    mine = boxes[torch.isin(places, inside).cpu()]
    left, top = mine[:, 0].min(), mine[:, 1].min()
    right, bottom = mine[:, 2].max(), mine[:, 3].max()
    over = (boxes[:, 0] < right) & (boxes[:, 2] > left) & (boxes[:, 1] < bottom) & (boxes[:, 3] > top)
    others = ~torch.isin(places, cells.flatten())
    return torch.cat([inside, places[over.to(places.device) & others]])


@torch.no_grad()
def _without(
    measure: Measure,
    inputs: MultimodalInputs,
    row: int,
    entering: Entering,
    cells: Int[Tensor, "height width"],
    chosen: Sequence[Int[Tensor, " _"]],
    fill: Any,
    deepstack: bool,
) -> Float[Tensor, " window"]:
    """Return the metric with the features at each selection of tokens replaced."""
    many = entering.rows([0] * len(chosen))

    def replaced(x: Tensor, new: Tensor) -> Tensor:
        out = x.clone()
        for k, tokens in enumerate(chosen):
            out[k, tokens.to(x.device)] = new
        return out

    def value(x: Tensor, vector: bool) -> Tensor:
        if vector and isinstance(fill, Tensor):
            return fill.to(x)
        mean = x[0, cells.flatten().to(x.device)].mean(0)
        return torch.zeros_like(mean) if isinstance(fill, str) and fill == "zero" else mean

    inner = dict(many.deepstack)
    if deepstack:
        inner = {layer: replaced(x, value(x, vector=False)) for layer, x in inner.items()}
    changed = Entering(replaced(many.resid, value(many.resid, vector=True)), inner)
    return measure(bare(inputs)[[0] * len(chosen)], [row] * len(chosen), entering=changed)
