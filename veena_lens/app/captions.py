"""Steering a whole description: a direction read where the words of the two faces part.

The last prompt token knows little of a caption's later words. So both faces of a pair are run under the neutral
face's own caption, and the direction is their difference at the answer's position where they differ most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from veena_lens.app import steps
from veena_lens.interventions import Steer
from veena_lens.zoo.emotions import EMOTIONS, named_emotion

if TYPE_CHECKING:
    from veena_lens.checkpoints.bundle import Picture
    from veena_lens.model.model import HookedVLM

ALPHAS = (0.6, 0.7, 0.8)
MAX_TOKENS = 60


@dataclass(frozen=True)
class CaptionSteering:
    """The setting chosen on development pictures, and shares of whole captions that name the wanted emotion."""

    layer: int
    alpha: float
    development: float
    test: float
    control: float


@torch.no_grad()
def caption_vectors(
    model: HookedVLM, pairs: Sequence[tuple[Picture, Picture]]
) -> dict[str, Float[Tensor, "layer d_model"]]:
    """For each emotion the mean over its pairs of resid_post(emotional) - resid_post(neutral) under one caption,
    at the answer's position where the pair differs most in the last layers."""
    n_layers, vectors = model.cfg.n_layers, {}
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(n_layers)]
    for emotion in EMOTIONS:
        mine = [pair for pair in pairs if pair[0].emotion == emotion]
        if not mine:
            continue
        emotional, neutral = (steps.ask(model, steps.DESCRIBE, side) for side in zip(*mine, strict=True))
        tokens = model.generate(neutral, max_new_tokens=MAX_TOKENS, return_type="tokens")
        caches = [
            model.run_with_cache(side.with_answer(tokens), names_filter=names)[1] for side in (emotional, neutral)
        ]
        first, second = ([c.at("generated", "resid_post", layer) for layer in range(n_layers)] for c in caches)
        difference = torch.stack(first) - torch.stack(second)
        parting = difference[-3].norm(dim=-1).argmax(-1)
        vectors[emotion] = difference[:, torch.arange(len(mine)), parting].mean(1)
    return vectors


def share_as_wanted(
    model: HookedVLM,
    pictures: Sequence[Picture],
    vectors: Mapping[str, Float[Tensor, "layer d_model"]],
    layer: int,
    alpha: float,
    random: torch.Generator | None = None,
) -> float:
    """Share of captions of neutral pictures that name the wanted emotion first and stay whole: as many sentences as
    the unsteered caption, and within three words as long. `random`: directions of the same norm instead."""
    plain = {p.file: d.text for p, d in zip(pictures, steps.describe(model, pictures), strict=True)}
    rows = [(emotion, picture) for emotion in vectors for picture in pictures]
    good = 0
    for part in steps.chunks(len(rows)):
        chosen = [vectors[e] if random is None else steps.random_like(vectors[e], random) for e, _ in rows[part]]
        steers = [caption_steer(v, layer, alpha) for v in chosen]
        texts = steps.steered(model, steps.DESCRIBE, [p for _, p in rows[part]], steers, MAX_TOKENS)
        good += sum(
            named_emotion(text) == emotion and is_whole(text, plain[picture.file])
            for text, (emotion, picture) in zip(texts, rows[part], strict=True)
        )
    return good / len(rows)


def caption_steer(vector: Float[Tensor, "layer d_model"], layer: int, alpha: float) -> Steer:
    """The push on a caption: at every generated token, not at the prompt."""
    return Steer(layer=layer, vector=vector[layer], alpha=alpha, positions="generated")


def is_whole(text: str, plain: str) -> bool:
    """True when a caption kept its shape."""
    return text.count(".") == plain.count(".") and abs(len(text.split()) - len(plain.split())) <= 3


def steer_captions(
    model: HookedVLM,
    vectors: Mapping[str, Float[Tensor, "layer d_model"]],
    development: Sequence[Picture],
    pictures: Sequence[Picture],
    seed: int,
) -> CaptionSteering:
    """Layer and strength chosen on development pictures, then judged on others against random directions."""
    layers = range(max(0, model.cfg.n_layers - 3), model.cfg.n_layers)
    tried = {(la, a): share_as_wanted(model, development, vectors, la, a) for la, a in product(layers, ALPHAS)}
    (layer, alpha), best = max(tried.items(), key=lambda item: item[1])
    generator = torch.Generator().manual_seed(seed)
    return CaptionSteering(
        layer=layer,
        alpha=alpha,
        development=best,
        test=share_as_wanted(model, pictures, vectors, layer, alpha),
        control=share_as_wanted(model, pictures, vectors, layer, alpha, generator),
    )
