"""Draw the questions on which a checkpoint is evaluated, and ask them as a user would.

Each number of a draw gives other questions. Images are drawn at twice the training size and go through the checkpoint's
own processor; answers are greedy.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText

from veena_lens.zoo.captions import (
    ATTRIBUTE_QUESTIONS,
    EMOTION_QUESTIONS,
    EVENTS,
    HELD_OUT_EVENTS,
    context_sentence,
    padded_context,
)
from veena_lens.zoo.drawing import (
    EMOJI,
    LAYER_SIZE,
    PICTURE_SIZE,
    draw_emoji,
    draw_style_face,
    style_attributes,
    style_identities,
)
from veena_lens.zoo.faces import STYLES, combinations
from veena_lens.zoo.model import architecture_of
from veena_lens.zoo.people import BACKGROUNDS, EMOTIONS
from veena_lens.zoo.pictures import Bank, Face, compose, load_bank

__all__ = [
    "Asker",
    "Item",
    "Query",
    "attribute_items",
    "emoji_items",
    "face_items",
    "sharp_bank",
    "style_items",
    "to_image",
    "with_context",
]


@dataclass(frozen=True)
class Query:
    picture: Image.Image
    text: str


class Asker:
    """Open a checkpoint folder with its architecture's processor and `AutoModelForImageTextToText`, and ask it."""

    def __init__(self, folder: Path, device: str | None = None) -> None:
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.architecture = architecture_of(folder)
        self.processor = self.architecture.open_processor(folder)
        model: Any = AutoModelForImageTextToText.from_pretrained(folder)
        self.model = model.to(self.device).eval()

    def prompt(self, text: str) -> str:
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
        return self.processor.apply_chat_template([message], add_generation_prompt=True)

    @torch.no_grad()
    def answers(self, queries: list[Query], max_new_tokens: int = 8, batch: int = 64) -> list[str]:
        """Return greedy answers in the order of the queries; queries of similar length share a batch."""
        order = sorted(range(len(queries)), key=lambda i: len(queries[i].text))
        found: dict[int, str] = {}
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            inputs = self.processor(
                images=[queries[i].picture for i in rows],
                text=[self.prompt(queries[i].text) for i in rows],
                padding=True,
                return_tensors="pt",
            ).to(self.device)
            generated = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            generated = generated[:, inputs["input_ids"].shape[1] :]
            texts = self.processor.tokenizer.batch_decode(generated, skip_special_tokens=True)
            found.update(zip(rows, (text.strip() for text in texts), strict=True))
        return [found[i] for i in range(len(queries))]

    @torch.no_grad()
    def picture_attention(self, queries: list[Query]) -> list[float]:
        """Return, per layer, the share of the last prompt token's attention on the image (mean over heads)."""
        kept = self.model.config._attn_implementation
        self.model.set_attn_implementation("eager")
        inputs = self.processor(
            images=[q.picture for q in queries],
            text=[self.prompt(q.text) for q in queries],
            padding=True,
            return_tensors="pt",
        ).to(self.device)
        patterns = self.model(**inputs, output_attentions=True).attentions
        self.model.set_attn_implementation(kept)
        at_picture = (inputs["input_ids"] == self.model.config.image_token_id).float()
        return [(p[:, :, -1] * at_picture[:, None]).sum(-1).mean().item() for p in patterns]


SHARP = 2


@dataclass(frozen=True, kw_only=True)
class Item:
    """Hold a question about an image: `kind` names its table, `context_emotion` what a context suggests."""

    kind: str
    face: Face
    query: Query
    truth: str
    context_emotion: str | None = None
    strength: str | None = None


def to_image(picture: Float[Tensor, "3 height width"]) -> Image.Image:
    return Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy())


def sharp_bank(split: str, cache: Path, count: int | None = None) -> Bank:
    return load_bank(split, cache, count, size=SHARP * LAYER_SIZE)


