"""Read answer files in every format that MER-UniBench's code writes or reads, and in this project's JSON Lines.

Raw answers are texts; extracted ones are list strings, or sentiment words. Where a raw file lies beside its extracted
one, the extracted one is read and the notes say so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any, Literal

from veena_lens.emotion.mer_unibench.archives import MAX_ARCHIVE, array_names, read_array, read_array_file, read_dict
from veena_lens.emotion.mer_unibench.data_sets import find_set, read_rows
from veena_lens.json_lines import json_rows
from veena_lens.regular_files import require_regular

Content = Literal["raw", "labels", "sentiment"]
OPENSET, SENTIMENT = "-openset", "-openset-sentiment"
FORMATS = (
    "an npz with name2reason (raw answers), an npz with filenames and fileitems (-openset or -openset-sentiment), a "
    "csv with name and reason or openset, a folder of <name>.npy, or JSON Lines with name and answer, labels or "
    "sentiment"
)


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Answers by sample name; `content` says whether they are raw texts, list strings of labels, or sentiment words.

    `key` is the set that the path or the file names, "" when neither does; `run` what the file says of how it came.
    """

    path: Path
    content: Content
    values: Mapping[str, str]
    key: str = ""
    run: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Answers({self.path}: {len(self.values)} of {self.key or 'an unnamed set'}, {self.content})"


def read_answers(path: str | Path, *, sentiment: bool = False, beside: bool = True) -> Answers:
    """Read the answers in a file or folder of any known format.

    Args:
        path: the file or folder.
        sentiment: True prefers the -openset-sentiment file of a stem where there is one.
        beside: True reads the extracted answers beside a raw file in its place, False the very file that was named.

    Raises: FileNotFoundError; ValueError for a file of no known format, naming the formats.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There are no answers at {path}; expected {FORMATS}.")
    if not path.is_dir():
        require_regular(path, MAX_ARCHIVE)
    notes: tuple[str, ...] = ()
    if beside and path.suffix == ".npz" and not path.stem.endswith((OPENSET, SENTIMENT)):
        for ending in (SENTIMENT, OPENSET) if sentiment else (OPENSET,):
            other = path.with_name(f"{path.stem}{ending}.npz")
            if other.is_file():
                notes = (f"read {other.name} in place of the raw answers beside it",)
                path = other
                break
    content, values, run = _read(path)
    if not values:
        raise ValueError(f"{path} holds no answer.")
    told = (run or {}).get("set")
    key = find_set(str(told)).key if told else set_in_path(path)
    return Answers(path=path, content=content, values=values, key=key, run=run, notes=notes)


def set_in_path(path: Path) -> str:
    """Return the set that a `results-<key>` part of a path names, "" without one.

    Raises: ValueError for an unknown key.
    """
    for part in reversed(path.parts[:-1] if path.is_file() else path.parts):
        found = re.fullmatch(r"results-(\w+)", part)
        if found:
            return find_set(found[1]).key
    return ""


def answer_files(folder: Path) -> list[Path]:
    """List every answer file under a folder, one per stem: the raw file, or the extracted one without it."""
    stems: dict[tuple[Path, str], Path] = {}
    for path in sorted(folder.rglob("*.npz")):
        stem = path.stem.removesuffix("-sentiment").removesuffix(OPENSET)
        kept = stems.get((path.parent, stem))
        # The shortest name is the raw file's; the reader finds the others beside it.
        if kept is None or len(path.name) < len(kept.name):
            stems[path.parent, stem] = path
    return [*stems.values(), *sorted([*folder.rglob("*.csv"), *folder.rglob("*.jsonl")])]


def _read(path: Path) -> tuple[Content, dict[str, str], dict[str, Any] | None]:
    if path.is_dir():
        return "raw", _read_folder(path), None
    if path.suffix == ".npz":
        return (*_read_npz(path), None)
    if path.suffix == ".csv":
        return (*_read_csv(path), None)
    if path.suffix in (".jsonl", ".json"):
        return _read_lines(path)
    raise ValueError(f"{path} is no answer file; expected {FORMATS}.")


def _read_npz(path: Path) -> tuple[Content, dict[str, str]]:
    names = array_names(path)
    if "name2reason" in names:
        return "raw", _texts(path, list(read_dict(path, "name2reason").items()))
    if not {"filenames", "fileitems"} <= set(names):
        raise ValueError(f"{path} holds {', '.join(names) or 'nothing'}; expected {FORMATS}.")
    keys, items = read_array(path, "filenames"), read_array(path, "fileitems")
    if keys.ndim != 1 or keys.shape != items.shape:
        raise ValueError(f"{path}: filenames {keys.shape} and fileitems {items.shape} must be of one length.")
    content: Content = "sentiment" if path.stem.endswith(SENTIMENT) else "labels"
    return content, _texts(path, list(zip(keys.tolist(), items.tolist(), strict=True)))


def _texts(path: Path, pairs: Sequence[tuple[Any, Any]]) -> dict[str, str]:
    """Return answers by name. Raises: ValueError for what is not a text, or a name that comes twice."""
    found: dict[str, str] = {}
    for name, answer in pairs:
        if not isinstance(name, str) or not isinstance(answer, str):
            raise ValueError(
                f"{path}: names and answers must be texts; found {short_repr(name)} with {short_repr(answer)}."
            )
        if str(name) in found:
            raise ValueError(f"{path}: two answers of {short_repr(name)}; keep one.")
        found[str(name)] = str(answer)
    return found


def _read_csv(path: Path) -> tuple[Content, dict[str, str]]:
    try:
        rows, content, column = read_rows(path, ("name", "openset")), "labels", "openset"
    except ValueError:
        rows, content, column = read_rows(path, ("name", "reason")), "raw", "reason"
    return content, _texts(path, [(row["name"], row[column]) for row in rows])


def _read_folder(path: Path) -> dict[str, str]:
    """Read `<name>.npy` files, each an array of one text."""
    found = {}
    for file in sorted(path.glob("*.npy")):
        array = read_array_file(file)
        if array.size != 1:
            raise ValueError(f"{file}: expected one text, found an array of shape {array.shape}.")
        (found[file.stem],) = _texts(file, [(file.stem, array.item())]).values()
    if not found:
        raise ValueError(f"The folder {path} holds no <name>.npy; expected {FORMATS}.")
    return found


def _read_lines(path: Path) -> tuple[Content, dict[str, str], dict[str, Any] | None]:
    """Read this project's JSON Lines: a first line `{"run": ...}`, if any, then one row per sample.

    A row holds name and answer, labels or sentiment, the same for all. Raises: ValueError with the line's number.
    """
    run, values, content = None, [], None
    for number, row in enumerate(json_rows(path), start=1):
        if number == 1 and isinstance(row.get("run"), dict):
            run = row["run"]
            continue
        field = next((field for field in ("sentiment", "labels", "answer") if field in row), None)
        if field is None or "name" not in row or content not in (None, field):
            raise ValueError(
                f"{path}, line {number}: expected name and {content or 'answer, labels or sentiment'}; it has "
                f"{', '.join(row)}."
            )
        content, value = field, row[field]
        if isinstance(value, list) and all(isinstance(word, str) for word in value):
            value = f"[{', '.join(value)}]"
        values.append((row["name"], value))
    kinds: dict[str | None, Content] = {"sentiment": "sentiment", "labels": "labels"}
    return kinds.get(content, "raw"), _texts(path, values), run
