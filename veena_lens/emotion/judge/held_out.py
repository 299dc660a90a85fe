"""Held-out evaluation next to the main table: random components of the same layers, other images, side effects."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from veena_lens.emotion.enhance.random_controls import random_heads, random_neurons
from veena_lens.emotion.enhance.veena import ena, vee, veena
from veena_lens.emotion.judge.evaluation import NEUTRAL, Evaluation, evaluate
from veena_lens.emotion.judge.model_selection import HeadRankings
from veena_lens.emotion.judge.side_effects import (
    SideEffects,
    described_accuracy,
    latency_ratio,
    measure_side_effects,
    other_questions,
)
from veena_lens.emotion.judge.tuning import Tuned
from veena_lens.emotion.locate.neurons import KeyNeurons
from veena_lens.emotion.methods import PLAIN, Method
from veena_lens.emotion.settings import Settings
from veena_lens.emotion.study import Study, stage

DESCRIPTION = 48  # tokens


@dataclass(frozen=True, eq=False, kw_only=True)
class RandomControls:
    """The random controls. `table`: for VEE, ENA and VEENA and every condition, the hit rate of the chosen components
    ("real"), that of random ones of the same layers (mean, low and high of the middle 95 %), and the real one's
    percentile among them."""

    table: Any
    draws: int
    crowded: bool

    def __repr__(self) -> str:
        note = "; layers without room reuse chosen ones" if self.crowded else ""
        return f"RandomControls({self.draws} draws{note})\n{self.table.round(3).to_string(index=False)}"


@stage(wheels=None, out=None, progress=True)
def random_controls(
    study: Study,
    conditions: Mapping[str, Sequence[Any]],
    tuned: Mapping[str, Tuned],
    test: Evaluation,
    ranked: HeadRankings,
    neurons: KeyNeurons,
    settings: Settings,
) -> RandomControls:
    """Evaluate random heads and neurons with the settings that were tuned for the chosen ones.

    The random sets have as many members in each layer as the chosen ones.

    Args:
        study: the model, or a `Study` that holds `wheels`, `out` and `progress`.
        conditions: test examples by the name of their condition.
        tuned: what was tuned, by family.
        test: the evaluation of the tuned methods.
        ranked, neurons: the chosen heads and neurons.
        settings: `random_draws`, and the `random_conditions` that are asked.
        wheels, out, progress: as in `evaluate`."""
    import pandas as pd

    chosen = settings.random_conditions
    cfg = study.model.cfg
    names = [c for c in conditions if c == "alone" or c.startswith("conflict")] if chosen is None else list(chosen)
    wanted = {c: conditions[c] for c in names if c in conditions}
    rows, crowded = [], False
    n = settings.random_draws
    families: list[tuple[str, Any, Any]] = []
    if n and "VEE" in tuned:
        chosen = dict(tuned["VEE"].method.settings)
        drawn = random_heads(ranked.heads, cfg, n, settings.seed)
        crowded |= bool(drawn.crowded)
        families.append(("VEE", drawn, lambda x, s=chosen: vee(x, s["beta"], mode=s["mode"])))
    if n and "ENA" in tuned:
        chosen = dict(tuned["ENA"].method.settings)
        drawn = random_neurons(neurons.neurons[: chosen["k"]], cfg, n, settings.seed)
        crowded |= bool(drawn.crowded)
        families.append(("ENA", drawn, lambda x, s=chosen: ena(x, s["gamma"])))
    if n and "VEENA" in tuned:
        both = dict(tuned["VEENA"].method.settings)
        pairs = zip(
            random_heads(ranked.heads, cfg, n, settings.seed + 1),
            random_neurons(neurons.neurons, cfg, n, settings.seed + 1),
            strict=True,
        )
        families.append(
            ("VEENA", list(pairs), lambda x, s=both: veena(x[0], x[1], s["beta"], s["gamma"], mode=s["mode"]))
        )
    for name, drawn, build in families:
        methods = []
        for i, units in enumerate(drawn):
            made = build(units)
            about = {"made": made.name, "units": json.loads(json.dumps(units))}
            methods.append(Method(name=f"{name}, random {i}", interventions=made, settings=about))
        found = evaluate(study, wanted, methods)
        for condition in wanted:
            values = torch.stack([found.hits[condition][m.name].mean() for m in methods])
            real = test.hits[condition][name].mean()
            low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
            below = float((values < real).double().mean() + 0.5 * (values == real).double().mean())
            rows.append(
                {"method": name, "condition": condition, "plain": float(test.hits[condition][PLAIN.name].mean())}
                | {"real": float(real), "random": float(values.mean()), "low": low, "high": high, "percentile": below}
            )
    return RandomControls(table=pd.DataFrame(rows), draws=n, crowded=crowded)


@stage(out=None, progress=True)
def side_effects(
    study: Study,
    conditions: Mapping[str, Sequence[Any]],
    test: Evaluation,
    tuned: Mapping[str, Tuned],
    settings: Settings,
) -> list[SideEffects]:
    """Measure the side effects of the plain model and of every tuned method, on test images without context.

    Fluency, repetition, drift on neutral images, other questions' answers, and time. Attributes only where
    `settings.questions` has questions.

    Args:
        study: the model, or a `Study` that holds `out` and `progress`.
        conditions: test examples by the name of their condition; "alone" is used.
        test: the evaluation of the tuned methods.
        tuned: what was tuned, by family.
        settings: what else is asked.
        out, progress: as in `evaluate`."""
    model, asking = study.model, study.asking
    examples = list(conditions["alone"])
    neutral = [e for e in examples if e.emotion == NEUTRAL]
    some = examples[: settings.asked_pictures]
    others = other_questions(some, settings.questions)
    methods = [PLAIN, *[t.method for t in tuned.values()]]
    names = ("questions", "describe", "templates", "latency_repeats")
    about = {**{name: getattr(settings, name) for name in names}, "asking": asking, "asked": len(some)}

    def measured(method: Method) -> dict[str, Any]:
        said = test.texts["alone"][method.name]
        one = measure_side_effects(study, examples, method, said, neutral=neutral).to_dict()
        timed = some[: asking.batch_size]
        one["latency"] = latency_ratio(model, timed, method, repeats=settings.latency_repeats, **asking.sizes)
        if len(others):
            one["attributes"] = others.share_right(model, method, batch_size=asking.batch_size)
        if settings.describe and settings.templates:
            told = [e.asked(settings.describe) for e in some]
            said = study.but(max_new_tokens=DESCRIPTION).answers(told, method)
            facts = [{name: str(value) for name, value in e.attributes.items()} for e in some]
            one["described"] = float(described_accuracy(said, facts, settings.templates).nanmean())
        return {"one": one}

    def name(method: Method) -> list[Any]:
        return [method.name, method, test.texts["alone"][method.name]]

    found = study.each("side effects", methods, measured, name=name, examples=examples, **about)
    return [SideEffects(**x["one"]) for x in found]
