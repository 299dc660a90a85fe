"""Backward from the key heads: each becomes a target whose own direct projection earlier components are patched for,
twice over.

m_d = <r_d[p], S_l>, what head d writes along the direction at its best rows. Heads and MLPs of earlier layers that
restore m_d when patched are its candidates; an edge is kept where the change on the direct path to d alone has the
same sign. The heads found become targets in turn.

Adapt, aggregate, execute: three stages read off curves over layers, never from layer numbers.

Adapt: before injection restores anything and before the emotion can be read from the query. Aggregate: while it is
gathered there, until it can be read as well as it ever can and heads stop reading it from the image. Execute: after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from veena_lens.circuits import bootstrap, linear_probes, path_patching
from veena_lens.emotion.locate.heads import Head, KeyHeads
from veena_lens.emotion.locate.layers import KeyLayers
from veena_lens.emotion.methods import ROWS, prepared
from veena_lens.emotion.pairs.parts import spread_over
from veena_lens.emotion.study import Study, stage
from veena_lens.long_runs import progress
from veena_lens.residual_parts import head_rows
from veena_lens.scores import Scores
from veena_lens.sweeps import patch_sweep

if TYPE_CHECKING:
    import pandas as pd

    from veena_lens.emotion.locate.direction_set import Directions
    from veena_lens.model.model import HookedVLM

SATURATED = 0.95


@dataclass(frozen=True, eq=False, kw_only=True)
class Stages:
    """The three stages. `first`: the first layer of aggregating, `last` its last; adapting ends before, executing
    begins after.

    `decodable` (layer, statistic): accuracy of a linear probe for the emotion at the query, with interval and shuffled
    control. `reading` (layer): how much heads that are patched at the query restore together, the sum of their positive
    effects."""

    first: int
    last: int
    n_layers: int
    decodable: Scores
    reading: Scores

    def spans(self) -> dict[str, list[int]]:
        """Return the layers of each stage."""
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
    """Return the (first, last) layer of aggregating from the curves, each with one entry per layer.

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


