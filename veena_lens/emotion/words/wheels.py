"""Hold emotion wheels, published arrangements of emotion words, with the lexicon that goes with them and their scores.

`EmotionWheels.default()` holds the project's wheels (Ekman, Plutchik, Willcox, Geneva, Parrott);
`EmotionWheels.from_affectgpt(folder)` the five of MER-UniBench. Scores are means over the wheels: MER-UniBench's
metrics, and the hit rate of one sample."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, cached_property
from pathlib import Path
from statistics import fmean

from veena_lens.emotion.words import lexicon as extraction
from veena_lens.emotion.words.lexicon import (
    DATA,
    Extractor,
    Lexicon,
    default_lexicon,
    matches,
    plain,
    string_to_list,
)
from veena_lens.emotion.words.scores import (
    OpenVocabularyScore,
    SentimentScore,
    WheelScore,
    joined,
    mean,
    over_wheels,
    read_guesses,
    require_labels,
    sentiment_score,
    wheel_score,
)
from veena_lens.emotion.words.wheel import LEVELS, MAPPINGS, Wheel, direct_sector, official_sector

NEUTRAL = "neutral"
Labels = str | Sequence[str]


@dataclass(frozen=True, eq=False, kw_only=True)
class EmotionWheels:
    """Wheels, the words that lead to them, and a lexicon to find emotion words in texts.

    `forms`: surface form -> base words; `synonyms`: base word -> wheel words. `own`: these are the project's wheels, on
    which the direct map places a form where its base word lies, and makes the basic emotion neutral a separate sector
    on every wheel, though no wheel shows it."""

    wheels: tuple[Wheel, ...]
    forms: Mapping[str, Sequence[str]]
    synonyms: Mapping[str, Sequence[str]]
    words: Lexicon
    own: bool = False

    @staticmethod
    def default() -> EmotionWheels:
        """Return the project's five wheels and lexicon; their sources stand in each `wheel.source`."""
        return _default()

    @staticmethod
    def from_affectgpt(folder: str | Path) -> EmotionWheels:
        """Read MER-UniBench's wheels from the original spreadsheets or from JSON files made of them.

        `folder` holds wheel1.xlsx .. wheel5.xlsx, synonym.xlsx and format.csv, or emotion_wheels.json,
        synonym_to_wheel_words.json and form_to_synonyms.json.
        Raises: FileNotFoundError naming what is missing; ImportError naming the extra that reads spreadsheets."""
        from veena_lens.emotion.words.wheel import read_affectgpt

        wheels, synonyms, forms = read_affectgpt(Path(folder))
        return EmotionWheels(wheels=wheels, forms=forms, synonyms=synonyms, words=default_lexicon())

    def sector(self, label: str, wheel: int | str = 1, level: str = "level1", mapping: str | None = None) -> str:
        """Return the sector of a label on one wheel, "" when it is on none; wheels count from 1 or go by name.

        level: "level1" (sectors) or "level2" (second-level words). mapping: "official" (MER-UniBench's, the default of
        imported wheels) or "direct" (the default of the project's wheels).
        Raises: ValueError for a wheel, level or mapping that does not exist."""
        mapping = self.mapping if mapping is None else mapping
        found, by_label = self.wheel(wheel), self._sectors(mapping, level)
        key = (found.name, plain(label))
        if key not in by_label:
            by_label[key] = self._look_up(label, found, level, mapping)
        return by_label[key]

    @property
    def mapping(self) -> str:
        """Return the map from labels to sectors used by default: "direct" on the project's wheels, else "official"."""
        return "direct" if self.own else "official"

    def sectors(
        self, labels: Iterable[str], wheel: int | str = 1, level: str = "level1", mapping: str | None = None
    ) -> frozenset[str]:
        """Return the set of sectors of some labels; labels on no sector vanish. Parameters and Raises: as `sector`."""
        return frozenset(self.sector(label, wheel, level, mapping) for label in labels) - {""}

    def wheel(self, wheel: int | str) -> Wheel:
        """Return one wheel by number (from 1) or by name. Raises: ValueError for a wheel that does not exist."""
        by_name = {w.name: w for w in self.wheels}
        if isinstance(wheel, str) and wheel in by_name:
            return by_name[wheel]
        if isinstance(wheel, int) and 1 <= wheel <= len(self.wheels):
            return self.wheels[wheel - 1]
        names = ", ".join(f"{i} {w.name}" for i, w in enumerate(self.wheels, start=1))
        raise ValueError(f"No wheel {wheel!r}; there are: {names}.")

    def basic(self, label: str) -> str:
        """Return the basic emotion of a label ("joyfully" -> "happy"), "" when the lexicon lacks it."""
        return self.words.basic(label)

    def extract(self, text: str) -> list[str]:
        """Return the base words of the emotions that a text names, in order, each once; negated ones are left out."""
        return extraction.extract_emotions(text, self.words)

    def emotions(self, text: str) -> list[str]:
        """Return the basic emotions that a text names, in order, each once."""
        return list(dict.fromkeys(self.words.emotion_of[label] for label in self.extract(text)))

    def lexicon(self, emotion: str) -> tuple[str, ...]:
        """Return every surface form of one basic emotion that texts are searched for, of one word or several.

        Raises: ValueError, listing the emotions."""
        return self.words.forms(emotion)

    def labels(self, text_or_labels: str | Sequence[str]) -> list[str]:
        """Return labels unchanged; a label or bracketed list in a string is split, any other text is searched."""
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
        """Return the items of a bracketed list string, as MER-UniBench reads it."""
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
        """Return `veena_lens.emotion.hit_rate` on these wheels."""
        return hit_rate(truths, predictions, self, mapping=mapping, level=level, missing=missing, extractor=extractor)

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
        """Return `veena_lens.emotion.open_vocabulary_score` on these wheels."""
        return open_vocabulary_score(
            truths, predictions, self, level=level, mapping=mapping, missing=missing, extractor=extractor
        )

    def sentiment_score(
        self,
        truths: Mapping[str, float],
        predictions: Mapping[str, str],
        *,
        missing: str = "error",
    ) -> SentimentScore:
        """Return `veena_lens.emotion.sentiment_score`, which needs no wheel."""
        return sentiment_score(truths, predictions, missing=missing)

    def sentiment(self, text_or_labels: str | Sequence[str]) -> str:
        """Return positive, negative or neutral: the sign of the sum of the labels' valences, a rule of this project."""
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
        """Return what was looked up under a mapping and level; the arguments are checked here, once for all."""
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


