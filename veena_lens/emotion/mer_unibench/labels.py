"""Labels of one set: name -> truth, checked value by value, in the order of the file."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from veena_lens.emotion.extraction import string_to_list
from veena_lens.emotion.mer_unibench.pickles import array_names, read_dict
from veena_lens.emotion.mer_unibench.sets import SetInfo

Truth = str | float


def read_labels(folder: Path, info: SetInfo) -> dict[str, Truth]:
    """Name -> truth of a set's test part: a class word, a list string, or a sentiment.

    Raises: FileNotFoundError with the path and array wanted; ValueError with file, name and value of a bad label."""
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
    found = {str(name): value for name, value in read_dict(path, info.array).items()}
    if info.session:
        found = {name: value for name, value in found.items() if name[4:5] == info.session}
    return {name: _truth(path, info, require_name(path, name), value) for name, value in found.items()}


def require_name(where: Path | str, name: str) -> str:
    """A sample's name, which becomes a file's. Raises: ValueError for a name that could leave its folder."""
    if not name or ".." in name or any(mark in name for mark in "/\\\0\n\r") or name != name.strip():
        raise ValueError(f"{where}: the sample name {name!r} is refused: names become file names of one folder.")
    return name


def read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a UTF-8 csv with the given columns; a lost cell is "".

    Raises: ValueError for a lost column, naming those there are, or for a file that is not UTF-8."""
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
    """List strings by name; an empty one counts as neutral, as in the reference."""
    rows = read_rows(path, ("name", "openset"))
    return {
        require_name(path, row["name"]): row["openset"] if string_to_list(row["openset"]) else "neutral" for row in rows
    }


def _truth(path: Path, info: SetInfo, name: str, value: Any) -> Truth:
    field = "val" if info.kind == "sentiment" else "emo"
    if not isinstance(value, Mapping) or field not in value:
        raise ValueError(f"{path}: {name!r} has no field {field!r}, which {info.title} needs; it holds {value!r}.")
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
    raise ValueError(f"{path}: {field} of {name!r} is {label!r}; {info.title} has {expected}.")


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _lost(path: Path, info: SetInfo) -> str:
    wanted = f"array {info.array!r}" if info.array else "columns name, openset"
    others = []
    for other in sorted(path.parent.glob("*.npz")):
        try:
            others.append(f"{other.name} with {', '.join(array_names(other))}")
        except ValueError:
            others.append(f"{other.name}, unreadable")
    there = f" There is {'; '.join(others)}." if others else ""
    return f"No labels of {info.title}: {path} ({wanted}) does not exist.{there} To get the set: {info.source}."
