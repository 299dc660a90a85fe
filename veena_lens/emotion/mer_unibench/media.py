"""Open the images of a clip: frames from a folder of images or a video file, or aligned faces.

Which frames were taken is part of what comes back, since a score of a model that sees images depends on it. The decoder
is an extra and is imported only when a video file must be opened.

Aligned faces are one array per clip, written with OpenCV, so its channels are blue, green, red.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from veena_lens.emotion.mer_unibench.archives import read_array_file
from veena_lens.emotion.mer_unibench.data_sets import require_name
from veena_lens.emotion.mer_unibench.loading import Sample
from veena_lens.images.files import MAX_PIXELS, open_image
from veena_lens.regular_files import require_regular

FOLDER = "openface_face"
MAX_FACES = 2**30  # bytes of one clip's faces: 28,000 of 112 x 112


class NoFace(ValueError):
    """A clip in which no face was found, or whose array holds none."""


def face_file(sample: Sample) -> Path | None:
    """Return the clip's array of faces in either layout, None when there is none."""
    name = require_name(sample.folder, sample.name)
    paths = (sample.folder / FOLDER / name / f"{name}.npy", sample.folder / FOLDER / f"{name}.npy")
    return next((path for path in paths if path.is_file()), None)


def read_faces(sample: Sample) -> tuple[np.ndarray, Path]:
    """Read a clip's aligned faces [n height width 3], uint8 in RGB, and their file.

    Raises: NoFace where there is no file or it holds no face; ValueError for another rank or dtype, or a damaged file.
    """
    path = face_file(sample)
    if path is None:
        raise NoFace(f"no face array of {sample.name!r} under {sample.folder / FOLDER}")
    try:
        crops = read_array_file(path, MAX_FACES, objects=False)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read as an array: {error}. Use frames instead (faces=False).") from error
    if crops.shape[:1] == (0,):
        raise NoFace(f"{path.name} holds no face")
    if crops.ndim != 4 or crops.shape[-1] != 3 or crops.dtype != np.uint8 or 0 in crops.shape:
        raise ValueError(
            f"{path}: expected faces [n height width 3] of uint8, found shape {crops.shape} of {crops.dtype}. Use "
            "frames instead (faces=False)."
        )
    return np.ascontiguousarray(crops[..., ::-1]), path


EXTENSIONS = ("mp4", "avi", "mkv", "webm", "mov")
PICTURES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Images of one clip and where they come from: kind (frames or faces), places among `total`, and remarks."""

    pictures: tuple[Image.Image, ...]
    kind: str
    places: tuple[int, ...]
    total: int
    source: str
    note: str = ""

    def record(self) -> dict[str, Any]:
        """Return what was seen, as JSON holds it."""
        found = {"kind": self.kind, "places": list(self.places), "total": self.total, "source": self.source}
        return found | ({"note": self.note} if self.note else {})


def frame_places(total: int, frames: int) -> list[int]:
    """Return which of `total` images are taken: the middle one for one, else the reference's uniform choice.

    Uniform: floor(k total / m) for k < m = min(frames, total), the last repeated up to `frames`.

    Args:
        total: how many images there are.
        frames: how many are wanted.

    Raises: ValueError for fewer than one frame, asked or there.
    """
    if frames < 1 or total < 1:
        raise ValueError(f"frames={frames} of {total}: both must be at least 1.")
    if frames == 1:
        return [total // 2]
    taken = min(frames, total)
    places = [k * total // taken for k in range(taken)]
    return places + [places[-1]] * (frames - taken)


def see(sample: Sample, *, frames: int = 1, faces: bool = False) -> Seen:
    """Return the images of a clip: `frames` of its video, or of its aligned faces.

    A clip without a face falls back to its frames, and the note says so.

    Args:
        sample: the clip.
        frames: how many images, chosen by `frame_places`.
        faces: True takes aligned faces where the clip has them.

    Raises: FileNotFoundError with the paths tried; ImportError naming the extra where a video file needs a decoder;
    ValueError for a file that is damaged.
    """
    note = ""
    if faces:
        try:
            crops, path = read_faces(sample)
            places = frame_places(len(crops), frames)
            pictures = tuple(Image.fromarray(crops[place]) for place in places)
            return Seen(
                pictures=pictures, kind="faces", places=tuple(places), total=len(crops), source=_relative(sample, path)
            )
        except NoFace as error:
            note = f"{error}; its frames were taken instead"
    path = find_video(sample)
    if path.parent.name in sample.info.uncropped:
        note = "; ".join(filter(None, [note, "uncropped video: others than the speaker can be in the crop"]))
    if path.is_dir():
        files = frame_files(path)
        places = frame_places(len(files), frames)
        pictures, total = tuple(open_image(files[place]) for place in places), len(files)
    else:
        pictures, places, total = _decode(path, frames)
    return Seen(
        pictures=pictures, kind="frames", places=tuple(places), total=total, source=_relative(sample, path), note=note
    )


def find_video(sample: Sample) -> Path:
    """Return the clip's video file, or its folder of frames. Raises: FileNotFoundError, naming every path tried."""
    name = require_name(sample.folder, sample.name)
    # A name may hold dots, so the ending is added to it, not put in the place of another.
    folders = [sample.folder / video for video in sample.info.videos]
    endings = tuple(dict.fromkeys([*sample.info.endings, *EXTENSIONS]))
    for folder in folders:
        for path in (folder / f"{name}.{ending}" for ending in endings):
            if path.is_file():
                return path
        if frame_files(folder / name):
            return folder / name
    tried = ", ".join(f"{folder / name}.{{{','.join(endings)}}}, {folder / name}/*.jpg|png" for folder in folders)
    raise FileNotFoundError(
        f"No video of {sample.info.title} {name!r}; tried {tried}. To get it: {sample.info.source}."
    )


def frame_files(folder: Path) -> list[Path]:
    """Return the images in a folder of frames, by name; numbers in names count as numbers, so that 10 follows 9."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.suffix.lower() in PICTURES]
    return sorted(found, key=_natural)


def _natural(path: Path) -> tuple[list[tuple[int, str]], str]:
    digits = "".join(mark if mark.isdigit() else " " for mark in path.stem).split()
    return [(int(number), number) for number in digits], path.name


def _decode(path: Path, frames: int) -> tuple[tuple[Image.Image, ...], list[int], int]:
    """Return frames of a video file, their places and how many there are.

    The clip is decoded twice, since what a file says of its length can be wrong.
    """
    try:
        # By name: type checkers need not have it.
        av = import_module("av")
    except ImportError as error:
        raise ImportError(
            f"Opening {path} needs a video decoder: pip install 'veena-lens[video]'. Without one, put the frames as "
            f"pictures into {path.with_suffix('')}/."
        ) from error
    require_regular(path)
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            if (pixels := stream.width * stream.height) > MAX_PIXELS:
                raise ValueError(f"its frames have {pixels:,} pixels; the limit is {MAX_PIXELS:,}")
            total = sum(1 for _ in container.decode(video=0))
        places = frame_places(total, frames)
        with av.open(str(path)) as container:
            kept = {
                place: frame.to_image() for place, frame in enumerate(container.decode(video=0)) if place in set(places)
            }
    except (av.FFmpegError, ValueError, IndexError) as error:
        raise ValueError(f"{path} cannot be decoded as a video: {error}.") from error
    return tuple(kept[place] for place in places), places, total


def _relative(sample: Sample, path: Path) -> str:
    return path.relative_to(sample.folder).as_posix()
