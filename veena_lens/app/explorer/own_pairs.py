"""Pairs that a visitor gives: two sets of images, or a .zip with folders or a manifest; checked, then kept by a tab.

Files are copied into the tab's folder under names that were made here or checked, so that nothing outside it is read
or written, whatever an archive says.
"""

from __future__ import annotations

import json
import secrets
import shutil
import stat
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from veena_lens.app.explorer.pictures import open_upload
from veena_lens.app.explorer.state import Limits, Session, reading
from veena_lens.emotion import EmotionWheels, PairSet, load_pairs, pairs_from_folders
from veena_lens.emotion.pairs.loading import MANIFEST
from veena_lens.scores import counted

NEUTRAL = "neutral"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
FOLDER = "pairs"
LISTING = b"PK\x01\x02"  # begins an entry in the list of an archive
MOST_PATH, MOST_NAME = 1000, 200
HOW = (
    f"A .zip of pairs has one folder per emotion and one named {NEUTRAL!r}, twins with the same file name, or a "
    f"{MANIFEST} beside its images."
)


@dataclass(frozen=True, kw_only=True, eq=False)
class OwnPairs:
    """Checked pairs, the folder that holds them, and the expression that loads them from a copy of it by `loader`."""

    pairs: PairSet
    folder: Path
    code: str
    loader: Callable[..., PairSet] = load_pairs

    def describe(self) -> str:
        """Say what was given, in a sentence."""
        counts = {emotion: sum(p.emotion == emotion for p in self.pairs) for emotion in self.pairs.emotions}
        each = [f"{counted(n, 'pair')} of {emotion}" for emotion, n in counts.items()]
        return f"Your pairs: {', '.join(each)}."


def take_sets(
    session: Session, shown: Sequence[str] | None, twins: Sequence[str] | None, emotion: str, limits: Limits
) -> OwnPairs:
    """Make pairs from two sets of files: twins by their name where all names agree, else in the order given.

    Raises: ValueError for sets of unequal size, an emotion that no wheel knows, or images that cannot be used."""
    shown, twins, emotion = list(shown or ()), list(twins or ()), emotion.strip().lower()
    if not shown or not twins:
        raise ValueError(
            "Give both sets, images with the emotion and the same without it, or a .zip with pairs; got "
            f"{len(shown)} and {len(twins)} images."
        )
    if len(shown) != len(twins):
        raise ValueError(
            f"Got {counted(len(shown), 'image')} with the emotion and {len(twins)} without it; each needs its twin."
        )
    _require_few(len(shown), limits)
    if not emotion or emotion == NEUTRAL:
        raise ValueError("Name the emotion of the first set, such as happy.")
    EmotionWheels.default().require([emotion])
    stems = [sorted(Path(p).stem for p in side) for side in (shown, twins)]
    by_name = stems[0] == stems[1] and len(set(stems[0])) == len(stems[0])
    folder = _fresh(session)
    try:
        with reading(folder / "pairs", "pairs"):
            for name, files in ((emotion, shown), (NEUTRAL, twins)):
                (folder / name).mkdir()
                for i, path in enumerate(sorted(files, key=lambda p: Path(p).stem) if by_name else files):
                    open_upload(path, limits)
                    stem = plain_stem(path) if by_name else f"{i + 1:03d}"
                    shutil.copyfile(path, folder / name / f"{stem}{Path(path).suffix.lower()}")
            return _kept(session, folder, limits=limits)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def take_zip(session: Session, path: str | Path, limits: Limits) -> OwnPairs:
    """Make pairs from an archive.

    Raises: ValueError for one that is not a .zip, is damaged, holds too much or lacks twins."""
    path, folder = Path(path), _fresh(session)
    try:
        with reading(path, "a .zip of pairs"), reading(folder / "pairs", "pairs"):
            _unpack(path, folder, limits)
            return _kept(session, folder, path.name, limits)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def forget_pairs(session: Session) -> None:
    """Go back to the sample faces."""
    own: OwnPairs | None = session.kept.pop("own_pairs", None)
    if own is not None:
        shutil.rmtree(own.folder, ignore_errors=True)


def export_pairs(session: Session) -> list[str]:
    """Write the pairs as pairs.zip, for the program that loads them; nothing where there are none."""
    own: OwnPairs | None = session.kept.get("own_pairs")
    if own is None:
        return []
    target = session.folder / f"{FOLDER}.zip"
    with zipfile.ZipFile(target, "w") as archive:
        for file in sorted(p for p in own.folder.rglob("*") if p.is_file()):
            archive.write(file, PurePosixPath(FOLDER, *file.relative_to(own.folder).parts).as_posix())
    return [str(target)]


def _fresh(session: Session) -> Path:
    folder = session.folder / f"pairs-{secrets.token_hex(6)}"
    folder.mkdir()
    return folder


