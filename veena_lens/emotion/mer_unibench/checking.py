"""What lies under a root of MER-UniBench, a line a set: found, partly or absent, and how to get what is missing."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

from veena_lens.emotion.mer_unibench.faces import face_file
from veena_lens.emotion.mer_unibench.loading import LoadedSet, Overrides, Sample, load_set, require_root, set_folder
from veena_lens.emotion.mer_unibench.media import find_video
from veena_lens.emotion.mer_unibench.sets import SETS, SetInfo


@dataclass(frozen=True, kw_only=True)
class SetCheck:
    """How many samples of a set have a label, a subtitle, a video and faces; `state` is found, partly or absent."""

    info: SetInfo
    state: str
    labels: int = 0
    subtitles: int = 0
    videos: int = 0
    faces: int = 0
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        line = f"{self.info.key:<12} {self.state:<7}"
        if self.state != "absent":
            counts = (self.labels, self.subtitles, self.videos, self.faces)
            names = ("label", "subtitle", "video", "faces")
            line += f" of {self.info.count}: " + ", ".join(f"{n} {name}" for n, name in zip(counts, names))
        return "\n".join([line, *(f"             {note}" for note in self.notes)])


@dataclass(frozen=True, kw_only=True)
class RootCheck:
    """The nine sets' checks under one root."""

    root: Path
    checks: tuple[SetCheck, ...]

    def __repr__(self) -> str:
        return "\n".join([f"MER-UniBench in {self.root}", *map(repr, self.checks), self.summary])

    @property
    def summary(self) -> str:
        """How many of the nine can be scored."""
        usable = [check.info.key for check in self.checks if check.labels]
        lost = [check.info.key for check in self.checks if not check.labels]
        return f"{len(usable)} of {len(SETS)} sets can be scored" + (f"; not: {', '.join(lost)}" if lost else "")


def check_root(root: str | Path, *, overrides: Overrides | None = None) -> RootCheck:
    """A check of every set; damaged or lost files become notes. Raises: FileNotFoundError for a root that is none."""
    require_root(root, overrides)
    return RootCheck(root=Path(root), checks=tuple(_check(root, info, overrides) for info in SETS))


def _check(root: str | Path, info: SetInfo, overrides: Overrides | None) -> SetCheck:
    if set_folder(root, info, overrides) is None:
        folders = " or ".join(info.folders)
        return SetCheck(info=info, state="absent", notes=(f"no folder {folders}; to get it: {info.source}",))
    try:
        with warnings.catch_warnings():
            # The same words stand in the notes.
            warnings.simplefilter("ignore")
            loaded = load_set(root, info.key, overrides=overrides)
    except (ValueError, FileNotFoundError) as error:
        return SetCheck(info=info, state="partly", notes=(str(error),))
    return _counted(loaded)


def _counted(loaded: LoadedSet) -> SetCheck:
    unseen = [sample.name for sample in loaded if not _has_video(sample)]
    complete = len(loaded) == loaded.info.count and not unseen
    notes = list(loaded.notes)
    if unseen:
        notes.append(f"{len(unseen)} samples have no video, {unseen[0]!r} first; scoring needs none")
    return SetCheck(
        info=loaded.info,
        state="found" if complete else "partly",
        labels=len(loaded),
        subtitles=sum(bool(sample.subtitle) for sample in loaded),
        videos=len(loaded) - len(unseen),
        faces=sum(face_file(sample) is not None for sample in loaded),
        notes=tuple(notes),
    )


def _has_video(sample: Sample) -> bool:
    try:
        find_video(sample)
    except FileNotFoundError:
        return False
    return True
