"""Key heads: which heads carry the emotion from the image to the key layer, by intention and by patching.

Backward activation patching, level 0: each head's output of the emotional run is put into the neutral run, at the
query or at the last token, and what comes back of <h_l*[N], S_l*> is its effect. A head is key when its effect is
above zero by its interval and by sign flips of whole identities (corrected for all heads), and its change points along
the direction (I_delta > 0). Flipped are changes of <h, S>, which exchanged twins turn round; the share restored is
positive either way. A head's direct projection on pairs of each emotion says whether it is specific or general.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from veena_lens.circuits import (
    attention_by_source,
    benjamini_hochberg,
    bootstrap,
    head_intention,
    image_attention_share,
    most_selective_class,
    sign_flip_test,
    specificity_index,
    specificity_test,
)
from veena_lens.emotion.locate.answer_slot import AnswerPosition
from veena_lens.emotion.methods import ROWS, batches, prepared
from veena_lens.emotion.study import Study, stage
from veena_lens.interventions.base import require_layer
from veena_lens.positions import listed
from veena_lens.scores import Scores
from veena_lens.sweeps import patch_sweep
from veena_lens.sweeps.metrics import project

if TYPE_CHECKING:
    import pandas as pd

    from veena_lens.emotion.locate.direction_set import Directions
    from veena_lens.model.model import HookedVLM

Head = tuple[int, int]


@dataclass(frozen=True, eq=False, kw_only=True)
class KeyHeads:
    """The key heads and what they were found by. `table`: every head with its figures, best first. `heads`: the key
    ones. `effects` (pair, rows, layer, head): share of the way from the neutral to the emotional run; `intention`,
    `push` (pair, layer, head) at the last token; `routes` (layer, head, source): from which tokens the projection
    comes.
    `dropped`: pairs whose runs hardly differ."""

    table: Any
    heads: list[Head]
    effects: Scores
    intention: Scores
    push: Scores
    routes: Scores
    layer: int
    n_pairs: int
    dropped: int
    emotions: list[str]
    identities: list[str]
    meta: dict[str, Any] = field(default_factory=dict)

    def by_layer(self) -> list[Head]:
        """Return the key heads in the order of layers."""
        return sorted(self.heads)

    def plot(self, **settings: Any) -> Any:
        """Plot the mean effect of each head, the better of both rows, as layer x head."""
        return best_rows(self.effects).mean("pair").plot(**settings)

    def __repr__(self) -> str:
        few = ", ".join(f"L{layer}H{head}" for layer, head in self.heads[:6])
        more = f", ... {len(self.heads) - 6} more" if len(self.heads) > 6 else ""
        return (
            f"KeyHeads: {len(self.heads)} of {len(self.table)} heads carry the direction to layer {self.layer}"
            f"{': ' if self.heads else ''}{few}{more}; {self.n_pairs} pairs, {self.dropped} dropped"
        )


def best_rows(effects: Scores) -> Scores:
    """Return the effects at the better of the query rows and the last row, judged once by the mean over pairs."""
    mean = effects.mean("pair").values  # [rows layer head]
    best = mean.nan_to_num(-torch.inf).argmax(0)
    values = effects.values.gather(1, best[None, None].expand(len(effects.values), 1, *best.shape))[:, 0]
    labels = {axis: effects.labels[axis] for axis in ("pair", "layer", "head")}
    return Scores(values, ("pair", "layer", "head"), labels, effects.name, effects.unit)


@stage(lead_in=None, out=None, progress=True)
def head_effects(
    study: Study,
    pairs: Sequence[Any],
    directions: Directions,
    layer: int,
    *,
    rows: Sequence[str] = ("query", "last"),
    layers: Any = None,
    max_rows: int = 512,
) -> Scores:
    """Measure what each head's emotional output restores of m = <resid_post[layer] at the last token, unit S of the
    pair's emotion>: (m_patched - m_neutral) / (m_emotional - m_neutral), the head patched at the given rows.

    Args:
        study: the model, or a `Study` that holds the settings `lead_in`, `out` and `progress`.
        pairs: emotional images with their neutral twins.
        directions: directions of this model.
        layer: the layer at which m is read.
        rows: "query", "last" or both: where heads are patched.
        layers: the layers of the heads; by default all up to `layer`.
        max_rows: rows of one batch of patched runs.
        lead_in: begun answer of which "last" is the last token.
        out: a folder where effects are kept pair by pair, and resumed.
        progress: True shows a progress bar.

    Returns: Scores with axes (pair, rows, layer, head); dimensionless, 1 is all of it. NaN, masked, for pairs whose
    runs differ by less than 0.05 standard deviations of m.

    Raises: ValueError for no pairs or an unknown layer.

    Source: denoising, Zhang and Nanda 2023, arXiv 2309.16042.
    """
    model, pairs, lead_in = study.model, list(pairs), study.asking.lead_in
    if not pairs:
        raise ValueError("head_effects: there are no pairs.")
    directions.check(model)
    layer = require_layer(layer, model.cfg.n_layers, "head_effects")
    chosen = list(range(layer + 1)) if layers is None else listed(layers, model.cfg.n_layers, "head_effects: layers")

    def effects(pair: Any) -> dict[str, Any]:
        clean, corrupted = (prepared(model, [x], lead_in=lead_in) for x in (pair.emotional, pair.neutral))
        unit = directions.unit(pair.emotion)[layer]
        metric = project(f"blocks.{layer}.hook_resid_post", unit, ROWS["last"])
        parts = [
            patch_sweep(
                model, clean, corrupted, "heads", ROWS[at], metric, layers=chosen, max_rows=max_rows, progress=False
            )
            for at in rows
        ]
        ends = torch.stack([parts[0].clean[0], parts[0].corrupted[0]])
        return {"values": torch.stack([p.values for p in parts]).double(), "ends": ends.double()}

    about = {"layer": layer, "rows": list(rows), "layers": chosen, "lead_in": lead_in, "directions": directions}
    found = study.each("heads: pairs", pairs, effects, **about)
    values, ends = torch.stack([f["values"] for f in found]), torch.stack([f["ends"] for f in found])
    return relative_effects(values, ends, rows, chosen)


def relative_effects(
    values: Float[Tensor, "pair rows layer head"],
    ends: Float[Tensor, "pair 2"],
    rows: Sequence[str],
    layers: Sequence[int],
) -> Scores:
    """Return effects from the metric of patched runs and of both ends (emotional, neutral); weak pairs are masked.

    meta["gap"]: emotional less neutral of each pair, in the metric's unit."""
    gap = ends[:, 0] - ends[:, 1]
    spread = ends.flatten().std() if len(ends) > 1 else torch.tensor(0.0)
    keep = gap.abs() > 0.05 * spread
    effects = (values - ends[:, 1, None, None, None]) / gap[:, None, None, None]
    effects = torch.where(keep[:, None, None, None], effects, torch.nan)
    labels = {"pair": list(range(len(values))), "rows": list(rows), "layer": list(layers)}
    mask = None if bool(keep.all()) else keep[:, None, None, None].expand(effects.shape)
    axes, about = ("pair", "rows", "layer", "head"), {"gap": gap.tolist()}
    return Scores(effects, axes, labels, "restored", "share", mask=mask, meta=about)


