"""The commands `run` and `enhance`: the whole method on a model and pictures, and one picture with and without."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from veena_lens.app.veena_report import write_veena_report
from veena_lens.emotion.methods import Method
from veena_lens.emotion.pipeline import VeenaRun, part_identities, run_veena
from veena_lens.emotion.results import main_table, part_table, results_of, save_results
from veena_lens.emotion.settings import Settings, preset
from veena_lens.interventions import Circuit

DRY_TOKENS_PER_SECOND = 2.0e12  # multiply-adds a second assumed for an estimate without a run: a modest GPU


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
) -> VeenaRun | None:
    """Run everything and write report.html, results.json, circuit.safetensors; prints the main table.

    dry_run prints the estimate of memory and time from the model's configuration alone, and reads no weights."""
    from veena_lens.emotion.pairs import load_pairs

    unreadable = "skip" if skip_unreadable else "error"
    found = load_pairs(pairs, unreadable=unreadable)
    settings = settings_for(found, preset_name, seed, question, embedded=pairs is None)
    if dry_run:
        print(dry_estimate(model, found, settings, dtype or "bfloat16"))
        return None
    from veena_lens import HookedVLM

    loading: dict[str, Any] = {} if dtype is None else {"dtype": getattr(torch, dtype)}
    if device is not None:
        loading["device"] = device
    lens = HookedVLM.from_pretrained(model, **loading)
    run = run_veena(lens, found, out, settings)
    save_results(run, Path(out) / "results.json")
    given = {"--dtype": dtype, "--device": device, "--seed": seed, "--question": question}
    command = _command(model, pairs, out, preset_name, given, skip_unreadable)
    write_veena_report(run, lens, Path(out) / "report.html", command)
    print(main_table(results_of(run)))
    print(run)
    print(f"report: {Path(out) / 'report.html'}")
    return run


def _command(
    model: str, pairs: str | None, out: str, preset_name: str, given: dict[str, Any], skip_unreadable: bool = False
) -> list[str]:
    """The command line of a run, with the options that were given."""
    options = {"--model": model, "--pairs": pairs, "--out": out, "--preset": preset_name} | given
    parts = [part for name, value in options.items() if value is not None for part in (name, str(value))]
    return ["veena-lens", "run", *parts, *(["--skip-unreadable"] if skip_unreadable else [])]


def settings_for(
    pairs: Any, preset_name: str, seed: int | None = None, question: str | None = None, embedded: bool = False
) -> Settings:
    """The preset with what the pictures allow: their attributes are asked for where questions are known."""
    settings = preset(preset_name)
    if seed is not None:
        settings = replace(settings, seed=seed)
    if question is not None:
        settings = replace(settings, question=question)
    if embedded or all(e.style in ("avataaars", "open-peeps", "micah", "emoji") for e in pairs.examples):
        from veena_lens.zoo.captions import ATTRIBUTE_QUESTIONS, EMOTION_QUESTIONS

        settings = replace(
            settings,
            questions={name: ATTRIBUTE_QUESTIONS[name][0] for name in ("hair", "background", "glasses")},
            describe=EMOTION_QUESTIONS["caption"][0],
            templates={"hair": ["{} hair"], "background": ["{} background"]},
        )
    return settings


def dry_estimate(path: str, pairs: Any, settings: Settings, dtype: str) -> str:
    """Memory and time of a run from a checkpoint's configuration alone; the model is built on the meta device."""
    from veena_lens.checkpoints.loading import open_checkpoint
    from veena_lens.model.model import HookedVLM

    checkpoint = open_checkpoint(path)
    with torch.device("meta"):
        model = HookedVLM(checkpoint.cfg)
    cfg = model.cfg
    n = sum(p.numel() for p in model.parameters())
    size = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    parts = part_identities(pairs, settings)
    prompt = 640  # tokens: a picture of 576 and a question
    kv = 2 * cfg.n_layers * cfg.n_key_value_heads * cfg.d_head * size
    staircase = settings.max_rows * (4 * cfg.d_model + 2 * cfg.d_mlp) * size
    conditions = 2 + len(settings.strengths)
    n_test = len(parts["test"].examples) if settings.test_pictures is None else settings.test_pictures
    n_validation = settings.validation_pictures or len(parts["validation"].examples)
    families = 4 + (8 if settings.rivals else 0)
    answers = n_validation * conditions * (families * settings.trials + 1)
    answers += n_test * (conditions * (families + 1) + 2 * settings.random_draws * len(settings.strengths))
    answers += 2 * (settings.direction_pairs or len(parts["directions"]))
    work = answers * 2.0 * n * (prompt + settings.max_new_tokens)
    gib = 2.0**30
    return "\n".join(
        [
            f"{path}: {n / 1e9:.2f} billion parameters, {cfg.n_layers} layers, {cfg.n_heads} heads",
            f"  weights, {dtype}: {n * size / gib:.1f} GiB",
            f"  keys and values of {settings.batch_size} prompts of {prompt} tokens: "
            f"{kv * prompt * settings.batch_size / gib:.1f} GiB",
            f"  rows of a sweep ({settings.max_rows}): {staircase / gib:.2f} GiB at each position",
            f"  about {answers} answers of {settings.max_new_tokens} tokens (preset {settings.preset}): "
            f"{work:.2g} multiply-adds, {work / DRY_TOKENS_PER_SECOND / 3600:.1f} hours at 2e12 a second, "
            f"{work / 1e14 / 3600:.1f} hours at 1e14 (a large GPU, batched)",
            "Nothing was loaded. The run itself times eight answers and prints a closer estimate.",
        ]
    )


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
    """Describe pictures with and without a saved circuit; prints both, and returns them.

    The model is that named in the circuit unless given. Raises: ValueError where neither says which, and
    FileNotFoundError for pictures that are not there, all at once."""
    from veena_lens import HookedVLM
    from veena_lens.emotion.methods import answers
    from veena_lens.emotion.pair_set import Example

    missing = [image for image in images if not Path(image).is_file()]
    if missing:
        raise FileNotFoundError(f"No picture at {', '.join(missing)}; nothing was loaded.")
    made = Circuit.load(circuit)
    name = model or made.meta.get("model")
    if not name:
        raise ValueError(f"{circuit} does not say which model it is for; name one: --model NAME.")
    loading: dict[str, Any] = {} if dtype is None else {"dtype": getattr(torch, dtype)}
    if device is not None:
        loading["device"] = device
    lens = HookedVLM.from_pretrained(name, **loading)
    asked = question or "how does the person in the picture feel?"
    examples = [Example(picture=image, emotion="", question=asked) for image in images]
    method = Method(name=made.name or "circuit", interventions=made)
    plain = answers(lens, examples, batch_size=8, max_new_tokens=max_new_tokens)
    changed = answers(lens, examples, method, batch_size=8, max_new_tokens=max_new_tokens)
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
