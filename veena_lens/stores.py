"""Opening the files that the package writes, with errors that name the file and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open


@contextmanager
def opened(path: str | Path, what: str, device: str = "cpu") -> Iterator[Any]:
    """A safetensors file that should hold `what` ("a circuit"), open for reading.

    Raises: FileNotFoundError without the file; ValueError for one that was cut short or is no safetensors file, also
    where that shows while it is read."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No {what.split(' ', 1)[-1]} at {path}.")
    try:
        with safe_open(str(path), framework="pt", device=device) as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) cannot be read as {what}: {error}. It was cut short or is another "
            "kind of file; copy it again, or save it anew."
        ) from error
