"""Key neurons: pushes against the MLP's output, the choice by hand, kinds, confirmation by paths."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from tests.emotion.asked import bundled
from tests.emotion.twins import LLAVA, QWEN, directions, heads_of, twins
from veena_lens import long_runs
from veena_lens.emotion.locate import neurons as module
from veena_lens.emotion.locate.answer_slot import LEAD_IN
from veena_lens.emotion.locate.neurons import KeyNeurons, key_neurons, neuron_projections, strongest_neurons
from veena_lens.emotion.methods import prepared
from veena_lens.emotion.pairs.loading import Pair
from veena_lens.scores import Scores


@pytest.mark.parametrize("name", [LLAVA, QWEN])
@pytest.mark.parametrize("at", ["last", "query"])
def test_pushes_sum_to_the_change_of_the_mlps_output_along_the_direction(name: str, at: str) -> None:
    model, d, pairs = bundled(name), directions(name), twins()[:2]
    pushes, means = neuron_projections(model, pairs, d, at, lead_in=LEAD_IN, batch_size=1)
    assert pushes.axes == ("pair", "layer", "neuron") and pushes.shape == (2, 8, 384)
    total = torch.zeros(2, 8, 384, dtype=torch.float64)
    for i, pair in enumerate(pairs):
        out = []
        for j, side in enumerate((pair.emotional, pair.neutral)):
            inputs = prepared(model, [side], lead_in=LEAD_IN)
            _, cache = model.run_with_cache(inputs)
            start = inputs.spans[0].query.start if at == "query" else inputs.shape[1] - 1
            out.append([cache[f"blocks.{layer}.hook_mlp_out"][0, start:].mean(0).double() for layer in range(8)])
            posts = [cache[f"blocks.{layer}.mlp.hook_post"][0, start:].mean(0).double() for layer in range(8)]
            total[j] += torch.stack(posts) / 2
        change = torch.stack(out[0]) - torch.stack(out[1])
        wanted = (change * d.unit(pair.emotion).double()).sum(-1)
        torch.testing.assert_close(pushes.values[i].sum(-1), wanted, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(means.values, total, rtol=1e-3, atol=1e-4)


def test_pushes_do_not_depend_on_the_batch() -> None:
    model, d, pairs = bundled(LLAVA), directions(), twins()[:3]
    one, two = (neuron_projections(model, pairs, d, lead_in=LEAD_IN, batch_size=size) for size in (1, 3))
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a.values, b.values, rtol=1e-3, atol=1e-4)


def test_strongest_neurons_by_hand() -> None:
    emotions = ["happy"] * 4 + ["angry"] * 4
    push = torch.zeros(8, 2, 3, dtype=torch.float64)
    push[:, 0, 0] = 1.0  # all pairs
    push[:4, 0, 1] = 3.0  # happy alone
    push[4:, 0, 1] = torch.tensor([0.1, -0.1, 0.1, -0.1])
    push[:, 1, 0] = torch.tensor([9.0, -1.0] * 4)  # strong, of no steady sign
    push[:, 1, 1] = -2.0  # against the direction
    push[4:, 1, 2] = 0.5  # angry alone
    trace = Scores(push, ("pair", "layer", "neuron"), {"layer": [0, 1]}, "push")
    table = strongest_neurons(trace, emotions, 10, 0.8)
    lines = list(zip(table["layer"], table["neuron"], table["value"], table["emotion"], strict=True))
    assert lines == [(0, 1, 3.0, "happy"), (0, 0, 1.0, ""), (1, 2, 0.5, "angry")]
    assert len(strongest_neurons(trace, emotions, 1, 0.8)) == 1
    few = strongest_neurons(Scores(push[2:6], trace.axes, {"layer": [0, 1]}), emotions[2:6], 10, 0.8)
    assert set(few["emotion"]) == {""}  # two pairs of an emotion tell nothing of it


@cache
def located() -> KeyNeurons:
    return key_neurons(bundled(LLAVA), twins(), directions(), 5, k=12, lead_in=LEAD_IN, progress=False)


def test_key_neurons_are_the_strongest_with_their_activations() -> None:
    found = located()
    pushes, means = neuron_projections(bundled(LLAVA), twins(), directions(), lead_in=LEAD_IN)
    wanted = strongest_neurons(pushes, [p.emotion for p in twins()], 12)
    assert found.neurons == list(zip(wanted["layer"], wanted["neuron"], strict=True)) and len(found.neurons) == 12
    assert found.table["value"].tolist() == pytest.approx(wanted["value"].tolist(), rel=1e-6)
    for line in found.table.itertuples():
        sides = means.values[:, int(line.layer), int(line.neuron)].tolist()  # type: ignore[arg-type]
        assert [line.emotional, line.neutral] == pytest.approx(sides, rel=1e-6)
    assert found.trace.shape == (8, 384) and set(found.table["rows"]) == {"last"}
    assert "12 neurons" in repr(found) and "16 pairs" in repr(found)


def test_some_neurons_of_the_embedded_model_speak_emotion_words() -> None:
    found = located()
    explicit = found.of_kind("explicit state")
    assert explicit and set(explicit) <= set(found.neurons)
    mine = found.table[found.table["kind"] == "explicit state"]
    assert bool((mine["lexicon_tokens"] >= 3).all())
    assert any(len(words) == 8 for words in mine["promotes"])


def test_a_neuron_is_confirmed_where_its_path_helps_a_later_key_head(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def paths(model: Any, clean: Any, corrupted: Any, labels: list[str], to: list[str], *rest: Any, **more: Any) -> Any:
        asked.append((labels, to))
        effect = {"L0N1": 0.5, "L1N2": -0.5, "L2N3": 1.0}
        values = torch.tensor([[[effect[label]] for label in labels]])
        ends = (2.0, 1.0) if to == ["L2H0"] else (1.0, 2.0)  # the second head's push falls with the emotion
        return SimpleNamespace(values=values, meta={"clean": [ends[0]], "corrupted": [ends[1]]})

    monkeypatch.setattr(module, "path_patching", paths)
    table = pd.DataFrame({"layer": [0, 1, 2], "neuron": [1, 2, 3]})
    sure = module._confirmed(bundled(LLAVA), twins()[:1], directions(), heads_of([(2, 0), (3, 1)]), table)
    assert asked == [(["L0N1", "L1N2"], ["L2H0"]), (["L1N2", "L2N3"], ["L3H1"])]
    assert sure == {(0, 1), (1, 2)}


def test_bad_input_is_named_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(module, "neuron_projections")
    model, proud = bundled(LLAVA), [Pair(replace(twins()[0].emotional, emotion="proud"), twins()[0].neutral)]
    with pytest.raises(ValueError, match="key_neurons: there are no pairs"):
        key_neurons(model, [], directions(), 5)
    with pytest.raises(ValueError, match="key_neurons: layer 8 does not exist; the model has layers 0 to 7"):
        key_neurons(model, twins(), directions(), 8)
    with pytest.raises(ValueError, match="k=0 and batch_size=16 must be at least 1"):
        key_neurons(model, twins(), directions(), 5, k=0)
    with pytest.raises(ValueError, match="No direction for 'proud'"):
        key_neurons(model, proud, directions(), 5)


def test_progress_counts_every_pair_at_both_rows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_runs, "has_screen", lambda: True)
    neuron_projections(bundled(LLAVA), twins()[:2], directions(), "query", lead_in=LEAD_IN, progress=True)
    assert "neurons, query: pairs: 100%" in capsys.readouterr().err
