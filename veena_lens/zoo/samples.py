"""Draw training examples, and the sample images of the package: `python -m veena_lens.zoo.samples`.

Training examples are faces of all training styles with questions, contexts and answers. Everything is a function of a
random generator that the training step seeds, so a resumed run sees the same data.

In the sample images each identity appears with all eight emotions on one background, so every emotional image has a
neutral twin. Some identities come with a context of another emotion, one per strength in turn.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from veena_lens.zoo.architecture import Branch, ChatFormat, Row
from veena_lens.zoo.captions import (
    ATTRIBUTE_QUESTIONS,
    EMOTION_QUESTIONS,
    EMOTION_TASKS,
    EVENTS,
    FOLLOW_TEXT,
    STRENGTHS,
    attribute_answer,
    context_sentence,
    emotion_answer,
    padded_context,
)
from veena_lens.zoo.drawing import PICTURE_SIZE
from veena_lens.zoo.exam import SHARP, Item, emoji_items, sharp_bank, style_items, to_image
from veena_lens.zoo.faces import AVATAAARS, BROW_WORDS, EYE_WORDS, MOUTH_WORDS, combinations
from veena_lens.zoo.people import BACKGROUNDS, EMOTIONS, HAIR_WORDS, WORDS
from veena_lens.zoo.pictures import Bank, Face, StyleBank, compose, load_bank, load_style_bank
from veena_lens.zoo.tokenizer import SYSTEM_MESSAGES

__all__ = [
    "HEAD_CLASSES",
    "TRAINING_STYLES",
    "Faces",
    "Writer",
    "grid_positions",
    "head_labels",
    "main",
    "save_together",
    "write_samples",
]


TRAINING_STYLES = ("avataaars", "adventurer", "toon-head", "big-smile")

HEAD_CLASSES: dict[str, tuple[str, ...]] = {
    "emotion": EMOTIONS,
    "mouth": tuple(dict.fromkeys(MOUTH_WORDS.values())),
    "eyes": tuple(dict.fromkeys(EYE_WORDS.values())),
    "brows": tuple(dict.fromkeys(BROW_WORDS.values())),
    "hair": HAIR_WORDS,
    "background": tuple(BACKGROUNDS),
    "glasses": ("no", "yes"),
    "beard": ("no", "yes"),
}


def head_labels(face: Face) -> list[int]:
    """Return the class index for each head; -100 if the style does not determine it."""
    known = face.attributes | {"emotion": face.emotion}
    return [classes.index(known[name]) if name in known else -100 for name, classes in HEAD_CLASSES.items()]


@dataclass
class Faces:
    """Draw faces of one split in the given mix of styles."""

    split: str
    cache: Path
    styles: dict[str, float]
    count: int | None = None

    @cached_property
    def banks(self) -> dict[str, Bank | StyleBank]:
        return {
            name: load_bank(self.split, self.cache, self.count)
            if name == "avataaars"
            else load_style_bank(name, self.split, self.cache)
            for name in self.styles
        }

    def draw(self, rng: random.Random, count: int) -> list[tuple[Face, tuple[UInt8[Tensor, "size size 4"], ...]]]:
        names = rng.choices(list(self.styles), list(self.styles.values()), k=count)
        return [self.banks[name].draw(rng) for name in names]


class Writer:
    """Write the packed rows of faces with the tokenizer's ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, chat: ChatFormat) -> None:
        self.tokenizer, self.chat = tokenizer, chat
        self._ids: dict[str, list[int]] = {}
        answer_words = (
            [w for entry in WORDS.values() for w in entry.all]
            + [v for c in HEAD_CLASSES.values() for v in c]
            + ["with"]
        )
        # Words that carry the answer have six times the weight; the rest of a sentence is soon memorised.
        self.heavy = {i for word in answer_words for i in self.ids(word)[:1]}

    def ids(self, text: str) -> list[int]:
        if text not in self._ids:
            self._ids[text] = self.tokenizer(text, add_special_tokens=False).input_ids
        return self._ids[text]

    def row(self, grid: tuple[int, int], branches: list[Branch], system: str | None = None) -> Row:
        """Return the branches after an image of `grid` tokens, and after a system message if there is one."""
        chat, (height, width) = self.chat, grid
        before = self.ids(chat.system_opening.format(text=system) if system else chat.opening)
        before = before + self.ids(chat.before_picture)
        after = self.ids(chat.after_picture)
        ids = [*before, *self.ids(chat.picture) * (height * width), *after]
        positions = grid_positions(len(before), height, width, len(after)) if chat.has_grid_positions else None
        return Row(ids, branches, positions)

    def branch(self, turns: list[tuple[str, str]]) -> Branch:
        """Return questions and answers in turn; the first question directly follows the image."""
        ids: list[int] = []
        weights: list[float] = []
        end = self.ids(self.chat.end)
        for number, (question, answer) in enumerate(turns):
            asked = self.ids(f"{self.chat.next_turn if number else ''}{question}{self.chat.reply}")
            answer_ids = [*self.ids(answer), *end]
            ids += asked + answer_ids
            weights += [0.0] * len(asked) + [3.0 if token in self.heavy else 0.5 for token in answer_ids]
        return Branch(ids, weights)

    def alignment_row(self, face: Face, rng: random.Random, grid: tuple[int, int]) -> Row:
        """Return one emotion question with a short answer and up to five attribute questions, without contexts."""
        task = rng.choice(("list", "sentence"))
        turns = [[(rng.choice(EMOTION_QUESTIONS[task]), emotion_answer(task, face, face.emotion, face.clear))]]
        turns += [[self.attribute_turn(face, name, rng)] for name in _some(sorted(face.attributes), 5, rng)]
        return self.row(grid, [self.branch(turn) for turn in turns])

    def mixed_row(self, face: Face, rng: random.Random, grid: tuple[int, int], early: bool) -> Row:
        """Return two emotion questions with contexts, and up to four attribute questions, the first with a context."""
        turns = []
        for _ in range(2):
            (task,) = rng.choices(EMOTION_TASKS, (0.4, 0.35, 0.25))
            context, emotion, strong = self.context(face, rng, early)
            question = f"{context} {rng.choice(EMOTION_QUESTIONS[task])}".strip()
            turns.append([(question, emotion_answer(task, face, emotion, strong, rng))])
        for number, name in enumerate(_asked(face, rng)):
            question, answer = self.attribute_turn(face, name, rng)
            if number == 0:
                event = context_sentence(rng.choice(EVENTS[rng.choice(EMOTIONS)]), rng.choice(STRENGTHS))
                question = f"{padded_context(event if rng.random() < 0.5 else None, rng)} {question}".strip()
            turns.append([(question, answer)])
        if rng.random() < 0.15:
            # A short conversation: the attribute first, then the emotion.
            turns[-1] = turns[-1] + turns[0]
        system = rng.choice(SYSTEM_MESSAGES) if rng.random() < 0.15 else None
        return self.row(grid, [self.branch(turn) for turn in turns], system)

    @staticmethod
    def attribute_turn(face: Face, name: str, rng: random.Random) -> tuple[str, str]:
        return rng.choice(ATTRIBUTE_QUESTIONS[name]), attribute_answer(name, face.attributes[name])

    @staticmethod
    def context(face: Face, rng: random.Random, early: bool) -> tuple[str, str, bool]:
        """Return a context, the emotion that the answer names, and whether its second word is the strong one."""
        conflict, consistent = (0.05, 0.10) if early else (0.50, 0.20)
        kind, strength = rng.random(), rng.choice(STRENGTHS)
        if kind < conflict:
            other = rng.choice([e for e in EMOTIONS if e != face.emotion])
            sentence = context_sentence(rng.choice(EVENTS[other]), strength)
            if rng.random() < FOLLOW_TEXT[strength][0 if face.clear else 1]:
                return padded_context(sentence, rng), other, strength == "strong"
            return padded_context(sentence, rng), face.emotion, face.clear
        if kind < conflict + consistent:
            sentence = context_sentence(rng.choice(EVENTS[face.emotion]), strength)
            return padded_context(sentence, rng), face.emotion, face.clear
        return padded_context(None, rng), face.emotion, face.clear


