"""Uploads: each file that visitors give lies under a name that nobody can guess, and serves its visitor alone.

A path that comes back in a request is compared with those of the files that were stored here, character by character;
nothing else on the machine is looked at for it.
"""

from __future__ import annotations

import secrets
import shutil
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import BinaryIO

MOST_NAME_BYTES = 120
UNSAFE = set('<>:"|?*/\\')


class ForeignFile(ValueError):
    """A file that the visitor did not upload here."""

    def __init__(self) -> None:
        super().__init__("This file was not uploaded from this tab, or is no longer kept here; upload it again.")


@dataclass(frozen=True)
class Visitor:
    """A browser, by the cookie that it sent; one that sent none gets the `key` with the answer."""

    key: str
    is_new: bool


@dataclass(eq=False)
class Upload:
    """A stored file, who gave it, and the tab that it serves: the first that uses it."""

    path: Path
    size: int
    visitor: Visitor
    seconds: float
    session: str | None = None

    def serves(self, visitor: Visitor) -> bool:
        """Return True for the browser that gave the file; a client without cookies has but the path to show."""
        return visitor.key == self.visitor.key or (visitor.is_new and self.visitor.is_new)


class Uploads:
    """The stored files of one server."""

    def __init__(self, folder: Path, most_bytes: int, kept_seconds: float) -> None:
        """Keep at most `most_bytes` in a folder; files that are older than `kept_seconds` go, then the oldest."""
        self.folder, self.most_bytes, self.kept_seconds = folder, most_bytes, kept_seconds
        self._stored: OrderedDict[str, Upload] = OrderedDict()
        self._guard = threading.RLock()

    def store(self, name: str, source: BinaryIO, visitor: Visitor) -> str:
        """Store a file that a visitor gave; return its path."""
        folder = self.folder / secrets.token_urlsafe(24)
        folder.mkdir(mode=0o700, parents=True)
        path = folder / plain_name(name)
        with path.open("xb") as target:
            shutil.copyfileobj(source, target)
        with self._guard:
            self._stored[str(path)] = Upload(path, path.stat().st_size, visitor, time.monotonic())
            self._make_room()
        return str(path)

    def lend(self, path: object, session: str, visitor: Visitor | None = None) -> str:
        """Return the path of a stored file for a tab; the first tab that uses a file keeps it.

        visitor: the browser that asks; None where the tab alone is known, which must have used the file before.
        Raises: ForeignFile for every other path."""
        with self._guard:
            found = self._stored.get(path) if isinstance(path, str) else None
            if found is None or found.session not in (None, session):
                raise ForeignFile
            if found.session is None and (visitor is None or not found.serves(visitor)):
                raise ForeignFile
            if visitor is not None and not found.serves(visitor):
                raise ForeignFile
            found.session = session
            return str(found.path)

    def find(self, path: str, visitor: Visitor) -> Path | None:
        """Return the path of a file that this visitor gave, for download; None for every other path."""
        found = self._stored.get(path)
        return found.path if found is not None and found.serves(visitor) else None

    def forget(self, session: str) -> None:
        """Delete the files of a tab."""
        with self._guard:
            for path in [p for p, upload in self._stored.items() if upload.session == session]:
                self._delete(path)

    def clear(self) -> None:
        """Delete every file."""
        with self._guard:
            self._stored.clear()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _make_room(self) -> None:
        now = time.monotonic()
        for path in [p for p, upload in self._stored.items() if now - upload.seconds > self.kept_seconds]:
            self._delete(path)
        while len(self._stored) > 1 and sum(u.size for u in self._stored.values()) > self.most_bytes:
            self._delete(next(iter(self._stored)))

    def _delete(self, path: str) -> None:
        shutil.rmtree(self._stored.pop(path).path.parent, ignore_errors=True)


def plain_name(name: str) -> str:
    """Return the last part of a file's name without characters that could make a path; the ending is kept."""
    last = PurePosixPath(name.replace("\\", "/")).name
    kept = "".join(c for c in last if c.isprintable() and c not in UNSAFE).strip().lstrip(".")
    stem, ending = PurePosixPath(kept or "file").stem, PurePosixPath(kept or "file").suffix
    ending = ending if len(ending.encode("utf-8", "ignore")) <= 20 else ""
    short = stem.encode("utf-8", "ignore")[:MOST_NAME_BYTES].decode("utf-8", "ignore").strip()
    return f"{short or 'file'}{ending.encode('utf-8', 'ignore').decode('utf-8')}"