@stage(batch_size=16, seed=0, progress=True)
def find_stages(study: Study, pairs: Sequence[Any], layers: KeyLayers, heads: KeyHeads) -> Stages:
    """Find the three stages of a model, from key layers, key heads and linear probes at the query on the same pairs.

    Needs scikit-learn (extra `circuits`).

    Args:
        study: the model, or a `Study` that holds the settings `batch_size`, `seed` and `progress`.
        pairs: emotional images with their neutral twins.
        layers, heads: what `key_layers` and `key_heads` found on them.
        batch_size: rows of a batch where states are read.
        seed: of the probes' folds.
        progress: True shows a progress bar.

    Raises: ImportError without scikit-learn; as `linear_probes`.

    Source: Zhang et al. 2026, arXiv 2605.21980, names the stages; the rule is ours.
    """
    model = study.model
    examples = [p.emotional for p in pairs]
    neutral = {p.neutral.key: p.neutral for p in pairs}
    examples += list(neutral.values())
    inputs = prepared(model, examples, lead_in=heads.meta.get("lead_in"))
    identities = [e.identity for e in examples]
    probes = linear_probes(
        model, inputs, [e.emotion for e in examples], identities, positions=ROWS["query"],
        folds=min(5, len(set(identities))), max_rows=study.asking.batch_size, seed=study.seed,
        progress=study.progress,
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


COLUMNS = ("level", "sender", "receiver", "rows", "effect", "low", "high", "path", "kept")


@dataclass(frozen=True, eq=False)
class head_push:
    """The direct projection `<z W_O[head], u>` of one head, averaged over `positions`; a metric for sweeps and path
    patching."""

    layer: int
    head: int
    reader: Float[Tensor, " d_head"]  # W_O[head] u
    positions: Any = "last"

    @property
    def site(self) -> str:
        return f"blocks.{self.layer}.attn.hook_z"

    def __call__(self, z: Float[Tensor, "rows n n_heads d_head"]) -> Float[Tensor, " rows"]:
        return (z[:, :, self.head] @ self.reader.to(z)).mean(-1)


def projection_of(model: HookedVLM, head: Head, unit: Float[Tensor, " d_model"], positions: Any = "last") -> head_push:
    """Return the metric of one head's direct projection on a unit direction, a following norm's denominator left
    out."""
    layer, number = head
    W_O = head_rows(model.blocks[layer]).detach()[number]
    return head_push(layer, number, W_O @ unit.to(W_O), positions)


@stage(draws=1000, seed=0, out=None, progress=True)
def trace_back(
    study: Study,
    pairs: Sequence[Any],
    found: KeyHeads,
    directions: Directions,
    *,
    depth: int = 2,
    top: int = 5,
    targets: int = 5,
    max_pairs: int = 16,
    max_rows: int = 512,
) -> pd.DataFrame:
    """Trace key heads back to what feeds them: the edges of the circuit as a table.

    Columns: sender, receiver, effect on the receiver's projection with its interval over identities, the effect on the
    direct path alone, and whether the edge is kept (both above zero). Level 1 asks for the best key heads after layer 0
    (nothing feeds those of layer 0), level 2 for the heads found there. Senders are "L3H2" or "3_mlp_out", patched at
    the receiver's rows. Effects: share of the way from the neutral to the emotional run.

    Args:
        study: the model, or a `Study` that holds the settings `draws` to `progress` below.
        pairs: emotional images with their neutral twins.
        found: the key heads, with the lead-in after which they were found.
        directions: directions of this model.
        depth: levels of tracing.
        top: candidates per target that are checked by path patching.
        targets: key heads that are traced at level 1.
        max_pairs: pairs that are patched, identities in turn.
        max_rows: rows of one batch of patched runs.
        draws, seed: of the intervals.
        out: a folder where edges are kept target by target, and the same call resumes.
        progress: True shows a progress bar.

    Raises: ValueError for no pairs, or sizes below 1.

    Source: method named in Zhang et al. 2026, arXiv 2605.21980; the procedure is ours; path patching, Wang et al. 2022,
    arXiv 2211.00593.
    """
    import pandas as pd

    if depth < 1 or top < 1 or targets < 1:
        raise ValueError(f"trace_back: depth={depth}, top={top} and targets={targets} must be at least 1.")
    some = spread_over(list(pairs), max_pairs)
    if not some:
        raise ValueError("trace_back: there are no pairs.")
    lead_in = found.meta.get("lead_in")
    study = study.but(lead_in=lead_in)
    rows_of = {(int(r.layer), int(r.head)): str(r.rows) for r in found.table.itertuples()}
    about = {"directions": directions, "lead_in": lead_in, "top": top, "draws": study.draws, "seed": study.seed}
    store = study.store("tracing back", **about, pairs=[[pair, pair.identity] for pair in some])
    targeted = [head for head in found.heads if head[0] > 0][:targets]
    seen, edges = set(targeted), []
    for level in range(1, depth + 1):
        found_here: list[Head] = []
        for head in progress(targeted, f"tracing back, level {level}: heads", study.progress):

            def run(head: Head = head) -> dict[str, Any]:
                return {"lines": _senders(study, some, directions, head, rows_of[head], top, max_rows)}

            lines = store.do(f"L{head[0]}H{head[1]} {rows_of[head]}", run)["lines"]
            edges += [{"level": level, **line} for line in lines]
            for line in lines:
                sender = _as_head(line["sender"])
                if line["kept"] and sender is not None and sender[0] > 0 and sender not in seen:
                    seen.add(sender)
                    found_here.append(sender)
        targeted = found_here
    return pd.DataFrame(edges, columns=list(COLUMNS))


def _as_head(label: str) -> Head | None:
    if not label.startswith("L") or "H" not in label:
        return None
    layer, head = label[1:].split("H")
    return int(layer), int(head)


def _senders(
    study: Study, pairs: Sequence[Any], directions: Directions, head: Head, rows: str, top: int, max_rows: int
) -> list[dict[str, Any]]:
    """Return the candidates of one target, with their effects and the check on the direct path."""
    model, lead_in = study.model, study.asking.lead_in
    layer, number = head
    earlier = list(range(layer))
    by_head, by_mlp, ends = [], [], []
    for pair in pairs:
        clean, corrupted = (prepared(model, [x], lead_in=lead_in) for x in (pair.emotional, pair.neutral))
        metric = projection_of(model, head, directions.unit(pair.emotion)[layer], ROWS[rows])
        call = {"positions": ROWS[rows], "metric": metric, "layers": earlier, "max_rows": max_rows, "progress": False}
        found = patch_sweep(model, clean, corrupted, "heads", **call)
        by_head.append(found.values.double())
        by_mlp.append(patch_sweep(model, clean, corrupted, "mlp_out", **call).values.double())
        ends.append(torch.stack([found.clean[0], found.corrupted[0]]).double())
    values = torch.cat([torch.stack(by_head).flatten(1), torch.stack(by_mlp).flatten(1)], 1)
    n_heads = by_head[0].shape[-1]
    names = [f"L{a}H{h}" for a in earlier for h in range(n_heads)] + [f"{a}_mlp_out" for a in earlier]
    both = torch.stack(ends)
    gap = both[:, 0] - both[:, 1]
    keep = gap.abs() > 0.05 * both.flatten().std()
    effects = torch.where(keep[:, None], (values - both[:, 1:]) / gap[:, None], torch.nan)
    scores = Scores(effects, ("pair", "sender"), {"pair": list(range(len(pairs))), "sender": names})
    bounds = bootstrap(scores, groups=[p.identity for p in pairs], draws=study.draws, seed=study.seed).values
    order = bounds[:, 1].nan_to_num(-torch.inf).argsort(descending=True)[:top].tolist()
    picked = [names[i] for i in order if bounds[i, 1] > 0]
    if not picked:
        return []
    paths = []
    for pair in pairs:
        clean, corrupted = (prepared(model, [x], lead_in=lead_in) for x in (pair.emotional, pair.neutral))
        metric = projection_of(model, head, directions.unit(pair.emotion)[layer], ROWS[rows])
        direct = path_patching(
            model, clean, corrupted, picked, [f"L{layer}H{number}"], metric, positions=ROWS["query"], max_rows=max_rows
        )
        paths.append(direct.values[0, :, 0].double())
    path = torch.where(keep[:, None], torch.stack(paths) / gap[:, None], torch.nan).nanmean(0)
    lines = []
    for i, name in enumerate(picked):
        low, mean, high = bounds[names.index(name)].tolist()
        line = {
            "sender": name,
            "receiver": f"L{layer}H{number}",
            "rows": rows,
            "effect": mean,
            "low": low,
            "high": high,
        }
        lines.append(line | {"path": float(path[i]), "kept": bool(low > 0 and path[i] > 0)})
    return lines
