"""The table of methods: hits, what follows the context, false emotions and paired differences of texts by hand."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.emotion.asked import bundled
from tests.emotion.asked import examples as asked
from tests.interrupting import stop_at
from veena_lens.emotion.enhance.veena import vee
from veena_lens.emotion.judge import evaluation
from veena_lens.emotion.judge.evaluation import Evaluation, evaluate, score_answers
from veena_lens.emotion.methods import PLAIN, Method
from veena_lens.emotion.pairs.pair_set import Example
from veena_lens.emotion.words.wheels import EmotionWheels
from veena_lens.interventions import Steer

WHEELS = EmotionWheels.default()
NAN = float("nan")


def example(emotion: str, identity: str, context: str | None = None) -> Example:
    return Example(
        picture=f"{identity}.png", emotion=emotion, question="How?", identity=identity,
        context="something happened." if context else None, context_emotion=context,
    )  # fmt: skip


def made(texts: dict[str, list[str]], examples: list[Example], condition: str = "conflict") -> Evaluation:
    return score_answers({condition: examples}, {condition: texts}, WHEELS, "plain", {}, draws=200)


CONFLICT = [example("happy", "a", "sad"), example("sad", "a", "angry"), example("neutral", "b", "happy")]
SAID = made(
    {
        "plain": ["the person feels sad.", "she is sad and angry.", "the person feels happy."],
        "other": ["the person feels joyful.", "nothing to say", "the person is neutral."],
    },
    CONFLICT,
)


def lists(table: Any) -> dict[str, list[float]]:
    return {name: column.nan_to_num(-1.0).tolist() for name, column in table["conflict"].items()}


def test_hits_followed_and_false_emotions_are_those_of_the_texts() -> None:
    assert lists(SAID.hits) == {"plain": [0.0, 1.0, 0.0], "other": [1.0, 0.0, 1.0]}
    assert lists(SAID.followed) == {"plain": [1.0, 1.0, 1.0], "other": [0.0, 0.0, 0.0]}
    assert lists(SAID.false_emotions) == {"plain": [-1.0, -1.0, 1.0], "other": [-1.0, -1.0, 0.0]}


def test_a_context_that_agrees_or_is_absent_is_not_followed() -> None:
    some = [example("happy", "a", "happy"), example("sad", "b")]
    found = made({"plain": ["happy", "sad"]}, some)
    assert found.followed["conflict"]["plain"].isnan().all()
    assert found.table()["follows_context"].isna().all() and found.table()["false"].isna().all()


def test_the_table_sums_up_each_method() -> None:
    table = SAID.table().set_index("method")
    assert table.loc["plain", "hit"] == pytest.approx(1 / 3) and table.loc["other", "hit"] == pytest.approx(2 / 3)
    assert table.loc["plain", "false"] == 1.0 and table.loc["other", "false"] == 0.0
    assert table.loc["plain", "balanced"] == pytest.approx((0.5 + 0.0) / 2), "hits of the two emotional pictures"
    assert table.loc["other", "balanced"] == pytest.approx((0.5 + 1.0) / 2)
    assert table.loc["plain", "follows_context"] == 1.0 and table.loc["other", "n"] == 3
    assert table.loc["other", "difference"] == pytest.approx(1 / 3)


def test_intervals_draw_whole_identities_and_differences_are_paired() -> None:
    some = [example("happy", name) for name in "aabbcc"]
    found = made({"plain": ["happy", "sad"] * 3, "better": ["happy"] * 6, "same": ["happy", "sad"] * 3}, some)
    table = found.table().set_index("method")
    assert table.loc["plain", ["low", "hit", "high"]].tolist() == pytest.approx([0.5, 0.5, 0.5]), "each identity alike"
    better = table.loc["better", ["difference_low", "difference", "difference_high"]].tolist()
    assert better == pytest.approx([0.5, 0.5, 0.5])
    assert table.loc["same", "difference"] == 0.0 and table.loc["same", "p"] == 1.0
    assert "p" in table and table.loc["plain", "p"] != table.loc["plain", "p"]


def test_p_is_the_share_of_sign_flips_of_identities_that_reach_the_difference() -> None:
    differences = torch.tensor([1.0, 1.0, 0.0, 1.0, -1.0, 1.0, 1.0], dtype=torch.float64)
    names = ["a", "a", "b", "c", "d", "e", "f"]
    sums = [2.0, 0.0, 1.0, -1.0, 1.0, 1.0]
    flipped = [abs(sum(s * x for s, x in zip(signs, sums))) for signs in product((1, -1), repeat=len(sums))]
    exact = sum(x >= abs(sum(sums)) - 1e-9 for x in flipped) / len(flipped)
    assert evaluation._p(differences, names, 0) == pytest.approx(exact, abs=0.03)
    assert evaluation._p(differences[:2], ["a", "a"], 0) != evaluation._p(differences[:2], ["a", "a"], 0), "NaN"


def test_recall_by_emotion_and_scores_hold_the_same_numbers() -> None:
    by = SAID.per_emotion().set_index(["method", "emotion"])["hit"]
    assert by["other", "happy"] == 1.0 and by["other", "sad"] == 0.0 and by["plain", "neutral"] == 0.0
    scores = SAID.scores()
    assert scores.axes == ("condition", "method", "bound")
    assert scores.select(method="other", bound="mean").values.tolist() == pytest.approx([2 / 3])
    assert "other" in repr(SAID) and "0.667" in repr(SAID)


def conditions() -> dict[str, list[Example]]:
    names = ("happy", "sad", "neutral")
    alone = [Example(picture=e.picture, emotion=n, question=e.prompt, identity=n) for e, n in zip(asked(), names)]
    return {"alone": alone, "conflict": [e.with_context("the dog died.", "sad") for e in alone]}


def test_every_method_answers_every_condition_and_the_plain_model_comes_first(tmp_path: Path) -> None:
    model = bundled("tiny-llava-emotion")
    loud = Method(name="loud", interventions=vee([(5, h) for h in range(8)], 30.0, mode="scale"), settings={"b": 30})
    found = evaluate(model, conditions(), [loud], max_new_tokens=4, batch_size=2, draws=50, progress=False)
    assert found.methods == ["plain", "loud"] and found.settings["loud"] == {"b": 30}
    assert all(len(said) == 3 for by in found.texts.values() for said in by.values())
    from veena_lens.emotion.methods import generate_answers

    assert found.texts["conflict"]["loud"] == generate_answers(model, conditions()["conflict"], loud, max_new_tokens=4)


def test_a_stopped_evaluation_goes_on_and_asks_nothing_twice(tmp_path: Path, monkeypatch) -> None:
    model, calls = bundled("tiny-llava-emotion"), stop_at(monkeypatch, evaluation, "answers_to", 4)
    call: dict[str, Any] = {"max_new_tokens": 3, "batch_size": 2, "draws": 50, "out": tmp_path, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, conditions(), [PLAIN], **call)
    found = evaluate(model, conditions(), [PLAIN], **call)
    assert [len(given[1]) for given in calls] == [2, 1, 2, 1, 1]
    monkeypatch.undo()
    again = evaluate(model, conditions(), [PLAIN], max_new_tokens=3, batch_size=2, draws=50, progress=False)
    assert found.texts == again.texts


def test_answers_of_other_interventions_are_not_taken_for_these(tmp_path: Path) -> None:
    model = bundled("tiny-llava-emotion")
    call: dict[str, Any] = {"max_new_tokens": 3, "draws": 50, "out": tmp_path, "progress": False}
    one = {"alone": conditions()["alone"][:1]}
    quiet = Method(name="VEE", interventions=vee([(5, 0)], 1.0), settings={"mode": "scale"})
    away = torch.randn(192, generator=torch.Generator().manual_seed(1))
    loud = Method(name="VEE", interventions=[Steer(6, away, 90.0)], settings={"mode": "scale"})
    first = evaluate(model, one, [quiet], **call).texts["alone"]
    second = evaluate(model, one, [loud], **call).texts["alone"]
    assert first["VEE"] == first["plain"] != second["VEE"]


def test_two_methods_of_one_name_and_empty_conditions_are_refused() -> None:
    twins = [Method(name="VEE"), Method(name="VEE")]
    with pytest.raises(ValueError, match="two methods are named 'VEE'; names must be unique"):
        evaluate(None, conditions(), twins, progress=False)
    for empty in ({}, {"alone": []}):
        with pytest.raises(ValueError, match="every condition needs at least one example"):
            evaluate(None, empty, [PLAIN], progress=False)
