"""Reading numpy archives whose arrays are pickles, without trusting them.

A pickle can call any function it names. Label and answer files need four names of numpy; an unpickler that knows no
other reads them and refuses the rest.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

try:  # numpy 2 has renamed its core
    from numpy._core import multiarray
except ImportError:  # pragma: no cover - numpy 1
    from numpy.core import multiarray  # pyright: ignore[reportMissingImports]

_CORES = ("numpy.core.multiarray", "numpy._core.multiarray")
_ALLOWED: dict[tuple[str, str], Any] = {("numpy", "dtype"): np.dtype, ("numpy", "ndarray"): np.ndarray}
_ALLOWED |= {(core, name): getattr(multiarray, name) for core in _CORES for name in ("_reconstruct", "scalar")}


class RefusedPickle(ValueError):
    """A pickle that names something other than numpy's arrays and scalars."""


class _NumpyUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """The few names an array needs; every other is refused before it is imported."""
        if (module, name) not in _ALLOWED:
            raise RefusedPickle(f"names {module}.{name}")
        return _ALLOWED[module, name]


def array_names(path: Path) -> list[str]:
    """Names of the arrays in an npz file. Raises: ValueError for a file that is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is no npz file ({error}); copy or download it again.") from error


def read_array(path: Path, name: str) -> np.ndarray:
    """One array of an npz file; objects are read by the restricted unpickler.

    Raises: ValueError for a lost array (naming those there are), a damaged file, or a pickle that names anything but
    numpy's arrays and scalars."""
    known = array_names(path)
    if name not in known:
        raise ValueError(f"{path} has no array {name!r}; it has: {', '.join(known)}.")
    with zipfile.ZipFile(path) as archive:
        return parse_array(archive.read(f"{name}.npy"), f"{path}, array {name!r}")


def parse_array(content: bytes, where: str) -> np.ndarray:
    """The array in the bytes of an npy file. Raises: ValueError, as `read_array`."""
    file = io.BytesIO(content)
    try:
        version = npy.read_magic(file)
        read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = read_header(file)
        if not dtype.hasobject:
            return npy.read_array(io.BytesIO(content), allow_pickle=False)
        array = _NumpyUnpickler(file).load()
    except RefusedPickle as error:
        raise RefusedPickle(
            f"{where}: the pickle {error}, and only numpy arrays and scalars are read. Do not use this file unless you "
            "know where it comes from."
        ) from None
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        raise ValueError(f"{where}: damaged ({error}); copy or download it again.") from error
    if not isinstance(array, np.ndarray) or array.shape != shape:
        raise ValueError(f"{where}: the header says an array of shape {shape}, the content is another.")
    return array


def read_dict(path: Path, name: str) -> dict[Any, Any]:
    """The dictionary in a 0-dimensional object array of an npz file. Raises: ValueError, naming what is there."""
    array = read_array(path, name)
    if array.shape != () or array.dtype != object or not isinstance(array.item(), dict):
        raise ValueError(
            f"{path}, array {name!r}: expected one dictionary in a 0-dimensional object array, found shape "
            f"{array.shape}, dtype {array.dtype}."
        )
    return array.item()
