"""The command line: quick where it must be, one readable message for bad input, exit codes that scripts can use."""

from __future__ import annotations

import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cases import BY_NAME
from tests.checkpoints import tiny
from veena_lens import cli
from veena_lens.app.command_help import HELP
from veena_lens.checkpoints.registry import BUILT_IN
from veena_lens.emotion.settings import PRESETS

HEAVY = ("torch", "transformers", "transformer_lens", "accelerate")


def test_version_help_and_models_import_nothing_heavy() -> None:
    code = (
        "import sys; from veena_lens import cli\n"
        "codes = [cli.main(['models']), cli.main(['--version']), cli.main([])]\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit as end: codes.append(end.code)\n"
        f"heavy = [m for m in {HEAVY} if m in sys.modules]\n"
        "assert codes == [0, 0, 2, 0] and not heavy, (codes, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in cli.COMMANDS)
    assert all(name in done.stdout for name in BUILT_IN) and "llava-hf/llava-1.5-7b-hf" in done.stdout


def test_inspect_prints_configuration_parameters_memory_and_hooks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, folder = tiny.save(BY_NAME["clip-llama"], tmp_path, torch.bfloat16)
    assert cli.main(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    n = sum(p.numel() for p in theirs.parameters())
    for part in (f"{n:,}", "HookedVLMConfig(", "bfloat16", "vision.blocks.{0..1}.attn.hook_pattern", "last norm"):
        assert part in shown
    assert "blocks.{0..1}.attn.hook_z" in shown and "n_heads=6 d_head=8" in shown
    assert "tensors of bfloat16 in 1 file" in shown


@pytest.mark.parametrize("command", ["", *cli.COMMANDS, *(f"mer-unibench {x}" for x in ("check", "score", "answer"))])
def test_the_help_of_every_command_describes_it_with_examples_that_parse(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([*command.split(), "--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0 and HELP[command].about in shown
    for example in HELP[command].examples:
        assert f"  veena-lens {example}" in shown and example.startswith(command)
        if "--help" not in example:
            assert cli.build_parser().parse_args(example.split()).command == example.split()[0]
    if command == "run":
        for name, settings in PRESETS.items():
            assert re.search(rf"  {name} ", shown.split("presets")[1]) and settings.preset == name
        assert all(word in shown for word in ("two trials", "four trials", "twelve trials"))
        assert [s.trials for s in PRESETS.values()] == [2, 4, 12]
        assert [s.test_pictures for s in PRESETS.values()] == [16, 32, None]


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_bad_input_is_one_message_and_exit_code_two(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "no-such-checkpoint"]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith(f"veena-lens {command}: No checkpoint 'no-such-checkpoint'")
    assert len(told.err.splitlines()) == 1
    for arguments in (["--debug", command, "no-such-checkpoint"], [command, "no-such-checkpoint", "--debug"]):
        with pytest.raises(FileNotFoundError):
            cli.main(arguments)


def test_verify_prints_the_certificate_and_fails_when_it_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = tiny.save(BY_NAME["text-llama"], tmp_path)
    assert cli.main(["verify", str(folder), "--dtype", "float64"]) == 0
    shown = capsys.readouterr().out
    assert "float64 on cpu" in shown and shown.rstrip().endswith("passed")
    monkeypatch.setattr("veena_lens.verify.dead_hooks", lambda *_: ("blocks.0.hook_mlp_out",))
    assert cli.main(["verify", str(folder)]) == 1
    assert "FAILED: blocks.0.hook_mlp_out" in capsys.readouterr().out


@pytest.mark.parametrize("command", [name for name in cli.COMMANDS if name != "mer-unibench"])
def test_every_command_takes_quiet_or_verbose(command: str) -> None:
    needed = {"inspect": ["x"], "verify": ["x"], "results": ["x"], "enhance": ["--circuit", "x", "--image", "y"]}
    parse = cli.build_parser().parse_args
    assert parse([command, "-q", *needed.get(command, [])]).quiet
    assert parse([command, *needed.get(command, []), "--verbose"]).verbose
    with pytest.raises(SystemExit):
        parse([command, "-q", "-v", *needed.get(command, [])])


def test_quiet_silences_warnings_and_logs_and_verbose_lets_them_through(monkeypatch: pytest.MonkeyPatch) -> None:
    import argparse
    import logging
    import warnings

    disabled: list[int] = []
    monkeypatch.setattr(logging, "disable", disabled.append)
    monkeypatch.setattr(logging, "basicConfig", lambda **settings: disabled.append(settings["level"]))
    with warnings.catch_warnings():
        cli._set_loudness(argparse.Namespace(quiet=True, verbose=False))
        warnings.warn("not seen", stacklevel=1)
        cli._set_loudness(argparse.Namespace(quiet=False, verbose=True))
        with pytest.warns(UserWarning, match="seen"):
            warnings.warn("seen", stacklevel=1)
    assert disabled == [logging.WARNING, logging.INFO]


def test_quiet_demo_prints_its_page_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    stand_in = types.ModuleType("veena_lens.app.demo")
    stand_in.run_demo = None  # type: ignore[attr-defined]
    stand_in.run_demos = lambda out, models, progress: types.SimpleNamespace(page=f"{out}/{progress}")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "veena_lens.app.demo", stand_in)
    monkeypatch.setattr(cli, "_set_loudness", lambda args: None)
    assert cli.main(["demo", "-q", "--out", "there"]) == 0
    assert capsys.readouterr().out == "there/False\n"


def test_demo_hands_its_options_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[Any] = []
    stand_in = types.ModuleType("veena_lens.app.demo")
    stand_in.run_demo = lambda out, model: asked.append((out, model)) or "the result"  # type: ignore[attr-defined]
    stand_in.run_demos = None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "veena_lens.app.demo", stand_in)
    assert cli.main(["demo", "--out", "elsewhere", "--model", "tiny-llava-emotion"]) == 0
    assert asked == [("elsewhere", "tiny-llava-emotion")] and "the result" in capsys.readouterr().out


def test_demo_of_several_models_compares_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []
    stand_in = types.ModuleType("veena_lens.app.demo")
    stand_in.run_demo = None  # type: ignore[attr-defined]
    stand_in.run_demos = lambda out, models: asked.append((out, models)) or "side by side"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "veena_lens.app.demo", stand_in)
    assert cli.main(["demo", "--out", "elsewhere", "--model", "one", "another"]) == 0
    assert asked == [("elsewhere", ["one", "another"])] and "side by side" in capsys.readouterr().out
