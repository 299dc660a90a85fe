"""Tuning of a method's settings on a validation split, every family with the same number of trials.

Trials are ranked by their mean hit rate on the conditions where context and image disagree, among those that pass three
checks: where they agree, or no context is there, the hit rate falls by at most `harm`; the answers stay fluent, since
broken text can hit by chance; and other questions about the images, where some are given, are answered as before but
for `attribute_harm`. Held-out images are never used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from veena_lens.emotion.judge.evaluation import Evaluation, evaluate
from veena_lens.emotion.judge.fluency import FLUENCY, Fluency
from veena_lens.emotion.judge.side_effects import Questions
from veena_lens.emotion.methods import PLAIN, Method
from veena_lens.emotion.study import Study, stage

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM

HARM = 0.02
ATTRIBUTE_HARM = 0.05  # share of other questions that may be lost


@dataclass(frozen=True, eq=False, kw_only=True)
class Tuned:
    """The choice that tuning made for a family.

    Attributes:
        family: its name.
        method: the method with the chosen settings.
        trials: a table of all trials: settings, score (column "worth"), the worst fall ("harm"), perplexity, whether it
            was allowed; with other questions also the share answered right, NaN for trials that were not asked.
        score: mean hit rate of the chosen trial over the conflict conditions.
    """

    family: str
    method: Method
    trials: Any
    score: float

    def __repr__(self) -> str:
        allowed = int(self.trials["allowed"].sum())
        trials = f"{allowed} of {len(self.trials)} trials allowed"
        return f"Tuned({self.family}: {dict(self.method.settings)}, score {self.score:.3f}; {trials})"


def is_conflict(examples: Sequence[Any]) -> bool:
    """Return True where the examples' contexts name another emotion than the image."""
    return any(e.context_emotion not in (None, e.emotion) for e in examples)


def trial_score(evaluation: Evaluation, method: str) -> tuple[float, float]:
    """Return (score, harm): the mean hit rate over conflict conditions (all conditions where none is), and the largest
    fall of the hit rate, or rise of false emotions, in the other conditions."""
    conflict = [c for c, examples in evaluation.examples.items() if is_conflict(examples)]
    wanted = conflict or list(evaluation.examples)
    score = sum(evaluation.hits[c][method].mean().item() for c in wanted) / len(wanted)
    falls = [0.0]
    for c in evaluation.examples:
        if c in conflict:
            continue
        falls.append((evaluation.hits[c][evaluation.baseline] - evaluation.hits[c][method]).mean().item())
        false = evaluation.false_emotions[c]
        before, after = false[evaluation.baseline].nanmean().item(), false[method].nanmean().item()
        if before == before and after == after:
            falls.append(after - before)
    return score, max(falls)


def fluency_ratio(
    model: HookedVLM, evaluation: Evaluation, method: str, wheels: Any, fluency: Fluency | None = None
) -> float:
    """Return the perplexity of a method's answers relative to the plain model's.

    Perplexity under the untouched model, emotion words left out: geometric mean over the answers, the worst
    condition's, at least 1. fluency: measures, and keeps what it measured for the next method."""
    if fluency is None:
        emotions = [e.emotion for examples in evaluation.examples.values() for e in examples]
        fluency = Fluency(model, emotions, wheels)
    worst = 0.0
    for condition, examples in evaluation.examples.items():
        said, plain = evaluation.texts[condition][method], evaluation.texts[condition][evaluation.baseline]
        worst = max(worst, float(fluency.changes(examples, said, plain).mean()))
    return math.exp(worst)


@stage(wheels=None, batch_size=16, max_new_tokens=24, draws=2000, seed=0, out=None, progress=True)
def tune(
    study: Study,
    conditions: Mapping[str, Sequence[Any]],
    name: str,
    grid: Sequence[Mapping[str, Any]],
    build: Callable[..., Method],
    *,
    harm: float | int = HARM,
    fluency: float | int = FLUENCY,
    others: Questions | None = None,
    attribute_harm: float | int = ATTRIBUTE_HARM,
    measure: Fluency | None = None,
) -> Tuned:
    """Choose the settings of `grid` whose method scores best on the validation conditions without doing harm.

    Of equals the earlier in the grid is taken, so grids go from weak to strong. Where no trial is allowed, the least
    harmful of the fluent ones is returned, and `trials` says so.

    Args:
        study: the model, or a `Study` that holds the settings of `evaluate`.
        conditions: validation examples by the name of their condition.
        name: the family's name, which the method gets.
        grid: settings to try, from weak to strong.
        build: makes a method of one entry's settings.
        harm: how far the hit rate may fall where context and image agree, or no context is there.
        fluency: how many times the perplexity of the answers, emotion words left out, may grow in any condition.
        others: further questions about validation images, asked of the trials that pass the other guards, from the
            best on, until one passes.
        attribute_harm: how far the share of those answered right may fall.
        measure: keeps what was measured of fluency for the next family.

    Raises: ValueError for an empty grid."""
    import pandas as pd

    if not grid:
        raise ValueError(f"tune: the grid of {name!r} is empty.")
    methods = []
    for i, chosen in enumerate(grid):
        built = build(**chosen)
        about = {**built.settings, **{k: _plain(v) for k, v in chosen.items()}}
        methods.append(replace(built, name=f"{name} #{i}", settings=about))
    found = evaluate(study, conditions, [PLAIN, *methods])
    plain, _ = trial_score(found, PLAIN.name)
    rows: list[dict[str, Any]] = []
    for chosen, method in zip(grid, methods, strict=True):
        score, fall = trial_score(found, method.name)
        ratio = fluency_ratio(study.model, found, method.name, study.wheels, measure)
        about = {k: _plain(v) for k, v in chosen.items()}
        allowed = fall <= harm and ratio <= fluency
        rows.append({**about, "worth": score, "harm": fall, "perplexity": ratio, "allowed": allowed})
    order = sorted((i for i, row in enumerate(rows) if row["allowed"]), key=lambda i: -rows[i]["worth"])
    lost = [0.0] * len(rows)
    if others is not None and len(others):
        order = _kept(study, methods, rows, order, lost, others, attribute_harm)
    table = pd.DataFrame(rows).assign(plain=plain)
    best = (
        order[0]
        if order
        else min(range(len(rows)), key=lambda i: (rows[i]["perplexity"] > fluency, max(rows[i]["harm"], lost[i])))
    )
    final = replace(methods[best], name=name)
    return Tuned(family=name, method=final, trials=table, score=float(rows[best]["worth"]))


def _kept(
    study: Study,
    methods: Sequence[Method],
    rows: list[dict[str, Any]],
    order: Sequence[int],
    lost: list[float],
    others: Questions,
    attribute_harm: float | int,
) -> list[int]:
    """Return the first trial of `order` that leaves other answers right, in a list, else an empty one; notes what was
    seen."""
    store = study.store("other questions", others=others)

    def right(method: Method) -> float:
        def run() -> dict[str, Any]:
            return {"right": others.share_right(study.model, method, batch_size=study.asking.batch_size)}

        return float(store.do(method, run)["right"])

    for row in rows:
        row["attributes"] = math.nan
    before = right(PLAIN) if order else math.nan
    for i in order:
        rows[i]["attributes"] = right(methods[i])
        lost[i] = before - rows[i]["attributes"]
        if lost[i] <= attribute_harm:
            return [i]
        rows[i]["allowed"] = False
    return []


def _plain(value: Any) -> Any:
    """Return a setting as a table and JSON hold it."""
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)
