"""Compute MER-UniBench's metrics on sets of sectors and on sentiments; wheels say which sectors labels have.

Every score of emotion labels is a mean over wheels: Y and P are the sector sets of truth and prediction on one wheel,
and samples whose truth lies on no sector of a wheel take no part there. Source: Lian et al. 2025, AffectGPT (ICML).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from veena_lens.emotion.words.lexicon import Extractor, read_labels, string_to_list

Labels = str | Sequence[str]
Sectors = frozenset[str]


@dataclass(frozen=True, kw_only=True)
class WheelScore:
    """One wheel's part of a score; `counted` is the number of samples whose truth lies on the wheel."""

    wheel: str
    counted: int
    hit_rate: float
    precision: float
    recall: float
    f_score: float


@dataclass(frozen=True, kw_only=True)
class OpenVocabularyScore:
    """F_s, Precision_s and Recall_s in [0, 1]: means over the wheels, whose individual values stand in `per_wheel`."""

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


def wheel_score(wheel: str, pairs: Iterable[tuple[Sectors, Sectors]], at_most_one: bool = True) -> WheelScore:
    """Return hit rate, precision, recall and F of one wheel.

    Args:
        wheel: its name.
        pairs: the sectors of each sample's truth and of its prediction; a truth on no sector takes no part.
        at_most_one: a sample counts one hit at most, however many of its sectors are named.
    """
    hits, precisions, recalls = [], [], []
    for true, guessed in pairs:
        if not true:
            continue
        shared = len(true & guessed)
        hits.append(min(1, shared) if at_most_one else shared)
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


def over_wheels(scores: Sequence[WheelScore]) -> OpenVocabularyScore:
    """Return the means over the wheels on which some truth lies."""
    counted = [score for score in scores if score.counted]
    return OpenVocabularyScore(
        f_score=mean([score.f_score for score in counted]),
        precision=mean([score.precision for score in counted]),
        recall=mean([score.recall for score in counted]),
        per_wheel=tuple(scores),
    )


def sentiment_score(
    truths: Mapping[str, float], predictions: Mapping[str, str], *, missing: str = "error"
) -> SentimentScore:
    """Return the support-weighted mean of the two class F1 (WAF) and the accuracy of sentiment predictions.

    Truths of exactly 0 are dropped; the true class is value > 0; the predicted class is positive for the answer
    "positive" alone, and anything else is not positive. Both scores lie in [0, 1].

    Args:
        truths: sample name -> sentiment, a finite number whose sign is the class.
        predictions: sample name -> answer.
        missing: "error", or "empty" to score truths without a prediction as not positive.

    Raises: ValueError without a truth other than 0, for a truth that is not finite, and for truths without a prediction
    unless `missing="empty"`.
    """
    odd = [name for name, value in truths.items() if not abs(float(value)) < float("inf")]
    if odd:
        raise ValueError(f"Sentiment truths must be finite numbers; not so: {_some(odd)}.")
    samples = joined(truths, predictions, missing)
    pairs = [(float(value) > 0, guess == "positive") for value, guess in samples if float(value) != 0]
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


def mean(values: Sequence[float]) -> float:
    """Return the mean, 0 without values: every truth lay on no wheel."""
    return fmean(values) if values else 0.0


def harmonic(precision: float, recall: float) -> float:
    """Return the harmonic mean 2 p r / (p + r), 0 where both are 0."""
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def read_guesses(guesses: Sequence[Any], extractor: Extractor | None) -> list[list[str]]:
    """Return the labels of each guess, which is a text, a list string or a list of labels.

    Args:
        guesses: one per sample.
        extractor: reads the texts, all at once; None reads them as list strings.

    Raises: as `read_labels`.
    """
    if extractor is None:
        return [string_to_list(guess) for guess in guesses]
    read = iter(read_labels([guess for guess in guesses if isinstance(guess, str)], extractor))
    return [next(read) if isinstance(guess, str) else string_to_list(guess) for guess in guesses]


def joined(truths: Mapping[str, Any], predictions: Mapping[str, Any], missing: str) -> list[tuple[Any, Any]]:
    """Return (truth, prediction) for each sample of the truths, with None where there is no prediction.

    Args:
        truths, predictions: sample name -> value.
        missing: "error", or "empty" to pair such samples with None.

    Raises: ValueError without truths, for another `missing`, and with "error" for truths without a prediction;
    for predictions that are neither texts nor lists of texts, naming them.
    """
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
    require_labels({name: predictions[name] for name in truths if name in predictions}, "Predictions")
    return [(truth, predictions.get(name)) for name, truth in truths.items()]


def require_labels(given: Mapping[Any, Any], what: str) -> None:
    """Check that values are texts or lists of texts (None: no label); tables have NaN where an answer is missing.

    Raises: ValueError naming the samples whose values are not."""

    def is_text(value: Any) -> bool:
        if isinstance(value, str) or value is None:
            return True
        return isinstance(value, Iterable) and all(isinstance(label, str) for label in value)

    odd = [f"{name!r}: {value!r}" for name, value in given.items() if not is_text(value)]
    if odd:
        listed = ", ".join(odd[:20]) + (f" and {len(odd) - 20} more" if len(odd) > 20 else "")
        raise ValueError(f"{what} must be texts or lists of labels, or None for no label; not so: {listed}.")


def _some(names: Sequence[str], most: int = 20) -> str:
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
