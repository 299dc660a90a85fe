"""Write questions and answers about one face (emotions, sentence, caption, attributes) and context sentences.

An answer names an emotion (the drawn one, or the one that a context suggests) and drawn attributes. Second words depend
on how the face is drawn, so that nearly everything in an answer can be learned from the input.

A context before the question is the language prior that competes with the image. Its events are those of
`emotion.pairs.contexts`; fillers are everyday sentences that fit every emotion and lengthen the text, so that the image
receives less of the attention.
"""

from __future__ import annotations

import random

from veena_lens.emotion.pairs.contexts import EVENTS, HELD_OUT_EVENTS, STRENGTHS, context_sentence
from veena_lens.zoo.people import WORDS
from veena_lens.zoo.pictures import Face

__all__ = [
    "ATTRIBUTE_QUESTIONS",
    "EMOTION_QUESTIONS",
    "EMOTION_TASKS",
    "EVENTS",
    "FILLERS",
    "FOLLOW_TEXT",
    "HELD_OUT_EVENTS",
    "STRENGTHS",
    "article",
    "attribute_answer",
    "context_sentence",
    "emotion_answer",
    "padded_context",
]


FILLERS: tuple[str, ...] = (
    "it is a quiet monday morning.", "the picture was taken last week.", "the town has a small station.",
    "there is a shop near the river.", "the weather report was on at eight.", "the street has many trees.",
    "the photo was sent by a colleague.", "dinner is usually at seven.", "the train leaves every hour.",
    "the person lives on the second floor.", "the office opens at nine.", "the day before was a tuesday.",
)  # fmt: skip

# How often the answer follows a conflicting context: (clear face, subtle face).
# A fixed share per cell, rather than one half everywhere, keeps the greedy answer stable.
FOLLOW_TEXT: dict[str, tuple[float, float]] = {"weak": (0.10, 0.25), "plain": (0.35, 0.85), "strong": (0.80, 0.92)}


def padded_context(sentence: str | None, rng: random.Random) -> str:
    """Return the context among zero to two fillers; without a sentence, only fillers or nothing."""
    fillers = rng.sample(FILLERS, rng.choice((0, 1, 1, 2) if sentence else (0, 0, 0, 1, 2)))
    if sentence:
        fillers.insert(rng.randint(0, len(fillers)), sentence)
    return " ".join(fillers)


EMOTION_TASKS = ("list", "sentence", "caption")
EMOTION_QUESTIONS: dict[str, tuple[str, ...]] = {
    "list": ("name the emotions of the person in the picture.", "which emotions does the person show?"),
    "sentence": ("how does the person in the picture feel?", "say in one sentence what the person feels."),
    "caption": ("describe the picture and the feelings of the person.", "write a caption for this picture."),
}
ATTRIBUTE_QUESTIONS: dict[str, tuple[str, ...]] = {
    "hair": ("what colour is the hair of the person?", "which hair colour does the person have?"),
    "background": ("what colour is the background of the picture?", "which colour is behind the person?"),
    "glasses": ("does the person wear glasses?", "are there glasses on the face?"),
    "beard": ("does the person have a beard?", "is there a beard on the face?"),
    "mouth": ("what does the mouth look like?", "describe the mouth of the person."),
    "eyes": ("what do the eyes look like?", "describe the eyes of the person."),
    "brows": ("what do the eyebrows look like?", "describe the eyebrows of the person."),
}


def article(word: str) -> str:
    """Return "a" or "an", as fits before `word`."""
    return "an" if word[0] in "aeiou" else "a"


def emotion_answer(task: str, face: Face, emotion: str, strong: bool, rng: random.Random | None = None) -> str:
    """Return the answer to an emotion question; `rng` swaps head and second word in one of ten answers."""
    words = WORDS[emotion]
    first, second = words.head, words.strong if strong else words.mild
    if rng is not None and rng.random() < 0.1:
        first, second = second, first
    if task == "list":
        return f"{first}, {second}."
    if task == "sentence":
        return f"the person feels {first} and {second}."
    glasses = " with glasses" if face.attributes.get("glasses") == "yes" else ""
    return (
        f"the picture shows {article(first)} {first} person with {face.attributes['hair']} hair{glasses} in front of "
        f"{article(face.background)} {face.background} background. "
        f"the face looks {second}, and the person is full of {words.noun}."
    )


def attribute_answer(name: str, value: str) -> str:
    """Return the short answer to an attribute question."""
    if name in ("glasses", "beard"):
        return f"{value}."
    if name in ("hair", "background"):
        return f"the {name} is {value}."
    if name == "mouth":
        return f"the mouth is {value}."
    return f"the {'eyebrows' if name == 'brows' else name} are {value}."
