"""Probes find what was planted, in groups they have not seen, and nothing in shuffled labels."""

from __future__ import annotations

import builtins
from typing import Any

import numpy as np
import pytest
import torch

from tests.circuits.runs import case_of, pair_of
from veena_lens import HookedVLM
from veena_lens.activation_cache import ActivationCache
from veena_lens.circuits import probes
from veena_lens.circuits.probes import linear_probes

QUIET: dict[str, Any] = dict(progress=False, draws=200, controls=2)
N, WORDS = 48, 3


@pytest.fixture(scope="module")
def planted() -> tuple[Any, Any, list[str], list[int]]:
    """A text model whose rows name one of three words at the end, after random text; 12 groups of 4 rows."""
    from tests.cases import build_hf

    model = HookedVLM.from_hf(build_hf(case_of("text-llama-bias")), casts="none")
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(3, 90, (N, 7), generator=generator)
    names = torch.randint(WORDS, (N,), generator=generator)
    tokens[:, -1] = 100 + names
    groups = (torch.arange(N) // 4)[torch.randperm(N, generator=generator)].tolist()
    return model, model.as_inputs(tokens), [f"word {n}" for n in names.tolist()], groups


def probe(planted: Any, **kw: Any) -> Any:
    model, inputs, labels, groups = planted
    return linear_probes(model, inputs, labels, groups, **(QUIET | kw))


def test_a_word_is_read_where_it_stands_and_not_before_it(planted) -> None:
    found = probe(planted, positions=["last", 2, [0, 1]], folds=4)
    assert found.scores.axes == ("layer", "position", "statistic")
    assert found.scores.labels["position"] == ["last", "2", "[0, 1]"]
    accuracy = found.accuracy
    assert accuracy.axes == ("layer", "position")
    assert accuracy.select(position="last").values.min() == 1
    assert accuracy.select(position="2").values.max() < 0.65
    control = found.scores.select(statistic="control", position="last").values
    assert control.max() < 0.6
    low, high = (found.scores.select(statistic=s, position="2").values for s in ("low", "high"))
    middle = accuracy.select(position="2").values
    assert bool(((low <= middle) & (middle <= high)).all()) and bool((high - low > 0.05).all())
    largest = max(found.scores.meta["classes"].values())
    assert found.scores.select(statistic="chance").values.flatten().tolist() == pytest.approx([largest / N] * 6)


def test_directions_steer_the_probe_towards_their_class(planted) -> None:
    model, inputs, labels, _groups = planted
    found = probe(planted, folds=3)
    assert found.directions.shape == (2, 1, 3, 48) and found.classes == list(dict.fromkeys(labels))
    torch.testing.assert_close(found.directions.norm(dim=-1), torch.ones(2, 1, 3, dtype=torch.float64))
    _, cache = model.run_with_cache(inputs, names_filter="blocks.1.hook_resid_post")
    resid = cache["blocks.1.hook_resid_post"][:, -1].detach()
    push = torch.stack([resid @ found.direction(c, 1) for c in found.classes], -1)
    own = torch.tensor([found.classes.index(label) for label in labels])
    for c in range(3):
        assert float(push[own == c, c].mean()) > float(push[own != c, c].max())
    steer = found.steer("word 1", 1, alpha=2.0, positions="last")
    with torch.no_grad(), model.intervene([steer]):
        _, steered = model.run_with_cache(inputs, names_filter="blocks.1.hook_resid_post")
    moved = steered["blocks.1.hook_resid_post"][:, -1] - resid
    torch.testing.assert_close(moved, (2 * found.direction("word 1", 1)).expand_as(moved))
    with pytest.raises(ValueError, match="no class 'word 7'"):
        found.direction("word 7", 1)
    assert "3 classes" in repr(found)


def test_two_classes_have_opposite_directions_along_the_difference(planted) -> None:
    model, inputs, labels, groups = planted
    pair = [label == "word 0" for label in labels]
    found = linear_probes(model, inputs, pair, groups, layers=[-1], folds=2, **QUIET)
    one, other = found.direction(True, 1), found.direction(False, 1)
    torch.testing.assert_close(one, -other)
    assert found.accuracy.values.item() > 0.95 and found.scores.labels["layer"] == [1]


def test_a_probe_equals_scikit_learn_fold_by_fold(planted) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model, inputs, labels, groups = planted
    train = [g < 8 for g in groups]
    found = linear_probes(model, inputs, labels, groups, positions=3, layers=[0], train=train, **QUIET)
    _, cache = model.run_with_cache(inputs, names_filter="blocks.0.hook_resid_post")
    x = cache["blocks.0.hook_resid_post"][:, 3].detach().numpy()
    learned = torch.tensor(train).numpy()
    truth = torch.tensor([found.classes.index(label) for label in labels]).numpy()
    theirs = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(x[learned], truth[learned])
    assert found.accuracy.values.item() == pytest.approx(theirs.score(x[~learned], truth[~learned]))
    weights = torch.from_numpy(theirs[-1].coef_ / theirs[0].scale_)
    directions = weights / weights.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(found.directions[0, 0], directions, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("folds", [2, 3, 5, 12])
def test_no_group_stands_on_both_sides_and_every_row_is_held_out_once(folds: int) -> None:
    generator = torch.Generator().manual_seed(folds)
    group = torch.randint(12, (90,), generator=generator)
    group[:12] = torch.arange(12)
    truth = torch.randint(3, (90,), generator=generator)
    sides = probes._sides("test", truth, group, list(range(12)), None, folds, generator)
    for learned, held in sides:
        assert not set(group[learned].tolist()) & set(group[held].tolist())
        assert len(learned) + len(held) == 90
    assert sorted(torch.cat([held for _, held in sides]).tolist()) == list(range(90))
    sizes = [len(held) for _, held in sides]
    assert max(sizes) - min(sizes) <= int(group.bincount().max())


def test_shuffling_keeps_counts_and_moves_whole_groups_where_they_have_one_label() -> None:
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(20) // 2
    truth = (group % 3 == 0).long()
    shuffled = probes._shuffled(truth, group, generator)
    assert bool((shuffled.view(10, 2)[:, 0] == shuffled.view(10, 2)[:, 1]).all())
    assert int(shuffled.sum()) == int(truth.sum()) and not torch.equal(shuffled, truth)
    mixed = torch.arange(20) % 2
    assert int(probes._shuffled(mixed, group, generator).sum()) == 10


def test_intervals_resample_groups_not_rows() -> None:
    """Ten groups that are right or wrong as a whole: the interval is that of ten draws, whatever the rows."""
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(10).repeat_interleave(50)
    weights = probes._resampled(group, 4000, generator)
    right = (group < 5).double()
    spread = ((weights @ right) / weights.sum(1)).std()
    assert float(spread) == pytest.approx((0.25 / 10) ** 0.5, rel=0.05)


@pytest.mark.parametrize("name", ["three-images-and-none", "llava-next", "qwen2_vl-plain", "qwen3_vl-plain"])
def test_padded_rows_are_read_at_their_own_places_and_caches_serve_as_well(name: str, model_of) -> None:
    model, clean, _corrupted = pair_of(model_of, name)
    wheres = ["last", "query", slice(0, 2)]
    part = probes._features(model, clean, clean, ["blocks.1.hook_resid_post"], wheres, 2)
    for row in range(len(clean)):
        alone = clean[row].without_padding()
        with torch.no_grad():
            resid = model.run_with_cache(alone)[1]["blocks.1.hook_resid_post"][0]
        expected = [resid[-1], resid[alone.spans[0].query].mean(0), resid[:2].mean(0)]
        torch.testing.assert_close(part[0, :, row], torch.stack(expected), rtol=1e-9, atol=1e-10)
    rows = [i % len(clean) for i in range(6)]
    many, labels = clean[rows], [0, 1, 0, 1, 0, 1]
    kw: dict[str, Any] = dict(labels=labels, groups=list("abcdef"), site="heads", positions=wheres, folds=2)
    direct = linear_probes(model, many, **kw, **QUIET)
    with torch.no_grad():
        _, cache = model.run_with_cache(many)
    cached = linear_probes(model, cache, **kw, **QUIET)
    torch.testing.assert_close(direct.scores.values, cached.scores.values)
    torch.testing.assert_close(direct.directions, cached.directions, rtol=1e-6, atol=1e-8)
    with pytest.raises(ValueError, match="hook_resid_post"):
        direct.steer(0, 0, position="last")


@pytest.mark.parametrize(
    ("kw", "telling"),
    [
        (dict(labels=["a"] * N), "two classes"),
        (dict(labels=["a", "b"]), "2 labels"),
        (dict(groups=[0]), "1 groups"),
        (dict(groups=[0] * N), "folds"),
        (dict(folds=1), "folds=1"),
        (dict(train=[True] * N), "of both kinds"),
        (dict(train=[i < 20 for i in range(N)]), "both sides"),
        (dict(site="residd"), "residd"),
        (dict(site="attn.hook_pattern"), "one vector per position"),
        (dict(layers=[4]), "layer 4"),
        (dict(positions="lats"), "lats"),
        (dict(strength=0), "strength"),
        (dict(max_rows=0), "max_rows"),
    ],
)
def test_what_does_not_fit_is_refused(kw: dict[str, Any], telling: str, planted) -> None:
    model, inputs, labels, groups = planted
    with pytest.raises(ValueError, match=telling):
        linear_probes(model, inputs, **({"labels": labels, "groups": groups} | QUIET | kw))


def test_a_training_side_of_one_class_and_caches_without_inputs_are_refused(planted) -> None:
    model, inputs, labels, groups = planted
    lone = ["a" if g else "b" for g in groups]
    with pytest.raises(ValueError, match="one class alone"):
        linear_probes(model, inputs, lone, groups, train=[g > 0 for g in groups], **QUIET)
    with pytest.raises(ValueError, match="without its inputs"):
        linear_probes(model, ActivationCache({}, model), labels, groups, **QUIET)


def test_without_scikit_learn_the_error_says_what_to_install(planted, monkeypatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kw: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kw)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"veena-lens\[circuits\]"):
        probe(planted)


def test_the_embedded_model_knows_the_emotion_of_people_held_out() -> None:
    from veena_lens.checkpoints.files import bundled_pairs

    model = HookedVLM.from_pretrained("tiny-llava-emotion")
    kept = [p for pair in bundled_pairs("development") for p in pair if pair[0].emotion in ("happy", "sad")]
    pictures = list({p.file: p for p in kept}.values())[:45]
    question = "name the emotions of the person in the picture."
    inputs = model.prepare(text=[question] * len(pictures), images=[[p.open()] for p in pictures])
    found = linear_probes(
        model, inputs, [p.emotion for p in pictures], [p.identity for p in pictures], layers=[0, 6], folds=3, **QUIET
    )
    late = found.scores.select(layer=6, position="last")
    assert late.select(statistic="accuracy").values > 0.9 > late.select(statistic="control").values
    assert late.select(statistic="low").values > late.select(statistic="chance").values


# --- numbers of one's own ---------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def numbers(planted) -> tuple[Any, list[str], list[int]]:
    model, inputs, labels, groups = planted
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
    return torch.stack([cache["resid_post", layer][:, -1] for layer in range(2)]), labels, groups


def test_numbers_of_ones_own_give_what_the_model_gives(planted, numbers) -> None:
    X, y, groups = numbers
    wanted = probe(planted, folds=4)
    given: list[Any] = [
        linear_probes(X, y, groups, folds=4, site="resid", **QUIET),
        linear_probes(X=X.numpy(), y=np.array(y), groups=torch.tensor(groups), folds=4, **QUIET),
        linear_probes({layer: X[layer].tolist() for layer in (0, 1)}, y, groups=groups, folds=4, **QUIET),
    ]
    for found in given:
        torch.testing.assert_close(found.scores.values, wanted.scores.values)
        torch.testing.assert_close(found.directions, wanted.directions, rtol=1e-5, atol=1e-7)
        assert found.scores.axes == wanted.scores.axes and found.scores.labels["layer"] == [0, 1]
        assert found.scores.labels["position"] == ["given"] and found.classes == wanted.classes
    assert given[0].steer("word 1", 1).layer == 1
    with pytest.raises(ValueError, match="these read X; .*site='resid' says that X holds it"):
        given[1].steer("word 1", 1)
    assert "Probes of X: 3 classes, 48 rows of 12 groups" in repr(given[1])


def test_one_layer_of_ones_own_may_be_named_and_a_dictionary_chosen_from(numbers) -> None:
    X, y, groups = numbers
    one = linear_probes(X[1], y, groups, folds=4, layers=[17], **QUIET)
    assert one.scores.labels["layer"] == [17] and one.direction("word 0", 17).shape == (48,)
    named = linear_probes({"early": X[0], "late": X[1]}, y, groups, folds=4, layers=["late"], **QUIET)
    torch.testing.assert_close(named.scores.values, one.scores.values)
    assert named.scores.labels["layer"] == ["late"]


@pytest.mark.parametrize(
    ("change", "error", "telling"),
    [
        (dict(y=["a"] * N), ValueError, "two classes"),
        (dict(y=["a", "b"]), ValueError, f"2 labels for {N} rows"),
        (dict(y=torch.zeros(N, 2)), ValueError, rf"labels must be one entry per row, \[{N}\], not \[{N}, 2\]"),
        (dict(y=[float("nan")] + [1.0, 2.0] * 23 + [1.0]), ValueError, "labels hold nan at row 0"),
        (dict(groups=[0] * (N - 1)), ValueError, f"47 groups for {N} rows"),
        (dict(groups=[0] * N), ValueError, r"1 groups cannot be split into 5 folds; give more\."),
        (dict(groups=[i % 3 for i in range(N)]), ValueError, "3 groups cannot be split into 5 folds; .* or folds=3"),
        (dict(groups=None), TypeError, r"groups is missing: .*range\(len\(y\)\) says that items are independent"),
        (dict(y=None, groups=None), TypeError, "y, groups are missing"),
        (dict(X=torch.zeros(N)), ValueError, rf"must be \[items, width\] or \[layers, items, width\], not \[{N}\]"),
        (dict(X="numbers"), TypeError, "X must be a tensor, an array or a list of numbers"),
        (dict(X=torch.zeros(0, 0, 3)), ValueError, "X is empty"),
        (dict(X={0: torch.zeros(N, 3), 1: torch.zeros(N, 4)}), ValueError, "one .* per layer, all alike"),
        (dict(layers=[5]), ValueError, r"layers=\[5\] names 1 layers, but X has 2"),
        (dict(layers=5), TypeError, "must be a list of the names"),
        (dict(positions="query"), TypeError, "go with a model"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(change: dict[str, Any], error: type, telling: str, numbers) -> None:
    X, y, groups = numbers
    with pytest.raises(error, match=telling):
        linear_probes(**({"X": X, "y": y, "groups": groups} | QUIET | change))


def test_nan_is_named_with_its_place_and_calls_of_two_kinds_are_refused(planted, numbers) -> None:
    X, y, groups = numbers
    X = X.clone()
    X[1, 7, 3] = torch.nan
    with pytest.raises(ValueError, match="X holds nan at layer 1, item 7, column 3"):
        linear_probes(X, y, groups, **QUIET)
    model, inputs, labels, _ = planted
    for call in (
        lambda: linear_probes(model, inputs, labels, groups, X=X, **QUIET),
        lambda: linear_probes(X, y, groups, y=y, **QUIET),
        lambda: linear_probes(model, inputs, labels, **QUIET),
        lambda: linear_probes({0: X[0]}, y, groups, layers=[1], **QUIET),
    ):
        with pytest.raises((TypeError, ValueError), match=r"without a model|y is given twice|per row|no layer 1"):
            call()
