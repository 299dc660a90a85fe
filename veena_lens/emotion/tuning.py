"""Choosing a method's settings on a validation split, every family with the same number of trials.

A trial's worth is the mean hit rate over the conditions where context and picture disagree. It must do no harm: where
they agree, or no context is there, the hit rate may fall by at most `harm`; and it must leave the answers fluent, since
broken text can hit by chance. Nothing here sees held-out pictures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veena_lens.emotion.evaluation import Evaluation, evaluate
from veena_lens.emotion.layer_search import FLUENCY
from veena_lens.emotion.methods import PLAIN, Method
from veena_lens.emotion.side_effects import perplexity
from veena_lens.emotion.slot import emotion_tokens
from veena_lens.emotion.wheels import EmotionWheels

HARM = 0.02


@dataclass(frozen=True, eq=False, kw_only=True)
class Tuned:
    """The method chosen, and the table of all trials: settings, worth, the worst fall, whether it was allowed."""

    family: str
    method: Method
    trials: Any
    worth: float

    def __repr__(self) -> str:
        allowed = int(self.trials["allowed"].sum())
        trials = f"{allowed} of {len(self.trials)} trials allowed"
        return f"Tuned({self.family}: {dict(self.method.settings)}, worth {self.worth:.3f}; {trials})"


def is_conflict(examples: Sequence[Any]) -> bool:
    """True where the examples' contexts name another emotion than the picture."""
    return any(e.context_emotion not in (None, e.emotion) for e in examples)


def worth_of(evaluation: Evaluation, method: str) -> tuple[float, float]:
    """(worth, harm): mean hit rate over conflict conditions (all conditions where none is), and the largest fall of
    the hit rate, or rise of false emotions, in the other conditions."""
    conflict = [c for c, examples in evaluation.examples.items() if is_conflict(examples)]
    wanted = conflict or list(evaluation.examples)
    worth = sum(evaluation.hits[c][method].mean().item() for c in wanted) / len(wanted)
    falls = [0.0]
    for c in evaluation.examples:
        if c in conflict:
            continue
        falls.append((evaluation.hits[c][evaluation.baseline] - evaluation.hits[c][method]).mean().item())
        false = evaluation.false_emotions[c]
        before, after = false[evaluation.baseline].nanmean().item(), false[method].nanmean().item()
        if before == before and after == after:
            falls.append(after - before)
    return worth, max(falls)


def fluency_ratio(model: Any, evaluation: Evaluation, method: str, wheels: Any) -> float:
    """Perplexity of a method's answers under the untouched model, emotion words left out, relative to the plain
    model's: geometric means over the answers that changed, the worst condition's (1 where none changed)."""
    emotions = sorted({e.emotion for examples in evaluation.examples.values() for e in examples})
    skip = emotion_tokens(model, emotions, wheels)
    worst = 1.0
    for condition, examples in evaluation.examples.items():
        said, plain = evaluation.texts[condition][method], evaluation.texts[condition][evaluation.baseline]
        changed = [i for i, (a, b) in enumerate(zip(said, plain, strict=True)) if a != b]
        if not changed:
            continue
        some = [examples[i] for i in changed]
        mine = perplexity(model, some, [said[i] for i in changed], skip=skip).double().log()
        before = perplexity(model, some, [plain[i] for i in changed], skip=skip).double().log()
        difference = (mine - before).nanmean().item()
        if difference == difference:
            worst = max(worst, math.exp(difference * len(changed) / len(examples)))
    return worst


def tune(
    model: Any,
    conditions: Mapping[str, Sequence[Any]],
    name: str,
    grid: Sequence[Mapping[str, Any]],
    build: Callable[..., Method],
    *,
    harm: float | int = HARM,
    fluency: float | int = FLUENCY,
    out: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> Tuned:
    """The settings of `grid` whose method is worth most on the validation conditions without doing harm.

    `fluency`: how often the perplexity of the answers, emotion words left out, may grow in any condition. Of equals
    the earlier in the grid is taken, so grids go from weak to strong. Where no trial is allowed, the least harmful of
    the fluent ones is returned, and `trials` says so.
    `settings`: those of `evaluate`. Raises: ValueError for an empty grid.
    """
    import pandas as pd

    if not grid:
        raise ValueError(f"tune: the grid of {name!r} is empty.")
    methods = []
    for i, chosen in enumerate(grid):
        built = build(**chosen)
        methods.append(
            Method(
                name=f"{name} #{i}",
                interventions=built.interventions,
                prompt=built.prompt,
                decoding=built.decoding,
                about=built.about,
                settings={**built.settings, **{k: _plain(v) for k, v in chosen.items()}},
            )
        )
    wheels = settings.get("wheels") or EmotionWheels.default()
    found = evaluate(model, conditions, [PLAIN, *methods], out=out, progress=progress, **settings)
    plain, _ = worth_of(found, PLAIN.name)
    rows: list[dict[str, Any]] = []
    for chosen, method in zip(grid, methods, strict=True):
        worth, fall = worth_of(found, method.name)
        ratio = fluency_ratio(model, found, method.name, wheels)
        about = {k: _plain(v) for k, v in chosen.items()}
        allowed = fall <= harm and ratio <= fluency
        rows.append({**about, "worth": worth, "harm": fall, "perplexity": ratio, "allowed": allowed})
    table = pd.DataFrame(rows).assign(plain=plain)
    able = [i for i, row in enumerate(rows) if row["allowed"]]
    best = (
        max(able, key=lambda i: rows[i]["worth"])
        if able
        else min(range(len(rows)), key=lambda i: (rows[i]["perplexity"] > fluency, rows[i]["harm"]))
    )
    chosen = methods[best]
    final = Method(
        name=name,
        interventions=chosen.interventions,
        prompt=chosen.prompt,
        decoding=chosen.decoding,
        about=chosen.about,
        settings=chosen.settings,
    )
    return Tuned(family=name, method=final, trials=table, worth=float(rows[best]["worth"]))


def _plain(value: Any) -> Any:
    """A setting as a table and JSON hold it."""
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)
