"""The commands `run`, `enhance`, `results` and `mer-unibench`, below their parsing.

The whole method on a model and images; images described with and without a circuit; tables of a run; and answers to the
sets of MER-UniBench, made and scored.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veena_lens.app import before_run
from veena_lens.app.veena_report import write_veena_report
from veena_lens.checkpoints import device_of, dtype_of
from veena_lens.emotion.mer_unibench.answers import Answers, answer_files, read_answers, set_in_path
from veena_lens.emotion.mer_unibench.data_sets import SETS, find_set
from veena_lens.emotion.mer_unibench.loading import LoadedSet, Overrides, load_set
from veena_lens.emotion.mer_unibench.scoring import SetScore, benchmark_mean, score_answers
from veena_lens.emotion.methods import Method, generate_answers
from veena_lens.emotion.pairs.pair_set import Example
from veena_lens.emotion.pipeline import VeenaRun, run_veena
from veena_lens.emotion.results import main_table, part_table, results_of, save_results
from veena_lens.emotion.words.wheels import EmotionWheels
from veena_lens.interventions import Circuit


def run_command(
    model: str,
    pairs: str | None,
    out: str,
    *,
    preset_name: str = "quick",
    dtype: str | None = None,
    device: str | None = None,
    seed: int | None = None,
    question: str | None = None,
    skip_unreadable: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
    verbose: bool = False,
) -> VeenaRun | None:
    """Run everything and write report.html, results.json, circuit.safetensors; prints a short table and the report.

    pairs: a folder with a manifest; None takes the pairs of the package. out: the folder of the three files.
    preset_name, seed, question: the settings of the method. dtype: a name such as "bfloat16"; device: such as "cuda";
    None leaves both to `HookedVLM.from_pretrained`. skip_unreadable: go on without images that cannot be read.
    dry_run prints the estimate of memory and time from the model's configuration alone, and reads no weights. Options
    are checked before either (`before_run.checked_run`). quiet
    prints the path of the report alone; verbose adds the table of every method, and what was found at each stage."""
    options: dict[str, Any] = {"preset_name": preset_name, "dtype": dtype, "device": device, "seed": seed}
    options |= {"question": question, "skip_unreadable": skip_unreadable}
    if dry_run:
        print(before_run.dry_run(model, pairs, out, **options))
        return None
    found, settings = before_run.checked_run(model, pairs, out, **options)
    from veena_lens import HookedVLM

    lens = HookedVLM.from_pretrained(model, **_loading(dtype, device))
    run = run_veena(lens, found, out, settings, progress=not quiet)
    save_results(run, Path(out) / "results.json")
    given = {"--dtype": dtype, "--device": device, "--seed": seed, "--question": question}
    command = _command(model, pairs, out, preset_name, given, skip_unreadable)
    report = write_veena_report(run, lens, Path(out) / "report.html", command)
    if quiet:
        print(report)
        return run
    results = results_of(run)
    lines = [part_table(results, "summary")]
    if verbose:
        lines += [main_table(results), repr(run)]
    print("\n\n".join(lines) + f"\nreport: {report}", flush=True)
    return run


def _command(
    model: str, pairs: str | None, out: str, preset_name: str, given: dict[str, Any], skip_unreadable: bool = False
) -> list[str]:
    """Return the command line of a run, with the options that were given."""
    options = {"--model": model, "--pairs": pairs, "--out": out, "--preset": preset_name} | given
    parts = [part for name, value in options.items() if value is not None for part in (name, str(value))]
    return ["veena-lens", "run", *parts, *(["--skip-unreadable"] if skip_unreadable else [])]


def _loading(dtype: str | None, device: str | None) -> dict[str, Any]:
    """Return the options of `from_pretrained` that were given."""
    given = {"dtype": dtype_of(dtype), "device": device}
    return {name: value for name, value in given.items() if value is not None}


def enhance_command(
    circuit: str,
    images: list[str],
    *,
    model: str | None = None,
    question: str | None = None,
    max_new_tokens: int = 64,
    device: str | None = None,
    dtype: str | None = None,
) -> list[dict[str, str]]:
    """Describe images with and without a saved circuit; prints both, and returns them.

    circuit: its file. images: paths. question: default "how does the person in the picture feel?". max_new_tokens: of
    each answer. device, dtype: as in `run_command`. The model is that named in the circuit unless given.
    Raises: ValueError where neither says which, and FileNotFoundError for images that are not there, all at once."""
    from veena_lens import HookedVLM

    device_of(device)
    missing = [image for image in images if not Path(image).is_file()]
    if missing:
        raise FileNotFoundError(f"No image at {', '.join(missing)}; nothing was loaded.")
    # Who names a model on the command line wants that one, also under another name; the sizes must agree.
    made = Circuit.load(circuit, allow_other_model=model is not None)
    name = model or made.meta.get("model")
    if not name:
        raise ValueError(f"{circuit} does not say which model it is for; name one: --model NAME.")
    lens = HookedVLM.from_pretrained(name, **_loading(dtype, device))
    asked = question or "how does the person in the picture feel?"
    examples = [Example(picture=image, emotion="", question=asked) for image in images]
    method = Method(name=made.name or "circuit", interventions=made)
    plain = generate_answers(lens, examples, batch_size=8, max_new_tokens=max_new_tokens)
    changed = generate_answers(lens, examples, method, batch_size=8, max_new_tokens=max_new_tokens)
    found = []
    for image, before, after in zip(images, plain, changed, strict=True):
        found.append({"image": image, "without": before.strip(), "with": after.strip()})
        print(f"{image}\n  without: {before.strip()}\n  with:    {after.strip()}")
    return found


def table_command(path: str, part: str = "main") -> int:
    """Print a part of a results.json as Markdown: the main table, or another (`part_table`)."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"No results at {file}; `veena-lens run --out DIR` writes DIR/results.json.")
    sys.stdout.write(part_table(json.loads(file.read_text()), part) + "\n")
    return 0


BEST_STEM = "Several stems are several runs or checkpoints; published scores take the best one on the test part itself."


def parse_folders(pairs: list[str] | None) -> dict[str, str]:
    """Return KEY=FOLDER options as a dictionary. Raises: ValueError for one without a "="."""
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
    """Return the table of every answer file at a path, under one mapping or both, with means over the sets.

    root: the folder that holds the sets. key: a set, where the path does not name it. mapping: "official", "direct" or
    "both". wheels: a folder of emotion wheels (default: the project's). overrides: folders of single sets. missing:
    "error", or "empty" to score missing answers as empty ones.
    Raises: FileNotFoundError without answers or labels, saying where labels come from; ValueError for a file whose set
    neither its path nor `key` says; otherwise as `score_answers`."""
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
    """Return the set of an answer file, by the option, the path or the file. Raises: ValueError when none says it."""
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
    """Return what made the answers, the same over the sets: run and checkpoint, or model and method."""
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

    device_of(args.device)
    # The set is read first: a lost folder should not cost the loading of a model.
    samples = load_set(args.root, args.set, overrides=parse_folders(args.folder))
    method = None
    if args.circuit:
        circuit = Circuit.load(args.circuit, allow_other_model=True)  # as in `enhance`
        # The content names the circuit: a file of answers is not continued under another of the same name.
        digest = hashlib.sha256(Path(args.circuit).read_bytes()).hexdigest()[:16]
        settings = {"circuit": Path(args.circuit).name, "sha256": digest}
        method = Method(name="circuit", interventions=circuit, settings=settings)
    from veena_lens.model.model import HookedVLM

    model = HookedVLM.from_pretrained(args.model, dtype=args.dtype, device=args.device)
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
