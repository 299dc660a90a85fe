"""Weights that stay in their files: a model reads them through a private mapping, and nothing is copied.

Files up to 64 MiB are copied all the same, which takes no time and makes the model independent of them.

What training or `param.data` changes stays in memory, since the system copies a page before it is written. The file
itself must stay as it is for as long as the model is used; one that was replaced as a whole, as download tools do it,
does no harm.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veena_lens.checkpoints.finite import require_finite

CHUNK = 2**23  # bytes: small enough for a processor's cache to help, large enough for few calls
READERS = 4
SMALL, LARGE = 2**26, 2**30  # bytes of a file: up to SMALL it is copied, beyond LARGE it is judged beside other work
_buffers = threading.local()


@dataclass(frozen=True)
class MappedFile:
    """A weight file that parameters of a model lie in, as it was when they were mapped.

    places: parameter name -> its address in the mapping.
    checks: at most one, which runs beside other work."""

    path: Path
    identity: tuple[int, int]
    written: tuple[int, int]
    places: dict[str, int] = field(default_factory=dict)
    checks: list[FiniteCheck] = field(default_factory=list)

    def require_finite(self, keys: Mapping[str, torch.dtype]) -> None:
        """Check that the chosen tensors are finite: at once in a file up to LARGE, else before the first pass.

        Raises: ValueError with the key."""
        self.checks[:] = [FiniteCheck(self.path, keys)]
        if self.written[0] <= LARGE:
            self.checks.pop().require()

    @classmethod
    def of(cls, path: Path) -> MappedFile:
        """Return a file as it is now."""
        now = path.stat()
        return cls(path, (now.st_dev, now.st_ino), (now.st_size, now.st_mtime_ns))

    @property
    def is_small(self) -> bool:
        """Return whether a copy costs so little that the model had better not depend on the file."""
        return self.written[0] <= SMALL

    @property
    def was_rewritten(self) -> bool:
        """Return whether the mapped bytes may have changed. A file of that name with other contents is another file."""
        try:
            now = os.stat(self.path)
        except OSError:
            return False  # removed: the mapping keeps what it held
        return (now.st_dev, now.st_ino) == self.identity and (now.st_size, now.st_mtime_ns) != self.written


class FiniteCheck:
    """Reads tensors of a file in a thread and looks for numbers that are not finite."""

    def __init__(self, path: Path, keys: Mapping[str, torch.dtype]) -> None:
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(path, dict(keys)), name="finite weights", daemon=True)
        self._thread.start()

    def _run(self, path: Path, keys: dict[str, torch.dtype]) -> None:
        try:
            require_finite_file(path, keys)
        except Exception as error:
            self._error = error

    def require(self) -> None:
        """Wait for the end. Raises: ValueError with the key whose numbers are not finite."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def __deepcopy__(self, memo: dict[int, Any]) -> FiniteCheck:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        self.require()
        return FiniteCheck, (Path(), {})


def require_sound(model: nn.Module, files: tuple[MappedFile, ...]) -> None:
    """Check that the files in which a model's weights lie hold finite numbers and were not written to since.

    Raises: ValueError for numbers that are not finite; RuntimeError with a file that was written to."""
    for file in files:
        for check in file.checks:
            check.require()
        if not file.was_rewritten:
            continue
        here = dict(model.named_parameters())
        if any(name in here and here[name].data_ptr() == place for name, place in file.places.items()):
            raise RuntimeError(
                f"{file.path} was written to while the model's weights are mapped from it, so that they are no longer "
                "what was loaded. Load the model again, and replace files as a whole (write beside them and rename)."
            )


def require_finite_file(path: Path, keys: Mapping[str, torch.dtype]) -> None:
    """Check that the chosen tensors of a safetensors file are finite, without taking memory for them.

    The file is read through small buffers, since a mapping that is read counts as memory of the process.

    Raises: ValueError with the key."""
    if not keys:
        return
    with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1)) as readers:
        for key, is_finite in readers.map(lambda span: (span[0], _is_finite(path, *span[1:])), _spans(path, keys)):
            if not is_finite:
                _require_finite_tensor(path, key)


def _spans(path: Path, keys: Mapping[str, torch.dtype]) -> Iterator[tuple[str, int, int, torch.dtype]]:
    """Yield (key, first byte, number of bytes, dtype), in pieces that threads can share."""
    header, begin = read_header(path)
    for key, dtype in keys.items():
        start, stop = (begin + at for at in header[key]["data_offsets"])
        for at in range(start, stop, CHUNK):
            yield key, at, min(CHUNK, stop - at), dtype


def _is_finite(path: Path, start: int, size: int, dtype: torch.dtype) -> bool:
    """Return whether the sum of a piece is finite; it can overflow where every number is finite."""
    buffer = getattr(_buffers, "bytes", b"")
    if len(buffer) < size:  # the first piece of this thread
        buffer = _buffers.bytes = bytearray(CHUNK)
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        if file.readinto(memoryview(buffer)[:size]) != size:
            raise ValueError(f"{path} became shorter while it was read; copy or download it again.")
    return bool(torch.frombuffer(buffer, dtype=dtype, count=size // dtype.itemsize).sum().isfinite())


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file that is known to be whole, and where its data begin."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size)), 8 + size


class ReadFile:
    """A safetensors file on a disk that cannot be mapped, read into memory: stands in for what `safe_open` returns."""

    def __init__(self, path: Path) -> None:
        self._path = path
        header, _ = read_header(path)
        self._about: dict[str, str] = header.pop("__metadata__", {})
        self._header: dict[str, Any] = header

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        from safetensors.torch import load

        return load(self._path.read_bytes())

    def keys(self) -> list[str]:
        return list(self._header)

    def metadata(self) -> dict[str, str]:
        return self._about

    def get_slice(self, key: str) -> ReadSlice:
        return ReadSlice(self._header[key]["dtype"], self._header[key]["shape"])

    def get_tensor(self, key: str) -> Tensor:
        return self._tensors[key]


@dataclass(frozen=True)
class ReadSlice:
    """The dtype and shape of a tensor in a header."""

    dtype: str
    shape: list[int]

    def get_dtype(self) -> str:
        return self.dtype

    def get_shape(self) -> list[int]:
        return self.shape


def _require_finite_tensor(path: Path, key: str) -> None:
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        tensor: Tensor = file.get_tensor(key)
        require_finite(tensor, key, str(path))
