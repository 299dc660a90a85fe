"""Activation patching over layers, heads, neurons and positions (method: Zhang & Nanda 2023, arXiv 2309.16042).

Denoising puts clean activations into the corrupted run and shows what suffices; noising the other way round
shows what is necessary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veena_lens.hook_table import hooks_of, layer_of, require_hook, row_of
from veena_lens.inputs import MultimodalInputs
from veena_lens.positions import parse, position_mask
from veena_lens.sweeps.plan import Plan, plan_of
from veena_lens.sweeps.result import SweepResult
from veena_lens.sweeps.rows import Row, base_run
from veena_lens.sweeps.running import Store, bar, base_metric, metric_site_of, require_engine, run_rows

KINDS = {
    "heads": ("attn.hook_z", "head"),
    "resid": ("hook_resid_pre", None),
    "attn_out": ("hook_attn_out", None),
    "mlp_out": ("hook_mlp_out", None),
    "neurons": ("mlp.hook_post", "neuron"),
}


class _Layout:
    """Which sites, units and positions a sweep visits, in the order of its axes."""

    def __init__(self, model: Any, sites: Any, layers: Sequence[int] | None, units: Sequence[int] | None) -> None:
        cfg = model.cfg
        self.unit: str | None = None
        self.units: list[int | None] = [None]
        if isinstance(sites, str) and sites in KINDS:
            part, self.unit = KINDS[sites]
            chosen = range(cfg.n_layers) if layers is None else [_in_range(i, cfg.n_layers, "layer") for i in layers]
            self.sites = [f"blocks.{i}.{part}" for i in chosen]
            self.named = False
            self.layers = list(chosen)
            if self.unit is not None:
                n = cfg.n_heads if self.unit == "head" else cfg.d_mlp
                self.units = [_in_range(u, n, self.unit) for u in (range(n) if units is None else units)]
        else:
            if isinstance(sites, str) and not sites.startswith(("blocks.", "hook_", "vision.", "connector.")):
                raise ValueError(f"sites={sites!r}: give one of {', '.join(KINDS)}, or a list of hook names.")
            names = [sites] if isinstance(sites, str) else list(sites)
            known = hooks_of(cfg)
            self.sites = [_decoder_site(require_hook(n, known)) for n in names]
            self.names, self.named = names, True
        if not self.sites or not self.units:
            raise ValueError("patch_sweep: no site to patch; layers, units and sites must not be empty.")


def _in_range(i: int, n: int, what: str) -> int:
    resolved = i + n if i < 0 else i
    if not 0 <= resolved < n:
        raise ValueError(f"patch_sweep: {what} {i} does not exist; there are {n}.")
    return resolved


def _decoder_site(name: str) -> str:
    """A hook inside the decoder's blocks; the merged embedding is what enters block 0."""
    if name == "hook_embed":
        return "blocks.0.hook_resid_pre"
    if layer_of(name) is None or name.startswith("vision."):
        raise ValueError(
            f"patch_sweep patches hooks of the decoder's blocks and hook_embed, not {name!r}; use Patch and "
            "model.intervene for pictures."
        )
    return name


def patch_sweep(
    model: Any,
    clean: MultimodalInputs,
    corrupted: MultimodalInputs,
    sites: Any = "heads",
    positions: Any = "last",
    metric: Any = None,
    direction: str = "denoising",
    engine: str = "suffix",
    *,
    layers: Sequence[int] | None = None,
    units: Sequence[int] | None = None,
    max_rows: int = 512,
    progress: bool = True,
    out: str | Path | None = None,
    plan_only: bool = False,
) -> Any:
    """The metric under each patch of one run's activation into the other, over pairs of rows.

    sites: "heads" (attn.hook_z of one head), "resid" (hook_resid_pre), "attn_out", "mlp_out", "neurons"
    (mlp.hook_post of one neuron), or hook names of the decoder. positions: "each" patches one position at a
    time; any other selection ("last", "query", an int, a slice) is patched together. layers, units: which layers
    and heads or neurons (default: all). metric: see veena_lens.sweeps.metrics. out: a folder where results are
    kept as they come; the same sweep resumes there. plan_only returns the Plan and runs nothing but the base.
    Returns a SweepResult with axes in the order ([site,] pair, layer, head or neuron, pos).
    Raises: ValueError for batches of unequal size, positions that do not correspond, or an unknown site.
    """
    if metric is None and not plan_only:
        raise ValueError("patch_sweep needs metric=, for example veena_lens.sweeps.metrics.logit_diff(good, bad).")
    if direction not in ("denoising", "noising"):
        raise ValueError(f"direction={direction!r} must be 'denoising' or 'noising'.")
    if len(clean) != len(corrupted):
        raise ValueError(f"{len(clean)} clean rows and {len(corrupted)} corrupted ones; pairs need equal numbers.")
    if max_rows < 1:
        raise ValueError(f"max_rows={max_rows} must be at least 1.")
    require_engine(model, engine)
    if not _is_each(positions):
        parse(positions)
    layout = _Layout(model, sites, layers, units)
    site = None if metric is None else metric_site_of(model, metric)
    pairs = [_pair(model, clean[i], corrupted[i], direction, layout, positions) for i in range(len(clean))]
    if len({p.n_places for p in pairs}) > 1 and positions == "each":
        raise ValueError("positions='each' over several pairs needs prompts of one length; sweep them one by one.")
    if plan_only:
        return _sum([plan_of(p.rows, p.inputs.shape[1], model.cfg.n_layers) for p in pairs])
    store = (
        None
        if out is None
        else Store(
            Path(out),
            _experiment(model, clean, corrupted, sites, positions, metric, direction, layers, units, max_rows, engine),
        )
    )
    show = bar(sum(len(p.rows) for p in pairs), progress, "patches")
    values, of_clean, of_corrupted = [], [], []
    for i, pair in enumerate(pairs):
        base = base_run(model, pair.inputs, site)
        other = base_metric(model, metric, base_run(model, pair.source, site))
        here = base_metric(model, metric, base)
        of_clean.append(other if direction == "denoising" else here)
        of_corrupted.append(here if direction == "denoising" else other)
        part = None if store is None else store.under(f"pair{i}")
        values.append(
            run_rows(model, base, pair.rows, metric, engine=engine, max_rows=max_rows, progress=show, store=part)
        )
    if show is not None:
        show.close()
    return _result(
        layout, pairs, torch.stack(values), torch.stack(of_clean), torch.stack(of_corrupted), positions, direction
    )


