"""Intervals cover, tests keep their level, discoveries their rate: on simulated pairs with a known truth."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from veena_lens.circuits.statistics import (
    benjamini_hochberg,
    bootstrap,
    sign_consistency,
    sign_flip_test,
    significant,
    student_quantile,
)
from veena_lens.scores import Scores


def pairs(values: Tensor, mask: Tensor | None = None) -> Scores:
    return Scores(values, ("pair", "head"), name="push", unit="norm", mask=mask, meta={"kind": "direct"})


@pytest.mark.parametrize("n", [8, 30])
def test_intervals_cover_the_truth_as_often_as_they_say(n: int) -> None:
    scores = bootstrap(pairs(torch.randn(n, 1500, dtype=torch.float64) + 2.0), draws=600)
    low, mean, high = scores.values.unbind(-1)
    covered = ((low <= 2.0) & (high >= 2.0)).double().mean()
    assert 0.93 <= covered <= 0.97, f"{covered:.3f} for n={n}"
    assert (low <= mean).all() and (mean <= high).all()


def test_groups_are_drawn_whole() -> None:
    """Five persons, each with six images that say the same: intervals from images cover far too rarely."""
    persons = torch.randn(6, 1000, dtype=torch.float64).repeat_interleave(6, 0)
    groups = [name for name in "abcdef" for _ in range(6)]
    covered = []
    for grouped in (groups, None):
        low, _, high = bootstrap(pairs(persons), groups=grouped, draws=400).values.unbind(-1)
        covered.append(((low <= 0) & (high >= 0)).double().mean())
    assert covered[0] > 0.91 and covered[1] < 0.75, covered


def test_bootstrap_keeps_axes_labels_and_meta_and_follows_the_seed() -> None:
    scores = Scores(torch.randn(2, 5, 3), ("layer", "pair", "head"), {"layer": [4, 7]}, "push", "norm", meta={"a": 1})
    out = bootstrap(scores, draws=50, seed=3)
    assert out.axes == ("layer", "head", "bound") and out.labels["bound"] == ["low", "mean", "high"]
    assert out.labels["layer"] == [4, 7] and out.unit == "norm" and out.meta["a"] == 1
    assert out.meta["bootstrap"]["groups"] == 5
    assert out.values.equal(bootstrap(scores, draws=50, seed=3).values)
    assert not out.values.equal(bootstrap(scores, draws=50, seed=4).values)
    assert torch.allclose(out.select(bound="mean").values, scores.values.double().mean(1))


def test_missing_entries_count_nowhere() -> None:
    values = torch.tensor([[1.0, 5.0], [3.0, math.nan], [100.0, 9.0], [2.0, math.nan]], dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, True], [False, False], [True, True]])
    out = bootstrap(pairs(values, mask), draws=200)
    assert out.select(bound="mean").values[0] == 2.0 and 1.0 <= out.values[0, 0] <= out.values[0, 2] <= 3.0
    assert not out.exists[1].any(), "a single entry has no interval"
    consistency = sign_consistency(pairs(values - 2.5, mask))
    assert consistency.values.tolist() == [2 / 3, 1.0]
    p = sign_flip_test(pairs(values, mask))
    assert p.values[0] == pytest.approx(0.25) and not p.exists[1]


def test_exact_sign_flips_equal_the_enumeration() -> None:
    values = torch.randn(7, 4, dtype=torch.float64) + 0.6
    p = sign_flip_test(pairs(values))
    assert p.meta["sign_flip"]["exact"]
    means = torch.stack([(torch.tensor(s)[:, None] * values).sum(0) for s in itertools.product((1.0, -1.0), repeat=7)])
    expected = (means.abs() >= values.sum(0).abs() - 1e-12).double().mean(0)
    assert torch.allclose(p.values, expected)


def test_drawn_sign_flips_approach_the_exact_ones() -> None:
    values = torch.randn(12, 30, dtype=torch.float64) + 0.5
    exact = sign_flip_test(pairs(values), draws=4096)
    drawn = sign_flip_test(pairs(values), draws=2000)
    assert exact.meta["sign_flip"]["exact"] and not drawn.meta["sign_flip"]["exact"]
    assert (exact.values - drawn.values).abs().max() < 0.05
    assert drawn.values.min() >= 1 / 2001


def test_sign_flips_of_pure_noise_keep_their_level() -> None:
    p = sign_flip_test(pairs(torch.randn(15, 3000, dtype=torch.float64)), draws=500).values
    for level in (0.01, 0.05, 0.2):
        assert (p <= level).double().mean() == pytest.approx(level, abs=0.35 * level + 0.003)


def test_a_group_flips_as_one() -> None:
    persons = torch.randn(8, 2000, dtype=torch.float64).repeat_interleave(4, 0)
    groups = [i // 4 for i in range(32)]
    whole = (sign_flip_test(pairs(persons), draws=300, groups=groups).values <= 0.05).double().mean()
    single = (sign_flip_test(pairs(persons), draws=300).values <= 0.05).double().mean()
    assert whole < 0.07 and single > 0.2, (whole, single)


def test_no_effect_at_all_has_p_one() -> None:
    assert sign_flip_test(pairs(torch.zeros(5, 2))).values.tolist() == [1.0, 1.0]


def test_adjusted_values_are_those_of_the_textbook() -> None:
    p = Scores(torch.tensor([0.01, 0.04, 0.03, 0.005, 0.2], dtype=torch.float64), ("head",))
    adjusted = benjamini_hochberg(p, q=0.05)
    assert adjusted.values.tolist() == pytest.approx([0.025, 0.05, 0.05, 0.025, 0.2])
    assert adjusted.meta["discoveries"] == 4 and adjusted.meta["tests"] == 5
    assert significant(p, q=0.03).values.tolist() == [True, False, False, True, False]


def test_false_discoveries_stay_at_their_rate() -> None:
    """300 families of 60 tests, 15 with an effect: the mean false share is at most q (45/60 q in expectation)."""
    z = torch.randn(300, 60, dtype=torch.float64)
    z[:, :15] += 3.0
    p = 2 * (1 - torch.distributions.Normal(0.0, 1.0).cdf(z.abs()))
    shares, found = [], []
    for row in p:
        chosen = significant(Scores(row, ("head",)), q=0.2).values
        shares.append(float(chosen[15:].sum() / chosen.sum().clamp(min=1)))
        found.append(float(chosen[:15].double().mean()))
    assert 0.1 < sum(shares) / 300 <= 0.17 and sum(found) / 300 > 0.7


def test_masked_p_values_are_no_tests() -> None:
    p = Scores(torch.tensor([0.01, math.nan, 0.02]), ("head",), mask=torch.tensor([True, False, True]))
    adjusted = benjamini_hochberg(p)
    assert adjusted.meta["tests"] == 2 and adjusted.exists.tolist() == [True, False, True]
    assert adjusted.values[0] == pytest.approx(0.02) and not significant(p).values[1]


def test_sign_consistency_counts_the_majority() -> None:
    values = torch.tensor([[1.0, 0.0], [2.0, -1.0], [-1.0, -2.0], [3.0, 0.0]])
    assert sign_consistency(pairs(values)).values.tolist() == [0.75, 0.5]


@pytest.mark.parametrize("df, expected", [(1, 12.7062), (2, 4.3027), (3, 3.1824), (9, 2.2622), (100, 1.9840)])
def test_student_quantiles_equal_the_tables(df: int, expected: float) -> None:
    assert student_quantile(0.975, df) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("call", "telling"),
    [
        (lambda s: bootstrap(s, axis="batch"), r"no axis 'batch'; the axes are \('pair', 'head'\)"),
        (lambda s: bootstrap(s.select(pair=[0])), "1 entries along 'pair'; at least 2"),
        (lambda s: bootstrap(s, groups=["a"] * 5), "1 group; at least 2"),
        (lambda s: bootstrap(s, groups=["a", "b"]), "2 groups for 5 entries"),
        (lambda s: bootstrap(s, level=95), "between 0 and 1"),
        (lambda s: sign_flip_test(s, draws=0), "draws=0"),
        (lambda s: sign_flip_test(s.select(pair=[2])), "at least 2"),
        (lambda s: benjamini_hochberg(s), r"outside \[0, 1\]"),
        (lambda s: sign_consistency(s, axis="layer"), "no axis 'layer'"),
    ],
)
def test_bad_input_says_what_is_wrong(call, telling: str) -> None:
    with pytest.raises(ValueError, match=telling):
        call(pairs(torch.arange(10.0).view(5, 2)))
