"""Wheels and lexicon: every word placed, the classes of the embedded models kept apart, the original's map exact."""

import csv
from pathlib import Path

import pytest

from tests.emotion.wheel_data import golden, needs_original, original
from veena_lens.emotion.words.lexicon import default_lexicon
from veena_lens.emotion.words.wheel import Wheel, direct_sector, official_sector
from veena_lens.emotion.words.wheels import EmotionWheels, sample_hit
from veena_lens.zoo.people import EMOTIONS, WORDS

WHEELS = EmotionWheels.default()
NUMBERS = range(1, 6)


def test_every_word_on_a_wheel_is_in_the_lexicon_and_every_wheel_names_its_source() -> None:
    assert len(WHEELS.wheels) == 5
    for wheel in WHEELS.wheels:
        assert len(wheel.source) > 20
        assert not {word for word in wheel.words if not WHEELS.basic(word)} - set(wheel.sectors)


@pytest.mark.parametrize("emotion", EMOTIONS)
def test_own_words_hit_fully_and_words_of_other_classes_not_at_all(emotion: str) -> None:
    for other, words in WORDS.items():
        for word in words.all:
            assert WHEELS.basic(word) == other
            hit = sample_hit(f"The person looks {word}.", emotion, WHEELS)
            assert hit == float(other == emotion), (word, emotion, hit)


def test_every_form_of_the_lexicon_hits_its_own_class_by_a_majority_and_no_other() -> None:
    for emotion in EMOTIONS:
        for other in default_lexicon().valence_of:
            for form in WHEELS.lexicon(other):
                hit = sample_hit([form], emotion, WHEELS)
                assert (hit > 0.5) == (other == emotion), (form, emotion, hit)


def test_lexicon_gives_forms_of_one_and_several_words() -> None:
    forms = WHEELS.lexicon("happy")
    assert {"happy", "happily", "joy", "over the moon"} <= set(forms)
    with pytest.raises(ValueError, match="'hungry' is no basic emotion.*happy"):
        WHEELS.lexicon("hungry")


def test_a_form_lies_where_its_base_word_lies() -> None:
    for form, base in default_lexicon().base_of.items():
        for k in NUMBERS:
            assert WHEELS.sector(form, k) == WHEELS.sector(base, k), (form, base, k)


def test_neutral_is_a_sector_of_the_direct_map_alone() -> None:
    assert [WHEELS.sector("composed", k) for k in NUMBERS] == ["neutral"] * 5
    assert [WHEELS.sector("neutral", k, mapping="official") for k in NUMBERS] == [""] * 5


def test_require_names_uncovered_labels_with_near_words() -> None:
    WHEELS.require(["happy", "neutral", "over the moon"])
    with pytest.raises(ValueError, match=r"'hapy' \(near: happy.*'qqq' \(near: none\).*Rename"):
        WHEELS.require(["sad", "hapy", "qqq"])


def test_wrong_wheel_level_and_mapping_are_refused() -> None:
    assert WHEELS.sector("furious", "willcox") == "mad"
    with pytest.raises(ValueError, match="No wheel 6; there are: 1 ekman"):
        WHEELS.sector("sad", wheel=6)
    with pytest.raises(ValueError, match="No wheel 0"):
        WHEELS.sector("sad", wheel=0)
    with pytest.raises(ValueError, match="level='level3'"):
        WHEELS.sector("sad", level="level3")
    with pytest.raises(ValueError, match="mapping='offical'"):
        WHEELS.sector("sad", mapping="offical")


def test_both_maps_by_hand() -> None:
    wheel = Wheel("w", {"joy": {"brave": ["bold"], "airy": []}, "fear": {"afraid": ["scared", "bold"]}})
    forms = {"fears": ("fearless", "fear"), "bolder": ("bold",)}
    synonyms = {"fearless": ("brave",), "fear": ("fear", "scared"), "bold": ("bold",)}
    assert official_sector(" Fears ", wheel, "level1", forms, synonyms) == "joy"
    assert direct_sector("fears", wheel, "level1", forms, synonyms) == "fear"
    # Listed twice: the last place wins; a sector's name goes to its alphabetically first word.
    assert official_sector("bolder", wheel, "level1", forms, synonyms) == "fear"
    assert wheel.tables["level2"] == {
        "joy": "airy", "airy": "airy", "brave": "brave", "bold": "afraid",
        "fear": "afraid", "afraid": "afraid", "scared": "afraid",
    }  # fmt: skip
    assert official_sector("scared", wheel, "level1", forms, synonyms) == ""
    assert direct_sector("scared", wheel, "level1", forms, synonyms) == "fear"


