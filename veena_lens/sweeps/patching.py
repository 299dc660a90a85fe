"""Activation patching over layers, heads, neurons and positions (method: Zhang & Nanda 2023, arXiv 2309.16042).

Denoising puts clean activations into the corrupted run and shows what suffices; noising the other way round
shows what is necessary.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veena_lens.inputs import MultimodalInputs
from veena_lens.long_runs import Store, counting
from veena_lens.positions import parse
from veena_lens.scores import ReferenceRuns, Scores
from veena_lens.sweeps.alignment import RunPair, is_each
from veena_lens.sweeps.engine import base_run, require_engine, require_inputs, run_rows
from veena_lens.sweeps.measuring import base_metrics, metrics_of, sites_of
from veena_lens.sweeps.plan import announce, plan_of, rows_within, whole_plan
from veena_lens.sweeps.sites import SweepSites, patchable_sites, sweep_sites

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM


def patch_sweep(
    model: HookedVLM,
    clean: MultimodalInputs,
    corrupted: MultimodalInputs,
    sites: Any = "heads",
    positions: Any = "last",
    metric: Any = None,
    direction: str = "denoising",
    engine: str = "suffix",
    *,
    layers: Any = None,
    units: Any = None,
    max_rows: int = 512,
    max_bytes: int | str | None = None,
    progress: bool = True,
    out: str | Path | None = None,
    plan_only: bool = False,
) -> Any:
    """Measure every patch of one run's activations into the other, over pairs of rows.

    metric: a function of the last position's logits [rows d_vocab] that returns one number per row, [rows], such as
    `lambda logits: logits[:, good] - logits[:, bad]`. The logits have no axis of positions. It is tried on made-up
    logits before anything runs. `veena_lens.sweeps.metrics` has the usual ones, and says how one reads an activation
    instead; a dictionary of metrics reads the same runs.
    clean, corrupted: pairs of rows. sites: "heads" (attn.hook_z of one head, default), "resid" (hook_resid_pre),
    "attn_out", "mlp_out", "neurons" (mlp.hook_post of one neuron), or hook names: of the decoder's blocks, hook_embed,
    or on images (tower, connector, hook_image_features). positions: "each" patches one position at a time; any other
    selection ("last", default, "query", an int, a slice, a mask, a Box) is patched together; numbers count in each row
    without its pads, at tower and connector in every image. direction: "denoising" puts clean activations into the
    corrupted run (default), "noising" corrupted ones into the clean run. engine: "suffix" recomputes what a patch can
    reach (default), "naive" whole forwards. layers, units: which layers and heads or neurons, default all. max_rows:
    rows that travel together. max_bytes: or as many as this many bytes of activations hold ("auto": those that are
    free), default no bound. progress: show the plan and a bar. out: a folder where results are kept as they come; the
    same sweep resumes there. plan_only: return the Plan and run nothing.
    Returns Scores with axes in the order ([site,] pair, layer, head or neuron, pos), without "pair" for one pair and
    without "pos" for positions patched together; for a dictionary of metrics one of each.
    Raises: ValueError for batches of unequal size, positions that do not correspond, an unknown site, a metric of
    another shape or that is not finite on an unpatched run, or a budget too small for one row.
    """
    metrics = {} if plan_only and metric is None else metrics_of(model, metric)
    for name, inputs in (("clean", clean), ("corrupted", corrupted)):
        require_inputs(inputs, name)
    if direction not in ("denoising", "noising"):
        raise ValueError(f"direction={direction!r} must be 'denoising' or 'noising'.")
    if len(clean) != len(corrupted):
        raise ValueError(f"{len(clean)} clean rows and {len(corrupted)} corrupted ones; pairs need equal numbers.")
    if not is_each(positions):
        parse(positions)
    visited = patchable_sites(sweep_sites("patch_sweep", model.cfg, sites, layers, units))
    sites_read = sites_of(model, metrics)
    require_engine(model, engine)
    base, source = (corrupted, clean) if direction == "denoising" else (clean, corrupted)
    pairs = [RunPair(model.cfg, base, source, i, positions, visited) for i in range(len(base))]
    lengths = [pair.n_groups for pair in pairs]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"positions='each' over several pairs needs prompts of one length, not {lengths} positions; sweep them one "
            "by one."
        )
    plans = [plan_of(model.cfg, pair.empty_rows(visited), pair.base) for pair in pairs]
    plan = whole_plan(plans)
    if plan_only:
        return plan
    max_rows = rows_within(plan, max_rows, max_bytes, model.embed.weight.device)
    if progress:
        announce(plan)
    settings = (sites, positions, metric, direction, layers, units, max_rows, engine)
    store = Store(out, (model, clean, corrupted, *settings))
    values, of_base, of_source = [], [], []
    total = len(pairs) * pairs[0].n_groups * len(visited.sites) * len(visited.units)
    with counting(total, "patches", progress) as advance:
        call: dict[str, Any] = {"engine": engine, "max_rows": max_rows, "advance": advance}
        for i, pair in enumerate(pairs):
            base = base_run(model, pair.base, sites_read, visited.sites if visited.on_images else ())
            rows, source = pair.rows(model, visited, sites_read)
            of_base.append(base_metrics(model, metrics, base, i))
            of_source.append(base_metrics(model, metrics, source, i))
            values.append(run_rows(model, base, rows, metrics, **call, store=store.under(f"pair{i}")))
    of_clean, of_corrupted = (of_source, of_base) if direction == "denoising" else (of_base, of_source)
    results = {}
    for name in metrics:
        found, first, second = (torch.stack([x[name] for x in part]) for part in (values, of_clean, of_corrupted))
        results[name] = _result(model, visited, pairs, found, first, second, positions, direction)
    return results if isinstance(metric, Mapping) else results[""]


def _result(
    model: HookedVLM,
    visited: SweepSites,
    pairs: list[RunPair],
    values: Tensor,
    clean: Tensor,
    corrupted: Tensor,
    positions: Any,
    direction: str,
) -> Scores:
    n_pairs, n_places = len(pairs), pairs[0].n_groups
    shaped = values.reshape(n_pairs, len(visited.sites), len(visited.units), n_places)
    axes: list[str] = ["pair", "layer", visited.unit or "unit", "pos"]
    labels: dict[str, list[Any]] = {
        "pair": list(range(n_pairs)),
        "layer": visited.layers or [],
        visited.unit or "unit": visited.units,
        "pos": list(range(n_places)),
    }
    drop = []
    if n_pairs == 1:
        drop.append("pair")
    if visited.unit is None:
        drop.append("unit")
    if not is_each(positions):
        drop.append("pos")
    if visited.layers is None:
        shaped = shaped.transpose(0, 1)
        axes = ["site", "pair", visited.unit or "unit", "pos"]
        labels["site"] = list(visited.given)
    index = tuple(0 if a in drop else slice(None) for a in axes)
    kept = tuple(a for a in axes if a not in drop)
    return Scores(
        shaped[index],
        kept,
        {a: labels[a] for a in kept},
        name="metric",
        meta={"positions": str(positions), **_texts(model, visited, pairs, positions)},
        reference=ReferenceRuns(clean, corrupted, direction),
    )


def _texts(model: HookedVLM, visited: SweepSites, pairs: list[RunPair], positions: Any) -> dict[str, Any]:
    """Return the texts of the axis "pos" and the cells of its images, where every position is patched and all pairs
    say the same."""
    rows = {tuple(pair.base.tokens[0].tolist()) for pair in pairs}
    if not is_each(positions) or visited.on_images or len(rows) > 1:
        return {}
    found: dict[str, Any] = {}
    if model.tokenizer is not None:
        found["token_texts"] = [model.tokenizer.decode([token]) for token in rows.pop()]
    if len({pair.base.grids for pair in pairs}) == 1 and pairs[0].base.n_images[0]:
        found["image_grids"] = image_grids(pairs[0].base)
    return found


def image_grids(inputs: MultimodalInputs) -> list[dict[str, Any]]:
    """Return, per image of the first row, the "positions" [height width] of its cells and their "boxes" in pixels, for
    figures; images whose tokens make no whole grid are left out."""
    found = []
    for image, (height, width) in enumerate(inputs.grids[0]):
        places = inputs.grid_places[0][image] if inputs.grid_places else ()
        if not height or len(places) != height * width:
            continue
        boxes = None if inputs.patch_boxes is None else inputs.patch_boxes[0][image]
        kept = None if boxes is None else boxes[list(places)].double().cpu()
        is_known = kept is not None and bool(kept.isfinite().all())
        cells = inputs.grid_tokens(0, image).tolist()
        found.append({"positions": cells, "boxes": kept.tolist() if kept is not None and is_known else None})
    return found
