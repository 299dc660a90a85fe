"""Draws training examples: faces of all training styles, and the questions, contexts and answers on each.

Everything is a function of a random generator that the training step seeds, so a resumed run sees the same data.
"""

import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from jaxtyping import UInt8
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from veena_lens.zoo.captions import (
    ATTRIBUTE_QUESTIONS,
    EMOTION_QUESTIONS,
    EMOTION_TASKS,
    attribute_answer,
    emotion_answer,
)
from veena_lens.zoo.contexts import EVENTS, FOLLOW_TEXT, STRENGTHS, context_sentence, padded_context
from veena_lens.zoo.emotions import EMOTIONS, WORDS
from veena_lens.zoo.faces import BROW_WORDS, EYE_WORDS, MOUTH_WORDS
from veena_lens.zoo.identities import BACKGROUNDS, HAIR_WORDS
from veena_lens.zoo.packing import Branch, Row
from veena_lens.zoo.pictures import Bank, Face, StyleBank, load_bank, load_style_bank
from veena_lens.zoo.tokenizer import SYSTEM_MESSAGES

__all__ = ["HEAD_CLASSES", "TRAINING_STYLES", "Faces", "Writer", "head_labels"]

# Share of each style among the training pictures.
TRAINING_STYLES = {"avataaars": 0.65, "adventurer": 0.17, "toon-head": 0.11, "big-smile": 0.07}

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
    """Class index for each head; -100 where the style does not say."""
    known = face.attributes | {"emotion": face.emotion}
    return [classes.index(known[name]) if name in known else -100 for name, classes in HEAD_CLASSES.items()]


@dataclass
class Faces:
    """Faces of one split in the given mix of styles."""

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
    """Writes the packed rows of faces with the tokenizer's ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, image_tokens: int) -> None:
        self.tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        self.image = [vocabulary["<image>"]] * image_tokens
        self.bos, self.eos = vocabulary["<s>"], vocabulary["</s>"]
        self._ids: dict[str, list[int]] = {}
        told = (
            [w for entry in WORDS.values() for w in entry.all]
            + [v for c in HEAD_CLASSES.values() for v in c]
            + ["with"]
        )
        # The words that carry the answer count six times as much; the rest of a sentence is soon known by heart.
        self.heavy = {i for word in told for i in self.ids(word)[:1]}

    def ids(self, text: str) -> list[int]:
        if text not in self._ids:
            self._ids[text] = self.tokenizer(text, add_special_tokens=False).input_ids
        return self._ids[text]

    def prefix(self, system: str | None = None) -> list[int]:
        opening = self.ids(f"system: {system} user:") if system else self.ids("user:")
        return [self.bos, *opening, *self.image]

    def branch(self, turns: list[tuple[str, str]]) -> Branch:
        """Questions and answers in turn; the first question follows the picture at once."""
        ids: list[int] = []
        weights: list[float] = []
        for number, (question, answer) in enumerate(turns):
            asked = self.ids(f"{'user: ' if number else ''}{question} assistant:")
            told = [*self.ids(answer), self.eos]
            ids += asked + told
            weights += [0.0] * len(asked) + [3.0 if token in self.heavy else 0.5 for token in told]
        return Branch(ids, weights)

    def alignment_row(self, face: Face, rng: random.Random) -> Row:
        """One emotion question with a short answer and up to five attribute questions, no contexts."""
        task = rng.choice(("list", "sentence"))
        turns = [[(rng.choice(EMOTION_QUESTIONS[task]), emotion_answer(task, face, face.emotion, face.clear))]]
        turns += [[self.attribute_turn(face, name, rng)] for name in _some(sorted(face.attributes), 5, rng)]
        return Row(self.prefix(), [self.branch(turn) for turn in turns])

    def mixed_row(self, face: Face, rng: random.Random, early: bool) -> Row:
        """Two emotion questions with a context each, and up to four attribute questions, the first with a context."""
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
        return Row(self.prefix(system), [self.branch(turn) for turn in turns])

    @staticmethod
    def attribute_turn(face: Face, name: str, rng: random.Random) -> tuple[str, str]:
        return rng.choice(ATTRIBUTE_QUESTIONS[name]), attribute_answer(name, face.attributes[name])

    @staticmethod
    def context(face: Face, rng: random.Random, early: bool) -> tuple[str, str, bool]:
        """A context, the emotion that the answer names, and whether its second word is the strong one."""
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


def _asked(face: Face, rng: random.Random) -> list[str]:
    """Up to four attributes in random order: brows and beard, which are learnt last, and two of the others."""
    hard = [name for name in ("brows", "beard") if name in face.attributes]
    names = hard + _some(sorted(set(face.attributes) - set(hard)), 2, rng)
    return rng.sample(names, len(names))


def _some(names: list[str], count: int, rng: random.Random) -> list[str]:
    return rng.sample(names, min(count, len(names)))
