"""`Scores`: selection, averages, tables, files and errors; effects between the runs of a sweep; files cut short."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from veena_lens.activation_cache import ActivationCache
from veena_lens.emotion import Directions
from veena_lens.interventions import Circuit, Steer
from veena_lens.scores import ReferenceRuns, Scores

CLEAN, CORRUPTED = torch.tensor([2.0, 5.0]), torch.tensor([1.0, 5.0])


def attention() -> Scores:
    values = torch.arange(2 * 3 * 4, dtype=torch.float64).reshape(2, 3, 4)
    mask = torch.ones(2, 1, 4, dtype=torch.bool)
    mask[1, 0, 3] = False
    labels = {"layer": [5, 7], "key": ["the", "face", "is", "sad"]}
    return Scores(values, ("layer", "head", "key"), labels, name="attention", unit="probability", mask=mask)


def test_labels_default_to_a_range() -> None:
    assert attention().labels["head"] == [0, 1, 2]


def test_selected_label_drops_its_axis_and_a_list_keeps_it() -> None:
    scores = attention()
    one = scores.select(layer=7, head=[2, 0])
    assert one.axes == ("head", "key") and one.labels["head"] == [2, 0] and one.unit == "probability"
    torch.testing.assert_close(one.values, scores.values[1][[2, 0]])
    assert one.mask is not None and not one.mask[:, 3].any()
    assert scores.select(head=-1).values.equal(scores.values[:, 2])


def test_select_takes_a_tensor_element_as_a_label() -> None:
    assert attention().select(head=[torch.tensor(1)]).labels["head"] == [1]


@pytest.mark.parametrize(
    ("wanted", "telling"),
    [({"layer": 6}, "does not occur; labels: 5 7"), ({"token": 1}, r"No axis 'token'; the axes are \('layer'")],
)
def test_unknown_selection_names_what_exists(wanted: dict, telling: str) -> None:
    with pytest.raises(ValueError, match=telling):
        attention().select(**wanted)


def test_repeated_label_must_be_asked_for_in_a_list() -> None:
    scores = Scores(torch.tensor([1.0, 2.0, 3.0]), ("token",), {"token": ["the", "face", "the"]})
    with pytest.raises(ValueError, match=r"entries \[0, 2\]"):
        scores.select(token="the")
    assert scores.select(token=["the"]).values.tolist() == [1.0, 3.0]


def test_mean_leaves_padding_out() -> None:
    mean = attention().mean("key", "head")
    assert mean.axes == ("layer",) and mean.mask is None
    torch.testing.assert_close(mean.values, torch.tensor([5.5, 17.0], dtype=torch.float64))


def test_mean_over_nothing_is_masked() -> None:
    scores = Scores(torch.ones(2, 3), ("row", "key"), mask=torch.tensor([[True], [False]]))
    mean = scores.mean("key")
    assert mean.values[0] == 1 and math.isnan(mean.values[1]) and mean.exists.tolist() == [True, False]


def test_frame_holds_the_entries_that_exist() -> None:
    frame = attention().to_frame()
    assert list(frame.columns) == ["layer", "head", "key", "value"] and len(frame) == 24 - 3
    assert frame[(frame.layer == 7) & (frame["key"] == "sad")].empty
    assert frame.iloc[5].tolist() == [5, 1, "face", 5.0]


def test_top_is_ordered_and_leaves_padding_and_nan_out() -> None:
    top = attention().top(2)
    assert top["value"].tolist() == [22.0, 21.0] and top["key"].tolist() == ["is", "face"]
    signed = Scores(torch.tensor([1.0, -3.0, float("nan"), 2.0]), ("head",))
    assert signed.top(2, by="abs")["head"].tolist() == [1, 3]
    assert signed.top(1, largest=False)["head"].tolist() == [1]


def test_file_gives_back_everything(tmp_path) -> None:
    scores = Scores(
        torch.randn(2, 2, dtype=torch.bfloat16).T,
        ("site", "at"),
        {"site": ["resid", None], "at": [0.5, True]},
        name="effect",
        unit="logits",
        mask=torch.tensor([True, False]),
        meta={"model": "tiny", "rows": [1, 2]},
    )
    again = Scores.load(scores.save(tmp_path / "deep" / "scores.safetensors"))
    assert again.values.equal(scores.values) and again.values.dtype == torch.bfloat16
    assert again.mask is not None and again.mask.equal(scores.mask)
    for part in ("axes", "labels", "name", "unit", "meta"):
        assert getattr(again, part) == getattr(scores, part), part
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["scores.safetensors"]


def test_file_of_another_kind_is_refused(tmp_path) -> None:
    save_file({"values": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no Scores"):
        Scores.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("arguments", "telling"),
    [
        ({"axes": ("layer",)}, r"1 axes \('layer',\) for values of shape \[2, 3\]"),
        ({"axes": ("layer", "layer")}, "names must differ"),
        ({"axes": ("layer", "value")}, "not 'value'"),
        ({"labels": {"token": [1, 2]}}, r"labels for \['token'\]"),
        ({"labels": {"head": [1, 2]}}, "2 labels for axis 'head', which has 3 entries"),
        ({"labels": {"head": [1, 2, (3, 4)]}}, "is a tuple"),
        ({"mask": torch.ones(2, 2, dtype=torch.bool)}, r"mask \[2, 2\] does not broadcast"),
        ({"meta": {"model": torch.zeros(1)}}, "meta must be JSON-able"),
    ],
)
def test_parts_that_disagree_are_refused(arguments: dict, telling: str) -> None:
    with pytest.raises(ValueError, match=telling):
        Scores(**{"values": torch.zeros(2, 3), "axes": ("layer", "head"), **arguments})


def test_plot_draws_one_axis_or_two_and_names_them_otherwise() -> None:
    scores = attention()
    assert scores.mean("key").plot().axes[0].get_xlabel() == "head"
    curve = scores.select(layer=[5], key="is").plot().axes[0]
    assert curve.get_title(loc="left") == "attention, layer 5" and curve.get_xlabel() == "head"
    with pytest.raises(ValueError, match=r"3, \('layer', 'head', 'key'\): select or reduce"):
        scores.plot()
    with pytest.raises(ValueError, match="single number"):
        scores.select(layer=5, head=0, key="is").plot()


@pytest.mark.parametrize("axes", [(), ("layer",), ("batch", "layer", "head", "query", "key", "pos")])
def test_repr_fits_in_nine_lines(axes: tuple[str, ...]) -> None:
    scores = Scores(torch.rand([40] * min(len(axes), 2) + [1] * (len(axes) - 2)), axes, name="attention")
    assert len(repr(scores).splitlines()) < 10
    assert all(len(line) < 110 for line in repr(scores).splitlines())


def test_padding_does_not_reach_the_repr() -> None:
    text = repr(attention())
    assert "from 0 to 22" in text and "21 of 24 entries exist" in text and "'the' 'face' 'is' 'sad'" in text


@settings(max_examples=40, deadline=None)
@given(shape=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=st.integers(0, 2**16), at=st.integers(0, 3))
def test_mean_equals_mean_of_the_frame(shape: list[int], seed: int, at: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(shape, generator=generator, dtype=torch.float64)
    mask = torch.rand(shape, generator=generator) > 0.3
    axes = tuple("abcd"[: len(shape)])
    scores, axis = Scores(values, axes, mask=mask), axes[at % len(shape)]
    mean, rest = scores.mean(axis), [a for a in axes if a != axis]
    frame = scores.to_frame()
    expected = frame.groupby(rest)["value"].mean().tolist() if rest else [frame["value"].mean()]
    found = mean.to_frame()["value"].tolist()
    assert len(found) == len(expected) or not len(frame)
    if len(frame):
        torch.testing.assert_close(
            torch.tensor(found, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64)
        )


# --- indices, loops, numpy ---------------------------------------------------------------------------------------
def test_an_index_goes_by_label_along_the_axes_in_order() -> None:
    scores = attention()
    assert scores[7].axes == ("head", "key") and scores[7].values.equal(scores.values[1])
    for index in ((7, 2), (np.int64(7), torch.tensor(2)), (7, -1)):
        assert scores[index].axes == ("key",) and scores[index].values.equal(scores.values[1, 2])
    assert float(scores[5, 1, "face"]) == scores.values[0, 1, 1]
    for index in ((..., "face"), (slice(None), slice(None), "face")):
        assert scores[index].axes == ("layer", "head") and scores[index].values.equal(scores.values[..., 1])
    for kept in ([2, 0], np.array([2, 0]), torch.tensor([2, 0]), range(2, -1, -2)):
        assert scores[5, kept].labels["head"] == [2, 0]
    assert scores[:, 1:].labels["head"] == [1, 2] and scores[...].shape == scores[()].shape == scores.shape
    assert scores[7, 0].mask is not None and not scores[7, 0].exists[3]


@pytest.mark.parametrize(
    ("index", "error", "telling"),
    [
        (0, ValueError, r"select\(layer=0\): this label does not occur; labels: 5 7"),
        ((5, 9), ValueError, r"head=9"),
        (slice(5, 8), ValueError, r"5:8 of axis 'layer', whose labels are 5 7: a slice counts entries"),
        ((5, 0, "is", 1), IndexError, r"4 indices for 3 axes \('layer', 'head', 'key'\)"),
        ((..., 0, ...), IndexError, "once at most"),
        (True, ValueError, "does not occur"),
    ],
)
def test_an_index_that_is_not_there_says_what_is(index: Any, error: type, telling: str) -> None:
    with pytest.raises(error, match=telling):
        attention()[index]


def test_a_loop_goes_along_the_first_axis() -> None:
    scores = attention()
    assert len(scores) == 2 and [layer.axes for layer in scores] == [("head", "key")] * 2
    assert [float(x) for x in scores[5, 1]] == scores.values[0, 1].tolist()
    twice = Scores(torch.tensor([1.0, 2.0]), ("token",), {"token": ["the", "the"]})
    assert [float(x) for x in twice] == [1.0, 2.0], "labels may repeat"
    assert [pair.clean.tolist() for pair in sweep()] == [[2.0], [5.0]]
    single = scores[5, 1, "is"]
    assert bool(single) and bool(Scores(torch.zeros(0), ("layer",)))
    for wrong in (lambda: len(single), lambda: list(single), lambda: float(scores)):
        with pytest.raises(TypeError, match="These Scores"):
            wrong()


def test_numpy_reads_what_tables_show() -> None:
    scores = attention()
    numbers = np.asarray(scores)
    assert numbers.shape == (2, 3, 4) and np.isnan(numbers[1, 0, 3]) and np.isnan(float(scores[7, 0, "sad"]))
    assert np.array_equal(numbers[0], scores.values[0].numpy())
    effects = np.asarray(sweep()[0])
    assert effects.tolist() == [0.0, 0.5, 1.0] and effects.dtype == np.float32
    assert float(sweep()[0, 4]) == 0.5 and sweep()[0, 4].values.item() == 1.5
    assert np.array(Scores(torch.ones(2, dtype=torch.bfloat16), ("layer",)), dtype="float64").tolist() == [1.0, 1.0]
    numbers[:] = 0
    assert scores.values.sum() > 0, "numpy is given a copy"


# --- sweeps --------------------------------------------------------------------------------------------------
def sweep(direction: str = "denoising") -> Scores:
    values = torch.tensor([[1.0, 1.5, 2.0], [5.0, 6.0, 7.0]])
    runs = ReferenceRuns(CLEAN, CORRUPTED, direction)
    return Scores(values, ("pair", "layer"), {"layer": [3, 4, 9]}, name="metric", reference=runs)


def said() -> Scores:
    texts = ["happy", "sad", "angry", "calm"]
    columns = {"text": texts, "tokens": [[1], [2, 3], [4], []]}
    return Scores(torch.tensor([[1.0, 0.0], [0.5, 2.0]]), ("row", "entry"), {"entry": ["a", "b"]}, columns=columns)


def test_effects_lie_between_the_two_runs() -> None:
    denoising, noising = sweep(), sweep("noising")
    assert denoising.scores[0].tolist() == [0.0, 0.5, 1.0] and noising.scores[0].tolist() == [1.0, 0.5, 0.0]
    assert bool(denoising.scores[1].isnan().all()), "the two runs of this pair do not differ"
    assert denoising.clean is CLEAN and denoising.corrupted is CORRUPTED and noising.direction == "noising"
    plain = denoising.effects()
    assert plain.reference is None and plain.name == "denoising effect"
    torch.testing.assert_close(plain.values, denoising.scores, equal_nan=True)
    assert plain.effects() is plain and plain.scores is plain.values


def test_tables_ranks_means_and_words_are_of_the_effects() -> None:
    scores = sweep()
    frame = scores.to_frame()
    assert list(frame.columns) == ["pair", "layer", "value", "metric"]
    assert frame.loc[1].tolist() == [0, 4, 0.5, 1.5]
    assert scores.top(2)["layer"].tolist() == [9, 4]
    assert scores.select(pair=0).mean("layer").values.item() == 0.5
    assert "denoising effect from 0 to 1, mean 0.5" in repr(scores)
    assert "do not differ" in repr(scores.select(pair=1))


def test_selected_pairs_keep_their_own_runs() -> None:
    scores = sweep()
    one = scores.select(pair=0)
    assert one.axes == ("layer",) and one.clean.tolist() == [2.0] and one.scores.tolist() == [0.0, 0.5, 1.0]
    assert one.select(layer=4).scores.item() == 0.5
    turned = scores.select(pair=[1, 0])
    assert turned.corrupted.tolist() == [5.0, 1.0]
    torch.testing.assert_close(turned.scores, scores.scores.flip(0), equal_nan=True)


def test_scores_without_two_runs_or_texts_say_so() -> None:
    scores = Scores(torch.ones(2), ("layer",), name="lens")
    for name in ("clean", "corrupted", "direction"):
        assert not hasattr(scores, name)
    with pytest.raises(AttributeError, match="'lens'.* only sweeps compare two runs"):
        _ = scores.clean
    with pytest.raises(AttributeError, match="only generation sweeps"):
        _ = scores.texts


def test_texts_stay_with_their_values() -> None:
    scores = said()
    assert scores.texts == [["happy", "sad"], ["angry", "calm"]] and scores.tokens[0] == [[1], [2, 3]]
    assert scores.to_frame()["text"].tolist() == ["happy", "sad", "angry", "calm"]
    assert scores.top(1)["text"].tolist() == ["calm"]
    assert scores.select(entry="b").texts == ["sad", "calm"]
    assert scores.select(row=[1]).texts == [["angry", "calm"]]
    assert "'happy'" in repr(scores) and not hasattr(scores.mean("row"), "texts")
    with pytest.raises(ValueError, match="1 entries in column 'text' for 4 values"):
        Scores(torch.zeros(2, 2), ("row", "entry"), columns={"text": ["happy"]})
    unscored = Scores(torch.full((2,), torch.nan), ("entry",), columns={"text": ["happy", "sad"]})
    assert list(unscored.to_frame().columns) == ["entry", "text"]


@pytest.mark.parametrize("made", [sweep, said, lambda: sweep("noising")], ids=["sweep", "texts", "noising"])
def test_file_gives_back_runs_and_columns(made, tmp_path: Path) -> None:
    scores = made()
    again = Scores.load(scores.save(tmp_path / "scores.safetensors"))
    torch.testing.assert_close(again.scores, scores.scores, equal_nan=True, rtol=0, atol=0)
    assert again.columns == scores.columns and again.labels == scores.labels
    if scores.reference is not None:
        assert again.clean.equal(scores.clean) and again.direction == scores.direction
    pd.testing.assert_frame_equal(again.to_frame(), scores.to_frame())


def test_file_of_a_sweep_from_before_sweeps_were_scores_loads(tmp_path: Path) -> None:
    scores = sweep("noising")
    about = {"format": "veena_lens.SweepResult/1", "axes": ["pair", "layer"], "direction": "noising"}
    about |= {"labels": {"pair": [0, 1], "layer": [3, 4, 9]}, "meta": {"positions": "last"}}
    tensors = {"values": scores.values, "clean": CLEAN, "corrupted": CORRUPTED}
    save_file(tensors, tmp_path / "old.safetensors", metadata={"veena_lens": json.dumps(about)})
    old = Scores.load(tmp_path / "old.safetensors")
    assert old.meta == {"positions": "last"}
    pd.testing.assert_frame_equal(old.to_frame(), scores.to_frame())


def test_figure_of_a_sweep_shows_the_mean_effects() -> None:
    scores = sweep().select(pair=[0])
    drawn = scores.plot().axes[0].get_lines()[0].get_ydata()
    assert list(drawn) == [0.0, 0.5, 1.0]


# --- files that were cut short, or are something else -----------------------------------------------------------
def cache() -> Any:
    return ActivationCache({"blocks.0.hook_resid_post": torch.ones(1, 3, 50)})


def circuit() -> Any:
    return Circuit([Steer(layer=0, vector=torch.ones(50))])


def ones() -> Any:
    return Scores(torch.ones(50), ("layer",))


def sweep_of_ones() -> Any:
    return Scores(torch.ones(2, 30), ("layer", "head"), reference=ReferenceRuns(torch.ones(1), torch.zeros(1)))


def directions() -> Any:
    two = torch.ones(2, 50)
    kept = {"norms": torch.ones(2), "neutral_mean": two, "emotional_mean": two}
    return Directions(overall=two, per_emotion=two[None], emotions=("sad",), counts={"sad": 1}, **kept)


@pytest.mark.parametrize("made", [cache, circuit, ones, sweep_of_ones, directions], ids=lambda made: made.__name__)
def test_file_cut_short_is_named_with_the_remedy(made: Callable[[], Any], tmp_path: Path) -> None:
    path = tmp_path / "kept.safetensors"
    thing = made()
    thing.save(path)
    type(thing).load(path)
    whole = path.read_bytes()
    for size in (0, 7, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=rf"kept\.safetensors \({size:,} bytes\) .* cut short .* copy it again"):
            type(thing).load(path)
    path.write_bytes(b"PK" + whole)
    with pytest.raises(ValueError, match=r"kept\.safetensors .* another kind of file"):
        type(thing).load(path)
    with pytest.raises(FileNotFoundError, match=r"No .* at .*none\.safetensors"):
        type(thing).load(tmp_path / "none.safetensors")
