"""Answering a set: what is asked, what is written, and how a stopped run goes on."""

import dataclasses
import errno
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.emotion.mer_unibench.synthetic import Made, place_of
from veena_lens.emotion.mer_unibench import answer_set, answering, load_set, read_answers, score_answers
from veena_lens.emotion.methods import PLAIN, Method
from veena_lens.fingerprints import digest
from veena_lens.interventions import BoostAttention
from veena_lens.json_lines import Lines

pytestmark = pytest.mark.filterwarnings("ignore:.*published test part")


class Log(list[Any]):
    """Every example asked, in order; `stops` breaks off in the second batch."""

    stops = False


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Log:
    """Return the examples asked, in order; the answer tells the image's red."""
    log = Log()

    def answers(model: Any, examples: Sequence[Any], method: Method, **options: Any) -> list[str]:
        assert len(examples) <= max(options["batch_size"], 3)
        log.extend(examples)
        if log.stops and len(log) > 2:
            raise KeyboardInterrupt
        return [f"happy, red {example.picture.getpixel((0, 0))[0]}" for example in examples]

    monkeypatch.setattr(answering, "generate_answers", answers)
    return log


def test_each_sample_is_asked_with_its_subtitle_and_middle_frame(made: Made, tmp_path: Path, asked: Log) -> None:
    samples = load_set(made.root, "meld")
    run = answer_set("model", samples, out=tmp_path / "new" / "a.jsonl", model_name="m")
    assert run.new == 7 and len(asked) == 7
    assert asked[0].prompt == f'The person says: "Well, hello" {answering.QUESTION}'
    assert asked[2].prompt == answering.QUESTION
    rows = [json.loads(line) for line in run.path.read_text().splitlines()]
    assert rows[0]["run"] | {"question": ""} == {
        "set": "meld", "model": "m", "method": "plain", "settings": {}, "frames": 1, "faces": False, "subtitle": True,
        "question": "", "max_new_tokens": 32, "weights": digest("model"), "edits": digest(PLAIN),
    }  # fmt: skip
    assert rows[1] | {"clip": "", "check": ""} == {
        "name": "meld_0000",
        "answer": "happy, red 200",
        "seen": {"kind": "frames", "places": [1], "total": 3, "source": "subvideo/meld_0000"},
        "clip": "",
        "check": "",
    }
    found = read_answers(run.path)
    assert found.key == "meld" and found.run == run.run
    assert score_answers(samples, found, mapping="direct").join.matched == 7


def test_a_stopped_run_goes_on_and_equals_an_unbroken_one(made: Made, tmp_path: Path, asked: Log) -> None:
    samples = load_set(made.root, "meld")
    whole = answer_set("model", samples, out=tmp_path / "whole.jsonl", model_name="m", batch_size=2)
    asked.clear()
    path = tmp_path / "part.jsonl"
    asked.stops = True
    with pytest.raises(KeyboardInterrupt):
        answer_set("model", samples, out=path, model_name="m", batch_size=2)
    asked.stops = False
    with path.open("a") as file:
        file.write('{"name": "meld_0002", "ans')
    asked.clear()
    rest = answer_set("model", samples, out=path, model_name="m", batch_size=2)
    assert rest.new == 5 and len(asked) == 5
    assert path.read_text() == whole.path.read_text()
    again = answer_set("model", samples, out=path, model_name="m", batch_size=2)
    assert again.new == 0 and again.values == whole.values


def test_a_file_of_other_settings_is_not_continued(made: Made, tmp_path: Path, asked: Log) -> None:
    samples = load_set(made.root, "meld").samples[:2]
    answer_set("model", samples, out=tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"another run: \{'frames': 1\} instead of \{'frames': 2\}"):
        answer_set("model", samples, out=tmp_path / "a.jsonl", frames=2)
    (tmp_path / "b.jsonl").write_text('{"name": "x", "answer": "y"}\n')
    with pytest.raises(ValueError, match="no settings"):
        answer_set("model", samples, out=tmp_path / "b.jsonl")


