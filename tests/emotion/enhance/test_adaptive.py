"""Adaptive strength: presence, confidence and both kinds by hand; fitted by likelihood, applied without labels."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.emotion.asked import bundled, examples
from veena_lens.emotion.enhance.veena import Adaptive, fit_adaptive, states_at
from veena_lens.emotion.methods import next_logits, prepared
from veena_lens.emotion.pairs.pair_set import Example

NAME = "tiny-llava-emotion"
FOUND = Adaptive(
    layer=3,
    unit=torch.tensor([1.0, 0.0, 0.0]).double(),
    neutral_mean=torch.tensor([0.0, 1.0, 1.0]).double(),
    contrasts=torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]).double(),
    theta=2.0,
    width=0.5,
    temperature=2.0,
    emotions=("happy", "sad"),
)


def by_hand(x: float, y: float, z: float) -> tuple[float, float]:
    presence = 1 / (1 + math.exp(-(x - 2.0) / 0.5))
    a, b = math.exp((y - 1) / 2), math.exp((z - 1) / 2)
    q = [a / (a + b), b / (a + b)]
    return presence, 1 + sum(p * math.log(p) for p in q) / math.log(2)


@given(x=st.floats(-3, 6), y=st.floats(-8, 8), z=st.floats(-8, 8))
def test_presence_and_confidence_are_the_formulas(x: float, y: float, z: float) -> None:
    presence, confidence = FOUND.read(torch.tensor([[x, y, z]], dtype=torch.float64))
    told = by_hand(x, y, z)
    assert float(presence[0]) == pytest.approx(told[0], abs=1e-12)
    assert float(confidence[0]) == pytest.approx(told[1], abs=1e-9)
    assert -1e-9 <= float(confidence[0]) <= 1 + 1e-9


def test_need_strengthens_the_unsure_and_trust_the_sure_and_neither_what_is_not_there() -> None:
    unsure, sure, absent = [9.0, 1.0, 1.0], [9.0, 40.0, 1.0], [-9.0, 1.0, 1.0]
    states = torch.tensor([unsure, sure, absent]).double()
    assert FOUND.strengths(states, 5.0).tolist() == pytest.approx([5.0, 1.0, 1.0], abs=1e-4)
    assert FOUND.strengths(states, 5.0, "trust").tolist() == pytest.approx([1.0, 5.0, 1.0], abs=1e-4)
    presence, confidence = by_hand(2.2, 3.0, 1.0)
    one = torch.tensor([[2.2, 3.0, 1.0]]).double()
    assert FOUND.strengths(one, 3.0).item() == pytest.approx(1 + 2 * presence * (1 - confidence))
    assert FOUND.strengths(one, 3.0, "trust").item() == pytest.approx(1 + 2 * presence * confidence)
    assert FOUND.strengths(states, 1.0).tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="kind='doubt' must be one of need, trust"):
        FOUND.strengths(states, 5.0, "doubt")


class Directions:
    """What fitting asks of directions: emotions, the unit of the whole and a contrast each, by layer."""

    emotions = ("happy", "sad")

    def __init__(self, d_model: int = 192) -> None:
        draw = torch.randn(3, 8, d_model, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        self.rows = draw / draw.norm(dim=-1, keepdim=True)

    def unit(self, emotion: str | None) -> torch.Tensor:
        return self.rows[0]

    def contrast(self, emotion: str) -> torch.Tensor:
        return 7.0 * self.rows[1 + self.emotions.index(emotion)]


def labelled() -> list[Example]:
    from veena_lens.checkpoints.files import bundled_pictures

    wanted = [p.path for p in bundled_pictures()[:3]]
    names = ("happy", "sad", "neutral")
    return [Example(picture=path, emotion=n, question="How does this person feel?") for path, n in zip(wanted, names)]


def test_fitting_puts_theta_midway_and_takes_the_likeliest_temperature() -> None:
    model, some, given_ = bundled(NAME), labelled(), Directions()
    found = fit_adaptive(model, some, given_, 4, batch_size=2)
    states = states_at(model, prepared(model, some), 4)
    along = states @ given_.rows[0, 4]
    above, below = along[:2], along[2:]
    assert found.theta == pytest.approx(float((above.mean() + below.mean()) / 2), rel=1e-4)
    spread = torch.cat([above - above.mean(), below - below.mean()]).std()
    assert found.width == pytest.approx(float(spread), rel=1e-4)
    logits = (states[:2] - states[2]) @ given_.rows[1:, 4].T
    loss = [float(torch.nn.functional.cross_entropy(logits / t, torch.tensor([0, 1]))) for t in
            (found.temperature / 2, found.temperature, found.temperature * 2)]  # fmt: skip
    scale = float(logits.std())
    ends = (pytest.approx(scale / 64, rel=1e-3), pytest.approx(scale * 16, rel=1e-3))
    assert loss[1] <= loss[0] or found.temperature == ends[0]
    assert loss[1] <= loss[2] or found.temperature == ends[1]
    assert found.emotions == ("happy", "sad") and found.layer == 4


def test_fitting_needs_emotional_and_neutral_examples() -> None:
    model, some = bundled(NAME), labelled()
    with pytest.raises(ValueError, match="one of happy, sad and examples without, .* there are 2 and 0"):
        fit_adaptive(model, some[:2], Directions(), 4)
    with pytest.raises(ValueError, match="there are 0 and 1"):
        fit_adaptive(model, some[2:], Directions(), 4)


def test_states_are_the_residual_at_the_last_token_whatever_the_padding() -> None:
    model = bundled(NAME)
    inputs = prepared(model, examples())
    alone = torch.cat([states_at(model, prepared(model, [e]), 7) for e in examples()])
    torch.testing.assert_close(states_at(model, inputs, 7), alone, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
    for layer in (0, 4, 7):
        expected = cache[f"blocks.{layer}.hook_resid_post"][:, -1].double()
        torch.testing.assert_close(states_at(model, inputs, layer), expected, rtol=1e-5, atol=1e-5)
    led = states_at(model, inputs, 7, "The person feels")
    assert float((led - states_at(model, inputs, 7)).abs().max()) > 1e-2


def reading(model: Any, kind: str) -> tuple[Adaptive, Any]:
    """An `Adaptive` of the bundled model that finds rows of unequal presence."""
    inputs = prepared(model, examples())
    states = states_at(model, inputs, 2)
    unit = Directions().rows[0, 2]
    along = states @ unit
    contrasts = Directions().rows[1:, 2]
    found = Adaptive(
        layer=2, unit=unit, neutral_mean=states.mean(0), contrasts=contrasts, theta=float(along.median()),
        width=float(along.std()), temperature=1.0, emotions=("happy", "sad"),
    )  # fmt: skip
    return found, found.strengths(states, 9.0, kind)


@pytest.mark.parametrize("kind", ["need", "trust"])
def test_each_row_gets_the_circuit_of_its_own_strength_and_no_label_is_read(kind: str) -> None:
    model = bundled(NAME)
    found, strengths = reading(model, kind)
    assert strengths.unique().numel() == 3
    unlabelled = [SimpleNamespace(picture=e.picture, prompt=e.prompt) for e in examples()]
    heads = [(layer, head) for layer in range(3, 8) for head in range(3)]
    method = found.method(heads, [(5, 3), (6, 9)], 9.0, 3.0, kind, mode="scale")
    together = next_logits(model, unlabelled, method)
    gammas = 1 + (strengths - 1) / 4
    from veena_lens.emotion.enhance.veena import veena

    per_row = [
        list(veena(heads, [(5, 3), (6, 9)], b, g, mode="scale")) for b, g in zip(strengths.tolist(), gammas.tolist())
    ]
    inputs = prepared(model, unlabelled)
    with torch.no_grad(), model.intervene(per_row=per_row):
        by_hand_ = model(inputs)[:, -1].float()
    torch.testing.assert_close(together, by_hand_, rtol=1e-4, atol=1e-3)
    assert float((together - next_logits(model, unlabelled)).abs().max()) > 0.05
    assert dict(method.settings) == {"beta_max": 9.0, "gamma_max": 3.0, "kind": kind}


def test_where_no_emotion_is_found_nothing_changes() -> None:
    model = bundled(NAME)
    found = replace(reading(model, "need")[0], theta=1e9, width=1.0)
    method = found.method([(4, 0), (5, 2)], [(3, 1)], 50.0, 50.0)
    assert torch.equal(next_logits(model, examples(), method), next_logits(model, examples()))
