"""Where a view opens: at the position that predicts the answer's content word, in a layer where something is seen."""

from __future__ import annotations

import re
from collections.abc import Sequence

from jaxtyping import Bool, Float
from torch import Tensor

MEAN = -1  # the mean over layers, or over heads
# Words that carry an answer's form; the others carry what was seen.
FORM = frozenset(
    [
        "a",
        "an",
        "the",
        "this",
        "that",
        "these",
        "those",
        "it",
        "its",
        "he",
        "she",
        "they",
        "his",
        "her",
        "their",
        "there",
        "here",
        "i",
        "you",
        "we",
        "who",
        "which",
        "what",
        "is",
        "are",
        "was",
        "were",
        "be",
        "been",
        "being",
        "has",
        "have",
        "had",
        "do",
        "does",
        "did",
        "can",
        "could",
        "may",
        "might",
        "must",
        "will",
        "would",
        "seem",
        "seems",
        "appear",
        "appears",
        "look",
        "looks",
        "feel",
        "feels",
        "feeling",
        "feelings",
        "show",
        "shows",
        "shown",
        "express",
        "expresses",
        "describe",
        "describes",
        "see",
        "seen",
        "and",
        "or",
        "but",
        "nor",
        "so",
        "if",
        "then",
        "than",
        "as",
        "of",
        "in",
        "on",
        "at",
        "by",
        "to",
        "from",
        "for",
        "with",
        "without",
        "about",
        "into",
        "over",
        "under",
        "between",
        "near",
        "not",
        "no",
        "yes",
        "very",
        "quite",
        "rather",
        "also",
        "too",
        "both",
        "each",
        "some",
        "any",
        "all",
        "more",
        "most",
        "other",
        "one",
        "two",
        "person",
        "man",
        "woman",
        "people",
        "face",
        "picture",
        "image",
        "photo",
        "photograph",
        "scene",
        "emotion",
        "emotions",
    ]
)


def head_name(layer: int, head: int) -> str:
    """Return the name of a head, as everywhere: L2H5; the mean over heads or layers in words."""
    if MEAN not in (layer, head):
        return f"L{layer}H{head}"
    where = "mean over layers" if layer == MEAN else f"layer {layer}"
    return f"{where}, mean over heads" if head == MEAN else f"{where}, head {head}"


def content_place(texts: Sequence[str]) -> int | None:
    """Return which token of an answer begins its content word: an emotion's, else the first that is not form.

    texts: of the answer's tokens in order, with their spaces. None where every word is form."""
    from veena_lens.emotion.words.wheels import EmotionWheels

    words: list[tuple[int, str]] = []
    for i, text in enumerate(texts):
        if words and re.match(r"\w", text) and re.search(r"\w$", words[-1][1]):  # goes on within a word
            words[-1] = (words[-1][0], words[-1][1] + text)
        else:
            words.append((i, text))
    plain = [(i, re.sub(r"[^\w'-]", "", text).lower()) for i, text in words]
    content = [(i, word) for i, word in plain if re.search(r"[^\W\d_]", word) and word not in FORM]
    felt = set(EmotionWheels.default().extract(" ".join(word for _, word in content)))
    return next((i for i, word in content if word in felt), content[0][0] if content else None)


def seen_layer(maps: Float[Tensor, "layer head pos"], is_image: Bool[Tensor, " pos"]) -> int:
    """Return the layer whose mean over heads has the strongest cell of an image; MEAN without an image."""
    if not bool(is_image.any()):
        return MEAN
    return int(maps.mean(1)[:, is_image].amax(-1).argmax())
