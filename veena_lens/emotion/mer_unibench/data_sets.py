"""Describe the nine sets of MER-UniBench (`sets.toml`), and read their labels.

Labels are checked value by value, in the order of the file; `archives` reads the arrays that hold them.
"""

from __future__ import annotations

import csv
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from numbers import Integral, Real
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any, Literal

from veena_lens.emotion.mer_unibench.archives import array_names, read_dict
from veena_lens.emotion.mer_unibench.archives import read_array as read_array
from veena_lens.emotion.words.lexicon import string_to_list
from veena_lens.regular_files import MAX_JSON, require_regular

Truth = str | float


def read_labels(folder: Path, info: SetInfo) -> dict[str, Truth]:
    """Read name -> truth of a set's test part: a class word, a list string, or a sentiment.

    Args:
        folder: the set's.
        info: the set.

    Raises: FileNotFoundError with the path and array wanted; ValueError with file, name and value of a bad label.
    """
    path = folder / info.label_file
    if not path.is_file():
        raise FileNotFoundError(_lost(path, info))
    if not info.array:
        return _open_labels(path)
    if info.array not in array_names(path):
        raise ValueError(
            f"{path} has no array {info.array!r} (the test labels of {info.title}); it has: "
            f"{', '.join(array_names(path))}. Another label file of the set may be in its place."
        )
    whole = read_dict(path, info.array)
    found = {str(name): value for name, value in whole.items()}
    if len(found) != len(whole):
        raise ValueError(f"{path}, array {info.array!r}: a name stands there twice, as a text and as a number.")
    if info.session:
        found = {name: value for name, value in found.items() if name[4:5] == info.session}
    return {name: _truth(path, info, require_name(path, name), value) for name, value in found.items()}


def require_name(where: Path | str, name: str) -> str:
    """Return a sample's name, which becomes a file's, once it is known to be safe.

    Args:
        where: what messages call the place of the name.
        name: the name.

    Raises: ValueError for a name that could leave its folder.
    """
    if not name or ".." in name or any(mark in name for mark in "/\\\0\n\r") or name != name.strip():
        raise ValueError(f"{where}: the sample name {name!r} is refused: names become file names of one folder.")
    return name


