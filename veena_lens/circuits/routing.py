"""From where a head's projection on a direction comes: the sum over keys of its result, split by what the keys are.

r_h[p] = sum_k A[h,p,k] v_k W_O[h], so <r_h[p], u> is a sum of numbers c[h,p,k] = A[h,p,k] <v_k W_O[h], u>, one per key.
Image keys, query text, other text and the position itself share it out exactly; over an image's tokens it is a map.
Each layer's values and attention are read as they pass: only the chosen queries exist, and no result. Where a norm
follows attention (Gemma) its factor joins W_O, and its denominator, from a run before, divides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from veena_lens.circuits.image_cells import Cells, image_cells, over_cells
from veena_lens.circuits.reading import (
    Reading,
    as_scores,
    batch_positions,
    chosen_heads,
    chosen_layers,
    exact,
    read,
    require_reduce,
    require_same_positions,
    unit_directions,
)
from veena_lens.circuits.streamed_attention import Collected, stream_attention
from veena_lens.inputs import MultimodalInputs
from veena_lens.interventions.base import require_layer
from veena_lens.positions import position_mask
from veena_lens.residual_parts import denominators, head_rows
from veena_lens.scores import Scores

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM

SOURCES = ("image", "query", "text", "self")
UNIT = "projection"


def attention_by_source(
    model: HookedVLM,
    inputs: Any,
    direction: Float[Tensor, ...],
    positions: Any = "last",
    *,
    at_layer: int | None = None,
    baseline: Any = None,
    layers: Any = None,
    heads: Any = None,
    reduce: str = "mean",
) -> Scores:
    """Split each head's projection <r_h[p], u> by its sources: image tokens, query text, other text, and p itself.

    Sources are "image", "query" (the text after the last image), "text" (all other text, an answer included), "self"
    (the key k = p, whatever it is); the four sum to `head_intention` with kind="projection". Interventions in force
    are honoured, edits of `hook_z` and `hook_result` aside, which no longer follow from keys.

    inputs: a batch. direction, at_layer: as in `head_intention`. positions: the queries p. baseline: inputs of the
    neutral twins; each run is split, then the difference taken (patterns and values both change). layers, heads:
    default all. reduce: "mean" over the positions, or "none".
    Returns Scores with axes (batch or pair, layer, head, source), "pos" last with reduce="none"; unit: that of the
    residual stream.
    Raises: ValueError for a direction of another shape, unknown layers or heads, an empty selection, or pairs that do
    not match.
    Source: Elhage et al. 2021, "A mathematical framework for transformer circuits", for the sum; the split is ours.
    """
    inputs = model.as_inputs(inputs)
    plan = _plan(model, direction, positions, at_layer, layers, heads, reduce, "attention_by_source", len(inputs))
    reading, values = _routed(plan, inputs)
    if baseline is not None:
        other, twin = _routed(plan, model.as_inputs(baseline))
        require_same_positions(reading, other, "attention_by_source")
        values = values - twin
    labels = {"layer": plan.layers, "head": plan.heads, "source": SOURCES}
    return as_scores(
        values,
        ("layer", "head", "source"),
        reading,
        reduce,
        baseline is not None,
        labels,
        name="projection by source",
        unit=UNIT,
        meta={"at_layer": plan.at_layer},
    )


def image_attention_share(routes: Scores) -> Scores:
    """Return the image's share of a head's projection: W_image / (|W_image| + |W_text| + |W_self|).

    routes: Scores of `attention_by_source`; text of every kind counts together.
    Returns Scores over their axes without "source", in [-1, 1]; 0 where the head adds nothing along the direction.
    Raises: ValueError for Scores without these sources.
    Source: our own.
    """
    if "source" not in routes.axes or list(routes.labels["source"]) != list(SOURCES):
        raise ValueError(
            f"image_attention_share: give the Scores of attention_by_source; these have the axes {routes.axes}."
        )
    image, query, text, own = (routes.select(source=source) for source in SOURCES)
    size = image.values.abs() + (query.values + text.values).abs() + own.values.abs()
    share = torch.where(size == 0, torch.zeros_like(size), image.values / size)
    return replace(image, values=share, name="image share", unit="share")


def direct_attribution_map(
    model: HookedVLM,
    inputs: Any,
    direction: Float[Tensor, ...],
    positions: Any = "last",
    *,
    image: int = 0,
    grid: str = "grid",
    at_layer: int | None = None,
    baseline: Any = None,
    layers: Any = None,
    heads: Any = None,
    reduce: str = "mean",
) -> Scores:
    """Return a head's projection as a map over an image: A[h,p,k] <v_k W_O[h], u> for the image's tokens k.

    Where the grid is all that the image has, the maps of every image summed are `attention_by_source`'s "image" part, p
    itself aside where p is an image token (it counts in its own cell here).

    image: number of the image in each row. grid: "grid" (through the tiles of tiled images, default) or "whole" (the
    whole view); tokens of neither (newlines) are in no map. The rest as in `attention_by_source`.
    Returns Scores with axes (batch or pair, layer, head, height, width), padded at the lower right where rows have
    other grids (masked); a row without that image is masked whole.
    Raises: as `attention_by_source`; ValueError where no row has such an image, or a twin's grid differs; IndexError
    where the tokens make no whole grid.
    Source: our own, from the sum of Elhage et al. 2021.
    """
    inputs = model.as_inputs(inputs)
    plan = _plan(model, direction, positions, at_layer, layers, heads, reduce, "direct_attribution_map", len(inputs))
    cells = image_cells(inputs, image, grid, "direct_attribution_map")
    reading, values = _routed(plan, inputs, cells)
    if baseline is not None:
        twins = model.as_inputs(baseline)
        twin_cells = image_cells(twins, image, grid, "direct_attribution_map")
        if twin_cells.sizes != cells.sizes:
            raise ValueError(
                f"direct_attribution_map: the grids are {cells.sizes}, those of the baseline {twin_cells.sizes}."
            )
        other, twin = _routed(plan, twins, twin_cells)
        require_same_positions(reading, other, "direct_attribution_map")
        values = values - twin
    height, width = cells.mask.shape[1:]
    wide = "batch layer head (height width) ... -> batch layer head height width ..."
    scores = as_scores(
        rearrange(values, wide, height=height, width=width),
        ("layer", "head", "height", "width"),
        reading,
        reduce,
        baseline is not None,
        {"layer": plan.layers, "head": plan.heads},
        name="projection by patch",
        unit=UNIT,
        meta={"at_layer": plan.at_layer, "image": image, "grid": grid, "sizes": cells.sizes},
    )
    return over_cells(scores, cells)


@dataclass(frozen=True, eq=False)
class _Plan:
    """What to route: checked layers, heads and unit vectors."""

    model: HookedVLM
    units: Float[Tensor, "layer row d_model"]
    positions: Any
    at_layer: int | None
    layers: list[int]
    heads: list[int]
    reduce: str
    who: str


def _plan(
    model: HookedVLM,
    direction: Tensor,
    positions: Any,
    at_layer: int | None,
    layers: Sequence[int] | None,
    heads: Sequence[int] | None,
    reduce: str,
    who: str,
    n_rows: int,
) -> _Plan:
    require_reduce(reduce, who, ("mean", "none"))
    where, which = chosen_layers(layers, model.cfg, who), chosen_heads(heads, model.cfg, who)
    source = None if at_layer is None else require_layer(at_layer, model.cfg.n_layers, who)
    units = unit_directions(direction, model.cfg, where, source, who, n_rows)
    return _Plan(model, units, positions, source, where, which, reduce, who)


def _routed(
    plan: _Plan, inputs: MultimodalInputs, cells: Cells | None = None
) -> tuple[Reading, Float[Tensor, "batch layer head part ..."]]:
    """Return the four sources of the queries, or the cells of an image."""
    index, mask = batch_positions(inputs, plan.positions, plan.who)
    sources = _sources(inputs)
    # A norm that follows attention divides what all keys give by one number per position, known once they are read.
    hooks_of_z = [f"blocks.{layer}.attn.hook_z" for layer in plan.layers]
    by = denominators(plan.model.cfg, hooks_of_z)
    scales = read(inputs, list(by.values()), plan.positions, plan.model, plan.who) if by else None
    found = Collected(plan.layers, mask, plan.reduce)
    written: dict[int, Tensor] = {}

    def hear_values(layer: int, unit: Tensor) -> Any:
        def hear(v: Float[Tensor, "batch pos n_key_value_heads d_head"], hook: Any) -> None:
            v = v.detach().to(exact(v.dtype))
            W_O = head_rows(plan.model.blocks[layer]).detach().to(v)
            wanted = einsum(W_O, unit.to(v), "head d_head d_model, row d_model -> row head d_head")
            wanted = rearrange(wanted.expand(len(v), -1, -1), "batch (g r) d_head -> batch g r d_head", g=v.shape[2])
            every = einsum(v, wanted, "batch pos g d_head, batch g r d_head -> batch g r pos")
            written.clear()  # layers come one after another
            written[layer] = rearrange(every, "batch g r pos -> batch (g r) pos")[:, plan.heads]

        return hear

    def share_out(layer: int, at: slice, weights: Float[Tensor, "batch head n key_pos"]) -> None:
        parts = weights.to(written[layer].dtype) * written[layer][:, :, None]
        if scales is not None:
            parts = parts / scales[by[f"blocks.{layer}.attn.hook_z"]][:, None, at].to(parts)
        where = index[:, at].to(parts.device)[:, None, :, None].expand(-1, parts.shape[1], -1, -1)
        if cells is None:
            own = parts.gather(-1, where)
            others = parts.scatter(-1, where, 0.0)
            split = einsum(others, sources.to(parts), "batch head n key, batch key source -> batch head source n")
            found.add(layer, at, torch.cat([split, own.transpose(-1, -2)], -2))
        else:
            flat = cells.index.flatten(1).to(parts.device)[:, None, None, :]
            found.add(layer, at, parts.gather(-1, flat.expand(-1, *parts.shape[1:3], -1)).transpose(-1, -2))

    hooks = [
        (f"blocks.{layer}.attn.hook_v", hear_values(layer, unit))
        for layer, unit in zip(plan.layers, plan.units, strict=True)
    ]
    stream_attention(plan.model, inputs, plan.positions, plan.layers, plan.heads, share_out, hooks)
    return Reading(plan.model, inputs, plan.positions, index, mask), found.result()


def _sources(inputs: MultimodalInputs) -> Bool[Tensor, "batch pos source"]:
    """Return which keys are image, query text and other text; pads are none (nobody attends to them)."""
    image = inputs.image_mask
    query = position_mask(inputs, "query") & ~image
    return torch.stack([image, query, inputs.attention_mask & ~image & ~query], -1)
