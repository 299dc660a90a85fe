"""Load MER-UniBench's published layout: find folders, join labels and subtitles, and report gaps.

Labels and scoring need numpy alone; images are opened later, sample by sample (`media.py`). Subtitles of one set are
name -> sentence; a sample without a row has the empty one.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from veena_lens.emotion.mer_unibench.data_sets import SETS, SetInfo, Truth, find_set, read_labels, read_rows


def subtitle_file(folder: Path, info: SetInfo) -> Path | None:
    """Return the set's subtitle file under any of its names, None when there is none."""
    return next((folder / name for name in info.subtitles[0] if (folder / name).is_file()), None)


def read_subtitles(folder: Path, info: SetInfo) -> dict[str, str]:
    """Read name -> sentence in the language that the reference reads; a repeated name keeps its last row.

    No file gives no subtitle.

    Args:
        folder: the set's.
        info: the set.

    Raises: ValueError for a file without the columns.
    """
    path = subtitle_file(folder, info)
    if path is None:
        return {}
    column = info.subtitles[1]
    return {row["name"]: row[column] for row in read_rows(path, ("name", column))}


Overrides = Mapping[str, str | Path]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One clip: its set and folder, its truth (class word, list string or sentiment), and what is said in it."""

    name: str
    truth: Truth
    subtitle: str
    folder: Path
    info: SetInfo

    def __repr__(self) -> str:
        return f"Sample({self.info.key}/{self.name}, truth={self.truth!r}, subtitle={self.subtitle[:40]!r})"


@dataclass(frozen=True, kw_only=True)
class LoadedSet:
    """The test part of one set in the order of its label file, with notes on what differs from the published one."""

    info: SetInfo
    folder: Path
    samples: tuple[Sample, ...]
    notes: tuple[str, ...] = ()

    @property
    def truths(self) -> dict[str, Truth]:
        """Return name -> truth."""
        return {sample.name: sample.truth for sample in self.samples}

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    def __repr__(self) -> str:
        notes = "".join(f"\n    {note}" for note in self.notes)
        return f"LoadedSet({self.info.key}: {len(self)} of {self.info.count} samples in {self.folder}){notes}"


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """The sets found under a root, by key, and the keys of those that are absent."""

    root: Path
    sets: Mapping[str, LoadedSet]
    absent: tuple[str, ...]

    def __repr__(self) -> str:
        lines = [
            f"Benchmark({self.root}: {len(self.sets)} of {len(SETS)} sets; absent: {', '.join(self.absent) or '-'})"
        ]
        return "\n".join([*lines, *(f"  {found!r}" for found in self.sets.values())])


def load_benchmark(root: str | Path, *, overrides: Overrides | None = None, strict: bool = False) -> Benchmark:
    """Load every set that lies under `root`; absent ones are skipped and named.

    Args:
        root: the folder that holds the sets' folders.
        overrides: key -> folder of a set that lies elsewhere.
        strict: True makes a number of samples other than the published one an error instead of a warning.

    Raises: FileNotFoundError where no set is found, naming the folders looked for; otherwise as `load_set`.
    """
    require_root(root, overrides)
    found = [info for info in SETS if set_folder(root, info, overrides) is not None]
    if not found:
        raise FileNotFoundError(f"{root} holds no set of MER-UniBench; looked for {_all_folders()}.")
    return Benchmark(
        root=Path(root),
        sets={info.key: load_set(root, info.key, overrides=overrides, strict=strict) for info in found},
        absent=tuple(info.key for info in SETS if info not in found),
    )


def load_set(root: str | Path, key: str, *, overrides: Overrides | None = None, strict: bool = False) -> LoadedSet:
    """Load the test part of one set.

    Args:
        root, overrides, strict: as for `load_benchmark`.
        key: the set's key or title, as `find_set` takes it.

    Raises: FileNotFoundError for a lost folder or label file, saying where the set comes from; ValueError for labels
    that are not what the set has, and with `strict` for another number of samples.
    """
    info = find_set(key)
    require_root(root, overrides)
    folder = set_folder(root, info, overrides)
    if folder is None:
        raise FileNotFoundError(
            f"No {info.title} under {root}: looked for {' and '.join(info.folders)}. Give its folder by "
            f'overrides={{"{info.key}": path}}. To get it: {info.source}.'
        )
    labels = read_labels(folder, info)
    subtitles = read_subtitles(folder, info)
    notes = []
    if subtitle_file(folder, info) is None:
        notes.append(f"no subtitle file {' or '.join(info.subtitles[0])}: every subtitle is empty")
    if info.kind == "open" and subtitles:
        # The reference's test part are the names of the subtitle file, in its order.
        lost = [name for name in subtitles if name not in labels]
        if lost:
            notes.append(f"{len(lost)} of the subtitle file's names have no label and are left out, {lost[0]!r} first")
        labels = {name: labels[name] for name in subtitles if name in labels}
    if not labels:
        raise ValueError(f"{folder / info.label_file} has no test sample of {info.title}.")
    silent = sum(not subtitles.get(name) for name in labels)
    if silent and subtitles:
        notes.append(f"{silent} samples have no subtitle, or an empty one")
    notes += _doubts(info, folder, labels, strict)
    samples = tuple(
        Sample(name=name, truth=truth, subtitle=subtitles.get(name, ""), folder=folder, info=info)
        for name, truth in labels.items()
    )
    return LoadedSet(info=info, folder=folder, samples=samples, notes=tuple(notes))


def set_folder(root: str | Path, info: SetInfo, overrides: Overrides | None = None) -> Path | None:
    """Return the folder of a set: the override's, else the first of its folders that exists under root, else None.

    Args:
        root: the folder that holds the sets' folders.
        info: the set.
        overrides: key -> folder of a set that lies elsewhere.

    Raises: FileNotFoundError for an override that does not exist.
    """
    for key, path in (overrides or {}).items():
        if find_set(key) == info:
            if not Path(path).is_dir():
                raise FileNotFoundError(f"The folder given for {key!r} does not exist: {path}.")
            return Path(path)
    return next((Path(root) / name for name in info.folders if (Path(root) / name).is_dir()), None)


def require_root(root: str | Path, overrides: Overrides | None = None) -> None:
    """Check that the root exists, unless every set in use is given by an override.

    Raises: FileNotFoundError for a root that does not exist; ValueError for an override of an unknown set.
    """
    for key in overrides or {}:
        find_set(key)
    if not Path(root).is_dir() and not overrides:
        raise FileNotFoundError(
            f"The root of MER-UniBench does not exist: {root}. It is the folder that holds {_all_folders()}. The sets "
            f"are their owners' to give: `docs/mer_unibench.md` names where each comes from."
        )


def _doubts(info: SetInfo, folder: Path, labels: Mapping[str, Truth], strict: bool) -> Iterable[str]:
    """Return notes on counts and classes, which are warned of too; a wrong count is an error when strict."""
    notes = []
    if len(labels) != info.count:
        count = f"{len(labels)} samples of {info.title} in {folder}; the published test part has {info.count}"
        if strict:
            raise ValueError(f"{count}. Complete it, or load without strict=True.")
        notes.append(count)
    if info.key == "mer2024" and set(labels.values()) == {"neutral"}:
        notes.append(
            f"every label in {folder / info.label_file} is neutral: the challenge writes that where it withholds the "
            "truth, so this file holds no labels"
        )
    for note in notes:
        warnings.warn(note, stacklevel=3)
    return notes


def _all_folders() -> str:
    return ", ".join(info.folders[0] for info in SETS)