@stage(lead_in=None, batch_size=16, draws=2000, seed=0, out=None, progress=True)
def key_heads(
    study: Study,
    pairs: Sequence[Any],
    directions: Directions,
    layer: int,
    *,
    k: int = 10,
    q: float | int = 0.05,
    max_rows: int = 512,
) -> KeyHeads:
    """Find at most `k` heads, up to the key layer, that carry the emotion there.

    Key: the lower bound of the mean effect is above 0, I_delta > 0, and the change that the head makes to m positive
    and significant at false discovery rate `q` among all heads when signs of whole identities are flipped (twins
    exchanged). In the order of their effect. The table adds that change, I_delta (cosine) and W (projection) at the
    last token, the image's share of W, the specificity index of W over emotions (tau; cross-fitted; p by
    shuffled labels) and its label.

    Args:
        study: the model, or a `Study` that holds the settings `lead_in` to `progress` below.
        pairs: emotional images with their neutral twins, of at least two identities.
        directions: directions of this model.
        layer: the key layer.
        k: the most heads that are called key.
        q: false discovery rate among all heads.
        max_rows: rows of one batch of patched runs.
        lead_in: begun answer after which states are read.
        batch_size: pairs in a batch where heads are read.
        draws, seed: of intervals and sign flips.
        out: a folder where effects are kept pair by pair, and resumed.
        progress: True shows a progress bar.

    Raises: ValueError for no pairs, fewer than two identities, or an unknown layer.

    Source: Zhang et al. 2026, arXiv 2605.21980, names the steps; the rules are ours.
    """
    pairs = list(pairs)
    if pairs and len({p.identity for p in pairs}) < 2:
        raise ValueError(f"key_heads: all pairs are of {pairs[0].identity!r}; intervals need at least two identities.")
    model, asking, draws, seed = study.model, study.asking, study.draws, study.seed
    layer = require_layer(layer, model.cfg.n_layers, "key_heads")
    effects = head_effects(study, pairs, directions, layer, max_rows=max_rows)
    intention, push, routes = head_readings(model, pairs, directions, layer, asking.batch_size, asking.lead_in)
    identities, emotions = [p.identity for p in pairs], [p.emotion for p in pairs]
    best = best_rows(effects)
    bounds = bootstrap(best, groups=identities, draws=draws, seed=seed)
    gap = torch.tensor(effects.meta["gap"], dtype=torch.float64)
    changes = replace(best, values=best.values * gap[:, None, None])
    p = sign_flip_test(changes, draws=draws, seed=seed, groups=identities)
    adjusted = benjamini_hochberg(p, q)
    which = effects.mean("pair").values.nan_to_num(-torch.inf).argmax(0)
    meaning = specificity(push, emotions, identities, seed)
    shares = image_attention_share(routes).values
    rows = []
    for i, at in enumerate(best.labels["layer"]):
        for head in range(best.shape[2]):
            low, mean, high = bounds.values[i, head].tolist()
            line = {"layer": int(at), "head": head, "effect": mean, "low": low, "high": high}
            line |= {"change": float(changes.values[:, i, head].nanmean())}
            line |= {"rows": effects.labels["rows"][int(which[i, head])], "q": float(adjusted.values[i, head])}
            line |= {"intention": float(intention.values[:, i, head].mean())}
            line |= {"push": float(push.values[:, i, head].mean()), "from_picture": float(shares[i, head])}
            rows.append(line | {name: values[i][head] for name, values in meaning.items()})
    table = _ranked(rows)
    is_key = (table["low"] > 0) & (table["change"] > 0) & (table["intention"] > 0) & (table["q"] <= q)
    heads = [(int(r.layer), int(r.head)) for r in table[is_key].head(k).itertuples()]
    table = table.assign(key=[(a, b) in heads for a, b in zip(table["layer"], table["head"], strict=True)])
    dropped = 0 if effects.mask is None else int((~effects.mask[:, 0, 0, 0]).sum())
    about = {"k": k, "q": q, "lead_in": asking.lead_in, "draws": draws, "seed": seed, "emotions": sorted(set(emotions))}
    return KeyHeads(
        table=table,
        heads=heads,
        effects=effects,
        intention=intention,
        push=push,
        routes=routes,
        layer=layer,
        n_pairs=len(pairs),
        dropped=dropped,
        emotions=emotions,
        identities=identities,
        meta=json.loads(json.dumps(about)),
    )


