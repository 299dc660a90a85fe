"""Emotional intention: how far each head's, layer's or component's output points along a direction.

A head's result z W_O is needed only for its length; its projection on a unit vector u is z (W_O u). With a baseline run
(the neutral twin) every output is first replaced by its difference, which leaves out the component's constant part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from veena_lens.circuits.reading import (
    EPS,
    ROOM,
    as_scores,
    chosen_layers,
    exact,
    model_of,
    prepared,
    read_both,
    reduced,
    require_reduce,
    unit_directions,
)
from veena_lens.interventions.base import require_layer
from veena_lens.residual_parts import denominators, head_rows
from veena_lens.scores import Scores

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM

UNITS = {"cosine": "cosine", "projection": "projection"}


def head_intention(
    cache: Any,
    direction: Float[Tensor, ...],
    positions: Any = "last",
    kind: str = "cosine",
    at_layer: int | None = None,
    *,
    baseline: Any = None,
    reduce: str = "mean",
    layers: Any = None,
    model: HookedVLM | None = None,
) -> Scores:
    """Return the cosine of each head's output with its layer's direction, or its projection on that direction.

    The output of head h in layer l is r = z[l, h] W_O[l, h]. With `baseline` it is the difference of the two runs:
    I_delta = cos(Delta r, u) and W = <Delta r, u>, u the unit vector. Where a norm follows attention (Gemma), a head's
    output is its share after that norm, given the run's denominator, so that heads sum to `hook_attn_out`.

    cache: activations, or inputs where `model` is given (then only z at the chosen positions is kept). direction:
    [layer d_model], one [d_model], or [row layer d_model] (each pair on its own emotion's, say). positions: where heads
    are read. kind: "cosine" (dimensionless, in [-1, 1]) or "projection" (unit: that of the residual stream). at_layer:
    take that layer's vector for all; default each layer's own. baseline: the other run of the pairs, a cache or inputs.
    reduce: "mean" or "max" over the positions, or "none". layers: default all.
    Returns Scores with axes (batch, layer, head), "pos" last with reduce="none"; with `baseline` the rows are the axis
    "pair".
    Raises: MissingActivation, naming the layers whose `hook_z` (or denominator) the cache lacks; ValueError for a
    direction of another shape, an unknown layer, an empty selection of positions, or pairs that do not match.
    Source: Zhang et al. 2026, arXiv 2605.21980, "emotional intention"; the differences are our own.
    """
    who = "head_intention"
    _require_kind(kind, who)
    require_reduce(reduce, who)
    model = model_of(cache, model, who)
    chosen = chosen_layers(layers, model.cfg, who)
    source_layer = None if at_layer is None else require_layer(at_layer, model.cfg.n_layers, who)
    cache, n_rows = prepared(cache, model, who)
    units = unit_directions(direction, model.cfg, chosen, source_layer, who, n_rows)
    names = [f"blocks.{layer}.attn.hook_z" for layer in chosen]
    reading, value = read_both(cache, baseline, names, positions, model, who, by=denominators(model.cfg, names))
    found = []
    for layer, name, unit in zip(chosen, names, units, strict=True):
        W_O = head_rows(model.blocks[layer]).detach()
        z = value(name).to(W_O.device)
        W_O, unit = W_O.to(z.dtype), unit.to(z)
        wanted = einsum(W_O, unit, "head d_head d_model, row d_model -> row head d_head").expand(len(z), -1, -1)
        projected = einsum(z, wanted, "batch pos head d_head, batch head d_head -> batch head pos")
        if kind == "cosine":
            projected = projected / (_result_norms(z, W_O) + EPS)
        found.append(reduced(projected, reading.mask, reduce).to(units.device))
    return as_scores(
        torch.stack(found, 1),
        ("layer", "head"),
        reading,
        reduce,
        baseline is not None,
        {"layer": chosen},
        name="intention" if kind == "cosine" else "projection",
        unit=UNITS[kind],
        meta={"kind": kind, "at_layer": source_layer},
    )


def direct_attribution(
    cache: Any,
    direction: Float[Tensor, ...],
    positions: Any = "last",
    kind: str = "projection",
    at_layer: int | None = None,
    *,
    baseline: Any = None,
    reduce: str = "mean",
    model: HookedVLM | None = None,
) -> Scores:
    """Return the projection of what the embedding and each layer's attention and MLP add on a unit direction.

    Components A_c are those of the residual stream, in order: "embed", "0_attn_out", "0_mlp_out", "1_deepstack" (what a
    layer adds of the tower's inner features, `hook_deepstack` minus `hook_resid_pre`), ... With `at_layer` all are
    read on that layer's direction and later layers are left out; then, and with one vector for all, the projections
    sum to that of the stream: sum_c <A_c, u> = <resid_post[at_layer], u>, also of differences (`baseline`).

    cache, direction, positions, at_layer, baseline, reduce: as in `head_intention`. kind: "projection" <A_c, u> (unit:
    that of the residual stream) or "cosine".
    Returns Scores with axes (batch or pair, component), "pos" last with reduce="none".
    Raises: as `head_intention`, for `hook_embed`, `hook_attn_out`, `hook_mlp_out` (`hook_deepstack`, `hook_resid_pre`).
    Source: Elhage et al. 2021, "A mathematical framework for transformer circuits"; Zhang et al. 2026.
    """
    who = "direct_attribution"
    _require_kind(kind, who)
    require_reduce(reduce, who)
    model = model_of(cache, model, who)
    cfg = model.cfg
    source_layer = None if at_layer is None else require_layer(at_layer, cfg.n_layers, who)
    last = cfg.n_layers - 1 if source_layer is None else source_layer
    parts: list[tuple[str, int, tuple[str, ...]]] = [("embed", 0, ("hook_embed",))]
    for layer in range(last + 1):
        block = f"blocks.{layer}"
        if 1 <= layer <= cfg.n_deepstack:
            parts.append((f"{layer}_deepstack", layer, (f"{block}.hook_deepstack", f"{block}.hook_resid_pre")))
        parts += [(f"{layer}_{part}", layer, (f"{block}.hook_{part}",)) for part in ("attn_out", "mlp_out")]
    cache, n_rows = prepared(cache, model, who)
    units = unit_directions(direction, cfg, [layer for _, layer, _ in parts], source_layer, who, n_rows)
    names = [name for _, _, mine in parts for name in mine]
    reading, value = read_both(cache, baseline, names, positions, model, who)
    found = []
    for (_, _, mine), unit in zip(parts, units, strict=True):
        out = value(mine[0]) if len(mine) == 1 else value(mine[0]) - value(mine[1])
        projected = einsum(out, unit.to(out).expand(len(out), -1), "batch n d_model, batch d_model -> batch n")
        if kind == "cosine":
            projected = projected / (out.norm(dim=-1) + EPS)
        found.append(reduced(projected, reading.mask, reduce).to(units.device))
    return as_scores(
        torch.stack(found, 1),
        ("component",),
        reading,
        reduce,
        baseline is not None,
        {"component": [label for label, _, _ in parts]},
        name="projection" if kind == "projection" else "intention",
        unit=UNITS[kind],
        meta={"kind": kind, "at_layer": source_layer},
    )


def copying_strength(
    model: HookedVLM, direction: Float[Tensor, ...], at_layer: int | None = None, *, layers: Any = None
) -> Scores:
    """Return how far each head would carry a direction on, from weights alone: <u w W_V[h] W_O[h], u>.

    w is the weight of `ln1`. A hint without data: the norms' denominators and the attention pattern are left out (layer
    norm: u is centred; a norm after attention counts with its weight).

    direction: [layer d_model] or one [d_model]. at_layer: take that layer's vector for all. layers: default all.
    Returns Scores with axes (layer, head); positive where the head copies the direction, negative where it removes it.
    Raises: ValueError for a direction of another shape, or an unknown layer.
    Source: Elhage et al. 2021, "A mathematical framework for transformer circuits", copying heads.
    """
    who = "copying_strength"
    chosen = chosen_layers(layers, model.cfg, who)
    source_layer = None if at_layer is None else require_layer(at_layer, model.cfg.n_layers, who)
    units = unit_directions(direction, model.cfg, chosen, source_layer, who)
    found = []
    for layer, unit in zip(chosen, units[:, 0], strict=True):
        block = model.blocks[layer]
        W_V, W_O, weight = (x.detach() for x in (block.attn.W_V, head_rows(block), block.ln1.w))
        dtype = exact(W_O.dtype)
        unit = unit.to(W_O.device, dtype)
        read = unit - unit.mean() if model.cfg.normalization_type == "LN" else unit
        carried = (read * weight.to(dtype)) @ W_V.to(dtype)
        found.append((carried * (W_O.to(dtype) @ unit)).sum(-1).to(units.device))
    meta = {"at_layer": source_layer}
    return Scores(torch.stack(found), ("layer", "head"), {"layer": chosen}, "copying strength", "gain", meta=meta)


def _require_kind(kind: str, who: str) -> None:
    if kind not in UNITS:
        raise ValueError(f"{who}: kind={kind!r} must be one of {', '.join(UNITS)}.")


def _result_norms(
    z: Float[Tensor, "batch pos n_heads d_head"], W_O: Float[Tensor, "n_heads d_head d_model"]
) -> Float[Tensor, "batch n_heads pos"]:
    """Return ||z[h] W_O[h]||, a bounded number of positions at a time."""
    flat = rearrange(z, "batch pos head d_head -> (batch pos) head d_head")
    size = max(1, ROOM // (W_O.shape[0] * W_O.shape[2]))
    norms = [
        einsum(part, W_O, "row head d_head, head d_head d_model -> row head d_model").norm(dim=-1)
        for part in flat.split(size)
    ]
    return rearrange(torch.cat(norms), "(batch pos) head -> batch head pos", batch=len(z))
