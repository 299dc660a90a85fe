"""Baselines: each equals its formula by hand, a batch its rows alone, and every family has equally many trials."""

from __future__ import annotations

import json
import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import relative_error
from tests.circuits.tiny import ready as tiny
from tests.emotion.asked import NAMES, QUESTIONS, bundled, examples
from veena_lens.emotion.enhance import baselines
from veena_lens.emotion.enhance.baselines import (
    WORDINGS,
    adaptvis,
    all_baselines,
    first_token_confidence,
    pai,
    plain_steering,
    prompt_only,
    scalingvis,
    spin,
    vaf,
    vista,
    visual_directions,
)
from veena_lens.emotion.enhance.contrastive_decoding import without_pictures
from veena_lens.emotion.methods import PLAIN, Method, generate_answers, next_logits, prepared
from veena_lens.interventions import Circuit, Steer
from veena_lens.positions import position_mask

PICTURED = ("clip-llama", "right-padding", "qwen3_vl-plain", "llava-next")


class MeanDifference:
    """What plain steering needs of directions: one vector a layer, and `steer`."""

    def __init__(self, n_layers: int = 8, d_model: int = 192) -> None:
        self.vectors = torch.randn(n_layers, d_model, generator=torch.Generator().manual_seed(5))

    def steer(self, layer: int, alpha: float | int, emotion: str | None = None, scale: str = "raw") -> Steer:
        return Steer(layer, self.vectors[layer] * (2.0 if emotion else 1.0) * (3.0 if scale == "unit" else 1.0), alpha)


@cache
def all_families(name: str) -> tuple[Any, ...]:
    return tuple(all_baselines(bundled(name), directions=MeanDifference(), key_layer=4))


def pictured(model_of: Any, name: str) -> tuple[Any, Any]:
    model, inputs = tiny(model_of, name)
    return model, inputs[[row for row, n in enumerate(inputs.n_images) if n]]


def edited(model: Any, inputs: Any, method: Method) -> Tensor:
    with torch.no_grad(), method.applied(model, inputs):
        return model(inputs)


def scores_scaled(model: Any, inputs: Any, layers: Any, change: Any, queries: str) -> Tensor:
    """The logits where `change(scores, row)` replaces the scores of image keys at the queries, by hand."""
    rows = position_mask(inputs, queries)
    images = inputs.image_mask
    lowest = torch.finfo(torch.float64).min / 4

    def edit(scores: Tensor, hook: Any) -> Tensor:
        out = scores.clone()
        for row in range(len(out)):
            place = rows[row][None, :, None] & images[row] & (scores[row] > lowest)
            out[row] = torch.where(place, change(scores[row], row), scores[row])
        return out

    with torch.no_grad():
        return model.run_with_hooks(inputs, fwd_hooks=[(f"blocks.{i}.attn.hook_attn_scores", edit) for i in layers])


# --- each against its formula ------------------------------------------------------------------------
@pytest.mark.parametrize("name", PICTURED)
def test_pai_adds_a_share_of_each_image_logits_size_at_the_last_row(name: str, model_of) -> None:
    model, inputs = pictured(model_of, name)
    by_hand = scores_scaled(model, inputs, [1], lambda s, row: s + 0.7 * s.abs(), "last")
    found = edited(model, inputs, pai(0.7, [1]))
    assert relative_error(found, by_hand, inputs.attention_mask) < 1e-12
    assert relative_error(found, model(inputs), inputs.attention_mask) > 1e-5


@pytest.mark.parametrize("name", PICTURED)
def test_scalingvis_multiplies_image_logits_at_the_last_row(name: str, model_of) -> None:
    model, inputs = pictured(model_of, name)
    by_hand = scores_scaled(model, inputs, [0, 1], lambda s, row: 0.5 * s, "last")
    assert relative_error(edited(model, inputs, scalingvis(0.5, [0, 1])), by_hand, inputs.attention_mask) < 1e-12


def test_adaptvis_takes_each_rows_factor_from_its_own_confidence(model_of) -> None:
    model, inputs = pictured(model_of, "clip-llama")
    sure = first_token_confidence(model, inputs)
    last = torch.stack([model(inputs)[row, s.last] for row, s in enumerate(inputs.spans)])
    torch.testing.assert_close(sure.double(), last.softmax(-1).amax(-1).double(), rtol=1e-5, atol=1e-8)
    assert float(sure[0]) != float(sure[1])
    method = adaptvis(float(sure.mean()), [0, 1], w1=0.3, w2=1.7)
    factors = [0.3 if s < sure.mean() else 1.7 for s in sure]
    assert sorted(factors) == [0.3, 1.7]
    by_hand = scores_scaled(model, inputs, [0, 1], lambda s, row: factors[row] * s, "last")
    assert relative_error(edited(model, inputs, method), by_hand, inputs.attention_mask) < 1e-12


def test_confidence_is_the_unedited_models() -> None:
    model = bundled(NAMES[0])
    inputs = prepared(model, examples())
    plain = first_token_confidence(model, inputs)
    with model.intervene([Steer(3, torch.randn(192), 50.0)]):
        assert torch.equal(first_token_confidence(model, inputs), plain)


