"""Choosing settings: the worth and harm of texts by hand, ties, guards, and what is taken where nothing is allowed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from tests.emotion.asked import bundled
from veena_lens.emotion.judge import tuning
from veena_lens.emotion.judge.evaluation import Evaluation, score_answers
from veena_lens.emotion.judge.side_effects import Questions
from veena_lens.emotion.judge.tuning import fluency_ratio, is_conflict, trial_score, tune
from veena_lens.emotion.methods import Method
from veena_lens.emotion.pairs.pair_set import Example
from veena_lens.emotion.words.wheels import EmotionWheels

WHEELS = EmotionWheels.default()


def example(emotion: str, context: str | None = None) -> Example:
    told = "something happened." if context else None
    return Example(
        picture="a.png", emotion=emotion, question="How?", identity=f"{emotion} person", context=told,
        context_emotion=context,
    )  # fmt: skip


CONDITIONS = {
    "alone": [example("happy"), example("neutral")],
    "consistent": [example("happy", "happy"), example("neutral", "neutral")],
    "conflict, weak": [example("happy", "sad"), example("neutral", "sad")],
    "conflict, strong": [example("happy", "angry"), example("neutral", "angry")],
}
PLAIN = {"alone": ["happy", "neutral"], "consistent": ["happy", "neutral"]}
PLAIN |= {"conflict, weak": ["happy", "sad"], "conflict, strong": ["angry", "angry"]}
RIGHT = {key: ["happy", "neutral"] for key in CONDITIONS}


def said(methods: Mapping[str, Mapping[str, list[str]]]) -> Evaluation:
    texts = {c: {name: by[c] for name, by in methods.items()} for c in CONDITIONS}
    return score_answers(CONDITIONS, texts, WHEELS, "plain", {}, draws=20)


def test_worth_is_the_mean_over_conflicts_and_harm_the_largest_loss_elsewhere() -> None:
    assert [is_conflict(x) for x in CONDITIONS.values()] == [False, False, True, True]
    found = said({
        "plain": PLAIN,
        "right": RIGHT,
        "loses": RIGHT | {"consistent": ["sad", "neutral"]},
        "invents": RIGHT | {"alone": ["happy", "happy and neutral"]},
        "silent": {key: ["", ""] for key in CONDITIONS},
    })  # fmt: skip
    assert trial_score(found, "plain") == (0.25, 0.0)
    assert trial_score(found, "right") == (1.0, 0.0)
    assert trial_score(found, "loses") == (1.0, 0.5)
    assert trial_score(found, "invents") == (1.0, 1.0), "one of one neutral picture is given an emotion"
    assert trial_score(found, "silent") == (0.0, 1.0)


def test_without_conflicts_the_worth_is_over_all_conditions() -> None:
    two = {c: CONDITIONS[c] for c in ("alone", "consistent")}
    texts = {"alone": {"plain": ["happy", "sad"]}, "consistent": {"plain": ["sad", "sad"]}}
    assert trial_score(score_answers(two, texts, WHEELS, "plain", {}, draws=20), "plain")[0] == 0.25


@pytest.fixture
def scripted(monkeypatch) -> Any:
    """`scripted(texts by trial, perplexity by trial)`: `tune` on answers written here instead of a model's."""

    def start(trials: Sequence[Mapping[str, list[str]]], fluent: Sequence[float] = (), **guards: Any) -> Any:
        ratios = list(fluent) or [1.0] * len(trials)
        grid = [{"beta": float(i + 1)} for i in range(len(trials))]
        names = [f"VEE #{i}" for i in range(len(trials))]
        seen: list[Any] = []

        def answered(study: Any, conditions: Any, methods: Any) -> Evaluation:
            seen.append(([m.name for m in methods], study.draws))
            return said({"plain": PLAIN} | dict(zip(names, trials, strict=True)))

        monkeypatch.setattr(tuning, "evaluate", answered)
        monkeypatch.setattr(tuning, "fluency_ratio", lambda m, e, name, *rest: ratios[names.index(name)])
        found = tune(
            None, CONDITIONS, "VEE", grid, lambda beta: Method(name="?", about=f"{beta}", settings={"mode": "scale"}),
            draws=20, **guards,
        )  # fmt: skip
        assert seen[0][0] == ["plain", *names] and seen[0][1] == 20
        return found

    return start


HALF = RIGHT | {"conflict, strong": ["angry", "angry"]}
HARMFUL = RIGHT | {"alone": ["sad", "neutral"]}


def test_the_trial_worth_most_is_taken_and_named_after_its_family(scripted) -> None:
    found = scripted([PLAIN, HALF, RIGHT])
    assert found.method.name == "VEE" and dict(found.method.settings) == {"mode": "scale", "beta": 3.0}
    assert found.score == 1.0 and found.trials["worth"].tolist() == [0.25, 0.5, 1.0]
    assert (found.trials["plain"] == 0.25).all() and found.method.about == "3.0"
    assert "3 of 3 trials allowed" in repr(found) and "score 1.000" in repr(found)


def test_of_equals_the_weaker_is_taken(scripted) -> None:
    assert scripted([HALF, RIGHT, RIGHT, RIGHT]).method.settings["beta"] == 2.0


