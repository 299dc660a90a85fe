"""Score answers on MER-UniBench: one primary metric per set, and their mean over the sets that were scored.

HIT for classes, F_s for open-vocabulary labels, WAF for sentiment; a join report says which answers had no sample and
which samples no answer. Source: Lian et al. 2025, AffectGPT (ICML).

`check_root` says what lies under a root of MER-UniBench, one line per set: found, partly or absent, and how to get what
is missing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from veena_lens.emotion.mer_unibench.answers import Answers
from veena_lens.emotion.mer_unibench.data_sets import SETS, SetInfo
from veena_lens.emotion.mer_unibench.loading import LoadedSet, Overrides, Sample, load_set, require_root, set_folder
from veena_lens.emotion.mer_unibench.media import face_file, find_video
from veena_lens.emotion.words.lexicon import string_to_list
from veena_lens.emotion.words.scores import sentiment_score
from veena_lens.emotion.words.wheels import EmotionWheels, wheel_scores


@dataclass(frozen=True, kw_only=True)
class Join:
    """How answers and samples met, by name."""

    matched: int
    without_answer: tuple[str, ...]
    without_sample: tuple[str, ...]

    def __repr__(self) -> str:
        lost = f"{len(self.without_answer)} samples without an answer{_some(self.without_answer)}"
        spare = f"{len(self.without_sample)} answers without a sample{_some(self.without_sample)}"
        return f"{self.matched} joined, {lost}, {spare}"


@dataclass(frozen=True, kw_only=True)
class SetScore:
    """One set's primary metric in percent, with the others beside it (in percent), per-wheel counts and the join.

    `mapping` is "" for sentiment, which has none. `counted`: samples that took part, per wheel or once.
    """

    key: str
    metric: str
    percent: float
    mapping: str
    details: Mapping[str, float]
    counted: tuple[int, ...]
    join: Join
    content: str
    path: str = ""
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        kind = f" ({self.mapping})" if self.mapping else ""
        others = [f"{name} {value:.2f}" for name, value in self.details.items()]
        head = f"{self.key} {self.metric}{kind} {self.percent:.2f}"
        lines = ["   ".join(filter(None, [head, ", ".join(others), f"{self.content}, {self.path}"]))]
        lines += [f"  counted {' '.join(map(str, self.counted))}; {self.join!r}"]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


@dataclass(frozen=True, kw_only=True)
class BenchmarkScore:
    """The unweighted mean of primary metrics in percent, over `keys`; `missing` are the other sets of the nine."""

    percent: float
    mapping: str
    keys: tuple[str, ...]
    missing: tuple[str, ...] = field(default=())

    def __repr__(self) -> str:
        lost = f"; missing: {', '.join(self.missing)}" if self.missing else ""
        return f"mean over {len(self.keys)} of {len(SETS)} sets ({self.mapping}): {self.percent:.2f}{lost}"


def score_answers(
    loaded: LoadedSet,
    answers: Answers | Mapping[str, Any],
    wheels: EmotionWheels | None = None,
    *,
    mapping: str = "official",
    missing: str = "error",
    extractor: Callable[[str], Sequence[str]] | None = None,
    judge: Callable[[Sequence[str]], str] | None = None,
) -> SetScore:
    """Return one set's primary metric, in percent, with the others beside it.

    Args:
        loaded: the set.
        answers: a file's, or name -> text, which is read as raw texts.
        wheels: None is the project's; sentiment uses them only through the default `extractor` and `judge`.
        mapping: "official" or "direct", from labels to sectors.
        missing: "error", or "empty" to score samples without an answer as empty ones.
        extractor: turns raw texts into labels (default: the lexicon); list strings are taken unchanged.
        judge: turns labels into a sentiment (default: the sign of their valences); sentiment words are taken unchanged.

    Raises: ValueError naming samples without an answer unless `missing="empty"`, for answers none of which belongs to
    the set, and for answers of another set.
    """
    wheels = EmotionWheels.default() if wheels is None else wheels
    if not isinstance(answers, Answers):
        from pathlib import Path

        answers = Answers(path=Path("answers"), content="raw", values=dict(answers))
    if answers.key and answers.key != loaded.info.key:
        raise ValueError(f"{answers.path} holds answers of {answers.key}, not of {loaded.info.key}.")
    joined = join(loaded.truths, answers.values)
    if not joined.matched:
        raise ValueError(
            f"None of the {len(answers.values)} answers in {answers.path} belongs to {loaded.info.title}: names such "
            f"as {next(iter(answers.values))!r} against {next(iter(loaded.truths))!r}. Is it another set's file?"
        )
    scored = {name: answers.values[name] for name in loaded.truths if name in answers.values}
    kept = {"key": loaded.info.key, "metric": loaded.info.metric, "join": joined, "path": str(answers.path)}
    kept |= {"content": answers.content, "notes": (*loaded.notes, *answers.notes)}
    if loaded.info.kind == "sentiment":
        words = _sentiments(scored, answers.content, wheels, extractor, judge)
        truths = {name: float(value) for name, value in loaded.truths.items()}
        score = sentiment_score(truths, words, missing=missing)
        details = {"ACC": 100 * score.accuracy}
        return SetScore(percent=100 * score.waf, mapping="", details=details, counted=(score.counted,), **kept)
    labels = _labels(scored, answers.content, wheels, extractor)
    truths = {name: str(value) for name, value in loaded.truths.items()}
    per_wheel = wheel_scores(truths, labels, wheels, mapping=mapping, missing=missing)
    # A wheel on which no truth lies says nothing.
    used = [s for s in per_wheel if s.counted]
    means = {"HIT": [s.hit_rate for s in used], "F_s": [s.f_score for s in used]}
    means |= {"Precision_s": [s.precision for s in used], "Recall_s": [s.recall for s in used]}
    percents = {name: 100 * fmean(values or [0.0]) for name, values in means.items()}
    if loaded.info.kind == "open":
        percents.pop("HIT")
    else:
        percents = {"HIT": percents["HIT"]}
    percent = percents.pop(loaded.info.metric)
    counted = tuple(s.counted for s in per_wheel)
    return SetScore(percent=percent, mapping=mapping, details=percents, counted=counted, **kept)


def join(truths: Iterable[str], answers: Iterable[str]) -> Join:
    """Return how many names are on both sides, and the names on one alone.

    Args:
        truths: names of samples.
        answers: names of answers.
    """
    samples, said = dict.fromkeys(truths), dict.fromkeys(answers)
    return Join(
        matched=sum(name in said for name in samples),
        without_answer=tuple(name for name in samples if name not in said),
        without_sample=tuple(name for name in said if name not in samples),
    )


def benchmark_mean(scores: Iterable[SetScore], mapping: str = "official") -> BenchmarkScore:
    """Return the unweighted mean of the sets' primary metrics under one mapping; sentiment counts under both.

    Args:
        scores: at most one per set and mapping.
        mapping: "official" or "direct"; scores under the other are left out.

    Raises: ValueError for two scores of one set, or none at all.
    """
    chosen = [score for score in scores if score.mapping in ("", mapping)]
    keys = [score.key for score in chosen]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice or not chosen:
        raise ValueError(f"Give one score a set: {', '.join(twice) + ' came twice' if twice else 'there is none'}.")
    return BenchmarkScore(
        percent=fmean(score.percent for score in chosen),
        mapping=mapping,
        keys=tuple(info.key for info in SETS if info.key in keys),
        missing=tuple(info.key for info in SETS if info.key not in keys),
    )


def _labels(
    values: Mapping[str, str], content: str, wheels: EmotionWheels, extractor: Callable[[str], Sequence[str]] | None
) -> dict[str, list[str]]:
    if content == "sentiment":
        raise ValueError("Sentiment words were given where emotion labels are scored; give the -openset file instead.")
    if content == "labels":
        return {name: string_to_list(value) for name, value in values.items()}
    extractor = wheels.labels if extractor is None else extractor
    return {name: list(extractor(value)) for name, value in values.items()}


def _sentiments(
    values: Mapping[str, str],
    content: str,
    wheels: EmotionWheels,
    extractor: Callable[[str], Sequence[str]] | None,
    judge: Callable[[Sequence[str]], str] | None,
) -> dict[str, str]:
    if content == "sentiment":
        return dict(values)
    judge = wheels.sentiment if judge is None else judge
    return {name: judge(labels) for name, labels in _labels(values, content, wheels, extractor).items()}


def _some(names: Sequence[str]) -> str:
    if not names:
        return ""
    return f" ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"


@dataclass(frozen=True, kw_only=True)
class SetCheck:
    """How many samples of a set have a label, a subtitle, a video and faces; `state` is found, partly or absent."""

    info: SetInfo
    state: str
    labels: int = 0
    subtitles: int = 0
    videos: int = 0
    faces: int = 0
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        line = f"{self.info.key:<12} {self.state:<7}"
        if self.state != "absent":
            counts = (self.labels, self.subtitles, self.videos, self.faces)
            names = ("label", "subtitle", "video", "faces")
            line += f" of {self.info.count}: " + ", ".join(f"{n} {name}" for n, name in zip(counts, names))
        return "\n".join([line, *(f"             {note}" for note in self.notes)])


@dataclass(frozen=True, kw_only=True)
class RootCheck:
    """The nine sets' checks under one root."""

    root: Path
    checks: tuple[SetCheck, ...]

    def __repr__(self) -> str:
        return "\n".join([f"MER-UniBench in {self.root}", *map(repr, self.checks), self.summary])

    @property
    def summary(self) -> str:
        """Say how many of the nine can be scored, and which cannot."""
        usable = [check.info.key for check in self.checks if check.labels]
        lost = [check.info.key for check in self.checks if not check.labels]
        return f"{len(usable)} of {len(SETS)} sets can be scored" + (f"; not: {', '.join(lost)}" if lost else "")


