"""Key neurons: which neurons turn the emotion into words, or feed the heads that carry it.

A neuron's change between twins times its output row's projection on S is its direct projection; the strongest
consistent ones, with an exact check of the whole set against random sets of the same layers, and named by a fixed rule:
explicit-state neurons write emotion words late, contextual-trigger neurons act early on a key head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veena_lens.circuits import classify_neurons, neuron_trace, path_patching, promoted_tokens, top_neurons
from veena_lens.emotion.locate.heads import KeyHeads
from veena_lens.emotion.locate.tracing import projection_of
from veena_lens.emotion.methods import ROWS, batches, prepared
from veena_lens.emotion.pairs.parts import spread_over
from veena_lens.emotion.study import Study, stage
from veena_lens.interventions.base import require_layer
from veena_lens.long_runs import progress
from veena_lens.residual_parts import neuron_rows
from veena_lens.scores import Scores

if TYPE_CHECKING:
    from veena_lens.emotion.locate.direction_set import Directions
    from veena_lens.model.model import HookedVLM

Neuron = tuple[int, int]


@dataclass(frozen=True, eq=False, kw_only=True)
class KeyNeurons:
    """The key neurons. `table`: layer, neuron, emotion (whose pairs, "" for all), value (mean direct projection),
    consistency, rows ("last" or "query"), kind, why, emotion words among the promoted tokens, weight (<W_out[n], S^>),
    mean activations there on emotional and neutral images; best first. `trace` (layer, neuron): mean direct projection
    at the last token over pairs."""

    table: Any
    trace: Scores
    layer: int
    n_pairs: int
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def neurons(self) -> list[Neuron]:
        """Return those read at the last token, which is where `ena` acts, best first."""
        at_last = self.table[self.table["rows"] == "last"]
        return [(int(r.layer), int(r.neuron)) for r in at_last.itertuples()]

    @property
    def weights(self) -> list[float]:
        """Return w_n = `<W_out[n], S^>` of `neurons`, in their order, S of the emotion each was found for."""
        return [float(w) for w in self.table[self.table["rows"] == "last"]["weight"]]

    def of_kind(self, kind: str) -> list[Neuron]:
        """Return the neurons of a kind: "explicit state", "contextual trigger" or "unlabelled"."""
        chosen = self.table[self.table["kind"] == kind]
        return [(int(r.layer), int(r.neuron)) for r in chosen.itertuples()]

    def __repr__(self) -> str:
        counts = self.table["kind"].value_counts().to_dict() if len(self.table) else {}
        kinds = ", ".join(f"{n} {kind}" for kind, n in counts.items())
        return f"KeyNeurons: {len(self.table)} neurons ({kinds or 'none'}) of {self.n_pairs} pairs"


@stage(lead_in=None, batch_size=16, progress=False)
def neuron_projections(
    study: Study, pairs: Sequence[Any], directions: Directions, at: str = "last"
) -> tuple[Scores, Scores]:
    """Return what each neuron projects on the direction, and its mean activations, as (projection, activations).

    Each pair's direct projection of each neuron on its emotion's direction at the neuron's layer, axes (pair, layer,
    neuron), and mean activations (side, layer, neuron), side "emotional" or "neutral".

    Args:
        study: the model, or a `Study` that holds the settings `lead_in`, `batch_size` and `progress`.
        pairs: emotional images with their neutral twins.
        directions: directions of this model.
        at: "last" or "query": where neurons are read.
        lead_in: begun answer of which "last" is the last token.
        batch_size: pairs in a batch.
        progress: True shows a progress bar."""
    model, asking = study.model, study.asking
    pushes: list[Tensor] = []
    sums = torch.zeros(2, model.cfg.n_layers, model.cfg.d_mlp, dtype=torch.float64)
    names = [f"blocks.{layer}.mlp.hook_post" for layer in range(model.cfg.n_layers)]
    each = batches(pairs, asking.batch_size)
    for some in progress(each, f"neurons, {at}: pairs", study.progress, total=len(pairs), size=len):
        caches = []
        for i, side in enumerate(("emotional", "neutral")):
            inputs = prepared(model, [getattr(p, side) for p in some], lead_in=asking.lead_in)
            _, cache = model.run_with_cache(inputs, names_filter=names)
            caches.append(cache)
            for layer, name in enumerate(names):
                rows = cache.at(ROWS[at], name)
                mask = getattr(rows, "mask", None)
                rows = rows.double()
                if mask is not None:
                    rows = rows * mask[..., None]
                    sums[i, layer] += (rows.sum(1) / mask.sum(1, keepdim=True)).sum(0).cpu()
                else:
                    sums[i, layer] += rows.mean(1).sum(0).cpu()
        per_row = torch.stack([directions.unit(p.emotion) for p in some])
        pushes.append(neuron_trace(caches[0], per_row, ROWS[at], baseline=caches[1], model=model).values.double().cpu())
    labels = {"layer": list(range(model.cfg.n_layers))}
    trace = Scores(torch.cat(pushes), ("pair", "layer", "neuron"), labels, "push")
    sides = labels | {"side": ["emotional", "neutral"]}
    return trace, Scores(sums / len(pairs), ("side", "layer", "neuron"), sides, "activation")


@stage(wheels=None, lead_in=None, batch_size=16, progress=True)
def key_neurons(
    study: Study,
    pairs: Sequence[Any],
    directions: Directions,
    layer: int,
    *,
    heads: KeyHeads | None = None,
    k: int = 30,
    consistency: float | int = 0.8,
    confirm: int = 10,
) -> KeyNeurons:
    """Find the `k` neurons of largest direct projection at the last token, and `confirm` early ones at the query.

    Kept where at least `consistency` of the pairs agree in sign, all or those of one emotion (`strongest_neurons`).
    Neurons up to the key `layer` with a large projection at the query become contextual triggers where path patching
    confirms their effect on a key head. Kinds follow `circuits.classify_neurons` with all emotion words of the wheels.

    Args:
        study: the model, or a `Study` that holds the settings `wheels` to `progress` below.
        pairs: emotional images with their neutral twins.
        directions: directions of this model.
        layer: the key layer.
        heads: key heads that early neurons may feed; by default no early neurons are looked for.
        k: how many neurons are taken at the last token.
        consistency: least share of pairs that agree in sign, in [0, 1].
        confirm: how many early neurons are tried.
        wheels: emotion wheels with the emotion words; by default the project's own.
        lead_in: begun answer after which states are read.
        batch_size: pairs in a batch.
        progress: True shows a progress bar.

    Raises: ValueError for no pairs, an unknown layer, directions of another model, or an emotion without a direction,
    before anything is computed.

    Source: Zhang et al. 2026, arXiv 2605.21980, names the kinds; the rules are ours.
    """
    import pandas as pd

    model, pairs, batch_size = study.model, list(pairs), study.asking.batch_size
    if not pairs:
        raise ValueError("key_neurons: there are no pairs.")
    layer = require_layer(layer, model.cfg.n_layers, "key_neurons")
    if k < 1 or batch_size < 1:
        raise ValueError(f"key_neurons: k={k} and batch_size={batch_size} must be at least 1.")
    directions.check(model)
    for emotion in dict.fromkeys(p.emotion for p in pairs):
        directions.of(emotion)
    words = {w for e in directions.emotions for w in study.wheels.lexicon(e) if " " not in w}
    trace, means = neuron_projections(study, pairs, directions)
    emotions = [p.emotion for p in pairs]
    late = _kinds(model, strongest_neurons(trace, emotions, k, consistency), words, directions, layer, "last", None)
    tables, sides = [late], {"last": means.values}
    if heads is not None and heads.heads and confirm:
        early, at_query = neuron_projections(study, pairs, directions, "query")
        first = max(head for head in heads.heads)[0]
        kept = Scores(early.values[:, :first], early.axes, {"layer": list(range(first))}, early.name)
        if first > 0:
            table = strongest_neurons(kept, emotions, confirm, consistency)
            sure = _confirmed(model, spread_over(pairs, 12), directions, heads, table)
            tables.append(_kinds(model, table, words, directions, layer, "query", sure))
            sides["query"] = at_query.values
    table = pd.concat(tables, ignore_index=True)
    at = [(int(a), int(n)) for a, n in zip(table["layer"], table["neuron"], strict=True)]
    table = table.assign(
        weight=[_weight(model, directions, a, n, e) for (a, n), e in zip(at, table["emotion"], strict=True)],
        emotional=[float(sides[rows][0, a, n]) for rows, (a, n) in zip(table["rows"], at, strict=True)],
        neutral=[float(sides[rows][1, a, n]) for rows, (a, n) in zip(table["rows"], at, strict=True)],
        promotes=[
            _words(model, a, n, float(v) * _weight(model, directions, a, n, e))
            for (a, n), v, e in zip(at, table["value"], table["emotion"], strict=True)
        ],
    )
    mean = trace.mean("pair")
    return KeyNeurons(
        table=table, trace=mean, layer=layer, n_pairs=len(pairs), meta={"k": k, "consistency": consistency}
    )


def strongest_neurons(trace: Scores, emotions: Sequence[str], k: int, consistency: float | int = 0.8) -> Any:
    """Return the `k` neurons of largest mean direct projection, of all pairs or of one emotion's: a table with the
    columns of `top_neurons` and "emotion" ("" where all pairs are meant).

    A neuron that serves one emotion projects little on the pairs of the others, and their signs are noise; so each
    neuron's mean and the share of pairs that agree in sign are also taken within each emotion of at least four pairs,
    and the larger mean among those that are consistent counts, once per neuron."""
    import pandas as pd

    tables: list[Any] = [top_neurons(trace, k, consistency).assign(emotion="")]
    for emotion in dict.fromkeys(emotions):
        rows = [i for i, name in enumerate(emotions) if name == emotion]
        if len(rows) >= 4 and len(rows) < len(emotions):
            mine = Scores(trace.values[rows], trace.axes, {"layer": trace.labels["layer"]}, trace.name)
            tables.append(top_neurons(mine, k, consistency).assign(emotion=emotion))
    table: Any = pd.concat([t for t in tables if len(t)] or tables[:1], ignore_index=True)
    table = table[table["value"] > 0].sort_values(by="value", ascending=False, kind="stable")
    return table.drop_duplicates(["layer", "neuron"]).head(k).reset_index(drop=True)


def _kinds(
    model: HookedVLM, table: Any, words: set[str], directions: Any, layer: int, rows: str, confirmed: set[Neuron] | None
) -> Any:
    """Return the table with kinds, each neuron on the direction of its emotion, in the same order."""
    import pandas as pd

    parts = []
    for emotion, some in table.groupby("emotion", sort=False):
        direction = directions.of(emotion or None)
        parts.append(classify_neurons(model, some, words, direction, layer, positions=rows, confirmed=confirmed))
    if not parts:
        return table.assign(kind="", lexicon_tokens=0, why="", rows=rows)
    return pd.concat(parts).sort_index().assign(rows=rows)


def _weight(model: HookedVLM, directions: Any, layer: int, neuron: int, emotion: str = "") -> float:
    """Return <W_out[neuron], unit direction of the emotion at its layer>, the row as it joins the residual."""
    row = neuron_rows(model.blocks[layer]).detach()[neuron]
    return float(row.double() @ directions.unit(emotion or None)[layer].to(row).double())


def _words(model: HookedVLM, layer: int, neuron: int, signed: float, n: int = 8) -> list[str]:
    """Return the tokens that the neuron raises when it acts as it does on emotional images."""
    found = promoted_tokens(model, layer, neuron, k=n)
    texts = found.meta.get("texts")
    if texts is None:
        return []
    return [text.strip() for text in texts[0 if signed >= 0 else 1]]


def _confirmed(model: HookedVLM, pairs: Sequence[Any], directions: Any, heads: Any, table: Any) -> set[Neuron]:
    """Return neurons whose change, on the direct path to a later key head alone, raises its mean projection."""
    sure: set[Neuron] = set()
    neurons = [(int(a), int(n)) for a, n in zip(table["layer"], table["neuron"], strict=True)]
    rows_of = {(int(r.layer), int(r.head)): str(r.rows) for r in heads.table.itertuples()}
    for head in heads.heads[:5]:
        able = [x for x in neurons if x[0] < head[0] and x not in sure]
        if not able:
            continue
        total = torch.zeros(len(able), dtype=torch.float64)
        ends = 0.0
        for pair in pairs:
            clean, corrupted = (
                prepared(model, [x], lead_in=heads.meta.get("lead_in")) for x in (pair.emotional, pair.neutral)
            )
            metric = projection_of(model, head, directions.unit(pair.emotion)[head[0]], ROWS[rows_of[head]])
            labels = [f"L{a}N{n}" for a, n in able]
            direct = path_patching(
                model, clean, corrupted, labels, [f"L{head[0]}H{head[1]}"], metric, positions=ROWS["query"]
            )
            total += direct.values[0, :, 0].double().cpu()
            ends += direct.meta["clean"][0] - direct.meta["corrupted"][0]
        sure |= {x for x, effect in zip(able, total.tolist(), strict=True) if effect * ends > 0}
    return sure