def test_a_trial_that_harms_is_not_taken_though_worth_more(scripted) -> None:
    found = scripted([HALF, HARMFUL])
    assert found.method.settings["beta"] == 1.0 and found.trials["allowed"].tolist() == [True, False]
    assert found.trials["harm"].tolist() == [0.0, 0.5]


def test_broken_text_that_hits_is_not_taken(scripted) -> None:
    found = scripted([PLAIN, RIGHT], [1.0, 40.0])
    assert found.method.settings["beta"] == 1.0 and found.trials["allowed"].tolist() == [True, False]


def test_where_nothing_is_allowed_the_least_harmful_of_the_fluent_is_taken(scripted) -> None:
    worse = RIGHT | {"alone": ["sad", "sad"]}
    found = scripted([worse, HARMFUL, RIGHT], [1.0, 1.0, 40.0])
    assert found.method.settings["beta"] == 2.0 and not found.trials["allowed"].any()
    assert scripted([worse, HARMFUL], [40.0, 40.0]).method.settings["beta"] == 2.0, "none is fluent: the least harm"


def test_an_empty_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="grid of 'PAI' is empty"):
        tune(None, CONDITIONS, "PAI", [], lambda: Method(name="?"))


def test_the_fluency_ratio_tells_broken_text_from_another_emotion() -> None:
    from tests.emotion.asked import examples

    names = ("happy", "sad", "neutral")
    some = [Example(picture=e.picture, emotion=n, question=e.prompt) for e, n in zip(examples(), names)]
    texts = {
        "plain": ["the person feels happy.", "the person feels sad.", "the person feels sad."],
        "same": ["the person feels happy.", "the person feels sad.", "the person feels sad."],
        "emotion": ["the person feels sad.", "the person feels angry.", "the person feels happy."],
        "broken": ["happy hair hair queue", "sad dog soup bus", "sad glasses wild office"],
    }
    found = score_answers({"alone": some}, {"alone": texts}, WHEELS, "plain", {}, draws=20)
    model = bundled("tiny-llava-emotion")
    ratio = {name: fluency_ratio(model, found, name, WHEELS) for name in ("same", "emotion", "broken")}
    assert ratio["same"] == 1.0
    assert ratio["emotion"] < tuning.FLUENCY < ratio["broken"]


def test_settings_of_a_trial_are_kept_as_json_holds_them() -> None:
    assert tuning._plain((1, 2)) == "(1, 2)" and tuning._plain(torch.tensor(1)) == "tensor(1)"
    assert [tuning._plain(x) for x in (1, 2.5, "a", True, None)] == [1, 2.5, "a", True, None]


@pytest.fixture
def other(monkeypatch) -> Any:
    """`other(share right by strength)`: a question about hair, and the strengths it was asked under."""

    def start(right: Mapping[float | None, float]) -> tuple[Questions, list[float | None]]:
        of: list[float | None] = []

        def share_right(self: Questions, model: Any, method: Method, **settings: Any) -> float:
            of.append(method.settings.get("beta"))
            return right[of[-1]]

        monkeypatch.setattr(Questions, "share_right", share_right)
        return Questions(examples=[], asked=["hair?"], truths=["brown"]), of

    return start


@pytest.mark.parametrize(
    ("right", "taken", "asked"),
    [
        ({None: 0.9, 2.0: 0.86}, 2.0, [None, 2.0]),  # the best loses four points: no other is asked
        ({None: 0.9, 2.0: 0.8, 3.0: 0.9}, 3.0, [None, 2.0, 3.0]),  # of equals the weaker is asked first
        ({None: 0.9, 2.0: 0.8, 3.0: 0.1, 1.0: 0.9}, 1.0, [None, 2.0, 3.0, 1.0]),
        ({None: 0.9, 2.0: 0.5, 3.0: 0.6, 1.0: 0.3}, 3.0, [None, 2.0, 3.0, 1.0]),  # none passes: the least is lost
    ],
    ids=["first", "second", "last", "none"],
)
def test_trials_are_asked_other_questions_from_the_best_on_until_one_leaves_them_right(
    scripted: Any, other: Any, right: dict[float | None, float], taken: float, asked: list[float | None]
) -> None:
    others, of = other(right)
    found = scripted([HALF, RIGHT, RIGHT], others=others)
    assert found.method.settings["beta"] == taken and of == asked
    shares = found.trials["attributes"].tolist()
    assert [s for s in shares if s == s] == [right[b] for b in (1.0, 2.0, 3.0) if b in asked]
    lost = [0.9 - right[b] > tuning.ATTRIBUTE_HARM if b in asked else False for b in (1.0, 2.0, 3.0)]
    assert found.trials["allowed"].tolist() == [not x for x in lost]


def test_a_wider_tolerance_takes_what_a_narrow_one_refuses(scripted: Any, other: Any) -> None:
    others, _ = other({None: 0.9, 2.0: 0.8, 1.0: 0.9})
    assert scripted([HALF, RIGHT], others=others).method.settings["beta"] == 1.0
    assert scripted([HALF, RIGHT], others=others, attribute_harm=0.2).method.settings["beta"] == 2.0


def test_other_answers_are_kept_and_not_asked_again(scripted: Any, other: Any, tmp_path: Any) -> None:
    for fresh in (1, 0):  # a method that does nothing is the plain model: not asked twice
        others, of = other({None: 0.9, 2.0: 0.9})
        scripted([PLAIN, RIGHT], others=others, out=tmp_path)
        assert len(of) == fresh
