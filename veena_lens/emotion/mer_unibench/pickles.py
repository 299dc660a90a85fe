"""Read pickles of labels and answers as values: no object of the file is ever built.

A pickle can call any function it names, and the state that it hands to numpy's arrays and data types can hold raw
pointers. Label and answer files need neither: their pickles are interpreted here, opcode by opcode, into dictionaries,
lists, texts, numbers and arrays of numbers or text.
"""

from __future__ import annotations

import math
import pickletools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from reprlib import repr as short_repr
from typing import Any

import numpy as np

MAX_OPCODES = 1_000_000  # of one pickle, and elements of its arrays; the largest label file has some 250,000


class RefusedPickle(ValueError):
    """A pickle that holds something other than dictionaries, lists, texts, numbers and arrays of them."""


class Damaged(ValueError):
    """Content that contradicts itself."""


def plain_dtype(code: str) -> np.dtype:
    """Return the data type of numbers or text that a short code names; no other is made."""
    found = re.fullmatch(r"[|<>=]?(?:(?:b1|[iu][1248]|f[248]|c8|c16)|[US](\d{1,7}))", code)
    if found is None:
        raise RefusedPickle(f"holds an array of {code!r}")
    return np.dtype(code)


def numbers(dtype: np.dtype, shape: tuple[int, ...], fortran: bool, content: bytes | memoryview) -> np.ndarray:
    """Return the array over the bytes; both must be of one size."""
    if math.prod(shape) * dtype.itemsize != len(content) or dtype.itemsize == 0:
        raise Damaged(f"shape {shape} of {dtype} does not fit {len(content):,} bytes")
    found = np.frombuffer(content, dtype)
    if dtype.kind == "U":
        points = np.frombuffer(content, dtype.str[0] + "u4")
        if ((points > 0x10FFFF) | ((points >= 0xD800) & (points < 0xE000))).any():
            raise Damaged("its text is not Unicode")
    return found.reshape(shape, order="F" if fortran else "C")


@dataclass(eq=False)
class _Name:
    """A function or class that a pickle names; it is compared with the few known, and never imported."""

    name: str


@dataclass(eq=False)
class _Type:
    """A data type by its code, before and after its byte order is set."""

    code: str
    order: str = "|"

    def dtype(self) -> np.dtype:
        return plain_dtype(self.order + self.code)


@dataclass(eq=False)
class _Array:
    """An array before its state is set, with the places of the memo that hold it."""

    places: list[int] = field(default_factory=list)


_CORES = ("numpy.core.multiarray.", "numpy._core.multiarray.")
_KNOWN = {"numpy.dtype": "dtype", "numpy.ndarray": "ndarray"}
_KNOWN |= {core + name: name for core in _CORES for name in ("_reconstruct", "scalar")}
_PLAIN = (str, int, float, bytes, list, dict, np.generic, np.ndarray, type(None))
_KEYS = (str, int, float, np.number)


def read_pickle(content: bytes) -> Any:
    """Return the value of a pickle. Raises: RefusedPickle; ValueError and other errors of lookup for a damaged one."""
    return _Machine().run(content)


