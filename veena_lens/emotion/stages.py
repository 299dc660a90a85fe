"""Adapt, aggregate, execute: three stages told from curves over layers, never from layer numbers.

Adapt: before injection restores anything and before the emotion can be read from the query. Aggregate: while it is
gathered there, until it can be read as well as it ever can and heads stop reading it from the picture. Execute: after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from veena_lens.circuits import linear_probes
from veena_lens.emotion.head_search import KeyHeads
from veena_lens.emotion.layer_search import KeyLayers
from veena_lens.emotion.methods import ROWS, prepared
from veena_lens.scores import Scores

SATURATED = 0.95


@dataclass(frozen=True, eq=False, kw_only=True)
class Stages:
    """`first`: the first layer of aggregating, `last` its last; adapting ends before, executing begins after.

    `decodable` (layer, statistic): accuracy of a linear probe for the emotion at the query, with interval and shuffled
    control. `reading` (layer): how much heads that are patched at the query restore together, the sum of their positive
    effects."""

    first: int
    last: int
    n_layers: int
    decodable: Scores
    reading: Scores

    def spans(self) -> dict[str, list[int]]:
        """The layers of each stage."""
        return {
            "adapt": list(range(self.first)),
            "aggregate": list(range(self.first, self.last + 1)),
            "execute": list(range(self.last + 1, self.n_layers)),
        }

    def __repr__(self) -> str:
        parts = [f"{name} {show_run(layers)}" for name, layers in self.spans().items()]
        return f"Stages({', '.join(parts)})"


def show_run(layers: Sequence[int]) -> str:
    if not layers:
        return "no layer"
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]}-{layers[-1]}"


def stage_bounds(
    restored_low: Sequence[float],
    control_high: Sequence[float],
    accuracy: Sequence[float],
    accuracy_low: Sequence[float],
    accuracy_control: Sequence[float],
    reading: Sequence[float],
) -> tuple[int, int]:
    """(first, last) layer of aggregating from the curves.

    First: the first layer whose C and whose decodability both lie above their controls. Last: the later of the layer
    where decodability reaches 95 % of its way from the control to its best, and the last layer whose heads at the query
    restore at least a tenth of what the best layer's do."""
    n = len(accuracy)
    out = [restored_low[i] > control_high[i] and accuracy_low[i] > accuracy_control[i] for i in range(n)]
    first = out.index(True) if True in out else n
    best = max(accuracy)
    peak = list(accuracy).index(best)
    base = min(best, accuracy_control[peak])  # never better than chance: it is as good as it gets at its best layer
    saturates = next(i for i in range(n) if accuracy[i] >= base + SATURATED * (best - base))
    top = max(reading) if len(reading) else 0.0
    ends = max((i for i, r in enumerate(reading) if top > 0 and r >= 0.1 * top), default=0)
    return first, min(n - 1, max(first, saturates, ends))


def find_stages(
    model: Any,
    pairs: Sequence[Any],
    layers: KeyLayers,
    heads: KeyHeads,
    *,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> Stages:
    """The three stages of a model, from key layers, key heads and linear probes at the query on the same pairs.

    Needs scikit-learn (extra `circuits`). Raises: ImportError without it; as `linear_probes`.
    Source: Zhang et al. 2026, arXiv 2605.21980, names the stages; the rule is ours.
    """
    examples = [p.emotional for p in pairs]
    neutral = {p.neutral.key: p.neutral for p in pairs}
    examples += list(neutral.values())
    inputs = prepared(model, examples, lead_in=heads.meta.get("lead_in"))
    identities = [e.identity for e in examples]
    probes = linear_probes(
        model, inputs, [e.emotion for e in examples], identities, positions=ROWS["query"],
        folds=min(5, len(set(identities))), max_rows=batch_size, seed=seed, progress=progress,
    )  # fmt: skip
    table = probes.scores.values[:, 0].double()
    names = list(probes.scores.labels["statistic"])
    column = {name: table[:, names.index(name)].tolist() for name in ("accuracy", "low", "control")}
    at_query = heads.effects.select(rows="query").mean("pair").values.nan_to_num(0).clamp_min(0).sum(-1)
    reading = torch.zeros(model.cfg.n_layers, dtype=torch.float64)
    reading[: len(at_query)] = at_query
    low, high = torch.full_like(reading, -1), torch.full_like(reading, 1)  # a layer not measured restores nothing
    measured = list(layers.by_layer.labels["layer"])
    low[measured] = layers.by_layer.values[:, 0].nan_to_num(-1)
    high[measured] = layers.control_by_layer.values[:, 2].nan_to_num(1)
    first, last = stage_bounds(
        low.tolist(), high.tolist(), column["accuracy"], column["low"], column["control"], reading.tolist()
    )
    where = {"layer": list(range(model.cfg.n_layers))}
    decodable = Scores(table, ("layer", "statistic"), where | {"statistic": names}, "accuracy at the query", "share")
    return Stages(
        first=first,
        last=last,
        n_layers=model.cfg.n_layers,
        decodable=decodable,
        reading=Scores(reading, ("layer",), where, "restored by heads at the query", "share"),
    )
