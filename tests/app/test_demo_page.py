"""Steering whole descriptions: what counts as whole, and that the push acts on generated tokens only."""

from __future__ import annotations

import torch

from veena_lens.app.demo_page import caption_steer, caption_vectors, is_whole, share_as_wanted
from veena_lens.checkpoints.files import bundled_pairs
from veena_lens.model.model import HookedVLM


def test_a_caption_is_whole_when_it_keeps_its_shape() -> None:
    plain = "the picture shows a neutral person. the face looks calm."
    assert is_whole("the picture shows a sad person. the face looks sorrowful.", plain)
    assert not is_whole("the picture shows a sad person.", plain)
    assert not is_whole("sad sad sad sad. sad.", plain)


def test_directions_of_captions_turn_them_and_no_direction_does_not() -> None:
    model = HookedVLM.from_pretrained("tiny-llava-emotion")
    pairs = [pair for pair in bundled_pairs("development") if pair[0].emotion in ("sad", "loving")][:16]
    vectors = caption_vectors(model, pairs)
    assert set(vectors) == {"sad", "loving"}
    assert all(v.shape == (model.cfg.n_layers, model.cfg.d_model) for v in vectors.values())
    twins = [pairs[0][1]]
    with torch.no_grad():
        turned = share_as_wanted(model, twins, vectors, layer=model.cfg.n_layers - 1, alpha=0.7)
        nothing = share_as_wanted(model, twins, vectors, layer=model.cfg.n_layers - 1, alpha=0.0)
    assert nothing == 0.0 < turned
    assert caption_steer(vectors["sad"], 7, 0.7).positions == "generated"
