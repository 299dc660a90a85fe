"""Activation patching over layers, heads, neurons and positions (method: Zhang & Nanda 2023, arXiv 2309.16042).

Denoising puts clean activations into the corrupted run and shows what suffices; noising the other way round
shows what is necessary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veena_lens.hook_table import hooks_of, require_hook, row_of
from veena_lens.inputs import MultimodalInputs
from veena_lens.interventions.base import require_unit
from veena_lens.positions import parse, position_mask
from veena_lens.sweeps.pictures import PicturePlaces, is_picture_site, picture_places, picture_rows
from veena_lens.sweeps.plan import announce, plan_of, rows_within, whole_plan
from veena_lens.sweeps.result import SweepResult
from veena_lens.sweeps.rows import AnyRow, BaseRun, Row, base_run
from veena_lens.sweeps.running import (
    Store,
    bar,
    base_metrics,
    experiment_of,
    metrics_of,
    require_engine,
    run_rows,
    sites_of,
)

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
            if isinstance(sites, str) and not sites.startswith(
                ("blocks.", "hook_", "vision.", "connector.", "deepstack.")
            ):
                raise ValueError(f"sites={sites!r}: give one of {', '.join(KINDS)}, or a list of hook names.")
            names = [sites] if isinstance(sites, str) else list(sites)
            known = hooks_of(cfg)
            self.sites = [_site_before_the_head(require_hook(n, known)) for n in names]
            self.names, self.named = names, True
        if not self.sites or not self.units:
            raise ValueError("patch_sweep: no site to patch; layers, units and sites must not be empty.")
        self.on_pictures = is_picture_site(self.sites[0])
        if any(is_picture_site(name) != self.on_pictures for name in self.sites):
            raise ValueError(
                "patch_sweep: sites on pictures and in the text count other positions; sweep them one after another, "
                f"not {self.sites}."
            )


def _site_before_the_head(name: str) -> str:
    """A hook on pictures or inside the decoder's blocks; the merged embedding is what enters block 0."""
    if name == "hook_embed":
        return "blocks.0.hook_resid_pre"
    if name.startswith(("ln_final.", "unembed.")):
        raise ValueError(
            f"patch_sweep patches hooks of the decoder's blocks, hook_embed and hooks on pictures, not {name!r}."
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
    max_bytes: int | None = None,
    progress: bool = True,
    out: str | Path | None = None,
    plan_only: bool = False,
) -> Any:
    """The metric under each patch of one run's activation into the other, over pairs of rows.

    sites: "heads" (attn.hook_z of one head), "resid" (hook_resid_pre), "attn_out", "mlp_out", "neurons"
    (mlp.hook_post of one neuron), or hook names: of the decoder's blocks, hook_embed, or on pictures (tower,
    connector, hook_image_features). positions: "each" patches one position at a time; any other selection ("last",
    "query", an int, a slice, a Box) is patched together; at tower and connector, numbers count positions of every
    picture. layers, units: which layers and heads or neurons (default: all). metric: see veena_lens.sweeps.metrics;
    a dictionary of metrics reads the same runs. Rows travel together up to `max_rows`, or as many as `max_bytes` of
    activations hold. out: a folder where results are kept as they come; the same sweep resumes there. plan_only
    returns the Plan and runs nothing.
    Returns a SweepResult with axes in the order ([site,] pair, layer, head or neuron, pos), or for a dictionary of
    metrics one of each.
    Raises: ValueError for batches of unequal size, positions that do not correspond, an unknown site, a metric of
    another shape or that is not finite on an unpatched run, or a budget too small for one row.
    """
    metrics = {} if plan_only and metric is None else metrics_of(metric)
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
    sites_read = sites_of(model, metrics)
    pairs = [_Pair(model.cfg, clean[i], corrupted[i], direction, positions, layout) for i in range(len(clean))]
    if len({p.n_groups for p in pairs}) > 1:
        raise ValueError("positions='each' over several pairs needs prompts of one length; sweep them one by one.")
    for pair in pairs:
        pair.check(layout)
    plans = [plan_of(model.cfg, pair.empty_rows(layout), pair.base.shape[1]) for pair in pairs]
    plan = whole_plan(plans)
    if plan_only:
        return plan
    max_rows = rows_within(plan, max_rows, max_bytes)
    if progress:
        announce(plan)
    store = None
    if out is not None:
        settings = (sites, positions, metric, direction, layers, units, max_rows, engine)
        store = Store(Path(out), experiment_of(model, (clean, corrupted), *settings))
    show = bar(len(pairs) * pairs[0].n_groups * len(layout.sites) * len(layout.units), progress, "patches")
    values, of_base, of_source = [], [], []
    for i, pair in enumerate(pairs):
        base = base_run(model, pair.base, sites_read)
        rows, source = pair.rows(model, layout, sites_read)
        of_base.append(base_metrics(model, metrics, base))
        of_source.append(base_metrics(model, metrics, source))
        part = None if store is None else store.under(f"pair{i}")
        values.append(run_rows(model, base, rows, metrics, engine=engine, max_rows=max_rows, progress=show, store=part))
    if show is not None:
        show.close()
    of_clean, of_corrupted = (of_source, of_base) if direction == "denoising" else (of_base, of_source)
    results = {}
    for name in metrics:
        found, first, second = (torch.stack([x[name] for x in part]) for part in (values, of_clean, of_corrupted))
        results[name] = _result(layout, pairs, found, first, second, positions, direction)
    return results if isinstance(metric, Mapping) else results[""]


