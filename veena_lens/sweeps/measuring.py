"""What the circuit tools share: a metric over batches of rows, places of positions, effects, rank correlation.

Sweeps run a row alone; these tools run many rows together, so the metric of a batch is read at each row's own last
real position and words and numbers of positions are resolved in the row without its pads, as `patch_sweep` does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from veena_lens.hook_table import layer_of, require_hook
from veena_lens.inputs import MultimodalInputs
from veena_lens.model.forward import ResidualState as Entering
from veena_lens.model.forward import at_positions, forward, last_positions
from veena_lens.model.span import PassSpan
from veena_lens.positions import parse, position_mask

DIRECTIONS = ("denoising", "noising")


def parts(n: int, size: int) -> Iterator[list[int]]:
    """Indices 0 .. n - 1 in runs of at most `size`."""
    return (list(range(start, min(start + size, n))) for start in range(0, n, size))


def require_rows(who: str, max_rows: int) -> None:
    """Raises: ValueError for a batch size below 1."""
    if max_rows < 1:
        raise ValueError(f"{who}: max_rows={max_rows} must be at least 1.")


def require_pairs(who: str, clean: MultimodalInputs, corrupted: MultimodalInputs, direction: str) -> None:
    """Raises: ValueError for an unknown direction, no rows, or batches of unequal size."""
    if direction not in DIRECTIONS:
        raise ValueError(f"{who}: direction={direction!r} must be 'denoising' or 'noising'.")
    if len(clean) != len(corrupted):
        raise ValueError(f"{who}: {len(clean)} clean rows and {len(corrupted)} corrupted ones; pairs need as many.")


def bare(inputs: MultimodalInputs) -> MultimodalInputs:
    """The inputs without their pixels: enough to find positions, and to go on from a residual."""
    return replace(inputs, pixel_values=None)


def places_of(inputs: MultimodalInputs, row: int, positions: Any) -> Int[Tensor, " n"]:
    """The chosen positions of one row, in the padded sequence; numbers count in the row without its pads.

    Raises: ValueError where they select nothing."""
    alone = bare(inputs)[row].without_padding()
    chosen = position_mask(alone, positions)[0]
    if not bool(chosen.any()):
        raise ValueError(f"positions={positions!r} select nothing in row {row} of {inputs!r}.")
    return inputs.attention_mask[row].nonzero().flatten()[chosen]


def corresponding(
    who: str, here: MultimodalInputs, there: MultimodalInputs, positions: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """A row's chosen positions in both runs: the k-th of one is the k-th of the other.

    Raises: ValueError where their numbers differ."""
    places = [[places_of(inputs, i, positions) for i in range(len(inputs))] for inputs in (here, there)]
    for i, (a, b) in enumerate(zip(*places, strict=True)):
        if len(a) != len(b):
            raise ValueError(
                f"{who}: positions={positions!r} are {len(a)} in pair {i}'s run that is patched and {len(b)} in the "
                "source: they must correspond one to one."
            )
    return places[0], places[1]


def padded(places: Sequence[Int[Tensor, " _"]]) -> tuple[Int[Tensor, "batch n"], Bool[Tensor, "batch n"]]:
    """(index, exists): the rows' places side by side, padded at the end with place 0."""
    index = torch.nn.utils.rnn.pad_sequence(list(places), batch_first=True)
    lengths = torch.tensor([len(p) for p in places], device=index.device)
    return index, torch.arange(index.shape[1], device=index.device) < lengths[:, None]


@contextmanager
def entering_layers(model: Any, inputs: MultimodalInputs, layers: Iterable[int]) -> Iterator[dict[int, Entering]]:
    """What enters `layers` in the run inside the block, readable after it."""
    resid: dict[str, Tensor] = {}
    added: dict[str, Tensor] = {}
    names = {f"blocks.{layer}.hook_resid_pre": layer for layer in layers}
    inner = {f"deepstack.{i}.hook_out": i + 1 for i in range(model.cfg.n_deepstack)}

    def keep(tensor: Tensor, hook: Any) -> None:
        (resid if hook.name in names else added)[hook.name] = tensor.detach()

    found: dict[int, Entering] = {}
    with model.hooks([(name, keep) for name in (*names, *inner)]):
        yield found
    deepstack = {inner[name]: model.scatter_deepstack(x, inputs) for name, x in added.items()}
    found.update({layer: Entering(resid[name], deepstack, layer) for name, layer in names.items() if name in resid})


