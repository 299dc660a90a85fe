"""Names by content: what tells one model, metric, data set or experiment from another, as JSON.

Kept results are found again by these names, so a name covers everything that a result can depend on: every weight and
buffer of a model, the interventions and hooks in force on it, whole inputs, and of a function its code, defaults, what
it closes over and the globals that it reads. A value whose content cannot be told is refused, with the remedy.
"""

from __future__ import annotations

import dataclasses
import dis
import enum
import functools
import hashlib
import json
import re
import sys
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, cast

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

ADDRESS = re.compile(r"\bat 0x[0-9a-f]+")
PLAIN_TYPES = (slice, complex, torch.dtype, torch.device, torch.Size, enum.Enum, type(Ellipsis), type(NotImplemented))
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element
BLOCK = 2**22  # elements of a weight that are summed at once
LIBRARY_FOLDERS = {"site-packages", "dist-packages"}

# Values whose fingerprint is being taken, so that one that holds itself ends.
_open: ContextVar[tuple[int, ...]] = ContextVar("open", default=())


def fingerprint(value: Any) -> Any:
    """Return a value as JSON, equal for equal contents.

    A value with a `fingerprint` (a method, or a string) gives its own. Otherwise tensors, arrays and images are given
    by a hash, models by a hash of every weight with what is in force on them, functions by their code with all that it
    reads, other objects by what pickling them would keep.

    Args:
        value: anything.

    Raises: ValueError for a value whose content cannot be told, such as an open file; the message says how to name
        it."""
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, Tensor):
        return [str(value.dtype), list(value.shape), hashlib.sha256(tensor_bytes(value)).hexdigest()]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", hashlib.sha256(value).hexdigest()]
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, PLAIN_TYPES):
        return repr(value)
    if id(value) in _open.get():
        return f"the {type(value).__qualname__} that holds this"
    with _opened(value):
        return _parts(value)


def digest(value: Any) -> str:
    """Return a short hash of a value's fingerprint, 24 hexadecimal digits."""
    return hashlib.sha256(as_json(value).encode()).hexdigest()[:24]


def as_json(value: Any) -> str:
    """Return a value's fingerprint as text."""
    return json.dumps(fingerprint(value), sort_keys=True)