def _ranked(rows: list[dict[str, Any]]) -> Any:
    import pandas as pd

    return pd.DataFrame(rows).sort_values("effect", ascending=False, ignore_index=True)


def head_readings(
    model: HookedVLM,
    pairs: Sequence[Any],
    directions: Directions,
    layer: int,
    batch_size: int = 16,
    lead_in: str | None = None,
) -> tuple[Scores, Scores, Scores]:
    """Return (I_delta, W, routes) of each head, for the pairs.

    Cosine and projection of each head's change at the last token on the direction of the pair's emotion at the head's
    own layer, by pair; and from which tokens the projection comes, averaged over pairs."""
    layers = list(range(layer + 1))
    parts: dict[str, list[Tensor]] = {"cosine": [], "projection": [], "routes": []}
    sources: list[Any] = []
    for some in batches(pairs, batch_size):
        clean, corrupted = (
            prepared(model, [getattr(p, side) for p in some], lead_in=lead_in) for side in ("emotional", "neutral")
        )
        per_row = torch.stack([directions.unit(p.emotion) for p in some])
        for kind in ("cosine", "projection"):
            found = head_intention(
                clean, per_row, ROWS["last"], kind=kind, baseline=corrupted, layers=layers, model=model
            )
            parts[kind].append(found.values.double())
        routes = attention_by_source(model, clean, per_row, ROWS["last"], baseline=corrupted, layers=layers)
        parts["routes"].append(routes.values.double())
        sources = list(routes.labels["source"])
    labels = {"layer": layers}
    axes = ("pair", "layer", "head")
    mean = torch.cat(parts["routes"]).mean(0)
    table = Scores(mean, ("layer", "head", "source"), labels | {"source": sources}, "push")
    return (
        Scores(torch.cat(parts["cosine"]), axes, labels, "intention", "cosine"),
        Scores(torch.cat(parts["projection"]), axes, labels, "push"),
        table,
    )


