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

from veena_lens.hook_table import hooks_of, require_hook, row_of
from veena_lens.inputs import MultimodalInputs
from veena_lens.interventions.base import require_unit
from veena_lens.positions import parse, position_mask
from veena_lens.sweeps.plan import Plan, plan_of
from veena_lens.sweeps.result import SweepResult
from veena_lens.sweeps.rows import BaseRun, Row, base_run
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
            chosen = (
                range(cfg.n_layers)
                if layers is None
                else [require_unit(i, cfg.n_layers, "patch_sweep", "layer") for i in layers]
            )
            self.sites = [f"blocks.{i}.{part}" for i in chosen]
            self.named = False
            self.layers = list(chosen)
            if self.unit is not None:
                n = cfg.n_heads if self.unit == "head" else cfg.d_mlp
                self.units = [
                    require_unit(u, n, "patch_sweep", self.unit) for u in (range(n) if units is None else units)
                ]
        else:
            if isinstance(sites, str) and not sites.startswith(("blocks.", "hook_", "vision.", "connector.")):
                raise ValueError(f"sites={sites!r}: give one of {', '.join(KINDS)}, or a list of hook names.")
            names = [sites] if isinstance(sites, str) else list(sites)
            known = hooks_of(cfg)
            self.sites = [_decoder_site(require_hook(n, known)) for n in names]
            self.names, self.named = names, True
        if not self.sites or not self.units:
            raise ValueError("patch_sweep: no site to patch; layers, units and sites must not be empty.")


def _decoder_site(name: str) -> str:
    """A hook inside the decoder's blocks; the merged embedding is what enters block 0."""
    if name == "hook_embed":
        return "blocks.0.hook_resid_pre"
    if not name.startswith("blocks."):
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
    pairs = [_Pair(clean[i], corrupted[i], direction, positions) for i in range(len(clean))]
    if len({p.n_groups for p in pairs}) > 1:
        raise ValueError("positions='each' over several pairs needs prompts of one length; sweep them one by one.")
    for pair in pairs:
        pair.check(layout)
    if plan_only:
        return _sum([plan_of(pair.empty_rows(layout), pair.base.shape[1], model.cfg.n_layers) for pair in pairs])
    store = None
    if out is not None:
        settings = (sites, positions, metric, direction, layers, units, max_rows, engine)
        store = Store(Path(out), _experiment(model, clean, corrupted, *settings))
    show = bar(len(pairs) * pairs[0].n_groups * len(layout.sites) * len(layout.units), progress, "patches")
    values, of_clean, of_corrupted = [], [], []
    for i, pair in enumerate(pairs):
        base = base_run(model, pair.base, site)
        rows, source = pair.rows(model, layout, site)
        here, there = (base_metric(model, metric, run) for run in (base, source))
        of_clean.append(there if direction == "denoising" else here)
        of_corrupted.append(here if direction == "denoising" else there)
        part = None if store is None else store.under(f"pair{i}")
        values.append(run_rows(model, base, rows, metric, engine=engine, max_rows=max_rows, progress=show, store=part))
    if show is not None:
        show.close()
    reference = torch.stack(of_clean), torch.stack(of_corrupted)
    return _result(layout, pairs, torch.stack(values), *reference, positions, direction)


class _Pair:
    """One pair: the run that is patched (`base`), the source of the patches, and which positions correspond."""

    def __init__(self, clean: MultimodalInputs, corrupted: MultimodalInputs, direction: str, positions: Any) -> None:
        base, source = (corrupted, clean) if direction == "denoising" else (clean, corrupted)
        self.base, self.source = base.trimmed(), source.trimmed()
        self.here, self.there = _places(self.base, positions), _places(self.source, positions)
        if len(self.here) != len(self.there):
            raise ValueError(
                f"positions={positions!r} are {len(self.here)} in the run that is patched and {len(self.there)} in "
                "the source: they must correspond one to one."
            )
        together = list(range(len(self.here)))
        self.groups = [[i] for i in together] if _is_each(positions) else [together]

    @property
    def n_groups(self) -> int:
        return len(self.groups)

    def check(self, layout: _Layout) -> None:
        """Raises: ValueError where a site's keys do not correspond."""
        for name in layout.sites:
            if "key_pos" in row_of(name).axis_names and self.base.shape[1] != self.source.shape[1]:
                raise ValueError(
                    f"{name} has keys at other positions in the source; both prompts must have one length."
                )

    def empty_rows(self, layout: _Layout) -> list[Row]:
        """The rows without values, for a plan."""
        nothing = torch.empty(0)
        return [Row(n, self.here[g], nothing, u) for n in layout.sites for u in layout.units for g in self.groups]

    @torch.no_grad()
    def rows(self, model: Any, layout: _Layout, metric_site: str | None) -> tuple[list[Row], BaseRun]:
        """The rows with the source's values, and what the metric needs of the source's own run."""
        names = {*layout.sites, *([metric_site] if metric_site else [])}
        logits, cache = model.run_with_cache(self.source, names_filter=sorted(names))
        seen = None if metric_site is None else cache[metric_site][0]
        rows = []
        for name in layout.sites:
            axes = row_of(name).axis_names[1:]
            value = cache[name][0].movedim(axes.index("pos") if "pos" in axes else axes.index("query_pos"), 0)
            for unit in layout.units:
                rows += [Row(name, self.here[g], value[self.there[g].to(value.device)], unit) for g in self.groups]
        return rows, BaseRun(self.source, [], [], [], logits[0, -1], seen)


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
    n_pairs, n_places = len(pairs), pairs[0].n_groups
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
