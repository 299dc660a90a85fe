"""The judgement beside the main table: random components of the same layers, other images, and side effects."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from veena_lens.emotion.enhance.random_controls import random_heads, random_neurons
from veena_lens.emotion.enhance.veena import ena, vee, veena
from veena_lens.emotion.judge.choosing import HeadRankings
from veena_lens.emotion.judge.evaluation import NEUTRAL, Evaluation, evaluate
from veena_lens.emotion.judge.side_effects import (
    SideEffects,
    described_accuracy,
    latency_ratio,
    measure_side_effects,
    other_questions,
)
from veena_lens.emotion.judge.tuning import Tuned
from veena_lens.emotion.locate.neurons import KeyNeurons
from veena_lens.emotion.methods import PLAIN, Method, generate_answers
from veena_lens.emotion.settings import Settings
from veena_lens.long_runs import Store

DESCRIPTION = 48  # tokens


@dataclass(frozen=True, eq=False, kw_only=True)
class RandomControls:
    """`table`: for VEE, ENA and VEENA and every condition, the hit rate of the chosen components ("real"), that of
    random ones of the same layers (mean, low and high of the middle 95 %), and the real one's percentile among them."""

    table: Any
    draws: int
    crowded: bool

    def __repr__(self) -> str:
        note = "; layers without room reuse chosen ones" if self.crowded else ""
        return f"RandomControls({self.draws} draws{note})\n{self.table.round(3).to_string(index=False)}"


def random_controls(
    model: Any,
    conditions: Mapping[str, Sequence[Any]],
    tuned: Mapping[str, Tuned],
    test: Evaluation,
    ways: HeadRankings,
    neurons: KeyNeurons,
    settings: Settings,
    *,
    wheels: Any = None,
    out: Path | None = None,
    progress: bool = True,
) -> RandomControls:
    """Layer-matched random heads and neurons with the settings that were tuned for the real ones, under
    `settings.random_conditions`. The random sets have as many members in each layer as the chosen ones."""
    import pandas as pd

    chosen = settings.random_conditions
    names = [c for c in conditions if c == "alone" or c.startswith("conflict")] if chosen is None else list(chosen)
    wanted = {c: conditions[c] for c in names if c in conditions}
    rows, crowded = [], False
    n = settings.random_draws
    families: list[tuple[str, Any, Any]] = []
    if n and "VEE" in tuned:
        chosen = dict(tuned["VEE"].method.settings)
        drawn = random_heads(ways.heads, model.cfg, n, settings.seed)
        crowded |= bool(drawn.crowded)
        families.append(("VEE", drawn, lambda x, s=chosen: vee(x, s["beta"], mode=s["mode"])))
    if n and "ENA" in tuned:
        chosen = dict(tuned["ENA"].method.settings)
        drawn = random_neurons(neurons.neurons[: chosen["k"]], model.cfg, n, settings.seed)
        crowded |= bool(drawn.crowded)
        families.append(("ENA", drawn, lambda x, s=chosen: ena(x, s["gamma"])))
    if n and "VEENA" in tuned:
        both = dict(tuned["VEENA"].method.settings)
        pairs = zip(
            random_heads(ways.heads, model.cfg, n, settings.seed + 1),
            random_neurons(neurons.neurons, model.cfg, n, settings.seed + 1),
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
        found = evaluate(
            model, wanted, methods, wheels=wheels, batch_size=settings.batch_size,
            max_new_tokens=settings.max_new_tokens, draws=settings.draws, out=out, progress=progress,
        )  # fmt: skip
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


def elsewhere(part: Any, settings: Settings) -> dict[str, list[Any]]:
    """Pictures of other kinds (held-out styles, emoji), by split and style, without contexts."""
    found: dict[str, list[Any]] = {}
    for example in part.examples:
        name = example.style if example.split in ("", example.style) else f"{example.split}: {example.style}"
        found.setdefault(name, []).append(example)
    return {name: _most(examples, settings.test_pictures) for name, examples in found.items()}


def _most(examples: list[Any], most: int | None) -> list[Any]:
    return examples if most is None else examples[:most]


def side_effects(
    model: Any,
    conditions: Mapping[str, Sequence[Any]],
    test: Evaluation,
    tuned: Mapping[str, Tuned],
    settings: Settings,
    *,
    out: Path | None = None,
    progress: bool = True,
) -> list[SideEffects]:
    """Fluency, repetition, drift on neutral images, other questions' answers and time, of the plain model and of
    every tuned method, on test images without context. Attributes only where `settings.questions` has questions."""
    examples = list(conditions["alone"])
    neutral = [e for e in examples if e.emotion == NEUTRAL]
    some = examples[: settings.asked_pictures]
    others = other_questions(some, settings.questions)
    methods = [PLAIN, *[t.method for t in tuned.values()]]
    asking = asdict(settings)
    names = ("questions", "describe", "templates", "lead_in", "batch_size", "max_new_tokens", "latency_repeats")
    about = {"what": "side effects", **{name: asking[name] for name in names}, "asked": len(some)}
    store = Store(out, about | {"model": model, "examples": examples})

    def measured(method: Method) -> dict[str, Any]:
        one = measure_side_effects(
            model, examples, method, test.texts["alone"][method.name], neutral=neutral, lead_in=settings.lead_in,
            batch_size=settings.batch_size, max_new_tokens=settings.max_new_tokens,
        ).to_dict()  # fmt: skip
        one["latency"] = latency_ratio(
            model, some[: settings.batch_size], method, repeats=settings.latency_repeats,
            batch_size=settings.batch_size, max_new_tokens=settings.max_new_tokens,
        )  # fmt: skip
        if len(others):
            one["attributes"] = others.share_right(model, method, batch_size=settings.batch_size)
        if settings.describe and settings.templates:
            told = [e.asked(settings.describe) for e in some]
            said = generate_answers(model, told, method, batch_size=settings.batch_size, max_new_tokens=DESCRIPTION)
            facts = [{name: str(value) for name, value in e.attributes.items()} for e in some]
            one["described"] = float(described_accuracy(said, facts, settings.templates).nanmean())
        return {"one": one}

    def name(method: Method) -> list[Any]:
        return [method.name, method, test.texts["alone"][method.name]]

    found = store.each(methods, measured, name=name, label="side effects", show=progress)
    return [SideEffects(**x["one"]) for x in found]
