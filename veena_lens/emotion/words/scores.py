"""Hit rate, set scores and sentiment scores: MER-UniBench's metrics and the per-sample hit of the method.

Every score of emotion labels is a mean over wheels: Y and P are the sector sets of truth and prediction on one wheel,
and samples whose truth lies on no sector of a wheel take no part there. Source: Lian et al. 2025, AffectGPT (ICML).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from veena_lens.emotion.words.lexicon import Extractor, matches, read_labels, string_to_list
from veena_lens.emotion.words.wheels import NEUTRAL, EmotionWheels

Labels = str | Sequence[str]
Sectors = frozenset[str]


@dataclass(frozen=True, kw_only=True)
class WheelScore:
    """One wheel's part of a score; `counted`: samples whose truth lies on the wheel."""

    wheel: str
    counted: int
    hit_rate: float
    precision: float
    recall: float
    f_score: float


@dataclass(frozen=True, kw_only=True)
class OpenVocabularyScore:
    """F_s, Precision_s and Recall_s in [0, 1]: means over the wheels, whose own values stand in `per_wheel`."""

    f_score: float
    precision: float
    recall: float
    per_wheel: tuple[WheelScore, ...]


@dataclass(frozen=True, kw_only=True)
class SentimentScore:
    """Weighted F-score and accuracy in [0, 1], over `counted` samples whose truth is not 0."""

    waf: float
    accuracy: float
    counted: int


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
    """The share of samples whose predicted labels hit the true one's sector: mean over wheels of mean |Y & P|.

    Truths and predictions: name -> label, bracketed list string or list of labels; `extractor` turns predicted texts
    into labels first (`wheels.extract`, or a judge of your own). In [0, 1], but several true labels can take the
    official mapping above 1, as in MER-UniBench; the direct one counts at most 1 a sample. A wheel on which no truth
    lies has no say. mapping: None is `wheels.mapping`. Raises: as `wheel_scores`."""
    scores = wheel_scores(
        truths, predictions, wheels, mapping=mapping, level=level, missing=missing, extractor=extractor
    )
    return _mean([score.hit_rate for score in scores if score.counted])


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
    """Set-based F-score, precision and recall of open-vocabulary labels: means over the wheels.

    Per wheel, precision = mean |Y & P|/|P| and recall = mean |Y & P|/|Y|, both 0 for an empty P; F is the harmonic
    mean of these two means, 0 for 0/0. A wheel on which no truth lies has no say. Dimensionless, in [0, 1].
    Raises: as `wheel_scores`."""
    scores = wheel_scores(
        truths, predictions, wheels, mapping=mapping, level=level, missing=missing, extractor=extractor
    )
    counted = [score for score in scores if score.counted]
    return OpenVocabularyScore(
        f_score=_mean([score.f_score for score in counted]),
        precision=_mean([score.precision for score in counted]),
        recall=_mean([score.recall for score in counted]),
        per_wheel=scores,
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
    """Hit rate, precision, recall and F of each wheel.

    Raises: ValueError without truths, for truths without a prediction (all named; `missing="empty"` scores them as
    no label), or for a mapping or level that does not exist."""
    wheels = EmotionWheels.default() if wheels is None else wheels
    mapping = wheels.mapping if mapping is None else mapping
    joined = _joined(truths, predictions, missing)
    guesses = _read([guess for _, guess in joined], extractor)
    pairs = [(string_to_list(truth), guess) for (truth, _), guess in zip(joined, guesses)]
    return tuple(_wheel_score(pairs, wheels, wheel.name, level, mapping) for wheel in wheels.wheels)


def _wheel_score(
    pairs: Sequence[tuple[list[str], list[str]]], wheels: EmotionWheels, wheel: str, level: str, mapping: str
) -> WheelScore:
    hits, precisions, recalls = [], [], []
    for truth, guess in pairs:
        true = wheels.sectors(truth, wheel, level, mapping)
        if not true:
            continue
        guessed = wheels.sectors(guess, wheel, level, mapping)
        shared = len(true & guessed)
        hits.append(shared if mapping == "official" else min(1, shared))
        precisions.append(shared / len(guessed) if guessed else 0.0)
        recalls.append(shared / len(true))
    if not hits:
        return WheelScore(wheel=wheel, counted=0, hit_rate=0.0, precision=0.0, recall=0.0, f_score=0.0)
    precision, recall = fmean(precisions), fmean(recalls)
    return WheelScore(
        wheel=wheel,
        counted=len(hits),
        hit_rate=fmean(hits),
        precision=precision,
        recall=recall,
        f_score=harmonic(precision, recall),
    )


def sentiment_score(
    truths: Mapping[str, float], predictions: Mapping[str, str], *, missing: str = "error"
) -> SentimentScore:
    """Support-weighted mean of the two class F1 (WAF) and accuracy of sentiment predictions.

    Truths of exactly 0 are dropped; the true class is value > 0; the predicted class is positive for the answer
    "positive" alone, and anything else is not positive. In [0, 1]. Raises: ValueError without a truth other than 0,
    for a truth that is not finite, and for truths without a prediction unless `missing="empty"`."""
    odd = [name for name, value in truths.items() if not abs(float(value)) < float("inf")]
    if odd:
        raise ValueError(f"Sentiment truths must be finite numbers; not so: {_some(odd)}.")
    joined = _joined(truths, predictions, missing)
    pairs = [(float(value) > 0, guess == "positive") for value, guess in joined if float(value) != 0]
    if not pairs:
        raise ValueError("Every sentiment truth is 0, and such samples are dropped: nothing to score.")
    waf = 0.0
    for kind in (False, True):
        support = sum(true == kind for true, _ in pairs)
        guessed = sum(guess == kind for _, guess in pairs)
        right = sum(true == guess == kind for true, guess in pairs)
        # 2 right / (support + guessed) is F1 = harmonic(right/guessed, right/support), and 0 where it is 0/0.
        waf += support / len(pairs) * (2 * right / (support + guessed) if right else 0.0)
    accuracy = fmean(true == guess for true, guess in pairs)
    return SentimentScore(waf=waf, accuracy=accuracy, counted=len(pairs))


def sample_hit(
    text_or_labels: Labels,
    truth: str,
    wheels: EmotionWheels | None = None,
    mapping: str = "direct",
    *,
    extractor: Extractor | None = None,
) -> float:
    """H(X, y): the share of wheels, among those on which the truth lies, whose sector of the truth is named.

    Above 0.5 a majority of wheels agrees. A text is searched for labels by `extractor` (default: the lexicon); labels
    are taken as they are. In [0, 1]. With the direct mapping, neutral as truth is hit by words of neutral, though no
    wheel shows it. Raises: ValueError for a truth that lies on no wheel."""
    return sample_hits([text_or_labels], [truth], wheels, mapping, extractor=extractor)[0]


def sample_hits(
    texts_or_labels: Sequence[Labels],
    truths: Sequence[str],
    wheels: EmotionWheels | None = None,
    mapping: str = "direct",
    *,
    extractor: Extractor | None = None,
) -> list[float]:
    """`sample_hit` of every text and truth; an extractor with `.batch` reads all texts at once.

    Raises: ValueError for unequal lengths; otherwise as `sample_hit`."""
    if len(texts_or_labels) != len(truths):
        raise ValueError(f"{len(texts_or_labels)} texts and {len(truths)} truths: give one truth for each text.")
    wheels = EmotionWheels.default() if wheels is None else wheels
    if extractor is None:
        read = [wheels.labels(said) for said in texts_or_labels]
    else:
        read = _read(texts_or_labels, extractor)
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
    """Emotion words of the truth's basic emotion over all emotion words of a text, repeats counted; 0 without any.

    Another quantity than the hit rate: "happy happy sad" has 2/3 for happy, and hits both. Negated words do not count.
    In [0, 1]. Raises: ValueError for a truth that the lexicon lacks."""
    wheels = EmotionWheels.default() if wheels is None else wheels
    emotion = wheels.basic(truth)
    if not emotion:
        known = ", ".join(wheels.words.valence_of)
        raise ValueError(f"The lexicon has no basic emotion for the truth {truth!r}; its basic emotions: {known}.")
    found = [wheels.words.emotion_of[match.label] for match in matches(text, wheels.words) if not match.negated]
    return found.count(emotion) / len(found) if found else 0.0


def _mean(values: Sequence[float]) -> float:
    """The mean, 0 without values: every truth lay on no wheel."""
    return fmean(values) if values else 0.0


def harmonic(precision: float, recall: float) -> float:
    """2 p r / (p + r), 0 where both are 0."""
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _read(guesses: Sequence[Any], extractor: Extractor | None) -> list[list[str]]:
    """Labels of each guess: texts through the extractor, all at once; without one, labels and list strings."""
    if extractor is None:
        return [string_to_list(guess) for guess in guesses]
    read = iter(read_labels([guess for guess in guesses if isinstance(guess, str)], extractor))
    return [next(read) if isinstance(guess, str) else string_to_list(guess) for guess in guesses]


def _joined(truths: Mapping[str, Any], predictions: Mapping[str, Any], missing: str) -> list[tuple[Any, Any]]:
    """(truth, prediction) per sample of the truths; None where there is no prediction."""
    if missing not in ("error", "empty"):
        raise ValueError(f'missing={missing!r} must be "error" or "empty".')
    if not truths:
        raise ValueError("No truths were given: nothing to score.")
    lost = [name for name in truths if name not in predictions]
    if lost and missing == "error":
        raise ValueError(
            f"{len(lost)} of {len(truths)} samples have no prediction: {_some(lost)}. Predict them, or score them as "
            'empty answers with missing="empty".'
        )
    return [(truth, predictions.get(name)) for name, truth in truths.items()]


def _some(names: Sequence[str], most: int = 20) -> str:
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
