"""Long runs: their progress, and results kept in a folder so that a stopped run resumes with the same result.

A `Store` belongs to one experiment and holds its units: each is looked up before it is computed, written under a
temporary name of this process, then renamed, so that a file is whole or absent whoever is killed when. Experiments
and units are named by content (`fingerprint`), never by an address in memory. `Lines` is the same for rows of text
in one file.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any, TypeVar, cast, final

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

Result = dict[str, Any]
T = TypeVar("T")

SAMPLED_ROWS = 8  # rows of each weight that tell one model from another
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
        show: False for no bar.
        total: the length of the bar; by default the number of items.
        size: how far an item moves the bar, e.g. `len` for batches.
    """
    if total is None:
        items = list(items)
        total = sum(size(item) for item in items)
    with counting(total, label, show) as advance:
        for item in items:
            yield item
            advance(size(item))


@contextmanager
def counting(total: int, label: str, show: bool = True) -> Iterator[Callable[[int], Any]]:
    """Provide a function that moves a progress bar on by so many steps, and does nothing where none is shown."""
    if not show:
        yield lambda n: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=label, unit="row", leave=False) as bar:
        yield bar.update


# --- names by content -------------------------------------------------------------------------------------------------


def fingerprint(value: Any) -> Any:
    """Return a value as JSON, equal for equal contents.

    A value with a `fingerprint` (a method, or a string) gives its own. Otherwise tensors, arrays and images are given
    by a hash, models by their size and some rows of every weight, data classes and functions by their parts."""
    if isinstance(value, Tensor):
        return [str(value.dtype), list(value.shape), hashlib.sha256(_bytes(value)).hexdigest()]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if hasattr(value, "fingerprint") and not isinstance(value, type):
        return value.fingerprint() if callable(value.fingerprint) else value.fingerprint
    if isinstance(value, torch.nn.Module):
        return _model(value)
    if isinstance(value, Mapping):
        return {str(key): fingerprint(part) for key, part in value.items()}
    if isinstance(value, (list, tuple, set, frozenset, range)):
        parts = [fingerprint(part) for part in value]
        return sorted(parts, key=str) if isinstance(value, (set, frozenset)) else parts
    if isinstance(value, functools.partial):
        return ["partial", fingerprint(value.func), fingerprint(value.args), fingerprint(value.keywords)]
    if isinstance(value, MethodType):
        return [fingerprint(value.__func__), fingerprint(value.__self__)]
    if isinstance(value, FunctionType):
        return _function(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: fingerprint(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return [type(value).__qualname__, parts]
    if hasattr(value, "tobytes"):  # an array of numpy, or an image of PIL
        about = [str(getattr(value, name, "")) for name in ("dtype", "mode", "shape", "size")]
        return [*about, hashlib.sha256(cast(Any, value).tobytes()).hexdigest()]
    if hasattr(value, "__dict__") and callable(value) and not isinstance(value, type):
        return [type(value).__qualname__, fingerprint(vars(value))]
    return repr(value)


def digest(value: Any) -> str:
    """Return a short hash of a value's fingerprint."""
    return hashlib.sha256(_as_json(value).encode()).hexdigest()[:24]


def _model(model: torch.nn.Module) -> list[Any]:
    """Return name, size, type, and a hash of a few rows of every weight."""
    seen = hashlib.sha256()
    for name, weight in model.named_parameters():
        rows = weight.detach().reshape(weight.shape[0] if weight.ndim else 1, -1)
        seen.update(name.encode() + str(tuple(weight.shape)).encode())
        seen.update(_bytes(rows[:: max(1, len(rows) // SAMPLED_ROWS)]))
    cfg = getattr(model, "cfg", None)
    about = [getattr(cfg, name, None) for name in ("model_name", "n_layers", "d_model")]
    return [*about, str(getattr(cfg, "dtype", None)), seen.hexdigest()[:24]]


def _function(function: FunctionType) -> list[Any]:
    """Return a function's name and code, with what it closes over and the plain values that it reads of its module."""
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    names = [function.__globals__.get(name) for name in function.__code__.co_names]
    read = [part for part in names if isinstance(part, (Tensor, str, int, float, bool, list, tuple))]
    rest = [fingerprint(part) for part in (function.__defaults__, function.__kwdefaults__, cells, read)]
    return [function.__module__, function.__qualname__, _code(function.__code__), *rest]


def _code(code: CodeType) -> str:
    """Return a hash of a function's instructions and constants, those of functions inside it too."""
    constants = [_code(part) if isinstance(part, CodeType) else repr(part) for part in code.co_consts]
    text = json.dumps([code.co_code.hex(), constants, list(code.co_names)])
    return hashlib.sha256(text.encode()).hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _as_json(value: Any) -> str:
    return json.dumps(fingerprint(value), sort_keys=True)


# --- results in a folder ----------------------------------------------------------------------------------------------


@final
class Store:
    """The units of one experiment by name, in `folder/<hash of the experiment>`; several processes may share it.

    A unit is a dictionary of tensors and of anything JSON holds, in one safetensors file with a checksum: a file that
    a crash cut short, or that was damaged since, counts as not done. With folder=None nothing is kept, and neither
    the experiment nor any name is looked at.

    Args:
        folder: where results of any number of experiments lie, or None.
        experiment: what the results depend on, apart from the names of units: a model, data, settings (`fingerprint`).
    """

    def __init__(self, folder: str | Path | None, experiment: Any) -> None:
        self.folder: Path | None = None
        if folder is not None:
            text = _as_json(experiment)
            self.folder = Path(folder) / hashlib.sha256(text.encode()).hexdigest()[:16]
            with _room(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                if not (self.folder / "experiment.json").is_file():
                    write_text(self.folder / "experiment.json", text + "\n")

    def under(self, name: str) -> Store:
        """Return a part of the same store, in a folder of this name."""
        part = object.__new__(Store)
        part.folder = None if self.folder is None else self.folder / name
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
            if about["checksum"] != _checksum(about["name"], about["json"], tensors):
                raise ValueError("damaged")
            return json.loads(about["json"]) | tensors
        except Exception:  # safetensors' own error type is not exported
            path.unlink(missing_ok=True)
            return None

    def _write(self, key: Any, result: Result) -> bool:
        """Return True where this unit is the one that is kept."""
        path = self._path(key)
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in result.items() if isinstance(v, Tensor)}
        rest = json.dumps({k: v for k, v in result.items() if not isinstance(v, Tensor)})
        name = json.dumps(key, sort_keys=True)
        about = {"name": name, "json": rest, "checksum": _checksum(name, rest, tensors)}
        named = {f"{TENSOR}{k}": v for k, v in tensors.items()}
        part = _temporary(path)
        with _room(path.parent):
            try:
                save_file(named or {"_": torch.zeros(1)}, str(part), metadata=about)
                return _publish(part, path)
            finally:
                part.unlink(missing_ok=True)

    def __repr__(self) -> str:
        if self.folder is None:
            return "Store(not kept)"
        return f"Store({self.folder}, {len(list(self.folder.rglob('*.safetensors')))} units done)"


def _checksum(name: str, rest: str, tensors: Mapping[str, Tensor]) -> str:
    seen = hashlib.sha256(f"{name}\n{rest}".encode())
    for key in sorted(tensors):
        seen.update(f"\n{key} {tensors[key].dtype} {list(tensors[key].shape)}".encode() + _bytes(tensors[key]))
    return seen.hexdigest()


def _temporary(path: Path) -> Path:
    """Return a name beside `path` that no other process or thread takes."""
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")


def _publish(part: Path, path: Path) -> bool:
    """Give a finished file its name, unless another has it; False where another has."""
    try:
        os.link(part, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        part.replace(path)
    return True


def write_text(path: Path, text: str) -> None:
    """Write a small text file in one step, replacing what was there."""
    part = _temporary(path)
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _room(place: Path, kept: str = "results so far are kept") -> Iterator[None]:
    """Raise an OSError that says how to go on where the disk is full; safetensors has its own error for it."""
    try:
        yield
    except Exception as error:
        if getattr(error, "errno", None) != errno.ENOSPC and "os error 28" not in str(error):
            raise
        raise OSError(errno.ENOSPC, f"The disk of {place} is full; {kept}. Free some space and run again.") from error


# --- rows in a file ---------------------------------------------------------------------------------------------------


@final
class Lines:
    """Rows of one run in a JSON Lines file, written as they come; the first line holds the run's settings.

    Opening a file goes on with it: `rows` are those that are there. A last line that a stop cut off is taken away.
    One process writes such a file at a time.

    Args:
        path: the file; it and its folder are made with the first rows.
        run: the settings, as JSON holds them.

    Raises: ValueError for a file of another run, naming what differs."""

    def __init__(self, path: str | Path, run: Mapping[str, Any]) -> None:
        self.path, self.run = Path(path), dict(run)
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
        self.rows = rows[1:]

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write further rows at the end of the file. Raises: OSError that says how to go on, on a full disk."""
        new = list(rows)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _room(self.path, "the answers in it are kept"), self.path.open("a", encoding="utf-8") as file:
            first = [{"run": self.run}] if file.tell() == 0 else []
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [*first, *new]))
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
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number} is not JSON: {error}.") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} is not a JSON object: {line[:60]!r}.")
        rows.append(row)
    return rows
