"""Sentences put before the question: the language prior that competes with the picture.

The events are those of `veena_lens.emotion.contexts`; fillers are everyday sentences that fit every emotion and make
the text longer, so that the picture holds less of the attention.
"""

import random

from veena_lens.emotion.contexts import EVENTS, HELD_OUT_EVENTS, STRENGTHS, context_sentence

__all__ = ["EVENTS", "FILLERS", "FOLLOW_TEXT", "HELD_OUT_EVENTS", "STRENGTHS", "context_sentence", "padded_context"]

FILLERS: tuple[str, ...] = (
    "it is a quiet monday morning.", "the picture was taken last week.", "the town has a small station.",
    "there is a shop near the river.", "the weather report was on at eight.", "the street has many trees.",
    "the photo was sent by a colleague.", "dinner is usually at seven.", "the train leaves every hour.",
    "the person lives on the second floor.", "the office opens at nine.", "the day before was a tuesday.",
)  # fmt: skip

# How often the answer follows a conflicting context: (clear face, subtle face).
# A fixed share per cell, not a coin of one half everywhere, keeps the greedy answer stable.
FOLLOW_TEXT: dict[str, tuple[float, float]] = {"weak": (0.10, 0.25), "plain": (0.35, 0.85), "strong": (0.80, 0.92)}


def padded_context(sentence: str | None, rng: random.Random) -> str:
    """The context among nought to two fillers; without a sentence, fillers alone or nothing."""
    fillers = rng.sample(FILLERS, rng.choice((0, 1, 1, 2) if sentence else (0, 0, 0, 1, 2)))
    if sentence:
        fillers.insert(rng.randint(0, len(fillers)), sentence)
    return " ".join(fillers)
