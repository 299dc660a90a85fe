"""Stored files: names without paths, one visitor and one tab, and no more than the limits keep."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veena_lens.app.explorer.uploads import ForeignFile, Uploads, Visitor, plain_name

MINE, OTHER = Visitor("mine", is_new=False), Visitor("other", is_new=False)


def stored(uploads: Uploads, name: str = "a.png", size: int = 10, visitor: Visitor = MINE) -> str:
    return uploads.store(name, io.BytesIO(b"x" * size), visitor)


@given(st.text(max_size=300))
def test_name_never_leads_elsewhere(name: str) -> None:
    plain = plain_name(name)
    assert Path(plain).name == plain and plain not in ("", ".", "..") and not plain.startswith(".")
    assert len(plain.encode()) <= 160 and plain.isprintable()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\pictures\\Zoë 1.PNG", "Zoë 1.PNG"),
        ("a\0b\n.png", "ab.png"),
        (".bashrc", "bashrc"),
        ("..", "file"),
        ("", "file"),
        ("x" * 300 + ".jpeg", "x" * 120 + ".jpeg"),
        ("archive.tar.zip", "archive.tar.zip"),
    ],
)
def test_name_keeps_what_can_be_read(name: str, expected: str) -> None:
    assert plain_name(name) == expected


def test_same_name_and_content_lie_apart(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path / "uploads", 1000, 60.0)
    first, second = stored(uploads), stored(uploads)
    assert first != second and Path(first).name == Path(second).name == "a.png"
    assert len(Path(first).parent.name) >= 32


def test_file_serves_the_first_tab_of_its_visitor(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path / "uploads", 1000, 60.0)
    path = stored(uploads)
    for session, visitor in (("tab", OTHER), ("tab", None)):
        with pytest.raises(ForeignFile):
            uploads.lend(path, session, visitor)
    assert uploads.lend(path, "tab", MINE) == uploads.lend(path, "tab") == path
    with pytest.raises(ForeignFile):
        uploads.lend(path, "another", MINE)
    assert uploads.find(path, MINE) == Path(path) and uploads.find(path, OTHER) is None


def test_files_of_a_closed_tab_are_deleted(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path / "uploads", 1000, 60.0)
    mine, other = stored(uploads), stored(uploads)
    uploads.lend(mine, "tab", MINE)
    uploads.forget("tab")
    assert not Path(mine).parent.exists() and Path(other).is_file()
    with pytest.raises(ForeignFile):
        uploads.lend(mine, "tab", MINE)
    uploads.clear()
    assert not (tmp_path / "uploads").exists()


def test_oldest_files_make_room(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path / "uploads", 100, 60.0)
    paths = [stored(uploads, size=40) for _ in range(4)]
    assert [Path(p).exists() for p in paths] == [False, False, True, True]
    assert Path(stored(uploads, size=500)).exists()  # the newest stays


def test_old_files_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = Uploads(tmp_path / "uploads", 100, 60.0)
    now = [0.0]
    monkeypatch.setattr("veena_lens.app.explorer.uploads.time.monotonic", lambda: now[0])
    old = stored(uploads)
    now[0] = 61.0
    assert Path(stored(uploads)).exists() and not Path(old).exists()
