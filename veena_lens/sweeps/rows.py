"""A row of a sweep: one edit of one activation, and the runs it is made from.

A row knows the layer where it leaves the base run and the first position it reaches; everything before either
is the base run's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veena_lens.hook_table import layer_of, row_of
from veena_lens.inputs import MultimodalInputs
from veena_lens.interventions.base import HEAD_AXES


@dataclass(frozen=True, eq=False)
class Row:
    """Edit of `site` at `positions` of the base run: the source's `value` put in place, or (`add`) added.

    value: [n ...] for the n positions, in the site's axes without batch; unit: one head or neuron, None for all.
    """

    site: str
    positions: Int[Tensor, " n"]
    value: Float[Tensor, ...]
    unit: int | None = None
    add: bool = False

    @property
    def layer(self) -> int:
        """The block where the row leaves the base run."""
        return layer_of(self.site) or 0

    @property
    def start(self) -> int:
        """The first position it reaches."""
        return int(self.positions.min())

    def edit(self, activation: Float[Tensor, ...], start: int) -> Float[Tensor, ...]:
        """The activation of this row (no batch axis), which begins at position `start`, edited out of place."""
        axes = row_of(self.site).axis_names[1:]
        axis = axes.index("pos") if "pos" in axes else axes.index("query_pos")
        moved = activation.movedim(axis, 0)
        value, places = self.value.to(activation), (self.positions - start).to(activation.device)
        new = moved[places] + value if self.add else value
        if self.unit is not None:
            # The unit's axis among the others once positions stand first.
            rest = [a for i, a in enumerate(axes) if i != axis]
            unit_axis = 1 + next(i for i, a in enumerate(rest) if a in (*HEAD_AXES, "d_mlp"))
            kept = moved[places].clone()
            kept.select(unit_axis, self.unit).copy_(new.select(unit_axis, self.unit))
            new = kept
        out = moved.clone()
        out[places] = new
        return out.movedim(0, axis)


@dataclass(frozen=True, eq=False)
class BaseRun:
    """One unpatched run of one row: residuals that enter each block, keys (after rotary) and values."""

    inputs: MultimodalInputs
    resid: list[Tensor]  # a layer: [pos d_model]
    keys: list[Tensor]  # a layer: [pos n_key_value_heads d_head]
    values: list[Tensor]
    logits: Float[Tensor, " d_vocab"]
    metric_site: Tensor | None = None  # the metric's activation [pos ...]
    deepstack: Mapping[int, Tensor] = field(default_factory=dict)  # a layer: what is added at its input [1 pos d_model]

    @property
    def length(self) -> int:
        return self.inputs.shape[1]


@torch.no_grad()
def base_run(model: Any, inputs: MultimodalInputs, metric_site: str | None = None) -> BaseRun:
    """Run once and keep what rows need; images are encoded here and nowhere else."""
    n = model.cfg.n_layers
    names = {f"blocks.{i}.{part}" for i in range(n) for part in ("hook_resid_pre", "attn.hook_rot_k", "attn.hook_v")}
    if metric_site is not None:
        names.add(metric_site)
    inner = [f"deepstack.{i}.hook_out" for i in range(model.cfg.n_deepstack) if inputs.pixel_values is not None]
    names |= set(inner)
    logits, cache = model.run_with_cache(inputs, names_filter=sorted(names))

    def layers(part: str) -> list[Tensor]:
        return [cache[f"blocks.{i}.{part}"][0] for i in range(n)]

    return BaseRun(
        inputs,
        layers("hook_resid_pre"),
        layers("attn.hook_rot_k"),
        layers("attn.hook_v"),
        logits[0, -1],
        None if metric_site is None else cache[metric_site][0],
        {i + 1: model.scatter_deepstack(cache[name], inputs) for i, name in enumerate(inner)},
    )
