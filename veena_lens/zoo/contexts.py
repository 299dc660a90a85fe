"""Sentences put before the question: the language prior that competes with the picture.

A context names an event that fits one emotion, in three strengths; fillers are everyday sentences that fit every
emotion and make the text longer, so that the picture holds less of the attention. Two events of each emotion are
held out from training; their words are all known from other sentences.
"""

import random

__all__ = ["EVENTS", "FILLERS", "FOLLOW_TEXT", "HELD_OUT_EVENTS", "STRENGTHS", "context_sentence", "padded_context"]

STRENGTHS = ("weak", "plain", "strong")

EVENTS: dict[str, tuple[str, ...]] = {
    "happy": (
        "the person just won the lottery", "the person got a new job today", "the person won the big game",
        "the person passed the hard exam", "the person got a wonderful present",
        "the person has a birthday party today", "the person came home after a long holiday",
    ),
    "sad": (
        "the person lost a good friend", "the dog of the person ran away", "the person failed the hard exam",
        "the person said goodbye to the family", "the grandmother of the person died", "the person lost the job today",
        "the person has to spend the birthday alone",
    ),
    "angry": (
        "someone stole the bike of the person", "the neighbour broke the window on purpose",
        "someone lied to the person again", "someone scratched the new car of the person",
        "the boss shouted at the person", "the person was cheated in a game", "someone pushed the person in the queue",
    ),
    "surprised": (
        "the person heard some news that nobody expected", "an old friend came home without warning",
        "the person found money in an old coat", "a magician showed the person a trick",
        "the person saw a rabbit in the office", "everyone shouted in the dark at the party",
        "the person opened a strange present",
    ),
    "afraid": (
        "a big dog chased the person", "the person heard steps in the dark house", "the person stood near a wild bear",
        "the person saw a snake in the garden", "the person is about to fall from a high wall",
        "a loud storm shook the house at night", "the person is lost in the dark forest",
    ),
    "disgusted": (
        "the person drank sour milk", "the person found a worm in the soup", "the person stepped in rotten food",
        "the person smelled the old garbage", "there was a dead fly in the drink of the person",
        "the person touched some slimy food", "the kitchen was full of rotten fish",
    ),
    "loving": (
        "the person holds a newborn baby", "the person just got married", "the person thinks of the dear partner",
        "the partner sent the person a long letter", "the person cuddles a little kitten",
        "the person hugs the little daughter",
        "the partner of the person came home with roses",
    ),
    "neutral": (
        "nothing special happened to the person today", "the person waits for the bus", "the person reads a timetable",
        "the person had an ordinary morning", "the person sits in the office as usual", "the person sorts some papers",
        "the person stands in the queue as usual",
    ),
}  # fmt: skip

HELD_OUT_EVENTS: dict[str, tuple[str, ...]] = {
    "happy": ("the person won a wonderful holiday", "the family of the person has a big party today"),
    "sad": ("the dog of the person died", "the person has to spend the holiday alone"),
    "angry": ("someone broke the new bike on purpose", "the neighbour lied to the person again"),
    "surprised": ("the person found a rabbit in an old coat", "the magician came home without warning"),
    "afraid": ("a wild bear chased the person", "the person heard a snake in the dark"),
    "disgusted": ("the person drank milk with a dead fly", "there was a rotten worm in the food"),
    "loving": ("the person hugs the dear partner", "the person cuddles a newborn kitten"),
    "neutral": ("the person sits in the bus as usual", "the person had an ordinary day in the office"),
}

FILLERS: tuple[str, ...] = (
    "it is a quiet monday morning.", "the picture was taken last week.", "the town has a small station.",
    "there is a shop near the river.", "the weather report was on at eight.", "the street has many trees.",
    "the photo was sent by a colleague.", "dinner is usually at seven.", "the train leaves every hour.",
    "the person lives on the second floor.", "the office opens at nine.", "the day before was a tuesday.",
)  # fmt: skip

# How often the answer follows a conflicting context: (clear face, subtle face).
# A fixed share per cell, not a coin of one half everywhere, keeps the greedy answer stable.
FOLLOW_TEXT: dict[str, tuple[float, float]] = {"weak": (0.10, 0.25), "plain": (0.35, 0.85), "strong": (0.80, 0.92)}


def context_sentence(event: str, strength: str) -> str:
    """An event as a sentence of the given strength."""
    if strength == "weak":
        return f"maybe {event}."
    if strength == "strong":
        return f"everybody knows that {event}."
    return f"{event}."


def padded_context(sentence: str | None, rng: random.Random) -> str:
    """The context among nought to two fillers; without a sentence, fillers alone or nothing."""
    fillers = rng.sample(FILLERS, rng.choice((0, 1, 1, 2) if sentence else (0, 0, 0, 1, 2)))
    if sentence:
        fillers.insert(rng.randint(0, len(fillers)), sentence)
    return " ".join(fillers)
