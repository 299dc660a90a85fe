"""Load and save pairs: a folder with a manifest, records, folders of images, `datasets` objects.

A manifest is JSON Lines, one example per line; several lines may share an image, so that one image asked under many
contexts is stored once. Every loader checks everything before it returns a set (`checks.py`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from veena_lens.checkpoints.files import bundled_path
from veena_lens.emotion.pairs.checks import FIELDS, PairProblems, Placed, build
from veena_lens.emotion.pairs.pair_set import NEUTRAL, Example, Pair, PairSet
from veena_lens.images.files import read_image, to_rgb, upright
from veena_lens.long_runs import write_file
from veena_lens.regular_files import MAX_JSON, json_object, read_bytes

__all__ = [
    "Example",
    "Pair",
    "PairProblems",
    "PairSet",
    "load_pairs",
    "pairs_from_dataset",
    "pairs_from_folders",
    "pairs_from_records",
    "save_pairs",
    "write_manifest",
]

MANIFEST = "manifest.jsonl"
QUESTION = "how does the person in the picture feel?"


def load_pairs(
    folder: str | Path | None = None,
    *,
    manifest: str = MANIFEST,
    unreadable: str = "error",
    wheels: Any = None,
) -> PairSet:
    """Load the pairs of a folder.

    Args:
        folder: holds the manifest, which names images relative to it; None is the images that travel with the package.
        manifest: the manifest's file name.
        unreadable: "error", or "skip" to go on without images that cannot be read, named in a warning.
        wheels: which emotions are known; None is the project's.

    Raises: FileNotFoundError without the manifest; PairProblems, listing with lines and files: images missing or
    unreadable, fields unknown or mistyped, duplicates, pairs without a neutral image, with several, or without an
    emotional one, twins that differ in person or size, emotions that no wheel covers.
    """
    folder = bundled_path("tiny-llava-emotion").parent / "pictures" if folder is None else Path(folder).expanduser()
    path = folder / manifest
    if not path.is_file():
        raise FileNotFoundError(
            f"No {manifest} in {folder}: write one, a JSON object a line with the fields {', '.join(FIELDS)}; or load "
            "images sorted into folders with pairs_from_folders."
        )
    placed, broken = [], []
    # Line feeds alone end a line: texts may hold other separators.
    for number, text in enumerate(read_bytes(path, MAX_JSON).split(b"\n"), start=1):
        if not text.strip():
            continue
        try:
            record = json_object(text, "it")
        except ValueError as error:
            broken.append(f"line {number}: no JSON object ({error}).")
            continue
        file = record.get("file")
        if isinstance(file, str) and (Path(file).is_absolute() or ".." in Path(file).parts or "\0" in file):
            broken.append(f"line {number}: the file {file!r} does not lie in the folder of its manifest.")
            continue
        picture = folder / file if isinstance(file, str) and file else None
        placed.append(Placed(f"line {number} ({file})", {**record, "picture": picture}))
    if broken:
        raise PairProblems(str(path), broken)
    return build(placed, str(path), unreadable, wheels)


def pairs_from_records(
    records: Iterable[Mapping[str, Any]],
    *,
    question: str = QUESTION,
    neutral: str = NEUTRAL,
    unreadable: str = "error",
    wheels: Any = None,
    source: str = "records",
) -> PairSet:
    """Make pairs from dictionaries.

    Args:
        records: dictionaries with `picture` (a path, or an image as `read_image` takes it), `emotion`, `pair` and any
            field of a manifest. Orientation tags are applied.
        question: what records without a question are asked.
        neutral: what the data call neutral.
        unreadable, wheels: as for `load_pairs`.
        source: where the records come from, for messages.

    Raises: as `load_pairs`, naming records by number.
    """
    placed: list[Placed] = []
    in_memory: dict[int, tuple[Any, Any]] = {}  # by identity: records may share an image
    for number, given in enumerate(records):
        record = {"question": question, **given}
        if record["question"] is None:
            record["question"] = question
        if record.get("emotion") == neutral:
            record["emotion"] = NEUTRAL
        picture = record.get("picture")
        if picture is not None and not isinstance(picture, (str, Path)):
            _, record["picture"] = in_memory.setdefault(id(picture), (picture, _upright(picture)))
        name = record.get("file") or (picture if isinstance(picture, (str, Path)) else None)
        placed.append(Placed(f"record {number}" + (f" ({name})" if name else ""), record))
    return build(placed, source, unreadable, wheels, ("picture", *FIELDS))


def pairs_from_folders(
    folder: str | Path,
    *,
    neutral: str = NEUTRAL,
    question: str = QUESTION,
    identity: Callable[[str], str] | None = None,
    split: str = "",
    unreadable: str = "error",
    wheels: Any = None,
) -> PairSet:
    """Make pairs from images sorted by emotion: `folder/<emotion>/<name>.png`, the twin `folder/<neutral>/<name>.png`.

    `name` (without its ending) joins twins, which may have other endings.

    Args:
        folder: holds one folder per emotion.
        neutral: the folder of the neutral twins.
        question: what is asked of every image.
        identity: gives the person's name for a file's name without its ending, such as
            `lambda name: name.split("-")[0]`; by default every name is another person.
        split: the split that every example gets.
        unreadable, wheels: as for `load_pairs`.

    Raises: FileNotFoundError for no such folder, or one without `neutral`; PairProblems as `load_pairs`.
    """
    folder = Path(folder).expanduser()
    names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if neutral not in names:
        found = ", ".join(names) or "no folders"
        raise FileNotFoundError(
            f"{folder} must hold one folder an emotion and one named {neutral!r} with the twins; it has {found}."
        )
    endings = Image.registered_extensions()
    records = []
    for emotion in names:
        for path in sorted((folder / emotion).iterdir()):
            if path.suffix.lower() in endings and not path.name.startswith("."):
                person = path.stem if identity is None else identity(path.stem)
                records.append(
                    {"picture": path, "file": f"{emotion}/{path.name}", "emotion": emotion}
                    | {"pair": path.stem, "identity": person, "split": split}
                )
    return pairs_from_records(
        records, question=question, neutral=neutral, unreadable=unreadable, wheels=wheels, source=str(folder)
    )


def pairs_from_dataset(
    dataset: Iterable[Mapping[str, Any]],
    columns: Mapping[str, str] | None = None,
    *,
    folder: str | Path | None = None,
    question: str = QUESTION,
    neutral: str = NEUTRAL,
    unreadable: str = "error",
    wheels: Any = None,
) -> PairSet:
    """Make pairs from a Hugging Face dataset, or any iterable of dictionaries.

    Args:
        dataset: its rows. Numbers of class labels become their names. Images may be PIL images, paths, or undecoded
            (`{"bytes", "path"}`).
        columns: our field -> the data's column, for those of another name, such as
            `{"picture": "image", "emotion": "label"}`; columns named as our fields are taken too, others left.
        folder: where PIL images are written, so that only paths are held; None keeps them in memory.
        question: what rows without a question are asked.
        neutral: what the data call neutral.
        unreadable, wheels: as for `load_pairs`.

    Raises: ValueError for a field that we do not have, or a column that the data lack; PairProblems as `load_pairs`.
    """
    fields = ("picture", *FIELDS)
    columns = dict(columns or {})
    unknown = [name for name in columns if name not in fields]
    if unknown:
        raise ValueError(f"pairs_from_dataset: no field {unknown[0]!r}; the fields are {', '.join(fields)}.")
    features = getattr(dataset, "features", None) or {}
    target = None if folder is None else Path(folder).expanduser()
    if target is not None:
        target.mkdir(parents=True, exist_ok=True)
    records = []
    for number, row in enumerate(dataset):
        missing = [column for column in columns.values() if column not in row]
        if missing:
            raise ValueError(f"pairs_from_dataset: row {number} has no column {missing[0]!r}, only {', '.join(row)}.")
        taken = {name: columns.get(name, name) for name in fields if columns.get(name, name) in row}
        record = {name: _plain(row[column], features.get(column)) for name, column in taken.items()}
        if target is not None and isinstance(record.get("picture"), Image.Image):
            path = target / f"{number:07d}.png"
            _save(record["picture"], path)
            record["picture"] = path
        records.append(record)
    return pairs_from_records(
        records, question=question, neutral=neutral, unreadable=unreadable, wheels=wheels, source="a dataset"
    )


def _plain(value: Any, feature: Any) -> Any:
    """Return a cell as a record holds it: names for class labels, images opened, identifiers as text."""
    if isinstance(value, Mapping) and set(value) == {"bytes", "path"}:
        return value["path"] if value["bytes"] is None else _upright(value)
    if isinstance(value, Image.Image):
        return _upright(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return feature.int2str(value) if hasattr(feature, "int2str") else str(value)
    return value


def _upright(picture: Any) -> Any:
    """Return an image in memory, turned as its orientation tag says; one that cannot be read is left to the checks."""
    try:
        return upright(read_image(picture))
    except (TypeError, ValueError, FileNotFoundError):
        return picture


def _save(picture: Image.Image, path: Path) -> None:
    """Write an image; in RGB where the format does not take its mode."""
    try:
        picture.save(path)
    except OSError:
        to_rgb(picture).save(path)


def save_pairs(pairs: PairSet, folder: str | Path) -> Path:
    """Write the images and `manifest.jsonl` into a folder that `load_pairs` reads; return the manifest's path.

    An image that several examples share is written once. The manifest comes last, in one step, and
    replaces one that is there.

    Args:
        pairs: the set.
        folder: made where it does not exist.
    """
    folder = Path(folder).expanduser()
    named = _named(pairs)
    folder.mkdir(parents=True, exist_ok=True)
    for file, picture in named.files.items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(picture, Image.Image):
            _save(picture, path)
        elif not path.exists() or not path.samefile(picture):
            shutil.copyfile(Path(picture).expanduser(), path)
    return write_manifest(named.examples, folder / MANIFEST)


class _named:
    """Examples of a set with a file name for every image, no name used twice."""

    def __init__(self, pairs: PairSet) -> None:
        self.files: dict[str, Any] = {}
        self.names: dict[Any, str] = {}
        self.examples: list[Example] = []
        neutral = {(n.pair, n.question, n.context) for n in pairs.neutrals}
        for example in pairs.examples:
            self.add(example)
        for pair in pairs:  # a twin that is not an example itself still needs its line
            twin = pair.neutral
            if not any(scene == twin.pair for scene, *_ in neutral):
                neutral.add((twin.pair, twin.question, None))
                self.add(twin.without_context())

    def add(self, example: Example) -> None:
        picture = example.picture
        key = str(picture) if isinstance(picture, (str, Path)) else id(picture)
        if key not in self.names:
            wanted = example.file or (Path(picture).name if isinstance(picture, (str, Path)) else "")
            path = Path(wanted or f"{example.pair or example.identity or 'picture'}-{example.emotion}.png")
            path = Path(path.name) if path.is_absolute() or ".." in path.parts else path
            file, turn = path.as_posix(), 1
            while file in self.files:
                turn += 1
                file = path.with_stem(f"{path.stem}-{turn}").as_posix()
            self.names[key], self.files[file] = file, picture
        self.examples.append(replace(example, file=self.names[key]))


def write_manifest(examples: Iterable[Example], path: str | Path) -> Path:
    """Write one line per example, replacing the file in one step; return its path.

    Args:
        examples: in the order of the lines.
        path: of the manifest.
    """
    path = Path(path)
    write_file(path, "".join(json.dumps(e.record(), ensure_ascii=False) + "\n" for e in examples))
    return path