def check_root(root: str | Path, *, overrides: Overrides | None = None) -> RootCheck:
    """Return a check of every set; damaged or lost files become notes.

    Args:
        root: the folder that holds the sets' folders.
        overrides: key -> folder of a set that lies elsewhere.

    Raises: FileNotFoundError for a root that does not exist.
    """
    require_root(root, overrides)
    return RootCheck(root=Path(root), checks=tuple(_check(root, info, overrides) for info in SETS))


def _check(root: str | Path, info: SetInfo, overrides: Overrides | None) -> SetCheck:
    if set_folder(root, info, overrides) is None:
        folders = " or ".join(info.folders)
        return SetCheck(info=info, state="absent", notes=(f"no folder {folders}; to get it: {info.source}",))
    try:
        with warnings.catch_warnings():
            # The same words stand in the notes.
            warnings.simplefilter("ignore")
            loaded = load_set(root, info.key, overrides=overrides)
    except (ValueError, FileNotFoundError) as error:
        return SetCheck(info=info, state="partly", notes=(str(error),))
    return _counted(loaded)


def _counted(loaded: LoadedSet) -> SetCheck:
    unseen = [sample.name for sample in loaded if not _has_video(sample)]
    complete = len(loaded) == loaded.info.count and not unseen
    notes = list(loaded.notes)
    if unseen:
        notes.append(f"{len(unseen)} samples have no video, {unseen[0]!r} first; scoring needs none")
    return SetCheck(
        info=loaded.info,
        state="found" if complete else "partly",
        labels=len(loaded),
        subtitles=sum(bool(sample.subtitle) for sample in loaded),
        videos=len(loaded) - len(unseen),
        faces=sum(face_file(sample) is not None for sample in loaded),
        notes=tuple(notes),
    )


def _has_video(sample: Sample) -> bool:
    try:
        find_video(sample)
    except FileNotFoundError:
        return False
    return True