def face_items(bank: Bank, draw: int, task: str = "list") -> list[Item]:
    """Return one image of every identity, with equal numbers per emotion and without context."""
    rng = random.Random(f"exam {draw}")
    emotions = [EMOTIONS[i % len(EMOTIONS)] for i in range(len(bank.numbers))]
    rng.shuffle(emotions)
    items = []
    for index, emotion in enumerate(emotions):
        face, layers = bank.draw(rng, emotion, index)
        image = to_image(compose([(face, layers)], size=SHARP * PICTURE_SIZE)[0])
        query = Query(image, rng.choice(EMOTION_QUESTIONS[task]))
        items.append(Item(kind="picture alone", face=face, query=query, truth=emotion))
    return items


def with_context(items: list[Item], draw: int, kind: str, strength: str, held_out: bool = False) -> list[Item]:
    """Return the same images after a context sentence; `kind` is "conflict" or "consistent"."""
    rng = random.Random(f"context {draw} {kind} {strength} {held_out}")
    found = []
    for item in items:
        suggested = item.truth if kind == "consistent" else rng.choice([e for e in EMOTIONS if e != item.truth])
        event = rng.choice((HELD_OUT_EVENTS if held_out else EVENTS)[suggested])
        context = padded_context(context_sentence(event, strength), rng)
        name = f"{kind}, {strength}{', held-out sentences' if held_out else ''}"
        query = Query(item.query.picture, f"{context} {item.query.text}")
        found.append(
            Item(kind=name, face=item.face, query=query, truth=item.truth, context_emotion=suggested, strength=strength)
        )
    return found


def attribute_items(items: list[Item], draw: int) -> list[Item]:
    """Return every attribute question about every image."""
    rng = random.Random(f"attributes {draw}")
    found = []
    for item in items:
        for name, value in item.face.attributes.items():
            query = Query(item.query.picture, rng.choice(ATTRIBUTE_QUESTIONS[name]))
            found.append(Item(kind=name, face=item.face, query=query, truth=value))
    return found


def style_items(name: str, split: str, limit: int | None = None, draw: int = 0) -> list[Item]:
    """Return every identity of a style with every emotion that the style can draw, in one combination each."""
    rng = random.Random(f"style exam {name} {draw}" if draw else f"style exam {name}")
    style, items = STYLES[name], []
    for number in style_identities(name, split)[:limit]:
        background = rng.choice(list(BACKGROUNDS))
        for clear, subtle in combinations(style).values():
            combination = rng.choice(clear + subtle)
            face = Face(
                style=name,
                identity=number,
                emotion=combination.emotion,
                clear=combination.clear,
                background=background,
                attributes=style_attributes(name, number) | {"background": background},
            )
            layer = draw_style_face(style, number, combination, SHARP * LAYER_SIZE)
            image = to_image(compose([(face, (layer,))], size=SHARP * PICTURE_SIZE)[0])
            query = Query(image, rng.choice(EMOTION_QUESTIONS["list"]))
            items.append(Item(kind=name, face=face, query=query, truth=combination.emotion))
    return items


def emoji_items(draw: int = 0) -> list[Item]:
    """Return every emoji on every background; each draw asks another question."""
    questions = [*EMOTION_QUESTIONS["list"], *EMOTION_QUESTIONS["sentence"]]
    items = []
    for emotion, codes in EMOJI.items():
        for code in codes:
            layer = draw_emoji(code, SHARP * LAYER_SIZE)
            for background in BACKGROUNDS:
                face = Face(
                    style="emoji",
                    identity=int(code, 16),
                    emotion=emotion,
                    clear=True,
                    background=background,
                    attributes={"background": background},
                )
                image = to_image(compose([(face, (layer,))], size=SHARP * PICTURE_SIZE)[0])
                query = Query(image, questions[draw % len(questions)])
                items.append(Item(kind="emoji", face=face, query=query, truth=emotion))
    return items


# Kind, strength, held-out sentences, and whether every draw is used (else the first two).
CONTEXT_TABLES = (
    ("conflict", "plain", False, True),
    ("conflict", "weak", False, False),
    ("conflict", "strong", False, False),
    ("conflict", "plain", True, False),
    ("consistent", "plain", False, False),
    ("consistent", "plain", True, False),
)
