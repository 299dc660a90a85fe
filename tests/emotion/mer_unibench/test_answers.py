"""Answer files of every format, scored by hand-computed values, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.emotion.mer_unibench.synthetic import Made, names_of, place_of, truths_of
from veena_lens.emotion.mer_unibench import (
    SETS,
    benchmark_mean,
    find_set,
    load_set,
    read_answers,
    score_answers,
)
from veena_lens.emotion.mer_unibench.answers import answer_files, set_in_path
from veena_lens.emotion.mer_unibench.scoring import join

pytestmark = pytest.mark.filterwarnings("ignore:.*published test part")


def _stem(made: Made, key: str, ending: str = "") -> Path:
    return made.output / f"results-{key}" / "run_a" / f"stem{ending}.npz"


def test_a_raw_file_gives_way_to_the_extracted_one_beside_it_and_says_so(made: Made) -> None:
    found = read_answers(_stem(made, "meld"))
    assert found.content == "labels" and found.key == "meld"
    assert found.notes == ("read stem-openset.npz in place of the raw answers beside it",)
    raw = read_answers(_stem(made, "meld"), beside=False)
    assert raw.content == "raw" and raw.values["meld_0000"] == "The person looks anger."
    assert all(type(name) is str for name in raw.values)
    assert read_answers(_stem(made, "sims"), sentiment=True).content == "sentiment"
    assert read_answers(_stem(made, "sims")).content == "labels"


def test_classes_are_scored_as_by_hand_under_both_mappings(made: Made) -> None:
    loaded = load_set(made.root, "mer2023")
    found = read_answers(_stem(made, "mer2023"))
    official = score_answers(loaded, found, missing="empty")
    # Truths worried happy neutral angry surprise sad; right are 0, 2 and 4. Officially neutral takes no part, and
    # surprise is on three of the five wheels: 2 of 5 there, 1 of 4 elsewhere.
    assert official.counted == (5, 5, 4, 4, 5)
    assert official.percent == pytest.approx(100 * (3 * 2 / 5 + 2 * 1 / 4) / 5)
    direct = score_answers(loaded, found, mapping="direct", missing="empty")
    assert direct.counted == (6, 6, 5, 5, 6)
    assert direct.percent == pytest.approx(100 * (3 * 3 / 6 + 2 * 2 / 5) / 5)
    assert direct.join.without_answer == ("mer2023_0005",)
    assert direct.join.without_sample == ("no_such_clip",)


def test_open_labels_are_scored_as_by_hand(made: Made) -> None:
    score = score_answers(
        load_set(made.root, "ovmerdplus"), read_answers(_stem(made, "ovmerdplus")), mapping="direct", missing="empty"
    )
    # Right are 0, 2 and 4; the surprised one (5, unanswered) is off two wheels; on Willcox's, bored lies with sad (1).
    assert score.counted == (6, 6, 5, 5, 6)
    assert score.metric == "F_s"
    assert score.percent == pytest.approx(100 * (3 / 6 + 3 / 6 + 4 / 5 + 3 / 5 + 3 / 6) / 5)
    assert set(score.details) == {"Precision_s", "Recall_s"}


def test_sentiment_is_scored_as_by_hand_and_a_stray_word_is_not_positive(made: Made) -> None:
    found = read_answers(_stem(made, "cmumosi"), sentiment=True)
    score = score_answers(load_set(made.root, "cmumosi"), found, missing="empty")
    # Truths + - (0) + - +, said + + (mixed) - neutral and nothing: 2 of 5 right, F1 of both classes 2/5.
    assert score.percent == pytest.approx(40.0)
    assert score.details["ACC"] == pytest.approx(40.0)
    assert score.counted == (5,)
    assert score.mapping == ""


def test_labels_become_a_sentiment_by_valence_or_by_a_judge(made: Made) -> None:
    loaded = load_set(made.root, "cmumosi")
    labels = read_answers(_stem(made, "cmumosi"))
    # [happy] is positive, [joyful, sad] is not, [sad] is not, [] is not: of + - + - + right are 0, 1 and 4.
    by_valence = score_answers(loaded, labels, missing="empty")
    assert by_valence.details["ACC"] == pytest.approx(60.0)
    judged = score_answers(loaded, labels, judge=lambda found: "positive", missing="empty")
    assert judged.details["ACC"] == pytest.approx(40.0)


def test_raw_texts_go_through_the_extractor(made: Made) -> None:
    loaded = load_set(made.root, "iemocap")
    raw = read_answers(_stem(made, "iemocapfour"), beside=False)
    labels = read_answers(_stem(made, "iemocapfour"))
    for mapping in ("official", "direct"):
        ours = score_answers(loaded, raw, mapping=mapping, missing="empty")
        assert ours.percent == score_answers(loaded, labels, mapping=mapping, missing="empty").percent
    all_said = score_answers(
        loaded, raw, mapping="direct", missing="empty", extractor=lambda text: ["happy", "sad", "anger", "neutral"]
    )
    assert all_said.percent == pytest.approx(100 * 5 / 6)


def test_a_missing_answer_is_an_error_that_names_it(made: Made) -> None:
    with pytest.raises(ValueError, match="1 of 6 samples have no prediction: 'sims_0005'"):
        score_answers(load_set(made.root, "sims"), read_answers(_stem(made, "sims"), sentiment=True))


def test_another_set_s_answers_are_refused(made: Made) -> None:
    loaded = load_set(made.root, "sims")
    with pytest.raises(ValueError, match="holds answers of meld, not of sims"):
        score_answers(loaded, read_answers(_stem(made, "meld")))
    with pytest.raises(ValueError, match="None of the 1 answers .*'x'.*'sims_0000'"):
        score_answers(loaded, {"x": "happy"})


def test_means_say_how_many_of_nine_and_which_are_missing(made: Made) -> None:
    scores = [
        score_answers(load_set(made.root, key), read_answers(_stem(made, key), sentiment=kind), missing="empty")
        for key, kind in (("sims", True), ("mer2023", False))
    ]
    mean = benchmark_mean(scores)
    assert mean.percent == pytest.approx((40 + 34) / 2)
    assert mean.keys == ("mer2023", "sims") and len(mean.missing) == 7
    assert "mean over 2 of 9 sets (official): 37.00; missing: ovmerdplus" in repr(mean)
    with pytest.raises(ValueError, match="sims came twice"):
        benchmark_mean([scores[0], scores[0]])
    with pytest.raises(ValueError, match="there is none"):
        benchmark_mean([scores[1]], mapping="direct")


def test_csv_folder_and_json_lines_give_the_same_answers(tmp_path: Path) -> None:
    values = {"a": "Happy, and \u201cglad\u201d", "-b": "[sad]"}
    (tmp_path / "raw.csv").write_text('name,reason\na,"Happy, and \u201cglad\u201d"\n-b,[sad]\n', encoding="utf-8")
    (tmp_path / "labels.csv").write_text("name,openset\na,\"['x', y]\"\n")
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, value in values.items():
        np.save(folder / f"{name}.npy", np.array(value))
    lines = [{"run": {"set": "MELD"}}, *({"name": name, "answer": value} for name, value in values.items())]
    (tmp_path / "ours.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"name": "cut of')
    for name in ("raw.csv", "texts", "ours.jsonl"):
        found = read_answers(tmp_path / name)
        assert (dict(found.values), found.content) == (values, "raw")
    assert read_answers(tmp_path / "ours.jsonl").key == "meld"
    assert read_answers(tmp_path / "labels.csv").content == "labels"
    (tmp_path / "labels.jsonl").write_text('{"name": "a", "labels": ["happy", "sad"]}\n')
    assert read_answers(tmp_path / "labels.jsonl").values == {"a": "[happy, sad]"}


def test_files_of_no_known_format_are_refused_with_the_formats(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", other=np.array(1))
    np.savez(tmp_path / "b.npz", filenames=np.array(["a"]), fileitems=np.array(["x", "y"]))
    (tmp_path / "a.csv").write_text("name,words\n")
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.jsonl").write_text('{"name": "a"}\n')
    (tmp_path / "b.jsonl").write_text('{"name": "a", "answer": "x"}\nbroken\n{"name": "b", "answer": "x"}\n')
    (tmp_path / "c.jsonl").write_text("[1]\n")
    (tmp_path / "d.jsonl").write_text("")
    (tmp_path / "empty").mkdir()
    for name, told in {
        "a.npz": "holds other; expected an npz with name2reason",
        "b.npz": r"filenames \(1,\) and fileitems \(2,\)",
        "a.csv": "no column reason; its columns: name, words",
        "a.txt": "is no answer file; expected",
        "a.jsonl": "line 1: expected name and answer",
        "b.jsonl": "line 2 is not JSON",
        "c.jsonl": "line 1 is not a JSON object",
        "d.jsonl": "holds no answer",
        "empty": "holds no <name>.npy",
    }.items():
        with pytest.raises(ValueError, match=told):
            read_answers(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no answers at"):
        read_answers(tmp_path / "nowhere.npz")


def test_a_tree_of_answers_gives_one_file_a_stem(made: Made) -> None:
    files = answer_files(made.output)
    assert len(files) == 9 and {path.name for path in files} == {"stem.npz"}
    assert {set_in_path(path) for path in files} == {info.key for info in SETS}


def test_join_counts_each_side(made: Made) -> None:
    joined = join(["a", "b"], ["b", "c", "d"])
    assert (joined.matched, joined.without_answer, joined.without_sample) == (1, ("a",), ("c", "d"))
    assert repr(joined) == "1 joined, 1 samples without an answer (a), 2 answers without a sample (c, d)"


@pytest.mark.parametrize("key", [info.key for info in SETS])
def test_true_answers_score_a_hundred_on_every_set(made: Made, key: str) -> None:
    info = find_set(key)
    truths = truths_of(info)
    if info.kind == "sentiment":
        said = {name: "joyful" if value > 0 else "gloomy" for name, value in truths.items()}
    else:
        said = {name: value for name, value in zip(names_of(info), truths.values())}
    assert place_of(made, key).is_dir()
    assert score_answers(load_set(made.root, key), said, mapping="direct").percent == pytest.approx(100.0)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{"name": "a", "answer": "x"}\n{"name": "a", "answer": "y"}\n'),
        ("a.csv", "name,reason\na,x\na,y\n"),
    ],
)
def test_two_answers_of_one_name_are_refused(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name}: two answers of 'a'; keep one"):
        read_answers(tmp_path / name)


def test_answers_that_are_no_texts_are_refused(tmp_path: Path) -> None:
    for value in ({"a": 3}, {"a": ["x"]}, {3: "x"}):
        np.savez(tmp_path / "a.npz", name2reason=np.array(value, dtype=object))
        with pytest.raises(ValueError, match="names and answers must be texts"):
            read_answers(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", filenames=np.array(["a", "a"]), fileitems=np.array(["[x]", "[y]"]))
    with pytest.raises(ValueError, match="two answers of 'a'"):
        read_answers(tmp_path / "b.npz")
