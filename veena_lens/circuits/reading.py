"""What the circuit tools share: activations at chosen positions, unit directions, and Scores made from both.

A tool reads a cache, or runs the model and keeps only what it asked for: activations are gathered at the chosen
positions inside the hook, so that nothing of a size [pos n_heads d_model] is ever kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from veena_lens.activation_cache import ActivationCache, MissingActivation
from veena_lens.hook_table import layer_of
from veena_lens.inputs import MultimodalInputs
from veena_lens.interventions.base import require_layer, require_unit
from veena_lens.positions import listed, padded_places, position_mask
from veena_lens.residual_parts import divided
from veena_lens.scores import Scores

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM

ROOM = 2**24  # numbers held at once
EPS = 1e-12


def exact(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to sum in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- what was asked for ---------------------------------------------------------------------------------


def chosen_layers(layers: Any, cfg: Any, who: str) -> list[int]:
    """Return layer numbers of 0 or more. Raises: ValueError for none, or one that the model lacks."""
    chosen = listed(layers, cfg.n_layers, f"{who}: layers")
    if not chosen:
        raise ValueError(f"{who}: the list of layers is empty; leave it out to take all.")
    return [require_layer(layer, cfg.n_layers, who) for layer in chosen]


def chosen_heads(heads: Any, cfg: Any, who: str) -> list[int]:
    """Return head numbers of 0 or more. Raises: ValueError for none, or one that the model lacks."""
    chosen = listed(heads, cfg.n_heads, f"{who}: heads")
    if not chosen:
        raise ValueError(f"{who}: the list of heads is empty; leave it out to take all.")
    return [require_unit(head, cfg.n_heads, who, "head") for head in chosen]


def plain(positions: Any) -> str | int:
    """Return a selection of positions as JSON can hold it."""
    if isinstance(positions, (str, int)):
        return positions
    return f"a mask {list(positions.shape)}" if isinstance(positions, Tensor) else repr(positions)


def require_reduce(reduce: str, who: str, known: Sequence[str] = ("mean", "max", "none")) -> None:
    """Raise ValueError for an unknown way to reduce over positions."""
    if reduce not in known:
        raise ValueError(f"{who}: reduce={reduce!r} must be one of {', '.join(known)} (over positions).")


def unit_directions(
    direction: Float[Tensor, ...],
    cfg: Any,
    layers: Sequence[int],
    at_layer: int | None,
    who: str,
    n_rows: int | None = None,
) -> Float[Tensor, "layer row d_model"]:
    """Return one unit vector u / (||u|| + 1e-12) for each of `layers`: its own, that of `at_layer`, or the only one.

    direction: [layer d_model], [d_model], or [n_rows layer d_model] where each row of the batch has directions of its
    own; the axis "row" has length 1 or `n_rows`.
    Raises: ValueError for a wrong shape, NaN, or a direction that is zero."""
    n, width = cfg.n_layers, cfg.d_model
    if direction.shape not in ((width,), (n, width), (n_rows, n, width)):
        of_rows = "" if n_rows is None else f", [{n_rows} {n} {width}], one per row and layer,"
        raise ValueError(
            f"{who}: direction {list(direction.shape)} must be [layer d_model] = [{n} {width}], one vector per layer"
            f"{of_rows} or [{width}], one for all."
        )
    every = direction.expand(n, width) if direction.ndim == 1 else direction
    every = every[:, None] if every.ndim == 2 else every.transpose(0, 1)
    chosen = every[[at_layer] * len(layers) if at_layer is not None else list(layers)].to(exact(direction.dtype))
    norms = chosen.norm(dim=-1, keepdim=True)
    if not bool(norms.isfinite().all()):
        raise ValueError(f"{who}: the direction holds NaN or infinity.")
    if bool((norms == 0).any()):
        empty = int(norms.eq(0).nonzero()[0, 0])
        raise ValueError(f"{who}: the direction of layer {at_layer if at_layer is not None else layers[empty]} is 0.")
    return chosen / (norms + EPS)


# --- activations at positions -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Reading:
    """Activations of one run at chosen positions: `reading[name]` is [batch n ...].

    `index`, `mask` [batch n]: the positions, padded at the end, and which of them exist."""

    model: HookedVLM
    inputs: MultimodalInputs
    positions: Any
    index: Int[Tensor, "batch n"]
    mask: Bool[Tensor, "batch n"]
    cache: ActivationCache | None = None
    kept: Mapping[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Shaped[Tensor, "batch n ..."]:
        if self.cache is None:
            return self.kept[name]
        value = self.cache[name]
        return gathered(value if self.cache.has_batch_dim else value[None], self.index)

    @property
    def meta(self) -> dict[str, Any]:
        """Return what the positions were, row by row."""
        rows = [places[real].tolist() for places, real in zip(self.index, self.mask, strict=True)]
        return {"at": plain(self.positions), "positions": rows}

    @property
    def labels(self) -> list[int]:
        """Return the labels of the axis "pos": the positions where all rows have the same, else 0, 1, ..."""
        same = bool(self.mask.all()) and bool((self.index == self.index[:1]).all())
        return self.index[0].tolist() if same else list(range(self.index.shape[1]))


def gathered(value: Shaped[Tensor, "batch pos ..."], index: Int[Tensor, "batch n"]) -> Shaped[Tensor, "batch n ..."]:
    """Return an activation at the positions of `index`."""
    rows = torch.arange(len(value), device=value.device)[:, None]
    return value[rows, index.to(value.device)]


def batch_positions(
    inputs: MultimodalInputs, positions: Any, who: str, what: str = "positions"
) -> tuple[Int[Tensor, "batch n"], Bool[Tensor, "batch n"]]:
    """Return (index, mask) of the chosen positions, padded at the end; `what` is the caller's name for the selection.

    Raises: ValueError where no row has any."""
    chosen = position_mask(inputs, positions)
    if not bool(chosen.any()):
        raise ValueError(f"{who}: {what}={positions!r} select no position in {inputs!r}.")
    return padded_places(chosen)


def model_of(source: Any, model: HookedVLM | None, who: str) -> HookedVLM:
    """Return the model that a source belongs to. Raises: ValueError where it is not known."""
    found = model if model is not None else getattr(source, "model", None)
    if found is None:
        what = "a cache that was loaded or made without one" if isinstance(source, ActivationCache) else "inputs"
        raise ValueError(f"{who}: {what} needs the model as well; pass model=...")
    return found


def prepared(source: Any, model: HookedVLM, who: str) -> tuple[Any, int]:
    """Return a cache, or inputs as the model takes them, and the number of rows.

    Raises: ValueError for a cache that does not know its inputs."""
    if not isinstance(source, ActivationCache):
        source = model.as_inputs(source)
        return source, len(source)
    if source.inputs is None:
        raise ValueError(f"{who}: the cache was sliced or made without its inputs; cache whole rows, pos_slice=None.")
    return source, len(source.inputs)


def read(source: Any, names: Sequence[str], positions: Any, model: HookedVLM | None, who: str) -> Reading:
    """Read activations at positions, from a cache or from one run on inputs that stops at the last layer needed.

    source: an ActivationCache, or inputs with `model`. names: full hook names. positions: any selection. who: the
    caller, for messages.
    Raises: MissingActivation, naming the layers, where a cache lacks some; ValueError for an empty selection, or a
    cache that does not know its inputs."""
    model = model_of(source, model, who)
    source, _ = prepared(source, model, who)
    if not isinstance(source, ActivationCache):
        return _run(model, source, names, positions, who)
    missing = [name for name in names if name not in source.cache_dict]
    if missing:
        raise MissingActivation(f"{who}: {_missing(missing)}")
    assert source.inputs is not None
    index, mask = batch_positions(source.inputs, positions, who)
    return Reading(model, source.inputs, positions, index, mask, cache=source)


def _missing(names: Sequence[str]) -> str:
    by_hook: dict[str, list[str]] = {}
    for name in names:
        layer = layer_of(name)
        hook = name if layer is None else name.split(f".{layer}.", 1)[1]
        by_hook.setdefault(hook, []).append("" if layer is None else str(layer))
    lacks = "; ".join(f"{h} of layers {', '.join(n)}" if any(n) else h for h, n in by_hook.items())
    return (
        f"the cache lacks {lacks}. Cache them with names_filter=lambda name: name.endswith({tuple(by_hook)!r}), "
        "or give the inputs and model=... instead of a cache."
    )


def _run(model: HookedVLM, inputs: MultimodalInputs, names: Sequence[str], positions: Any, who: str) -> Reading:
    index, mask = batch_positions(inputs, positions, who)
    kept: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Any) -> None:
        kept[hook.name] = gathered(value.detach(), index)

    layers = [layer for name in names if (layer := layer_of(name)) is not None]
    with torch.no_grad(), model.hooks([(name, keep) for name in names]):
        model(inputs, return_type=None, stop_at_layer=max(layers, default=0) + 1 if layers else 0)
    return Reading(model, inputs, positions, index, mask, kept=kept)


def read_both(
    source: Any,
    baseline: Any,
    names: Sequence[str],
    positions: Any,
    model: HookedVLM | None,
    who: str,
    by: Mapping[str, str] | None = None,
) -> tuple[Reading, Callable[[str], Float[Tensor, "batch n ..."]]]:
    """Return the reading of `source`, and a function that gives an activation, less that of `baseline` if there is one.

    by: the hook of the denominator that divides an activation in each run (see `residual_parts.py`). Values come in
    the dtype to sum in.
    Raises: as `read`; ValueError where the two runs' positions do not pair up."""
    by = dict(by or {})
    names = [*names, *by.values()]
    first = read(source, names, positions, model, who)

    def value_in(run: Reading, name: str) -> Tensor:
        return divided(lambda one: _wide(run[one]), name, by)

    if baseline is None:
        return first, lambda name: value_in(first, name)
    second = read(baseline, names, positions, model if model is not None else first.model, who)
    require_same_positions(first, second, who)
    return first, lambda name: value_in(first, name) - value_in(second, name).to(first[name].device)