class _Pair:
    """One pair's base inputs, source inputs and rows."""

    def __init__(self, inputs: MultimodalInputs, source: MultimodalInputs, rows: list[Row], n_places: int) -> None:
        self.inputs, self.source, self.rows, self.n_places = inputs, source, rows, n_places


def _pair(
    model: Any, clean: MultimodalInputs, corrupted: MultimodalInputs, direction: str, layout: _Layout, positions: Any
) -> _Pair:
    base, source = (corrupted, clean) if direction == "denoising" else (clean, corrupted)
    base, source = base.trimmed(), source.trimmed()
    here = _places(base, positions)
    there = _places(source, positions)
    if len(here) != len(there):
        raise ValueError(
            f"positions={positions!r} are {len(here)} in the run that is patched and {len(there)} in the source: "
            "they must correspond one to one."
        )
    with torch.no_grad():
        _, cache = model.run_with_cache(source, names_filter=sorted(set(layout.sites)))
    groups = [[i] for i in range(len(here))] if _is_each(positions) else [list(range(len(here)))]
    rows = []
    for name in layout.sites:
        axes = row_of(name).axis_names[1:]
        value = cache[name][0]
        if "key_pos" in axes and base.shape[1] != source.shape[1]:
            raise ValueError(f"{name} has keys at other positions in the source; the two prompts must have one length.")
        value = value.movedim(axes.index("pos") if "pos" in axes else axes.index("query_pos"), 0)
        for unit in layout.units:
            rows += [Row(name, here[g], value[there[g].to(value.device)], unit) for g in groups]
    return _Pair(base, source, rows, len(groups))


def _is_each(positions: Any) -> bool:
    return isinstance(positions, str) and positions == "each"


def _places(inputs: MultimodalInputs, positions: Any) -> Tensor:
    mask = position_mask(inputs, "all" if _is_each(positions) else positions)[0]
    places = mask.nonzero().flatten()
    if not len(places):
        raise ValueError(f"positions={positions!r} select nothing in {inputs!r}.")
    return places


def _result(
    layout: _Layout,
    pairs: list[_Pair],
    values: Tensor,
    clean: Tensor,
    corrupted: Tensor,
    positions: Any,
    direction: str,
) -> SweepResult:
    n_pairs, n_places = len(pairs), pairs[0].n_places
    shaped = values.reshape(n_pairs, len(layout.sites), len(layout.units), n_places)
    axes: list[str] = ["pair", "layer", layout.unit or "unit", "pos"]
    labels: dict[str, list[Any]] = {
        "pair": list(range(n_pairs)),
        "layer": [] if layout.named else layout.layers,
        layout.unit or "unit": layout.units,
        "pos": list(range(n_places)),
    }
    drop = []
    if n_pairs == 1:
        drop.append("pair")
    if layout.unit is None:
        drop.append("unit")
    if not _is_each(positions):
        drop.append("pos")
    if layout.named:
        shaped = shaped.transpose(0, 1)
        axes = ["site", "pair", "unit", "pos"]
        labels["site"] = list(layout.names)
    index = tuple(0 if a in drop else slice(None) for a in axes)
    kept = tuple(a for a in axes if a not in drop)
    return SweepResult(
        shaped[index],
        kept,
        {a: labels[a] for a in kept},
        clean,
        corrupted,
        direction,
        {"positions": str(positions)},
    )


def _sum(plans: list[Plan]) -> Plan:
    return Plan(
        sum(p.n_rows for p in plans),
        max(p.n_positions for p in plans),
        plans[0].n_layers,
        sum(p.token_layers for p in plans),
        sum(p.n_whole for p in plans),
    )


def _experiment(model: Any, clean: MultimodalInputs, corrupted: MultimodalInputs, *settings: Any) -> dict[str, Any]:
    """What makes a sweep the same sweep: weights, inputs and settings."""
    weight = model.embed.weight.detach().double().sum().item()
    pixels = [None if i.pixel_values is None else i.pixel_values.double().sum().item() for i in (clean, corrupted)]
    return {
        "model": [model.cfg.model_name, weight, str(model.cfg.dtype)],
        "tokens": [clean.tokens.tolist(), corrupted.tokens.tolist()],
        "pixels": pixels,
        "settings": [repr(s) for s in settings],
    }
