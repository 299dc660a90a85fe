"""Check plain records and make a set of pairs of them, with everything that is wrong listed at once, before any work.

A record is a dictionary with the fields of a manifest's line; its place (a line, a row, a file) is what messages name.
Each image is decoded once, however many records share it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from veena_lens.emotion.pairs.pair_set import NEUTRAL, Example, Pair, PairSet
from veena_lens.images.files import read_image

TEXTS = ("emotion", "question")
OPTIONAL = ("pair", "identity", "style", "split", "context", "context_emotion", "context_strength")
FIELDS = ("file", "emotion", "pair", "identity", "style", "attributes", "split", "question", *OPTIONAL[4:])
SHOWN = 100


class PairProblems(ValueError):
    """What is wrong with a set of pairs: `problems`, each naming its lines and files."""

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        lines = [f"{len(problems)} problem{'s'[: len(problems) != 1]} in {source}:"]
        lines += [f"  {problem}" for problem in problems[:SHOWN]]
        if len(problems) > SHOWN:
            lines.append(f"  ... and {len(problems) - SHOWN} more; `.problems` of this error has them all.")
        super().__init__("\n".join(lines))


@dataclass(frozen=True)
class Placed:
    """A record, and where it stands."""

    where: str
    record: Mapping[str, Any]


def build(
    placed: Sequence[Placed], source: str, unreadable: str, wheels: Any, known: Sequence[str] = FIELDS
) -> PairSet:
    """Return the set of pairs that the records describe.

    Args:
        placed: records and their places; `record["picture"]` is a path or PIL image, other fields are as `known`.
        source: where the records come from, for messages.
        unreadable: "error", or "skip" to leave out images that cannot be read, with a warning that names them.
        wheels: which emotions are known; None is the project's.
        known: the fields that a record may have.

    Raises: PairProblems; ValueError for another `unreadable`.
    """
    if unreadable not in ("error", "skip"):
        raise ValueError(f"unreadable={unreadable!r} must be 'error' or 'skip'.")
    problems = [problem for item in placed for problem in _field_problems(item, known)]
    if problems:  # without sound fields the rest would only repeat them
        raise PairProblems(source, problems)
    sizes = _picture_sizes(placed)
    lost = {name: text for name, text in sizes.items() if isinstance(text, str)}
    if unreadable == "error":
        by_picture: dict[Any, list[str]] = {}
        for item in placed:
            by_picture.setdefault(_name(item), []).append(item.where)
        problems += [f"{_places(by_picture[name])}: {text}" for name, text in lost.items()]
    kept = [item for item in placed if _name(item) not in lost]
    problems += _duplicates(placed) + _label_problems(placed, wheels) + _pair_problems(placed)
    problems += _size_problems(kept, sizes)
    if not placed:
        problems.append("no records at all; a pair needs an emotional and a neutral image.")
    if problems:
        raise PairProblems(source, problems)
    if lost:
        listed = "\n".join(f"  {text}" for text in lost.values())
        warnings.warn(f"{source}: going on without {len(lost)} images:\n{listed}", stacklevel=3)
        if not kept:
            raise PairProblems(source, ["none of the images can be read."])
    return replace(_assembled([_example(item) for item in kept], source), skipped=tuple(map(str, lost.values())))


def _example(item: Placed) -> Example:
    record = {name: value for name, value in item.record.items() if value is not None or "context" in name}
    picture = record["picture"]
    file = record.get("file") or (Path(picture).name if isinstance(picture, (str, Path)) else "")
    identity = record.get("identity") or record.get("pair") or file
    return Example(**{**record, "file": file, "identity": identity})


def _assembled(examples: Sequence[Example], source: str) -> PairSet:
    """Put every emotional image with the neutral one of its scene, asked the same."""
    twins = {e.pair: e for e in reversed(examples) if e.is_neutral and e.pair is not None}
    scenes = {e.pair for e in examples if not e.is_neutral} & set(twins)
    pairs, neutrals, singles = [], [], []
    for example in examples:
        if example.pair is None or example.pair not in scenes:  # a twin that cannot be read leaves a single
            singles.append(replace(example, pair=None))
        elif example.is_neutral:
            neutrals.append(example)
        else:
            words = ("question", "context", "context_emotion", "context_strength")
            twin = replace(twins[example.pair], **{word: getattr(example, word) for word in words})
            pairs.append(Pair(example, twin))
    return PairSet(tuple(pairs), tuple(neutrals), tuple(singles), source)


def _name(item: Placed) -> Any:
    picture = item.record["picture"]
    return str(picture) if isinstance(picture, (str, Path)) else id(picture)


def _places(where: Sequence[str]) -> str:
    return ", ".join(where[:4]) + (f" and {len(where) - 4} more" if len(where) > 4 else "")


def _field_problems(item: Placed, known: Sequence[str]) -> list[str]:
    """List unknown, missing and mistyped fields of one record."""
    record, found = item.record, []
    for name in record:
        if name not in known and name != "picture":
            near = get_close_matches(str(name), known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}."
            found.append(f"{item.where}: unknown field {name!r}{hint}")
    if record.get("picture") is None:
        found.append(f"{item.where}: no image; give its file as `picture`.")
    for name in TEXTS:
        if not isinstance(record.get(name), str) or not record[name].strip():
            found.append(f"{item.where}: {name}={record.get(name)!r} must be text.")
    for name in (*OPTIONAL, "file"):
        if not isinstance(record.get(name), (str, type(None))):
            found.append(f"{item.where}: {name}={record[name]!r} must be text or null.")
    if not isinstance(record.get("attributes"), (Mapping, type(None))):
        found.append(f"{item.where}: attributes={record['attributes']!r} must be a dictionary.")
    if (record.get("context") is None) != (record.get("context_emotion") is None):
        found.append(f"{item.where}: context and context_emotion belong together; one of them is missing.")
    return found


def _picture_sizes(placed: Sequence[Placed]) -> dict[Any, tuple[int, int] | str]:
    """Return (width, height) of each image, or why it cannot be read. Decoding runs in threads: it holds no lock."""
    pictures = {_name(item): item.record["picture"] for item in placed}

    def look(picture: Any) -> tuple[int, int] | str:
        try:
            return read_image(picture).size
        except (FileNotFoundError, ValueError, TypeError) as error:
            return str(error)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(pictures, pool.map(look, pictures.values()), strict=True))


def _duplicates(placed: Sequence[Placed]) -> list[str]:
    """List records that ask the same of the same image."""
    groups: dict[Any, list[str]] = {}
    for item in placed:
        groups.setdefault((_name(item), item.record["question"], item.record.get("context")), []).append(item.where)
    return [f"{_places(where)}: the same image, question and context." for where in groups.values() if len(where) > 1]


def _label_problems(placed: Sequence[Placed], wheels: Any) -> list[str]:
    """List emotions that no wheel covers; neutral needs none."""
    if wheels is None:
        from veena_lens.emotion.words.wheels import EmotionWheels

        wheels = EmotionWheels.default()
    groups: dict[str, list[str]] = {}
    for item in placed:
        for name in ("emotion", "context_emotion"):
            label = item.record.get(name)
            if label is not None and label != NEUTRAL:
                groups.setdefault(label, []).append(item.where)
    found = []
    for label, where in groups.items():
        try:
            wheels.require([label])
        except ValueError as error:
            found.append(f"{_places(list(dict.fromkeys(where)))}: {error}")
    return found


def _pair_problems(placed: Sequence[Placed]) -> list[str]:
    """List scenes without a neutral image or with several, without an emotional one, or whose twins disagree."""
    scenes: dict[str, list[Placed]] = {}
    for item in placed:
        if item.record.get("pair") is not None:
            scenes.setdefault(item.record["pair"], []).append(item)
    found = []
    for scene, items in scenes.items():
        neutral = {_name(item): item.where for item in items if item.record["emotion"] == NEUTRAL}
        emotional = [item.where for item in items if item.record["emotion"] != NEUTRAL]
        if not neutral:
            found.append(
                f"{_places(emotional)}: pair {scene!r} has no neutral image; add it, or leave `pair` out for an "
                "image without a twin."
            )
        if len(neutral) > 1:
            found.append(f"{_places(list(neutral.values()))}: pair {scene!r} has {len(neutral)} neutral images.")
        if not emotional:
            found.append(f"{_places(list(neutral.values()))}: pair {scene!r} has a neutral image and no emotional one.")
        for name in ("identity", "style", "split"):
            values = {item.record.get(name): item.where for item in items}
            if len(values) > 1:
                told = ", ".join(f"{value!r} ({where})" for value, where in values.items())
                found.append(f"pair {scene!r}: twins differ in {name}: {told}.")
    return found


def _size_problems(placed: Sequence[Placed], sizes: Mapping[Any, Any]) -> list[str]:
    """List twins of unequal size: their token grids, and so their positions, would differ."""
    neutral = {i.record.get("pair"): i for i in placed if i.record["emotion"] == NEUTRAL}
    found = {}
    for item in placed:
        twin = neutral.get(item.record["pair"]) if item.record.get("pair") is not None else None
        if twin is None or sizes[_name(item)] == sizes[_name(twin)]:
            continue
        (width, height), (twin_width, twin_height) = sizes[_name(item)], sizes[_name(twin)]
        found[_name(item)] = (
            f"{item.where}: {width} x {height} pixels, but its neutral twin ({twin.where}) has "
            f"{twin_width} x {twin_height}; twins need the same size, so that their token grids agree."
        )
    return list(found.values())
