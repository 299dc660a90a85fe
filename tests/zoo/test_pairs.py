"""Drawn pairs: nobody from training, twins that differ in the face, every condition, and a stop that costs nothing."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest

from tests.interrupting import stop_at
from veena_lens.emotion.pairs.loading import PairSet, load_pairs
from veena_lens.zoo import pairs as builder
from veena_lens.zoo.drawing import style_identities
from veena_lens.zoo.pairs import HELD_OUT, build_pairs, conditions, identity_choice, main
from veena_lens.zoo.people import SPLITS, identity


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> PairSet:
    return build_pairs(tmp_path_factory.mktemp("drawn"), "test", 2, progress=False)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("split", ["development", "test"])
def test_nobody_looks_like_a_training_identity(split: str) -> None:
    chosen = identity_choice("avataaars", split, 300)
    looks = {astuple(identity(number))[1:] for number in SPLITS["train"]}
    assert len(chosen) == 300 and not any(astuple(identity(number))[1:] in looks for number in chosen)
    other = identity_choice("avataaars", "test" if split == "development" else "development", 300)
    assert not set(chosen) & set(other)
    for style in ("adventurer", "toon-head", "big-smile"):
        assert not set(identity_choice(style, split, 999)) & set(style_identities(style, "train"))


def test_styles_and_splits_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="open-peeps does not belong to split 'development'"):
        identity_choice("open-peeps", "development", 1)
    with pytest.raises(ValueError, match="whose styles are open-peeps, micah"):
        identity_choice("avataaars", HELD_OUT, 1)
    with pytest.raises(ValueError, match="Unknown style 'manga'"):
        identity_choice("manga", "test", 1)
    with pytest.raises(ValueError, match="development, test"):
        identity_choice("avataaars", "train", 1)


def test_twins_differ_in_the_face_alone(drawn: PairSet) -> None:
    assert len(drawn) == 14 and len(drawn.neutrals) == 2 and set(drawn.emotions) == set(builder.EVENTS) - {"neutral"}
    for pair in drawn:
        changed = (np.array(pair.emotional.open()) != np.array(pair.neutral.open())).any(-1)
        rows, columns = changed.nonzero()
        assert changed.any() and columns.min() > 20 and columns.max() < 172 and rows.min() > 30
        assert pair.emotional.attributes["hair"] == pair.neutral.attributes["hair"]


def test_same_arguments_draw_the_same_and_a_stop_costs_nothing(
    drawn: PairSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Path(drawn[0].emotional.picture).parent
    calls = stop_at(monkeypatch, builder, "_draw", 2)
    with pytest.raises(KeyboardInterrupt):
        build_pairs(tmp_path, "test", 2, progress=False)
    assert not (tmp_path / "manifest.jsonl").exists()
    build_pairs(tmp_path, "test", 2, progress=False)
    assert len(calls) == 3 and bytes_of(tmp_path) == bytes_of(whole)


def test_folder_of_another_build_is_refused(drawn: PairSet, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match='other settings.*"seed": 0'):
        build_pairs(Path(drawn[0].emotional.picture).parent, "test", 1, seed=3, progress=False)
    (tmp_path / "manifest.jsonl").write_text("")
    with pytest.raises(FileExistsError, match="did not write"):
        build_pairs(tmp_path, "test", 1, progress=False)


def test_conditions_ask_each_picture_once_alone_and_thrice_each_way(drawn: PairSet) -> None:
    asked = conditions(drawn)
    assert len(asked) == 7 * len(drawn) and len(asked.neutrals) == 7 * len(drawn.neutrals)
    counts = asked.counts("condition")
    for emotion in counts.labels["emotion"]:
        assert [int(counts.select(emotion=emotion, condition=c).values) for c in builder.KINDS] == [2, 6, 6]
    for example in asked.examples:
        told = example.context_emotion
        assert (told is None, told == example.emotion) == {
            "none": (True, False),
            "consistent": (False, True),
            "conflict": (False, False),
        }[example.condition]
    for pair in asked:
        assert pair.neutral.prompt == pair.emotional.prompt


def test_strengths_of_a_context_tell_the_same_event(drawn: PairSet) -> None:
    mine = [p.emotional for p in conditions(drawn, ["conflict"]) if p.emotional.file == drawn[0].emotional.file]
    assert [e.context_strength for e in mine] == ["weak", "plain", "strong"]
    assert len({e.context_emotion for e in mine}) == 1
    weak, plain, strong = (str(e.context) for e in mine)
    assert weak.replace("maybe ", "") == plain == strong.replace("everybody knows that ", "")


def test_contexts_add_lines_and_no_pictures(drawn: PairSet, tmp_path: Path) -> None:
    main(["--out", str(tmp_path), "--split", "test", "--identities", "1", "--contexts", "none,conflict"])
    pairs = load_pairs(tmp_path)
    assert len(list(tmp_path.glob("*.png"))) == 8 and len(pairs) == 28 and len(pairs.neutrals) == 4
    again = build_pairs(tmp_path, "test", 1, contexts=["none"], progress=False)
    assert len(again) == 7 and again.fingerprint == drawn.select(identity=drawn[0].identity).fingerprint


def test_unknown_conditions_and_emotions_are_refused(drawn: PairSet) -> None:
    with pytest.raises(ValueError, match="unknown kind 'opposite'"):
        conditions(drawn, ["opposite"])
    with pytest.raises(ValueError, match="unknown strength 'huge'"):
        conditions(drawn, strengths=["huge"])


def test_more_faces_of_an_emotion_share_one_neutral_twin(tmp_path: Path) -> None:
    pairs = build_pairs(tmp_path, "development", 1, ["toon-head"], per_emotion=2, progress=False)
    assert len(pairs.neutrals) == 1 and {p.neutral.file for p in pairs} == {pairs.neutrals[0].file}
    clear = [p.emotional.attributes["expression"] for p in pairs if p.emotion == "happy"]
    assert sorted(clear) == ["clear", "subtle"]


def test_held_out_styles_have_singles_where_no_neutral_can_be_drawn(tmp_path: Path) -> None:
    pairs = build_pairs(tmp_path, HELD_OUT, 1, progress=False)
    assert {p.emotional.style for p in pairs} == {"open-peeps"} and {s.style for s in pairs.singles} == {"micah"}
    assert {e.split for e in pairs.examples} == {HELD_OUT}
