"""A view opens where the answer's content word is predicted; what Python says of it is what the page shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.app.view.conftest import QUESTION
from veena_lens.app.view import ExplorerView
from veena_lens.app.view.effects import effects_view
from veena_lens.app.view.opening import MEAN, content_place, head_name, seen_layer
from veena_lens.app.view.shown import shown_map
from veena_lens.scores import Scores


@pytest.mark.parametrize(
    ("texts", "place"),
    [
        ([" the", " person", " feels", " happy", " and", " joyful", "."], 3),
        ([" happy"], 0),
        ([" a", " red", " bic", "ycle", "."], 1),
        ([" the", " dog", " is", " sad", "."], 3),
        ([" the", " ", "melan", "ch", "oly", " man"], 2),
        ([" it", " is", " the", " person", "."], None),
        ([], None),
        (["42", "!"], None),
    ],
)
def test_content_word_is_an_emotion_or_the_first_that_is_not_form(texts: list[str], place: int | None) -> None:
    assert content_place(texts) == place


def test_head_names_are_written_one_way() -> None:
    assert head_name(2, 5) == "L2H5" and head_name(2, MEAN) == "layer 2, mean over heads"
    assert head_name(MEAN, 3) == "mean over layers, head 3"
    assert head_name(MEAN, MEAN) == "mean over layers, mean over heads"


def test_view_opens_where_the_content_word_is_predicted_in_the_layer_that_sees_most(model: Any, pair: Any) -> None:
    view = ExplorerView.from_run(model, (pair[0].open(), QUESTION), answer=" the person feels happy and joyful.")
    query = view.header["query"]
    assert view.word_at(query + 1).strip() == "happy"
    assert view.place_of(query) == f"position {query} (“feels”), which predicts “happy”"
    maps = model.attention(view.inputs, queries=[query], keys="all").values[0, :, :, 0]
    assert view.header["layer"] == seen_layer(maps, view.inputs.image_mask[0])
    without = ExplorerView.from_run(model, (pair[0].open(), QUESTION))
    assert without.header["query"] == without.inputs.spans[0].last


def test_shown_maps_are_those_of_the_library(model: Any, pair: Any) -> None:
    view = ExplorerView.from_run(model, (pair[0].open(), QUESTION), answer=" happy", words=[" happy", " sad"])
    query = view.header["query"]
    maps = model.attention(view.inputs, queries=[query], keys="all").values[0, :, :, 0]
    for layer, head in ((2, 5), (2, MEAN), (MEAN, MEAN)):
        state = {"mode": "attention", "query": query, "layer": layer, "head": head}
        values, name = shown_map(view, state)
        wanted = maps if layer == MEAN else maps[layer : layer + 1]
        wanted = wanted if head == MEAN else wanted[:, head : head + 1]
        torch.testing.assert_close(values, wanted.mean((0, 1)), rtol=0.05, atol=1e-3)
        assert name.startswith("attention")
    norms, _ = shown_map(view, {"mode": "norms", "query": query, "layer": 3, "head": MEAN})
    torch.testing.assert_close(norms, torch.from_numpy(view.arrays["norms"][3]).log10())
    lens, name = shown_map(view, {"mode": "lens", "query": query, "layer": 7, "head": MEAN, "word": 1})
    assert name == "probability of “sad”" and 0 <= float(lens.max()) <= 1


def test_sweep_over_positions_is_a_view_of_its_effects(model: Any, pair: Any) -> None:
    inputs = model.prepare(text=QUESTION, images=pair[0].open())
    n = inputs.shape[1]
    effects = Scores(torch.randn(3, n - 1), ("layer", "pos"), {"pos": list(range(1, n))})
    view = effects_view(effects, inputs, [pair[0].open()], model.tokenizer, name="share restored")
    shown, name = shown_map(view, {"mode": "effects", "layer": 1, "head": MEAN})
    assert name == "share restored" and bool(shown[0].isnan()) and torch.equal(shown[1:], effects.values[1])
    assert view.header["modes"] == ["effects"] and view.header["layers"] == 3 and view.payload()
    with pytest.raises(ValueError, match="holds effects, and no attention"):
        view.maps({"query": 3})
    with pytest.raises(ValueError, match=r"got axes \('layer',\)"):
        effects_view(effects.mean("pos"), inputs, None, None)
    with pytest.raises(ValueError, match="the sweep has positions to"):
        effects_view(Scores(torch.zeros(1, 1), ("layer", "pos"), {"pos": [n]}), inputs, None, None)
