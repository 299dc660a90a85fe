"""Read the arrays in npy and npz files that others wrote; every size is checked before memory is taken."""

from __future__ import annotations

import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from veena_lens.emotion.mer_unibench.pickles import Damaged, RefusedPickle, numbers, plain_dtype, read_pickle
from veena_lens.regular_files import open_regular, read_bytes

MAX_ARRAY = 128 * 2**20  # bytes of one unpacked array; the largest of the benchmark has some 25 MB
MAX_ARCHIVE = 512 * 2**20  # bytes of a packed file
MAX_DIRECTORY = 2**20  # bytes of an archive's list of entries


def array_names(path: Path) -> list[str]:
    """Return the names of the arrays in an npz file. Raises: ValueError for a file that is not one."""
    return [name.removesuffix(".npy") for name in _entries(path)]


def read_array(path: Path, name: str) -> np.ndarray:
    """Read one array of an npz file, its elements as plain values; the array may not be writable.

    Args:
        path: the npz file.
        name: the array's name in it.

    Raises: ValueError for a lost array (naming those there are), a damaged or encrypted file, an array of more than
    128 MiB, or a pickle that holds anything but dictionaries, lists, texts, numbers and arrays of them.
    """
    entries = _entries(path)
    entry = entries.get(f"{name}.npy")
    if entry is None:
        known = [found.removesuffix(".npy") for found in entries]
        raise ValueError(f"{path} has no array {name!r}; it has: {', '.join(known)}.")
    where = f"{path}, array {name!r}"
    if entry.flag_bits & 1:
        raise ValueError(f"{where}: encrypted; unpack it with its password, and save it without one.")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{where}: packed by a method that numpy does not write ({entry.compress_type}).")
    if entry.file_size > MAX_ARRAY:
        raise ValueError(f"{where}: {entry.file_size:,} bytes; at most {MAX_ARRAY:,} are read of one array.")
    try:
        with zipfile.ZipFile(path) as archive:
            content = archive.read(entry)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, struct.error, OSError) as error:
        raise ValueError(f"{where}: damaged ({error}); copy or download it again.") from error
    return parse_array(content, where)


def read_array_file(path: Path, limit: int = MAX_ARRAY, *, objects: bool = True) -> np.ndarray:
    """Read the array in an npy file, as `read_array` does.

    Args:
        path: the npy file.
        limit: bytes that the file may have.
        objects: False refuses an array that is a pickle.

    Raises: ValueError, as `read_array`.
    """
    return parse_array(read_bytes(path, limit), str(path), objects=objects)


def parse_array(content: bytes, where: str, *, objects: bool = True) -> np.ndarray:
    """Return the array in the bytes of an npy file.

    Args:
        content: the bytes.
        where: what messages call the file.
        objects: False refuses an array that is a pickle.

    Raises: ValueError, as `read_array`.
    """
    try:
        code, fortran, shape, start = _header(content)
        if objects and code.lstrip("|<>=") in ("O", "O8"):
            array = read_pickle(content[start:])
        else:
            array = numbers(plain_dtype(code), shape, fortran, memoryview(content)[start:])
    except RefusedPickle as error:
        raise RefusedPickle(
            f"{where}: the pickle {error}, and only dictionaries, lists, texts, numbers and arrays of them are read. "
            "Do not use this file unless you know where it comes from."
        ) from None
    except (ValueError, TypeError, IndexError, KeyError, OverflowError, struct.error) as error:
        raise ValueError(f"{where}: damaged ({error}); copy or download it again.") from error
    if not isinstance(array, np.ndarray) or array.shape != shape:
        raise ValueError(f"{where}: the header says an array of shape {shape}, the content is another.")
    return array


def read_dict(path: Path, name: str) -> dict[Any, Any]:
    """Read the dictionary in a 0-dimensional object array of an npz file.

    Args:
        path: the npz file.
        name: the array's name in it.

    Raises: ValueError, naming what is there.
    """
    array = read_array(path, name)
    if array.shape != () or array.dtype != object or not isinstance(array.item(), dict):
        raise ValueError(
            f"{path}, array {name!r}: expected one dictionary in a 0-dimensional object array, found shape "
            f"{array.shape}, dtype {array.dtype}."
        )
    return array.item()


def _entries(path: Path) -> dict[str, zipfile.ZipInfo]:
    """Return an archive's entries by name, once its list of them is known to be short."""
    try:
        with open_regular(path, MAX_ARCHIVE) as file:
            # The last 22 bytes end a zip file without a comment, and numpy writes none.
            length = file.seek(0, 2)
            file.seek(max(0, length - 42))
            tail = file.read()
            if tail[-22:-18] != b"PK\x05\x06" or tail[-2:] != b"\0\0":
                raise zipfile.BadZipFile("its end is not that of a zip file")
            # A locator in front of the end replaces the sizes in it.
            if int.from_bytes(tail[-10:-6], "little") > MAX_DIRECTORY or tail[-42:-38] == b"PK\x06\x07":
                raise zipfile.BadZipFile("its list of entries is too long")
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
    except (zipfile.BadZipFile, struct.error, NotImplementedError, UnicodeError) as error:
        raise ValueError(f"{path} is no npz file ({error}); copy or download it again.") from error
    found = {entry.filename: entry for entry in entries}
    if len(found) != len(entries):
        raise ValueError(f"{path} is no npz file (it holds two arrays of one name); copy or download it again.")
    return found


_HEADER = re.compile(
    r"\{'descr': '([^'\\]{1,16})', 'fortran_order': (True|False), 'shape': "
    r"\(((?:\d{1,15}L?, ?){0,32}(?:\d{1,15}L?)?)\),? ?\}\s*"
)


def _header(content: bytes) -> tuple[str, bool, tuple[int, ...], int]:
    """Return an npy file's data type, order, shape and where its content begins."""
    if content[:6] != b"\x93NUMPY":
        raise Damaged("it does not begin as an npy file")
    width = 2 if content[6:7] == b"\x01" else 4
    start = 8 + width + int.from_bytes(content[8 : 8 + width], "little")
    found = _HEADER.fullmatch(content[8 + width : min(start, 2000)].decode("latin-1"))
    if found is None or start > len(content):
        raise Damaged("its header does not describe a plain array")
    return found[1], found[2] == "True", tuple(int(n) for n in re.findall(r"\d+", found[3])), start
