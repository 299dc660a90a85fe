"""Read files that others wrote: regular ones alone, no larger than expected, and JSON without surprises."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

MAX_JSON = 64 * 2**20  # bytes of a JSON file
MAX_DEPTH = 64  # lists and objects within each other
MAX_DIGITS = 40  # of an integer; tokenizers write 10^30 for "no limit"


def require_regular(path: str | Path, limit: int | None = None) -> int:
    """Return the size of a file in bytes, once it is known to be a regular one (a link to one is).

    Opening a pipe or a device can wait for ever, which is why every reader asks before it opens.

    Args:
        path: the file.
        limit: bytes that it may have; None sets no limit.

    Raises: FileNotFoundError; ValueError for a folder, pipe, socket or device, or a file above the limit.
    """
    try:
        found = os.stat(path)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} cannot be the name of a file: {error}.") from error
    if not stat.S_ISREG(found.st_mode):
        kind = next((name for test, name in _KINDS if test(found.st_mode)), "something else")
        raise ValueError(f"{path} is {kind}, not a regular file.")
    if limit is not None and found.st_size > limit:
        raise ValueError(f"{path} has {found.st_size:,} bytes; at most {limit:,} are read.")
    return found.st_size


def open_regular(path: str | Path, limit: int | None = None) -> BinaryIO:
    """Open a regular file for reading bytes, after `require_regular`, whose arguments and errors it has."""
    require_regular(path, limit)
    return Path(path).open("rb")


def read_bytes(path: str | Path, limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes. Raises: as `require_regular`."""
    with open_regular(path, limit) as file:
        return file.read(limit)


def read_text(path: str | Path, limit: int = MAX_JSON) -> str:
    """Read a regular UTF-8 file of at most `limit` bytes. Raises: as `require_regular`; ValueError for other bytes."""
    try:
        return read_bytes(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}.") from error


def read_json(path: str | Path, limit: int = MAX_JSON) -> dict[str, Any]:
    """Read the object in a JSON file.

    Args:
        path: the file.
        limit: bytes that it may have.

    Raises: as `require_regular`; ValueError, as `json_object`.
    """
    return json_object(read_bytes(path, limit), str(path))


def json_object(content: str | bytes, what: str, *, finite: bool = True) -> dict[str, Any]:
    """Return the object that a JSON text holds: `parse_json`, and ValueError for a list, number, text or null."""
    found = parse_json(content, what, finite=finite)
    if not isinstance(found, dict):
        kind = "null" if found is None else {list: "a list", str: "a text"}.get(type(found), "a number")
        raise ValueError(f"{what} holds {kind}; expected a JSON object.")
    return found


def parse_json(content: str | bytes, what: str, *, finite: bool = True) -> Any:
    """Return the value of a JSON text.

    Args:
        content: the text, or its UTF-8 bytes.
        what: what messages call it.
        finite: False takes NaN and Infinity, which Python writes and JSON does not know.

    Raises: ValueError for what is not JSON, keys that stand twice in one object, integers of more than 40 digits,
    numbers that are not finite, half characters, or more than 64 lists and objects within each other.
    """

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(found)
        if len(made) != len(found):
            names = [name for name, _ in found]
            raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)[:60]!r} stands twice")
        return made

    def integer(text: str) -> int:
        if len(text) > MAX_DIGITS:
            raise ValueError(f"the integer {text[:20]}... has {len(text)} digits")
        return int(text)

    def number(text: str) -> float:
        found = float(text)
        if not math.isfinite(found):
            raise ValueError(f"the number {text[:40]} is too large")
        return found

    def constant(text: str) -> NoReturn:
        raise ValueError(f"{text} is not a number of JSON")

    checked: dict[str, Any] = dict(parse_float=number, parse_constant=constant) if finite else {}
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        found = json.loads(text, object_pairs_hook=pairs, parse_int=integer, **checked)
        _require_plain(found)
    except RecursionError as error:
        raise ValueError(f"{what} is not valid JSON: too many lists and objects within each other.") from error
    except ValueError as error:
        raise ValueError(f"{what} is not valid JSON: {error}.") from error
    return found


def _require_plain(value: Any) -> None:
    """Refuse values nested too deeply, and texts that no UTF-8 file can hold."""
    level: Sequence[Any] = [value]
    for _ in range(MAX_DEPTH + 1):
        inner: list[Any] = []
        for one in level:
            if isinstance(one, str):
                one.encode()
            elif isinstance(one, list):
                inner += one
            elif isinstance(one, dict):
                inner += one
                inner += one.values()
        if not inner:
            return
        level = inner
    raise ValueError("too many lists and objects within each other")


_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
