"""Define which drawn parts make which emotion, and how answers name them.

A combination is clear or subtle; the language prior wins more often against subtle faces, so the difference must be
visible. Emotions share mouths and brows, so that no single part determines the answer. The lists were made by looking
at the drawings; an emotion that a style cannot draw is missing from its table.
"""

from dataclasses import dataclass
from itertools import product

__all__ = ["BROW_WORDS", "EYE_WORDS", "MOUTH_WORDS", "STYLES", "Combination", "Style", "combinations"]


@dataclass(frozen=True)
class Combination:
    """Hold one way to draw an emotion: the variant of each face part, in the order of `Style.parts`."""

    emotion: str
    variants: tuple[str, ...]
    clear: bool


@dataclass(frozen=True, kw_only=True)
class Style:
    """Describe an art style: its face parts, how they draw each emotion, and the square that is shown (fractions)."""

    name: str
    parts: tuple[str, ...]
    clear: dict[str, list[tuple[str, ...]]]
    subtle: dict[str, list[tuple[str, ...]]]
    crop: tuple[float, float, float] = (0.0, 0.0, 1.0)
    has_glasses: bool = True
    has_beard: bool = False

    @property
    def emotions(self) -> tuple[str, ...]:
        return tuple(self.clear)


_PLAIN_BROWS = "DEFAULT DEFAULT_NATURAL"
_RAISED = "RAISED_EXCITED RAISED_EXCITED_NATURAL"
_WORRIED = "SAD_CONCERNED SAD_CONCERNED_NATURAL"
_CROSS = "ANGRY ANGRY_NATURAL"

AVATAAARS = Style(
    name="avataaars",
    parts=("mouth", "eyes", "brows"),
    clear={
        "happy": [("BIG_SMILE SMILE TWINKLE", "HAPPY WINK", f"{_PLAIN_BROWS} {_RAISED}")],
        "sad": [("SAD DISBELIEF", "CRY CLOSED", f"{_WORRIED} FROWN_NATURAL")],
        "angry": [("GRIMACE SERIOUS SAD DISBELIEF", "SQUINT", _CROSS)],
        "surprised": [("DEFAULT", "SURPRISED", f"{_RAISED} DEFAULT")],
        "afraid": [("SCREAM_OPEN CONCERNED GRIMACE", "SURPRISED", f"{_WORRIED} FROWN_NATURAL")],
        "disgusted": [("VOMIT", "SQUINT X_DIZZY", f"{_CROSS} FROWN_NATURAL {_WORRIED}")],
        "loving": [("BIG_SMILE", "HEART", f"{_PLAIN_BROWS} {_RAISED}")],
        "neutral": [("SERIOUS", "DEFAULT", _PLAIN_BROWS)],
    },
    subtle={
        "happy": [("BIG_SMILE SMILE TWINKLE", "DEFAULT", f"{_PLAIN_BROWS} {_RAISED}")],
        "sad": [("SAD DISBELIEF", "DEFAULT", f"{_WORRIED} FROWN_NATURAL")],
        "angry": [("GRIMACE SERIOUS SAD DISBELIEF", "DEFAULT", _CROSS)],
        "surprised": [("DISBELIEF", "SURPRISED", f"{_RAISED} DEFAULT")],
        "afraid": [("SCREAM_OPEN CONCERNED GRIMACE", "DEFAULT", f"{_WORRIED} FROWN_NATURAL")],
        "disgusted": [("TONGUE", "SQUINT X_DIZZY", f"{_CROSS} FROWN_NATURAL {_WORRIED}")],
        "loving": [("SMILE TWINKLE", "HEART", f"{_PLAIN_BROWS} {_RAISED}")],
        "neutral": [("SERIOUS", "SIDE", _PLAIN_BROWS)],
    },
    has_beard=True,
)

TOON_HEAD = Style(
    name="toon-head",
    parts=("mouth", "eyes", "eyebrows"),
    crop=(0.13, 0.12, 0.72),
    has_glasses=False,
    clear={
        "happy": [("laugh", "bow wink", "happy neutral")],
        "sad": [("sad", "humble", "sad")],
        "angry": [("angry", "happy wide", "angry")],
        "surprised": [("agape", "wide", "happy raised")],
        "afraid": [("angry", "wide", "sad")],
        "neutral": [("smile", "happy", "neutral")],
    },
    subtle={
        "happy": [("laugh", "happy", "happy neutral")],
        "sad": [("sad", "happy", "sad")],
        "angry": [("sad", "happy", "angry")],
        "surprised": [("agape", "happy", "happy")],
        "afraid": [("agape", "wide", "sad")],
        "neutral": [("smile", "happy", "neutral")],
    },
)

