"""Arrays in files that others wrote: plain values as numpy reads them, and every hostile or broken file refused."""

import io
import pickle
import resource
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from veena_lens.emotion.mer_unibench import pickles
from veena_lens.emotion.mer_unibench.archives import (
    MAX_ARRAY,
    array_names,
    parse_array,
    read_array,
    read_array_file,
    read_dict,
)
from veena_lens.emotion.mer_unibench.pickles import RefusedPickle


def npy(value: Any, protocol: int | None = None) -> bytes:
    """The bytes of an npy file as numpy writes it, or with the pickle of another protocol."""
    file = io.BytesIO()
    np.save(file, value)
    if protocol is None:
        return file.getvalue()
    return header("|O", np.shape(value)) + pickle.dumps(value, protocol=protocol)


def header(code: str, shape: tuple[int, ...]) -> bytes:
    text = f"{{'descr': '{code}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
NUMBERS = st.one_of(st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), st.booleans())
SCALARS = st.one_of(
    st.none(),
    TEXT,
    NUMBERS,
    TEXT.map(np.str_),
    st.floats(width=32, allow_nan=False).map(np.float32),
    st.floats(allow_nan=False).map(np.float64),
    st.integers(-128, 127).map(np.int8),
    st.booleans().map(np.bool_),
)
ENTRIES = st.dictionaries(TEXT, SCALARS | st.lists(SCALARS, max_size=3), max_size=3)


