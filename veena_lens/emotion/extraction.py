"""Emotion labels in free text: a longest-match scan of word tokens, without a model and without chance.

Ambiguous forms count only where a feeling is spoken of, and negated ones do not count (`negation.py`). Extraction
knows no wheel: mapping labels to sectors is another function.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from veena_lens.emotion.lexicon import Lexicon, default_lexicon, plain
from veena_lens.emotion.negation import DEGREES, LINKS, MARKS, negated, words

# A word with its inner apostrophes, or a mark that ends the reach of a negation.
_TOKEN = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*|\d+|[.!?;:,\n()\[\]\u2013\u2014]")
_ARTICLES = words("a an the his her their deep great keen genuine intense mild slight")
_SHOWING = words(
    "show shows showing shown showed express expresses expressing expressed display displays displaying convey "
    "conveys conveying suggest suggests suggesting indicate indicates indicating register registers in with"
)
# "a sense of relief", "full of hope": nouns and adjectives before "of" or "with" that make what follows a feeling.
_HOLDERS = words(
    "sense look feeling feelings expression mix mixture blend air full filled sign signs hint state wave moment "
    "face emotion emotions smile overcome combination lot level touch glimmer"
)


@dataclass(frozen=True, kw_only=True)
class Match:
    """A lexicon form found in a text: its base word, its words, and whether a negation removes it."""

    label: str
    words: tuple[str, ...]
    negated: bool


def string_to_list(labels: str | Sequence[str] | None) -> list[str]:
    """The items of a bracketed list string, as MER-UniBench reads it.

    A list stays as it is; None or "" gives []. One leading "[" and one trailing "]" go, quotes and commas part the
    items, blanks around them go, empty items go. Case is kept. Source: Lian et al. 2025, AffectGPT (ICML)."""
    if labels is None:
        return []
    if not isinstance(labels, str):
        return [str(item) for item in labels]
    inner = labels.strip().removeprefix("[").removesuffix("]")
    return [item.strip() for item in re.split("['\",]", inner) if item.strip()]


def extract(text: str, lexicon: Lexicon | None = None) -> list[str]:
    """Base words of the emotions that a text names, in order, each once; negated ones are left out.

    "She isn't sad, she is over the moon and quite calm" -> ["elated", "calm"]."""
    found = (match.label for match in matches(text, lexicon) if not match.negated)
    return list(dict.fromkeys(found))


def matches(text: str, lexicon: Lexicon | None = None) -> Iterator[Match]:
    """Every emotion word of a text in order, repeated and negated ones too."""
    lexicon = default_lexicon() if lexicon is None else lexicon
    tokens = words_of(text)
    spans = list(_spans(tokens, lexicon))
    for (start, stop, form), removed in zip(spans, negated(tokens, [span[:2] for span in spans])):
        yield Match(label=lexicon.base_of[form], words=tuple(tokens[start:stop]), negated=removed)


def words_of(text: str) -> list[str]:
    """The lower-case word tokens of a text, with the marks that end a negation's reach; a possessive 's is dropped."""
    # Line ends are marks too; `plain` would turn them into blanks.
    tokens = _TOKEN.findall("\n".join(plain(line) for line in text.splitlines()))
    return [token.removesuffix("'s") if token != "'s" else token for token in tokens]


def _spans(tokens: Sequence[str], lexicon: Lexicon) -> Iterator[tuple[int, int, str]]:
    """(first token, token after the last, form) of the longest matches, left to right."""
    start = before = 0  # `before`: where the last match ended
    while start < len(tokens):
        step = 1
        for size in range(min(lexicon.longest, len(tokens) - start), 0, -1):
            form = lexicon.phrases.get(tuple(tokens[start : start + size]))
            if form is None or (form in lexicon.guarded and not _is_felt(tokens, start, start + size, before)):
                continue
            step = size
            if form:
                before = start + size
                yield start, before, form
            break
        start += step


def _is_felt(tokens: Sequence[str], start: int, stop: int, before: int) -> bool:
    """Whether an ambiguous form stands where a feeling is named; `before` is where the last match ended."""
    at = start - 1
    alone = (at < 0 or tokens[at] in MARKS) and (stop >= len(tokens) or tokens[stop] in MARKS)
    if alone:
        return True  # an item of a list, or the whole answer
    while at >= 0 and (tokens[at] in DEGREES or tokens[at] in _ARTICLES):
        at -= 1
    if at < 0:
        return False
    last = tokens[at]
    if last in LINKS or last in _SHOWING:
        return at == start - 1 or tokens[start - 1] not in ("the", "his", "her", "their")
    if last == "of":
        return at > 0 and tokens[at - 1] in _HOLDERS
    return last in ("and", "or", "nor", ",") and at == before and before > 0
