"""Subtitles of one set: name -> sentence; a sample without a row has the empty one."""

from __future__ import annotations

from pathlib import Path

from veena_lens.emotion.mer_unibench.labels import read_rows
from veena_lens.emotion.mer_unibench.sets import SetInfo


def subtitle_file(folder: Path, info: SetInfo) -> Path | None:
    """The set's subtitle file under any of its names, None when there is none."""
    return next((folder / name for name in info.subtitles[0] if (folder / name).is_file()), None)


def read_subtitles(folder: Path, info: SetInfo) -> dict[str, str]:
    """Name -> sentence in the language that the reference reads; a repeated name keeps its last row.

    No file gives no subtitle. Raises: ValueError for a file without the columns."""
    path = subtitle_file(folder, info)
    if path is None:
        return {}
    column = info.subtitles[1]
    return {row["name"]: row[column] for row in read_rows(path, ("name", column))}
