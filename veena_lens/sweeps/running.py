"""Running the rows of a sweep through an engine and a metric, with progress and results kept as they come."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from veena_lens.positions import position_mask
from veena_lens.sweeps.naive import run_naive
from veena_lens.sweeps.rows import BaseRun, Row
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


def metric_site_of(model: Any, metric: Any) -> str | None:
    """The hook a metric reads, None for logits. Raises: ValueError for a site outside the decoder's blocks."""
    site = getattr(metric, "site", None)
    if site is None:
        return None
    full = model.names_of(site)[0]
    if not full.startswith("blocks."):
        raise ValueError(f"A metric reads logits or a hook of a decoder block, not {site!r}.")
    return full


def apply_metric(model: Any, metric: Any, base: BaseRun, logits: Tensor | None, seen: Tensor | None) -> Tensor:
    """The metric of each row, [rows]. Raises: ValueError when it gives another shape."""
    if seen is None:
        assert logits is not None
        out, n = metric(logits), len(logits)
    else:
        places = position_mask(base.inputs, getattr(metric, "positions", "last"))[0].nonzero().flatten()
        out, n = metric(seen[:, places.to(seen.device)]), len(seen)
    if not isinstance(out, Tensor) or out.shape != (n,):
        shape = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"The metric must give one number a row, [{n}], not {shape}.")
    return out


def base_metric(model: Any, metric: Any, base: BaseRun) -> Tensor:
    """The metric of an unpatched run, a scalar."""
    seen = None if base.metric_site is None else base.metric_site[None]
    return apply_metric(model, metric, base, base.logits[None], seen)[0]


def run_rows(
    model: Any,
    base: BaseRun,
    rows: Sequence[Row],
    metric: Any,
    *,
    engine: str,
    max_rows: int,
    progress: Any = None,
    store: Store | None = None,
) -> Tensor:
    """The metric of every row, in order."""
    site = metric_site_of(model, metric)
    values: Tensor | None = None
    for number, members in enumerate(chunks(rows, max_rows if engine == "suffix" else 1)):
        kept = store.read(number) if store is not None else None
        if kept is None:
            mine = [rows[i] for i in members]
            runner = run_staircase if engine == "suffix" else run_naive
            kept = apply_metric(model, metric, base, *runner(model, base, mine, site))
            if store is not None:
                store.write(number, kept)
        if values is None:
            values = kept.new_empty(len(rows))
        values[torch.tensor(members, device=values.device)] = kept.to(values)
        if progress is not None:
            progress.update(len(members))
    assert values is not None
    return values


class Store:
    """Results of a sweep's chunks in a folder: written under a temporary name, then renamed; read on resuming."""

    def __init__(self, folder: Path, experiment: dict[str, Any]) -> None:
        text = json.dumps(experiment, sort_keys=True, default=str)
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "experiment.json").write_text(text)

    def under(self, name: str) -> Store:
        """A part of the same store."""
        part = object.__new__(Store)
        part.folder = self.folder / name
        part.folder.mkdir(exist_ok=True)
        return part

    def read(self, number: int) -> Tensor | None:
        path = self.folder / f"{number:06d}.safetensors"
        return load_file(str(path))["values"] if path.is_file() else None

    def write(self, number: int, values: Tensor) -> None:
        path = self.folder / f"{number:06d}.safetensors"
        part = path.with_suffix(".part")
        save_file({"values": values.detach().cpu().contiguous()}, str(part))
        part.rename(path)


def bar(total: int, show: bool, what: str) -> Any:
    """A progress bar, or None."""
    if not show:
        return None
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=what, unit="row", leave=False)
