"""Intervals of means and ratios: by hand, against numpy, and whole identities drawn together."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from veena_lens.circuits.statistics import drawn_weights, mean_interval, ratio_interval

PEOPLE = ["a", "a", "b", "c", "c", "c"]


def test_entries_of_one_identity_are_drawn_together_and_as_many_identities_as_there_are() -> None:
    weights = drawn_weights(PEOPLE, draws=50)
    assert weights.shape == (50, 6)
    assert torch.equal(weights[:, 0], weights[:, 1]) and torch.equal(weights[:, 3], weights[:, 5])
    assert (weights[:, 0] + weights[:, 2] + weights[:, 3]).unique().tolist() == [3]
    assert set(weights.unique().tolist()) == {0, 1, 2, 3}


def test_a_seed_fixes_the_draws() -> None:
    assert torch.equal(drawn_weights(PEOPLE, 20, 3), drawn_weights(PEOPLE, 20, 3))
    assert not torch.equal(drawn_weights(PEOPLE, 20, 3), drawn_weights(PEOPLE, 20, 4))


def test_the_mean_number_of_draws_of_each_entry_is_one() -> None:
    assert drawn_weights(PEOPLE, 20_000).mean(0).tolist() == pytest.approx([1] * 6, abs=0.03)


def test_ratio_intervals_equal_those_of_numpy() -> None:
    above = torch.tensor([[1.0, 2], [0, 1], [3, 5], [2, 2], [1, 0], [4, 1]])
    below = torch.tensor([1.0, 2, 1, 1, 3, 1])
    weights = drawn_weights(PEOPLE, 300, 5)
    found = ratio_interval(above, below, weights, 0.9)
    w, a, b = weights.numpy(), above.double().numpy(), below.double().numpy()
    drawn = (w @ a) / (w @ b)[:, None]
    low, high = np.quantile(drawn, [0.05, 0.95], axis=0)
    np.testing.assert_allclose(found.numpy(), np.stack([low, a.sum(0) / b.sum(), high], -1), rtol=1e-12)
    assert found[0, 1].item() == pytest.approx(11 / 9)


def test_a_ratio_is_of_sums_and_not_the_mean_of_ratios() -> None:
    found = ratio_interval(torch.tensor([1.0, 1]), torch.tensor([1.0, 3]), drawn_weights(["a", "b"], 10))
    assert found[1].item() == pytest.approx(0.5)  # the mean of ratios would be 2/3


def test_entries_that_are_missing_count_neither_above_nor_below() -> None:
    values = torch.tensor([[1.0, torch.nan], [3, 4], [torch.nan, 6]])
    weights = drawn_weights(["a", "b", "c"], 400)
    found = mean_interval(values, weights)
    assert found[:, 1].tolist() == [2, 5]
    assert found[0, 0].item() >= 1 and found[0, 2].item() <= 3
    assert found[1, 0].item() >= 4 and found[1, 2].item() <= 6
    below = ratio_interval(values, torch.tensor([1.0, 2, 5]), weights)
    assert below[:, 1].tolist() == pytest.approx([4 / 3, 10 / 7])


def test_what_is_missing_everywhere_has_no_interval() -> None:
    found = mean_interval(torch.tensor([[torch.nan, 1.0], [torch.nan, 1.0]]), drawn_weights(["a", "b"], 10))
    assert bool(found[0].isnan().all())
    assert found[1].tolist() == [1, 1, 1]


def test_axes_after_the_first_are_kept() -> None:
    values = torch.arange(24.0).reshape(2, 3, 4)
    found = mean_interval(values, drawn_weights(["a", "b"], 10))
    assert found.shape == (3, 4, 3)
    torch.testing.assert_close(found[..., 1], values.double().mean(0))


def test_one_group_an_entry_is_asked_for() -> None:
    with pytest.raises(TypeError):
        drawn_weights(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1 are needed"):
        drawn_weights([])
