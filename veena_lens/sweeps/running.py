"""Running the rows of a sweep through an engine and a metric, with progress and results kept as they come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from veena_lens.inputs import MultimodalInputs
from veena_lens.positions import position_mask
from veena_lens.sweeps.naive import run_naive
from veena_lens.sweeps.rows import AnyRow, BaseRun
from veena_lens.sweeps.store import Store
from veena_lens.sweeps.suffix import chunks, run_staircase

ENGINES = ("suffix", "naive")


def require_engine(model: Any, engine: str) -> None:
    """Raises: ValueError for an unknown engine, or a suffix sweep inside `intervene` or with hooks on the model."""
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r} must be 'suffix' or 'naive'.")
    if engine == "suffix" and any(p._forward_hooks for p in model.hook_dict.values()):
        raise ValueError(
            "The suffix engine runs rows through parts of the model, where hooks of whole runs have no meaning: leave "
            "the `with model.intervene(...)` block, call model.reset_hooks(), or use engine='naive'."
        )


def require_inputs(inputs: Any, name: str) -> None:
    """Raises: TypeError for what is no prepared inputs, ValueError for a batch without rows."""
    if not isinstance(inputs, MultimodalInputs):
        raise TypeError(f"{name} must be prepared inputs (model.prepare, model.inputs_from_hf), not {inputs!r}.")
    if not len(inputs):
        raise ValueError(f"{name} holds no row; give at least one prompt.")


def metrics_of(metric: Any) -> dict[str, Any]:
    """Metrics by name; a single one has the name "". Raises: ValueError for what is no function, or none at all."""
    metrics = dict(metric) if isinstance(metric, Mapping) else {"": metric}
    if not metrics or not all(callable(m) for m in metrics.values()):
        raise ValueError(
            "metric= must be a function of logits [rows d_vocab], for example "
            f"veena_lens.sweeps.metrics.logit_diff(good, bad), or a dictionary of them, not {metric!r}."
        )
    return metrics


def sites_of(model: Any, metrics: Mapping[str, Any]) -> tuple[str, ...]:
    """The hooks that metrics read besides logits. Raises: ValueError for a site outside the decoder's blocks."""
    found = []
    for metric in metrics.values():
        site = getattr(metric, "site", None)
        if site is not None:
            found.append(_site(model, site))
    return tuple(dict.fromkeys(found))


def _site(model: Any, name: str) -> str:
    full = model.names_of(name)[0]
    if not full.startswith("blocks."):
        raise ValueError(f"A metric reads logits or a hook of a decoder block, not {name!r}.")
    return full


def read_logits(metrics: Mapping[str, Any]) -> bool:
    """True where some metric reads logits."""
    return any(getattr(metric, "site", None) is None for metric in metrics.values())


def apply_metrics(
    model: Any, metrics: Mapping[str, Any], base: BaseRun, logits: Tensor | None, seen: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Each metric of each row, [rows]. Raises: ValueError when one gives another shape."""
    values = {}
    for name, metric in metrics.items():
        if getattr(metric, "site", None) is None:
            assert logits is not None
            out, n = metric(logits), len(logits)
        else:
            activation = seen[_site(model, metric.site)]
            places = position_mask(base.inputs, getattr(metric, "positions", "last"))[0].nonzero().flatten()
            out, n = metric(activation[:, places.to(activation.device)]), len(activation)
        if not isinstance(out, Tensor) or out.shape != (n,):
            shape = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"The metric{_named(name)} must give one number a row, [{n}], not {shape}.")
        values[name] = out if out.is_floating_point() else out.double()
    return values


def _named(name: str) -> str:
    return f" {name!r}" if name else ""


def base_metrics(model: Any, metrics: Mapping[str, Any], base: BaseRun, pair: int) -> dict[str, Tensor]:
    """Each metric of an unpatched run, a scalar. Raises: ValueError for one that is not finite there."""
    found = apply_metrics(model, metrics, base, base.logits[None], {site: x[None] for site, x in base.seen.items()})
    for name, value in found.items():
        if not bool(torch.isfinite(value).all()):
            raise ValueError(
                f"The metric{_named(name)} is {value[0].item()} on an unpatched run of pair {pair}: nothing to compare."
            )
    return {name: value[0] for name, value in found.items()}


def run_rows(
    model: Any,
    base: BaseRun,
    rows: Sequence[AnyRow],
    metrics: Mapping[str, Any],
    *,
    engine: str,
    max_rows: int,
    progress: Any = None,
    store: Store | None = None,
) -> dict[str, Tensor]:
    """Each metric of every row, in order."""
    sites, with_logits = sites_of(model, metrics), read_logits(metrics)
    values: dict[str, Tensor] = {}
    for number, members in enumerate(chunks(rows, max_rows if engine == "suffix" else 1)):
        kept = store.read(number) if store is not None else None
        if kept is None:
            mine = [rows[i] for i in members]
            runner = run_staircase if engine == "suffix" else run_naive
            kept = apply_metrics(model, metrics, base, *runner(model, base, mine, sites, with_logits))
            if store is not None:
                store.write(number, kept)
        for name, value in kept.items():
            if name not in values:
                values[name] = value.new_empty(len(rows))
            values[name][torch.tensor(members, device=values[name].device)] = value.to(values[name])
        if progress is not None:
            progress.update(len(members))
    return values


def bar(total: int, show: bool, what: str) -> Any:
    """A progress bar, or None."""
    if not show:
        return None
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=what, unit="row", leave=False)
