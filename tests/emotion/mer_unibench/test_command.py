"""`veena-lens mer-unibench`: what it prints, and what it refuses in one line."""

import json
from pathlib import Path

import pytest

from tests.emotion.mer_unibench.synthetic import Made
from tests.emotion.wheel_data import FOLDER, needs_original
from veena_lens import cli


def _run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    code = cli.main(["mer-unibench", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def test_check_prints_nine_lines_and_a_summary(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _run(capsys, "check", made.root)
    assert (code, err) == (0, "")
    assert out.count("partly") == 9 and out.endswith("9 of 9 sets can be scored\n")


def test_score_of_a_tree_prints_both_mappings_and_their_means(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _run(capsys, "score", made.output, "--root", made.root, "--missing", "empty")
    assert (code, err) == (0, "")
    assert "mer2023 HIT (official) 34.00" in out and "mer2023 HIT (direct) 46.00" in out
    assert "sims WAF 40.00   ACC 40.00" in out and "1 answers without a sample (no_such_clip)" in out
    assert "run_a/stem: mean over 9 of 9 sets (official)" in out
    assert "for MER-UniBench's figures give --wheels FOLDER" in out


def test_score_of_one_file_counts_one_of_nine(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    path = made.output / "results-meld" / "run_a" / "stem.npz"
    code, out, _ = _run(capsys, "score", path, "--root", made.root, "--missing", "empty", "--mapping", "direct")
    assert code == 0 and "(official)" not in out
    assert "mean over 1 of 9 sets (direct)" in out and "missing: ovmerdplus, mer2023" in out


def test_our_own_files_of_two_methods_have_a_mean_each(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for method in ("plain", "circuit"):
        for key in ("meld", "sims"):
            rows = [{"run": {"set": key, "model": "m", "method": method}}]
            rows += [{"name": name, "answer": "He is angry"} for name in made.truths[key]]
            (tmp_path / f"{key}-{method}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = _run(capsys, "score", tmp_path, "--root", made.root, "--mapping", "direct")
    assert code == 0
    assert "m/plain: mean over 2 of 9 sets (direct)" in out and "m/circuit: mean over 2 of 9 sets (direct)" in out


@needs_original
def test_score_with_the_original_wheels_drops_disgust_on_two_of_five(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    path = made.output / "results-meld" / "run_a" / "stem.npz"
    words = ["score", path, "--root", made.root, "--missing", "empty", "--wheels", FOLDER, "--mapping", "official"]
    code, out, _ = _run(capsys, *words)
    assert code == 0
    # Neutral is on none; disgust is off wheels 3 and 5, surprise off wheel 5.
    assert "counted 6 6 5 6 4;" in out and "give --wheels" not in out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["check", "nowhere"], "does not exist: nowhere"),
        (["score", "nowhere.npz", "--root", "ROOT"], "no answers at nowhere.npz"),
        (["score", "OUT"], "needs the labels of the sets: give --root"),
        (["score", "OUT", "--root", "ROOT"], "samples have no prediction"),
        (["score", "FREE", "--root", "ROOT"], "does not tell its set"),
        (["score", "FREE", "--root", "ROOT", "--set", "mleld"], "near: meld"),
        (["score", "OUT", "--root", "ROOT", "--set", "meld"], "belongs to cmumosei, not to 'meld'"),
        (
            ["score", "FREE", "--root", "ROOT", "--set", "meld", "--wheels", "nowhere"],
            "no complete emotion wheels",
        ),
        (["check", "ROOT", "--folder", "meld"], "expected KEY=FOLDER"),
        (["answer", "ROOT", "--model", "no-such", "--set", "meld", "--out", "x", "--circuit", "no.st"], "No circuit"),
    ],
)
def test_bad_input_is_one_message(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    free = tmp_path / "free.csv"
    free.write_text("name,openset\nmeld_0000,[angry]\n")
    places = {"ROOT": made.root, "OUT": made.output, "FREE": free}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        with pytest.warns(UserWarning) if "answer" in words else _nothing():
            code, _out, err = _run(capsys, *(places.get(word, word) for word in words))
    assert code == 2 and told in err and "Traceback" not in err


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...
