"""Long runs: their progress, and results kept in a folder so that a stopped run resumes with the same result.

A `Store` belongs to one experiment and holds its units: each is looked up before it is computed, written under a
temporary name of this process, then renamed, so that a file is whole or absent whoever is killed when. Experiments
and units are named by content (`fingerprints`), never by an address in memory. `json_lines` does the same for rows of
text in one file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, final

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from veena_lens.fingerprints import as_json, fingerprint, tensor_bytes

Result = dict[str, Any]
T = TypeVar("T")

SHORT_NAME = re.compile(r"[\w-]{1,48}")  # names of units that are file names as they stand
TENSOR = "tensor "  # before the name of a tensor in a file, which may be empty


# --- progress ---------------------------------------------------------------------------------------------------------


def progress(
    items: Iterable[T],
    label: str,
    show: bool = True,
    *,
    total: int | None = None,
    size: Callable[[T], int] = lambda item: 1,
) -> Iterator[T]:
    """Yield the items in order, with a progress bar that moves on after each.

    Args:
        items: what is worked on.
        label: the words in front of the bar.
        show: False for no bar; a log or a pipe gets none in any case.
        total: the length of the bar; by default the number of items.
        size: how far an item moves the bar, e.g. `len` for batches.
    """
    items = list(items) if total is None else items
    with counting(sum(map(size, items)) if total is None else total, label, show) as advance:
        for item in items:
            yield item
            advance(size(item))


def has_screen() -> bool:
    """Return True where a progress bar can move: on a terminal and in a notebook, and not in a log or a pipe."""
    ipython = sys.modules.get("IPython")
    return sys.stderr.isatty() or hasattr(ipython and ipython.get_ipython(), "kernel")


@contextmanager
def counting(total: int, label: str, show: bool = True) -> Iterator[Callable[[int], Any]]:
    """Provide a function that moves a bar on by so many steps; without `show`, and in logs and pipes, nothing shows."""
    if show and has_screen():
        from tqdm.auto import tqdm

        with tqdm(total=total, desc=label, unit="row", leave=False) as bar:
            yield bar.update
    else:
        yield lambda n: None


# --- results in a folder ----------------------------------------------------------------------------------------------


@final
class Store:
    """The units of one experiment by name, in `folder/<hash of the experiment>`; several processes may share it.

    A unit is a dictionary of tensors and of anything JSON holds, in one safetensors file that says which experiment's
    and which unit it is, with a checksum: a file that a crash cut short, that was damaged since, or that holds
    another unit counts as not done. With folder=None nothing is kept, and neither the experiment nor any name is
    looked at.

    Args:
        folder: where results of any number of experiments lie, or None.
        experiment: what the results depend on, apart from the names of units and the version of this package: a model,
            data, settings (`fingerprint`).

    Raises: ValueError for an experiment whose content cannot be told; OSError that says how to go on, where the disk
        is full."""

    def __init__(self, folder: str | Path | None, experiment: Any) -> None:
        self.folder: Path | None = None
        self.experiment = ""
        if folder is not None:
            text = as_json(experiment)
            self.experiment = hashlib.sha256(f"{version('veena_lens')}\n{text}".encode()).hexdigest()[:16]
            self.folder = Path(folder) / self.experiment
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / "experiment.json").is_file():
                write_file(self.folder / "experiment.json", text + "\n")

    def under(self, name: str) -> Store:
        """Return a part of the same store, in a folder of this name."""
        part = object.__new__(Store)
        part.folder = None if self.folder is None else self.folder / name
        part.experiment = f"{self.experiment}/{name}"
        if part.folder is not None:
            part.folder.mkdir(parents=True, exist_ok=True)
        return part

    def key(self, value: Any) -> Any:
        """Return the fingerprint of a part of many names, so that it is taken once; None where nothing is kept."""
        return None if self.folder is None else fingerprint(value)

    def do(self, name: Any, compute: Callable[[], Result]) -> Result:
        """Return the unit kept under `name`, or compute and keep it.

        Args:
            name: what tells the unit from the others of this experiment (any value with a fingerprint).
            compute: gives the unit. Where another process kept it meanwhile, that one is returned.

        Raises: OSError that says how to go on, where the disk is full."""
        if self.folder is None:
            return compute()
        key = fingerprint(name)
        kept = self._read(key)
        if kept is not None:
            return kept
        result = compute()
        is_first = self._write(key, result)
        return result if is_first else self._read(key) or result

    def each(
        self,
        items: Sequence[T],
        compute: Callable[[T], Result],
        *,
        name: Callable[[T], Any] = lambda item: item,
        label: str = "",
        show: bool = False,
    ) -> list[Result]:
        """Return the unit of every item, in order, under a progress bar.

        Args:
            items: what to compute.
            compute: gives an item's unit.
            name: an item's name; by default the item itself.
            label, show: of the progress bar.

        Raises: as `do`."""
        return [self.do(name(item), lambda item=item: compute(item)) for item in progress(items, label, show)]

    def read(self, name: Any) -> Result | None:
        """Return what was kept under a name, or None."""
        return None if self.folder is None else self._read(fingerprint(name))

    def manifest(self) -> list[dict[str, Any]]:
        """Return name, file, size in bytes and checksum of every finished unit, read from the files themselves."""
        found = []
        for path in [] if self.folder is None else sorted(self.folder.rglob("*.safetensors")):
            with suppress(Exception), safe_open(str(path), framework="pt") as file:
                about = file.metadata()
                row = {"name": json.loads(about["name"]), "file": str(path.relative_to(str(self.folder)))}
                found.append(row | {"bytes": path.stat().st_size, "checksum": about["checksum"]})
        return found

    def _path(self, key: Any) -> Path:
        assert self.folder is not None
        short = isinstance(key, str) and SHORT_NAME.fullmatch(key)
        name = key if short else hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]
        return self.folder / f"{name}.safetensors"

    def _read(self, key: Any) -> Result | None:
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            with safe_open(str(path), framework="pt") as file:
                about = file.metadata()
                tensors = {n.removeprefix(TENSOR): file.get_tensor(n) for n in file.keys() if n.startswith(TENSOR)}  # noqa: SIM118
            is_this = about["name"] == _text(key) and about["experiment"] == self.experiment
            if not is_this or about["checksum"] != _checksum(about, tensors):
                raise ValueError("damaged, or another unit")
            return json.loads(about["json"]) | tensors
        except Exception:  # safetensors' own error type is not exported
            path.unlink(missing_ok=True)
            return None

    def _write(self, key: Any, result: Result) -> bool:
        """Return True where this unit is the one that is kept."""
        path = self._path(key)
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in result.items() if isinstance(v, Tensor)}
        rest = json.dumps({k: v for k, v in result.items() if not isinstance(v, Tensor)})
        about = {"name": _text(key), "experiment": self.experiment, "json": rest}
        about["checksum"] = _checksum(about, tensors)
        named = {f"{TENSOR}{k}": v for k, v in tensors.items()}
        with _draft(path) as part:
            save_file(named or {"_": torch.zeros(1)}, str(part), metadata=about)
            return _publish(part, path)

    def __repr__(self) -> str:
        if self.folder is None:
            return "Store(not kept)"
        return f"Store({self.folder}, {len(list(self.folder.rglob('*.safetensors')))} units done)"


def _text(key: Any) -> str:
    return json.dumps(key, sort_keys=True)


def _checksum(about: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    seen = hashlib.sha256("\n".join(about[part] for part in ("name", "experiment", "json")).encode())
    for key in sorted(tensors):
        seen.update(f"\n{key} {tensors[key].dtype} {list(tensors[key].shape)}".encode() + tensor_bytes(tensors[key]))
    return seen.hexdigest()


def _publish(part: Path, path: Path) -> bool:
    """Give a finished file its name, unless another has it; False where another has."""
    try:
        os.link(part, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        part.replace(path)
    return True


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file in one step, with its folder; what was there before is replaced, or kept where this fails.

    Args:
        path: the file.
        content: a text, written as UTF-8, or bytes.

    Raises: OSError that says how to go on, where the disk is full."""
    with _draft(path, "nothing that was there has changed") as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        part.replace(path)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file in one step, as `write_file` does.

    Args:
        path: the file.
        tensors: on any device, with or without gradients, and of any strides.
        metadata: the texts of the header.

    Raises: OSError that says how to go on, where the disk is full."""
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with _draft(path, "nothing that was there has changed") as part:
        save_file(whole, str(part), metadata=metadata)
        part.replace(path)


@contextmanager
def _draft(path: Path, kept: str = "results so far are kept") -> Iterator[Path]:
    """Provide a name beside `path` that no other process or thread takes; what is left there at the end goes.

    Raises: OSError that says how to go on, where the disk is full; safetensors has its own error for it."""
    part = path.with_name(f".{path.name[:100]}.{os.getpid()}.{secrets.token_hex(4)}.part")
    with room(path.parent, kept):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield part
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def room(place: Path, kept: str) -> Iterator[None]:
    """Turn the error of a full disk into one that says what is kept and how to go on.

    Args:
        place: the file or folder that is written.
        kept: what is not lost, as the end of a sentence.
    """
    try:
        yield
    except Exception as error:
        if getattr(error, "errno", None) != errno.ENOSPC and "os error 28" not in str(error):
            raise
        raise OSError(errno.ENOSPC, f"The disk of {place} is full; {kept}. Free some space and run again.") from error
