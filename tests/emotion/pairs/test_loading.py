"""Pairs: what a folder, records and datasets give, what is refused, how sets are narrowed, divided and stored."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from veena_lens.emotion.pairs.loading import (
    Example,
    PairProblems,
    PairSet,
    load_pairs,
    pairs_from_dataset,
    pairs_from_folders,
    pairs_from_records,
    save_pairs,
    write_manifest,
)


def picture(shade: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new("RGB", size, (shade, 2 * shade % 256, 0))


def records(people: int = 3, emotions: tuple[str, ...] = ("happy", "sad", "neutral")) -> list[dict[str, Any]]:
    """Every person with every emotion, one scene a person, two styles in turn."""
    return [
        {
            "picture": picture(16 * person + turn),
            "emotion": emotion,
            "pair": f"scene-{person}",
            "identity": f"person-{person}",
            "style": ("ink", "chalk")[person % 2],
            "split": "development",
        }
        for person in range(people)
        for turn, emotion in enumerate(emotions)
    ]


@pytest.fixture(scope="module")
def embedded() -> PairSet:
    return load_pairs()


def refused(given: list[dict[str, Any]]) -> tuple[str, ...]:
    with pytest.raises(PairProblems) as caught:
        pairs_from_records(given)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


# --- the embedded images ---------------------------------------------------------------------------------


def test_embedded_pictures_give_a_pair_for_every_emotional_twin(embedded: PairSet) -> None:
    development = embedded.select(split="development")
    assert len(development) == 30 * 7 and len(development.neutrals) == 30 and not development.singles
    assert {e.style for e in embedded.singles} == {"micah", "emoji"}
    assert len(embedded.examples) == 404
    for pair in embedded:
        assert pair.emotional.identity == pair.neutral.identity and pair.neutral.emotion == "neutral" != pair.emotion
        assert pair.emotional.prompt == pair.neutral.prompt and pair.emotional.picture != pair.neutral.picture


def test_context_of_the_emotional_picture_is_asked_of_its_twin_too(embedded: PairSet) -> None:
    conflicts = embedded.select(split="development", condition="conflict")
    assert len(conflicts) == 6 * 7 and {p.emotional.strength for p in conflicts} == {"weak", "plain", "strong"}
    for pair in conflicts:
        assert pair.neutral.context == pair.emotional.context != None  # noqa: E711
        assert pair.emotional.prompt == f"{pair.emotional.context} {pair.emotional.question}"
    bare = conflicts.without_context()
    assert len(bare) == len(conflicts) and all(p.emotional.prompt == p.emotional.question for p in bare)


def test_saved_set_loads_as_the_same_set(embedded: PairSet, tmp_path: Path) -> None:
    some = embedded.select(split="test").sample(9, seed=1)
    save_pairs(some, tmp_path / "pairs")
    again = load_pairs(tmp_path / "pairs")
    assert again.fingerprint == some.fingerprint
    assert [p.emotional.record() for p in again] == [p.emotional.record() for p in some]


def test_fingerprint_follows_pictures_and_words_and_not_their_place(embedded: PairSet, tmp_path: Path) -> None:
    some = embedded.select(split="test").sample(4)
    save_pairs(some, tmp_path)
    assert some.asked("who is it?").fingerprint != some.fingerprint == load_pairs(tmp_path).fingerprint
    pair = load_pairs(tmp_path)[0]
    changed = pair.emotional.open()
    changed.putpixel((0, 0), (1, 2, 3))
    changed.save(pair.emotional.picture)
    assert load_pairs(tmp_path).fingerprint != some.fingerprint


def test_repr_says_how_many_of_what(embedded: PairSet) -> None:
    text = repr(embedded)
    assert "happy 46" in text and "development 240" in text and "conflict" in text and len(text.splitlines()) <= 10


# --- what is refused ---------------------------------------------------------------------------------------


def test_every_problem_is_listed_at_once_with_its_line(tmp_path: Path) -> None:
    lines = [r | {"file": f"{i}.png", "question": "how?"} for i, r in enumerate(records(4))]
    for line in lines:
        line.pop("picture").save(tmp_path / line["file"])
    (tmp_path / "0.png").write_bytes(b"no picture")
    (tmp_path / "4.png").unlink()
    picture(9, (8, 16)).save(tmp_path / "7.png")
    lines[11]["identity"] = "somebody else"
    lines.append(dict(lines[9]))
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(PairProblems) as caught:
        load_pairs(tmp_path)
    problems = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 5
    assert "line 1 (0.png): " in problems and "cannot be read" in problems
    assert "line 5 (4.png): No image at" in problems
    assert "line 8 (7.png): 8 x 16 pixels" in problems and "token grids" in problems
    assert "line 10 (9.png), line 13 (9.png): the same image, question and context." in problems
    assert "twins differ in identity" in problems and "'somebody else' (line 12 (11.png))" in problems


def test_unreadable_pictures_are_left_out_when_asked(tmp_path: Path) -> None:
    some = pairs_from_records(records(3))
    save_pairs(some, tmp_path)
    (tmp_path / "scene-0-happy.png").write_bytes(b"")
    (tmp_path / "scene-1-neutral.png").unlink()
    with pytest.warns(UserWarning, match=r"(?s)without 2 images.*scene-1-neutral"):
        kept = load_pairs(tmp_path, unreadable="skip")
    assert [(p.identity, p.emotion) for p in kept] == [("person-0", "sad"), ("person-2", "happy"), ("person-2", "sad")]
    assert len(kept.skipped) == 2 and "2 images skipped" in repr(kept)
    assert {(s.identity, s.emotion) for s in kept.singles} == {("person-1", "happy"), ("person-1", "sad")}


def test_scene_without_neutral_or_with_two_or_without_emotional_is_refused() -> None:
    given = records(4)
    given[2]["emotion"] = "angry"
    given[4]["emotion"] = "neutral"
    given = [*given[:6], given[8], *given[9:]]
    problems = refused(given)
    assert len(problems) == 3
    assert "pair 'scene-0' has no neutral image" in problems[0] and "record 0, record 1, record 2" in problems[0]
    assert "pair 'scene-1' has 2 neutral images" in problems[1]
    assert "pair 'scene-2' has a neutral image and no emotional one" in problems[2]


@pytest.mark.parametrize(
    ("change", "telling"),
    [
        ({"emotoin": "sad"}, "unknown field 'emotoin'; did you mean 'emotion'?"),
        ({"emotion": 3}, "emotion=3 must be text"),
        ({"picture": None}, "no image; give its file as `picture`"),
        ({"attributes": ["red"]}, "attributes=['red'] must be a dictionary"),
        ({"identity": 7}, "identity=7 must be text or null"),
        ({"context": "maybe."}, "context and context_emotion belong together"),
    ],
)
def test_wrong_field_is_named_with_its_record(change: dict[str, Any], telling: str) -> None:
    given = records(1)
    given[1] |= change
    assert any("record 1" in problem and telling in problem for problem in refused(given))


def test_emotion_that_no_wheel_covers_is_refused() -> None:
    with pytest.raises(PairProblems, match="record 1, record 4: no wheel has 'sad'"):
        pairs_from_records(records(2), wheels=_Knowing("happy"))
    with pytest.raises(PairProblems, match="'hapy'.*happy"):
        pairs_from_records(records(2, ("hapy", "neutral")))


class _Knowing:
    """Wheels that know these labels only."""

    def __init__(self, *known: str) -> None:
        self.known = known

    def require(self, labels: list[str]) -> None:
        for label in labels:
            if label not in self.known:
                raise ValueError(f"no wheel has {label!r}")


def test_missing_manifest_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="pairs_from_folders"):
        load_pairs(tmp_path)
    (tmp_path / "manifest.jsonl").write_text('{"file": \n[1]\n')
    with pytest.raises(PairProblems, match="(?s)line 1: no JSON.*line 2: no JSON"):
        load_pairs(tmp_path)


# --- narrowing, dividing, drawing ----------------------------------------------------------------------------


def test_select_narrows_pairs_neutrals_and_singles_and_refuses_unknown_labels(embedded: PairSet) -> None:
    happy = embedded.select(split="test", emotion=["happy", "neutral"])
    assert {e.emotion for e in happy.examples} == {"happy", "neutral"} and len(happy) == len(happy.neutrals) == 12
    assert embedded.select(style="micah").singles and not len(embedded.select(style="micah"))
    with pytest.raises(ValueError, match="emotion='hungry'.*'happy'"):
        embedded.select(emotion="hungry")


@given(people=st.integers(4, 12), seed=st.integers(0, 5), shares=st.sampled_from([(2, 1), (1, 1), (0.5, 0.25, 0.25)]))
def test_split_puts_nobody_in_two_parts_and_loses_nobody(people: int, seed: int, shares: tuple[float, ...]) -> None:
    whole = pairs_from_records(records(people))
    parts = whole.split(shares, seed)
    seen = [name for part in parts for name in part.identities]
    assert sorted(seen) == sorted(whole.identities) and len(seen) == len(set(seen))
    assert sum(map(len, parts)) == len(whole) and sum(len(p.examples) for p in parts) == len(whole.examples)
    assert [p.fingerprint for p in whole.split(shares, seed)] == [p.fingerprint for p in parts]


def test_split_refuses_empty_parts() -> None:
    with pytest.raises(ValueError, match="1 identities"):
        pairs_from_records(records(1)).split((1, 1))
    with pytest.raises(ValueError, match="positive"):
        pairs_from_records(records(2)).split((1, 0))


def test_parts_can_have_names() -> None:
    whole = pairs_from_records(records(6))
    named = whole.divide({"directions": 2, "validation": 1}, seed=3)
    assert list(named) == ["directions", "validation"] and [len(p.identities) for p in named.values()] == [4, 2]
    assert named["validation"].fingerprint == whole.split((2, 1), seed=3)[1].fingerprint


@given(n=st.integers(1, 14), seed=st.integers(0, 3))
def test_sample_is_balanced_and_repeatable(n: int, seed: int) -> None:
    whole = pairs_from_records(records(7))
    drawn = whole.sample(n, seed)
    counts = Counter(pair.emotion for pair in drawn)
    assert len(drawn) == n and max(counts.values()) - min(counts[e] for e in ("happy", "sad")) <= 1
    assert drawn.fingerprint == whole.sample(n, seed).fingerprint
    assert {e.pair for e in drawn.neutrals} == {p.emotional.pair for p in drawn}


def test_sample_takes_all_of_a_rare_emotion_and_refuses_too_many() -> None:
    rare = [r for r in records(4) if r["emotion"] != "sad" or r["pair"] == "scene-2"]
    whole = pairs_from_records(rare)
    assert Counter(p.emotion for p in whole.sample(4)) == {"happy": 3, "sad": 1}
    with pytest.raises(ValueError, match="has 5 pairs"):
        whole.sample(6)


def test_counts_add_up(embedded: PairSet) -> None:
    counts = embedded.counts("condition")
    assert counts.values.sum() == 404 and counts.select(emotion="happy", condition="conflict").values == 10
    with pytest.raises(ValueError, match="split, style"):
        embedded.counts("colour")


def test_swapped_pair_exchanges_the_pictures(embedded: PairSet) -> None:
    pair = embedded[0]
    turned = pair.swapped()
    assert turned.emotional.picture == pair.neutral.picture and turned.neutral.picture == pair.emotional.picture
    assert turned.emotion == pair.emotion and turned.swapped() == pair


# --- other sources -------------------------------------------------------------------------------------------


def test_folders_of_emotions_give_twins_by_name(tmp_path: Path) -> None:
    for emotion, shade in (("calm", 0), ("happy", 40), ("sad", 80)):
        (tmp_path / emotion).mkdir()
        for turn, name in enumerate(("anna-1", "anna-2", "ben-1")):
            ending = "jpg" if emotion == "calm" else "png"
            picture(shade + turn).save(tmp_path / emotion / f"{name}.{ending}")
    (tmp_path / "happy" / "notes.txt").write_text("no picture")
    pairs = pairs_from_folders(tmp_path, neutral="calm", identity=lambda name: name.split("-")[0], question="how?")
    assert [(p.emotion, p.identity) for p in pairs][:3] == [("happy", "anna"), ("happy", "anna"), ("happy", "ben")]
    assert len(pairs) == 6 and all(Path(p.neutral.picture).parent.name == "calm" for p in pairs)
    (tmp_path / "sad" / "ben-1.png").unlink()
    (tmp_path / "happy" / "ben-1.png").unlink()
    with pytest.raises(PairProblems, match="'ben-1' has a neutral image and no emotional one"):
        pairs_from_folders(tmp_path, neutral="calm")
    with pytest.raises(FileNotFoundError, match="named 'neutral'.*calm, happy, sad"):
        pairs_from_folders(tmp_path)


class _Label:
    names = ("happy", "sad", "none")

    def int2str(self, number: int) -> str:
        return self.names[number]


class _Rows(list[dict[str, Any]]):
    features = {"label": _Label()}


def test_dataset_columns_labels_and_undecoded_pictures_are_understood(tmp_path: Path) -> None:
    path = tmp_path / "one.png"
    picture(5).save(path)
    rows = _Rows(
        {"image": image, "label": label, "scene": 4, "noise": 1.5}
        for image, label in ((picture(3), 0), ({"bytes": None, "path": str(path)}, 1), (picture(7), 2))
    )
    columns = {"picture": "image", "emotion": "label", "pair": "scene"}
    pairs = pairs_from_dataset(rows, columns, neutral="none", folder=tmp_path / "kept")
    assert [p.emotion for p in pairs] == ["happy", "sad"] and pairs[0].emotional.pair == "4"
    assert all(isinstance(e.picture, (str, Path)) for e in pairs.examples)
    with pytest.raises(ValueError, match="no column 'photo', only image, label"):
        pairs_from_dataset(rows, {"picture": "photo"})
    with pytest.raises(ValueError, match="no field 'face'"):
        pairs_from_dataset(rows, {"face": "image"})


def test_real_dataset_of_hugging_face_gives_the_same_pairs() -> None:
    datasets = pytest.importorskip("datasets")
    given = records(2)
    names = ["happy", "sad", "neutral"]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=names), "pair": datasets.Value("string")}
    )
    table = {"image": [r["picture"] for r in given], "pair": [r["pair"] for r in given]}
    table["label"] = [names.index(r["emotion"]) for r in given]
    dataset = datasets.Dataset.from_dict(table, features=features)
    pairs = pairs_from_dataset(dataset, {"picture": "image", "emotion": "label"})
    assert [p.emotion for p in pairs] == ["happy", "sad"] * 2
    assert [p.emotional.open().tobytes() for p in pairs] == [
        r["picture"].tobytes() for r in given if r["emotion"] != "neutral"
    ]


def test_photographs_are_upright_in_memory_in_a_data_set_and_in_copies(tmp_path: Path) -> None:
    """Also one image that two records share: it stays one."""

    def photograph(shade: int) -> bytes:
        tag, file = Image.Exif(), io.BytesIO()
        tag[0x0112] = 6
        left = picture(shade, (8, 6))
        left.paste((255, 255, 255), (0, 0, 2, 6))
        left.save(file, "PNG", exif=tag)
        return file.getvalue()

    happy, calm = photograph(1), photograph(2)
    opened = {data: Image.open(io.BytesIO(data)) for data in (happy, calm)}
    (tmp_path / "given").mkdir()
    rows: list[list[Any]] = [[{"bytes": data, "path": "a.png"} for data in (happy, calm)], list(opened.values())]
    settings: tuple[dict[str, Any], ...] = ({}, {"folder": tmp_path / "given"})
    sets = [
        pairs_from_dataset(
            [{"picture": p, "emotion": e, "pair": "1"} for p, e in zip(row, emotions, strict=True)], **to
        )
        for row in rows
        for to in settings
        for emotions in (("happy", "neutral"),)
    ]
    shared = [{"picture": opened[happy], "emotion": "happy", "pair": "1", "question": q} for q in ("how?", "who?")]
    sets.append(pairs_from_records([*shared, {"picture": opened[calm], "emotion": "neutral", "pair": "1"}]))
    assert sets[-1][0].emotional.picture is sets[-1][1].emotional.picture
    expected = Image.open(io.BytesIO(happy)).transpose(Image.Transpose.ROTATE_270)
    for i, pairs in enumerate(sets):
        save_pairs(pairs, tmp_path / f"{i}")
        for found in (pairs, load_pairs(tmp_path / f"{i}")):
            image = found[0].emotional.open()
            assert image.size == (6, 8) and image.tobytes() == expected.tobytes()


def test_image_in_a_mode_that_its_format_lacks_is_written_in_rgb(tmp_path: Path) -> None:
    seen = [{"picture": picture(3).convert("CMYK"), "emotion": "happy", "pair": "1"}]
    seen += [{"picture": picture(5).convert("RGBA"), "file": "b.jpg", "emotion": "neutral", "pair": "1"}]
    save_pairs(pairs_from_dataset(seen, folder=tmp_path / "given"), tmp_path / "one")
    save_pairs(pairs_from_records(seen), tmp_path / "two")
    for folder in ("one", "two"):
        assert load_pairs(tmp_path / folder)[0].neutral.open().size == (8, 8)


def test_undecoded_bytes_that_are_no_image_are_listed(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"picture": {"bytes": b"no picture", "path": None}, "emotion": "happy", "pair": "1"}]
    rows += [{"picture": picture(5), "emotion": "neutral", "pair": "1"}]
    with pytest.raises(PairProblems, match="record 0: The image of 10 bytes cannot be read as an image"):
        pairs_from_dataset(rows, folder=tmp_path)


def test_lines_that_share_a_picture_store_it_once(tmp_path: Path) -> None:
    whole = pairs_from_records(records(2))
    told = [p.emotional.with_context("the person won.", "happy", "plain") for p in whole]
    both = PairSet(whole.pairs, whole.neutrals, (), "")
    save_pairs(both, tmp_path)
    lines = [
        *load_pairs(tmp_path).examples,
        *(Example(**{**vars(e), "file": f"{e.pair}-{e.emotion}.png"}) for e in told),
    ]
    write_manifest(lines, tmp_path / "manifest.jsonl")
    again = load_pairs(tmp_path)
    assert len(again) == 8 and len(list(tmp_path.glob("*.png"))) == 6
    assert [p.emotional.condition for p in again][4:] == ["consistent", "conflict"] * 2


@pytest.mark.parametrize("file", ["../outside.png", "/etc/hostname", "a/../../b.png", "a\0b.png"])
def test_images_outside_the_folder_of_their_manifest_are_refused(file: str, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    folder = tmp_path / "pairs"
    folder.mkdir()
    row = {"file": file, "emotion": "happy", "pair": "p", "question": "how?"}
    (folder / "manifest.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(PairProblems, match="does not lie in the folder of its manifest"):
        load_pairs(folder)


def test_separators_within_a_text_do_not_end_its_line(tmp_path: Path) -> None:
    for emotion in ("happy", "neutral"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{emotion}.png")
    asked = "how\u2028does\x85the\x0bperson feel?"
    rows = [
        {"file": f"{emotion}.png", "emotion": emotion, "pair": "p", "identity": "i", "question": asked}
        for emotion in ("happy", "neutral")
    ]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "manifest.jsonl").write_text(text + "\n", encoding="utf-8")
    assert {example.question for example in load_pairs(tmp_path).examples} == {asked}
