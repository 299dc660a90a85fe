"""Steering in the demo: what counts as a whole caption, and how answers and captions are judged."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import Mock

import torch

from veena_lens.app.demo_steering import (
    FACES,
    answers_to_faces,
    caption_rates,
    caption_vectors,
    flips,
    is_whole,
    rates_by_layer,
    steering,
    turned,
)
from veena_lens.emotion import Evaluation, load_pairs
from veena_lens.model.model import HookedVLM


def test_a_caption_is_whole_when_it_keeps_its_shape() -> None:
    plain = "the picture shows a neutral person. the face looks calm."
    assert is_whole("the picture shows a sad person. the face looks sorrowful.", plain)
    assert not is_whole("the picture shows a sad person.", plain)
    assert not is_whole("sad sad sad sad. sad.", plain)


def test_an_answer_that_repeats_the_wanted_word_is_not_turned() -> None:
    plain = "the person feels neutral and calm."
    assert is_whole("the person feels disgusted and repelled.", plain)
    assert not is_whole("the person feels disgusted and repelled disgusted disgusted disgusted", plain)
    assert not is_whole("the person feels disgusted, disgusted.", plain)
    assert not is_whole("the person feels disgusted and", plain)


def test_only_fluent_answers_that_name_the_wanted_emotion_first_count() -> None:
    plain = "the person feels neutral and calm."
    texts = ["the person feels sad and low.", "the person feels sad sad sad.", "the person feels happy and sad.", plain]
    rows = [SimpleNamespace(emotion="sad")] * 4
    texts_by = {FACES: {"plain": [plain] * 4, "steered": texts}}
    found = Mock(spec=Evaluation, texts=texts_by, baseline="plain", examples={FACES: rows})
    assert turned(found, "steered") == [True, False, False, False]


def test_directions_of_captions_turn_them_and_no_direction_does_not() -> None:
    model = HookedVLM.from_pretrained("tiny-llava-emotion")
    pairs = load_pairs().select(split="development", condition="none", emotion=["sad", "loving"])[:16]
    vectors = caption_vectors(model, pairs)
    assert set(vectors) == {"sad", "loving"}
    assert all(v.shape == (model.cfg.n_layers, model.cfg.d_model) for v in vectors.values())
    last = model.cfg.n_layers - 1
    turned, nothing = caption_rates(model, vectors, [pairs[0].neutral], [(last, 0.7), (last, 0.0)])
    assert nothing == 0.0 < turned
    turned_again, random = caption_rates(model, vectors, [pairs[0].neutral], [(last, 0.7)], seed=3)
    assert turned_again == turned > random


def test_only_the_direction_of_an_emotion_makes_the_answer_name_it() -> None:
    from veena_lens.app.demo_steering import answer_vectors

    model = HookedVLM.from_pretrained("tiny-llava-emotion")
    pairs = load_pairs().select(split="development", condition="none", emotion=["happy", "sad"])
    vectors = answer_vectors(model, pairs)
    faces = [pair.neutral for pair in pairs[:2]]
    settings = [
        steering("steered", vectors, 2, layer=4, alpha=1.0),
        steering("random", vectors, 2, layer=4, alpha=1.0, seed=1),
    ]
    found = answers_to_faces(model, faces, list(vectors), settings)
    wanted, control = (flips(found, name, list(vectors)) for name in ("steered", "random"))
    assert set(wanted.wanted) == {"happy", "sad"} and wanted.mean > 0.5 > control.mean and wanted.any >= wanted.mean
    rates = rates_by_layer(model, faces[:1], {"happy": vectors["happy"]})
    assert rates.labels["setting"] == ["alpha 0.7", "alpha 1", "random"]
    assert rates.shape == (3, model.cfg.n_layers) and float(rates.values.max()) == 1.0
    torch.testing.assert_close(rates.values, rates.values.clamp(0, 1))
