"""The judgement beside the main table: percentiles among random sets by hand, other images, side effects kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from tests.emotion.asked import bundled
from veena_lens.emotion.judge import held_out
from veena_lens.emotion.judge.evaluation import score_answers
from veena_lens.emotion.judge.held_out import random_controls, side_effects
from veena_lens.emotion.judge.model_selection import HeadRankings
from veena_lens.emotion.judge.side_effects import SideEffects
from veena_lens.emotion.judge.tuning import Tuned
from veena_lens.emotion.locate.neurons import KeyNeurons
from veena_lens.emotion.methods import Method
from veena_lens.emotion.pairs.loading import load_pairs
from veena_lens.emotion.pairs.pair_set import Example, PairSet
from veena_lens.emotion.pairs.parts import elsewhere
from veena_lens.emotion.settings import preset
from veena_lens.emotion.words.wheels import EmotionWheels
from veena_lens.interventions import BoostAttention, ScaleNeurons
from veena_lens.scores import Scores

HEADS, NEURONS = [(0, 1), (2, 0), (2, 3)], [(1, 5), (1, 6), (3, 0)]


def example(emotion: str, context: str | None = None, style: str = "", split: str = "") -> Example:
    told = "something happened." if context else None
    return Example(
        picture=f"{emotion}.png", emotion=emotion, question="How?", identity=f"{emotion} person", style=style,
        split=split, context=told, context_emotion=context,
    )  # fmt: skip


CONDITIONS = {
    "alone": [example("happy"), example("sad")],
    "consistent": [example("happy", "happy"), example("sad", "sad")],
    "conflict, plain": [example("happy", "sad"), example("sad", "angry")],
}
SETTINGS: dict[str, dict[str, Any]] = {
    "VEE": {"beta": 3.0, "mode": "scale"},
    "ENA": {"gamma": 2.0, "k": 2},
    "VEENA": {"beta": 3.0, "gamma": 2.0, "mode": "scale"},
}


def judge(monkeypatch: pytest.MonkeyPatch, draws: int, **settings: Any) -> tuple[Any, list[Any]]:
    """Random controls where the i-th random set answers right i times out of two, and the real one once."""
    seen: list[Any] = []

    def answered(model: Any, wanted: Any, methods: Any, **more: Any) -> Any:
        seen.append((list(wanted), methods))
        hits = {m.name: torch.tensor([1.0] * i + [0.0] * (2 - i)) for i, m in enumerate(methods)}
        return SimpleNamespace(hits=dict.fromkeys(wanted, hits))

    monkeypatch.setattr(held_out, "evaluate", answered)
    texts = {c: {name: ["happy", "no idea"] for name in ("plain", *SETTINGS)} for c in CONDITIONS}
    test = score_answers(CONDITIONS, texts, EmotionWheels.default(), "plain", {}, draws=20)
    tuned = {
        name: Tuned(family=name, method=Method(name=name, settings=s), trials=pd.DataFrame(), score=0.5)
        for name, s in SETTINGS.items()
    }
    rows = pd.DataFrame([{"layer": a, "neuron": n, "rows": "last"} for a, n in NEURONS])
    neurons = KeyNeurons(table=rows, trace=Scores(torch.zeros(4, 14), ("layer", "neuron")), layer=3, n_pairs=2)
    ways = HeadRankings(rankings={"patching": HEADS}, table=None, winner=("patching", "scale"))
    model = bundled("tiny-llava-emotion")
    chosen = replace(preset("tiny"), random_draws=draws, **settings)
    return random_controls(model, CONDITIONS, tuned, test, ways, neurons, chosen, progress=False), seen


def test_random_sets_are_matched_tuned_alike_and_give_a_percentile(monkeypatch: pytest.MonkeyPatch) -> None:
    found, seen = judge(monkeypatch, 3)
    assert [names for names, _ in seen] == [["conflict, plain"]] * 3 and found.draws == 3
    assert found.table["method"].tolist() == ["VEE", "ENA", "VEENA"]
    line = found.table.iloc[0]
    assert [line[c] for c in ("plain", "real", "random", "percentile")] == [0.5, 0.5, 0.5, 0.5]  # ties count half
    assert line["low"] == pytest.approx(0.025) and line["high"] == pytest.approx(0.975)
    for method in seen[0][1]:
        units = [tuple(u) for u in method.settings["units"]]
        assert sorted(layer for layer, _ in units) == [0, 2, 2] and not set(units) & set(HEADS)
        assert all(isinstance(x, BoostAttention) and (x.factor, x.mode) == (3.0, "scale") for x in method.interventions)
    for method in seen[1][1]:  # as many neurons as were tuned
        assert sorted(layer for layer, _ in method.settings["units"]) == [1, 1]
        assert all(isinstance(x, ScaleNeurons) and x.factor == 2.0 for x in method.interventions)
    both = seen[2][1][0].interventions
    assert {type(x) for x in both} == {BoostAttention, ScaleNeurons}
    assert "3 draws" in repr(found)


def test_no_condition_named_means_alone_and_every_conflict_and_no_draws_mean_no_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found, seen = judge(monkeypatch, 2, random_conditions=None)
    assert seen[0][0] == ["alone", "conflict, plain"] and len(found.table) == 6
    nothing, seen = judge(monkeypatch, 0)
    assert len(nothing.table) == 0 and not seen


def test_other_pictures_are_told_apart_by_split_and_style_and_bounded() -> None:
    styles = (("emoji", "emoji"), ("held-out style", "micah"), ("held-out style", "micah"), ("", "photo"))
    part = PairSet(
        (), singles=tuple(example(f"e{i}", style=style, split=split) for i, (split, style) in enumerate(styles))
    )
    found = elsewhere(part, replace(preset("tiny"), test_pictures=1))
    assert {name: len(x) for name, x in found.items()} == {"emoji": 1, "held-out style: micah": 1, "photo": 1}


def test_side_effects_are_measured_once_and_other_answers_are_other_effects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def measured(model: Any, examples: Any, method: Method, texts: Any, **more: Any) -> SideEffects:
        calls.append(method.name)
        return SideEffects(
            method=method.name,
            n=len(examples),
            perplexity=1.0,
            distinct_1=1.0,
            distinct_2=1.0,
            repetition=0.0,
            length=2.0,
        )

    monkeypatch.setattr(held_out, "measure_side_effects", measured)
    monkeypatch.setattr(held_out, "latency_ratio", lambda *given, **more: 1.0)
    some = list(load_pairs().select(split="test").without_context().examples[:2])
    settings = replace(preset("tiny"), questions={"glasses": "does the person wear glasses?"}, asked_pictures=1)
    tuned = {"VEE": Tuned(family="VEE", method=Method(name="VEE"), trials=pd.DataFrame(), score=0.0)}

    def run(said: str, **more: Any) -> list[SideEffects]:
        calls.clear()
        texts = {"alone": {"plain": ["a", "b"], "VEE": [said, said]}}
        test = score_answers({"alone": some}, texts, EmotionWheels.default(), "plain", {}, draws=20)
        model = bundled("tiny-llava-emotion")
        return side_effects(
            model, {"alone": some}, test, tuned, replace(settings, **more), out=tmp_path, progress=False
        )

    found = run("happy")
    assert calls == ["plain", "VEE"] and [e.method for e in found] == calls
    assert all(e.attributes in (0.0, 1.0) for e in found), "one picture is asked"
    assert run("happy")[1] == found[1] and calls == []
    run("sad")
    assert calls == ["VEE"], "its answers are others"
    run("sad", asked_pictures=2)
    assert calls == ["plain", "VEE"]
