"""Pairs that a visitor gives: what is taken, what is refused with which words, and that nothing leaves the tab."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.app.explorer.conftest import NAME
from veena_lens.app.explorer import directions, neurons, own_pairs
from veena_lens.app.explorer.directions import DirectionSettings, sample_pairs
from veena_lens.app.explorer.own_pairs import take_sets, take_zip
from veena_lens.app.explorer.state import Explorer, Limits, Session
from veena_lens.emotion import save_pairs

LIMITS = Limits(upload_bytes=300_000, pixels=200_000, pairs=4)


@pytest.fixture
def faces() -> list[tuple[Path, Path]]:
    """Files of sad faces and their neutral twins."""
    pairs = sample_pairs().select(emotion="sad")[:3]
    return [(Path(p.emotional.picture), Path(p.neutral.picture)) for p in pairs]


@pytest.fixture
def packed(tmp_path: Path) -> Callable[..., Path]:
    """`packed(entries)`: a .zip of names and what they hold, a file or bytes."""

    def pack(entries: Mapping[str, Path | bytes]) -> Path:
        path = tmp_path / "faces.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, held in entries.items():
                archive.writestr(name, held if isinstance(held, bytes) else held.read_bytes())
        return path

    return pack


def by_folder(faces: list[tuple[Path, Path]], around: str = "") -> dict[str, Path | bytes]:
    sides: dict[str, Path | bytes] = {f"{around}sad/{i}.png": shown for i, (shown, _) in enumerate(faces)}
    return sides | {f"{around}neutral/{i}.png": twin for i, (_, twin) in enumerate(faces)}


def of_own(session: Session, emotion: str = "sad") -> DirectionSettings:
    own = session.kept["own_pairs"]
    return DirectionSettings(model=NAME, emotion=emotion, n=3, own=own.pairs.fingerprint)


def test_two_sets_make_the_direction_of_the_same_pairs_and_their_code_runs(
    explorer: Explorer, session: Session, faces: Any, run_code: Any
) -> None:
    own = take_sets(session, [str(s) for s, _ in faces], [str(t) for _, t in faces], " Sad", LIMITS)
    assert own.describe() == "Your pairs: 3 pairs of sad."
    found = directions.extract(explorer, session, of_own(session))
    same = directions.extract(explorer, explorer.session("another"), DirectionSettings(model=NAME, emotion="sad", n=3))
    torch.testing.assert_close(found.vectors, same.vectors)
    assert found.heads == same.heads and found.neurons == same.neurons
    (exported,) = own_pairs.export_pairs(session)
    zipfile.ZipFile(exported).extractall(".")
    _, _, code = neurons.look_at_neuron(explorer, found, *found.neurons[0][:2])
    made = run_code(code)
    assert torch.equal(made["directions"].of("sad").float(), found.vectors) and made["neurons"] == found.neurons


def test_twins_are_joined_by_name_where_all_names_agree_and_in_order_where_not(
    session: Session, faces: Any, tmp_path: Path
) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    for folder, side in ((first, 0), (second, 1)):
        folder.mkdir()
        for name, pair in zip("xyz", faces):
            (folder / f"{name}.png").write_bytes(pair[side].read_bytes())
    shown, twins = [str(first / f"{n}.png") for n in "zyx"], [str(second / f"{n}.png") for n in "xzy"]
    own = take_sets(session, shown, twins, "sad", LIMITS)
    assert sorted(p.emotional.pair for p in own.pairs) == ["x", "y", "z"]
    twin_of = {p.emotional.pair: Path(p.neutral.picture).read_bytes() for p in own.pairs}
    assert twin_of == {name: pair[1].read_bytes() for name, pair in zip("xyz", faces)}
    (second / "z.png").rename(second / "other.png")
    own = take_sets(session, shown, [str(second / f"{n}.png") for n in ("other", "y", "x")], "sad", LIMITS)
    assert [p.emotional.pair for p in own.pairs] == ["001", "002", "003"]
    assert Path(own.pairs[0].neutral.picture).read_bytes() == faces[2][1].read_bytes()


@pytest.mark.parametrize("around", ["", "my faces/"])
def test_archive_of_folders_and_of_a_manifest_hold_the_same_pairs(
    session: Session, faces: Any, packed: Any, tmp_path: Path, around: str
) -> None:
    spare = {} if around else {"__MACOSX/sad/._0.png": b"x", "notes.txt": b"x"}
    own = take_zip(session, packed(by_folder(faces, around) | spare), LIMITS)
    assert own.code == 'pairs_from_folders("pairs")' and len(own.pairs) == 3
    save_pairs(sample_pairs().select(emotion=["sad", "happy"])[:4], tmp_path / "m")
    files = {around + p.relative_to(tmp_path / "m").as_posix(): p for p in (tmp_path / "m").rglob("*") if p.is_file()}
    again = take_zip(session, packed(files), LIMITS)
    assert again.code == 'load_pairs("pairs").without_context()' and len(again.pairs) == 4
    assert not own.folder.exists() and session.kept["own_pairs"] is again
    own_pairs.forget_pairs(session)
    assert not again.folder.exists() and not own_pairs.export_pairs(session)


def test_tabs_keep_their_pairs_apart_and_closed_ones_leave_no_file(explorer: Explorer, faces: Any, packed: Any) -> None:
    first, second = explorer.session("first"), explorer.session("second")
    own = take_zip(first, packed(by_folder(faces)), LIMITS)
    with pytest.raises(ValueError, match="Your pairs were replaced or removed"):
        directions.extract(explorer, second, of_own(first))
    other = take_zip(second, packed(by_folder(faces[:1])), LIMITS)
    assert len(first.kept["own_pairs"].pairs) == 3 and len(second.kept["own_pairs"].pairs) == 1
    explorer.forget("first")
    assert not own.folder.exists() and other.folder.exists()


def test_sets_that_make_no_pairs_are_told(session: Session, faces: Any, tmp_path: Path) -> None:
    shown, twins = [str(s) for s, _ in faces], [str(t) for _, t in faces]
    text = tmp_path / "text.png"
    text.write_text("no picture")
    wide = tmp_path / "wide.png"
    Image.new("RGB", (90, 40)).save(wide)
    for given, told in (
        ((shown, [], "sad"), "Give both sets, .* got 3 and 0 images"),
        ((shown, twins[:1], "sad"), "Got 3 images with the emotion and 1 without it; each needs its twin"),
        ((shown[:1], twins, "sad"), "Got 1 image with the emotion and 3 without it"),
        ((shown, twins, " "), "Name the emotion of the first set"),
        ((shown, twins, "neutral"), "Name the emotion of the first set"),
        ((shown, twins, "hapy"), "No wheel covers the labels 'hapy' .near: happy"),
        ((shown * 2, twins * 2, "sad"), "6 pairs were given; the limit here is 4"),
        (([str(text)], twins[:1], "sad"), "^text.png cannot be read as an image"),
        (([str(wide)], twins[:1], "sad"), r"sad/001\.png\)?: 90 x 40 pixels, but its neutral twin"),
    ):
        with pytest.raises(ValueError, match=told) as error:
            take_sets(session, *given, LIMITS)
        assert str(session.folder) not in str(error.value)
    assert "own_pairs" not in session.kept and not list(session.folder.iterdir())


def test_archives_that_cannot_be_used_are_told_and_write_nothing(
    session: Session, faces: Any, packed: Any, tmp_path: Path
) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(faces[0][0].read_bytes())
    good = by_folder(faces)
    line = '{"file": "%s", "emotion": "%s", "pair": "a", "question": "how?"}\n'
    outside = (line % (secret, "sad") + line % ("neutral/0.png", "neutral")).encode()
    bomb = {"sad/0.png": bytes(400_000)}
    link = zipfile.ZipInfo("sad/9.png")
    link.external_attr = 0o120777 << 16
    for entries, told in (
        ({"../up.png": faces[0][0], **good}, r"holds the entry '../up.png', which leads out of its folder"),
        ({"/up.png": faces[0][0], **good}, "leads out of its folder"),
        ({"manifest.jsonl": outside, **good}, "names '.*secret.png', which is not in the archive"),
        ({"manifest.jsonl": b"{broken\n", **good}, "line 1: no JSON object"),
        ({"sad/0.png": faces[0][0]}, "holds no pairs. A .zip of pairs has one folder per emotion"),
        ({"notes.txt": b"x"}, "faces.zip holds no images"),
        ({**good, "sad/7.png": faces[0][0]}, "pair '7' has no neutral image"),
        ({**good, "bored stiff/0.png": faces[0][0]}, "No wheel covers the labels 'bored stiff'"),
        ({f"sad/{i}.png": faces[0][0] for i in range(10)}, "holds 10 images; the limit here is 4 pairs"),
        (bomb, "sad/0.png unpacks to more than 300,000 bytes"),
        ({"sad/0.png": b"no picture", "neutral/0.png": faces[0][1]}, "0.png cannot be read as an image"),
    ):
        with pytest.raises(ValueError, match=told) as error:
            take_zip(session, packed(entries), LIMITS)
        assert str(session.folder) not in str(error.value), error.value
    path = packed(good)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, str(secret))
    assert len(take_zip(session, path, LIMITS).pairs) == 3  # the link is left out
    own_pairs.forget_pairs(session)
    data = path.read_bytes()
    for broken, told in ((data[: len(data) // 2], "cannot be read as a .zip"), (b"no zip", "cannot be read as a .zip")):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=told):
            take_zip(session, path, LIMITS)
    path.write_bytes(data[:200] + bytes(255 - b for b in data[200:400]) + data[400:])
    with pytest.raises(ValueError, match=r"in faces.zip cannot be unpacked: Bad CRC-32"):
        take_zip(session, path, LIMITS)
    with pytest.raises(ValueError, match="unpacks to more than 20,000 bytes"):
        take_zip(session, packed(good), Limits(unpacked_bytes=20_000))
    assert "own_pairs" not in session.kept and not list(session.folder.iterdir())
