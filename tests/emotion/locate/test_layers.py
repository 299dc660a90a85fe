"""Key layers: the choice and C by hand, injections against the plain loop, controls, stops and restarts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from tests.emotion.asked import bundled
from tests.emotion.twins import LLAVA, QWEN, directions, slot, twins
from tests.interrupting import stop_at
from veena_lens.emotion import study
from veena_lens.emotion.judge.fluency import Fluency
from veena_lens.emotion.locate import layers as module
from veena_lens.emotion.locate.directions import noise_directions
from veena_lens.emotion.locate.layers import KeyLayers, _choose, _judged, key_layers
from veena_lens.emotion.methods import Method, generate_answers, next_logits
from veena_lens.emotion.pairs.loading import Example, Pair
from veena_lens.emotion.study import Study
from veena_lens.emotion.words.wheels import EmotionWheels

# --- by hand ----------------------------------------------------------------------------------------------


def curve(mean: list[float], half: float = 0.05) -> torch.Tensor:
    m = torch.tensor(mean, dtype=torch.float64)
    return torch.stack([m - half, m, m + half], -1)


FLAT = curve([0.0] * 6)


def test_band_is_the_longest_run_above_control_and_half_the_peak() -> None:
    assert _choose(curve([0.9, 0.1, 0.5, 0.6, 0.7, 0.2]), FLAT, range(6)) == (0, (2, 4))
    assert _choose(curve([0.0, 0.2, 0.8, 0.9, 0.3, 0.0]), FLAT, range(6)) == (3, (2, 3))


def test_of_equal_runs_and_equal_peaks_the_first_is_taken() -> None:
    assert _choose(curve([0.8, 0.8, 0.0, 0.8, 0.8, 0.0]), FLAT, range(6)) == (0, (0, 1))
    assert _choose(curve([0.0, 0.0, 0.0, 0.0, 0.0, 0.9]), FLAT, range(6)) == (5, (5, 5))


def test_layers_are_named_and_not_counted() -> None:
    assert _choose(curve([0.1, 0.8, 0.9]), FLAT[:3], [2, 5, 7]) == (7, (5, 7))


def test_there_is_no_band_where_nothing_leaves_the_control() -> None:
    assert _choose(curve([0.02, 0.05, 0.01]), FLAT[:3], range(3)) == (1, None)
    assert _choose(curve([-0.2, -0.1, -0.3]), curve([-0.9] * 3), range(3)) == (1, None)
    wide = curve([0.5] * 3, half=0.6)
    assert _choose(curve([0.9] * 3), wide, range(3)) == (0, None)


def test_layers_without_fluent_dose_are_never_chosen() -> None:
    values = curve([torch.nan, 0.4, torch.nan, 0.5])
    assert _choose(values, FLAT[:4], range(4)) == (3, (1, 1))  # runs of one; the first


def made_up(i: int, emotion: str) -> Pair:
    one = Example(picture=Image.new("RGB", (2, 2)), emotion=emotion, question="how?", identity=f"p{i}", pair=f"{i}")
    return Pair(one, replace(one, emotion="neutral"))


PAIRS = [made_up(0, "happy"), made_up(1, "angry")]
NOTHING = "a person."


def said(plain: list[str], texts: list[str], random: list[str], logs: list[float]) -> dict[str, Any]:
    fluency = torch.tensor(logs, dtype=torch.float64)
    return {"plain": plain, "texts": texts, "random": random, "fluency": fluency}


def plan(asked: Study, d: Any, layers: list[int], alphas: Sequence[float], **more: Any) -> Any:
    """An injection of these layers and doses."""
    about = {"scale": "relative", "positions": "last+generated", "slot": None, "max_rows": 256} | more
    fluency = Fluency(asked.model, d.emotions, asked.wheels)
    return module._Injection(study=asked, directions=d, layers=layers, alphas=list(alphas), fluency=fluency, **about)


def judged(found: list[dict[str, Any]], alphas: list[float], pairs: list[Pair] = PAIRS) -> KeyLayers:
    names = SimpleNamespace(emotions=["happy", "angry"])
    return _judged(plan(Study.of(bundled(LLAVA), draws=100), names, [3, 4], alphas), pairs, found, {})


def two_pairs(third: float = 0.0) -> list[dict[str, Any]]:
    """Two layers and two doses: the second dose of layer 4 is not fluent where `third` is large."""
    none = [NOTHING] * 4
    return [
        said(["happy", NOTHING], ["happy", "happy", NOTHING, "happy"], none, [0.0, 0.0, 0.0, third]),
        said(["angry", NOTHING], [NOTHING, "angry", NOTHING, "angry"], none, [0.0, 0.1, 0.0, third]),
    ]


def test_restored_share_by_hand() -> None:
    found = judged(two_pairs(), [0.1, 0.2])
    assert (found.emotional, found.neutral, found.n_pairs) == (1, 0, 2)
    assert found.restored.values[..., 1].tolist() == [[0.5, 1.0], [0.0, 1.0]]
    assert found.by_layer.values[:, 1].tolist() == [0.75, 0.5]
    assert found.control.values.unique().tolist() == [0]
    assert (found.best, found.band) == (3, (3, 4))
    assert found.fluency.values[0, 1].item() == pytest.approx(2.718281828**0.05)
    assert "best layer 3" in repr(found) and "band 3 to 4" in repr(found)
    assert found.summary()["in_band"].tolist() == [True, True]


def test_doses_that_are_not_fluent_do_not_count() -> None:
    found = judged(two_pairs(third=0.7), [0.1, 0.2])
    assert found.by_layer.values[:, 1].tolist() == [0.75, 0.0]
    assert (found.best, found.band) == (3, (3, 3))
    with pytest.raises(ValueError, match=r"every layer and alpha \[0.1, 0.2\].*smaller alphas"):
        judged([f | {"fluency": torch.full((4,), 0.5, dtype=torch.float64)} for f in two_pairs()], [0.1, 0.2])


def test_share_restored_of_half_a_gap_is_twice_the_change() -> None:
    found = two_pairs()
    found[0]["plain"] = ["happy", "happy"]
    result = judged(found, [0.1, 0.2])
    assert (result.emotional, result.neutral) == (1, 0.5)
    assert result.restored.values[0, :, 1].tolist() == [0.0, 1.0]  # nothing more to win on the first pair
    assert result.change("absolute").values[0, :, 1].tolist() == [0.0, 0.5]
    assert result.change("relative").values[0, :, 1].tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match="kind='much' must be one of restored, absolute, relative"):
        result.change("much")


def test_relative_change_counts_at_least_one_hit_of_neutral_pictures() -> None:
    assert judged(two_pairs(), [0.1, 0.2]).change("relative").values[0, :, 1].tolist() == [1.0, 2.0]


def test_twins_that_the_model_does_not_tell_apart_are_refused_before_any_injection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(module, "_inject")
    same = [Pair(replace(p.neutral, emotion=p.emotion), p.neutral) for p in twins()[:2]]
    with pytest.raises(ValueError, match=r"0.00 on emotional and 0.00 on neutral .*nothing to restore"):
        key_layers(bundled(LLAVA), same, directions(), max_new_tokens=4, progress=False)


@pytest.mark.parametrize("alphas", [[0.1, 0.2], [0.2, 0.1]])
def test_crossed_reads_the_largest_fluent_dose(alphas: list[float]) -> None:
    texts = {0.1: ["happy", "happy"], 0.2: ["angry", "happy"]}
    found = [
        said(
            [pair.emotion, NOTHING],
            [texts[a][i] for i in (0, 1) for a in alphas],
            [NOTHING] * 4,
            [0.0 if i == 0 or a == 0.1 else 0.7 for i in (0, 1) for a in alphas],
        )
        for pair in PAIRS[:1]
    ]
    found[0]["texts"] = [texts[a][0] if i == 0 else ("happy" if a == 0.1 else "angry") for i in (0, 1) for a in alphas]
    crossed = judged(found, alphas, PAIRS[:1]).crossed
    assert crossed.select(layer=3, injected="happy", named="angry").values.item() == 1  # alpha 0.2
    assert crossed.select(layer=4, injected="happy", named="happy").values.item() == 1  # alpha 0.1, 0.2 not fluent
    assert not bool(crossed.exists[:, 1].any())  # no pair of anger


# --- on a model -------------------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = dict(
    alphas=(0.4, 1.5), layers=[1, 5], random_directions=2, max_new_tokens=5, draws=200, progress=False
)


@cache
def located() -> KeyLayers:
    return key_layers(bundled(LLAVA), twins()[:4], directions(), slot=slot(), **SETTINGS)


def test_injecting_the_emotion_restores_it_and_random_directions_do_not() -> None:
    found = located()
    assert found.by_layer.axes == ("layer", "bound") and found.restored.shape == (2, 2, 3)
    assert found.best == 5 and found.band is not None and 5 in found.band
    assert found.restored.select(layer=5, alpha=1.5).values[1].item() > 0.7
    assert float(found.control.values[..., 1].abs().max()) <= 0.25
    assert found.agreement > 0.5
    assert found.crossed.select(layer=5, injected="happy", named="happy").values.item() > 0.7
    assert found.crossed.select(layer=5, injected="happy", named="angry").values.item() < 0.3


def test_answers_and_soft_hits_equal_those_of_one_injection_at_a_time() -> None:
    model, pair, d = bundled(LLAVA), twins()[0], directions()
    units = d.overall.float()
    plain = generate_answers(model, [pair.neutral], max_new_tokens=5)[0]
    asked = plan(Study.of(model, max_new_tokens=5), d, [1, 5], (0.4, 1.5), slot=slot())
    one = module._inject(asked, pair, plain, units)
    steered = []
    for layer in (1, 5):
        for alpha in (0.4, 1.5):
            method = Method(name="one", interventions=[d.steer(layer, alpha, pair.emotion)])
            steered.append(generate_answers(model, [pair.neutral], method, max_new_tokens=5)[0])
            after, before = (
                next_logits(model, [pair.neutral], m, slot().lead_in) for m in (method, Method(name="plain"))
            )
            change = slot().metric(pair.emotion)(after) - slot().metric(pair.emotion)(before)
            i, j = (1, 5).index(layer), (0.4, 1.5).index(alpha)
            assert one["soft"][i, j].item() == pytest.approx(change.item(), abs=2e-3)
    assert one["texts"] == steered


def test_directions_of_noise_have_no_band() -> None:
    found = key_layers(bundled(LLAVA), twins()[:2], noise_directions(directions()), **SETTINGS)
    assert found.band is None and found.soft is None
    assert float(found.by_layer.values[:, 1].abs().max()) < 0.25


def test_stopped_search_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = bundled(LLAVA), twins()[:4]
    calls = stop_at(monkeypatch, module, "_inject", 3)
    with pytest.raises(KeyboardInterrupt):
        key_layers(model, pairs, directions(), slot=slot(), out=tmp_path, **SETTINGS)
    n = len(calls)
    again = key_layers(model, pairs, directions(), slot=slot(), out=tmp_path, **SETTINGS)
    assert [given[1].key for given in calls[n:]] == [pair.key for pair in pairs[2:]]
    whole = located()
    for name in ("restored", "control", "by_layer", "crossed", "fluency", "soft"):
        one, other = getattr(again, name).values, getattr(whole, name).values
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    assert (again.best, again.band, again.agreement) == (whole.best, whole.band, whole.agreement)


def test_results_of_another_setting_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*given: Any) -> Any:
        calls.append(given)
        return said([given[1].emotion, NOTHING], [given[1].emotion], [NOTHING], [0.0])

    monkeypatch.setattr(module, "_inject", counted)
    monkeypatch.setattr(study, "generate_answers", lambda model, some, *method, **more: [e.emotion for e in some])
    settings: dict[str, Any] = dict(alphas=[0.1], layers=[5], draws=20, out=tmp_path, progress=False)

    def run(**more: Any) -> int:
        calls.clear()
        key_layers(bundled(LLAVA), twins()[:2], directions(), **(settings | more))
        return len(calls)

    assert run() == 2
    assert run() == 0
    assert run(draws=30) == 0
    assert [run(scale="raw"), run(positions="last"), run(seed=1), run(alphas=[0.2]), run(layers=[4])] == [2] * 5
    assert run(slot=slot()) == 2, "soft hits are new"
    other = {e: ids[1:] for e, ids in slot().tokens.items()}
    assert run(slot=replace(slot(), tokens=other)) == 2, "other tokens are another slot"
    wheels = EmotionWheels.default()
    words = replace(wheels.words, unscanned=wheels.words.unscanned | {"happy"})
    assert run(wheels=replace(wheels, words=words)) == 2, "other words are left out of the fluency"
    renamed = [Pair(replace(p.emotional, emotion="angry"), p.neutral) for p in twins()[:2] if p.emotion == "happy"]
    calls.clear()
    key_layers(bundled(LLAVA), renamed, directions(), **settings)
    assert len(calls) == len(renamed)


def test_negative_layers_count_from_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    def one(*given: Any) -> Any:
        assert given[0].layers == [7]
        return said([given[1].emotion, NOTHING], [given[1].emotion], [NOTHING], [0.0])

    monkeypatch.setattr(module, "_inject", one)
    monkeypatch.setattr(study, "generate_answers", lambda model, some, *method, **more: [e.emotion for e in some])
    found = key_layers(bundled(LLAVA), twins()[:2], directions(), alphas=[0.1], layers=[-1], draws=20, progress=False)
    assert found.best == 7


def test_bad_input_is_named_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(module, "_inject")
    model, d = bundled(LLAVA), directions()

    def run(pairs: Any = None, **settings: Any) -> None:
        key_layers(model, twins()[:2] if pairs is None else pairs, d, progress=False, **settings)

    with pytest.raises(ValueError, match="0 pairs"):
        run([])
    with pytest.raises(ValueError, match="none may be empty"):
        run(alphas=[])
    with pytest.raises(ValueError, match="random_directions=0 must be at least 1"):
        run(random_directions=0)
    with pytest.raises(ValueError, match="layer 99 does not exist; the model has layers 0 to 7"):
        run(layers=[2, 99])
    with pytest.raises(ValueError, match="scale='big' must be one of relative, raw, unit"):
        run(scale="big")
    with pytest.raises(ValueError, match="No direction for 'proud'"):
        run([Pair(replace(twins()[0].emotional, emotion="proud"), twins()[0].neutral)])


@pytest.mark.slow
def test_search_runs_on_the_other_layout() -> None:
    found = key_layers(bundled(QWEN), twins()[:2], directions(QWEN), slot=slot(QWEN), **SETTINGS)
    assert found.restored.shape == found.control.shape == (2, 2, 3)
    assert found.soft is not None and found.soft.shape == (2, 2)
    assert found.crossed.shape == (2, 2, 2)
