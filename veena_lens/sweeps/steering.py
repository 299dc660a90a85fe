"""Steering over layers and strengths: the metric when alpha * vector is added to each layer's residual."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack

import torch

from veena_lens.images.layout import reached_from
from veena_lens.inputs import MultimodalInputs
from veena_lens.interventions.numbers import floats, number
from veena_lens.long_runs import Store, counting
from veena_lens.positions import listed, parse, position_mask
from veena_lens.scores import ReferenceRuns, Scores
from veena_lens.sweeps.alignment import positions_of_row
from veena_lens.sweeps.engine import base_run, require_engine, require_inputs, run_rows
from veena_lens.sweeps.measuring import base_metrics, metrics_of, sites_of
from veena_lens.sweeps.plan import SweepOptions, plan_of, require_options, rows_within, whole_plan
from veena_lens.sweeps.rows import Row

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM


def steer_sweep(
    model: HookedVLM,
    inputs: MultimodalInputs,
    vectors: Any,
    metric: Any,
    alphas: Sequence[Any] = (1.0,),
    positions: Any = "last",
    engine: str = "suffix",
    *,
    layers: Any = None,
    **options: Unpack[SweepOptions],
) -> Any:
    """Measure every row of inputs under resid_post += alpha * vector, for each layer and alpha.

    inputs: prompts [row]. vectors: [layer d_model], one per layer, or [d_model] for all. metric: see
    `veena_lens.sweeps.metrics`; a dictionary of metrics reads the same runs and gives one result each. alphas:
    strengths, factors of the vectors. positions: where the vectors are added, numbers counted in each row without its
    pads. engine: "suffix" recomputes what an edit can reach, "naive" whole forwards. layers: default all. options: see
    `SweepOptions`.
    Returns Scores with axes (pair, layer, alpha), pair being the row, left out for one row; `corrupted` and `clean`
    both hold the unsteered metric, so `scores` is NaN and `values - corrupted` is the change. With plan_only the Plan.
    Raises: ValueError for vectors or layers that do not fit, or as `patch_sweep`.
    """
    cfg = model.cfg
    require_options("steer_sweep", options, SweepOptions)
    plan_only, progress, out = options.get("plan_only", False), options.get("progress", True), options.get("out")
    require_engine(model, engine)
    require_inputs(inputs, "inputs")
    parse(positions)
    vectors = floats(vectors, "steer_sweep: vectors")
    alphas = [number(alpha, "steer_sweep", "an entry of alphas") for alpha in alphas]
    given = listed(layers, cfg.n_layers, "steer_sweep: layers")
    chosen = [i + cfg.n_layers if i < 0 else i for i in given]
    if not chosen or not all(0 <= i < cfg.n_layers for i in chosen) or not len(alphas):
        raise ValueError(
            f"steer_sweep: layers {layers} and alphas {list(alphas)} must name existing layers and strengths."
        )
    if vectors.shape not in ((cfg.d_model,), (cfg.n_layers, cfg.d_model)):
        raise ValueError(
            f"vectors must be [{cfg.d_model}] or [{cfg.n_layers} {cfg.d_model}], not {list(vectors.shape)}."
        )
    if not bool(torch.isfinite(vectors).all()):
        raise ValueError(f"steer_sweep: vectors and alphas {list(alphas)} must be finite.")
    per_layer = vectors.expand(cfg.n_layers, -1)
    metrics = {} if plan_only and metric is None else metrics_of(model, metric)
    sites = sites_of(model, metrics)
    swept: list[tuple[MultimodalInputs, list[Row]]] = []
    for i in range(len(inputs)):
        row = inputs[i].without_padding()
        places = position_mask(row, positions_of_row(inputs, positions, i))[0].nonzero().flatten()
        if not len(places):
            raise ValueError(f"positions={positions!r} select nothing in row {i}.")
        first = int(reached_from(cfg, row)[places.cpu()].min())
        rows = [
            Row(f"blocks.{layer}.hook_resid_post", places, alpha * per_layer[layer], add=True, first=first)
            for layer in chosen
            for alpha in alphas
        ]
        swept.append((row, rows))
    plan = whole_plan([plan_of(cfg, rows, row) for row, rows in swept])
    if plan_only:
        return plan
    home = model.embed.weight.device
    max_rows = rows_within(plan, options.get("max_rows", 512), options.get("max_bytes"), home)
    store = Store(out, (model, inputs, vectors, metric, list(alphas), positions, chosen, max_rows, engine))
    values, plain = [], []
    with counting(len(inputs) * len(chosen) * len(alphas), "steered runs", progress) as advance:
        call: dict[str, Any] = {"engine": engine, "max_rows": max_rows, "advance": advance}
        for i, (row, rows) in enumerate(swept):
            base = base_run(model, row, sites)
            plain.append(base_metrics(model, metrics, base, i))
            values.append(run_rows(model, base, rows, metrics, **call, store=store.under(f"row{i}")))
    shape = (len(inputs), len(chosen), len(alphas))
    axes: tuple[str, ...] = ("pair", "layer", "alpha")
    labels = {"pair": list(range(len(inputs))), "layer": chosen, "alpha": [float(a) for a in alphas]}
    if len(inputs) == 1:
        shape, axes = shape[1:], axes[1:]
        labels.pop("pair")
    results = {}
    for name in metrics:
        found = torch.stack([x[name] for x in values]).reshape(shape)
        before = torch.stack([x[name] for x in plain])
        results[name] = Scores(
            found,
            axes,
            labels,
            name="metric",
            meta={"positions": str(positions)},
            reference=ReferenceRuns(before, before, "denoising"),
        )
    return results if isinstance(metric, Mapping) else results[""]
