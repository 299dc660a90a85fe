"""What the circuit tools share: activations at chosen positions, unit directions, attention rows as they come.

A tool reads a cache, or runs the model and keeps only what it asked for: activations are gathered at the chosen
positions inside the hook, attention rows go to the tool a bounded number at a time. Nothing of a size
[n_heads pos pos] or [pos n_heads d_model] is ever kept.
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
from veena_lens.model.attention_rows import AttentionRows
from veena_lens.positions import padded_places, position_mask
from veena_lens.residual_parts import divided
from veena_lens.scores import Scores

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM

ROOM = 2**24  # numbers held at once
EPS = 1e-12


def exact(dtype: torch.dtype) -> torch.dtype:
    """The dtype to sum in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- what was asked for ---------------------------------------------------------------------------------


def chosen_layers(layers: Sequence[int] | None, cfg: Any, who: str) -> list[int]:
    """Layer numbers of 0 or more. Raises: ValueError for none, or one that the model lacks."""
    if layers is not None and len(layers) == 0:
        raise ValueError(f"{who}: the list of layers is empty; leave it out to take all.")
    return [require_layer(layer, cfg.n_layers, who) for layer in (range(cfg.n_layers) if layers is None else layers)]


def chosen_heads(heads: Sequence[int] | None, cfg: Any, who: str) -> list[int]:
    """Head numbers of 0 or more. Raises: ValueError for none, or one that the model lacks."""
    if heads is not None and len(heads) == 0:
        raise ValueError(f"{who}: the list of heads is empty; leave it out to take all.")
    return [require_unit(h, cfg.n_heads, who, "head") for h in (range(cfg.n_heads) if heads is None else heads)]


def plain(at: Any) -> str | int:
    """A selection of positions as JSON can hold it."""
    return at if isinstance(at, (str, int)) else f"a mask {list(at.shape)}" if isinstance(at, Tensor) else repr(at)


def require_reduce(reduce: str, who: str, known: Sequence[str] = ("mean", "max", "none")) -> None:
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
    """One unit vector u / (||u|| + 1e-12) for each of `layers`: its own, that of `at_layer`, or the only one.

    row: 1, or `n_rows` where each row of the batch has directions of its own.
    Raises: ValueError for a wrong shape, NaN, or a direction that is zero."""
    n, width = cfg.n_layers, cfg.d_model
    if direction.shape not in ((width,), (n, width), (n_rows, n, width)):
        of_rows = "" if n_rows is None else f", [{n_rows} {n} {width}], one a row and layer,"
        raise ValueError(
            f"{who}: direction {list(direction.shape)} must be [layer d_model] = [{n} {width}], one vector a layer"
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

    model: Any
    inputs: MultimodalInputs
    at: Any
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
        """What the positions were, row by row."""
        rows = [places[real].tolist() for places, real in zip(self.index, self.mask, strict=True)]
        return {"at": plain(self.at), "positions": rows}

    @property
    def labels(self) -> list[int]:
        """Labels of the axis "pos": the positions where all rows have the same, else 0, 1, ..."""
        same = bool(self.mask.all()) and bool((self.index == self.index[:1]).all())
        return self.index[0].tolist() if same else list(range(self.index.shape[1]))


def gathered(value: Shaped[Tensor, "batch pos ..."], index: Int[Tensor, "batch n"]) -> Shaped[Tensor, "batch n ..."]:
    rows = torch.arange(len(value), device=value.device)[:, None]
    return value[rows, index.to(value.device)]


def places_of(inputs: MultimodalInputs, at: Any, who: str) -> tuple[Int[Tensor, "batch n"], Bool[Tensor, "batch n"]]:
    """(index, mask) of the chosen positions. Raises: ValueError where no row has any."""
    chosen = position_mask(inputs, at)
    if not bool(chosen.any()):
        raise ValueError(f"{who}: at={at!r} selects no position in {inputs!r}.")
    return padded_places(chosen)


def model_of(source: Any, model: Any, who: str) -> Any:
    """The model that a source belongs to. Raises: ValueError where it is not known."""
    found = model if model is not None else getattr(source, "model", None)
    if found is None:
        what = "a cache that was loaded or made without one" if isinstance(source, ActivationCache) else "inputs"
        raise ValueError(f"{who}: {what} needs the model as well; pass model=...")
    return found


def prepared(source: Any, model: Any, who: str) -> tuple[Any, int]:
    """A cache, or inputs as the model takes them, and the number of rows.

    Raises: ValueError for a cache that does not know its inputs."""
    if not isinstance(source, ActivationCache):
        source = model.as_inputs(source)
        return source, len(source)
    if source.inputs is None:
        raise ValueError(f"{who}: the cache was sliced or made without its inputs; cache whole rows, pos_slice=None.")
    return source, len(source.inputs)


def read(source: Any, names: Sequence[str], at: Any, model: Any, who: str) -> Reading:
    """Activations at positions, from a cache or from one run of `model` on inputs (stopped at the last layer needed).

    Raises: MissingActivation, naming the layers, where a cache lacks some; ValueError for an empty selection, or a
    cache that does not know its inputs."""
    model = model_of(source, model, who)
    source, _ = prepared(source, model, who)
    if not isinstance(source, ActivationCache):
        return _run(model, source, names, at, who)
    missing = [name for name in names if name not in source.cache_dict]
    if missing:
        raise MissingActivation(f"{who}: {_missing(missing)}")
    assert source.inputs is not None
    index, mask = places_of(source.inputs, at, who)
    return Reading(model, source.inputs, at, index, mask, cache=source)


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


def _run(model: HookedVLM, inputs: MultimodalInputs, names: Sequence[str], at: Any, who: str) -> Reading:
    index, mask = places_of(inputs, at, who)
    kept: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Any) -> None:
        kept[hook.name] = gathered(value.detach(), index)

    layers = [layer for name in names if (layer := layer_of(name)) is not None]
    with torch.no_grad(), model.hooks([(name, keep) for name in names]):
        model(inputs, return_type=None, stop_at_layer=max(layers, default=0) + 1 if layers else 0)
    return Reading(model, inputs, at, index, mask, kept=kept)


