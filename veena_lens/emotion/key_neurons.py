"""Key neurons: which neurons turn the emotion into words, or feed the heads that carry it.

A neuron's change between twins times its output row's projection on S is its push; the strongest consistent ones, with
an exact check of the whole set against random sets of the same layers, and named by a fixed rule: explicit-state
neurons write emotion words late, contextual-trigger neurons act early on a key head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from veena_lens.circuits import neuron_kinds, neuron_trace, path_patching, promoted_tokens, top_neurons
from veena_lens.emotion.key_heads import KeyHeads
from veena_lens.emotion.methods import ROWS, batches, prepared
from veena_lens.emotion.tracing import push_of, spread_over
from veena_lens.scores import Scores

Neuron = tuple[int, int]


@dataclass(frozen=True, eq=False, kw_only=True)
class KeyNeurons:
    """`table`: layer, neuron, value (mean push), consistency, rows ("last" or "query"), kind, why, emotion words among
    the promoted tokens, mean activations on emotional and neutral pictures; best first. `trace` (layer, neuron): mean
    push at the last token over pairs."""

    table: Any
    trace: Scores
    layer: int
    n_pairs: int
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def neurons(self) -> list[Neuron]:
        """Those read at the last token, which is where `ena` acts, best first."""
        at_last = self.table[self.table["rows"] == "last"]
        return [(int(r.layer), int(r.neuron)) for r in at_last.itertuples()]

    def of_kind(self, kind: str) -> list[Neuron]:
        """Neurons of a kind: "explicit state", "contextual trigger" or "unlabelled"."""
        chosen = self.table[self.table["kind"] == kind]
        return [(int(r.layer), int(r.neuron)) for r in chosen.itertuples()]

    def __repr__(self) -> str:
        counts = self.table["kind"].value_counts().to_dict() if len(self.table) else {}
        kinds = ", ".join(f"{n} {kind}" for kind, n in counts.items())
        return f"KeyNeurons: {len(self.table)} neurons ({kinds or 'none'}) of {self.n_pairs} pairs"


def neuron_pushes(
    model: Any,
    pairs: Sequence[Any],
    directions: Any,
    at: str = "last",
    *,
    lead_in: str | None = None,
    batch_size: int = 16,
) -> tuple[Scores, Scores]:
    """(push, activations): each pair's push of each neuron along its emotion's direction at the neuron's layer, axes
    (pair, layer, neuron), and mean activations (side, layer, neuron), side "emotional" or "neutral"."""
    pushes: list[Tensor] = []
    sums = torch.zeros(2, model.cfg.n_layers, model.cfg.d_mlp, dtype=torch.float64)
    names = [f"blocks.{layer}.mlp.hook_post" for layer in range(model.cfg.n_layers)]
    for some in batches(pairs, batch_size):
        caches = []
        for i, side in enumerate(("emotional", "neutral")):
            inputs = prepared(model, [getattr(p, side) for p in some], lead_in=lead_in)
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


def key_neurons(
    model: Any,
    pairs: Sequence[Any],
    directions: Any,
    layer: int,
    *,
    heads: KeyHeads | None = None,
    lead_in: str | None = None,
    k: int = 30,
    consistency: float | int = 0.8,
    wheels: Any = None,
    batch_size: int = 16,
    confirm: int = 10,
    progress: bool = True,
) -> KeyNeurons:
    """The `k` neurons that push most along the direction at the last token, and `confirm` early ones at the query.

    Kept where at least `consistency` of the pairs agree in sign. Neurons up to the key `layer` that push at the query
    become contextual triggers where path patching confirms their effect on a key head (`heads`). Kinds follow
    `circuits.neuron_kinds` with all emotion words of `wheels`.
    Raises: ValueError for no pairs. Source: Zhang et al. 2026, arXiv 2605.21980, names the kinds; the rules are ours.
    """
    import pandas as pd

    pairs = list(pairs)
    if not pairs:
        raise ValueError("key_neurons: there are no pairs.")
    if wheels is None:
        from veena_lens.emotion.wheels import EmotionWheels

        wheels = EmotionWheels.default()
    words = {w for e in directions.emotions for w in wheels.lexicon(e) if " " not in w}
    overall = directions.of(None)
    trace, means = neuron_pushes(model, pairs, directions, lead_in=lead_in, batch_size=batch_size)
    late = neuron_kinds(model, top_neurons(trace, k, consistency), words, overall, layer, at="last")
    late = late.assign(rows="last")
    tables = [late]
    if heads is not None and heads.heads and confirm:
        early, _ = neuron_pushes(model, pairs, directions, "query", lead_in=lead_in, batch_size=batch_size)
        first = max(head for head in heads.heads)[0]
        kept = Scores(early.values[:, :first], early.axes, {"layer": list(range(first))}, early.name)
        if first > 0:
            table = top_neurons(kept, confirm, consistency)
            sure = _confirmed(model, spread_over(pairs, 12), directions, heads, table)
            table = neuron_kinds(model, table, words, overall, layer, at="query", confirmed=sure)
            tables.append(table.assign(rows="query"))
    table = pd.concat(tables, ignore_index=True)
    at = [(int(a), int(n)) for a, n in zip(table["layer"], table["neuron"], strict=True)]
    table = table.assign(
        emotional=[float(means.values[0, a, n]) for a, n in at],
        neutral=[float(means.values[1, a, n]) for a, n in at],
        promotes=[
            _words(model, a, n, float(v) * _sign(model, directions, a, n))
            for (a, n), v in zip(at, table["value"], strict=True)
        ],
    )
    mean = trace.mean("pair")
    return KeyNeurons(
        table=table, trace=mean, layer=layer, n_pairs=len(pairs), meta={"k": k, "consistency": consistency}
    )


def _sign(model: Any, directions: Any, layer: int, neuron: int) -> float:
    row = model.blocks[layer].mlp.W_out.detach()[neuron]
    return float(row.double() @ directions.unit(None)[layer].to(row).double())


def _words(model: Any, layer: int, neuron: int, signed: float, n: int = 8) -> list[str]:
    """The tokens that the neuron raises when it acts as it does on emotional pictures."""
    found = promoted_tokens(model, layer, neuron, k=n)
    texts = found.meta.get("texts")
    if texts is None:
        return []
    return [text.strip() for text in texts[0 if signed >= 0 else 1]]


def _confirmed(model: Any, pairs: Sequence[Any], directions: Any, heads: KeyHeads, table: Any) -> set[Neuron]:
    """Neurons whose change, on the direct path to a later key head alone, raises that head's push in the mean."""
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
            metric = push_of(model, head, directions.unit(pair.emotion)[head[0]], ROWS[rows_of[head]])
            labels = [f"L{a}N{n}" for a, n in able]
            direct = path_patching(
                model, clean, corrupted, labels, [f"L{head[0]}H{head[1]}"], metric, positions=ROWS["query"]
            )
            total += direct.values[0, :, 0].double().cpu()
            ends += direct.meta["clean"][0] - direct.meta["corrupted"][0]
        sure |= {x for x, effect in zip(able, total.tolist(), strict=True) if effect * ends > 0}
    return sure
