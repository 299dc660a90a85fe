"""Rows of one run in a JSON Lines file, written as they come, from which a stopped run goes on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

from veena_lens.fingerprints import digest
from veena_lens.long_runs import room

CHECK = "check"  # the field of a row that holds its checksum


@final
class Lines:
    """Rows of one run in a JSON Lines file, written as they come; the first line holds the run's settings.

    Each row carries a checksum over itself and the settings, so that a row that was changed, repeated, or copied from
    another run is not taken for one that was computed. Opening a file goes on with it: `rows` are those that are
    there. A last line that a stop cut off is taken away. One process writes such a file at a time (`held`).

    Args:
        path: the file; it and its folder are made with the first rows.
        run: the settings, as JSON holds them.
        key: the field that tells one row from the others.

    Raises: ValueError for a file of another run, naming what differs, or for rows that are not as they were written,
        naming their lines."""

    def __init__(self, path: str | Path, run: Mapping[str, Any], key: str = "name") -> None:
        self.path, self.run, self.key = Path(path), dict(run), key
        self.rows: list[dict[str, Any]] = []
        if not self.path.exists() or self.path.stat().st_size == 0:
            return
        rows = json_rows(self.path)
        there = rows[0].get("run") if rows else None
        if rows and there != self.run:
            differing = [key for key in run if not isinstance(there, dict) or there.get(key) != run[key]]
            found = {key: there.get(key) for key in differing} if isinstance(there, dict) else "no settings"
            wanted = {key: run[key] for key in differing}
            raise ValueError(
                f"{path} holds another run: {found} instead of {wanted}. Name another file, or remove this one."
            )
        content = self.path.read_bytes()
        if not content.endswith(b"\n"):
            with self.path.open("r+b") as file:
                file.truncate(content.rfind(b"\n") + 1)
            rows = json_rows(self.path)
        self.rows = self._checked(rows[1:])

    def _checked(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the rows without their checksums."""
        kept: dict[str, dict[str, Any]] = {}
        for row in rows:
            body = {name: value for name, value in row.items() if name != CHECK}
            name = str(body.get(self.key))
            if row.get(CHECK) != self._check(body) or name in kept:
                what = "is there twice" if name in kept else "is not as it was written"
                raise ValueError(
                    f"{self.path}: the row of {self.key} {name!r} {what}. Remove it to compute it again, or name "
                    "another file."
                )
            kept[name] = body
        return list(kept.values())

    def _check(self, row: Mapping[str, Any]) -> str:
        return digest([self.run, row])[:12]

    @contextmanager
    def held(self) -> Iterator[Lines]:
        """Keep other processes from writing the file inside a `with` block, at whose start `rows` are read again.

        Raises: ValueError where another process is writing it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            try:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except ImportError:  # a system without locks on files
                pass
            except OSError as error:
                raise ValueError(
                    f"Another run is writing {self.path}. Wait until it ends, or name another file."
                ) from error
            self.rows = Lines(self.path, self.run, self.key).rows
            yield self

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write further rows at the end of the file. Raises: OSError that says how to go on, on a full disk."""
        new = list(rows)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with room(self.path, "the answers in it are kept"), self.path.open("a", encoding="utf-8") as file:
            first = [{"run": self.run}] if file.tell() == 0 else []
            whole = [*first, *(row | {CHECK: self._check(row)} for row in new)]
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in whole))
        self.rows += new


def json_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSON Lines file; a last line that was cut off by a stop is left out.

    Raises: ValueError for any other line that is not a JSON object."""
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number} is not JSON: {error}.") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} is not a JSON object: {line[:60]!r}.")
        rows.append(row)
    return rows
