"""Specificity: indices equal their formulas, noise has none, planted preferences are found, labels follow the rule."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from veena_lens.circuits.specificity import (
    causal_specificity,
    class_means,
    most_selective_class,
    specificity_index,
    specificity_labels,
    specificity_test,
)
from veena_lens.circuits.statistics import benjamini_hochberg
from veena_lens.scores import Scores

CLASSES = ["anger", "fear", "joy", "sad"]


def scores(values: Tensor, mask: Tensor | None = None) -> Scores:
    return Scores(values, ("pair", "head"), name="push", mask=mask)


def noise(n_each: int, heads: int, mean: float = 0.0) -> tuple[Scores, list[str]]:
    values = mean + torch.randn(4 * n_each, heads, dtype=torch.float64)
    return scores(values), [name for name in CLASSES for _ in range(n_each)]


def test_tau_is_one_minus_mean_other_over_max() -> None:
    """Method, sections 7 and 13.2: both forms of the same number."""
    pushes, classes = noise(6, 40, mean=0.5)
    x = class_means(pushes, classes).values.clamp(min=0)
    tau = specificity_index(pushes, classes).values
    best = x.amax(-1)
    keep = best > 0
    yanai = ((1 - x / best[:, None]).sum(-1) / 3)[keep]
    other = (1 - ((x.sum(-1) - best) / 3) / best)[keep]
    assert torch.allclose(tau[keep], yanai, rtol=0, atol=1e-10) and torch.allclose(yanai, other, rtol=0, atol=1e-10)
    assert ((tau >= 0) & (tau <= 1)).all() and not tau[~keep].any()


def test_indices_equal_their_formulas() -> None:
    pushes, classes = noise(7, 30, mean=1.5)
    means = class_means(pushes, classes).values
    best = means.argmax(-1)
    parts = pushes.values.T.reshape(30, 4, 7)
    for head in range(30):
        x, mine = means[head].clamp(min=0), int(best[head])
        others = [e for e in range(4) if e != mine]
        rest = x[others].mean()
        contrast = (x[mine] - rest) / (x[mine] + rest)
        spread = parts[head].var(-1)
        mixture = spread[others].mean() + (means[head][others] - means[head][others].mean()).square().mean()
        d = (means[head][mine] - means[head][others].mean()) / ((spread[mine] + mixture) / 2).sqrt()
        share = x / x.sum()
        entropy = 1 + (share[share > 0] * share[share > 0].log()).sum() / math.log(4)
        for name, expected in (("contrast", contrast), ("d_prime", d), ("entropy", entropy)):
            assert torch.allclose(specificity_index(pushes, classes, name).values[head], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("means", "tau", "entropy"),
    [([3.0, 0.0, 0.0, 0.0], 1.0, 1.0), ([2.0, 2.0, 2.0, 2.0], 0.0, 0.0), ([-1.0, -2.0, -3.0, 0.0], 0.0, 0.0)],
)
def test_extremes_have_their_values(means: list[float], tau: float, entropy: float) -> None:
    values = torch.tensor(means, dtype=torch.float64).repeat_interleave(3)[:, None]
    classes = [name for name in CLASSES for _ in range(3)]
    assert specificity_index(scores(values), classes).values.item() == pytest.approx(tau)
    assert specificity_index(scores(values), classes, "entropy").values.item() == pytest.approx(entropy)
    assert specificity_index(scores(values), classes, cross_fitted=True).values.item() == pytest.approx(tau)


def test_noise_looks_specific_unless_cross_fitted() -> None:
    """Section 7: with four classes of zero-mean noise tau averages 0.84; cross-fitted it is centred on 0."""
    pushes, classes = noise(8, 3000)
    plain = specificity_index(pushes, classes).values.mean()
    assert 0.75 < plain < 0.9
    for index in ("tau", "d_prime"):
        fitted = specificity_index(pushes, classes, index, cross_fitted=True, splits=4).values
        assert abs(fitted.mean()) < 0.03 and fitted.min() < -0.05, index


def test_planted_preferences_are_found_and_shuffled_labels_give_none() -> None:
    pushes, classes = noise(10, 60)
    planted = {0: "joy", 1: "anger", 2: "sad"}
    values = pushes.values + 1.5
    for head, name in planted.items():
        mine = torch.tensor([c == name for c in classes])
        values[:, head] = torch.randn(40, dtype=torch.float64) * 0.3 + 3.0 * mine
    pushes = scores(values)
    adjusted = benjamini_hochberg(specificity_test(pushes, classes, draws=400), q=0.05)
    assert (adjusted.values <= 0.05).nonzero().flatten().tolist() == [0, 1, 2]
    best = most_selective_class(pushes, classes)
    assert [best.meta["classes"][int(best.values[h])] for h in planted] == list(planted.values())
    assert specificity_index(pushes, classes, cross_fitted=True).values[:3].min() > 0.8
    shuffled = [classes[i] for i in torch.randperm(40).tolist()]
    assert benjamini_hochberg(specificity_test(pushes, shuffled, draws=400)).meta["discoveries"] == 0


def test_p_values_of_noise_keep_their_level() -> None:
    pushes, classes = noise(5, 1500, mean=1.0)
    p = specificity_test(pushes, classes, draws=200).values
    for level in (0.05, 0.2):
        assert (p <= level).double().mean() == pytest.approx(level, abs=0.02)


def test_labels_are_shuffled_within_persons() -> None:
    """Persons differ a lot; each prefers nothing. Within persons the test keeps its level, and finds a small effect."""
    generator = torch.Generator().manual_seed(5)
    persons = 10 * torch.randn(12, 1, 300, generator=generator, dtype=torch.float64)
    values = persons + torch.randn(12, 4, 300, generator=generator, dtype=torch.float64)
    values[:, 2, :20] += 2.0
    groups, classes = [i // 4 for i in range(48)], CLASSES * 12
    pushes = scores(values.flatten(0, 1) + 40)
    within = specificity_test(pushes, classes, "d_prime", groups=groups, draws=200).values
    across = specificity_test(pushes, classes, "d_prime", draws=200).values
    assert (within[20:] <= 0.05).double().mean() < 0.09
    assert (within[:20] <= 0.05).double().mean() > 0.9 and (across[:20] <= 0.05).double().mean() < 0.3


def test_groups_are_halved_whole() -> None:
    """What only one person shows does not survive judging on other persons."""
    values = torch.zeros(32, 1, dtype=torch.float64)
    values[2] = 100.0  # joy of the first person alone
    classes, groups = CLASSES * 8, [i // 4 for i in range(32)]
    assert specificity_index(scores(values), classes).values.item() == pytest.approx(1.0)
    fitted = specificity_index(scores(values), classes, cross_fitted=True, groups=groups, splits=20)
    assert fitted.values.item() < 0.4
    assert fitted.values.equal(
        specificity_index(scores(values), classes, cross_fitted=True, groups=groups, splits=20).values
    )


def test_missing_samples_are_left_out() -> None:
    pushes, classes = noise(4, 2, mean=2.0)
    mask = torch.ones(16, 2, dtype=torch.bool)
    mask[0, 0] = mask[4:8, 1] = False
    masked = scores(torch.where(mask, pushes.values, torch.nan), mask)
    means = class_means(masked, classes)
    assert torch.allclose(means.values[0, 0], pushes.values[1:4, 0].mean()) and not means.exists[1, 1]
    tau = specificity_index(masked, classes)
    assert tau.exists.tolist() == [True, False]
    assert torch.allclose(tau.values[0], specificity_index(scores(pushes.values[1:, :1]), classes[1:]).values[0])


def test_causal_matrices_are_summed_up() -> None:
    values = torch.zeros(3, 4, 4, dtype=torch.float64)
    values[0] = torch.eye(4)
    values[1] = 2.0
    values[2] = torch.eye(4) * -1 + 0.5
    drops = Scores(values, ("head", "category", "answer"), {"category": CLASSES, "answer": CLASSES})
    summed = causal_specificity(drops)
    assert summed.axes == ("head",)
    assert summed.values.tolist() == pytest.approx([1.0, 0.0, -1.0])
    mixed = torch.tensor([[3.0, 1.0], [1.0, 5.0]])
    two = Scores(mixed, ("category", "answer"), {"category": ["a", "b"], "answer": ["a", "b"]})
    assert causal_specificity(two).values.item() == pytest.approx((4 - 1) / 5)
    with pytest.raises(ValueError, match="must be the same two or more classes"):
        causal_specificity(Scores(mixed, ("category", "answer"), {"category": ["a", "b"], "answer": ["b", "a"]}))
    with pytest.raises(ValueError, match="no axis 'category'"):
        causal_specificity(Scores(mixed, ("row", "answer")))


def test_labels_follow_the_rule() -> None:
    index = Scores(torch.tensor([0.9, 0.9, 0.1, 0.1, 0.4, 0.9]), ("head",))
    p = Scores(torch.tensor([0.01, 0.3, 0.9, 0.9, 0.01, 0.01]), ("head",))
    means = torch.full((6, 2), 2.0)
    means[3, 1], means[5] = 0.1, torch.tensor([0.2, 0.3])
    got = specificity_labels(index, p, Scores(means, ("head", "category")), control=0.5)
    names = [got.meta["labels"][int(i)] for i in got.values]
    assert names == ["specific", "between", "general", "between", "between", "within control"]
    assert got.meta["counts"] == {"specific": 1, "general": 1, "between": 3, "within control": 1}
    bound = Scores(torch.tensor([3.0, 0.0, 0.0, 0.0, 0.0, 0.0]), ("head",))
    own = specificity_labels(index, p, Scores(means, ("head", "category")), control=bound)
    assert own.meta["labels"][int(own.values[0])] == "within control"
    with pytest.raises(ValueError, match="must agree"):
        specificity_labels(index, p, Scores(means.T, ("category", "head")), control=0.5)


@pytest.mark.parametrize(
    ("call", "telling"),
    [
        (lambda s, c: specificity_index(s, c, "gini"), "index='gini' must be one of tau, contrast, d_prime, entropy"),
        (lambda s, c: specificity_index(s, c[:3]), "3 classes for 8 entries"),
        (lambda s, c: specificity_index(s, ["joy"] * 8), "all entries are of class 'joy'"),
        (lambda s, c: specificity_index(s, c, axis="batch"), "no axis 'batch'"),
        (lambda s, c: specificity_index(s, c, "entropy", cross_fitted=True), "chooses no class to cross-fit"),
        (lambda s, c: specificity_index(s, ["odd", *c[1:]], cross_fitted=True), "class .* has 1 entry"),
        (lambda s, c: specificity_index(s, c, cross_fitted=True, groups=["p"] * 8), "1 group; at least 2"),
        (lambda s, c: specificity_index(s, c, cross_fitted=True, groups=c), "cannot be halved"),
        (lambda s, c: specificity_test(s, c, groups=c), "every group holds one class"),
        (lambda s, c: specificity_test(s, c, draws=0), "draws=0"),
    ],
)
def test_bad_input_says_what_is_wrong(call, telling: str) -> None:
    pushes, classes = noise(2, 3)
    with pytest.raises(ValueError, match=telling):
        call(pushes, classes)
