"""Emotion labels in free text: a longest-match scan of word tokens, without a model and without chance.

A negator at most three tokens before a match removes it, unless a stop, a comma or a word of contrast lies between
("not sad but happy" names happy). Extraction knows no wheel: mapping labels to sectors is another function.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from veena_lens.emotion.lexicon import Lexicon, default_lexicon, plain

# A word with its inner apostrophes, or a mark that ends the reach of a negation.
_TOKEN = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*|[.!?;:,\n()]")
_NEGATORS = frozenset(
    ["not", "no", "never", "none", "neither", "nor", "without", "hardly", "barely", "scarcely", "cannot", "nothing"]
    + ["nobody", "lacks", "lacking", "lack", "dont", "doesnt", "isnt", "arent", "wasnt", "werent", "didnt", "cant"]
    + ["wont", "hasnt", "havent", "hadnt", "wouldnt", "couldnt", "shouldnt", "aint"]
)
_NEGATING_PHRASES = (("far", "from"), ("free", "of"), ("devoid", "of"), ("anything", "but"), ("instead", "of"))
_CONTRASTS = frozenset(["but", "yet", "although", "though", "however", "rather", "instead", "whereas", "while"])
# "not only happy", "not just sad", "no doubt angry": these turn a negation into a statement.
_STATING = frozenset(["only", "just", "merely", "simply", "solely", "doubt"])
REACH = 3


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

    "She isn't sad, she is over the moon and grinning" -> ["elated", "smiling"]."""
    found = (match.label for match in matches(text, lexicon) if not match.negated)
    return list(dict.fromkeys(found))


def matches(text: str, lexicon: Lexicon | None = None) -> Iterator[Match]:
    """Every emotion word of a text in order, repeated and negated ones too."""
    lexicon = default_lexicon() if lexicon is None else lexicon
    tokens = words_of(text)
    start = 0
    while start < len(tokens):
        for size in range(min(lexicon.longest, len(tokens) - start), 0, -1):
            label = lexicon.phrases.get(tuple(tokens[start : start + size]))
            if label is not None:
                if label:
                    words = tuple(tokens[start : start + size])
                    yield Match(label=label, words=words, negated=_negated(tokens, start))
                start += size
                break
        else:
            start += 1


def words_of(text: str) -> list[str]:
    """The lower-case word tokens of a text, with the marks that end a negation's reach."""
    # Line ends are marks too; `plain` would turn them into blanks.
    return _TOKEN.findall("\n".join(plain(line).replace("'s ", " ") for line in text.splitlines()))


def _negated(tokens: Sequence[str], start: int) -> bool:
    """Whether a negator within REACH tokens before `start` reaches it."""
    for at in range(start - 1, max(start - 1 - REACH, -1), -1):
        token = tokens[at]
        if tuple(tokens[at - 1 : at + 1]) in _NEGATING_PHRASES:
            return True
        if not token[0].isalpha() or token in _CONTRASTS:
            return False
        if token in _NEGATORS or token.endswith("n't"):
            return tokens[at + 1] not in _STATING
    return False