class _Machine:
    """The part of pickle's machine that plain values and numpy's arrays need."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # a stack for every mark
        self.memo: dict[int, Any] = {}
        self.elements = 0

    def run(self, content: bytes) -> Any:
        """Return the value of a pickle."""
        for count, (opcode, value, _) in enumerate(pickletools.genops(content)):
            if count > MAX_OPCODES:
                raise Damaged(f"its pickle has more than {MAX_OPCODES:,} steps")
            if opcode.name == "STOP":
                (result,) = self.stack
                return result
            if opcode.name in _LITERALS:
                self.stack.append(_literal(value))
            elif opcode.name in _STEPS:
                _STEPS[opcode.name](self, value)
            elif opcode.name not in ("PROTO", "FRAME"):
                raise RefusedPickle(f"uses {opcode.name}")
        raise Damaged("its pickle does not end")

    def since_mark(self) -> list[Any]:
        """Take what lies above the last mark."""
        found, self.stack = self.stack, self.below.pop()
        return found

    def mark(self, _: Any) -> None:
        self.below.append(self.stack)
        self.stack = []

    def constant(self, make: Callable[[], Any]) -> None:
        self.stack.append(make())

    def tuple_of(self, count: int | None) -> None:
        if count is None:
            taken = self.since_mark()
        else:
            taken = [self.stack.pop() for _ in range(count)][::-1]
        self.stack.append(tuple(taken))

    def extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise Damaged("it appends to what is not a list")
        target.extend(map(_plain, values))

    def update(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(pairs) % 2:
            raise Damaged("it sets items of what is not a dictionary")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, _KEYS):
                raise RefusedPickle(f"holds the key {short_repr(key)}")
            if key in target:
                raise Damaged(f"it holds the key {short_repr(key)} twice")
            target[key] = _plain(value)

    def put(self, place: int | None) -> None:
        place = len(self.memo) if place is None else place
        value = self.stack[-1]
        if isinstance(value, _Array):
            value.places.append(place)
        self.memo[place] = value

    def name(self, name: str) -> None:
        if name not in _KNOWN:
            raise RefusedPickle(f"names {name[:100]}")
        self.stack.append(_Name(_KNOWN[name]))

    def name_on_stack(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.name(f"{module}.{name}")

    def call(self, _: Any) -> None:
        """Do for a data type, a scalar or an empty array what numpy's functions would do."""
        given, what = self.stack.pop(), self.stack.pop()
        if not isinstance(what, _Name) or not isinstance(given, tuple):
            raise Damaged("it calls what is not a function")
        match what.name, given:
            case "dtype", (str(code), *_) if len(given) == 3 and (code in ("O8", "O") or plain_dtype(code)):
                self.stack.append(_Type(code))
            case "scalar", (_Type() as kind, bytes(content)):
                dtype = kind.dtype()
                empty = dtype.itemsize == 0 and not content
                self.stack.append(dtype.type() if empty else numbers(dtype, (1,), False, content)[0])
            case "_reconstruct", (_Name(name="ndarray"), tuple(), bytes()):
                self.stack.append(_Array())
            case _:
                raise Damaged(f"it makes a {what.name} of {short_repr(given)}")

    def build(self, _: Any) -> None:
        """Set the byte order of a data type, or the content of an array."""
        state, target = self.stack.pop(), self.stack[-1]
        match target, state:
            case _Type(), (int(), "<" | ">" | "|" | "=" as order, None, None, None, *rest) if all(
                type(number) is int for number in rest
            ):
                target.order = order
            case _Array(), (int(), tuple(shape), _Type() as kind, bool(fortran), content):
                if not all(type(size) is int and size >= 0 for size in shape) or len(shape) > 32:
                    raise Damaged(f"it holds an array of shape {short_repr(shape)}")
                array = self.array(kind, shape, fortran, content)
                self.stack[-1] = array
                for place in target.places:
                    self.memo[place] = array
            case _:
                raise Damaged(f"it sets the state of {short_repr(target)}")

    def array(self, kind: _Type, shape: tuple[int, ...], fortran: bool, content: Any) -> np.ndarray:
        if isinstance(content, bytes):
            return numbers(kind.dtype(), shape, fortran, content)
        self.elements += len(content)
        if type(content) is not list or math.prod(shape) != len(content) or self.elements > MAX_OPCODES:
            raise Damaged(f"shape {short_repr(shape)} does not fit its elements")
        if kind.code not in ("O8", "O"):
            raise Damaged(f"it holds objects as {kind.code!r}")
        array = np.empty(len(content), dtype=object)
        for place, element in enumerate(content):
            array[place] = element
        return array.reshape(shape, order="F" if fortran else "C")


def _plain(value: Any) -> Any:
    """Return a value that labels and answers can hold. Raises: RefusedPickle for any other."""
    if not isinstance(value, _PLAIN):
        raise RefusedPickle(f"holds {short_repr(value)}")
    return value


def _literal(value: Any) -> Any:
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        raise Damaged("it holds an integer of more than 64 bits")
    if isinstance(value, str):
        value.encode()  # refuses half characters, which no file or terminal takes
    return value


_LITERALS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
_LITERALS |= {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
_LITERALS |= {"SHORT_BINBYTES", "BINBYTES", "BINBYTES8"}


def _steps() -> Iterator[tuple[str, Callable[[_Machine, Any], None]]]:
    """Yield what every opcode does that is not a literal."""
    for name, make in {
        "NONE": lambda: None,
        "NEWTRUE": lambda: True,
        "NEWFALSE": lambda: False,
        "EMPTY_LIST": list,
        "EMPTY_DICT": dict,
        "EMPTY_TUPLE": tuple,
    }.items():
        yield name, lambda machine, _, make=make: machine.constant(make)
    for name, count in {"TUPLE": None, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}.items():
        yield name, lambda machine, _, count=count: machine.tuple_of(count)
    for name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
        yield name, _Machine.put
    for name in ("GET", "BINGET", "LONG_BINGET"):
        yield name, lambda machine, place: machine.stack.append(machine.memo[place])
    yield "MARK", _Machine.mark
    yield "APPEND", lambda machine, _: machine.extend([machine.stack.pop()])
    yield "APPENDS", lambda machine, _: machine.extend(machine.since_mark())
    yield "SETITEM", lambda machine, _: machine.update([machine.stack.pop(), machine.stack.pop()][::-1])
    yield "SETITEMS", lambda machine, _: machine.update(machine.since_mark())
    yield "GLOBAL", lambda machine, name: machine.name(name.replace(" ", ".", 1))
    yield "STACK_GLOBAL", _Machine.name_on_stack
    yield "REDUCE", _Machine.call
    yield "BUILD", _Machine.build


_STEPS = dict(_steps())
