"""Open files that others wrote: regular ones alone, and no larger than expected."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO


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


_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
