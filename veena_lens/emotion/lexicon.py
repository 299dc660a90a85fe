"""The lexicon: surface forms of emotion words, their base words, and one basic emotion a base word.

Data, not code: `data/lexicon.json` lists base words with their inflections, nouns, adverbs and phrases, and phrases
that hold an emotion word and name none ("neutral background"). A form marked "!" is known when it comes as a label and
never looked for in texts: it names a cause ("a frightening mask") or a sign ("a smile", which one may describe and yet
name a wrong emotion), or has other everyday senses. A form marked "?" counts in a text only where a feeling is spoken
of ("feels content", not "the content"). `extraction.py` scans texts with it, `wheels.py` places it.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

DATA = Path(__file__).parent / "data"
Valence = Literal["positive", "negative", "neutral"]


def plain(text: str) -> str:
    """Lower case, one kind of quotes and dashes, single blanks: two spellings of a label become one."""
    text = unicodedata.normalize("NFKC", text).translate(_QUOTES)
    return " ".join(text.lower().split())


_QUOTES = str.maketrans({c: "'" for c in "\u2018\u2019\u201b\u02bc\u2032\u00b4`"} | {c: "-" for c in "\u2010\u2011"})


@dataclass(frozen=True, eq=False, kw_only=True)
class Lexicon:
    """Surface form -> base word -> basic emotion, with the valence of each basic emotion.

    `shadows` are phrases that name no emotion though they hold a word that does; `unscanned` and `guarded` are the
    forms marked "!" and "?".
    """

    base_of: Mapping[str, str]
    emotion_of: Mapping[str, str]
    valence_of: Mapping[str, str]
    shadows: tuple[str, ...] = ()
    unscanned: frozenset[str] = frozenset()
    guarded: frozenset[str] = frozenset()
    source: str = ""

    @cached_property
    def phrases(self) -> dict[tuple[str, ...], str]:
        """Words of a form that texts are searched for -> the form, "" for a shadow; a hyphen parts words as a blank."""
        found = {_words(form): form for form in self.base_of if form not in self.unscanned}
        return found | {_words(shadow): "" for shadow in self.shadows}

    @cached_property
    def longest(self) -> int:
        """Words in the longest phrase."""
        return max(map(len, self.phrases), default=0)

    @cached_property
    def _by_words(self) -> dict[tuple[str, ...], str]:
        return {_words(form): base for form, base in self.base_of.items()}

    def base(self, label: str) -> str:
        """The base word of a label, "" when the lexicon lacks it."""
        label = plain(label)
        return self.base_of.get(label) or self._by_words.get(_words(label), "")

    def basic(self, label: str) -> str:
        """The basic emotion of a label, "" when the lexicon lacks it."""
        return self.emotion_of.get(self.base(label), "")

    def forms(self, emotion: str) -> tuple[str, ...]:
        """The surface forms of one basic emotion that texts are searched for.

        Raises: ValueError for an emotion that is none of the basic ones."""
        if emotion not in self.valence_of:
            raise ValueError(f"{emotion!r} is no basic emotion of the lexicon; it has: {', '.join(self.valence_of)}.")
        mine = (form for form, base in self.base_of.items() if self.emotion_of[base] == emotion)
        return tuple(form for form in mine if form not in self.unscanned)

    def __repr__(self) -> str:
        return f"Lexicon({len(self.base_of)} forms of {len(self.emotion_of)} words, {', '.join(self.valence_of)})"


def _words(form: str) -> tuple[str, ...]:
    return tuple(form.replace("-", " ").split())


def read_lexicon(path: str | Path) -> Lexicon:
    """The lexicon in a JSON file. Raises: ValueError for a form listed twice, naming both places."""
    found: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    base_of: dict[str, str] = {}
    emotion_of: dict[str, str] = {}
    marked: dict[str, set[str]] = {"!": set(), "?": set()}
    for emotion, entry in found["emotions"].items():
        for base, forms in entry["words"].items():
            bare = base.lstrip("!?")
            emotion_of[bare] = emotion
            for form in (base, *forms):
                word = form.lstrip("!?")
                if word in base_of:
                    raise ValueError(f"{path}: {word!r} stands under {base_of[word]!r} and {bare!r}; leave one.")
                base_of[word] = bare
                if form != word:
                    marked[form[0]].add(word)
    return Lexicon(
        base_of=base_of,
        emotion_of=emotion_of,
        valence_of={emotion: entry["valence"] for emotion, entry in found["emotions"].items()},
        shadows=tuple(found["shadows"]),
        unscanned=frozenset(marked["!"]),
        guarded=frozenset(marked["?"]),
        source=found["source"],
    )


@cache
def default_lexicon() -> Lexicon:
    """The project's own lexicon."""
    return read_lexicon(DATA / "lexicon.json")