_A = {"plain": "10 12 13", "up": "09 11 12", "open": "26 01 03 24 25"}
ADVENTURER = Style(
    name="adventurer",
    parts=("mouth", "eyes", "eyebrows"),
    crop=(0.04, 0.08, 0.9),
    clear={
        "happy": [("01 23 25 26 27 28 30", f"19 {_A['open']}", "09 10 11 12 13")],
        "sad": [("03 04", "15 16 20", "07")],
        "angry": [("11 14", "26 01 17 18 14 05", "01 02")],
        "surprised": [("15 18", "26 01 25", _A["up"])],
        "afraid": [("11 14", "26 01 08 25", "07")],
        "disgusted": [("13", "05 10 13 14 17", "02 07 08")],
        "loving": [("24", "23 19", "10 11")],
        "neutral": [("09", _A["open"], _A["plain"])],
    },
    subtle={
        "happy": [("02 22 29", _A["open"], "09 10 11 12 13")],
        "sad": [("04", "26 01", "07")],
        "angry": [("04 09", "26 01 17 18", "01 02")],
        "surprised": [("03", "26 01 25", _A["up"])],
        "afraid": [("03", "26 01 08", "07")],
        "disgusted": [("12", "05 10 13 14 17", "02 07 08")],
        "loving": [("24", "26 24", "10 11")],
        "neutral": [("09", "02 18", _A["plain"])],
    },
)

BIG_SMILE = Style(
    name="big-smile",
    parts=("mouth", "eyes"),
    crop=(0.03, 0.03, 0.94),
    clear={
        "happy": [("openedSmile gapSmile braces", "cheery normal winking")],
        "sad": [("openSad", "sad")],
        "angry": [("openSad awkwardSmile", "angry")],
        "neutral": [("unimpressed", "normal")],
    },
    subtle={
        "happy": [("kawaii teethSmile", "cheery normal")],
        "sad": [("unimpressed", "sad")],
        "angry": [("unimpressed", "angry")],
        "neutral": [("unimpressed", "confused")],
    },
)

# Held out from training altogether.
OPEN_PEEPS = Style(
    name="open-peeps",
    parts=("face",),
    crop=(0.2, 0.05, 0.75),
    clear={
        "happy": [("smileBig smileLOL smileTeethGap",)],
        "sad": [("solemn",)],
        "angry": [("rage veryAngry angryWithFang",)],
        "afraid": [("fear hectic concernedFear",)],
        "loving": [("lovingGrin1 lovingGrin2",)],
        "neutral": [("serious",)],
    },
    subtle={
        "happy": [("smile",)],
        "sad": [("solemn",)],
        "angry": [("angryWithFang",)],
        "afraid": [("concerned",)],
        "loving": [("lovingGrin1 lovingGrin2",)],
        "neutral": [("serious",)],
    },
)
MICAH = Style(
    name="micah",
    parts=("mouth", "eyes", "eyebrows"),
    crop=(0.16, 0.06, 0.7),
    clear={
        "happy": [("laughing", "eyes round smiling", "up eyelashesUp")],
        "sad": [("sad frown", "eyes round", "down eyelashesDown")],
        "surprised": [("surprised", "eyes round", "up eyelashesUp")],
        "afraid": [("nervous", "eyes round", "down eyelashesDown")],
    },
    subtle={
        "happy": [("smile", "eyes round smiling", "up eyelashesUp")],
        "sad": [("sad frown", "eyes round", "up eyelashesUp")],
        "surprised": [("surprised", "eyes round", "down eyelashesDown")],
        "afraid": [("nervous", "eyes round", "up eyelashesUp")],
    },
)

STYLES: dict[str, Style] = {
    style.name: style for style in (AVATAAARS, TOON_HEAD, ADVENTURER, BIG_SMILE, OPEN_PEEPS, MICAH)
}


def combinations(style: Style) -> dict[str, tuple[list[Combination], list[Combination]]]:
    """Return the clear and subtle combinations of every emotion that `style` can draw."""
    prefix = "variant" if style.name == "adventurer" else ""

    def expand(table: dict[str, list[tuple[str, ...]]], emotion: str, clear: bool) -> list[Combination]:
        found = [choice for row in table[emotion] for choice in product(*(cell.split() for cell in row))]
        return [Combination(emotion, tuple(prefix + v for v in choice), clear) for choice in found]

    return {e: (expand(style.clear, e, True), expand(style.subtle, e, False)) for e in style.emotions}


MOUTH_WORDS = {
    "SMILE": "smiling", "BIG_SMILE": "laughing", "TWINKLE": "curved", "SAD": "drooping", "DISBELIEF": "pouting",
    "GRIMACE": "clenched", "SERIOUS": "straight", "DEFAULT": "open", "SCREAM_OPEN": "screaming",
    "CONCERNED": "wavy", "VOMIT": "spilling", "TONGUE": "licking",
}  # fmt: skip
EYE_WORDS = {
    "HAPPY": "bent", "WINK": "winking", "CRY": "crying", "CLOSED": "closed", "DEFAULT": "round", "SQUINT": "narrow",
    "SURPRISED": "wide", "X_DIZZY": "crossed", "HEART": "hearts", "SIDE": "sideways",
}  # fmt: skip
BROW_WORDS = {
    "DEFAULT": "relaxed", "DEFAULT_NATURAL": "relaxed", "RAISED_EXCITED": "raised", "RAISED_EXCITED_NATURAL": "raised",
    "SAD_CONCERNED": "worried", "SAD_CONCERNED_NATURAL": "worried", "FROWN_NATURAL": "frowning",
    "ANGRY": "lowered", "ANGRY_NATURAL": "lowered",
}  # fmt: skip