class _Pair:
    """One pair: the run that is patched (`base`), the source of the patches, and which positions correspond."""

    def __init__(
        self,
        cfg: Any,
        clean: MultimodalInputs,
        corrupted: MultimodalInputs,
        direction: str,
        positions: Any,
        layout: _Layout,
    ) -> None:
        base, source = (corrupted, clean) if direction == "denoising" else (clean, corrupted)
        self.base, self.source = base.trimmed(), source.trimmed()
        self.pictures: dict[str, PicturePlaces] = {}
        if layout.on_pictures:
            each = _is_each(positions)
            self.pictures = {n: picture_places(cfg, self.base, n, positions, each) for n in layout.sites}
            theirs = {n: picture_places(cfg, self.source, n, positions, each) for n in layout.sites}
            counts = {len(p.places) for p in (*self.pictures.values(), *theirs.values())}
            if len(counts) > 1 or not _same_pictures(self.base, self.source):
                raise ValueError(
                    f"positions={positions!r}: the pictures of both runs must have one number, size and grid, and all "
                    "sites the same positions, to be patched into each other."
                )
            self.here = self.there = next(iter(self.pictures.values())).places
        else:
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
        for name in () if layout.on_pictures else layout.sites:
            if "key_pos" in row_of(name).axis_names and self.base.shape[1] != self.source.shape[1]:
                raise ValueError(
                    f"{name} has keys at other positions in the source; both prompts must have one length."
                )

    def empty_rows(self, layout: _Layout) -> list[AnyRow]:
        """The rows without values, for a plan."""
        nothing = torch.empty(0)
        if layout.on_pictures:
            named = self.pictures.items()
            return [row for n, here in named for row in picture_rows(n, None, here, layout.units, self.groups)]
        return [Row(n, self.here[g], nothing, u) for n in layout.sites for u in layout.units for g in self.groups]

    @torch.no_grad()
    def rows(self, model: Any, layout: _Layout, sites_read: Sequence[str]) -> tuple[list[AnyRow], BaseRun]:
        """The rows with the source's values, and what the metrics need of the source's own run."""
        logits, cache = model.run_with_cache(self.source, names_filter=sorted({*layout.sites, *sites_read}))
        seen = {site: cache[site][0] for site in sites_read}
        source = BaseRun(self.source, [], [], [], logits[0, -1], seen)
        rows: list[AnyRow] = []
        if layout.on_pictures:
            for name, here in self.pictures.items():
                rows += picture_rows(name, cache[name], here, layout.units, self.groups)
            return rows, source
        for name in layout.sites:
            axes = row_of(name).axis_names[1:]
            value = cache[name][0].movedim(axes.index("pos") if "pos" in axes else axes.index("query_pos"), 0)
            for unit in layout.units:
                rows += [Row(name, self.here[g], value[self.there[g].to(value.device)], unit) for g in self.groups]
        return rows, source


def _same_pictures(a: MultimodalInputs, b: MultimodalInputs) -> bool:
    """True where the pictures of two rows have one number and the same shapes."""
    if a.pixel_values is None or b.pixel_values is None or a.grids != b.grids:
        return False
    grids = a.picture_grids is None or b.picture_grids is None or torch.equal(a.picture_grids, b.picture_grids)
    return a.pixel_values.shape == b.pixel_values.shape and grids


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