def specificity(
    push: Scores, emotions: Sequence[str], identities: Sequence[str], seed: int = 0
) -> dict[str, list[list[Any]]]:
    """Return how specific each head is to an emotion, and its label.

    tau, its cross-fitted value, p under shuffled labels, preferred emotion and label of each head, as nested lists.

    specific: tau >= 0.5 and p < 0.05; general: tau <= 0.3 and a positive mean for every emotion; else "". With one
    emotion there is nothing to compare: tau is NaN."""
    n_layers, n_heads = push.shape[1:]
    names = sorted(set(emotions))
    if len(names) < 2 or min(list(emotions).count(e) for e in names) < 4:
        nothing = [[float("nan")] * n_heads for _ in range(n_layers)]
        blank = [[""] * n_heads for _ in range(n_layers)]
        return {"tau": nothing, "tau_crossed": nothing, "p_specific": nothing, "emotion": blank, "label": blank}
    tau = specificity_index(push, emotions).values
    crossed = specificity_index(push, emotions, cross_fitted=True, groups=identities, seed=seed).values
    p = specificity_test(push, emotions, seed=seed).values
    chosen = most_selective_class(push, emotions)
    classes = chosen.meta["classes"]
    means = torch.stack([push.values[[i for i, e in enumerate(emotions) if e == name]].mean(0) for name in names])
    words = [[classes[int(c)] if int(c) >= 0 else "" for c in row] for row in chosen.values]
    labels = [
        [
            "specific"
            if tau[i, h] >= 0.5 and p[i, h] < 0.05
            else "general"
            if tau[i, h] <= 0.3 and bool((means[:, i, h] > 0).all())
            else ""
            for h in range(n_heads)
        ]
        for i in range(n_layers)
    ]
    return {
        "tau": tau.tolist(),
        "tau_crossed": crossed.tolist(),
        "p_specific": p.tolist(),
        "emotion": words,
        "label": labels,
    }


@stage(draws=2000, seed=0, out=None, progress=True)
def execution_heads(
    study: Study, pairs: Sequence[Any], slot: AnswerPosition, after: int, *, k: int = 10, max_rows: int = 512
) -> pd.DataFrame:
    """Rank heads after the key layer by what they restore of the soft hit at the answer position.

    Args:
        study: the model, or a `Study` that holds the settings `draws` to `progress` below.
        pairs: emotional images with their neutral twins.
        slot: where the emotion is said.
        after: the key layer.
        k: how many heads the table holds.
        max_rows: rows of one batch of patched runs.
        draws, seed: of the intervals.
        out: a folder where effects are kept pair by pair, and the same call resumes.
        progress: True shows a progress bar.

    Returns: a table, best first, with columns layer, head, effect, low, high (interval over identities); empty where
    no layer follows.

    Raises: ValueError for no pairs, an unknown layer, or an emotion that the slot does not know."""
    model, pairs = study.model, list(pairs)
    if not pairs:
        raise ValueError("execution_heads: there are no pairs.")
    after = require_layer(after, model.cfg.n_layers, "execution_heads")
    metrics = {emotion: slot.metric(emotion) for emotion in dict.fromkeys(p.emotion for p in pairs)}
    layers = list(range(after + 1, model.cfg.n_layers))
    if not layers:
        return _ranked([{"layer": 0, "head": 0, "effect": 0.0, "low": 0.0, "high": 0.0}]).iloc[:0]

    def restored(pair: Any) -> dict[str, Any]:
        clean, corrupted = (prepared(model, [x], lead_in=slot.lead_in) for x in (pair.emotional, pair.neutral))
        metric = metrics[pair.emotion]
        one = patch_sweep(
            model, clean, corrupted, "heads", ROWS["last"], metric, layers=layers, max_rows=max_rows, progress=False
        )
        return {"values": one.values.double(), "ends": torch.stack([one.clean[0], one.corrupted[0]]).double()}

    found = study.each("execution heads: pairs", pairs, restored, layers=layers, slot=slot)
    values, ends = torch.stack([f["values"] for f in found]), torch.stack([f["ends"] for f in found])
    effects = best_rows(relative_effects(values[:, None], ends, ["last"], layers))
    bounds = bootstrap(effects, groups=[p.identity for p in pairs], draws=study.draws, seed=study.seed)
    rows = []
    for i, at in enumerate(layers):
        for head in range(effects.shape[2]):
            low, mean, high = bounds.values[i, head].tolist()
            rows.append({"layer": at, "head": head, "effect": mean, "low": low, "high": high})
    return _ranked(rows).head(k)