def read_both(
    source: Any,
    baseline: Any,
    names: Sequence[str],
    at: Any,
    model: Any,
    who: str,
    by: Mapping[str, str] | None = None,
) -> tuple[Reading, Callable[[str], Float[Tensor, "batch n ..."]]]:
    """The reading of `source`, and a function that gives an activation, less that of `baseline` where there is one.

    by: the hook of the denominator that divides an activation in each run (see `residual_parts.py`).
    Values come in the dtype to sum in. Raises: as `read`; ValueError where the two runs' positions do not pair up."""
    by = dict(by or {})
    names = [*names, *by.values()]
    first = read(source, names, at, model, who)

    def value_in(run: Reading, name: str) -> Tensor:
        return divided(lambda one: _wide(run[one]), name, by)

    if baseline is None:
        return first, lambda name: value_in(first, name)
    second = read(baseline, names, at, model if model is not None else first.model, who)
    if first.mask.shape != second.mask.shape or not bool((first.mask == second.mask.to(first.mask.device)).all()):
        raise ValueError(
            f"{who}: at={at!r} selects {first.mask.sum(-1).tolist()} positions a row, in the baseline "
            f"{second.mask.sum(-1).tolist()}; pairs need the same rows with the same text."
        )
    return first, lambda name: value_in(first, name) - value_in(second, name).to(first[name].device)


def _wide(value: Tensor) -> Tensor:
    return value.to(exact(value.dtype))


def reduced(
    values: Float[Tensor, "batch ... n"], mask: Bool[Tensor, "batch n"], reduce: str
) -> Float[Tensor, "batch ..."]:
    """The mean or the largest over the positions that exist, NaN where a row has none; "none" leaves them."""
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
    """Scores over ("batch" or "pair", *axes), "pos" last where positions are kept; what does not exist is masked."""
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


# --- attention rows ---------------------------------------------------------------------------------------


