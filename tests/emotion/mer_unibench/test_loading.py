"""The nine sets from disk: truths, order, subtitles, alternatives, counts, and every refusal."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.emotion.mer_unibench.synthetic import Made, names_of, place_of, write_labels
from veena_lens.emotion.mer_unibench import SETS, check_root, find_set, load_benchmark, load_set
from veena_lens.emotion.mer_unibench.archives import read_array, read_dict

KEYS = [info.key for info in SETS]
few = pytest.mark.filterwarnings("ignore:.*published test part")


@few
@pytest.mark.parametrize("key", KEYS)
def test_truths_come_in_the_file_s_order_with_the_set_s_words(made: Made, key: str) -> None:
    loaded = load_set(made.root, key)
    assert loaded.truths == made.truths[key] | {}
    if key != "ovmerdplus":
        assert list(loaded.truths) == names_of(loaded.info)
    assert all(type(value) in (str, float) for value in loaded.truths.values())


@few
def test_ov_merd_takes_the_names_of_the_subtitle_file_and_counts_empty_labels_as_neutral(own: Made) -> None:
    path = place_of(own, "ovmerdplus") / "subtitle_eng.csv"
    path.write_text("name,sentence\novmerdplus_0003,x\nunlabelled,y\novmerdplus_0000,z\n")
    loaded = load_set(own.root, "OVMERDPlus")
    assert loaded.truths == {"ovmerdplus_0003": "neutral", "ovmerdplus_0000": "['happy', 'calm']"}
    assert any("'unlabelled'" in note for note in loaded.notes)


@few
def test_subtitles_keep_commas_take_the_last_row_and_are_empty_where_lost(made: Made) -> None:
    said = [sample.subtitle for sample in load_set(made.root, "meld")]
    assert said == ["Well, hello", "said twice", "", "line 3", "line 4", "line 5", ""]
    assert any("2 samples have no subtitle" in note for note in load_set(made.root, "meld").notes)
    assert load_set(made.root, "mer2024").samples[0].subtitle == "Well, hello"


@few
def test_a_set_without_a_subtitle_file_says_so(own: Made) -> None:
    (place_of(own, "sims") / "transcription-engchi-polish.csv").unlink()
    loaded = load_set(own.root, "sims")
    assert {sample.subtitle for sample in loaded} == {""}
    assert any("no subtitle file transcription-engchi-polish.csv" in note for note in loaded.notes)


@few
def test_absent_sets_are_named_and_overrides_found(own: Made, tmp_path: Path) -> None:
    shutil.move(place_of(own, "meld"), tmp_path / "elsewhere")
    found = load_benchmark(own.root)
    assert found.absent == ("meld",) and len(found.sets) == 8
    assert len(load_set(own.root, "meld", overrides={"MELD": tmp_path / "elsewhere"})) == 7
    with pytest.raises(FileNotFoundError, match="meld-process and meld-dataset.*declare-lab/MELD"):
        load_set(own.root, "meld")
    with pytest.raises(FileNotFoundError, match="given for 'meld' does not exist"):
        load_set(own.root, "meld", overrides={"meld": tmp_path / "nowhere"})


def test_a_root_that_is_none_is_named_with_the_folders_looked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.*ovmerdplus-process.*simsv2-process"):
        load_benchmark(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no set.*iemocap-process"):
        load_benchmark(tmp_path)


def test_another_count_is_a_warning_and_with_strict_an_error(made: Made) -> None:
    with pytest.warns(UserWarning, match="6 samples of CMU-MOSI.*has 686"):
        load_set(made.root, "mosi")
    with pytest.raises(ValueError, match="6 samples of CMU-MOSI.*has 686.*strict=True"):
        load_set(made.root, "mosi", strict=True)


@few
def test_mer2024_with_neutral_alone_is_no_label_file(own: Made) -> None:
    info = find_set("mer2024")
    write_labels(place_of(own, "mer2024"), info, ["neutral"] * 6)
    with pytest.warns(UserWarning, match="holds no labels"):
        load_set(own.root, "mer2024")


def test_a_lost_label_file_names_the_array_and_what_is_there(own: Made) -> None:
    place = place_of(own, "iemocapfour")
    (place / "label_4way.npz").rename(place / "label_6way.npz")
    with pytest.raises(FileNotFoundError, match="'whole_corpus'.*label_6way.npz with whole_corpus.*sail.usc.edu"):
        load_set(own.root, "iemocap")
    np.savez(place / "label_4way.npz", other=np.array(1))
    with pytest.raises(ValueError, match="no array 'whole_corpus'.*it has: other"):
        load_set(own.root, "iemocap")


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("meld", 7, r"'meld_0000' is 7; MELD has 0 to 6 \(anger"),
        ("meld", True, "is True"),
        ("meld", "joy", "is 'joy'"),
        ("cmumosi", 4.0, r"'cmumosi_0000' is 4.0.*\[-3, 3\]"),
        ("sims", 1.5, r"\[-1, 1\]"),
        ("cmumosi", float("nan"), "nan"),
        ("mer2023", "joy", "one of worried, happy"),
        ("mer2023", 1, "one of worried"),
    ],
)
def test_a_value_that_the_set_does_not_have_is_refused(own: Made, key: str, value: Any, told: str) -> None:
    info = find_set(key)
    values = [value, *list(own.truths[key].values())[1:]]
    if info.integers:
        values = [value, 1, 2, 3, 4, 5, 6]
    write_labels(place_of(own, key), info, values)
    with pytest.raises(ValueError, match=told):
        load_set(own.root, key)


@pytest.mark.parametrize("name", ["../x", "a/b", "a\\b", "", "..", "x\0"])
def test_a_name_that_leaves_its_folder_is_refused(own: Made, name: str) -> None:
    np.savez(place_of(own, "meld") / "label.npz", test_corpus=np.array({name: {"emo": 1}}, dtype=object))
    with pytest.raises(ValueError, match="is refused: names become file names"):
        load_set(own.root, "meld")


def test_a_label_without_its_field_is_refused(own: Made) -> None:
    np.savez(place_of(own, "meld") / "label.npz", test_corpus=np.array({"a": {"val": 1}}, dtype=object))
    with pytest.raises(ValueError, match="'a' has no field 'emo'"):
        load_set(own.root, "meld")


class _Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("echo never",)


def test_a_pickle_that_names_a_function_is_refused(own: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    path = place_of(own, "meld") / "label.npz"
    np.savez(path, test_corpus=np.array({"a": _Evil()}, dtype=object))
    monkeypatch.setattr(os, "system", lambda command: pytest.fail("the pickle ran"))
    with pytest.raises(ValueError, match=r"names (posix|nt|os)\.system"):
        load_set(own.root, "meld")


def test_an_array_of_another_rank_is_refused(own: Made) -> None:
    np.savez(place_of(own, "meld") / "label.npz", test_corpus=np.array([{"a": 1}, {"b": 2}], dtype=object))
    with pytest.raises(ValueError, match=r"0-dimensional object array, found shape \(2,\)"):
        load_set(own.root, "meld")


def test_damaged_files_are_named(own: Made) -> None:
    path = place_of(own, "meld") / "label.npz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is no npz file"):
        load_set(own.root, "meld")
    csv = place_of(own, "ovmerdplus") / "ovlabel.csv"
    csv.write_bytes(b"name,openset\na,\xff\n")
    with pytest.raises(ValueError, match="ovlabel.csv cannot be read as a UTF-8 csv"):
        load_set(own.root, "ovmerdplus")
    csv.write_text("name,labels\n")
    with pytest.raises(ValueError, match="no column openset; its columns: name, labels"):
        load_set(own.root, "ovmerdplus")


def test_restricted_reader_equals_numpy_on_objects_scalars_and_texts(tmp_path: Path) -> None:
    inside = {np.str_("k"): {"a": np.float32(1.5), "b": np.int64(3), "c": np.arange(3)}, "t": "x", "n": None}
    path = tmp_path / "a.npz"
    np.savez(path, objects=np.array(inside, dtype=object), texts=np.array(["a", "bc"]))
    found = read_dict(path, "objects")
    assert found["k"]["a"] == 1.5 and found["k"]["b"] == 3 and list(found["k"]["c"]) == [0, 1, 2]
    assert list(read_array(path, "texts")) == ["a", "bc"]
    with pytest.raises(ValueError, match="no array 'lost'; it has: objects, texts"):
        read_array(path, "lost")


def test_sets_are_found_by_key_and_title() -> None:
    assert {find_set(info.key.upper()).key for info in SETS} == set(KEYS)
    assert find_set("CMU-MOSEI").key == "cmumosei"
    with pytest.raises(ValueError, match="No set 'mleld'.*near: meld"):
        find_set("mleld")


def _lines(made: Made) -> Iterator[str]:
    return iter(repr(check_root(made.root)).splitlines())


def test_check_prints_a_line_a_set_with_counts(own: Made) -> None:
    shutil.rmtree(place_of(own, "meld"))
    (place_of(own, "sims") / "label.npz").unlink()
    shutil.rmtree(place_of(own, "simsv2") / "video" / "simsv2_0002")
    found = {line.split()[0]: line for line in _lines(own)}
    assert "absent" in found["meld"]
    assert "partly" in found["sims"] and "0 label" in found["sims"]
    assert "6 label, 4 subtitle, 5 video, 0 faces" in found["simsv2"]
    text = repr(check_root(own.root))
    assert "'simsv2_0002' first" in text and "declare-lab/MELD" in text
    assert "7 of 9 sets can be scored; not: meld, sims" in text


def test_a_complete_set_is_found(own: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from veena_lens.emotion.mer_unibench import data_sets, loading, scoring

    small = tuple(replace(info, count=7 if info.key == "meld" else 6) for info in SETS)
    for module in (scoring, loading, data_sets):
        monkeypatch.setattr(module, "SETS", small)
    assert [check.state for check in check_root(own.root).checks] == ["found"] * 9