@pytest.mark.parametrize("name", PICTURED)
def test_vaf_enhances_image_keys_and_damps_what_stands_before_them(name: str, model_of) -> None:
    model, inputs = pictured(model_of, name)
    rows, images = position_mask(inputs, "query"), inputs.image_mask
    lowest = torch.finfo(torch.float64).min / 4

    def edit(scores: Tensor, hook: Any) -> Tensor:
        out = scores.clone()
        for row, spans in enumerate(inputs.spans):
            factor = 1 + 0.6 * images[row].double()
            factor[: spans.images[0].start] = 0.8
            out[row] = torch.where(rows[row][None, :, None] & (scores[row] > lowest), scores[row] * factor, scores[row])
        return out

    with torch.no_grad():
        by_hand = model.run_with_hooks(inputs, fwd_hooks=[("blocks.1.attn.hook_attn_scores", edit)])
    found = edited(model, inputs, vaf([1], enhance=1.6, suppress=0.8))
    assert relative_error(found, by_hand, inputs.attention_mask) < 1e-12


@pytest.mark.parametrize("name", [*PICTURED, "qwen2_vl-image-and-video"])
def test_what_the_picture_adds_is_the_last_states_difference(name: str, model_of) -> None:
    model, inputs = pictured(model_of, name)
    found = visual_directions(model, inputs)
    assert found.shape == (len(inputs), model.cfg.n_layers, model.cfg.d_model)
    with torch.no_grad():
        for row in range(len(inputs)):
            alone = inputs[row].without_padding()
            _, seen = model.run_with_cache(alone)
            _, blind = model.run_with_cache(without_pictures(model, alone))
            for layer in range(model.cfg.n_layers):
                by_hand = seen["resid_post", layer][0, -1] - blind["resid_post", layer][0, -1]
                assert relative_error(found[row, layer], by_hand) < 1e-10


def test_vista_turns_every_layers_mlp_output_towards_its_rows_own_direction(model_of) -> None:
    model, inputs = pictured(model_of, "clip-llama")
    directions = visual_directions(model, inputs)

    def edit(x: Tensor, hook: Any) -> Tensor:
        v = directions[:, hook.layer()] / directions[:, hook.layer()].norm(dim=-1, keepdim=True)
        unit = x / x.norm(dim=-1, keepdim=True)
        weight = 1 + (-(unit * v[:, None]).sum(-1, keepdim=True)).clamp(min=0)
        y = unit + 0.4 * weight * v[:, None]
        out = y / y.norm(dim=-1, keepdim=True) * x.norm(dim=-1, keepdim=True)
        return torch.where(inputs.attention_mask[..., None], out, x)

    with torch.no_grad():
        by_hand = model.run_with_hooks(inputs, fwd_hooks=[(f"blocks.{i}.hook_mlp_out", edit) for i in (0, 1)])
    assert relative_error(edited(model, inputs, vista(0.4)), by_hand, inputs.attention_mask) < 1e-10
    fixed = vista(0.4, vectors=directions[0])
    first = inputs[0]
    assert relative_error(edited(model, first, fixed), edited(model, first, vista(0.4)), first.attention_mask) < 1e-10


def test_plain_steering_adds_what_the_directions_give_at_its_positions() -> None:
    model, directions = bundled(NAMES[0]), MeanDifference()
    method = plain_steering(directions, 4, 0.1, "unit", emotion="happy")
    inputs = prepared(model, examples())
    with torch.no_grad(), model.intervene([Steer(4, directions.vectors[4] * 6, 0.1, "last+generated")]):
        by_hand = model(inputs)
    assert torch.equal(edited(model, inputs, method), by_hand)
    wide = plain_steering(directions, 4, 0.1, positions="prompt")
    assert wide.interventions[0].positions == "prompt" and "prompt" in repr(wide)  # type: ignore[index]
    assert wide.settings["vector"] != method.settings["vector"]


def test_prompts_are_reworded_and_nothing_else_is_done() -> None:
    method = prompt_only("look after")
    assert method.prompt is not None and method.prompt("How? {x}") == "How? {x} Look carefully at the face."
    assert method.interventions == () and method.decoding is None
    assert all(wording.count("{prompt}") >= 1 for wording in WORDINGS.values())
    model = bundled(NAMES[0])
    inputs = prepared(model, examples()[:1], method)
    assert "look carefully at the face." in model.to_string(inputs.tokens[0]).lower()
    with pytest.raises(ValueError, match="'stare' is unknown; known: look"):
        prompt_only("stare")


