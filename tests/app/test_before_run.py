"""What `veena-lens run` says before it works: an estimate that is true of every model, and options that are checked."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cases import BY_NAME
from tests.checkpoints import tiny
from veena_lens import HookedVLM, cli
from veena_lens.app import before_run
from veena_lens.app.before_run import checked_run, dry_run
from veena_lens.checkpoints import bundled_pairs, open_checkpoint
from veena_lens.checkpoints.describe import stored_weights
from veena_lens.emotion.estimates import answer_counts, parameters_text, time_text
from veena_lens.emotion.pairs.parts import part_identities


@cache
def pairs_and_settings() -> Any:
    return checked_run("tiny-llava-emotion", None, "nowhere", preset_name="tiny")


FAMILIES = ["llava-next-mistral", "qwen2_vl-plain", "gemma3-untied"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_dry_run_tells_parameters_dtype_and_answers_of_any_family(name: str, tmp_path: Path) -> None:
    theirs, folder = tiny.save(BY_NAME[name], tmp_path / "model", torch.bfloat16)
    n = sum(p.numel() for p in theirs.parameters())
    text = dry_run(str(folder), None, str(tmp_path / "out"), preset_name="tiny")
    cfg = open_checkpoint(folder).cfg
    assert f"{folder}: {n:,} parameters, {cfg.n_layers} layers, {cfg.n_heads} heads" in text
    assert "weights, bfloat16 (as stored):" in text and "on cpu" in text
    found, settings = pairs_and_settings()
    counts = answer_counts(cfg.n_layers, part_identities(found, settings), settings)
    assert f"{sum(counts.values())} answers of 16 tokens (preset tiny): directions {counts['directions']}, " in text
    assert not (tmp_path / "out").exists()


def test_numbers_in_the_headers_are_the_parameters_of_the_model() -> None:
    name = "tiny-qwen2vl-emotion"
    checkpoint, model = open_checkpoint(name), HookedVLM.from_pretrained(name)
    stored = stored_weights(checkpoint)
    assert (stored.n_parameters, stored.dtype) == (model.n_params_total, model.cfg.dtype)
    pictures = [pair[0].open() for pair in bundled_pairs()[:1]]
    prompt = model.prepare(text="how does the person in the picture feel?", images=pictures).shape[1]
    text = dry_run(name, None, "nowhere", preset_name="tiny")
    assert f"{model.n_params_total / 1e6:.2f} million parameters" in text and "float32 (as stored)" in text
    said = int(re.findall(r"prompts of about (\d+) tokens", text)[0])
    assert abs(said - prompt) < 0.3 * prompt
    assert "float16 (not as stored)" in dry_run(name, None, "nowhere", preset_name="tiny", dtype="float16")


def test_a_dry_run_imports_neither_the_model_nor_transformer_lens() -> None:
    code = (
        "import sys; from veena_lens import cli\n"
        "assert cli.main(['run', '--dry-run', '--preset', 'tiny', '--model', 'tiny-qwen2vl-emotion']) == 0\n"
        "heavy = [m for m in ('transformer_lens', 'pandas', 'veena_lens.model.model') if m in sys.modules]\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Nothing was loaded" in done.stdout and "hours" not in done.stdout


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize(
    ("options", "telling"),
    [
        (["--device", "cuda:17"], r"device='cuda:17' is not there: this machine .* has cpu"),
        (["--device", "gpu"], "device='gpu' is not a device of torch"),
        (["--model", "tiny-lava-emotion"], "Did you mean tiny-llava-emotion"),
        (["--model", "llava-1.5-7b-hf"], "Did you mean llava-hf/llava-1.5-7b-hf"),
        (["--pairs", "no-such-folder"], "no-such-folder"),
        (["--out", "file/below"], r"--out file/below: .*file is a file; name a folder"),
    ],
)
def test_options_are_checked_before_anything_is_loaded(
    options: list[str], telling: str, dry: bool, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")

    def load(*args: Any, **settings: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(HookedVLM, "from_pretrained", load)
    assert cli.main(["run", "--preset", "tiny", *options, *(["--dry-run"] if dry else [])]) == 2
    said = capsys.readouterr()
    assert not said.out and re.search(telling, said.err) and len(said.err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_cannot_be_written_and_a_missing_package_are_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(before_run.os, "access", lambda *args: False)
    with pytest.raises(PermissionError, match="nothing can be written in"):
        dry_run("tiny-llava-emotion", None, str(tmp_path / "out"))
    monkeypatch.undo()
    monkeypatch.setattr(before_run.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"veena-lens\[demo\]"):
        dry_run("tiny-llava-emotion", None, str(tmp_path / "out"))
    with pytest.raises(ValueError, match="There is no preset 'tinyy'"):
        dry_run("tiny-llava-emotion", None, str(tmp_path / "out"), preset_name="tinyy")


def test_numbers_read_well() -> None:
    assert [parameters_text(n) for n in (101_168, 4_270_000, 7_063_427_072)] == [
        "101,168", "4.27 million", "7.06 billion",
    ]  # fmt: skip
    assert [time_text(s) for s in (42, 300, 7200)] == ["42 seconds", "5 minutes", "2.0 hours"]