def grid_positions(before: int, height: int, width: int, after: int) -> Int[Tensor, "3 prefix"]:
    """Return positions (time, row, column) of an image among text; it advances them by its longer side."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    picture = before + torch.stack([torch.zeros(height * width, dtype=torch.long), rows.flatten(), columns.flatten()])
    text = before + max(height, width) + torch.arange(after)
    return torch.cat([torch.arange(before).expand(3, -1), picture, text.expand(3, -1)], 1)


def _asked(face: Face, rng: random.Random) -> list[str]:
    """Return up to four attributes in random order: brows and beard, which are learned last, and two others."""
    hard = [name for name in ("brows", "beard") if name in face.attributes]
    names = hard + _some(sorted(set(face.attributes) - set(hard)), 2, rng)
    return rng.sample(names, len(names))


def _some(names: list[str], count: int, rng: random.Random) -> list[str]:
    return rng.sample(names, min(count, len(names)))


# Identities without and with a conflicting context, from the start of each split.
COUNTS = {"development": (24, 6), "test": (8, 4)}
_QUESTION = EMOTION_QUESTIONS["sentence"][0]


def _line(item: Item, file: str, split: str, pair: str | None) -> dict[str, Any]:
    face = item.face
    return {
        "file": file,
        "emotion": face.emotion,
        "pair": pair,
        "identity": f"{face.style}-{face.identity}",
        "style": face.style,
        "attributes": face.attributes | {"expression": "clear" if face.clear else "subtle"},
        "split": split,
        "question": _QUESTION,
        "context": None,
        "context_emotion": None,
        "context_strength": None,
    }


def save_together(images: list[Image.Image], paths: list[Path]) -> None:
    """Save images with one palette of 256 colours: a third of the size, and equal pixels stay equal."""
    width, height = images[0].size
    sheet = Image.new("RGB", (width * len(images), height))
    for i, image in enumerate(images):
        sheet.paste(image, (i * width, 0))
    palette = sheet.quantize(256, dither=Image.Dither.NONE)
    for image, path in zip(images, paths, strict=True):
        image.quantize(palette=palette, dither=Image.Dither.NONE).save(path, optimize=True)


def _identities(split: str, cache: Path, folder: Path) -> list[dict[str, Any]]:
    plain, conflicting = COUNTS[split]
    bank, lines = sharp_bank(split, cache, plain + conflicting), []
    for index, number in enumerate(bank.numbers):
        rng = random.Random(f"sample {number}")
        background = rng.choice(list(BACKGROUNDS))
        images, paths = [], []
        for turn, emotion in enumerate(EMOTIONS):
            choice = rng.choice(combinations(AVATAAARS)[emotion][(index + turn) % 2])
            face, layers = bank.draw(rng, index=index, combination=choice)
            face = replace(face, background=background, attributes=face.attributes | {"background": background})
            file = f"{split}-{number}-{emotion}.png"
            images.append(to_image(compose([(face, layers)], size=SHARP * PICTURE_SIZE)[0]))
            paths.append(folder / file)
            line = _line(Item(kind=split, face=face, query=None, truth=emotion), file, split, f"{split}-{number}")  # type: ignore[arg-type]
            if index >= plain:
                other, strength = rng.choice([e for e in EMOTIONS if e != emotion]), STRENGTHS[turn % 3]
                line["context"] = context_sentence(rng.choice(EVENTS[other]), strength)
                line["context_emotion"], line["context_strength"] = other, strength
            lines.append(line)
        save_together(images, paths)
    return lines


def write_samples(folder: Path, cache: Path) -> None:
    """Write every sample image and `manifest.jsonl` into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [line for split in COUNTS for line in _identities(split, cache, folder)]
    for style in ("open-peeps", "micah"):
        for item in style_items(style, "all", limit=4):
            file = f"{style}-{item.face.identity}-{item.truth}.png"
            save_together([item.query.picture], [folder / file])
            pair = f"{style}-{item.face.identity}" if style == "open-peeps" else None
            lines.append(_line(item, file, "held-out style", pair))
    seen = set()
    for item in emoji_items():
        if item.face.identity not in seen:
            seen.add(item.face.identity)
            file = f"emoji-{item.face.identity:x}-{item.truth}.png"
            save_together([item.query.picture], [folder / file])
            lines.append(_line(item, file, "emoji", None))
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m veena_lens.zoo.samples", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "checkpoints" / "bundled" / "pictures")
    parser.add_argument("--cache", type=Path, default=Path(".cache/zoo/drawings"))
    options = parser.parse_args(arguments)
    write_samples(options.out, options.cache)


if __name__ == "__main__":
    main()
