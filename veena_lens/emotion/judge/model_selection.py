"""Model selection on the validation split: how heads are ranked, in which mode they act, each family's settings.

Heads are ranked on the mechanism's identities and compared on the validation's; settings are tuned there with the same
number of trials for every family. The comparison of rankings counts as trials of VEE.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from veena_lens.emotion.enhance.baselines import all_baselines
from veena_lens.emotion.enhance.veena import KINDS, Adaptive, ena, vee, veena
from veena_lens.emotion.judge.evaluation import evaluate
from veena_lens.emotion.judge.fluency import FLUENCY, Fluency
from veena_lens.emotion.judge.side_effects import other_questions
from veena_lens.emotion.judge.tuning import HARM, Tuned, fluency_ratio, trial_score, tune
from veena_lens.emotion.locate.answer_slot import AnswerPosition
from veena_lens.emotion.locate.boost_gradients import head_boost_gradients, top_heads
from veena_lens.emotion.locate.heads import KeyHeads
from veena_lens.emotion.locate.neurons import KeyNeurons
from veena_lens.emotion.methods import Method
from veena_lens.emotion.pairs.contexts import context_conditions
from veena_lens.emotion.pairs.parts import spaced, spread_examples
from veena_lens.emotion.settings import FIRST_BETA, Settings
from veena_lens.emotion.study import Study, stage
from veena_lens.interventions import Circuit
from veena_lens.scores import Scores

if TYPE_CHECKING:
    import pandas as pd

Head = tuple[int, int]


@dataclass(frozen=True, eq=False, kw_only=True)
class HeadRankings:
    """The heads by each way of ranking, with the way and mode that do best on validation.

    Attributes:
        rankings: heads, best first, by the name of the ranking.
        table: ranking ("way"), mode, score ("worth") and harm on validation.
        winner: the best (ranking, mode); `heads` and `mode` are its.
    """

    rankings: Mapping[str, list[Head]]
    table: Any
    winner: tuple[str, str]

    @property
    def heads(self) -> list[Head]:
        return self.rankings[self.winner[0]]

    @property
    def mode(self) -> str:
        return self.winner[1]


def conditions_of(
    part: Any, settings: Settings, most: int | None, *, held_out: bool, n_neutral: int | None = None
) -> dict[str, list[Any]]:
    """Return the images of a split under every condition: alone, consistent, and in conflict at each strength."""
    examples = spread_examples(part, most)
    return context_conditions(
        examples, seed=settings.seed, held_out=held_out, strengths=settings.strengths, events=settings.events
    )


@stage(out=None)
def rank_heads(
    study: Study,
    conflict: Sequence[Any],
    alone: Sequence[Any],
    slot: AnswerPosition,
    heads: KeyHeads,
    settings: Settings,
) -> dict[str, list[Head]]:
    """Rank heads in each way that the settings name, and return the best `settings.k_heads` of each.

    "patching": effect on the key layer; "intention": I_delta; "conflict gradient": what strengthening a head's look at
    the image would add to the image's lead over the context; "alone gradient": the same without contexts.

    Args:
        study: the model, or a `Study`.
        conflict, alone: examples with a context of another emotion, and without.
        slot: where the emotion is said.
        heads: what `key_heads` found.
        settings: the ways, and how many heads.
        out: a folder where gradients are kept, and from which the same call resumes."""
    k = settings.k_heads
    found: dict[str, list[Head]] = {}
    if "patching" in settings.ways:
        chosen = heads.heads or [(int(r.layer), int(r.head)) for r in heads.table.head(k).itertuples()]
        found["patching"] = chosen[:k]
    if "intention" in settings.ways:
        found["intention"] = top_heads(heads.intention, k)
    store = study.store("boosts", slot=slot)
    for way, examples in (("conflict gradient", conflict), ("alone gradient", alone)):
        if way in settings.ways:

            def run(examples: Sequence[Any] = examples) -> dict[str, Any]:
                size = max(1, settings.batch_size // 2)
                return {"values": head_boost_gradients(study.model, examples, slot, batch_size=size).values}

            about = [[e.emotion, e.context_emotion] for e in examples]  # what leads over what
            values = store.do([examples, about], run)["values"]
            found[way] = top_heads(Scores(values, ("example", "layer", "head")), k)
    return found


@stage(wheels=None, out=None, progress=True)
def compare_head_rankings(
    study: Study,
    mechanism: Mapping[str, Sequence[Any]],
    validation: Mapping[str, Sequence[Any]],
    slot: AnswerPosition,
    heads: KeyHeads,
    settings: Settings,
) -> HeadRankings:
    """Rank heads on the mechanism's conditions in each way, and judge each way in each mode on the validation's.

    Args:
        study: the model, or a `Study` that holds `wheels`, `out` and `progress`.
        mechanism, validation: examples by the name of their condition, of different identities.
        slot: where the emotion is said.
        heads: what `key_heads` found.
        settings: ways, modes and sizes.
        wheels, out, progress: as in `evaluate`."""
    import pandas as pd

    known = set(slot.emotions)
    conflict = [e for c, examples in mechanism.items() if c.startswith("conflict") for e in examples]
    conflict = [e for e in conflict if e.emotion in known and e.context_emotion in known]
    if settings.conflict_examples is not None and len(conflict) > settings.conflict_examples:
        step = len(conflict) / settings.conflict_examples
        conflict = [conflict[int(i * step)] for i in range(settings.conflict_examples)]
    alone = [e for e in mechanism["alone"] if e.emotion in known]
    rankings = rank_heads(study, conflict, alone, slot, heads, settings)
    methods, entries = [], []
    for way, chosen in rankings.items():
        for mode in settings.modes:
            made = vee(chosen, FIRST_BETA, mode=mode)
            about = {"way": way, "mode": mode, "beta": FIRST_BETA, "heads": [list(h) for h in chosen]}
            methods.append(Method(name=f"{way}, {mode}", interventions=made, settings=about))
            entries.append((way, mode))
    found = evaluate(study, validation, methods)
    rows: list[dict[str, Any]] = []
    measure = fluency_of(study, validation)
    for (way, mode), method in zip(entries, methods, strict=True):
        score, harm = trial_score(found, method.name)
        ratio = fluency_ratio(study.model, found, method.name, study.wheels, measure)
        allowed = harm <= HARM and ratio <= FLUENCY
        row = {"way": way, "mode": mode, "plain": trial_score(found, "plain")[0], "worth": score, "harm": harm}
        rows.append(row | {"perplexity": ratio, "allowed": allowed})
    able = [i for i, row in enumerate(rows) if row["allowed"]] or list(range(len(rows)))
    best = max(able, key=lambda i: rows[i]["worth"])
    return HeadRankings(rankings=rankings, table=pd.DataFrame(rows), winner=entries[best])


def fluency_of(study: Study, conditions: Mapping[str, Sequence[Any]]) -> Fluency:
    """Return a measure of the fluency of answers to these conditions, which keeps results for all methods."""
    emotions = [e.emotion for examples in conditions.values() for e in examples]
    return Fluency(study.model, emotions, study.wheels, batch_size=study.asking.batch_size, out=study.out)


def own_families(
    ranked: HeadRankings, neurons: KeyNeurons, adaptive: Adaptive, settings: Settings
) -> list[tuple[str, list[dict[str, Any]], Any]]:
    """Return (name, grid, build) of VEE, ENA, VEENA and its adaptive variant."""
    heads, mode, found = ranked.heads, ranked.mode, neurons.neurons
    betas, gammas, n = list(settings.betas), list(settings.gammas), settings.trials
    # The comparison of rankings and modes spent trials of VEE, the winner's at FIRST_BETA among them.
    others = [{"beta": b} for b in betas if b != FIRST_BETA]
    doses = sorted([{"beta": FIRST_BETA}, *spaced(others, max(1, n - len(ranked.table)))], key=lambda x: x["beta"])
    sizes = sorted({min(10, len(found)), len(found)})
    middle = gammas[-3:-1] or gammas  # a grid of one has no middle

    def build_vee(beta: float) -> Method:
        return Method(name="VEE", interventions=vee(heads, beta, mode=mode), settings={"mode": mode})

    def build_ena(gamma: float, k: int) -> Method:
        return Method(name="ENA", interventions=ena(found[:k], gamma))

    def build_veena(beta: float, gamma: float) -> Method:
        made = veena(heads, found, beta, gamma, mode=mode)
        return Method(name="VEENA", interventions=made, settings={"mode": mode})

    def build_adaptive(beta: float, gamma: float, kind: str) -> Method:
        return adaptive.method(heads, found, beta, gamma, kind, mode=mode)

    return [
        ("VEE", doses, build_vee),
        ("ENA", spaced([{"gamma": g, "k": k} for g in gammas for k in sizes], n), build_ena),
        ("VEENA", spaced([{"beta": b, "gamma": g} for b in betas for g in gammas[::2]], n), build_veena),
        (
            "VEENA adaptive",
            spaced([{"beta": b, "gamma": g, "kind": k} for b in betas[-4:] for g in middle for k in KINDS], n),
            build_adaptive,
        ),
    ]


@stage(wheels=None, out=None, progress=True)
def tune_baselines(
    study: Study,
    validation: Mapping[str, Sequence[Any]],
    ranked: HeadRankings,
    neurons: KeyNeurons,
    adaptive: Adaptive,
    directions: Any,
    key_layer: int,
    settings: Settings,
) -> dict[str, Tuned]:
    """Tune every family on validation: our own first, then the baselines with as many trials each.

    The guards are those of `tune`, other questions (`settings.questions`) among them.

    Args:
        study: the model, or a `Study` that holds `wheels`, `out` and `progress`.
        validation: examples by the name of their condition.
        ranked, neurons, adaptive: the heads, neurons and adaptive strength of our own families.
        directions, key_layer: for plain steering.
        settings: grids and numbers of trials.
        wheels, out, progress: as in `evaluate`."""
    families = own_families(ranked, neurons, adaptive, settings)
    if not neurons.neurons:
        families = [f for f in families if f[0] == "VEE"]
    if settings.baselines:
        n = min(12, settings.trials)
        others = all_baselines(study.model, directions=directions, key_layer=key_layer, trials=n, seed=settings.seed)
        families += [(f.name, spaced(list(f.grid), settings.trials), f.build) for f in others]
    asked = None
    if settings.attribute_harm is not None:
        asked = other_questions(validation["alone"][: settings.asked_pictures], settings.questions)
    guards: dict[str, Any] = {"others": asked, "attribute_harm": settings.attribute_harm or 0.0}
    guards["measure"] = fluency_of(study, validation)
    return {name: tune(study, validation, name, grid, build, **guards) for name, grid, build in families}


def final_circuit(tuned: Mapping[str, Tuned], name: str, settings: Settings) -> Circuit:
    """Return VEENA's tuned interventions (VEE's where there are no neurons) as a circuit that says how it was made."""
    best = tuned.get("VEENA", tuned["VEE"])
    made = best.method.interventions
    assert not callable(made)
    about = {**dict(best.method.settings), "model": name, "preset": settings.preset, "seed": settings.seed}
    return Circuit(list(made), best.family, about)


@stage(wheels=None, out=None, progress=True)
def dose_response(
    study: Study,
    validation: Mapping[str, Sequence[Any]],
    ranked: HeadRankings,
    neurons: KeyNeurons,
    settings: Settings,
) -> pd.DataFrame:
    """Return a table of the hit rate by condition over doses of VEE (each mode) and ENA on the validation images.

    Args:
        study: the model, or a `Study` that holds `wheels`, `out` and `progress`.
        validation: examples by the name of their condition.
        ranked, neurons: the heads and neurons that are strengthened.
        settings: the doses (`betas`, `gammas`) and modes.
        wheels, out, progress: as in `evaluate`."""
    import pandas as pd

    methods, about = [], []
    for mode in settings.modes:
        for beta in settings.betas:
            made = vee(ranked.heads, beta, mode=mode)
            chosen = {"mode": mode, "beta": beta, "heads": [list(h) for h in ranked.heads]}
            methods.append(Method(name=f"VEE, {mode}, {beta:g}", interventions=made, settings=chosen))
            about.append((f"VEE, {mode}", beta))
    for gamma in settings.gammas if neurons.neurons else ():
        made = ena(neurons.neurons, gamma)
        chosen = {"gamma": gamma, "neurons": [list(n) for n in neurons.neurons]}
        methods.append(Method(name=f"ENA, {gamma:g}", interventions=made, settings=chosen))
        about.append(("ENA", gamma))
    found = evaluate(study, validation, methods)
    table = found.table()
    rows = []
    for (kind, dose), method in zip(about, methods, strict=True):
        for row in table[table["method"] == method.name].to_dict("records"):
            rows.append(
                {"method": kind, "dose": dose, "condition": row["condition"], "hit": row["hit"]}
                | {"low": row["low"], "high": row["high"], "false": row["false"]}
            )
    for kind in dict.fromkeys(k for k, _ in about):
        for row in table[table["method"] == "plain"].to_dict("records"):
            rows.append(
                {"method": kind, "dose": 1.0, "condition": row["condition"], "hit": row["hit"]}
                | {"low": row["low"], "high": row["high"], "false": row["false"]}
            )
    return pd.DataFrame(rows).sort_values(["method", "condition", "dose"], ignore_index=True)