def read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Read rows of a UTF-8 csv with the given columns; a lost cell is "".

    Args:
        path: the csv file.
        columns: names in its header; others are left out.

    Raises: ValueError for a lost column, naming those there are, or for a file that is not UTF-8.
    """
    require_regular(path, MAX_JSON)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            there = list(reader.fieldnames or ())
            lost = [column for column in columns if column not in there]
            if lost:
                raise ValueError(f"{path} has no column {', '.join(lost)}; its columns: {', '.join(there) or 'none'}.")
            return [{column: (row[column] or "").strip() for column in columns} for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as a UTF-8 csv file: {error}.") from error


def _open_labels(path: Path) -> dict[str, Truth]:
    """Read list strings by name; an empty one counts as neutral, as in the reference."""
    rows = read_rows(path, ("name", "openset"))
    found: dict[str, Truth] = {}
    for row in rows:
        labels = row["openset"] if string_to_list(row["openset"]) else "neutral"
        if found.setdefault(require_name(path, row["name"]), labels) != labels:
            raise ValueError(f"{path} has two rows of {row['name']!r} with different labels; keep one.")
    return found


def _truth(path: Path, info: SetInfo, name: str, value: Any) -> Truth:
    field = "val" if info.kind == "sentiment" else "emo"
    if not isinstance(value, Mapping) or field not in value:
        raise ValueError(
            f"{path}: {name!r} has no field {field!r}, which {info.title} needs; it holds {short_repr(value)}."
        )
    label = value[field]
    if info.kind == "sentiment":
        if _is_number(label, Real) and math.isfinite(label) and abs(label) <= info.bound:
            return float(label)
        expected = f"a number in [-{info.bound:g}, {info.bound:g}]"
    elif info.integers:
        if _is_number(label, Integral) and 0 <= int(label) < len(info.classes):
            return info.classes[int(label)]
        expected = f"0 to {len(info.classes) - 1} ({', '.join(info.classes)})"
    else:
        if isinstance(label, str) and str(label) in info.classes:
            return str(label)
        expected = f"one of {', '.join(info.classes)}"
    raise ValueError(f"{path}: {field} of {name!r} is {short_repr(label)}; {info.title} has {expected}.")


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _lost(path: Path, info: SetInfo) -> str:
    wanted = f"array {info.array!r}" if info.array else "columns name, openset"
    others = []
    for other in sorted(path.parent.glob("*.npz")):
        try:
            others.append(f"{other.name} with {', '.join(array_names(other))}")
        except (ValueError, OSError):
            others.append(f"{other.name}, unreadable")
    there = f" There is {'; '.join(others)}." if others else ""
    return f"No labels of {info.title}: {path} ({wanted}) does not exist.{there} To get the set: {info.source}."


Kind = Literal["open", "emotion", "sentiment"]


@dataclass(frozen=True, kw_only=True)
class SetInfo:
    """One set; `key` is the reference's name for it, and files and folders are tried in the order given."""

    key: str
    title: str
    kind: Kind
    folders: tuple[str, ...]
    label_file: str
    array: str = ""  # in the label file; "" for a csv
    count: int  # samples of the test part
    classes: tuple[str, ...] = ()  # of the labels; in the order of integer labels where these are integers
    integers: bool = False
    session: str = ""  # the fifth letter of the test part's names, where the file holds more
    bound: float = 0.0  # sentiment values lie in [-bound, bound]
    subtitles: tuple[tuple[str, ...], str] = (("transcription-engchi-polish.csv",), "english")  # (files, column)
    videos: tuple[str, ...] = ("video",)
    endings: tuple[str, ...] = ("mp4", "avi")
    uncropped: tuple[str, ...] = field(default=())  # video folders that show more than the speaker
    source: str = ""
    terms: str = ""

    @property
    def metric(self) -> str:
        """Return the set's primary metric: HIT, F_s or WAF."""
        return {"open": "F_s", "emotion": "HIT", "sentiment": "WAF"}[self.kind]

    def __repr__(self) -> str:
        return f"SetInfo({self.key!r}: {self.title}, {self.count} samples, {self.metric})"


def _read_sets() -> tuple[SetInfo, ...]:
    """Read the table of the nine sets, with lists as tuples."""
    table = tomllib.loads((Path(__file__).parent / "sets.toml").read_text(encoding="utf-8"))

    def value(found: Any) -> Any:
        if isinstance(found, list):
            return tuple(value(part) for part in found)
        return found.replace("{processed}", table["processed"]) if isinstance(found, str) else found

    return tuple(SetInfo(**{name: value(found) for name, found in row.items()}) for row in table["sets"])


SETS: tuple[SetInfo, ...] = _read_sets()


def find_set(name: str) -> SetInfo:
    """Return a set by its key or title, in any case ("MER2023", "iemocapfour", "CMU-MOSI", "mosi").

    Raises: ValueError listing the nine keys and near ones.
    """
    known: dict[str, SetInfo] = {}
    for info in SETS:
        title = info.title.split(" (")[0]
        for spelling in (info.key, title, title.split()[0] if title.startswith("MER") else title, info.key[3:]):
            known.setdefault(_plain(spelling), info)
    known["iemocap"] = _by_key("iemocapfour")
    found = known.get(_plain(name))
    if found is None:
        near = get_close_matches(_plain(name), known)
        told = f"; near: {', '.join(dict.fromkeys(known[n].key for n in near))}" if near else ""
        raise ValueError(f"No set {name!r}; MER-UniBench has {', '.join(info.key for info in SETS)}{told}.")
    return found


def _by_key(key: str) -> SetInfo:
    """Return a set by its exact key."""
    return next(info for info in SETS if info.key == key)


def _plain(name: str) -> str:
    return "".join(char for char in name.lower() if char.isalnum() or char == "+").replace("+", "plus")