def test_answers_of_another_model_method_or_clip_are_not_taken(own: Made, tmp_path: Path, asked: Log) -> None:
    samples, path = load_set(own.root, "meld").samples[:3], tmp_path / "a.jsonl"
    answer_set("model", samples, out=path, model_name="m")
    edit = Method(name="plain", interventions=[BoostAttention(0, factor=2.0)])
    for model, more, differs in (("another", {}, "weights"), ("model", {"method": edit}, "edits")):
        with pytest.raises(ValueError, match=f"another run: .*'{differs}'"):
            answer_set(model, samples, out=path, model_name="m", **more)
    assert answer_set("model", samples, out=path, model_name="m").new == 0
    reworded = [dataclasses.replace(sample, subtitle="Another sentence") for sample in samples]
    with pytest.raises(ValueError, match="the answer of 'meld_0000' is about another clip than the one in .* Remove"):
        answer_set("model", reworded, out=path, model_name="m")
    shown = place_of(own, "meld") / "subvideo" / "meld_0001"
    for frame in shown.iterdir():
        frame.write_bytes((place_of(own, "meld") / "subvideo" / "meld_0000" / frame.name).read_bytes() + b"0")
    with pytest.raises(ValueError, match="the answer of 'meld_0001' is about another clip"):
        answer_set("model", samples, out=path, model_name="m")


def test_rows_that_were_changed_repeated_or_copied_are_named(own: Made, tmp_path: Path, asked: Log) -> None:
    samples, path = load_set(own.root, "meld").samples[:3], tmp_path / "a.jsonl"
    answer_set("model", samples, out=path, model_name="m")
    answer_set("model", samples, out=tmp_path / "b.jsonl", model_name="m", frames=2)
    whole, other = path.read_text(), (tmp_path / "b.jsonl").read_text().splitlines(keepends=True)
    lines = whole.splitlines(keepends=True)
    for text, told in (
        (whole.replace("happy, red 200", "sad, red 200", 1), "'meld_0000' is not as it was written"),
        (whole + lines[2], "'meld_0001' is there twice"),
        ("".join(lines[:3]) + other[3], "'meld_0002' is not as it was written"),
        (whole.replace("meld_0002", "meld_0009"), "'meld_0009' is not as it was written"),
        ("".join(lines[:2]) + '{"name": "meld_0001", "answer": "sad"}\n', "'meld_0001' is not as it was written"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"row of name {told}. Remove it to compute it again"):
            answer_set("model", samples, out=path, model_name="m")
    path.write_text("".join(lines[:3]))
    assert answer_set("model", samples, out=path, model_name="m").new == 1 and path.read_text() == whole


def test_two_runs_do_not_write_one_file(made: Made, tmp_path: Path, asked: Log) -> None:
    pytest.importorskip("fcntl")
    samples, path = load_set(made.root, "meld").samples[:2], tmp_path / "a.jsonl"
    with Lines(path, {"set": "meld"}).held(), pytest.raises(ValueError, match=r"Another run is writing .*a\.jsonl"):
        answer_set("model", samples, out=path, model_name="m")
    assert not asked and answer_set("model", samples, out=path, model_name="m").new == 2


def test_several_frames_are_asked_one_by_one_and_faces_come_as_faces(made: Made, tmp_path: Path, asked: Log) -> None:
    samples = load_set(made.root, "mer2023").samples[1:3]
    run = answer_set("model", samples, out=tmp_path / "a.jsonl", frames=3, batch_size=2)
    assert run.values["mer2023_0001"] == "happy, red 0\nhappy, red 200\nhappy, red 0"
    faces = answer_set("model", samples, out=tmp_path / "b.jsonl", faces=True, subtitle=False)
    assert asked[-1].picture.getpixel((0, 0)) == (0, 4, 250) and "says" not in asked[-1].prompt
    assert json.loads(faces.path.read_text().splitlines()[1])["seen"]["kind"] == "faces"


def test_samples_without_pictures_are_listed_before_any_is_asked_or_left_out(
    own: Made, tmp_path: Path, asked: Log
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