@dataclass(frozen=True, eq=False)
class Measure:
    """A metric, or one a pair, for rows that run in batches; made by `measure_of`."""

    who: str
    model: Any
    metrics: tuple[Any, ...]
    sites: tuple[str | None, ...]

    @property
    def stop(self) -> int | None:
        """The layer where a forward may stop: all metrics read activations before it. None for logits."""
        layers = [None if site is None else layer_of(site) for site in self.sites]
        return None if None in layers else max(layer for layer in layers if layer is not None) + 1

    def __call__(
        self,
        inputs: MultimodalInputs,
        pairs: Sequence[int],
        *,
        entering: Entering | None = None,
        plain: bool = False,
    ) -> Float[Tensor, " batch"]:
        """Run the rows, which belong to `pairs`, and measure each; the run goes on from `entering` where it is given.

        `plain` runs must give finite numbers.
        Raises: ValueError for a metric of another shape, or not finite."""
        seen: dict[str, Tensor] = {}

        def keep(tensor: Tensor, hook: Any) -> None:
            seen[hook.name] = tensor

        names = sorted({site for site in self.sites if site is not None})
        with self.model.hooks([(name, keep) for name in names]):
            logits = self._run(inputs, entering)
        return self._measured(inputs, pairs, logits, seen, plain)

    def _run(self, inputs: MultimodalInputs, entering: Entering | None) -> Tensor | None:
        """Logits of each row's last real position where a metric reads them; no further layer than needed."""
        model, stop = self.model, self.stop
        if entering is None:
            inputs = model.as_inputs(inputs)
        span = PassSpan.whole(inputs)
        if stop is not None:
            forward(model, span, entering=entering, stop=stop)
            return None
        ends = [p for name, p in model.hook_dict.items() if name.startswith(("ln_final.", "unembed."))]
        if entering is None and any(p._forward_hooks or p._backward_hooks for p in ends):
            # Listeners are given every position.
            return at_positions(forward(model, span), last_positions(inputs))[:, 0]
        return forward(model, span, entering=entering, positions=last_positions(inputs))[:, 0]

    def _measured(
        self,
        inputs: MultimodalInputs,
        pairs: Sequence[int],
        logits: Tensor | None,
        seen: dict[str, Tensor],
        plain: bool,
    ) -> Tensor:
        if len(self.metrics) == 1 and self.sites[0] is None:
            assert logits is not None
            out = self._one(self.metrics[0], logits)
        else:
            found = []
            for row, pair in enumerate(pairs):
                which = pair if len(self.metrics) > 1 else 0
                metric, site = self.metrics[which], self.sites[which]
                if site is None:
                    assert logits is not None
                    found.append(self._one(metric, logits[row : row + 1]))
                else:
                    places = places_of(inputs, row, getattr(metric, "positions", "last"))
                    found.append(self._one(metric, seen[site][row : row + 1][:, places.to(seen[site].device)]))
            out = torch.cat([f.to(found[0]) for f in found])
        if plain and not bool(torch.isfinite(out).all()):
            bad = {pair: float(v) for pair, v in zip(pairs, out.detach()) if not bool(torch.isfinite(v))}
            raise ValueError(f"{self.who}: the metric of unedited runs is not finite, by row: {bad}.")
        return out

    def of_logits(self, logits: Float[Tensor, "batch d_vocab"], pair: int) -> Float[Tensor, " batch"]:
        """The metric of logits that were made otherwise, all of one pair."""
        return self._one(self.metrics[pair if len(self.metrics) > 1 else 0], logits)

    def _one(self, metric: Any, value: Tensor) -> Tensor:
        out = metric(value)
        if not isinstance(out, Tensor) or out.shape != (len(value),):
            shape = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"{self.who}: the metric must give one number a row, [{len(value)}], not {shape}.")
        return out


def _site_of(who: str, model: Any, metric: Any) -> str | None:
    """The hook a metric reads, None for logits."""
    site = getattr(metric, "site", None)
    if site is None:
        return None
    full = require_hook(site, model.hook_dict)
    if not full.startswith("blocks."):
        raise ValueError(f"{who}: a metric reads logits or a hook of a decoder block, not {site!r}.")
    return full


def measure_of(who: str, model: Any, metric: Any, n_pairs: int) -> Measure:
    """The metric of a tool; `metric` is one for all rows, or a list of one a pair.

    Raises: ValueError for no metric, a list of another length, or a site outside the decoder's blocks."""
    metrics = tuple(metric) if isinstance(metric, (list, tuple)) else (metric,)
    if len(metrics) not in (1, n_pairs) or not all(callable(m) for m in metrics):
        raise ValueError(
            f"{who} needs metric=, for example veena_lens.sweeps.metrics.logit_diff(good, bad), or a list with one for "
            f"each of the {n_pairs} rows; found {metric!r}."
        )
    for m in metrics:
        parse(getattr(m, "positions", "last"))
    return Measure(who, model, metrics, tuple(_site_of(who, model, m) for m in metrics))


def effect(
    change: Float[Tensor, "pair ..."],
    clean: Float[Tensor, " pair"],
    corrupted: Float[Tensor, " pair"],
    direction: str,
    relative: bool,
) -> Float[Tensor, "pair ..."]:
    """A change of the metric (edited - unedited) as an effect towards the clean run: its sign turned when noising;
    `relative` divides by clean - corrupted (NaN where they do not differ), as `Scores.scores` are."""
    out = change if direction == "denoising" else -change
    if not relative:
        return out
    gap = torch.where(clean == corrupted, torch.nan, clean - corrupted)
    return out / gap.to(out).view(-1, *[1] * (out.ndim - 1))


def wide(x: Shaped[Tensor, "*axes"]) -> Shaped[Tensor, "*axes"]:
    """float32 for half types, else as it is: sums are accumulated so."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def ranks(x: Shaped[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Ranks from 1, ties at their mean."""
    _, place, count = torch.unique(x, return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count.double() - 1) / 2)[place]


def rank_correlation(a: Shaped[Tensor, " n"], b: Shaped[Tensor, " n"]) -> float:
    """Spearman's rank correlation; NaN where either is constant or there are fewer than two."""
    x, y = (ranks(v.detach().cpu().double()) for v in (a, b))
    x, y = x - x.mean() if len(x) else x, y - y.mean() if len(y) else y
    norm = float(x.norm() * y.norm())
    return float(x @ y) / norm if norm > 0 else float("nan")


def side_by_side(
    maps: Sequence[Float[Tensor, "_ _"]],
) -> tuple[Float[Tensor, "pair height width"], Bool[Tensor, "pair height width"]]:
    """(maps, exists): grids of unequal size padded at the bottom and right with 0."""
    height, width = (max(m.shape[axis] for m in maps) for axis in (0, 1))
    values = maps[0].new_zeros(len(maps), height, width)
    exists = torch.zeros(values.shape, dtype=torch.bool, device=values.device)
    for i, m in enumerate(maps):
        values[i, : m.shape[0], : m.shape[1]] = m
        exists[i, : m.shape[0], : m.shape[1]] = True
    return values, exists
