"""What `veena-lens mer-unibench` does, below its parsing: check a root, score answers, answer a set."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veena_lens.emotion.mer_unibench.answers import Answers, answer_files, read_answers, set_in_path
from veena_lens.emotion.mer_unibench.loading import LoadedSet, Overrides, load_set
from veena_lens.emotion.mer_unibench.scoring import SetScore, benchmark_mean, score_answers
from veena_lens.emotion.mer_unibench.sets import SETS, find_set
from veena_lens.emotion.wheels import EmotionWheels

BEST_STEM = "Several stems are several runs or checkpoints; published scores take the best one on the test part itself."


def parse_folders(pairs: list[str] | None) -> dict[str, str]:
    """KEY=FOLDER options as a dictionary. Raises: ValueError for one without a "="."""
    found = {}
    for pair in pairs or []:
        key, mark, folder = pair.partition("=")
        if not mark or not folder:
            raise ValueError(f"--folder {pair!r}: expected KEY=FOLDER, for example meld=/data/meld.")
        found[find_set(key).key] = folder
    return found


def score_path(
    path: str | Path,
    root: str | Path | None,
    *,
    key: str | None = None,
    mapping: str = "both",
    wheels: str | Path | None = None,
    overrides: Overrides | None = None,
    missing: str = "error",
) -> str:
    """The table of every answer file at a path, under one mapping or both, with means over the sets.

    Raises: FileNotFoundError without answers or labels, saying where labels come from; ValueError for a file whose set
    neither its path nor `key` tells; otherwise as `score_answers`."""
    files = _files(Path(path))
    if root is None and not overrides:
        asked = find_set(key) if key else None
        got = f" To get {asked.title}: {asked.source}." if asked else ""
        raise ValueError(
            f"Scoring {path} needs the labels of the sets: give --root, the folder that holds "
            f"{', '.join(info.folders[0] for info in SETS)}.{got}"
        )
    known = EmotionWheels.default() if wheels is None else EmotionWheels.from_affectgpt(wheels)
    mappings = ("official", "direct") if mapping == "both" else (mapping,)
    loaded: dict[str, LoadedSet] = {}
    stems: dict[str, list[SetScore]] = {}
    lines = [f"wheels: {', '.join(wheel.name for wheel in known.wheels)}"]
    if wheels is None:
        lines.append("These are the project's own wheels; for MER-UniBench's figures give --wheels FOLDER.")
    for file in files:
        mine = _set_of(file, key)
        if mine not in loaded:
            with warnings.catch_warnings():
                # The same words are the score's notes.
                warnings.simplefilter("ignore", UserWarning)
                loaded[mine] = load_set(root or ".", mine, overrides=overrides)
        answers = read_answers(file, sentiment=find_set(mine).kind == "sentiment")
        for m in mappings if find_set(mine).kind != "sentiment" else mappings[:1]:
            score = score_answers(loaded[mine], answers, known, mapping=m, missing=missing)
            stems.setdefault(_stem(answers), []).append(score)
            lines.append(repr(score))
    return "\n".join([*lines, *_means(stems, mappings)])


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise FileNotFoundError(f"There are no answers at {path}.")
    if path.is_dir() and not any(path.glob("*.npy")):
        found = answer_files(path)
        if not found:
            raise FileNotFoundError(f"No npz, csv or jsonl file of answers lies under {path}.")
        return found
    return [path]


def _set_of(file: Path, key: str | None) -> str:
    """The set of an answer file, told by the option, the path or the file. Raises: ValueError when none tells."""
    told = set_in_path(file) or (read_answers(file).key if file.suffix in (".jsonl", ".json") else "")
    if key is not None:
        if told and told != find_set(key).key:
            raise ValueError(f"{file} belongs to {told}, not to {key!r}: leave --set out, or give its answers.")
        return find_set(key).key
    if not told:
        raise ValueError(
            f"{file} does not tell its set (no results-<key> folder in its path): give --set KEY, one of "
            f"{', '.join(info.key for info in SETS)}."
        )
    return told


def _stem(answers: Answers) -> str:
    """What made the answers, the same over the sets: run and checkpoint, or model and method."""
    if answers.run is not None:
        told = [str(answers.run[part]) for part in ("model", "method") if part in answers.run]
        return "/".join(told) or "answers"
    if not set_in_path(answers.path):
        return "answers"
    name = answers.path.stem.removesuffix("-sentiment").removesuffix("-openset")
    return f"{answers.path.parent.name}/{name}"


def _means(stems: Mapping[str, list[SetScore]], mappings: tuple[str, ...]) -> list[str]:
    lines = []
    for stem, scores in stems.items():
        for mapping in mappings:
            chosen = [score for score in scores if score.mapping in ("", mapping)]
            keys = [score.key for score in chosen]
            if chosen and len(set(keys)) == len(keys):
                lines.append(f"{stem}: {benchmark_mean(chosen, mapping)!r}")
    return lines + ([BEST_STEM] if len(stems) > 1 else [])


def answer_command(args: Any) -> str:
    """Answer one set with a model, under a saved circuit if one is given; says what was written."""
    from veena_lens.emotion.mer_unibench.answering import answer_set
    from veena_lens.emotion.methods import Method

    # The set is read first: a lost folder should not cost the loading of a model.
    samples = load_set(args.root, args.set, overrides=parse_folders(args.folder))
    method = None
    if args.circuit:
        from veena_lens.interventions.circuit import Circuit

        circuit = Circuit.load(args.circuit)
        # The content names the circuit: a file of answers is not continued under another of the same name.
        digest = hashlib.sha256(Path(args.circuit).read_bytes()).hexdigest()[:16]
        settings = {"circuit": Path(args.circuit).name, "sha256": digest}
        method = Method(name="circuit", interventions=circuit, settings=settings)
    from veena_lens.model.model import HookedVLM

    loading: dict[str, Any] = {"device": args.device}
    if args.dtype is not None:
        import torch

        loading["dtype"] = getattr(torch, args.dtype)
    model = HookedVLM.from_pretrained(args.model, **loading)
    run = answer_set(
        model,
        samples,
        out=args.out,
        frames=args.frames,
        faces=args.faces,
        subtitle=not args.no_subtitle,
        method=method,
        model_name=args.model,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        missing=args.missing,
        progress=True,
    )
    left_out = f"\nleft out without pictures: {', '.join(run.left_out)}" if run.left_out else ""
    return f"{run!r}{left_out}\nscore it: veena-lens mer-unibench score {args.out} --root {args.root}"
