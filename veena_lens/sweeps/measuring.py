"""Running what metrics need, and no more: the metrics of a sweep's rows, and `Measure` for the tools of circuits.

Sweeps run a row alone; tools of circuits run many rows together, so the metric of a batch is read at each row's own
last real position, and words and numbers of positions are resolved in the row without its pads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from veena_lens.hook_table import layer_of
from veena_lens.inputs import MultimodalInputs
from veena_lens.model.forward import ResidualState as Entering
from veena_lens.model.forward import at_positions, forward, last_positions
from veena_lens.model.span import PassSpan
from veena_lens.positions import parse
from veena_lens.scores import ReferenceRuns
from veena_lens.sweeps.metrics import read_metric, require_finite, require_form, site_of, values_of
from veena_lens.sweeps.rows import BaseRun

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM

DIRECTIONS = ("denoising", "noising")


def parts(n: int, size: int) -> Iterator[list[int]]:
    """Return indices 0 .. n - 1 in runs of at most `size`."""
    return (list(range(start, min(start + size, n))) for start in range(0, n, size))


def require_rows(who: str, max_rows: int) -> None:
    """Raise ValueError for a batch size below 1."""
    if max_rows < 1:
        raise ValueError(f"{who}: max_rows={max_rows} must be at least 1.")


def require_pairs(who: str, clean: MultimodalInputs, corrupted: MultimodalInputs, direction: str) -> None:
    """Raise ValueError for an unknown direction, no rows, or batches of unequal size."""
    if direction not in DIRECTIONS:
        raise ValueError(f"{who}: direction={direction!r} must be 'denoising' or 'noising'.")
    if len(clean) != len(corrupted):
        raise ValueError(f"{who}: {len(clean)} clean rows and {len(corrupted)} corrupted ones; pairs need as many.")


def padded(places: Sequence[Int[Tensor, " _"]]) -> tuple[Int[Tensor, "batch n"], Bool[Tensor, "batch n"]]:
    """Return (index, exists): the rows' places side by side, padded at the end with place 0."""
    index = torch.nn.utils.rnn.pad_sequence(list(places), batch_first=True)
    lengths = torch.tensor([len(p) for p in places], device=index.device)
    return index, torch.arange(index.shape[1], device=index.device) < lengths[:, None]


@contextmanager
def entering_layers(model: HookedVLM, inputs: MultimodalInputs, layers: Iterable[int]) -> Iterator[dict[int, Entering]]:
    """Keep what enters `layers` in the run inside the block, readable after it."""
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
    """A metric, or one per pair, for rows that run in batches; made by `measure_of`."""

    who: str
    model: HookedVLM
    metrics: tuple[Any, ...]
    sites: tuple[str | None, ...]

    @property
    def stop(self) -> int | None:
        """Return the layer where a forward may stop: all metrics read activations before it. None for logits."""
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
        """Return logits of each row's last real position where a metric reads them; run no further layer than
        needed."""
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
            out = values_of(self.metrics[0], logits)
        else:
            found = []
            for row, pair in enumerate(pairs):
                which = pair if len(self.metrics) > 1 else 0
                mine = {site: x[row : row + 1] for site, x in seen.items()}
                last = None if logits is None else logits[row : row + 1]
                found.append(read_metric(self.metrics[which], self.sites[which], inputs, row, last, mine))
            out = torch.cat([f.to(found[0]) for f in found])
        if plain:
            require_finite(out, pairs)
        return out

    def of_logits(self, logits: Float[Tensor, "batch d_vocab"], pair: int) -> Float[Tensor, " batch"]:
        """Return the metric of logits that were made otherwise, all of one pair."""
        return values_of(self.metrics[pair if len(self.metrics) > 1 else 0], logits)


def measure_of(who: str, model: HookedVLM, metric: Any, n_pairs: int) -> Measure:
    """Return the metric of a tool; `metric` is one for all rows, or a list with one per pair.

    Raises: ValueError for no metric, a list of another length, a metric of another form (`metrics.require_form`), or a
    site outside the decoder's blocks."""
    metrics = tuple(metric) if isinstance(metric, (list, tuple)) else (metric,)
    if len(metrics) not in (1, n_pairs) or not all(callable(m) for m in metrics):
        raise ValueError(
            f"{who} needs metric=, for example veena_lens.sweeps.metrics.logit_diff(good, bad), or a list with one for "
            f"each of the {n_pairs} rows; found {metric!r}."
        )
    for m in metrics:
        parse(getattr(m, "positions", "last"))
        require_form(model, m)
    return Measure(who, model, metrics, tuple(site_of(model, m) for m in metrics))


# --- metrics of a sweep ---------------------------------------------------------------------------------------


