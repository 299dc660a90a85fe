"""Stages: bounds from curves by hand, and what a model's curves are read from."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.emotion.asked import bundled
from tests.emotion.twins import LLAVA, directions, twins
from veena_lens.emotion.locate import tracing as module
from veena_lens.emotion.locate.answer_slot import LEAD_IN
from veena_lens.emotion.locate.heads import KeyHeads, key_heads
from veena_lens.emotion.locate.layers import KeyLayers, key_layers
from veena_lens.emotion.locate.tracing import Stages, find_stages, show_run, stage_bounds
from veena_lens.scores import Scores

CHANCE = [0.25] * 6


def bounds(**curves: list[float]) -> tuple[int, int]:
    """Curves of six layers: C leaves its control at 1, decodability at 2; saturated at 3, read up to 3."""
    accuracy = curves.get("accuracy", [0.25, 0.3, 0.6, 0.9, 0.9, 0.9])
    return stage_bounds(
        curves.get("restored", [-0.1, 0.2, 0.3, 0.5, 0.4, 0.2]),
        curves.get("control", [0.1] * 6),
        accuracy,
        curves.get("low", [a - 0.1 for a in accuracy]),
        curves.get("chance", CHANCE),
        curves.get("reading", [0.0, 0.2, 1.0, 0.3, 0.05, 0.0]),
    )


def test_aggregating_begins_where_both_curves_have_left_their_controls() -> None:
    assert bounds() == (2, 3)
    assert bounds(restored=[-0.1, -0.1, -0.1, 0.5, 0.4, 0.2])[0] == 3
    assert bounds(low=[0.3] * 6)[0] == 1


def test_aggregating_ends_at_the_later_of_saturation_and_reading() -> None:
    assert bounds(reading=[0.0, 1.0, 0.0, 0.0, 0.0, 0.0]) == (2, 3)  # saturation
    assert bounds(reading=[0.0, 1.0, 0.0, 0.0, 0.1, 0.09]) == (2, 4)  # a tenth still counts
    assert bounds(accuracy=[0.25, 0.3, 0.6, 0.8, 0.87, 0.9]) == (2, 4)  # 0.25 + 0.95 * 0.65 = 0.8675


def test_saturation_is_measured_from_chance() -> None:
    assert bounds(accuracy=[0.25, 0.3, 0.86, 0.86, 0.9, 0.9], reading=[0.0] * 6) == (2, 4)
    assert bounds(accuracy=[0.25, 0.3, 0.86, 0.86, 0.9, 0.9], reading=[0.0] * 6, chance=[0.0] * 6)[1] == 2


def test_tuples_and_lists_of_curves_are_alike() -> None:
    accuracy = (0.25, 0.3, 0.86, 0.86, 0.9, 0.9)
    curves: list[Any] = [[0.5] * 6, [0.1] * 6, accuracy, [0.2] * 6, tuple(CHANCE), [0.0] * 6]
    listed = [list(curve) for curve in curves]
    assert stage_bounds(*curves) == stage_bounds(*listed) == (6, 5)


def test_there_is_no_aggregating_where_nothing_leaves_its_control() -> None:
    found = bounds(restored=[0.0] * 6)
    assert found == (6, 5)
    stages = Stages(first=6, last=5, n_layers=6, decodable=_some(), reading=_some())
    assert stages.spans() == {"adapt": [0, 1, 2, 3, 4, 5], "aggregate": [], "execute": []}
    assert repr(stages) == "Stages(adapt layers 0-5, aggregate no layer, execute no layer)"


def test_an_emotion_that_cannot_be_decoded_better_than_chance_has_no_aggregating() -> None:
    assert bounds(accuracy=[0.2] * 6) == (6, 5)
    assert bounds(accuracy=[0.1, 0.2, 0.1, 0.1, 0.1, 0.1], low=[0.3] * 6, reading=[0.0] * 6) == (1, 1)


def _some() -> Scores:
    return Scores(torch.zeros(6), ("layer",))


def test_stages_share_out_all_layers() -> None:
    spans = Stages(first=2, last=3, n_layers=6, decodable=_some(), reading=_some()).spans()
    assert spans == {"adapt": [0, 1], "aggregate": [2, 3], "execute": [4, 5]}
    assert [show_run(layers) for layers in ([], [4], [4, 5])] == ["no layer", "layer 4", "layers 4-5"]


def curves(layers: list[int]) -> KeyLayers:
    """C of 0.5 at each layer measured, the control's upper bound 0.1."""

    def per_layer(low: float, high: float) -> Scores:
        table = torch.tensor([[low, 0.0, high]] * len(layers), dtype=torch.float64)
        return Scores(table, ("layer", "bound"), {"layer": layers, "bound": ["low", "mean", "high"]})

    rest: dict[str, Any] = dict.fromkeys(("restored", "control", "crossed", "fluency"), _some())
    return KeyLayers(
        by_layer=per_layer(0.5, 0.9),
        control_by_layer=per_layer(-0.1, 0.1),
        soft=None,
        agreement=0.0,
        best=layers[0],
        band=None,
        emotional=1.0,
        neutral=0.0,
        n_pairs=2,
        **rest,
    )


