"""Define identities (hair, skin, glasses, beard, clothes) and the words of the eight emotions.

Attributes are random per identity and independent of emotion. Identities are numbered; the number alone determines the
face (through a seed) and the split, so an image of the test split never occurs in training, however often the data are
drawn.

Each emotion has a head word, a strong and a mild second word (chosen by the drawn face, because random synonyms could
not be learned) and a noun. No word belongs to two emotions. Other files read their vocabulary from here.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

__all__ = [
    "BACKGROUNDS",
    "EMOTIONS",
    "HAIR_WORDS",
    "SPLITS",
    "WORDS",
    "EmotionWords",
    "Identity",
    "identity",
    "identity_numbers",
    "named_emotion",
]


@dataclass(frozen=True)
class EmotionWords:
    head: str
    strong: str
    mild: str
    noun: str

    @property
    def all(self) -> tuple[str, str, str, str]:
        return self.head, self.strong, self.mild, self.noun


WORDS: dict[str, EmotionWords] = {
    "happy": EmotionWords("happy", "joyful", "cheerful", "joy"),
    "sad": EmotionWords("sad", "sorrowful", "gloomy", "sorrow"),
    "angry": EmotionWords("angry", "furious", "annoyed", "anger"),
    "surprised": EmotionWords("surprised", "astonished", "amazed", "surprise"),
    "afraid": EmotionWords("afraid", "terrified", "anxious", "fear"),
    "disgusted": EmotionWords("disgusted", "revolted", "repelled", "disgust"),
    "loving": EmotionWords("loving", "adoring", "affectionate", "love"),
    "neutral": EmotionWords("neutral", "calm", "composed", "calmness"),
}
EMOTIONS: tuple[str, ...] = tuple(WORDS)
_EMOTION_OF_WORD = {word: emotion for emotion, words in WORDS.items() for word in words.all}


def named_emotion(text: str) -> str | None:
    """Return the emotion of the first emotion word in `text`, or None."""
    for word in text.lower().replace(",", " ").replace(".", " ").split():
        if word in _EMOTION_OF_WORD:
            return _EMOTION_OF_WORD[word]
    return None


SPLITS: dict[str, range] = {
    "train": range(0, 3000),
    "development": range(10000, 10300),
    "test": range(20000, 20400),
}


HAIR_TYPES = [
    "BIG_HAIR",
    "BOB",
    "BUN",
    "CAESAR_SIDE_PART",
    "CAESAR",
    "CURLY",
    "CURVY",
    "DREADS",
    "FRIDA",
    "FRIZZLE",
    "FRO",
    "LONG_NOT_TOO_LONG",
    "MIA_WALLACE",
    "SHAGGY_MULLET",
    "SHAGGY",
    "SHAVED_SIDES",
    "SHORT_CURLY",
    "SHORT_DREADS_1",
    "SHORT_DREADS_2",
    "SHORT_FLAT",
    "SHORT_ROUND",
    "SHORT_WAVED",
    "SIDES",
    "STRAIGHT_1",
    "STRAIGHT_2",
    "STRAIGHT_STRAND",
    "BRAIDS",
    "BUZZCUT",
    "CORNROWS",
    "DREADLOCKS",
    "ELVIS",
    "EVIL_SPIKE",
    "LOOSE_HAIR",
    "MOHAWK",
    "MOWGLI",
    "PIXIE",
    "POMPADOUR",
    "QUIFF",
    "TWIST_LONG_HAIR",
    "TWIST_LONG_HAIR_2",
    "WILD",
]
HAIR_COLORS = {"black": "BLACK", "brown": "BROWN", "blonde": "BLONDE_GOLDEN", "red": "RED", "gray": "SILVER_GRAY",
               "pink": "PASTEL_PINK"}  # fmt: skip
HAIR_WORDS = tuple(HAIR_COLORS)
SKIN = ["TANNED", "PALE", "LIGHT", "BROWN", "DARK_BROWN", "BLACK"]
CLOTHES = ["BLAZER_SHIRT", "COLLAR_SWEATER", "HOODIE", "OVERALL", "SHIRT_CREW_NECK", "SHIRT_SCOOP_NECK", "SHIRT_V_NECK"]
CLOTHES_COLORS = ["BLACK", "BLUE_01", "BLUE_02", "GRAY_01", "HEATHER", "PASTEL_GREEN", "PASTEL_YELLOW", "PINK", "WHITE"]

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (246, 246, 242),
    "gray": (150, 152, 156),
    "black": (38, 38, 42),
    "blue": (70, 120, 215),
    "green": (90, 175, 95),
    "yellow": (245, 214, 80),
    "orange": (240, 145, 55),
    "purple": (150, 95, 190),
}


@dataclass(frozen=True)
class Identity:
    number: int
    hair_type: str
    hair: str
    skin: str
    glasses: str
    beard: str
    clothes: str
    clothes_color: str

    @property
    def attributes(self) -> dict[str, str]:
        """Return the attributes of this identity, in the words of the answers."""
        return {
            "hair": self.hair,
            "glasses": "no" if self.glasses == "NONE" else "yes",
            "beard": "no" if self.beard == "NONE" else "yes",
        }


def identity(number: int) -> Identity:
    """Return the identity with this number; it is always the same."""
    draw = random.Random(f"identity {number}")
    return Identity(
        number=number,
        hair_type=draw.choice(HAIR_TYPES),
        hair=draw.choice(HAIR_WORDS),
        skin=draw.choice(SKIN),
        glasses=draw.choice(["NONE", "NONE", "NONE", "PRESCRIPTION_1", "PRESCRIPTION_2", "ROUND"]),
        beard=draw.choice(["NONE", "NONE", "NONE", "BEARD_LIGHT", "BEARD_MEDIUM"]),
        clothes=draw.choice(CLOTHES),
        clothes_color=draw.choice(CLOTHES_COLORS),
    )


def identity_numbers(split: str, count: int | None = None) -> list[int]:
    """Return the first `count` identity numbers of a split. Raises: ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}; known: {', '.join(SPLITS)}.")
    return list(SPLITS[split])[:count]
