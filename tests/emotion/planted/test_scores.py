"""Rankings against a known truth: hand-computed cases, nulls, and the pipeline on a planted circuit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.emotion.planted.test_circuit import model, pairs, plant
from veena_lens.emotion.locate.directions import extract_directions
from veena_lens.emotion.pairs.loading import load_pairs
from veena_lens.emotion.planted.scores import (
    average_precision,
    found_among_first,
    known_directions,
    localise,
    precision_recall,
    swapped_at_random,
)


def test_average_precision_of_a_hand_made_ranking() -> None:
    values = torch.tensor([[4.0, 3.0], [2.0, 1.0]])
    truth = torch.tensor([[True, False], [True, False]])
    assert average_precision(values, truth) == pytest.approx((1 + 2 / 3) / 2)
    assert found_among_first(values, truth) == 0.5
    assert average_precision(values, ~truth) == pytest.approx((1 / 2 + 2 / 4) / 2)


def test_tied_values_count_as_a_random_order() -> None:
    # one true of two tied: first half of the time, precision 1 or 1/2
    assert average_precision(torch.zeros(2), torch.tensor([True, False])) == pytest.approx(0.75)


def test_missing_values_rank_last() -> None:
    values = torch.tensor([math.nan, 1.0, 0.0])
    assert average_precision(values, torch.tensor([True, False, False])) == pytest.approx(1 / 3)


@given(st.integers(1, 6), st.integers(0, 6), st.integers(0, 5))
def test_average_precision_is_one_for_the_truth_itself(n_true: int, n_false: int, seed: int) -> None:
    truth = torch.tensor([True] * n_true + [False] * n_false)
    truth = truth[torch.randperm(len(truth), generator=torch.Generator().manual_seed(seed))]
    assert average_precision(truth.double(), truth) == pytest.approx(1.0)
    assert found_among_first(truth.double(), truth) == 1.0
    assert average_precision(torch.zeros(len(truth)), truth) >= n_true / len(truth) - 1e-12


def test_precision_and_recall_of_sets() -> None:
    assert precision_recall([(0, 1), (2, 3)], [(0, 1), (4, 4), (5, 5)]) == (0.5, pytest.approx(1 / 3))
    precision, recall = precision_recall([], [(0, 1)])
    assert math.isnan(precision) and recall == 0


def test_half_of_the_identities_are_swapped_whole() -> None:
    whole = pairs()
    turned = swapped_at_random(whole, seed=1)
    changed = {a.identity for a, b in zip(whole, turned, strict=True) if a != b}
    same = {a.identity for a, b in zip(whole, turned, strict=True) if a == b}
    assert not changed & same and len(changed) == len(whole.identities) // 2


@pytest.mark.slow
def test_pipeline_finds_a_planted_circuit_by_its_directions() -> None:
    p = plant()
    other = load_pairs().select(split="development", emotion=p.emotions, condition="none")
    other = other.select(identity=[name for name in other.identities if name not in pairs().identities])
    assert len(other.identities) >= 10 and model() is not p.model
    settings = dict(tau=-1, require_neutral=False, max_new_tokens=1, minimum=2, n_splits=0, progress=False)
    directions = extract_directions(p.model, pairs(), **settings)  # type: ignore[arg-type]
    found = localise(p, other, known_directions(p, directions))
    heads = found.table[found.table["what"] == "heads"].set_index("ranking")["average precision"]
    assert heads["patching (pipeline)"] == 1.0 > heads["chance"] and found.chosen["heads: recall"] == 1.0
    assert heads["attention to the picture"] < 0.8 and "heads: recall 1.00" in repr(found)