@needs_original
def test_the_original_word_table_is_exact() -> None:
    wheels = original()
    for word, wanted in golden()["word_table"].items():
        for k in NUMBERS:
            for level in ("level1", "level2"):
                assert wheels.sector(word, k, level, "official") == wanted[f"wheel{k}"][level], (word, k, level)


@needs_original
def test_the_direct_map_puts_fear_among_fears_and_changes_two_to_three_percent() -> None:
    wheels = original()
    assert [wheels.sector("fear", k, mapping="direct") for k in NUMBERS] == [
        "scared",
        "fearful",
        "scared",
        "fear",
        "scared",
    ]
    assert [wheels.sector("fear", k, mapping="official") for k in NUMBERS][1:] == [
        "happy",
        "joyful",
        "genius",
        "joyful",
    ]
    for k in NUMBERS:
        both = [(wheels.sector(f, k, mapping="official"), wheels.sector(f, k, mapping="direct")) for f in wheels.forms]
        mapped = [(a, b) for a, b in both if a or b]
        assert all(a and b for a, b in mapped)
        assert 0.015 < sum(a != b for a, b in mapped) / len(mapped) < 0.035


def _write_spreadsheets(folder: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl", reason="spreadsheets need the extra `wheels`")

    def save(name: str, rows: list[list[str | None]]) -> None:
        book = openpyxl.Workbook()
        for row in rows:
            book.active.append(row)
        book.save(folder / name)

    for k in range(1, 6):
        save(
            f"wheel{k}.xlsx",
            [
                ["level1", "level2", "level3"],
                [" Joy ", "Glad", "merry"],
                [None, None, "jolly"],
                ["fear", "afraid", "shy"],
            ],
        )
    names = [f"{kind}_run{k}" for k in range(1, 9) for kind in ("word", "synonym")]
    save("synonym.xlsx", [names, ["joy", "bliss, Merriment"] * 4 + ["fear", "bliss"] * 4])
    with (folder / "format.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["name", "format"], ["bliss", "bliss, blissful"], ["merry", "merrily"]])


def test_spreadsheets_are_read_with_blank_cells_and_united_runs(tmp_path: Path) -> None:
    _write_spreadsheets(tmp_path)
    wheels = EmotionWheels.from_affectgpt(tmp_path)
    assert wheels.wheels[0].sectors == {"joy": {"glad": ["merry", "jolly"]}, "fear": {"afraid": ["shy"]}}
    assert wheels.synonyms["bliss"] == ("fear", "joy")
    assert wheels.synonyms["merry"] == ("merry",)
    assert wheels.sector("Blissful", 5, mapping="official") == "fear"
    assert wheels.sector("merrily", 1) == "joy"


def test_a_folder_without_wheels_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"wheel1\.xlsx.*synonym\.xlsx.*format\.csv.*emotion_wheels\.json"):
        EmotionWheels.from_affectgpt(tmp_path)


def test_spreadsheets_without_the_reader_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from veena_lens.emotion.words import wheel as affectgpt

    for name in affectgpt.SPREADSHEETS:
        (tmp_path / name).write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "openpyxl", None)
    with pytest.raises(ImportError, match=r"veena-lens\[wheels\]"):
        EmotionWheels.from_affectgpt(tmp_path)


def test_imported_wheels_map_officially_unless_told_otherwise() -> None:
    imported = EmotionWheels(wheels=WHEELS.wheels, forms=WHEELS.forms, synonyms=WHEELS.synonyms, words=WHEELS.words)
    assert (imported.mapping, WHEELS.mapping) == ("official", "direct")
    for label in ("fear", "joyful", "neutral"):
        assert imported.sector(label, 1) == imported.sector(label, 1, mapping="official")
        assert WHEELS.sector(label, 1) == WHEELS.sector(label, 1, mapping="direct")