def metrics_of(model: HookedVLM, metric: Any) -> dict[str, Any]:
    """Return metrics by name; a single one has the name "".

    Raises: ValueError for what is not a function, none at all, or a metric of another form (`metrics.require_form`)."""
    metrics = dict(metric) if isinstance(metric, Mapping) else {"": metric}
    if not metrics or not all(callable(m) for m in metrics.values()):
        raise ValueError(
            "metric= must be a function of logits [rows d_vocab], for example "
            f"veena_lens.sweeps.metrics.logit_diff(good, bad), or a dictionary of them, not {metric!r}."
        )
    for name, one in metrics.items():
        require_form(model, one, name)
    return metrics


def sites_of(model: HookedVLM, metrics: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the hooks that metrics read apart from logits.

    Raises: ValueError for a site outside the decoder's blocks."""
    found = [site_of(model, metric) for metric in metrics.values()]
    return tuple(dict.fromkeys(site for site in found if site is not None))


def read_logits(metrics: Mapping[str, Any]) -> bool:
    """Return True where some metric reads logits."""
    return any(getattr(metric, "site", None) is None for metric in metrics.values())


def apply_metrics(
    model: HookedVLM, metrics: Mapping[str, Any], base: BaseRun, logits: Tensor | None, seen: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return each metric of each row, [rows]. Raises: ValueError for other than one number per row."""
    return {
        name: read_metric(metric, site_of(model, metric), base.inputs, 0, logits, seen, name)
        for name, metric in metrics.items()
    }


def base_metrics(model: HookedVLM, metrics: Mapping[str, Any], base: BaseRun, pair: int) -> dict[str, Tensor]:
    """Return each metric of an unpatched run, a scalar. Raises: ValueError for one that is not finite there."""
    found = apply_metrics(model, metrics, base, base.logits[None], {site: x[None] for site, x in base.seen.items()})
    for name, value in found.items():
        require_finite(value, [pair], name)
    return {name: value[0] for name, value in found.items()}


# --- effects and ranks ----------------------------------------------------------------------------------------


def patched_and_source(direction: str, clean: Any, corrupted: Any) -> tuple[Any, Any]:
    """Return (the run that is patched, the source of the patches): denoising patches the corrupted run."""
    return (corrupted, clean) if direction == "denoising" else (clean, corrupted)


def reference_runs(direction: str, of_base: Float[Tensor, " pair"], of_source: Float[Tensor, " pair"]) -> ReferenceRuns:
    """Return the metrics of the run that is patched and of the source as those of the clean and corrupted runs."""
    clean, corrupted = patched_and_source(direction, of_base, of_source)
    return ReferenceRuns(clean, corrupted, direction)


def effect(change: Float[Tensor, "pair ..."], runs: ReferenceRuns, relative: bool = True) -> Float[Tensor, "pair ..."]:
    """Return changes of the metric (edited - unedited) as effects towards the clean run: their sign turns when noising.

    relative: as shares of clean - corrupted (NaN where they do not differ), as `Scores.scores` are; else in the
    metric's unit."""
    moved = change if runs.direction == "denoising" else -change
    return runs.share(moved) if relative else moved


def wide(x: Shaped[Tensor, "*axes"]) -> Shaped[Tensor, "*axes"]:
    """Return float32 for half types, else the values unchanged: sums are accumulated so."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def ranks(x: Shaped[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Return ranks from 1, ties at their mean."""
    _, place, count = torch.unique(x, return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count.double() - 1) / 2)[place]


def rank_correlation(a: Shaped[Tensor, " n"], b: Shaped[Tensor, " n"]) -> float:
    """Return Spearman's rank correlation; NaN where either is constant or there are fewer than two."""
    x, y = (ranks(v.detach().cpu().double()) for v in (a, b))
    x, y = x - x.mean() if len(x) else x, y - y.mean() if len(y) else y
    norm = float(x.norm() * y.norm())
    return float(x @ y) / norm if norm > 0 else float("nan")


def side_by_side(
    maps: Sequence[Float[Tensor, "_ _"]],
) -> tuple[Float[Tensor, "pair height width"], Bool[Tensor, "pair height width"]]:
    """Return (maps, exists): grids of unequal size padded at the bottom and right with 0."""
    height, width = (max(m.shape[axis] for m in maps) for axis in (0, 1))
    values = maps[0].new_zeros(len(maps), height, width)
    exists = torch.zeros(values.shape, dtype=torch.bool, device=values.device)
    for i, m in enumerate(maps):
        values[i, : m.shape[0], : m.shape[1]] = m
        exists[i, : m.shape[0], : m.shape[1]] = True
    return values, exists
