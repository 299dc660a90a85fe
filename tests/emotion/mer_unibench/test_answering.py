"""Answering a set: what is asked, what is written, and how a stopped run goes on."""

import errno
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.emotion.mer_unibench.synthetic import Made, place_of
from veena_lens.emotion.mer_unibench import answer_set, answering, load_set, read_answers, score_answers
from veena_lens.emotion.methods import Method
from veena_lens.long_runs import Lines

pytestmark = pytest.mark.filterwarnings("ignore:.*published test part")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every example asked, in order; the answer tells the prompt's length and the image's red."""
    log: list[Any] = []

    def answers(model: Any, examples: Sequence[Any], method: Method, **options: Any) -> list[str]:
        assert len(examples) <= max(options["batch_size"], 3)
        log.extend(examples)
        if model == "stops" and len(log) > 2:
            raise KeyboardInterrupt
        return [f"happy, red {example.picture.getpixel((0, 0))[0]}" for example in examples]

    monkeypatch.setattr(answering, "generate_answers", answers)
    return log


def test_each_sample_is_asked_with_its_subtitle_and_middle_frame(made: Made, tmp_path: Path, asked: list[Any]) -> None:
    samples = load_set(made.root, "meld")
    run = answer_set("model", samples, out=tmp_path / "new" / "a.jsonl", model_name="m")
    assert run.new == 7 and len(asked) == 7
    assert asked[0].prompt == f'The person says: "Well, hello" {answering.QUESTION}'
    assert asked[2].prompt == answering.QUESTION
    rows = [json.loads(line) for line in run.path.read_text().splitlines()]
    assert rows[0]["run"] | {"question": ""} == {
        "set": "meld", "model": "m", "method": "plain", "settings": {}, "frames": 1, "faces": False, "subtitle": True,
        "question": "", "max_new_tokens": 32,
    }  # fmt: skip
    assert rows[1] == {
        "name": "meld_0000",
        "answer": "happy, red 200",
        "seen": {"kind": "frames", "places": [1], "total": 3, "source": "subvideo/meld_0000"},
    }
    found = read_answers(run.path)
    assert found.key == "meld" and found.run == run.run
    assert score_answers(samples, found, mapping="direct").join.matched == 7


def test_a_stopped_run_goes_on_and_equals_an_unbroken_one(made: Made, tmp_path: Path, asked: list[Any]) -> None:
    samples = load_set(made.root, "meld")
    whole = answer_set("model", samples, out=tmp_path / "whole.jsonl", model_name="m", batch_size=2)
    asked.clear()
    path = tmp_path / "part.jsonl"
    with pytest.raises(KeyboardInterrupt):
        answer_set("stops", samples, out=path, model_name="m", batch_size=2)
    with path.open("a") as file:
        file.write('{"name": "meld_0002", "ans')
    asked.clear()
    rest = answer_set("model", samples, out=path, model_name="m", batch_size=2)
    assert rest.new == 5 and len(asked) == 5
    assert path.read_text() == whole.path.read_text()
    again = answer_set("model", samples, out=path, model_name="m", batch_size=2)
    assert again.new == 0 and again.values == whole.values


def test_a_file_of_other_settings_is_not_continued(made: Made, tmp_path: Path, asked: list[Any]) -> None:
    samples = load_set(made.root, "meld").samples[:2]
    answer_set("model", samples, out=tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"another run: \{'frames': 1\} instead of \{'frames': 2\}"):
        answer_set("model", samples, out=tmp_path / "a.jsonl", frames=2)
    (tmp_path / "b.jsonl").write_text('{"name": "x", "answer": "y"}\n')
    with pytest.raises(ValueError, match="no settings"):
        answer_set("model", samples, out=tmp_path / "b.jsonl")


def test_several_frames_are_asked_one_by_one_and_faces_come_as_faces(
    made: Made, tmp_path: Path, asked: list[Any]
) -> None:
    samples = load_set(made.root, "mer2023").samples[1:3]
    run = answer_set("model", samples, out=tmp_path / "a.jsonl", frames=3, batch_size=2)
    assert run.values["mer2023_0001"] == "happy, red 0\nhappy, red 200\nhappy, red 0"
    faces = answer_set("model", samples, out=tmp_path / "b.jsonl", faces=True, subtitle=False)
    assert asked[-1].picture.getpixel((0, 0)) == (0, 4, 250) and "says" not in asked[-1].prompt
    assert json.loads(faces.path.read_text().splitlines()[1])["seen"]["kind"] == "faces"


def test_samples_without_pictures_are_listed_before_any_is_asked_or_left_out(
    own: Made, tmp_path: Path, asked: list[Any]
) -> None:
    for name in ("meld_0001", "meld_0004"):
        (place_of(own, "meld") / "subvideo" / name).rename(tmp_path / name)
    samples = load_set(own.root, "meld")
    with pytest.raises(FileNotFoundError, match='2 of 7 samples.*meld_0001, meld_0004.*tried.*missing="skip"'):
        answer_set("model", samples, out=tmp_path / "a.jsonl")
    assert not asked and not (tmp_path / "a.jsonl").exists()
    run = answer_set("model", samples, out=tmp_path / "a.jsonl", missing="skip")
    assert run.left_out == ("meld_0001", "meld_0004") and run.new == 5


def test_bad_arguments_are_refused(made: Made, tmp_path: Path) -> None:
    meld, sims = load_set(made.root, "meld").samples, load_set(made.root, "sims").samples
    for samples, options, told in [
        ((), {}, "No samples"),
        ((*meld, *sims), {}, "these samples are of meld, sims"),
        ((meld[0], meld[0]), {}, "came twice: meld_0000"),
        (meld, {"frames": 0}, "frames=0"),
        (meld, {"batch_size": 0}, "batch_size=0"),
        (meld, {"missing": "drop"}, "missing='drop'"),
    ]:
        with pytest.raises(ValueError, match=told):
            answer_set("model", samples, out=tmp_path / "a.jsonl", **options)


def test_a_full_disk_says_how_to_go_on() -> None:
    # A device of Linux on which every write finds no space.
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("there is no /dev/full here")
    lines = Lines(full, {"set": "meld"})
    with pytest.raises(OSError, match="is full; the answers in it are kept. Free some space and run again") as error:
        lines.add([{"name": "a"}])
    assert error.value.errno == errno.ENOSPC and lines.rows == []


@pytest.mark.slow
def test_the_command_answers_with_an_embedded_model_under_a_saved_circuit(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from veena_lens import cli
    from veena_lens.interventions import Circuit, Steer
    from veena_lens.model.model import HookedVLM

    width = HookedVLM.from_pretrained("tiny-llava-emotion").cfg.d_model
    circuit = Circuit([Steer(layer=3, vector=torch.ones(width), alpha=3.0)], name="push")
    circuit.save(tmp_path / "c.safetensors")
    words = ["mer-unibench", "answer", str(made.root), "--model", "tiny-llava-emotion", "--set", "sims"]
    words += ["--max-new-tokens", "4", "--no-subtitle"]
    for name, extra in (("plain", []), ("steered", ["--circuit", str(tmp_path / "c.safetensors")])):
        assert cli.main([*words, "--out", str(tmp_path / f"{name}.jsonl"), *extra]) == 0
    assert "6 answers, 6 of them new" in capsys.readouterr().out
    plain, steered = (read_answers(tmp_path / f"{name}.jsonl") for name in ("plain", "steered"))
    assert plain.values != steered.values and len(plain.values) == 6
    assert steered.run is not None and steered.run["settings"]["circuit"] == "c.safetensors"
