"""The commands: an image with and without a circuit, an estimate that loads nothing, and the table of a file."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from tests.emotion.asked import bundled
from tests.emotion.test_results import TABLE
from veena_lens.app import commands
from veena_lens.app.before_run import drawn_questions
from veena_lens.app.commands import enhance_command, run_command, table_command
from veena_lens.checkpoints.files import bundled_pictures
from veena_lens.emotion.pairs.loading import load_pairs
from veena_lens.emotion.pairs.pair_set import PairSet
from veena_lens.emotion.results import main_table
from veena_lens.emotion.settings import settings_for
from veena_lens.interventions import Circuit, Steer
from veena_lens.model.model import HookedVLM

MODEL = "tiny-llava-emotion"


@pytest.fixture
def loaded(monkeypatch) -> list[Any]:
    """What was loaded; the bundled model stands for any."""
    found: list[Any] = []
    ready = bundled(MODEL)

    def load(name: str, **settings: Any) -> Any:
        found.append((name, settings))
        return ready

    monkeypatch.setattr(HookedVLM, "from_pretrained", load)
    return found


def saved(path: Path, meta: dict[str, Any]) -> str:
    away = torch.randn(192, generator=torch.Generator().manual_seed(1))
    return str(Circuit([Steer(6, away, 90.0)], "away", meta).save(path))


def test_a_picture_is_described_without_and_with_the_circuit(loaded, tmp_path: Path, capsys) -> None:
    circuit = saved(tmp_path / "c.safetensors", {"model": "some/model"})
    images = [str(p.path) for p in bundled_pictures()[:2]]
    found = enhance_command(circuit, images, max_new_tokens=6, dtype="float32")
    assert loaded == [("some/model", {"dtype": torch.float32})]
    assert [x["image"] for x in found] == images and all(x["with"] != x["without"] for x in found)
    assert all(x["without"].startswith("the person") for x in found)
    told = capsys.readouterr().out
    assert all(f"{x['image']}\n  without: {x['without']}\n  with:    {x['with']}\n" in told for x in found)


def test_a_circuit_that_names_no_model_needs_one(loaded, tmp_path: Path) -> None:
    circuit = saved(tmp_path / "c.safetensors", {})
    image = str(bundled_pictures()[0].path)
    with pytest.raises(ValueError, match="does not say which model it is for; name one: --model NAME"):
        enhance_command(circuit, [image])
    assert not loaded
    enhance_command(circuit, [image], model="mine", max_new_tokens=1)
    assert [name for name, _ in loaded] == ["mine"]


def test_missing_pictures_are_listed_at_once_before_anything_is_loaded(loaded, tmp_path: Path) -> None:
    circuit = saved(tmp_path / "c.safetensors", {"model": "m"})
    with pytest.raises(FileNotFoundError, match=r"No image at a\.png, b\.png"):
        enhance_command(circuit, ["a.png", str(bundled_pictures()[0].path), "b.png"])
    with pytest.raises(FileNotFoundError, match="No circuit at"):
        enhance_command(str(tmp_path / "none"), [str(bundled_pictures()[0].path)])
    assert not loaded


def test_a_dry_run_estimates_and_loads_and_writes_nothing(loaded, tmp_path: Path, capsys) -> None:
    assert run_command(MODEL, None, str(tmp_path / "out"), preset_name="tiny", dry_run=True) is None
    told = capsys.readouterr().out
    assert not loaded and not (tmp_path / "out").exists()
    cfg = bundled(MODEL).cfg
    assert f"{cfg.n_layers} layers, {cfg.n_heads} heads" in told and "weights, float32 (as stored)" in told
    assert "answers of 16 tokens (preset tiny)" in told and "Nothing was loaded" in told


def test_settings_take_seed_and_question_and_ask_for_attributes_of_drawn_faces() -> None:
    pairs = load_pairs()
    found = settings_for("tiny", seed=3, question="What is felt?", **drawn_questions(pairs))
    assert (found.seed, found.question, found.preset) == (3, "What is felt?", "tiny")
    assert found.questions and set(found.questions) <= {"hair", "background", "glasses"}
    photographs = Mock(spec=PairSet, examples=[SimpleNamespace(style="photo")])
    assert settings_for("tiny", **drawn_questions(photographs)).questions is None


def test_the_table_of_a_file_is_printed_and_a_missing_file_says_how_to_make_it(tmp_path: Path, capsys) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(TABLE))
    assert table_command(str(path)) == 0
    assert capsys.readouterr().out == main_table(TABLE) + "\n"
    with pytest.raises(FileNotFoundError, match="`veena-lens run --out DIR` writes DIR/results.json"):
        table_command(str(tmp_path / "none.json"))


def test_the_command_on_the_page_makes_the_run_again() -> None:
    given = {"--seed": 0, "--question": "What is felt?", "--dtype": None}
    assert commands._command("m", "pairs", "out", "quick", given, True) == [
        "veena-lens", "run", "--model", "m", "--pairs", "pairs", "--out", "out", "--preset", "quick", "--seed", "0",
        "--question", "What is felt?", "--skip-unreadable",
    ]  # fmt: skip
    assert "--pairs" not in commands._command("m", None, "out", "quick", {})
