"""Read the wheels of MER-UniBench, and map a label to a sector of a wheel by its official map or by a direct one.

Wheels are read from the authors' spreadsheets, or from JSON files of the same content. The words belong to the
AffectGPT project and are not part of this one. Source: Lian et al. 2025, AffectGPT (ICML).

A label goes over three levels: surface form -> base words -> wheel words -> sector. Both maps take one of the wheel
words that a form leads to. The official map takes the alphabetically first, which sends "fear" over "fearless" to joy
on four of five wheels; the direct map takes the nearest word. Source: Lian et al. 2025, AffectGPT (ICML), for the
official map.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from veena_lens.emotion.words.lexicon import plain
from veena_lens.own_files import require_words
from veena_lens.regular_files import MAX_JSON, read_json, require_regular

Level = Literal["level1", "level2"]
Mapped = Literal["official", "direct"]
LEVELS: tuple[Level, ...] = ("level1", "level2")
MAPPINGS: tuple[Mapped, ...] = ("official", "direct")


@dataclass(frozen=True, eq=False)
class Wheel:
    """One emotion wheel: sector -> second-level word -> fine words, and the sector of every word for each level.

    A word listed twice goes to its last place. At level 2 a sector's name goes to the alphabetically first of its
    second-level words.
    """

    name: str
    sectors: Mapping[str, Mapping[str, Sequence[str]]]
    source: str = ""
    basics: Mapping[str, str] = field(default_factory=dict)
    tables: Mapping[str, Mapping[str, str]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        first: dict[str, str] = {}
        second: dict[str, str] = {}
        for sector, children in self.sectors.items():
            for child, fine in children.items():
                first |= dict.fromkeys((sector, child, *fine), sector)
                second |= dict.fromkeys((child, *fine), child)
        for sector, children in self.sectors.items():
            # A sector whose name is also one of the second-level words stays a sector's name.
            second[sector] = min(children)
        object.__setattr__(self, "tables", {"level1": first, "level2": second})

    @property
    def words(self) -> frozenset[str]:
        """Return every word on the wheel."""
        return frozenset(self.tables["level1"])

    def __repr__(self) -> str:
        return f"Wheel({self.name!r}: {', '.join(self.sectors)}; {len(self.words)} words)"


def official_sector(
    label: str, wheel: Wheel, level: str, forms: Mapping[str, Sequence[str]], synonyms: Mapping[str, Sequence[str]]
) -> str:
    """Return the sector of the alphabetically first wheel word that the label leads to, "" when none lies on the wheel.

    Args:
        label: an emotion word; its spelling is made plain first.
        wheel: the wheel.
        level: "level1" or "level2".
        forms: surface form -> base words.
        synonyms: base word -> wheel words.

    Source: Lian et al. 2025, AffectGPT (ICML).
    """
    table = wheel.tables[level]
    candidates = {word for base in forms.get(plain(label), ()) for word in synonyms.get(base, ())}
    return next((table[word] for word in sorted(candidates) if word in table), "")


def direct_sector(
    label: str, wheel: Wheel, level: str, forms: Mapping[str, Sequence[str]], synonyms: Mapping[str, Sequence[str]]
) -> str:
    """Return the sector of the label itself or else of the nearest wheel word it leads to, "" for none on the wheel.

    The nearest word has the least (base is not the label, difference of their lengths, base, wheel word is not a
    sector's name, wheel word is not the base, wheel word). Parameters: as `official_sector`.
    """
    table, word = wheel.tables[level], plain(label)
    if word in table:
        return table[word]
    candidates = [
        (base != word, abs(len(base) - len(word)), base, near not in wheel.sectors, near != base, near)
        for base in forms.get(word, ())
        for near in synonyms.get(base, ())
        if near in table
    ]
    return table[min(candidates)[-1]] if candidates else ""


SPREADSHEETS = (*(f"wheel{k}.xlsx" for k in range(1, 6)), "synonym.xlsx", "format.csv")
JSON_FILES = ("emotion_wheels.json", "synonym_to_wheel_words.json", "form_to_synonyms.json")
SOURCE = "Lian et al. 2025, AffectGPT (ICML), emotion_wheel"
Words = dict[str, tuple[str, ...]]


def read_affectgpt(folder: Path) -> tuple[tuple[Wheel, ...], Words, Words]:
    """Read (wheels, base word -> wheel words, surface form -> base words) from a folder in either layout.

    folder: holds the spreadsheets `SPREADSHEETS` or the JSON files `JSON_FILES`; the latter are read where both are
    there.

    Raises: FileNotFoundError with the files that are missing; ImportError naming the extra for spreadsheets.
    """
    if all((folder / name).is_file() for name in JSON_FILES):
        wheels, synonyms, forms = (read_json(folder / name) for name in JSON_FILES)
        require_words({"wheels": wheels}, {"wheels": {str: {str: {str: [str]}}}}, str(folder / JSON_FILES[0]))
        for name, words in zip(JSON_FILES[1:], (synonyms, forms), strict=True):
            require_words({"words": words}, {"words": {str: [str]}}, str(folder / name))
        return (
            tuple(Wheel(name, sectors, SOURCE) for name, sectors in wheels.items()),
            {base: tuple(words) for base, words in synonyms.items()},
            {form: tuple(bases) for form, bases in forms.items()},
        )
    lost = [name for name in SPREADSHEETS if not (folder / name).is_file()]
    if lost:
        raise FileNotFoundError(
            f"{folder} holds no complete emotion wheels: it lacks {', '.join(lost)} (or the JSON files "
            f"{', '.join(JSON_FILES)}). The spreadsheets lie in the folder emotion_wheel of AffectGPT's repository."
        )
    wheels = tuple(_read_wheel(folder / f"wheel{k}.xlsx") for k in range(1, 6))
    return wheels, _read_synonyms(folder / "synonym.xlsx", wheels), _read_forms(folder / "format.csv")


def _read_wheel(path: Path) -> Wheel:
    """Read one wheel; a blank cell of a column repeats the value above it."""
    sectors: dict[str, dict[str, list[str]]] = {}
    above = ["", "", ""]
    for row in _rows(path, ("level1", "level2", "level3")):
        above = [cell or kept for cell, kept in zip(row, above)]
        sector, child, fine = above
        sectors.setdefault(sector, {}).setdefault(child, []).append(fine)
    return Wheel(path.stem, sectors, SOURCE)


def _read_synonyms(path: Path, wheels: tuple[Wheel, ...]) -> Words:
    """Read the union over eight runs; a word that is on a wheel leads to itself too."""
    found: dict[str, set[str]] = {}
    columns = [f"{kind}_run{k}" for k in range(1, 9) for kind in ("word", "synonym")]
    for row in _rows(path, columns):
        for word, near in zip(row[::2], row[1::2]):
            for base in _items(near):
                found.setdefault(base, set()).add(word)
    for word in frozenset().union(*(wheel.words for wheel in wheels)):
        found.setdefault(word, set()).add(word)
    return {base: tuple(sorted(words - {""})) for base, words in sorted(found.items()) if base}


def _read_forms(path: Path) -> Words:
    found: dict[str, list[str]] = {}
    require_regular(path, MAX_JSON)
    with path.open(encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file):
            if row.get("name") is None or row.get("format") is None:
                raise ValueError(f"{path}: a row lacks the column name or format.")
            base = row["name"].strip().lower()
            for form in _items(row["format"]):
                if base not in found.setdefault(form, []):
                    found[form].append(base)
    return {form: tuple(bases) for form, bases in found.items()}


def _items(text: str) -> list[str]:
    """Return the lower-case items of a comma list, with or without brackets and quotes."""
    from veena_lens.emotion.words.lexicon import string_to_list

    return [item.lower() for item in string_to_list(text)]


def _rows(path: Path, columns: Any) -> Iterator[list[str]]:
    """Yield rows of the first sheet as stripped lower-case cells, "" for blank ones.

    Raises: ValueError for lost columns; ImportError without openpyxl.
    """
    try:
        from openpyxl import load_workbook
    except ImportError as error:
        raise ImportError(
            f"Reading {path.name} needs openpyxl: pip install 'veena-lens[wheels]'. JSON files of the wheels need none."
        ) from error
    require_regular(path, MAX_JSON)
    try:
        book = load_workbook(path, read_only=True, data_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a spreadsheet ({error}); copy or download it again.") from error
    try:
        rows = book.worksheets[0].iter_rows(values_only=True)
        header = [str(cell or "").strip() for cell in next(rows, ())]
        lost = [column for column in columns if column not in header]
        if lost:
            raise ValueError(f"{path}: no column {', '.join(lost)}; its columns are {', '.join(header)}.")
        places = [header.index(column) for column in columns]
        for row in rows:
            cells = ["" if row[p] is None else str(row[p]).strip().lower() for p in places]
            if any(cells):
                yield cells
    finally:
        book.close()