# --- scores -------------------------------------------------------------------------------------------


def hit_rate(
    truths: Mapping[str, Labels],
    predictions: Mapping[str, Labels],
    wheels: EmotionWheels | None = None,
    *,
    mapping: str | None = None,
    level: str = "level1",
    missing: str = "error",
    extractor: Extractor | None = None,
) -> float:
    """Return the share of samples whose predicted labels hit the true one's sector: mean over wheels of mean |Y & P|.

    In [0, 1], but several true labels can take the official mapping above 1, as in MER-UniBench; the direct one counts
    at most 1 per sample. A wheel on which no truth lies has no say. Parameters and Raises: as `wheel_scores`."""
    scores = wheel_scores(
        truths, predictions, wheels, mapping=mapping, level=level, missing=missing, extractor=extractor
    )
    return mean([score.hit_rate for score in scores if score.counted])


def open_vocabulary_score(
    truths: Mapping[str, Labels],
    predictions: Mapping[str, Labels],
    wheels: EmotionWheels | None = None,
    *,
    level: str = "level1",
    mapping: str | None = None,
    missing: str = "error",
    extractor: Extractor | None = None,
) -> OpenVocabularyScore:
    """Return set-based F-score, precision and recall of open-vocabulary labels: means over the wheels.

    For each wheel, precision = mean |Y & P|/|P| and recall = mean |Y & P|/|Y|, both 0 for an empty P; F is the harmonic
    mean of these two means, 0 for 0/0. A wheel on which no truth lies has no say. Dimensionless, in [0, 1].
    Parameters and Raises: as `wheel_scores`."""
    return over_wheels(
        wheel_scores(truths, predictions, wheels, mapping=mapping, level=level, missing=missing, extractor=extractor)
    )


