"""Steering over layers and strengths: the metric when alpha * vector is added to each layer's residual."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from veena_lens.inputs import MultimodalInputs
from veena_lens.positions import parse, position_mask
from veena_lens.sweeps.result import SweepResult
from veena_lens.sweeps.rows import Row, base_run
from veena_lens.sweeps.running import bar, base_metric, metric_site_of, require_engine, run_rows


def steer_sweep(
    model: Any,
    inputs: MultimodalInputs,
    vectors: Float[Tensor, ...],
    metric: Any,
    alphas: Sequence[float | int] = (1.0,),
    positions: Any = "last",
    engine: str = "suffix",
    *,
    layers: Sequence[int] | None = None,
    max_rows: int = 512,
    progress: bool = True,
) -> SweepResult:
    """The metric of every row of inputs under resid_post += alpha * vector, for each layer and alpha.

    vectors: [layer d_model], one a layer, or [d_model] for all. Axes (pair, layer, alpha); `corrupted` and
    `clean` both hold the unsteered metric, so `scores` is NaN and `values - corrupted` is the change.
    Raises: ValueError for vectors or layers that do not fit.
    """
    cfg = model.cfg
    require_engine(model, engine)
    parse(positions)
    chosen = list(range(cfg.n_layers)) if layers is None else [i + cfg.n_layers if i < 0 else i for i in layers]
    if not chosen or not all(0 <= i < cfg.n_layers for i in chosen) or not len(alphas):
        raise ValueError(
            f"steer_sweep: layers {layers} and alphas {list(alphas)} must name existing layers and strengths."
        )
    if vectors.shape not in ((cfg.d_model,), (cfg.n_layers, cfg.d_model)):
        raise ValueError(
            f"vectors must be [{cfg.d_model}] or [{cfg.n_layers} {cfg.d_model}], not {list(vectors.shape)}."
        )
    per_layer = vectors.expand(cfg.n_layers, -1)
    site = metric_site_of(model, metric)
    show = bar(len(inputs) * len(chosen) * len(alphas), progress, "steered runs")
    values, plain = [], []
    for i in range(len(inputs)):
        row = inputs[i].trimmed()
        places = position_mask(row, positions)[0].nonzero().flatten()
        if not len(places):
            raise ValueError(f"positions={positions!r} select nothing in row {i}.")
        rows = [
            Row(f"blocks.{layer}.hook_resid_post", places, alpha * per_layer[layer], add=True)
            for layer in chosen
            for alpha in alphas
        ]
        base = base_run(model, row, site)
        plain.append(base_metric(model, metric, base))
        values.append(run_rows(model, base, rows, metric, engine=engine, max_rows=max_rows, progress=show))
    if show is not None:
        show.close()
    shaped = torch.stack(values).reshape(len(inputs), len(chosen), len(alphas))
    axes: tuple[str, ...] = ("pair", "layer", "alpha")
    labels = {"pair": list(range(len(inputs))), "layer": chosen, "alpha": [float(a) for a in alphas]}
    if len(inputs) == 1:
        shaped, axes = shaped[0], axes[1:]
        labels.pop("pair")
    before = torch.stack(plain)
    return SweepResult(shaped, axes, labels, before, before, "denoising", {"positions": str(positions)})
