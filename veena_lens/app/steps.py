"""The demo's steps, one function each: describe, attend, lens, patch, steer.

Each takes a model and prepared inputs, makes a few public calls of the library and gives back `Scores` or plain
data; `demo.py` chooses images and settings, `demo_page.py` shows what came out.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from veena_lens.interventions import Steer
from veena_lens.scores import Scores
from veena_lens.zoo.people import EMOTIONS, WORDS, named_emotion

if TYPE_CHECKING:
    from veena_lens.checkpoints.files import Picture
    from veena_lens.inputs import MultimodalInputs
    from veena_lens.model.model import HookedVLM

DESCRIBE = "describe the picture and the feelings of the person."
SAY = "how does the person in the picture feel?"
NAME = "name the emotions of the person in the picture."  # its answer begins with the emotion's word


@dataclass(frozen=True)
class Description:
    """What the model says of one image, and whether the first emotion it names is the drawn one."""

    picture: Picture
    text: str

    @property
    def named(self) -> str:
        return named_emotion(self.text) or "none"

    @property
    def is_hit(self) -> bool:
        return self.named == self.picture.emotion


def ask(model: HookedVLM, question: str, pictures: Sequence[Picture]) -> MultimodalInputs:
    """The same question about each image, a row each."""
    return model.prepare(text=[question] * len(pictures), images=[[picture.open()] for picture in pictures])


def describe(model: HookedVLM, pictures: Sequence[Picture]) -> list[Description]:
    """A caption of each image, greedily."""
    texts = model.generate(ask(model, DESCRIBE, pictures), max_new_tokens=60, do_sample=False)
    return [Description(picture, text.strip()) for picture, text in zip(pictures, texts, strict=True)]


def name_emotions(model: HookedVLM, pictures: Sequence[Picture]) -> list[str | None]:
    """The emotion that the model names first for each image."""
    texts: list[str] = []
    for part in chunks(len(pictures)):
        texts += model.generate(ask(model, NAME, pictures[part]), max_new_tokens=4, do_sample=False)
    return [named_emotion(text) for text in texts]


def attention_to_picture(model: HookedVLM, inputs: MultimodalInputs) -> Scores:
    """Attention from the last prompt token to the image tokens of one row, mean over heads.

    Axes (layer, y, x) over the image's token grid; probability.
    """
    (grid,) = inputs.grids[0]
    attention = model.attention(inputs, queries="last", keys="image").mean("head")
    values = attention.values.reshape(model.cfg.n_layers, *grid)
    return Scores(values, ("layer", "y", "x"), name="attention", unit="probability")


def word_tokens(model: HookedVLM) -> dict[str, int]:
    """The token of each emotion's head word, as it follows a space."""
    return {emotion: model.to_single_token(f" {WORDS[emotion].head}") for emotion in EMOTIONS}


@torch.no_grad()
def logit_lens(model: HookedVLM, inputs: MultimodalInputs) -> tuple[Scores, list[list[tuple[str, float]]]]:
    """Next-token probabilities if the model stopped after each layer: softmax(W_U ln_final(resid_post[layer])).

    Gives Scores (layer, emotion) at the last position of one row, and each layer's five likeliest tokens.
    Source: nostalgebraist 2020, "interpreting GPT: the logit lens".
    """
    resid = last_residuals(model, inputs)
    probabilities = (model.ln_final(resid) @ model.W_U + model.b_U)[:, 0].float().softmax(-1)
    words = list(word_tokens(model).values())
    scores = Scores(probabilities[:, words], ("layer", "emotion"), {"emotion": EMOTIONS}, "probability")
    best = probabilities.topk(5, dim=-1)
    likeliest = [
        [(model.tokenizer.decode([token]).strip(), p) for token, p in zip(tokens, values, strict=True)]
        for tokens, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    return scores, likeliest


@torch.no_grad()
def last_residuals(model: HookedVLM, inputs: MultimodalInputs) -> Float[Tensor, "layer batch d_model"]:
    """resid_post of every layer at the last position."""
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)]
    _, cache = model.run_with_cache(inputs, names_filter=names)
    return torch.stack([cache[name][:, -1] for name in names])


