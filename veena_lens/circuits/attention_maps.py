"""Attention from chosen tokens to an image: unchanged, without sink tokens, or against a second image.

Sinks take attention from nearly every query whatever the image shows, and would hide the rest of a map. They are
found by a rule that is stated with the result, never by a fixed place. Attention is read as it passes, layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from veena_lens.circuits.image_cells import image_cells, over_cells
from veena_lens.circuits.reading import (
    Reading,
    as_scores,
    batch_positions,
    chosen_heads,
    chosen_layers,
    exact,
    plain,
    require_reduce,
)
from veena_lens.circuits.streamed_attention import Collected, stream_attention
from veena_lens.scores import Scores

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM

FEWEST_KEYS = 4  # a median of fewer keys says nothing


def image_attention(
    model: HookedVLM,
    inputs: Any,
    queries: Any = "last",
    *,
    image: int = 0,
    grid: str = "grid",
    layers: Any = None,
    heads: Any = None,
    reduce: str = "mean",
) -> Scores:
    """Return attention weights from `queries` to the tokens of an image, as maps over its token grid.

    Only these queries are computed, and interventions in force are honoured.

    queries: a selection of positions. image: number of the image in each row. grid: "grid" (through the tiles of tiled
    images, default) or "whole" (the whole view). layers, heads: default all. reduce: "mean" over the queries, or
    "none".
    Returns Scores with axes (batch, layer, head, height, width), with reduce="none" the queries last as "pos". Grids of
    unequal rows are padded at the lower right (masked), a row without the image is masked whole. Unit: weight (a query
    gives 1 to all keys together).
    Raises: ValueError for unknown layers or heads, queries that select nothing, or no such image; IndexError where an
    image's tokens make no whole grid.
    """
    return _map(model, inputs, queries, image, grid, layers, heads, reduce, None, False, "image_attention")


def mask_sinks(
    model: HookedVLM,
    inputs: Any,
    queries: Any = "last",
    *,
    sinks: Scores | None = None,
    renormalise: bool = True,
    image: int = 0,
    grid: str = "grid",
    layers: Any = None,
    heads: Any = None,
    reduce: str = "mean",
) -> Scores:
    """Return `image_attention` with the sink tokens of each layer taken out: their cells are masked.

    sinks: what `attention_sinks` returned for these inputs (with rules of your own); None finds them with its defaults.
    renormalise: divide what every query gives by what it gives to all keys (of image and text) that are not sinks, so
    that it sums to 1 again; False leaves the other weights unchanged. The rest as in `image_attention`.
    meta["sinks"] names the positions of sinks, layer by layer and row by row, meta["rule"] the rule.
    Raises: as `image_attention`; ValueError for sinks of other inputs, or that lack a layer.
    Source: Kang et al. 2025, arXiv 2503.03321 (visual attention sinks); the rule is ours, see `attention_sinks`.
    """
    found = attention_sinks(model, inputs, layers=layers) if sinks is None else sinks
    return _map(model, inputs, queries, image, grid, layers, heads, reduce, found, renormalise, "mask_sinks")


def attention_sinks(
    model: HookedVLM,
    inputs: Any,
    queries: Any = "all",
    *,
    multiple: float | int = 10.0,
    share: float | int = 0.8,
    norm_multiple: float | int | None = 5.0,
    layers: Any = None,
) -> Scores:
    """Return which tokens are attention sinks in each layer: a bool for each.

    A key k is one where both hold. (1) Of all pairs of a head and a later query p > k in `queries` that may see k, and
    at least four keys, the share `share` gives it more than `multiple` times the query's median weight over the keys
    that it sees. (2) The norm of the residual that enters the layer is at k more than `norm_multiple` times the row's
    median over real tokens (None: this is not asked).
    The attention of every query is computed once, a bounded number at a time: time grows with n_heads pos^2.

    queries: a selection of positions, default all. multiple, norm_multiple: factors above 1. share: in (0, 1]. layers:
    default all.
    Returns Scores with axes (batch, layer, pos). meta["rule"] states the numbers, `meta["positions"][layer][row]` the
    places.
    Raises: ValueError for an unknown layer, queries that select nothing, or numbers out of range.
    Source: Xiao et al. 2023, arXiv 2309.17453; Sun et al. 2024, arXiv 2402.17762 (massive norms); the rule is ours.
    """
    who = "attention_sinks"
    if multiple <= 1 or not 0 < share <= 1 or (norm_multiple is not None and norm_multiple <= 1):
        raise ValueError(
            f"{who}: multiple={multiple} and norm_multiple={norm_multiple} must be above 1, share={share} in (0, 1]."
        )
    inputs = model.as_inputs(inputs)
    chosen = chosen_layers(layers, model.cfg, who)
    index, mask = batch_positions(inputs, queries, who, "queries")
    hits: dict[int, Tensor] = {}
    pairs: dict[int, Tensor] = {}
    massive: dict[int, Tensor] = {}

    def hear_norms(layer: int) -> Any:
        def hear(resid: Float[Tensor, "batch pos d_model"], hook: Any) -> None:
            norms = resid.detach().to(exact(resid.dtype)).norm(dim=-1)
            there = inputs.attention_mask.to(norms.device)
            usual = torch.where(there, norms, torch.nan).nanmedian(-1, keepdim=True).values
            massive[layer] = norms > (0.0 if norm_multiple is None else norm_multiple) * usual

        return hear

    def count(layer: int, at: slice, weights: Float[Tensor, "batch head n key_pos"]) -> None:
        weights = weights.to(exact(weights.dtype))
        sees = weights > 0
        usual = torch.where(sees, weights, torch.nan).nanmedian(-1, keepdim=True).values
        asked = index[:, at].to(weights.device), mask[:, at].to(weights.device)
        later = (torch.arange(weights.shape[-1], device=weights.device) < asked[0][..., None]) & asked[1][..., None]
        counts = sees & later[:, None] & (sees.sum(-1, keepdim=True) >= FEWEST_KEYS)
        hits[layer] = hits.get(layer, 0) + (counts & (weights > multiple * usual)).sum((1, 2))
        pairs[layer] = pairs.get(layer, 0) + counts.sum((1, 2))

    heads = chosen_heads(None, model.cfg, who)
    hooks = [(f"blocks.{layer}.hook_resid_pre", hear_norms(layer)) for layer in chosen]
    stream_attention(model, inputs, queries, chosen, heads, count, hooks)
    device = hits[chosen[0]].device
    found = torch.stack(
        [((pairs[i] > 0) & (hits[i] >= share * pairs[i]) & massive[i].to(pairs[i].device)).to(device) for i in chosen],
        1,
    )
    there = inputs.attention_mask[:, None].to(device).expand(found.shape)
    found = found & there
    rule = {"multiple": multiple, "share": share, "norm_multiple": norm_multiple, "queries": plain(queries)}
    meta = {"rule": rule, "positions": _named(found, chosen)}
    return Scores(
        found,
        ("batch", "layer", "pos"),
        {"layer": chosen},
        "attention sink",
        "",
        None if bool(there.all()) else there,
        meta,
    )


def attention_difference(first: Scores, second: Scores) -> Scores:
    """Return the first map less the second, of images with one token grid: same axes; masked where either is masked.

    Raises: ValueError where axes, labels or grids differ (nothing is resampled)."""
    if first.axes != second.axes or "height" not in first.axes:
        raise ValueError(f"attention_difference: axes {first.axes} and {second.axes}; give two maps of the same axes.")
    sizes = [one.meta.get("sizes") for one in (first, second)]
    if sizes[0] != sizes[1] or first.shape != second.shape:
        raise ValueError(
            f"attention_difference: the token grids are {sizes[0]} and {sizes[1]}; only images with the same grid "
            "compare cell by cell."
        )
    for axis in ("layer", "head"):
        if axis in first.axes and list(first.labels[axis]) != list(second.labels[axis]):
            raise ValueError(f"attention_difference: {axis}s {first.labels[axis]} and {second.labels[axis]} differ.")
    mask = None
    if first.mask is not None or second.mask is not None:
        mask = first.exists & second.exists.to(first.values.device)
    values = first.values - second.values.to(first.values.device)
    if mask is not None:
        values = torch.where(mask, values, 0.0)
    return replace(first, values=values, mask=mask, name=f"difference of {first.name}", meta={"sizes": sizes[0]})


def _named(found: Bool[Tensor, "batch layer pos"], layers: Sequence[int]) -> dict[str, list[list[int]]]:
    """Return layer -> the positions of each row."""
    return {str(n): [row.nonzero().flatten().tolist() for row in found[:, i].cpu()] for i, n in enumerate(layers)}


def _map(
    model: HookedVLM,
    inputs: Any,
    queries: Any,
    image: int,
    grid: str,
    layers: Sequence[int] | None,
    heads: Sequence[int] | None,
    reduce: str,
    sinks: Scores | None,
    renormalise: bool,
    who: str,
) -> Scores:
    require_reduce(reduce, who, ("mean", "none"))
    chosen, which = chosen_layers(layers, model.cfg, who), chosen_heads(heads, model.cfg, who)
    inputs = model.as_inputs(inputs)
    cells = image_cells(inputs, image, grid, who)
    index, mask = batch_positions(inputs, queries, who, "queries")
    kept = None if sinks is None else ~_sinks_of(sinks, inputs, chosen, who)
    found = Collected(chosen, mask, reduce)

    def look(layer: int, at: slice, weights: Float[Tensor, "batch head n key_pos"]) -> None:
        weights = weights.to(exact(weights.dtype))
        if kept is not None:
            weights = weights * kept[:, chosen.index(layer)].to(weights)[:, None, None]
            if renormalise:
                total = weights.sum(-1, keepdim=True)
                weights = weights / torch.where(total == 0, 1.0, total)
        flat = cells.index.flatten(1).to(weights.device)[:, None, None, :]
        seen = weights.gather(-1, flat.expand(-1, *weights.shape[1:3], -1))
        found.add(layer, at, rearrange(seen, "batch head n cell -> batch head cell n"))

    stream_attention(model, inputs, queries, chosen, which, look)
    height, width = cells.mask.shape[1:]
    wide = "batch layer head (height width) ... -> batch layer head height width ..."
    meta: dict[str, Any] = {"image": image, "grid": grid, "sizes": cells.sizes}
    if sinks is not None and kept is not None:
        meta |= {"sinks": _named(~kept, chosen), "rule": sinks.meta.get("rule")}
        meta["renormalise"] = renormalise
    scores = as_scores(
        rearrange(found.result(), wide, height=height, width=width),
        ("layer", "head", "height", "width"),
        Reading(model, inputs, queries, index, mask),
        reduce,
        False,
        {"layer": chosen, "head": which},
        name="attention" if sinks is None else "attention without sinks",
        unit="weight",
        meta=meta,
    )
    scores = over_cells(scores, cells)
    return scores if kept is None else _masked(scores, kept, cells.index)


def _sinks_of(sinks: Scores, inputs: Any, layers: Sequence[int], who: str) -> Bool[Tensor, "batch layer pos"]:
    if sinks.axes != ("batch", "layer", "pos") or sinks.values.dtype != torch.bool:
        raise ValueError(
            f"{who}: sinks must be the Scores of attention_sinks, not {sinks.axes} of {sinks.values.dtype}."
        )
    if (sinks.shape[0], sinks.shape[2]) != tuple(inputs.shape):
        raise ValueError(f"{who}: sinks of [batch pos] = {[sinks.shape[0], sinks.shape[2]]} for {inputs!r}.")
    lacking = [layer for layer in layers if layer not in sinks.labels["layer"]]
    if lacking:
        raise ValueError(
            f"{who}: the sinks of layers {lacking} were not looked for; they know {sinks.labels['layer']}."
        )
    return sinks.select(layer=list(layers)).values


def _masked(scores: Scores, kept: Bool[Tensor, "batch layer pos"], index: Tensor) -> Scores:
    """Return Scores with the cells of sinks masked."""
    flat = index.flatten(1)[:, None].expand(-1, kept.shape[1], -1).to(kept.device)
    cells = kept.gather(-1, flat).view(*kept.shape[:2], 1, *index.shape[1:]).to(scores.values.device)
    if bool(cells.all()):
        return scores
    cells = cells.view(*cells.shape, *[1] * (scores.values.ndim - cells.ndim)).expand(scores.shape) & scores.exists
    return replace(scores, values=torch.where(cells, scores.values, 0.0), mask=cells)
