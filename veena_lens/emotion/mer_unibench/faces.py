"""Aligned face crops: one array a clip, written with OpenCV, so its channels are blue, green, red."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from veena_lens.emotion.mer_unibench.labels import require_name

if TYPE_CHECKING:
    from veena_lens.emotion.mer_unibench.loading import Sample

FOLDER = "openface_face"


class NoFace(ValueError):
    """A clip in which no face was found, or whose array holds none."""


def face_file(sample: Sample) -> Path | None:
    """The clip's array in either layout, None when there is none."""
    name = require_name(sample.folder, sample.name)
    paths = (sample.folder / FOLDER / name / f"{name}.npy", sample.folder / FOLDER / f"{name}.npy")
    return next((path for path in paths if path.is_file()), None)


def read_faces(sample: Sample) -> tuple[np.ndarray, Path]:
    """Face crops [n height width 3] uint8 in RGB, and their file.

    Raises: NoFace where there is no file or it holds no face; ValueError for another rank or dtype, or a damaged file.
    """
    path = face_file(sample)
    if path is None:
        raise NoFace(f"no face array of {sample.name!r} under {sample.folder / FOLDER}")
    try:
        crops = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read as an array: {error}. Use frames instead (faces=False).") from error
    if crops.shape[:1] == (0,):
        raise NoFace(f"{path.name} holds no face")
    if crops.ndim != 4 or crops.shape[-1] != 3 or crops.dtype != np.uint8 or 0 in crops.shape:
        raise ValueError(
            f"{path}: expected faces [n height width 3] of uint8, found shape {crops.shape} of {crops.dtype}. Use "
            "frames instead (faces=False)."
        )
    return np.ascontiguousarray(crops[..., ::-1]), path
