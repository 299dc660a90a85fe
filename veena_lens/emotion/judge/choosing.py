"""What a run chooses on validation: how heads are ranked and in which mode they act, then every family's settings.

Heads are ranked on the mechanism's identities and compared on the validation's; settings are tuned there with the same
number of trials for every family. The comparison of rankings counts as trials of VEE.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from veena_lens.emotion.settings import Settings
from veena_lens.emotion.words.wheels import EmotionWheels
from veena_lens.interventions import Circuit
from veena_lens.long_runs import Store
from veena_lens.scores import Scores

Head = tuple[int, int]
FIRST_BETA = 3.0  # at which rankings and modes are compared


@dataclass(frozen=True, eq=False, kw_only=True)
class HeadRankings:
    """`rankings`: heads by each way of ranking; `table`: way, mode, worth and harm on validation; `winner`: (way,
    mode), with its `heads`."""

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
    """The images of a split under every condition: alone, consistent, and in conflict at each strength."""
    examples = spread_examples(part, most)
    return context_conditions(
        examples, seed=settings.seed, held_out=held_out, strengths=settings.strengths, events=settings.events
    )


def spread_examples(part: Any, most: int | None) -> list[Any]:
    """Each image once, neutral ones too; at most so many, emotions in turn and identities in turn."""
    once: dict[tuple[str, str], Any] = {}
    for e in part.examples:
        once.setdefault((str(e.picture), e.emotion), e)
    found = list(once.values())
    if most is None or len(found) <= most:
        return found
    queues: dict[str, list[Any]] = {}
    for e in found:
        queues.setdefault(e.emotion, []).append(e)
    out: list[Any] = []
    for turn in range(len(found)):
        for k, queue in enumerate(queues.values()):
            if turn < len(queue) and len(out) < most:
                out.append(queue[(turn + k) % len(queue)])
    return out


def rank_heads(
    model: Any,
    conflict: Sequence[Any],
    alone: Sequence[Any],
    slot: AnswerPosition,
    heads: KeyHeads,
    settings: Settings,
    out: Path | None,
) -> dict[str, list[Head]]:
    """The best `k_heads` heads by each way of ranking.

    "patching": effect on the key layer; "intention": I_delta; "conflict gradient": what strengthening a head's look at
    the image would add to the image's lead over the context; "alone gradient": the same without contexts."""
    k = settings.k_heads
    found: dict[str, list[Head]] = {}
    if "patching" in settings.ways:
        chosen = heads.heads or [(int(r.layer), int(r.head)) for r in heads.table.head(k).itertuples()]
        found["patching"] = chosen[:k]
    if "intention" in settings.ways:
        found["intention"] = top_heads(heads.intention, k)
    store = Store(out, {"what": "boosts", "model": model, "slot": slot})
    for way, examples in (("conflict gradient", conflict), ("alone gradient", alone)):
        if way in settings.ways:

            def run(examples: Sequence[Any] = examples) -> dict[str, Any]:
                scores = head_boost_gradients(model, examples, slot, batch_size=max(1, settings.batch_size // 2))
                return {"values": scores.values}

            told = [[e.emotion, e.context_emotion] for e in examples]  # what leads over what
            values = store.do([examples, told], run)["values"]
            found[way] = top_heads(Scores(values, ("example", "layer", "head")), k)
    return found


def compare_head_rankings(
    model: Any,
    mechanism: Mapping[str, Sequence[Any]],
    validation: Mapping[str, Sequence[Any]],
    slot: AnswerPosition,
    heads: KeyHeads,
    settings: Settings,
    *,
    wheels: Any = None,
    out: Path | None = None,
    progress: bool = True,
) -> HeadRankings:
    """Rank heads on the mechanism's conditions in each way, and judge each way in each mode on the validation's."""
    import pandas as pd

    known = set(slot.emotions)
    conflict = [e for c, examples in mechanism.items() if c.startswith("conflict") for e in examples]
    conflict = [e for e in conflict if e.emotion in known and e.context_emotion in known]
    if settings.conflict_examples is not None and len(conflict) > settings.conflict_examples:
        step = len(conflict) / settings.conflict_examples
        conflict = [conflict[int(i * step)] for i in range(settings.conflict_examples)]
    alone = [e for e in mechanism["alone"] if e.emotion in known]
    rankings = rank_heads(model, conflict, alone, slot, heads, settings, out)
    methods, entries = [], []
    for way, chosen in rankings.items():
        for mode in settings.modes:
            made = vee(chosen, FIRST_BETA, mode=mode)
            about = {"way": way, "mode": mode, "beta": FIRST_BETA, "heads": [list(h) for h in chosen]}
            methods.append(Method(name=f"{way}, {mode}", interventions=made, settings=about))
            entries.append((way, mode))
    found = evaluate(
        model, validation, methods, wheels=wheels, batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens, draws=settings.draws, out=out, progress=progress,
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    measure = fluency_of(model, validation, wheels, settings, out)
    for (way, mode), method in zip(entries, methods, strict=True):
        worth, harm = trial_score(found, method.name)
        ratio = fluency_ratio(model, found, method.name, wheels, measure)
        allowed = harm <= HARM and ratio <= FLUENCY
        row = {"way": way, "mode": mode, "plain": trial_score(found, "plain")[0], "worth": worth, "harm": harm}
        rows.append(row | {"perplexity": ratio, "allowed": allowed})
    able = [i for i, row in enumerate(rows) if row["allowed"]] or list(range(len(rows)))
    best = max(able, key=lambda i: rows[i]["worth"])
    return HeadRankings(rankings=rankings, table=pd.DataFrame(rows), winner=entries[best])


def fluency_of(
    model: Any, conditions: Mapping[str, Sequence[Any]], wheels: Any, settings: Settings, out: Path | None
) -> Fluency:
    """What measures the fluency of answers to these conditions, and keeps it for all methods."""
    emotions = [e.emotion for examples in conditions.values() for e in examples]
    wheels = EmotionWheels.default() if wheels is None else wheels
    return Fluency(model, emotions, wheels, batch_size=settings.batch_size, out=out)


def own_families(
    ways: HeadRankings, neurons: KeyNeurons, adaptive: Adaptive, settings: Settings
) -> list[tuple[str, list[dict[str, Any]], Any]]:
    """(name, grid, build) of VEE, ENA, VEENA and its adaptive variant."""
    heads, mode, found = ways.heads, ways.mode, neurons.neurons
    betas, gammas, n = list(settings.betas), list(settings.gammas), settings.trials
    # The comparison of rankings and modes spent trials of VEE, the winner's at FIRST_BETA among them.
    others = [{"beta": b} for b in betas if b != FIRST_BETA]
    doses = sorted([{"beta": FIRST_BETA}, *spaced(others, max(1, n - len(ways.table)))], key=lambda x: x["beta"])
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


def spaced(grid: list[dict[str, Any]], n: int) -> list[dict[str, Any]]:
    """`n` entries of a grid, evenly spaced from its first to its last."""
    if len(grid) <= n:
        return grid
    if n == 1:
        return [grid[len(grid) // 2]]
    return [grid[round(i * (len(grid) - 1) / (n - 1))] for i in range(n)]


def tune_baselines(
    model: Any,
    validation: Mapping[str, Sequence[Any]],
    ways: HeadRankings,
    neurons: KeyNeurons,
    adaptive: Adaptive,
    directions: Any,
    key_layer: int,
    settings: Settings,
    *,
    wheels: Any = None,
    out: Path | None = None,
    progress: bool = True,
) -> dict[str, Tuned]:
    """Every family's best settings on validation: ours first, then the rivals with as many trials each.

    The guards are those of `tune`, other questions (`settings.questions`) among them."""
    families = own_families(ways, neurons, adaptive, settings)
    if not neurons.neurons:
        families = [f for f in families if f[0] == "VEE"]
    if settings.rivals:
        from veena_lens.emotion.enhance.baselines import all_baselines as rival_families

        n = min(12, settings.trials)
        rivals = rival_families(model, directions=directions, key_layer=key_layer, trials=n, seed=settings.seed)
        families += [(f.name, spaced(list(f.grid), settings.trials), f.build) for f in rivals]
    others = None
    if settings.attribute_harm is not None:
        others = other_questions(validation["alone"][: settings.asked_pictures], settings.questions)
    guards = {
        "others": others, "attribute_harm": settings.attribute_harm or 0.0,
        "measure": fluency_of(model, validation, wheels, settings, out),
    }  # fmt: skip
    tuned = {}
    for name, grid, build in families:
        tuned[name] = tune(
            model, validation, name, grid, build, **guards, wheels=wheels, batch_size=settings.batch_size,
            max_new_tokens=settings.max_new_tokens, draws=settings.draws, out=out, progress=progress,
        )  # fmt: skip
    return tuned


def final_circuit(tuned: Mapping[str, Tuned], name: str, settings: Settings) -> Circuit:
    """VEENA's tuned interventions (VEE's where there are no neurons) as a circuit that says how it was made."""
    best = tuned.get("VEENA", tuned["VEE"])
    made = best.method.interventions
    assert not callable(made)
    about = {**dict(best.method.settings), "model": name, "preset": settings.preset, "seed": settings.seed}
    return Circuit(list(made), best.family, about)


def dose_response(
    model: Any,
    validation: Mapping[str, Sequence[Any]],
    ways: HeadRankings,
    neurons: KeyNeurons,
    settings: Settings,
    *,
    wheels: Any = None,
    out: Path | None = None,
    progress: bool = True,
) -> Any:
    """Hit rate by condition over doses of VEE (both modes) and ENA on the validation images: a table."""
    import pandas as pd

    methods, about = [], []
    for mode in settings.modes:
        for beta in settings.betas:
            made = vee(ways.heads, beta, mode=mode)
            chosen = {"mode": mode, "beta": beta, "heads": [list(h) for h in ways.heads]}
            methods.append(Method(name=f"VEE, {mode}, {beta:g}", interventions=made, settings=chosen))
            about.append((f"VEE, {mode}", beta))
    for gamma in settings.gammas if neurons.neurons else ():
        made = ena(neurons.neurons, gamma)
        chosen = {"gamma": gamma, "neurons": [list(n) for n in neurons.neurons]}
        methods.append(Method(name=f"ENA, {gamma:g}", interventions=made, settings=chosen))
        about.append(("ENA", gamma))
    found = evaluate(
        model, validation, methods, wheels=wheels, batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens, draws=settings.draws, out=out, progress=progress,
    )  # fmt: skip
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