def effects_of(values: torch.Tensor) -> KeyHeads:
    effects = Scores(values, ("pair", "rows", "layer", "head"), {"rows": ["query", "last"]})
    rest: dict[str, Any] = dict.fromkeys(("intention", "push", "routes"), _some())
    return KeyHeads(
        table=None,
        heads=[],
        effects=effects,
        layer=2,
        n_pairs=2,
        dropped=0,
        emotions=[],
        identities=[],
        meta={"lead_in": "so"},
        **rest,
    )


@pytest.mark.parametrize("layers", [[0, 1, 2, 3], [2, 3]])
def test_curves_are_put_together_by_layer(layers: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Injection measured at two of four layers; effects up to layer 2; one neutral image of two pairs."""
    seen: dict[str, Any] = {}
    accuracy = torch.tensor([[0.3, 0.1, 0.5, 0.25], [0.5, 0.4, 0.6, 0.25], [0.9, 0.8, 1, 0.25], [0.9, 0.8, 1, 0.25]])
    names = ["accuracy", "low", "high", "control"]

    def probes(model: Any, inputs: Any, emotions: Any, identities: Any, **more: Any) -> Any:
        seen.update(inputs=inputs, emotions=emotions, identities=identities, **more)
        table = accuracy[:, None]
        return SimpleNamespace(
            scores=Scores(table, ("layer", "pos", "statistic"), {"layer": [0, 1, 2, 3], "statistic": names})
        )

    monkeypatch.setattr(module, "linear_probes", probes)
    monkeypatch.setattr(module, "prepared", lambda model, examples, lead_in: [e.key for e in examples] + [lead_in])
    effects = torch.zeros(2, 2, 3, 2, dtype=torch.float64)
    effects[:, 0, 1] = torch.tensor([0.4, -0.3])  # at the query: what is negative restores nothing
    effects[:, 0, 2] = torch.tensor([0.02, 0.01])
    effects[:, 1] = 9.0  # at the last token, which does not count
    twin = SimpleNamespace(key="n", emotion="neutral", identity="p")
    pairs = [
        SimpleNamespace(emotional=SimpleNamespace(key=k, emotion=e, identity="p" + k), neutral=twin)
        for k, e in (("a", "happy"), ("b", "sad"))
    ]
    model = SimpleNamespace(cfg=SimpleNamespace(n_layers=4))
    found = find_stages(model, pairs, curves(layers), effects_of(effects))
    assert seen["inputs"] == ["a", "b", "n", "so"]
    assert seen["emotions"] == ["happy", "sad", "neutral"] and seen["folds"] == 3
    assert found.reading.values.tolist() == pytest.approx([0.0, 0.4, 0.03, 0.0])
    assert (found.first, found.last) == ((1, 2) if len(layers) == 4 else (2, 2))
    assert found.decodable.shape == (4, 4) and found.n_layers == 4


def test_stages_of_the_embedded_model_follow_from_its_own_curves() -> None:
    model, pairs = bundled(LLAVA), list(twins(4))
    layers = key_layers(
        model, pairs[:2], directions(), alphas=(1.5,), layers=[0, 7], random_directions=1, max_new_tokens=4, draws=50,
        progress=False,
    )  # fmt: skip
    heads = key_heads(model, pairs[1:3], directions(), 1, lead_in=LEAD_IN, draws=50, progress=False)
    found = find_stages(model, pairs, layers, heads, progress=False)
    n = model.cfg.n_layers
    assert sum(found.spans().values(), []) == list(range(n)), "every layer has one stage"
    assert found.first == 7, "layer 0 does not take the direction, and layers between were not measured"
    accuracy, control = (found.decodable.select(statistic=s).values for s in ("accuracy", "control"))
    assert accuracy.shape == (n,) and accuracy[-1] > control[-1] + 0.2
    at_query = heads.effects.select(rows="query").mean("pair").values.clamp_min(0).sum(-1)
    assert found.reading.values[:2].tolist() == pytest.approx(at_query.tolist())
    assert not found.reading.values[2:].any()