class StreamedRows(AttentionRows):
    """Hands each layer's attention of the chosen queries to `consume(layer, queries, weights)` and keeps none of it.

    `queries` is a slice of the padded list of query positions, `weights` [batch head n key_pos]: so many queries at
    once as fit in memory."""

    def __init__(
        self,
        cfg: Any,
        queries: Any,
        layers: Sequence[int],
        heads: Sequence[int],
        consume: Callable[[int, slice, Float[Tensor, "batch head n key_pos"]], None],
    ) -> None:
        super().__init__(queries, "all", layers, heads, cfg.n_key_value_heads, cfg.score_scale)
        self.consume, self.n_heads = consume, cfg.n_heads

    def read(
        self,
        layer: int,
        q: Float[Tensor, "batch n_heads query_pos d_head"],
        k: Float[Tensor, "batch n_key_value_heads key_pos d_head"],
        mask: Any,
        bias: Tensor | None,
        pattern: Float[Tensor, "batch n_heads query_pos key_pos"] | None,
    ) -> None:
        """A layer's queries and keys, or its pattern where one was made anyway."""
        if layer not in self._parts or self._now is None:
            return
        index = self._now[0].to(q.device)
        size = max(1, ROOM // (len(q) * self.n_heads * k.shape[2]))
        with torch.no_grad():
            for start in range(0, index.shape[1], size):
                at = slice(start, start + size)
                self.consume(layer, at, self.weights(index[:, at], q, k, mask, bias, pattern))


class Collected:
    """What is kept of streamed rows: for each layer the mean over the query rows that exist, or ("none") all of them.

    A mean is summed as rows come, so its memory does not grow with their number; NaN for a row without any."""

    def __init__(self, layers: Sequence[int], mask: Bool[Tensor, "batch n"], reduce: str) -> None:
        self.mask, self.reduce = mask, reduce
        self._parts: dict[int, list[Tensor]] = {layer: [] for layer in layers}

    def add(self, layer: int, at: slice, values: Float[Tensor, "batch ... n"]) -> None:
        """The values of the query rows `at`, last axis."""
        parts = self._parts[layer]
        if self.reduce == "none":
            parts.append(values)
            return
        there = self.mask[:, at].to(values).view(len(self.mask), *[1] * (values.ndim - 2), -1)
        total = (values * there).sum(-1)
        parts[:] = [total if not parts else parts[0] + total]

    def result(self) -> Float[Tensor, "batch layer ..."]:
        """All layers together; query rows, where kept, last."""
        device = next(iter(self._parts.values()))[0].device
        if self.reduce == "none":
            return torch.stack([torch.cat([p.to(device) for p in parts], -1) for parts in self._parts.values()], 1)
        total = torch.stack([parts[0].to(device) for parts in self._parts.values()], 1)
        return total / self.mask.sum(-1).to(total).view(-1, *[1] * (total.ndim - 1))


def stream_rows(
    model: HookedVLM,
    inputs: MultimodalInputs,
    queries: Any,
    layers: Sequence[int],
    heads: Sequence[int],
    consume: Callable[[int, slice, Float[Tensor, "batch head n key_pos"]], None],
    hooks: Sequence[tuple[str, Callable[..., None]]] = (),
) -> None:
    """One run whose attention rows go to `consume`, layer by layer; `hooks` listen besides. Layers stay fused."""
    rows = StreamedRows(model.cfg, queries, layers, heads, consume)
    with torch.no_grad(), model.hooks(list(hooks)), model.recording(rows):
        model(inputs, return_type=None, stop_at_layer=max(layers) + 1)


# --- images ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Cells:
    """Positions of one image's grid in each row, [batch height width], padded; `sizes` [height, width] a row."""

    index: Int[Tensor, "batch height width"]
    mask: Bool[Tensor, "batch height width"]
    sizes: list[list[int]]


def picture_cells(inputs: MultimodalInputs, image: int, view: str, who: str) -> Cells:
    """Where image number `image` of each row has its token grid.

    "grid" is the image's whole grid (through tiles); "whole" the small whole view beside the tiles,
    the grid itself where there are no tiles.
    Raises: ValueError where no row has such an image; IndexError where its tokens make no whole grid."""
    if view not in ("grid", "whole"):
        raise ValueError(f"{who}: grid={view!r} must be 'grid' or 'whole'.")
    if not any(0 <= image < n for n in inputs.n_images):
        raise ValueError(f"{who}: no row has an image {image}; images a row: {inputs.n_images}.")
    found = [_cells_of(inputs, row, image, view) if image < n else None for row, n in enumerate(inputs.n_images)]
    sizes = [[0, 0] if cells is None else list(cells.shape) for cells in found]
    height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
    index = torch.zeros(len(found), height, width, dtype=torch.long, device=inputs.device)
    mask = torch.zeros_like(index, dtype=torch.bool)
    for row, cells in enumerate(found):
        if cells is not None:
            index[row, : cells.shape[0], : cells.shape[1]] = cells
            mask[row, : cells.shape[0], : cells.shape[1]] = True
    return Cells(index, mask, sizes)


def _cells_of(inputs: MultimodalInputs, row: int, image: int, view: str) -> Int[Tensor, "height width"]:
    tiles = inputs.token_tiles[row][image] if inputs.token_tiles else ()
    if view == "grid" or not tiles:
        return inputs.grid_tokens(row, image)
    span = inputs.spans[row].images[image]
    places = torch.arange(span.start, span.stop, device=inputs.device)[inputs.image_mask[row, span]]
    first = places[torch.tensor(tiles, device=places.device) == 0]
    side = round(len(first) ** 0.5)
    return first.view(side, side)
