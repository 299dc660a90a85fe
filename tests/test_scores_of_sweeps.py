"""`Scores` of sweeps: effects between two runs, texts beside the values, and files of either kind."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from veena_lens.scores import ReferenceRuns, Scores

CLEAN, CORRUPTED = torch.tensor([2.0, 5.0]), torch.tensor([1.0, 5.0])


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
