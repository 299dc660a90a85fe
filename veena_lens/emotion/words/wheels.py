"""Emotion wheels: several published arrangements of emotion words, read as data, and the lexicon that goes with them.

`EmotionWheels.default()` holds the project's own wheels (Ekman, Plutchik, Willcox, Geneva, Parrott);
`EmotionWheels.from_affectgpt(folder)` the five of MER-UniBench. Metrics are means over the wheels (`metrics.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from veena_lens.emotion.words import lexicon as extraction
from veena_lens.emotion.words.lexicon import DATA, Extractor, Lexicon, default_lexicon, plain
from veena_lens.emotion.words.wheel import LEVELS, MAPPINGS, Wheel, direct_sector, official_sector

if TYPE_CHECKING:
    from veena_lens.emotion.words.scores import OpenVocabularyScore, SentimentScore

NEUTRAL = "neutral"


@dataclass(frozen=True, eq=False, kw_only=True)
class EmotionWheels:
    """Wheels, the words that lead to them, and a lexicon to find emotion words in texts.

    `forms`: surface form -> base words; `synonyms`: base word -> wheel words. `own`: these are the project's wheels, on
    which the direct map places a form where its base word lies, and makes the basic emotion neutral a sector of its own
    on every wheel, though no wheel shows it.
    """

    wheels: tuple[Wheel, ...]
    forms: Mapping[str, Sequence[str]]
    synonyms: Mapping[str, Sequence[str]]
    words: Lexicon
    own: bool = False

    @staticmethod
    def default() -> EmotionWheels:
        """The project's own five wheels and lexicon; their sources stand in each `wheel.source`."""
        return _default()

    @staticmethod
    def from_affectgpt(folder: str | Path) -> EmotionWheels:
        """MER-UniBench's wheels from the original spreadsheets or from JSON files made of them.

        `folder` holds wheel1.xlsx .. wheel5.xlsx, synonym.xlsx and format.csv, or emotion_wheels.json,
        synonym_to_wheel_words.json and form_to_synonyms.json. Raises: FileNotFoundError naming what is missing;
        ImportError naming the extra that reads spreadsheets."""
        from veena_lens.emotion.words.wheel import read_affectgpt

        wheels, synonyms, forms = read_affectgpt(Path(folder))
        return EmotionWheels(wheels=wheels, forms=forms, synonyms=synonyms, words=default_lexicon())

    def sector(self, label: str, wheel: int | str = 1, level: str = "level1", mapping: str | None = None) -> str:
        """The sector of a label on one wheel, "" when it is on none; wheels count from 1 or go by name.

        mapping: "official" (MER-UniBench's, the default of imported wheels) or "direct" (ours, that of our own wheels).
        Raises: ValueError for a wheel, level or mapping that does not exist."""
        mapping = self.mapping if mapping is None else mapping
        found, by_label = self.wheel(wheel), self._sectors(mapping, level)
        key = (found.name, plain(label))
        if key not in by_label:
            by_label[key] = self._look_up(label, found, level, mapping)
        return by_label[key]

    @property
    def mapping(self) -> str:
        """How labels find their sectors unless told otherwise: "direct" on our own wheels, else "official"."""
        return "direct" if self.own else "official"

    def sectors(
        self, labels: Iterable[str], wheel: int | str = 1, level: str = "level1", mapping: str | None = None
    ) -> frozenset[str]:
        """The set of sectors of some labels; labels on no sector vanish."""
        return frozenset(self.sector(label, wheel, level, mapping) for label in labels) - {""}

    def wheel(self, wheel: int | str) -> Wheel:
        """One wheel by number (from 1) or by name."""
        by_name = {w.name: w for w in self.wheels}
        if isinstance(wheel, str) and wheel in by_name:
            return by_name[wheel]
        if isinstance(wheel, int) and 1 <= wheel <= len(self.wheels):
            return self.wheels[wheel - 1]
        names = ", ".join(f"{i} {w.name}" for i, w in enumerate(self.wheels, start=1))
        raise ValueError(f"No wheel {wheel!r}; there are: {names}.")

    def basic(self, label: str) -> str:
        """The basic emotion of a label ("joyfully" -> "happy"), "" when the lexicon lacks it."""
        return self.words.basic(label)

    def extract(self, text: str) -> list[str]:
        """Base words of the emotions that a text names, in order, each once; negated ones are left out."""
        return extraction.extract_emotions(text, self.words)

    def emotions(self, text: str) -> list[str]:
        """Basic emotions that a text names, in order, each once."""
        return list(dict.fromkeys(self.words.emotion_of[label] for label in self.extract(text)))

    def lexicon(self, emotion: str) -> tuple[str, ...]:
        """Every surface form of one basic emotion, of one word or several. Raises: ValueError, listing the emotions."""
        return self.words.forms(emotion)

    def labels(self, text_or_labels: str | Sequence[str]) -> list[str]:
        """Labels as they are; a label or bracketed list in a string is split, any other text is searched."""
        if not isinstance(text_or_labels, str):
            return list(text_or_labels)
        text = plain(text_or_labels)
        if text.startswith("["):
            return self.string_to_list(text)
        if text in self.forms or self.words.base(text):
            return [text]
        return self.extract(text_or_labels)

    def require(self, labels: Iterable[str]) -> None:
        """Check that every label lies on a wheel or is neutral.

        Raises: ValueError naming all that do not, with near words."""
        lost = [label for label in dict.fromkeys(labels) if not self._covered(label)]
        if lost:
            known = [*self.forms, *self.words.base_of]
            near = {label: ", ".join(get_close_matches(plain(label), known)) or "none" for label in lost}
            raise ValueError(
                f"No wheel covers the labels {', '.join(f'{label!r} (near: {near[label]})' for label in lost)}. Rename "
                "them to words that a wheel has, or add them to a wheel and its lexicon."
            )

    @staticmethod
    def string_to_list(labels: str | Sequence[str] | None) -> list[str]:
        """The items of a bracketed list string, as MER-UniBench reads it."""
        return extraction.string_to_list(labels)

    def hit_rate(
        self,
        truths: Mapping[str, str | Sequence[str]],
        predictions: Mapping[str, str | Sequence[str]],
        *,
        mapping: str | None = None,
        level: str = "level1",
        missing: str = "error",
        extractor: Extractor | None = None,
    ) -> float:
        """See `veena_lens.emotion.hit_rate`."""
        from veena_lens.emotion.words import scores

        return scores.hit_rate(
            truths, predictions, self, mapping=mapping, level=level, missing=missing, extractor=extractor
        )

    def open_vocabulary_score(
        self,
        truths: Mapping[str, str | Sequence[str]],
        predictions: Mapping[str, str | Sequence[str]],
        *,
        level: str = "level1",
        mapping: str | None = None,
        missing: str = "error",
        extractor: Extractor | None = None,
    ) -> OpenVocabularyScore:
        """See `veena_lens.emotion.open_vocabulary_score`."""
        from veena_lens.emotion.words import scores

        return scores.open_vocabulary_score(
            truths, predictions, self, level=level, mapping=mapping, missing=missing, extractor=extractor
        )

    def sentiment_score(
        self,
        truths: Mapping[str, float],
        predictions: Mapping[str, str],
        *,
        missing: str = "error",
    ) -> SentimentScore:
        """See `veena_lens.emotion.sentiment_score`."""
        from veena_lens.emotion.words import scores

        return scores.sentiment_score(truths, predictions, missing=missing)

    def sentiment(self, text_or_labels: str | Sequence[str]) -> str:
        """positive, negative or neutral: the sign of the sum of the labels' valences in the lexicon; a rule of ours."""
        signs = {"positive": 1, "negative": -1}
        labels = self.labels(text_or_labels)
        total = sum(signs.get(self.words.valence_of.get(self.basic(label), ""), 0) for label in labels)
        return "positive" if total > 0 else "negative" if total < 0 else "neutral"

    def _covered(self, label: str) -> bool:
        if self.basic(label) == NEUTRAL:
            return True
        return any(self.sector(label, wheel.name) for wheel in self.wheels)

    def _look_up(self, label: str, wheel: Wheel, level: str, mapping: str) -> str:
        if mapping == "official":
            return official_sector(label, wheel, level, self.forms, self.synonyms)
        if self.own and self.basic(label) == NEUTRAL:
            return NEUTRAL
        # On our own wheels a noun lies where its adjective lies ("shock" with "shocked").
        word = (self.words.base(label) or label) if self.own else label
        return direct_sector(word, wheel, level, self.forms, self.synonyms)

    def _sectors(self, mapping: str, level: str) -> dict[tuple[str, str], str]:
        """What was looked up under a mapping and level; the arguments are checked here, once for all."""
        if mapping not in MAPPINGS or level not in LEVELS:
            raise ValueError(f"mapping={mapping!r}, level={level!r}: mappings are {MAPPINGS}, levels {LEVELS}.")
        return self._known.setdefault((mapping, level), {})

    @cached_property
    def _known(self) -> dict[tuple[str, str], dict[tuple[str, str], str]]:
        return {}

    def __repr__(self) -> str:
        names = ", ".join(wheel.name for wheel in self.wheels)
        return f"EmotionWheels({names}; {len(self.forms)} forms, {len(self.synonyms)} base words; {self.words!r})"


@cache
def _default() -> EmotionWheels:
    lexicon = default_lexicon()
    found = json.loads((DATA / "wheels.json").read_text(encoding="utf-8"))
    wheels = tuple(Wheel(name, w["sectors"], w["source"], w["basics"]) for name, w in found.items())
    # A base word leads to itself, to its forms that a wheel prints, and to what stands for its basic emotion there.
    printed = {word for wheel in wheels for word in wheel.words}
    shown: dict[str, list[str]] = {base: [base] for base in lexicon.emotion_of}
    for form, base in lexicon.base_of.items():
        if form in printed and form != base:
            shown[base].append(form)
    synonyms = {
        base: tuple(dict.fromkeys([*shown[base], *(w.basics[emotion] for w in wheels if emotion in w.basics)]))
        for base, emotion in lexicon.emotion_of.items()
    }
    forms = {form: (base,) for form, base in lexicon.base_of.items()}
    return EmotionWheels(wheels=wheels, forms=forms, synonyms=synonyms, words=lexicon, own=True)
