"""Choosing: grids, examples in turn, conditions of a split, and that every family gets as many trials."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.emotion.enhance.test_adaptive import FOUND
from tests.emotion.small_run import small_pairs
from veena_lens.emotion.enhance.veena import ena, vee, veena
from veena_lens.emotion.judge.model_selection import (
    HeadRankings,
    conditions_of,
    final_circuit,
    own_families,
    spaced,
    spread_examples,
)
from veena_lens.emotion.judge.tuning import Tuned
from veena_lens.emotion.locate.neurons import KeyNeurons
from veena_lens.emotion.methods import Method
from veena_lens.emotion.pairs.pair_set import Example
from veena_lens.emotion.settings import preset
from veena_lens.scores import Scores

HEADS, NEURONS = [(1, 2), (3, 4)], [(2, n) for n in range(14)]


@given(size=st.integers(1, 40), n=st.integers(1, 40))
def test_a_spaced_grid_keeps_the_order_and_both_ends(size: int, n: int) -> None:
    grid = [{"beta": float(i)} for i in range(size)]
    found = spaced(grid, n)
    assert len(found) == min(size, n)
    at = [int(x["beta"]) for x in found]
    assert at == sorted(set(at))
    if n > 1:
        assert (at[0], at[-1]) == (0, size - 1)


def test_spaced_by_hand() -> None:
    grid = [{"beta": i} for i in range(6)]
    assert [x["beta"] for x in spaced(grid, 3)] == [0, 2, 5]
    assert spaced(grid, 1) == [{"beta": 3}] and spaced(grid, 9) == grid


def part(counts: dict[str, int]) -> Any:
    found = [
        Example(picture=f"{e}{i}.png", emotion=e, question="How?", identity=f"p{i}") for e, n in counts.items()
        for i in range(n)
    ]  # fmt: skip
    return SimpleNamespace(examples=[*found, *found])


@given(
    counts=st.dictionaries(st.sampled_from(["happy", "sad", "neutral"]), st.integers(1, 6), min_size=1),
    most=st.one_of(st.none(), st.integers(1, 20)),
)
def test_each_picture_comes_once_and_emotions_in_turn(counts: dict[str, int], most: int | None) -> None:
    found = spread_examples(part(counts), most)
    assert len({e.picture for e in found}) == len(found) == min(sum(counts.values()), most or 99)
    if most is not None and most < sum(counts.values()):
        got = [sum(e.emotion == name for e in found) for name in counts]
        assert all(n == counts[name] or n >= max(got) - 1 for n, name in zip(got, counts, strict=True))


def test_identities_are_met_in_turn() -> None:
    found = spread_examples(part({"happy": 3, "sad": 3, "neutral": 3}), 3)
    assert len({e.identity for e in found}) == 3 and len({e.emotion for e in found}) == 3


def test_conditions_show_the_same_pictures_and_stay_among_the_parts_identities() -> None:
    settings = replace(preset("tiny"), strengths=("weak", "strong"))
    few = small_pairs().without_context().select(split="test")
    found = conditions_of(few, settings, None, held_out=True)
    assert list(found) == ["alone", "consistent", "conflict, weak", "conflict, strong"]
    assert {e.identity for some in found.values() for e in some} == set(few.identities)
    pictures = [[e.picture for e in some] for some in found.values()]
    assert all(x == pictures[0] for x in pictures)
    assert all(e.context_emotion not in (None, e.emotion) for e in found["conflict, strong"])
    assert {len(some) for some in conditions_of(few, settings, 5, held_out=True).values()} == {5}


def families(trials: int, compared: int = 0, neurons: list[tuple[int, int]] = NEURONS, **grids: Any) -> dict[str, Any]:
    import pandas as pd

    settings = replace(preset("full"), trials=trials, **grids)
    table = pd.DataFrame([{"way": "patching"}] * compared)
    ways = HeadRankings(rankings={"patching": HEADS}, table=table, winner=("patching", "scale"))
    rows = pd.DataFrame([{"layer": layer, "neuron": n, "rows": "last"} for layer, n in neurons])
    located = KeyNeurons(table=rows, trace=Scores(torch.zeros(4, 14), ("layer", "neuron")), layer=3, n_pairs=2)
    found = own_families(ways, located, FOUND, settings)
    return {name: (grid, build) for name, grid, build in found}


def test_every_family_has_at_most_as_many_trials_and_comparing_costs_vees() -> None:
    found = families(5, compared=2)
    assert {name: len(grid) for name, (grid, _) in found.items()} == {
        "VEE": 4, "ENA": 5, "VEENA": 5, "VEENA adaptive": 5,
    }  # fmt: skip
    assert [x["beta"] for x in families(4, compared=9)["VEE"][0]] == [3.0, 5.0], "the comparison's, and one more"


def test_what_a_family_builds_is_the_circuit_of_its_settings() -> None:
    found = families(99)
    for grid, build in (found[name] for name in ("VEE", "ENA", "VEENA")):
        assert len(grid) == len({str(x) for x in grid})
        assert all(isinstance(build(**chosen), Method) for chosen in grid)
    assert list(found["VEE"][1](beta=3.0).interventions) == list(vee(HEADS, 3.0, mode="scale"))
    assert list(found["ENA"][1](gamma=2.0, k=10).interventions) == list(ena(NEURONS[:10], 2.0))
    both = list(found["VEENA"][1](beta=3.0, gamma=2.0).interventions)
    assert both == list(veena(HEADS, NEURONS, 3.0, 2.0, mode="scale"))
    assert {x["kind"] for x in found["VEENA adaptive"][0]} == {"need", "trust"}


def test_a_grid_of_one_strength_leaves_no_family_without_a_trial() -> None:
    found = families(1, betas=(5.0,), gammas=(3.0,))
    assert {name: len(grid) for name, (grid, _) in found.items()} == dict.fromkeys(found, 1) | {"VEE": 2}


def test_ways_give_the_winners_heads_and_mode() -> None:
    ways = HeadRankings(rankings={"a": [(0, 0)], "b": HEADS}, table=None, winner=("b", "renorm"))
    assert ways.heads == HEADS and ways.mode == "renorm"


def test_the_circuit_is_veenas_and_vees_where_there_are_no_neurons() -> None:
    def tuned(name: str, circuit: Any) -> Any:
        method = Method(name=name, interventions=circuit, settings={"beta": 2.0})
        return Tuned(family=name, method=method, trials=None, score=1.0)

    settings = preset("tiny")
    both = {"VEE": tuned("VEE", vee(HEADS)), "VEENA": tuned("VEENA", veena(HEADS, NEURONS))}
    found = final_circuit(both, "some/model", settings)
    assert list(found) == list(veena(HEADS, NEURONS)) and found.name == "VEENA"
    assert found.meta == {"beta": 2.0, "model": "some/model", "preset": "tiny", "seed": 0}
    assert final_circuit({"VEE": both["VEE"]}, "m", settings).name == "VEE"


@pytest.mark.parametrize(("name", "value"), [("trials", 0), ("k_heads", 0), ("random_draws", -1)])
def test_sizes_that_make_no_run_are_refused(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name}={value} must"):
        replace(preset("tiny"), **{name: value})
    with pytest.raises(ValueError, match="There is no preset 'huge'; presets: tiny, quick, full"):
        preset("huge")