def wheel_scores(
    truths: Mapping[str, Labels],
    predictions: Mapping[str, Labels],
    wheels: EmotionWheels | None = None,
    *,
    mapping: str | None = None,
    level: str = "level1",
    missing: str = "error",
    extractor: Extractor | None = None,
) -> tuple[WheelScore, ...]:
    """Return hit rate, precision, recall and F of each wheel.

    Args:
        truths, predictions: sample name -> label, bracketed list string or list of labels.
        wheels: None is the project's.
        mapping: "official" or "direct"; None is `wheels.mapping`.
        level: "level1" or "level2".
        missing: "error", or "empty" to score truths without a prediction as having no label.
        extractor: turns predicted texts into labels first (`wheels.extract`, or your judge); None reads list strings.

    Raises: ValueError without truths, for truths without a prediction (all named) unless `missing="empty"`, or for a
    mapping or level that does not exist."""
    wheels = EmotionWheels.default() if wheels is None else wheels
    mapping = wheels.mapping if mapping is None else mapping
    require_labels(truths, "Truths")
    samples = joined(truths, predictions, missing)
    guesses = read_guesses([guess for _, guess in samples], extractor)
    pairs = [(string_to_list(truth), guess) for (truth, _), guess in zip(samples, guesses)]

    def sectors(wheel: Wheel) -> list[tuple[frozenset[str], frozenset[str]]]:
        return [
            (wheels.sectors(true, wheel.name, level, mapping), wheels.sectors(guess, wheel.name, level, mapping))
            for true, guess in pairs
        ]

    at_most_one = mapping != "official"
    return tuple(wheel_score(wheel.name, sectors(wheel), at_most_one) for wheel in wheels.wheels)


def sample_hit(
    text_or_labels: Labels,
    truth: str,
    wheels: EmotionWheels | None = None,
    mapping: str = "direct",
    *,
    extractor: Extractor | None = None,
) -> float:
    """Return H(X, y): the share of wheels, among those on which the truth lies, whose sector of the truth is named.

    Above 0.5 a majority of wheels agrees. A text is searched for labels by `extractor` (default: the lexicon); labels
    are taken unchanged. wheels: None is the project's. In [0, 1]. With the direct mapping, neutral as truth is hit by
    words of neutral, though no wheel shows it. Raises: ValueError for a truth that lies on no wheel."""
    return sample_hits([text_or_labels], [truth], wheels, mapping, extractor=extractor)[0]


def sample_hits(
    texts_or_labels: Sequence[Labels],
    truths: Sequence[str],
    wheels: EmotionWheels | None = None,
    mapping: str = "direct",
    *,
    extractor: Extractor | None = None,
) -> list[float]:
    """Return `sample_hit` of every text and truth; an extractor with `.batch` reads all texts at once.

    Raises: ValueError for unequal lengths; otherwise as `sample_hit`."""
    if len(texts_or_labels) != len(truths):
        raise ValueError(f"{len(texts_or_labels)} texts and {len(truths)} truths: give one truth for each text.")
    require_labels(dict(enumerate(texts_or_labels)), "Answers")
    wheels = EmotionWheels.default() if wheels is None else wheels
    if extractor is None:
        read = [wheels.labels(said) for said in texts_or_labels]
    else:
        read = read_guesses(texts_or_labels, extractor)
    return [_hit(labels, truth, wheels, mapping) for labels, truth in zip(read, truths)]


def _hit(labels: Sequence[str], truth: str, wheels: EmotionWheels, mapping: str) -> float:
    hits = []
    for wheel in wheels.wheels:
        true = wheels.sector(truth, wheel.name, mapping=mapping)
        if true:
            hits.append(true in wheels.sectors(labels, wheel.name, mapping=mapping))
    if hits:
        return fmean(hits)
    if mapping == "direct" and wheels.basic(truth) == NEUTRAL:
        return float(any(wheels.basic(label) == NEUTRAL for label in labels))
    wheels.require([truth])
    raise ValueError(f"{truth!r} lies on no wheel under mapping={mapping!r}; use a label of theirs as truth.")


def token_hit_rate(text: str, truth: str, wheels: EmotionWheels | None = None) -> float:
    """Return the share of a text's emotion words that name the truth's basic emotion, repeats counted; 0 without any.

    Another quantity than the hit rate: "happy happy sad" has 2/3 for happy, and hits both. Negated words do not count.
    wheels: None is the project's. In [0, 1]. Raises: ValueError for a truth that the lexicon lacks."""
    wheels = EmotionWheels.default() if wheels is None else wheels
    emotion = wheels.basic(truth)
    if not emotion:
        known = ", ".join(wheels.words.valence_of)
        raise ValueError(f"The lexicon has no basic emotion for the truth {truth!r}; its basic emotions: {known}.")
    found = [wheels.words.emotion_of[match.label] for match in matches(text, wheels.words) if not match.negated]
    return found.count(emotion) / len(found) if found else 0.0