def tensor_bytes(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor's values, in order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@contextmanager
def _opened(value: Any) -> Iterator[None]:
    token = _open.set((*_open.get(), id(value)))
    try:
        yield
    finally:
        _open.reset(token)


def _parts(value: Any) -> Any:
    if hasattr(value, "fingerprint") and not isinstance(value, (type, ModuleType)):
        return value.fingerprint() if callable(value.fingerprint) else value.fingerprint
    if isinstance(value, torch.nn.Module):
        return _model(value)
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: fingerprint(part) for key, part in value.items()}
        return ["mapping", *([fingerprint(key), fingerprint(part)] for key, part in value.items())]
    if isinstance(value, (list, tuple, range)):
        return [fingerprint(part) for part in value]
    if isinstance(value, (set, frozenset)):
        return sorted((fingerprint(part) for part in value), key=str)
    if isinstance(value, functools.partial):
        return ["partial", fingerprint(value.func), fingerprint(value.args), fingerprint(value.keywords)]
    if isinstance(value, MethodType):
        return [fingerprint(value.__func__), fingerprint(value.__self__)]
    if isinstance(value, FunctionType):
        return _function(value)
    if isinstance(value, type):
        return _class(value)
    if callable(value) and hasattr(value, "__wrapped__"):  # such as functools.lru_cache
        return ["wrapped", fingerprint(cast(Any, value).__wrapped__)]
    if isinstance(value, ModuleType):
        return _package(value.__name__)
    if dataclasses.is_dataclass(value):
        parts = {field.name: fingerprint(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return [*_class_name(type(value)), parts]
    if hasattr(value, "tobytes"):  # an array of numpy, or an image of PIL
        about = [str(getattr(value, name, "")) for name in ("dtype", "mode", "shape", "size")]
        return [*about, hashlib.sha256(cast(Any, value).tobytes()).hexdigest()]
    if hasattr(value, "backend_tokenizer"):  # a tokenizer of transformers; its state outside Rust differs between runs
        return [
            type(value).__qualname__,
            hashlib.sha256(cast(Any, value).backend_tokenizer.to_str().encode()).hexdigest(),
        ]
    return _object(value)


# --- models -----------------------------------------------------------------------------------------------------------

# Of each model the hashes of its tensors, each beside what shows that the tensor is as it was.
_known: weakref.WeakKeyDictionary[torch.nn.Module, dict[str, tuple[Any, str]]] = weakref.WeakKeyDictionary()


def _model(model: torch.nn.Module) -> list[Any]:
    """Return a model's configuration, a hash of every weight and buffer, its modules, and what is in force on it."""
    known = _known.setdefault(model, {})
    seen = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        state = _state(tensor)
        if name not in known or known[name][0] != state:
            about = f"{name} {tensor.dtype} {tuple(tensor.shape)}"
            known[name] = (state, hashlib.sha256(about.encode() + tensor_bytes(tensor)).hexdigest())
        seen.update(known[name][1].encode())
    for name, module in model.named_modules():
        seen.update(f"{name} {type(module).__qualname__}".encode())
    cfg = getattr(model, "cfg", None)
    in_force = [fingerprint(item) for item in getattr(model, "interventions", ())]
    return [
        getattr(cfg, "model_name", type(model).__qualname__),
        digest(cfg) if dataclasses.is_dataclass(cfg) else repr(cfg),
        seen.hexdigest()[:24],
        *([in_force] if in_force else []),
        *([hooks] if (hooks := list(_hooks(model))) else []),
    ]


def _state(tensor: Tensor) -> Any:
    """Return what changes whenever a tensor is written: place, version, and its sums over rows and columns.

    The sums see what the version counter does not: a write through `.data`, or into an inference tensor."""
    place = None if tensor.device.type == "meta" else tensor.data_ptr()
    written = None if tensor.is_inference() else tensor._version
    x = tensor.detach()
    table = x.reshape(x.shape[0], -1) if x.ndim > 1 else x.reshape(1, -1)
    sums = [] if place is None else [hashlib.sha256(tensor_bytes(part)).hexdigest() for part in _sums(table)]
    return [place, written, str(x.dtype), tuple(x.shape), tuple(x.stride()), sums]


def _sums(table: Shaped[Tensor, "rows columns"]) -> tuple[Int[Tensor, " rows"], Int[Tensor, " columns"]]:
    """Return the sums of the values' bits, read as integers, over the columns and over the rows."""
    bits = table.contiguous().view(BITS[min(table.element_size(), 8)])
    columns, rows = bits.new_zeros(bits.shape[1], dtype=torch.int64), []
    for block in bits.split(max(1, BLOCK // max(1, bits.shape[1]))):  # a sum widens what it sums
        wide = block.to(torch.int64)
        columns += wide.sum(0)
        rows.append(wide.sum(1))
    return torch.cat(rows), columns


def _hooks(model: torch.nn.Module) -> Iterator[Any]:
    """Return the hooks that users have put on a model's modules; those of `intervene` are named by what they hold."""
    for name, module in model.named_modules():
        for kind in ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"):
            for hook in getattr(module, kind).values():
                inner = _unwrapped(hook)
                if not str(getattr(inner, "__module__", "")).startswith("veena_lens.model"):
                    yield [name, kind, fingerprint(inner)]


def _unwrapped(hook: Any) -> Any:
    """Return the user's function inside a hook: what adds it to a hook point wraps it, under the name hook or fn, or as
    the first argument of a function of this package's."""
    while True:
        if isinstance(hook, functools.partial):
            if not str(getattr(hook.func, "__module__", "")).startswith("veena_lens.model"):
                return hook
            hook = hook.args[0]
            continue
        if _library(getattr(hook, "__globals__", {}).get("__name__")) is None:
            return hook
        if hasattr(hook, "__wrapped__"):
            hook = hook.__wrapped__
            continue
        held = next((name for name in ("hook", "fn") if name in hook.__code__.co_freevars), None)
        if held is None:
            return hook
        hook = hook.__closure__[hook.__code__.co_freevars.index(held)].cell_contents


# --- functions, classes and other objects -----------------------------------------------------------------------------


def _function(function: FunctionType) -> list[Any]:
    """Return a function's name and code, with its defaults, what it closes over and the globals that it reads.

    A function of an installed library is given by its name and the library's version."""
    made_in = function.__globals__.get("__name__")
    if hasattr(function, "__wrapped__") and made_in != function.__module__ and _library(made_in) is not None:
        return fingerprint(cast(Any, function).__wrapped__)  # a library's decorator around the user's function
    if (library := _library(made_in)) is not None:
        cells = [fingerprint(part) for part in _cells(function)]
        return [*library, function.__qualname__, *cells, *map(fingerprint, _defaults(function))]
    names, attributes = _names(function.__code__)
    read = {}
    for name in sorted(names & function.__globals__.keys()):
        part = function.__globals__[name]
        if isinstance(part, ModuleType) and _library(part.__name__) is None:
            used = sorted(attributes & vars(part).keys())
            read[name] = [part.__name__, {attribute: fingerprint(vars(part)[attribute]) for attribute in used}]
        else:
            read[name] = fingerprint(part)
    cells = [fingerprint(part) for part in _cells(function)]
    more = {k: fingerprint(v) for k, v in vars(function).items() if not k.startswith("_")}
    return [
        function.__module__, function.__qualname__, _code(function.__code__),
        *map(fingerprint, _defaults(function)), cells, read, *([more] if more else []),
    ]  # fmt: skip


def _cells(function: FunctionType) -> list[Any]:
    """Return what a function closes over; a name that has no value yet is given as its name."""
    found = []
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found.append(cell.cell_contents)
        except ValueError:
            found.append(name)
    return found


def _defaults(function: FunctionType) -> tuple[Any, Any]:
    return function.__defaults__, function.__kwdefaults__


def _names(code: CodeType) -> tuple[set[str], set[str]]:
    """Return the globals and the attributes that code reads, with those of the functions inside it."""
    names: set[str] = set()
    attributes: set[str] = set()
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            names.add(instruction.argval)
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD", "IMPORT_FROM"):
            attributes.add(instruction.argval)
    for part in code.co_consts:
        if isinstance(part, CodeType):
            inner = _names(part)
            names |= inner[0]
            attributes |= inner[1]
    return names, attributes


def _code(code: CodeType) -> str:
    """Return a hash of a function's instructions and constants, those of functions inside it too."""
    constants = [_code(part) if isinstance(part, CodeType) else _constant(part) for part in code.co_consts]
    text = json.dumps([code.co_code.hex(), constants, list(code.co_names), list(code.co_varnames)])
    return hashlib.sha256(text.encode()).hexdigest()


def _constant(part: Any) -> str:
    return repr(sorted(map(repr, part))) if isinstance(part, frozenset) else repr(part)


def _class(cls: type) -> list[Any]:
    """Return a class by its name, and outside installed libraries by the code of its functions and its values."""
    name = _class_name(cls)
    return name if len(name) > 2 else [*name, fingerprint(_members(cls))]


def _class_name(cls: type) -> list[Any]:
    """Return [module, name], or with the version of the installed library between them."""
    library = _library(cls.__module__)
    return [cls.__module__, cls.__qualname__] if library is None else [*library, cls.__qualname__]


def _members(cls: type) -> dict[str, Any]:
    """Return functions and values of a class and of its bases, apart from those of installed libraries."""
    found: dict[str, Any] = {}
    for base in reversed([base for base in cls.__mro__ if _library(base.__module__) is None]):
        for name, member in vars(base).items():
            inner = getattr(member, "__func__", getattr(member, "fget", getattr(member, "func", member)))
            if isinstance(inner, FunctionType) or (not name.startswith("__") and not hasattr(inner, "__get__")):
                found[name] = inner
    return found


def _object(value: Any) -> Any:
    """Return an object by its class and by what pickling it would keep."""
    if isinstance(value, BuiltinFunctionType) and not isinstance(value.__self__, (type(None), ModuleType)):
        return [value.__qualname__, fingerprint(value.__self__)]
    try:
        reduced = value.__reduce_ex__(4)
    except Exception as error:
        raise _unknown(value) from error
    if isinstance(reduced, str):
        return [getattr(value, "__module__", ""), reduced]
    made_by, made_from, *state = reduced
    if getattr(made_by, "__module__", "") == "copyreg":  # `object.__new__`: the class is the first argument
        made_from = made_from[1:]
    contents = [fingerprint(part) for part in (made_from, *state[:1])]
    items = [[fingerprint(part) for part in rest] for rest in state[1:3] if rest is not None]
    if not any(contents) and not items and ADDRESS.search(repr(value)) and _library(type(value).__module__) is not None:
        raise _unknown(value)
    return [_class(type(value)), *contents, *items]


def _unknown(value: Any) -> ValueError:
    kind = type(value).__qualname__
    return ValueError(
        f"Kept results are found again by what they depend on, and the content of {value!r} ({kind}) cannot be told. "
        'Give it an attribute `fingerprint` with a text that names it, such as metric.fingerprint = "my metric, second '
        'version", or keep no results (out=None).'
    )


# --- installed libraries ----------------------------------------------------------------------------------------------


@functools.cache
def _library(module: str | None) -> tuple[str, str] | None:
    """Return name and version of the installed library that a module belongs to; None for the user's own code."""
    top = (module or "").partition(".")[0]
    if top in sys.stdlib_module_names:
        return (str(module), "Python " + ".".join(map(str, sys.version_info[:2]))) if top != "__main__" else None
    if top == __name__.partition(".")[0]:
        return (str(module), _version(top))
    where = getattr(sys.modules.get(top), "__file__", None)
    if where is None or not LIBRARY_FOLDERS & set(Path(where).parts):
        return None
    return (str(module), _version(top))


def _package(name: str) -> list[str]:
    return list(_library(name) or (name,))


def _version(top: str) -> str:
    try:
        return version(top)
    except PackageNotFoundError:
        return str(getattr(sys.modules.get(top), "__version__", ""))
