"""What probes read: activations of a model at a site, or numbers of the caller's own, with a name per layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veena_lens.hook_table import hooks_of, require_hook, row_of
from veena_lens.interventions.numbers import floats

SITES = {
    "resid": "hook_resid_post",
    "heads": "attn.hook_z",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "neurons": "mlp.hook_post",
}
OWN = "X"  # what `meta["site"]` says of numbers whose site is not given


@dataclass(frozen=True, eq=False, kw_only=True)
class ProbeData:
    """`features` of rows; `layers` and `positions`, the labels of their axes; `site`, the end of a hook's name."""

    features: Float[Tensor, "layer position row width"]
    layers: list[Any]
    positions: list[str]
    site: str


def own_arguments(
    who: str, model: Any, inputs: Any, labels: Any, groups: Any, X: Any, y: Any, positions: Any
) -> tuple[Any, Any, Any] | None:
    """Return (X, y, groups) of a call with numbers of one's own; None of one with a model.

    Raises: TypeError for arguments of both ways of calling, or none."""
    if hasattr(model, "run_with_cache"):
        if X is not None or y is not None:
            raise TypeError(f"{who}: X and y go without a model: {who}(X, y, groups).")
        if inputs is None or labels is None or groups is None:
            raise TypeError(f"{who}: give {who}(model, inputs, labels, groups): a class and a group per row.")
        return None
    # By their place the three stand where model, inputs and labels do.
    places = [(model, X, "X"), (inputs, y, "y"), (labels, groups, "groups")]
    twice = [name for by_place, by_name, name in places if by_place is not None and by_name is not None]
    if twice:
        raise TypeError(f"{who}: {twice[0]} is given twice, by its place and by its name.")
    found = tuple(by_name if by_place is None else by_place for by_place, by_name, _ in places)
    missing = [name for value, (_, _, name) in zip(found, places, strict=True) if value is None]
    if missing:
        raise TypeError(
            f"{who}: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing: {who}(X, y, groups), where "
            "groups=range(len(y)) says that items are independent; or a model, inputs, labels and groups."
        )
    if not isinstance(positions, str) or positions != "last":
        raise TypeError(f"{who}: positions={positions!r} go with a model; X holds one vector per item.")
    return found[0], found[1], found[2]


def own_numbers(who: str, X: Any, layers: Any, site: str | None) -> ProbeData:
    """Return the caller's own numbers as what probes read.

    X: [items width], [layers items width], or one [items width] per layer by its name. layers: the names of an array's
    layers, as many as it has (default 0, 1, ...), or some of a mapping's. site: where the numbers come from, as
    `linear_probes` takes it.

    Raises: TypeError for what is not numbers; ValueError for another number of axes, layers of unequal shape or of
    unknown name, and numbers that are not finite."""
    if isinstance(X, Mapping):
        known = list(X)
        names = known if layers is None else _names(who, layers)
        absent = [name for name in names if name not in X]
        if absent or not names:
            raise ValueError(f"{who}: X has no layer {absent[0] if absent else names!r}; it has {known}.")
        parts = [floats(X[name], f"{who}: X of layer {name!r}") for name in names]
        shapes = {name: list(part.shape) for name, part in zip(names, parts, strict=True)}
        if parts[0].ndim != 2 or any(shape != shapes[names[0]] for shape in shapes.values()):
            raise ValueError(f"{who}: X by layer must be one [items, width] per layer, all alike, not {shapes}.")
        table = torch.stack([part.detach().cpu().double() for part in parts])
    else:
        table = floats(X, f"{who}: X").detach().cpu().double()
        if table.ndim not in (2, 3):
            raise ValueError(f"{who}: X must be [items, width] or [layers, items, width], not {list(table.shape)}.")
        table = table[None] if table.ndim == 2 else table
        names = list(range(len(table))) if layers is None else _names(who, layers)
        if len(names) != len(table):
            raise ValueError(f"{who}: layers={names} names {len(names)} layers, but X has {len(table)}.")
    if not table.numel():
        raise ValueError(f"{who}: X is empty, {list(table.shape)} over layers, items and width.")
    if not bool(torch.isfinite(table).all()):
        layer, item, column = (~torch.isfinite(table)).nonzero()[0].tolist()
        found = float(table[layer, item, column])
        raise ValueError(
            f"{who}: X holds {found} at layer {names[layer]!r}, item {item}, column {column}; leave such items out, or "
            "fill them."
        )
    part = OWN if site is None else SITES.get(site, site)
    return ProbeData(features=table[:, None], layers=names, positions=["given"], site=part)


def _names(who: str, layers: Any) -> list[Any]:
    """Return names of layers as Python's integers and texts. Raises: TypeError for what is not a list of them."""
    if isinstance(layers, (str, bytes)) or not hasattr(layers, "__iter__"):
        raise TypeError(f"{who}: layers={layers!r} must be a list of the names of X's layers.")
    return [name.item() if hasattr(name, "item") else name for name in layers]


def site_part(who: str, cfg: Any, site: str) -> str:
    """Return the end of the site's hook names in a block. Raises: ValueError for none, or one without positions."""
    part = SITES.get(site, site)
    try:
        full = require_hook(f"blocks.0.{part}", hooks_of(cfg))
    except ValueError as error:
        raise ValueError(
            f"{who}: site={site!r} is none of {', '.join(SITES)} and no hook of a block. {error}"
        ) from error
    if "pos" not in row_of(full).axis_names:
        raise ValueError(f"{who}: {part} has axes {row_of(full).axis_names}; a probe reads one vector per position.")
    return part


def encoded(who: str, given: Any, n: int, what: str) -> tuple[Int[Tensor, " row"], list[Any]]:
    """Return numbers in the order of first appearance, and what they stand for.

    Raises: ValueError for another number of entries than `n`, lists in place of entries, or NaN."""
    shape = getattr(given, "shape", None)
    if getattr(given, "ndim", 1) != 1 or isinstance(given, (str, bytes)) or not hasattr(given, "__iter__"):
        found = repr(given) if shape is None else str(list(shape))
        raise ValueError(f"{who}: {what} must be one entry per row, [{n}], not {found:.80}.")
    plain = [x.item() if hasattr(x, "item") else x for x in given]
    if len(plain) != n:
        raise ValueError(f"{who}: {len(plain)} {what} for {n} rows; give one per row.")
    empty = next((i for i, x in enumerate(plain) if x is None or (isinstance(x, float) and math.isnan(x))), None)
    if empty is not None:
        raise ValueError(f"{who}: {what} hold {plain[empty]} at row {empty}; leave such rows out.")
    known = list(dict.fromkeys(plain))
    number = {x: i for i, x in enumerate(known)}
    return torch.tensor([number[x] for x in plain]), known