def require_same_positions(first: Reading, second: Reading, who: str) -> None:
    """Raise ValueError where the positions of a run and of its baseline do not pair up."""
    if first.mask.shape != second.mask.shape or not bool((first.mask == second.mask.to(first.mask.device)).all()):
        raise ValueError(
            f"{who}: positions={first.positions!r} select {first.mask.sum(-1).tolist()} positions per row, in the "
            f"baseline {second.mask.sum(-1).tolist()}; pairs need the same rows with the same text."
        )


def _wide(value: Tensor) -> Tensor:
    return value.to(exact(value.dtype))


def reduced(
    values: Float[Tensor, "batch ... n"], mask: Bool[Tensor, "batch n"], reduce: str
) -> Float[Tensor, "batch ..."]:
    """Return the mean or the largest over the positions that exist, NaN where a row has none; "none" leaves them."""
    if reduce == "none":
        return values
    there = mask.to(values.device).view(len(mask), *[1] * (values.ndim - 2), -1)
    if reduce == "mean":
        return torch.where(there, values, 0.0).sum(-1) / there.sum(-1)
    largest = torch.where(there, values, -torch.inf).amax(-1)
    return torch.where(there.any(-1), largest, torch.nan)


def as_scores(
    values: Float[Tensor, "batch ..."],
    axes: Sequence[str],
    reading: Reading,
    reduce: str,
    is_pair: bool,
    labels: Mapping[str, Sequence],
    **about: Any,
) -> Scores:
    """Return Scores over ("batch" or "pair", *axes), "pos" last where positions are kept; padding is masked."""
    names = ["pair" if is_pair else "batch", *axes, *(["pos"] if reduce == "none" else [])]
    mask, labels = None, dict(labels)
    if reduce == "none":
        labels["pos"] = reading.labels
        there = reading.mask.view(len(reading.mask), *[1] * len(axes), -1)
    else:
        there = reading.mask.any(-1).view(-1, *[1] * len(axes))
    if not bool(there.all()):
        mask = there.to(values.device).expand(values.shape)
    meta = {**reading.meta, "reduce": reduce, "difference": is_pair, **about.pop("meta", {})}
    return Scores(values, tuple(names), labels, mask=mask, meta=meta, **about)