@given(st.dictionaries(TEXT | TEXT.map(np.str_), SCALARS | ENTRIES, max_size=4), st.sampled_from([None, 3, 4]))
@settings(max_examples=40, deadline=None)
def test_dictionaries_are_read_as_numpy_reads_them(inside: dict[Any, Any], protocol: int | None) -> None:
    array = np.array(inside, dtype=object)
    found, wanted = parse_array(npy(array, protocol), "x").item(), inside
    assert found == wanted and list(map(repr, found.values())) == list(map(repr, wanted.values()))


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6).reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(4, dtype=">i2"),
        np.array(["a", "bcü", ""]),
        np.array("one"),
        np.array([b"a", b"bc"]),
        np.zeros((0, 4), np.uint8),
        np.array([True, False]),
        np.array([1 + 2j]),
        np.array([{"a": 1}, None, "x"], dtype=object),
        np.array([["a", 1], ["b", 2]], dtype=object),
        np.array({"a": np.arange(3), "b": np.array(["x", "y"]), "c": np.asfortranarray(np.ones((2, 3)))}, dtype=object),
    ],
    ids=repr,
)
def test_arrays_are_read_as_numpy_reads_them(array: np.ndarray, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", array=array)
    np.save(tmp_path / "a.npy", array)
    for found in (read_array(tmp_path / "a.npz", "array"), read_array_file(tmp_path / "a.npy")):
        assert found.dtype == array.dtype and found.shape == array.shape
        assert repr(found.tolist()) == repr(array.tolist())


class Made:
    """Pickles as the call and the state that it is given."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> Any:
        return self.reduced


core = np.array({}, dtype=object).__reduce__()[0]
scalar = np.float32(1).__reduce__()[0]


def _dtype(code: str, state: Any) -> Made:
    return Made(np.dtype, (code, False, True), state)


PLAIN = (3, "|", None, None, None, -1, -1, 63)
NESTED: list[Any] = []
for _ in range(200):
    NESTED = [NESTED, NESTED]
KEY: tuple[Any, ...] = ()
for _ in range(60):
    KEY = (KEY, KEY)

HOSTILE: dict[str, Any] = {
    "objects as raw bytes": Made(core, (np.ndarray, (0,), b"b"), (1, (2,), np.dtype("O"), False, b"\x41" * 16)),
    "scalar of objects": Made(scalar, (np.dtype("O"), b"\x41" * 8)),
    "fields over pointers": Made(
        scalar, (_dtype("V8", (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 27)), b"\x41" * 8)
    ),
    "state of a number type": Made(scalar, (_dtype("i8", (*PLAIN[:3], ("a",), {}, 8, 1, 27)), b"\x41" * 8)),
    "subarray": Made(scalar, (_dtype("V8", (3, "|", (np.dtype("O"), (1,)), None, None, 8, 1, 27)), b"\x41" * 8)),
    "array larger than its bytes": Made(core, (np.ndarray, (0,), b"b"), (1, (10**12,), np.dtype("i1"), False, b"ab")),
    "objects fewer than the shape": Made(core, (np.ndarray, (0,), b"b"), (1, (10**12,), np.dtype("O"), False, [1])),
    "negative shape": Made(core, (np.ndarray, (0,), b"b"), (1, (-2, -1), np.dtype("i1"), False, b"ab")),
    "made with a size": Made(core, (np.ndarray, (10**12,), b"d")),
    "made with another class": Made(core, (np.matrix, (0,), b"b")),
    "datetime": np.datetime64("2020-01-01"),
    "half a character": Made(scalar, (np.dtype("<U1"), b"\x00\xd8\x00\x00")),
    "above Unicode": Made(scalar, (np.dtype("<U1"), b"\xff\xff\xff\x7f")),
    "function": Made(print, ("ran",)),
    "set": {1, 2},
    "tuple": (1, 2),
    "large integer": 10**400,
}


@pytest.mark.parametrize("kind", list(HOSTILE))
def test_what_no_label_file_holds_is_refused(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    content = header("|O", ()) + pickle.dumps(Made(*np.array({"a": HOSTILE[kind]}, dtype=object).__reduce__()))
    with pytest.raises(ValueError, match=r"label.npz: (damaged|the pickle)"):
        parse_array(content, "label.npz")
    assert capsys.readouterr().out == ""


def _pickled(value: Any) -> bytes:
    return pickle.dumps({"a": value}, protocol=4)


# A dictionary with such a key cannot be made, so its pickle is written by hand.
SHARED = {
    "key": b"\x80\x04})\x94" + b"".join(b"h%c" % n + b"h%c" % n + b"\x86\x94" for n in range(60)) + b"K\x01s.",
    "tuples": _pickled(KEY),
    "lists": _pickled([NESTED]),
}


@pytest.mark.parametrize("kind", list(SHARED))
def test_shared_parts_take_no_time(kind: str) -> None:
    # Written out, or hashed as a key, each would have more than 2^60 parts.
    with pytest.raises(ValueError, match="damaged|the pickle|content is another"):
        parse_array(header("|O", ()) + SHARED[kind], "x")


@pytest.mark.parametrize(
    "step",
    [
        b"\x8e" + struct.pack("<Q", 2**60),
        b"\x8d" + struct.pack("<Q", 2**60),
        b"B\xff\xff\xff\xff",
        b"\x8b\xff\xff\xff\x7f",
    ],
)
def test_a_length_beyond_the_file_is_refused(step: bytes) -> None:
    with pytest.raises(ValueError, match="damaged"):
        parse_array(header("|O", ()) + b"\x80\x04" + step + b"abc.", "x")


@pytest.mark.parametrize("step", [b"}", b"(", b"]", b"N\x94"])
def test_a_pickle_of_too_many_steps_is_refused(step: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "MAX_OPCODES", 1000)
    with pytest.raises(ValueError, match="more than 1,000 steps"):
        parse_array(header("|O", ()) + b"\x80\x04" + step * 1001 + b".", "x")


@pytest.mark.parametrize(
    "start",
    [
        header("<f8", (10**12,)),
        header("<f8", (10**9, 10**9)),
        header("<U1000000", (10**9,)),
        header("<U0", (10**9,)),
        header("<M8[s]", (1,)),
        header("|V8", (1,)),
        header("O", (10**12,)),
        header("<f8", (2,)).replace(b"(2,)", b"(-2)"),
        header("<f8", (2,))[:40],
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff",
        b"\x93NUMPY\x02\x00\xe8\x03\x00\x00" + b"(" * 1000,
        b"",
        b"PK",
    ],
    ids=range(13),
)
def test_a_header_that_does_not_fit_is_refused_before_memory_is_taken(start: bytes) -> None:
    with pytest.raises(ValueError, match=r"^x: "):
        parse_array(start + b"\0" * 8, "x")


def _entry(path: Path, content: bytes, **changed: int) -> None:
    """An npz with one array, and fields of its entry set in both headers."""
    info = zipfile.ZipInfo("a.npy")
    info.compress_type = zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(info, content)
    raw = bytearray(path.read_bytes())
    central = raw.rindex(b"PK\x01\x02")
    for name, value in changed.items():
        kind, local, at = {"flags": ("<H", 6, 8), "method": ("<H", 8, 10), "size": ("<I", 22, 24)}[name]
        struct.pack_into(kind, raw, local, value)
        struct.pack_into(kind, raw, central + at, value)
    path.write_bytes(raw)


def test_encrypted_repacked_and_damaged_entries_are_refused(tmp_path: Path) -> None:
    path, content = tmp_path / "a.npz", npy(np.arange(50))
    _entry(path, content, flags=1)
    with pytest.raises(ValueError, match="encrypted"):
        read_array(path, "a")
    for method in (12, 14, 99):
        _entry(path, content, method=method)
        with pytest.raises(ValueError, match="a method that numpy does not write"):
            read_array(path, "a")
    _entry(path, content, size=3 * 2**30)
    with pytest.raises(ValueError, match="3,221,225,472 bytes; at most 134,217,728"):
        read_array(path, "a")
    _entry(path, content)
    raw = bytearray(path.read_bytes())
    raw[45] ^= 0xFF
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="damaged"):
        read_array(path, "a")


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.npy", "w") as file:
        file.write(header("<f8", (2**30,)))
        for _ in range(MAX_ARRAY // 2**20 + 1):
            file.write(bytes(2**20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="at most 134,217,728 are read of one array"):
        read_array(path, "a")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes


def test_archives_of_many_or_equal_entries_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, a=np.arange(3))
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("a.npy", npy(np.arange(4)))
    with pytest.raises(ValueError, match="two arrays of one name"):
        array_names(path)
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(20_000):
            archive.writestr(f"{number}.npy", b"")
    with pytest.raises(ValueError, match="its list of entries is too long"):
        array_names(path)


@given(st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_changed_bytes_give_values_or_the_named_error(data: st.DataObject) -> None:
    whole = npy(np.array({np.str_("k"): {"emo": np.int64(3), "val": np.float32(0.5)}, "l": {"emo": "x"}}, dtype=object))
    raw = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(100, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = parse_array(bytes(raw[: data.draw(st.integers(120, len(raw)))]), "x")
    except ValueError as error:
        assert str(error).startswith("x: ")
    else:
        assert found.shape == ()


def test_a_function_is_named_and_never_imported(tmp_path: Path) -> None:
    names: list[Callable[..., Any]] = [print, struct.pack]
    for function in names:
        np.savez(tmp_path / "a.npz", a=np.array({"a": Made(function, ())}, dtype=object))
        with pytest.raises(RefusedPickle, match=r"the pickle names (builtins\.print|_?struct\.pack)"):
            read_dict(tmp_path / "a.npz", "a")
    content = header("|O", ()) + b"\x80\x04cno_such_module function\nno\n."
    with pytest.raises(RefusedPickle, match="names no_such_module.function no"):
        parse_array(content, "x")