# --- off, batches, errors ----------------------------------------------------------------------------
OFF = (
    pai(0.0, [0]),
    scalingvis(1.0, [0, 3]),
    adaptvis(0.5, [0], 1.0, 1.0),
    vaf([2], 1.0, 1.0),
    spin([0, 1], keep=1.0),
    spin([0, 1], keep=0.5, factor=1.0),
    vista(0.0),
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", OFF, ids=repr)
def test_a_baseline_that_is_off_leaves_the_model_as_it_is(name: str, method: Method) -> None:
    model = bundled(name)
    torch.testing.assert_close(next_logits(model, examples(), method), next_logits(model, examples()))
    assert generate_answers(model, examples(), method, max_new_tokens=8) == generate_answers(
        model, examples(), max_new_tokens=8
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("at", range(9))
def test_every_familys_strongest_trial_acts_alike_in_a_batch_and_alone(name: str, at: int) -> None:
    model, family = bundled(name), all_families(name)[at]
    method = family.build(**family.grid[-1])
    together = next_logits(model, examples(), method, batch_size=3)
    torch.testing.assert_close(together, next_logits(model, examples(), method, batch_size=1), rtol=1e-3, atol=1e-3)
    if method.decoding is None:
        assert not torch.allclose(together, next_logits(model, examples(), PLAIN), atol=1e-3), "it does nothing"
    texts = generate_answers(model, examples(), method, batch_size=3, max_new_tokens=6)
    assert texts == generate_answers(model, examples(), method, batch_size=1, max_new_tokens=6)


def test_what_needs_a_picture_names_the_rows_without_one(model_of) -> None:
    model, inputs = tiny(model_of, "three-images-and-none")
    bare = inputs.n_images.index(0)
    for method in (adaptvis(0.5, [0]), vaf([0]), vista(0.1)):
        with pytest.raises(ValueError, match=rf"{method.name} needs an image in every row; rows \[{bare}\]"):
            with method.applied(model, inputs):
                pass
    with pytest.raises(ValueError, match="visual_directions needs an image"):
        visual_directions(model, inputs)


@pytest.mark.parametrize(
    ("make", "telling"),
    [
        (lambda: pai(math.inf, [0]), "pai: alpha=inf"),
        (lambda: pai(0.2, []), "pai: the list of layers is empty"),
        (lambda: scalingvis(math.nan, [0]), "scalingvis: w=nan"),
        (lambda: adaptvis(math.nan, [0]), "adaptvis: threshold=nan"),
        (lambda: vaf([]), "vaf: the list of layers is empty"),
        (lambda: spin([0], keep=2.0), "keep=2.0"),
        (lambda: vista(math.nan), "strength=nan"),
        (lambda: vista(0.1, layers=[]), "vista: the list of layers is empty"),
        (lambda: vista(0.1, positions="lats"), "lats"),
    ],
)
def test_settings_that_cannot_be_are_refused_at_once(make: Any, telling: str) -> None:
    with pytest.raises(ValueError, match=telling):
        make()


# --- families ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_every_family_has_twelve_different_methods_with_a_source_and_settings_that_json_holds(name: str) -> None:
    found = all_families(name)
    assert len(found) == 9 and len({family.name for family in found}) == 9
    for family in found:
        methods = [family.build(**settings) for settings in family.grid]
        assert len(methods) == 12
        assert len({json.dumps(method.settings, sort_keys=True) for method in methods}) == 12
        assert all(method.name == family.name and method.about for method in methods)
        assert family.name in repr(family) and "12 trials" in repr(family)
        for method in methods:
            if not callable(method.interventions):
                assert len(Circuit(method.interventions)) == len(method.interventions)
            for item in method.interventions if not callable(method.interventions) else ():
                item.site(bundled(name).cfg)


def test_families_take_fewer_trials_alike_and_no_more_than_there_are(model_of) -> None:
    model, _ = tiny(model_of, "clip-llama")  # two layers: every window of layers still holds one
    for trials in (1, 4, 12):
        found = all_baselines(model, directions=MeanDifference(2, 48), trials=trials)
        assert [len(family.grid) for family in found] == [trials] * 9
        assert all(len({repr(s) for s in family.grid}) == trials for family in found)
    assert len(all_baselines(model)) == 8, "no plain steering without directions"
    for trials in (0, 13):
        with pytest.raises(ValueError, match=f"trials={trials}"):
            all_baselines(model, trials=trials)
    with pytest.raises(ValueError, match="key_layer=2 does not exist"):
        all_baselines(model, directions=MeanDifference(2, 48), key_layer=2)


def test_a_models_own_depth_scales_the_layers_that_the_sources_give() -> None:
    from types import SimpleNamespace

    deep: Any = SimpleNamespace(cfg=SimpleNamespace(n_layers=32, n_heads=32))
    found = {family.name: family.grid for family in all_baselines(deep)}
    assert found["pai"][0]["layers"] == list(range(2, 32))
    assert found["vaf"][0]["layers"] == list(range(9, 15))
    assert found["spin"][0]["layers"] == list(range(20))
    assert sorted({s["keep"] for s in found["spin"]}) == [22 / 32, 27 / 32, 30 / 32]
    steered = {f.name: f.grid for f in all_baselines(deep, directions=MeanDifference(32))}["plain steering"]
    assert [s["layer"] for s in steered] == [8, 16, 24] * 4 and len({s["alpha"] for s in steered}) == 4


def test_public_names_of_baselines_exist_and_questions_stay_different() -> None:
    assert all(hasattr(baselines, name) for name in baselines.__all__)
    assert len(set(QUESTIONS)) == 3
