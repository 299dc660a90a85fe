"""What a view shows in a state, as numbers: the maps that the page computes from the same bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from veena_lens.app.view.bundles import Coded, Key, unpack
from veena_lens.app.view.opening import MEAN

if TYPE_CHECKING:
    from veena_lens.app.view.view import ExplorerView


def shown_map(view: ExplorerView, state: Mapping[str, Any]) -> tuple[Float[Tensor, " pos"], str]:
    """Return the map of a state over all positions, NaN where it has no colour, and its name with its unit.

    state: mode, query, layer and head (MEAN: the mean over them), word or direction."""
    mode, layer = state["mode"], state["layer"]
    layers = slice(None) if layer == MEAN else slice(layer, layer + 1)
    if mode in ("norms", "effects"):
        array = torch.from_numpy(view.arrays[mode].copy())[layers]
        name = "norm of the residual stream (log10)" if mode == "norms" else view.header["effects"]["name"]
        return (array.log10() if mode == "norms" else array).mean(0), name
    if mode == "lens":
        coded = (torch.from_numpy(view.arrays[name].copy()) for name in ("lens_maps", "lens_scales"))
        word = state.get("word", 0)
        maps = Coded(**dict(zip(("values", "scales"), coded, strict=True))).decode(view.inputs.image_mask[0].cpu())
        return maps[word, layers].mean(0), f"probability of “{view.header['lens']['words'][word].strip()}”"
    if mode == "push":
        name = view.header["directions"][state.get("direction", 0)]
        return _mean(view, state, Key(query=state["query"], kind="push", name=name)), f"projection on “{name}”"
    values = _mean(view, state, Key(query=state["query"]))
    if mode == "difference":
        return values - _mean(view, state, Key(query=state["query"], run=1)), "attention, first image minus second"
    return values, "attention without sinks" if mode == "sinks" else "attention (share of the word's)"


def _mean(view: ExplorerView, state: Mapping[str, Any], key: Key) -> Float[Tensor, " pos"]:
    """Return the mean over the chosen layers and heads of a token's maps."""
    header, arrays = unpack(view.maps(key))
    (found,) = header["bundles"]
    values, scales = (torch.from_numpy(arrays[found[name]].copy()) for name in ("maps", "scales"))
    maps = Coded(values=values, scales=scales, is_signed=found["signed"]).decode(view.inputs.image_mask[0].cpu())
    layer, head = state["layer"], state["head"]
    if state["mode"] == "sinks":
        for number, sinks in enumerate(view.header["sinks"]):
            left = 1 - maps[number][:, sinks].sum(-1, keepdim=True)
            maps[number] = torch.where(left > 1e-6, maps[number] / left, 0.0)
            maps[number][:, sinks] = 0.0 if layer == MEAN else torch.nan
    chosen = maps if layer == MEAN else maps[layer : layer + 1]
    return (chosen if head == MEAN else chosen[:, head : head + 1]).mean((0, 1))