def _kept(session: Session, folder: Path, name: str = "your images", limits: Limits | None = None) -> OwnPairs:
    """Keep the folder's pairs in the tab's memory. Raises: ValueError, in the visitor's own names."""
    has_manifest = (folder / MANIFEST).is_file()
    if has_manifest:
        _require_inside(folder, None if limits is None else 2 * limits.pairs)
    try:
        pairs = load_pairs(folder).without_context() if has_manifest else pairs_from_folders(folder)
    except FileNotFoundError:
        raise ValueError(f"{name} holds no pairs. {HOW}") from None
    except ValueError as error:
        text = str(error).replace(f"{folder}/", "").replace(str(folder), name)
        raise ValueError(text) from error
    if not len(pairs):
        raise ValueError(f"{name} holds no image with a neutral twin. {HOW}")
    if limits is not None:
        _require_few(len(pairs), limits)
    forget_pairs(session)
    code = f'load_pairs("{FOLDER}").without_context()' if has_manifest else f'pairs_from_folders("{FOLDER}")'
    own = OwnPairs(pairs=pairs, folder=folder, code=code, loader=load_pairs if has_manifest else pairs_from_folders)
    session.kept["own_pairs"] = own
    return own


def _require_few(n: int, limits: Limits) -> None:
    if n > limits.pairs:
        raise ValueError(f"{counted(n, 'pair')} were given; the limit here is {limits.pairs}.")


def _require_inside(folder: Path, most: int | None) -> None:
    """Check a manifest's length and paths. Raises: ValueError for too many lines, or a file outside its folder."""
    lines = [s for s in (folder / MANIFEST).read_text(encoding="utf-8", errors="replace").splitlines() if s.strip()]
    if most is not None and len(lines) > most:
        raise ValueError(f"The {MANIFEST} names {len(lines):,} images; the limit here is {most // 2} pairs.")
    for line in lines:
        try:
            file = json.loads(line).get("file")
        except (ValueError, AttributeError, RecursionError):
            continue  # load_pairs says what is wrong with the line
        if isinstance(file, str) and not (folder / file).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"The {MANIFEST} names {file!r}, which is not in the archive.")


def plain_stem(path: str) -> str:
    """Return a file's name without its ending, and without characters that could make a path."""
    name = Path(path).stem
    return "".join(c if c.isalnum() or c in "-_ ." else "_" for c in name).lstrip(".") or "image"


def _unpack(path: Path, folder: Path, limits: Limits) -> None:
    """Unpack images and the manifest of an archive, a single folder around them left out.

    Raises: ValueError for no archive, entries that lead elsewhere, or more than the limits allow."""
    if path.stat().st_size > limits.upload_bytes:
        raise ValueError(f"{path.name} has {path.stat().st_size:,} bytes; the limit here is {limits.upload_bytes:,}.")
    most = 2 * limits.pairs + 1
    listed = path.read_bytes().count(LISTING)  # before each entry is made an object
    if listed > 100 * most:
        raise ValueError(f"{path.name} lists {listed:,} files; the limit here is {limits.pairs} pairs.")
    try:
        archive = zipfile.ZipFile(path)
    except Exception:  # a header that makes no sense fails in many ways
        raise ValueError(
            f"{path.name} cannot be read as a .zip: it was cut short or is another kind of file."
        ) from None
    with archive:
        entries = [(_inside(e.filename, path.name), e) for e in archive.infolist() if _wanted(e)]
        if len(entries) > most:
            raise ValueError(f"{path.name} holds {len(entries):,} images; the limit here is {limits.pairs} pairs.")
        around = {where.parts[0] for where, _ in entries if len(where.parts) > 1}
        wrapped = len(around) == 1 and all(len(where.parts) > 1 for where, _ in entries)
        total = 0
        for where, entry in entries:
            if entry.flag_bits & 1:
                raise ValueError(f"{where} in {path.name} is encrypted; pack it without a password.")
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{where} in {path.name} is packed in an unusual way; pack it as an ordinary .zip.")
            target = folder.joinpath(*where.parts[wrapped:])
            if len(str(target)) > MOST_PATH or any(len(part.encode()) > MOST_NAME for part in target.parts):
                raise ValueError(
                    f"{path.name} holds an entry whose name has {len(str(where)):,} characters; shorten it."
                )
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with archive.open(entry) as source:
                    data = source.read(limits.upload_bytes + 1)  # a header's size can lie
            except Exception as error:
                raise ValueError(f"{where} in {path.name} cannot be unpacked: {error}.") from error
            total += len(data)
            if len(data) > limits.upload_bytes:
                raise ValueError(f"{where} unpacks to more than {limits.upload_bytes:,} bytes, the limit here.")
            if total > limits.unpacked_bytes:
                raise ValueError(f"{path.name} unpacks to more than {limits.unpacked_bytes:,} bytes, the limit here.")
            target.write_bytes(data)
            if target.suffix.lower() in PICTURES:
                open_upload(str(target), limits)
    if not entries:
        raise ValueError(f"{path.name} holds no images. {HOW}")


def _wanted(entry: zipfile.ZipInfo) -> bool:
    """True for images and manifests; not for folders, links or hidden files."""
    name = PurePosixPath(entry.filename.replace("\\", "/"))
    hidden = any((part.startswith(".") and part not in ("..", ".")) or part == "__MACOSX" for part in name.parts)
    is_link = stat.S_ISLNK(entry.external_attr >> 16)
    return not (entry.is_dir() or hidden or is_link) and (name.suffix.lower() in PICTURES or name.name == MANIFEST)


def _inside(name: str, archive: str) -> PurePosixPath:
    """Return the path of an entry. Raises: ValueError for one that leads outside its folder."""
    where = PurePosixPath(name.replace("\\", "/"))
    if where.is_absolute() or ".." in where.parts or ":" in where.parts[0]:
        raise ValueError(f"{archive} holds the entry {name!r}, which leads out of its folder; pack it anew.")
    return PurePosixPath(*(part for part in where.parts if part != "."))