@torch.no_grad()
def head_patching(model: HookedVLM, emotional: MultimodalInputs, neutral: MultimodalInputs, emotion: str) -> Scores:
    """How much of the emotion comes back when one head's output is taken from the emotional image's run.

    The neutral twin runs with `attn.hook_z` of one head replaced at all positions; the measure is the logit of
    the emotion's word minus that of "neutral", 0 being the neutral run and 1 the emotional one. Axes (layer, head).
    `transformer_lens.patching` does it, unchanged, on inputs with images.
    """
    from transformer_lens import patching

    tokens = word_tokens(model)

    def measure(logits: Tensor) -> Tensor:
        return (logits[:, -1, tokens[emotion]] - logits[:, -1, tokens["neutral"]]).mean()

    names = [f"blocks.{layer}.attn.hook_z" for layer in range(model.cfg.n_layers)]
    emotional_logits, cache = model.run_with_cache(emotional, names_filter=names)
    high, low = measure(emotional_logits), measure(model(neutral))
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        # Its annotations ask for a tensor of tokens; inputs with images stand in for one.
        patch: Any = patching.get_act_patch_attn_head_out_all_pos
        raw = patch(model, neutral, cache, measure)
    meta = {"emotional": high.item(), "neutral": low.item()}
    return Scores((raw - low) / (high - low), ("layer", "head"), name="share of the effect", meta=meta)


def steering_vectors(
    model: HookedVLM, pairs: Sequence[tuple[Picture, Picture]]
) -> dict[str, Float[Tensor, "layer d_model"]]:
    """For each emotion the mean over its pairs of resid_post(emotional) - resid_post(neutral twin), last position."""
    vectors = {}
    for emotion in EMOTIONS:
        mine = [pair for pair in pairs if pair[0].emotion == emotion]
        if mine:
            emotional, neutral = (last_residuals(model, ask(model, NAME, side)) for side in zip(*mine, strict=True))
            vectors[emotion] = (emotional - neutral).mean(1)
    return vectors


def random_like(vector: Float[Tensor, "layer d_model"], generator: torch.Generator) -> Float[Tensor, "layer d_model"]:
    """Gaussian directions with the norms of `vector`, layer by layer."""
    noise = torch.randn(vector.shape, generator=generator).to(vector)
    return noise * vector.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)


@torch.no_grad()
def steered(
    model: HookedVLM, question: str, pictures: Sequence[Picture], steers: Sequence[Steer | None], max_new_tokens: int
) -> list[str]:
    """Answers about `pictures`, each row under its own `Steer` (None: none)."""
    with model.intervene(per_row=[[] if steer is None else [steer] for steer in steers]):
        texts = model.generate(ask(model, question, pictures), max_new_tokens=max_new_tokens, do_sample=False)
    return [text.strip() for text in texts]


def chunks(count: int, size: int = 32) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, count, size))


@dataclass(frozen=True)
class Flips:
    """How often the answer about a neutral image named the wanted emotion, and how often any emotion."""

    wanted: Mapping[str, float]
    any: float

    @property
    def mean(self) -> float:
        return sum(self.wanted.values()) / len(self.wanted)


def flip_rates(
    model: HookedVLM,
    pictures: Sequence[Picture],
    vectors: Mapping[str, Float[Tensor, "layer d_model"]],
    layer: int,
    alpha: float,
    random: torch.Generator | None = None,
) -> Flips:
    """Steer each neutral image towards each emotion at one layer and read the emotion that the sentence names.

    With `random`, a fresh direction of the same norm takes each vector's place: the control.
    """
    rows = [(emotion, picture) for emotion in vectors for picture in pictures]
    named: list[str | None] = []
    for part in chunks(len(rows)):
        vector = [vectors[e] if random is None else random_like(vectors[e], random) for e, _ in rows[part]]
        steers = [Steer(layer=layer, vector=v[layer], alpha=alpha) for v in vector]
        texts = steered(model, SAY, [picture for _, picture in rows[part]], steers, max_new_tokens=6)
        named += [named_emotion(text) for text in texts]
    hits = {
        emotion: sum(n == emotion for (e, _), n in zip(rows, named, strict=True) if e == emotion) / len(pictures)
        for emotion in vectors
    }
    return Flips(hits, sum(n not in (None, "neutral") for n in named) / len(named))
