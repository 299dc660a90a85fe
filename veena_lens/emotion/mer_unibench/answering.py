"""Record a model's answers on one set: one JSON line per sample, written as they come, resumed where they stopped.

The first line holds the settings, so that a file is never continued under others. Which images were seen stands beside
every answer. Scoring reads the file like any other (`answers.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from veena_lens.emotion.mer_unibench.loading import Sample
from veena_lens.emotion.mer_unibench.media import Seen, face_file, find_video, frame_files, frame_places, see
from veena_lens.emotion.methods import PLAIN, Method, batches, generate_answers, require_sizes
from veena_lens.emotion.pairs.pair_set import picture_hash
from veena_lens.emotion.study import Asking, Study, stage
from veena_lens.fingerprints import digest
from veena_lens.json_lines import Lines
from veena_lens.long_runs import progress

QUESTION = "Which emotions does the person in this picture show? Name every emotion that you see."


@dataclass(frozen=True, kw_only=True)
class AnswerRun:
    """What a run wrote: its file, its settings, the answers by name, how many are new, and samples left out."""

    path: Path
    run: dict[str, Any]
    values: dict[str, str]
    new: int
    left_out: tuple[str, ...] = ()

    def __repr__(self) -> str:
        lost = f", {len(self.left_out)} left out without pictures" if self.left_out else ""
        return f"AnswerRun({self.path}: {len(self.values)} answers, {self.new} of them new{lost})"


@dataclass(frozen=True, eq=False, kw_only=True)
class _Asked:
    """One image of a clip and its prompt, as `methods.generate_answers` takes them."""

    picture: Image.Image
    prompt: str


@stage(question=QUESTION, batch_size=16, max_new_tokens=32, progress=False)
def answer_set(
    study: Study,
    samples: Iterable[Sample],
    *,
    out: str | Path,
    frames: int = 1,
    faces: bool = False,
    subtitle: bool = True,
    method: Method | None = None,
    model_name: str = "",
    missing: str = "error",
) -> AnswerRun:
    """Ask a model about every sample and write each answer to `out` (JSON Lines) as it comes.

    Run again with the same arguments to do the rest.

    Args:
        study: the model, or a `Study` that holds the settings `question` to `progress` below.
        samples: samples of one set.
        out: the file.
        frames: 1 takes the middle frame (or face), more a uniform choice; each image is asked about alone and a clip's
            answers are joined by line ends.
        faces: True shows aligned faces where the set has them.
        subtitle: True puts what is said in the clip into the prompt.
        method: what is done while the model answers; by default nothing.
        model_name: what the file calls the model; by default its type.
        missing: "error", or "skip" to leave out samples without a video, and name them.
        question: what is asked of every image.
        batch_size, max_new_tokens: of the answers.
        progress: True shows a progress bar.

    Raises: FileNotFoundError listing samples without images, before any is asked; ValueError for a file of another run,
    naming what differs; OSError on a full disk, with every finished answer kept.
    """
    samples, method, out, asking = list(samples), PLAIN if method is None else method, Path(out), study.asking
    question = asking.question or QUESTION
    frame_places(1, frames)
    _require_arguments(samples, missing, asking)
    run = {
        "set": samples[0].info.key,
        "model": model_name or type(study.model).__name__,
        "method": method.name,
        "settings": json.loads(json.dumps(dict(method.settings), default=str)),
        "frames": frames,
        "faces": faces,
        "subtitle": subtitle,
        "question": question,
        "max_new_tokens": asking.max_new_tokens,
        "weights": digest(study.model),
        "edits": digest(method),
    }
    lines = Lines(out, run)
    left_out = _without_pictures(samples, faces)
    if left_out and missing == "error":
        raise FileNotFoundError(
            f"{len(left_out)} of {len(samples)} samples have no images: {', '.join(left_out[:20])}"
            f"{', ...' if len(left_out) > 20 else ''}. {_why(samples, left_out[0], faces)} Add them, or go on without "
            'them by missing="skip".'
        )
    lost = set(left_out)
    label = f"{run['set']} {method.name}"
    with lines.held():
        lines.add([])  # the settings, also where nothing is left to ask
        kept = _kept(lines, samples, faces, subtitle)
        todo = [sample for sample in samples if sample.name not in kept and sample.name not in lost]
        # A batch of clips holds `frames` images each; the model's batch stays at batch_size images.
        each = batches(todo, max(1, asking.batch_size // frames))
        for batch in progress(each, label, study.progress, total=len(todo), size=len):
            seen = [see(sample, frames=frames, faces=faces) for sample in batch]
            asked = _asked(batch, seen, question, subtitle)
            texts = generate_answers(study.model, asked, method, **asking.sizes)
            rows = _rows(batch, seen, texts)
            lines.add([row | {"clip": _clip(s, faces, subtitle)} for s, row in zip(batch, rows, strict=True)])
            kept |= {row["name"]: row["answer"] for row in rows}
    return AnswerRun(path=out, run=run, values=kept, new=len(todo), left_out=tuple(left_out))


def _kept(lines: Lines, samples: Sequence[Sample], faces: bool, subtitle: bool) -> dict[str, str]:
    """Return the answers that a file holds of these samples.

    Raises: ValueError for an answer about another clip of the same name."""
    by_name = {sample.name: sample for sample in samples}
    kept = {}
    for row in lines.rows:
        sample = by_name.get(row["name"])
        if sample is None:
            continue
        if row.get("clip") != _clip(sample, faces, subtitle):
            raise ValueError(
                f"{lines.path}: the answer of {sample.name!r} is about another clip than the one in {sample.folder} "
                "(other images, or other words said). Remove its row to ask again, or name another file."
            )
        kept[sample.name] = row["answer"]
    return kept


def _clip(sample: Sample, faces: bool, subtitle: bool) -> str:
    """Return a hash of what a clip shows, and of what is said in it where that is asked."""
    file = face_file(sample) if faces else None
    if file is None:
        try:
            file = find_video(sample)
        except FileNotFoundError:
            return "no images"
    shown = frame_files(file) if file.is_dir() else [file]
    return digest([sample.info.key, sample.subtitle if subtitle else "", [picture_hash(path) for path in shown]])


def prompt_of(sample: Sample, question: str = QUESTION, subtitle: bool = True) -> str:
    """Return the prompt about one clip: what is said in it, if wanted and there, then the question.

    Args:
        sample: the clip.
        question: what is asked of it.
        subtitle: True puts what is said before the question.
    """
    if subtitle and sample.subtitle:
        return f'The person says: "{sample.subtitle}" {question}'
    return question


def _asked(batch: Sequence[Sample], seen: Sequence[Seen], question: str, subtitle: bool) -> list[_Asked]:
    return [
        _Asked(picture=picture, prompt=prompt_of(sample, question, subtitle))
        for sample, pictures in zip(batch, seen)
        for picture in pictures.pictures
    ]


def _rows(batch: Sequence[Sample], seen: Sequence[Seen], texts: Sequence[str]) -> list[dict[str, Any]]:
    """Return one row per clip; the texts come one per image, clip after clip."""
    rest = iter(texts)
    return [
        {
            "name": sample.name,
            "answer": "\n".join(next(rest).strip() for _ in pictures.pictures),
            "seen": pictures.record(),
        }
        for sample, pictures in zip(batch, seen)
    ]


def _without_pictures(samples: Sequence[Sample], faces: bool) -> list[str]:
    lost = []
    for sample in samples:
        if faces and face_file(sample) is not None:
            continue
        try:
            find_video(sample)
        except FileNotFoundError:
            lost.append(sample.name)
    return lost


def _why(samples: Sequence[Sample], name: str, faces: bool) -> str:
    try:
        find_video(next(sample for sample in samples if sample.name == name))
    except FileNotFoundError as error:
        return str(error) + (" There is no face array either." if faces else "")
    return ""


def _require_arguments(samples: Sequence[Sample], missing: str, asking: Asking) -> None:
    if not samples:
        raise ValueError("No samples were given: nothing to ask.")
    keys = sorted({sample.info.key for sample in samples})
    if len(keys) > 1:
        raise ValueError(f"One file holds one set's answers; these samples are of {', '.join(keys)}.")
    names = [sample.name for sample in samples]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"Samples came twice: {', '.join(twice[:10])}.")
    if missing not in ("error", "skip"):
        raise ValueError(f'missing={missing!r} must be "error" or "skip".')
    require_sizes(asking.batch_size, asking.max_new_tokens)
