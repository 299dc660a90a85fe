"""The demo's steering: directions from pairs, a setting chosen on development faces, its effect on test faces.

A direction for short answers is read at the last prompt token (`extract_directions`) and added there and at every
generated token. A long description has other words to say as well, and that would break it. So its direction is read
where the words of the two faces part: both run under the neutral face's own caption, and the difference is taken at
the position of the answer where they differ most; it is added at the generated tokens alone. Each effect stands
beside that of random directions of the same norm, and an answer counts as turned only when it still reads well: strong
steering makes a model repeat the word that is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise, product
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from veena_lens.app.demo_results import CaptionSteering, Flips, Steered
from veena_lens.app.questions import DESCRIBE, FEELING, LIST
from veena_lens.emotion import (
    EmotionWheels,
    Evaluation,
    Example,
    Method,
    PairSet,
    evaluate,
    extract_directions,
    generate_answers,
    random_directions,
)
from veena_lens.interventions import Steer
from veena_lens.scores import Scores
from veena_lens.zoo.people import EMOTIONS, named_emotion

if TYPE_CHECKING:
    from veena_lens.checkpoints.files import Picture
    from veena_lens.model.model import HookedVLM

Vectors = Mapping[str, Float[Tensor, "layer d_model"]]  # of each emotion
ALPHAS = (0.7, 1.0)
CAPTION_ALPHAS = (0.7, 0.8)
ANSWER_TOKENS, CAPTION_TOKENS = 16, 60
SEED = 0
FACES = "neutral faces"


def steer(
    model: HookedVLM, pairs: PairSet, pictures: Sequence[Picture], say: Callable[[str], None] = lambda _: None
) -> Steered:
    """Extract directions from `pairs`, choose layer and strength on their neutral twins, steer other `pictures`.

    say: is called with a line for each stage. The first of `pictures` is also described under every direction."""
    vectors = answer_vectors(model, pairs)
    twins = list({pair.identity: pair.neutral for pair in pairs}.values())[:4]
    development = rates_by_layer(model, twins[:2], vectors)
    layer, alpha = best_setting(development)
    say(f"steering {len(pictures)} neutral test images to {len(vectors)} emotions: layer {layer}, alpha {alpha:g}")
    faces = asked(pictures, FEELING)
    settings = [
        steering("steered", vectors, len(faces), layer, alpha),
        steering("random", vectors, len(faces), layer, alpha, seed=SEED),
    ]
    found = answers_to_faces(model, faces, list(vectors), settings)
    say("steering whole descriptions")
    captions = caption_vectors(model, pairs)
    captioned = steer_captions(model, captions, twins, faces)
    one = faces[0]
    sentences = _one_under_each(model, one, vectors, layer, alpha, "last+generated", ANSWER_TOKENS)
    texts = _one_under_each(
        model, one.asked(DESCRIBE), captions, captioned.layer, captioned.alpha, "generated", CAPTION_TOKENS
    )
    return Steered(
        n_pairs=len(pairs),
        development=development,
        layer=layer,
        alpha=alpha,
        n_pictures=len(faces),
        test=flips(found, "steered", list(vectors)),
        control=flips(found, "random", list(vectors)),
        picture=pictures[0],
        said=list(zip(["none", *vectors, "random"], sentences, texts, strict=True)),
        captioned=captioned,
        seed=SEED,
    )


def asked(pictures: Sequence[Picture], question: str) -> list[Example]:
    """Return the images as examples that are all asked one question."""
    return [Example(picture=p.path, emotion=p.emotion, question=question, identity=p.identity) for p in pictures]


def answer_vectors(model: HookedVLM, pairs: PairSet) -> dict[str, Float[Tensor, "layer d_model"]]:
    """Return the direction of each emotion at the last token of a question whose answer begins with the emotion's
    word."""
    directions = extract_directions(model, pairs.asked(LIST), tau=-1, require_neutral=False, minimum=1, progress=False)
    return {emotion: directions.of(emotion) for emotion in EMOTIONS if emotion in directions.emotions}


# --- steering faces to each emotion in turn -------------------------------------------------------------------


def steering(
    name: str,
    vectors: Vectors,
    n_faces: int,
    layer: int,
    alpha: float,
    positions: str = "last+generated",
    seed: int | None = None,
) -> Method:
    """Steer one batch that holds `n_faces` rows for each emotion in turn along that emotion's vector.

    vectors: emotion -> direction of every layer. layer, alpha, positions: as in `Steer`. name: of the method.
    seed: draw a random direction of the same norm for every row instead."""
    rows = []
    for i, vector in enumerate(vectors.values()):
        chosen = [vector] * n_faces if seed is None else random_directions(vector, n_faces, seed + i)
        rows += [[Steer(layer=layer, vector=v[layer], alpha=alpha, positions=positions)] for v in chosen]
    return Method(name=name, interventions=lambda *_: rows)


def answers_to_faces(
    model: HookedVLM,
    faces: Sequence[Example],
    emotions: Sequence[str],
    methods: Sequence[Method],
    max_new_tokens: int = ANSWER_TOKENS,
) -> Evaluation:
    """Judge the answers about every face by each emotion that it is steered to, rows as `steering` wants them."""
    rows = [replace(face, emotion=emotion) for emotion in emotions for face in faces]
    conditions = {FACES: rows}
    return evaluate(model, conditions, methods, batch_size=len(rows), max_new_tokens=max_new_tokens, progress=False)


def turned(found: Evaluation, method: str) -> list[bool]:
    """Return for each row whether its text names the wanted emotion first and reads like the unsteered one."""
    texts = found.texts[FACES]
    each = zip(texts[method], texts[found.baseline], found.examples[FACES], strict=True)
    return [named_emotion(text) == face.emotion and is_whole(text, plain) for text, plain, face in each]


def flips(found: Evaluation, method: str, emotions: Sequence[str]) -> Flips:
    """Return the shares of answers that are turned to the wanted emotion, and of those that name any."""
    rates = torch.tensor(turned(found, method)).float().reshape(len(emotions), -1).mean(1)
    wheels, texts = EmotionWheels.default(), found.texts[FACES][method]
    named_any = [any(name != "neutral" for name in wheels.emotions(text)) for text in texts]
    return Flips(dict(zip(emotions, rates.tolist(), strict=True)), sum(named_any) / len(texts))


def rates_by_layer(model: HookedVLM, faces: Sequence[Example], vectors: Vectors) -> Scores:
    """Return the share of answers turned to the wanted emotion, by strength and layer, with random directions at the
    last strength."""
    layers = range(model.cfg.n_layers)
    settings = [*((f"alpha {alpha:g}", alpha, None) for alpha in ALPHAS), ("random", ALPHAS[-1], SEED + 1)]
    methods = [
        steering(f"{name}, layer {layer}", vectors, len(faces), layer, alpha, seed=seed)
        for (name, alpha, seed), layer in product(settings, layers)
    ]
    found = answers_to_faces(model, [face.asked(FEELING) for face in faces], list(vectors), methods)
    rates = torch.tensor([turned(found, method.name) for method in methods]).float().mean(1).view(len(settings), -1)
    labels = {"setting": [name for name, *_ in settings]}
    return Scores(rates, ("setting", "layer"), labels, "fluent answers with the wanted emotion", "share")


def best_setting(development: Scores) -> tuple[int, float]:
    """Return the layer and strength with the highest rate; the weaker strength, then the earlier layer, where equal."""
    rates = development.values[: len(ALPHAS)]
    row, layer = divmod(int((rates >= rates.max()).flatten().long().argmax()), rates.shape[1])
    return layer, ALPHAS[row]


def _one_under_each(
    model: HookedVLM, face: Example, vectors: Vectors, layer: int, alpha: float, positions: str, max_new_tokens: int
) -> list[str]:
    """Return what is said of one face without steering, along each vector, and along a random one."""
    noise = random_directions(next(iter(vectors.values())), 1, SEED)[0]
    steers = [Steer(layer, vector[layer], alpha, positions) for vector in (*vectors.values(), noise)]
    rows = [[], *([steer] for steer in steers)]
    each = Method(name="each", interventions=lambda *_: rows)
    texts = generate_answers(model, [face] * len(rows), each, batch_size=len(rows), max_new_tokens=max_new_tokens)
    return [text.strip() for text in texts]


# --- whole descriptions ---------------------------------------------------------------------------------------


@torch.no_grad()
def caption_vectors(model: HookedVLM, pairs: PairSet) -> dict[str, Float[Tensor, "layer d_model"]]:
    """Return, for each emotion, the mean over its pairs of resid_post(emotional) - resid_post(neutral) under one
    caption, at the position of the answer where the pair differs most in the last layers."""
    n_layers, vectors = model.cfg.n_layers, {}
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(n_layers)]
    for emotion in [emotion for emotion in EMOTIONS if emotion in pairs.emotions]:
        mine = pairs.select(emotion=emotion)
        emotional, neutral = (
            model.prepare(text=[DESCRIBE] * len(mine), images=[[face.open()] for face in side])
            for side in zip(*((pair.emotional, pair.neutral) for pair in mine), strict=True)
        )
        tokens = model.generate(neutral, max_new_tokens=CAPTION_TOKENS, return_type="tokens")
        caches = [
            model.run_with_cache(side.with_answer(tokens), names_filter=names)[1] for side in (emotional, neutral)
        ]
        first, second = ([c.at("generated", "resid_post", layer) for layer in range(n_layers)] for c in caches)
        difference = torch.stack(first) - torch.stack(second)
        parting = difference[-3].norm(dim=-1).argmax(-1)
        vectors[emotion] = difference[:, torch.arange(len(mine)), parting].mean(1)
    return vectors


def steer_captions(
    model: HookedVLM, vectors: Vectors, development: Sequence[Example], faces: Sequence[Example]
) -> CaptionSteering:
    """Choose layer and strength on development faces, then steer the captions of others, also at random."""
    layers = range(max(0, model.cfg.n_layers - 2), model.cfg.n_layers)
    tried = list(product(layers, CAPTION_ALPHAS))
    rates = caption_rates(model, vectors, development, tried)
    (layer, alpha), best = max(zip(tried, rates, strict=True), key=lambda item: item[1])
    test, control = caption_rates(model, vectors, faces, [(layer, alpha)], seed=SEED + 2)
    return CaptionSteering(layer=layer, alpha=alpha, development=best, test=test, control=control)


def caption_rates(
    model: HookedVLM,
    vectors: Vectors,
    faces: Sequence[Example],
    settings: Sequence[tuple[int, float]],
    seed: int | None = None,
) -> list[float]:
    """Return the share of captions that name the wanted emotion first and stay whole, for each setting (layer, alpha).

    seed: a last rate follows, that of random directions in the last setting."""
    seeds = [None] * len(settings)
    if seed is not None:
        settings, seeds = [*settings, settings[-1]], [*seeds, seed]
    methods = [
        steering(f"setting {i}", vectors, len(faces), layer, alpha, "generated", seed=seed)
        for i, ((layer, alpha), seed) in enumerate(zip(settings, seeds, strict=True))
    ]
    asked = [face.asked(DESCRIBE) for face in faces]
    found = answers_to_faces(model, asked, list(vectors), methods, CAPTION_TOKENS)
    return [sum(good) / len(good) for good in (turned(found, method.name) for method in methods)]


def is_whole(text: str, plain: str) -> bool:
    """Return True where a text has as many sentences as the unsteered one, as many words to within three, and no word
    twice in a row."""
    words = text.lower().split()
    stutters = any(first.strip(".,") == second.strip(".,") for first, second in pairwise(words))
    return not stutters and text.count(".") == plain.count(".") and abs(len(words) - len(plain.split())) <= 3
