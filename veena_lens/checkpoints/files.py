"""Find the files of a checkpoint by its name, read the keys, shapes and tensors of its weights, and list what the
package bundles: small checkpoints, and sample images with their manifest.

Shapes come from the files' headers, so that everything can be checked before any tensor is read. For a hub id,
configuration and processor are downloaded first, weights only when they are needed. torch is imported where weights
are read, so that listing what the package bundles stays quick.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from veena_lens.checkpoints.limits import require_files
from veena_lens.checkpoints.registry import all_adapters
from veena_lens.regular_files import read_json, require_regular

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "LAYOUTS",
    "SMALL_FILES",
    "Folder",
    "Picture",
    "WeightFile",
    "bundled_names",
    "bundled_pairs",
    "bundled_path",
    "bundled_pictures",
    "download",
    "fetch_weights",
    "resolve_folder",
    "weight_files",
]


SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "tokenizer*"]
LAYOUTS = (  # index, single file, pattern; safetensors before pickles
    ("model.safetensors.index.json", "model.safetensors", "model*.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin", "pytorch_model*.bin"),
)


@dataclass(frozen=True)
class Folder:
    """Hold a checkpoint's folder and, for a hub id, where the rest of it can be downloaded."""

    path: Path
    hub_id: str | None = None
    revision: str | None = None


def resolve_folder(name: str | Path, revision: str | None = None) -> Folder:
    """Return the folder of a checkpoint; for a hub id its small files are downloaded.

    name: an embedded checkpoint, a local folder, or a hub id.
    revision: of the hub. None: the newest.

    Raises: FileNotFoundError if the name is none of these, or the folder has no config.json."""
    if str(name) in bundled_names():
        return Folder(Path(bundled_path(str(name))))
    path = _path_of(name)
    if path.is_dir():
        require_files(path)
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{path} has no config.json; pass the folder that `save_pretrained` wrote.")
        return Folder(path)
    text = str(name)
    if path.is_absolute() or text.startswith((".", "~")) or text.count("/") != 1 or text.endswith("/"):
        raise FileNotFoundError(
            f"No checkpoint {text!r}: it is not a folder, not an embedded name ({', '.join(bundled_names())}) and not "
            f"a hub id such as llava-hf/llava-1.5-7b-hf.{did_you_mean(text)}"
        )
    found = download(text, revision, SMALL_FILES)
    if not (found / "config.json").is_file():
        raise FileNotFoundError(f"{text} on the hub has no config.json, so it is not a transformers checkpoint.")
    return Folder(found, text, revision)


def did_you_mean(name: str) -> str:
    """Return " Did you mean ...?" with the embedded names and hub ids that a name is near to, or ""."""
    known = [*bundled_names(), *dict.fromkeys(i for a in all_adapters().values() for i in a.hub_ids)]
    # A hub id may be given without its owner.
    called = {text.lower(): whole for whole in reversed(known) for text in (whole, whole.rsplit("/", 1)[-1])}
    near = dict.fromkeys(called[text] for text in get_close_matches(name.lower(), called, n=3, cutoff=0.6))
    near.pop(name, None)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def _path_of(name: str | Path) -> Path:
    """Return a name as a path. Raises: FileNotFoundError for one that no path can have."""
    if "\0" in str(name) or not str(name).strip():
        raise FileNotFoundError(f"No checkpoint {str(name)!r}: give a folder, an embedded name or a hub id.")
    return Path(name).expanduser()


def download(hub_id: str, revision: str | None, patterns: list[str]) -> Path:
    """Download files of a hub id and return their folder. Raises: FileNotFoundError with the hub's reason."""
    import huggingface_hub as hub

    try:
        return Path(hub.snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        raise FileNotFoundError(
            f"There is no folder {hub_id!r}, and downloading it from the hub failed: {type(error).__name__}: "
            f"{reason}{did_you_mean(hub_id)}"
        ) from error


def fetch_weights(folder: Folder) -> list[Path]:
    """Return the weight files of a folder; for a hub id they are downloaded, safetensors in preference to pickles.

    Raises: FileNotFoundError if there are no weights, or some are missing."""
    if folder.hub_id is not None:
        # The folder of a snapshot is named after its commit; weights must come from the same commit.
        at = folder.path.name if folder.path.parent.name == "snapshots" else folder.revision
        for index, single, _ in LAYOUTS:
            names = _indexed(folder.path / index) if (folder.path / index).is_file() else [single]
            if not all((folder.path / n).is_file() for n in names):
                download(folder.hub_id, at, names)
            if all((folder.path / n).is_file() for n in names):
                break
    files = weight_files(folder.path)
    if not files:
        raise FileNotFoundError(f"{folder.path} has no weights (*.safetensors or pytorch_model*.bin).")
    return files


def _indexed(index: Path) -> list[str]:
    """Return the names of the files of a sharded checkpoint.

    Raises: ValueError for an index without them, or with a name that could lead out of the folder."""
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise ValueError(f"{index} has no 'weight_map' from keys to file names; copy or download it again.")
    names = sorted(set(found.values()))
    for name in names:
        # The name is judged, not what it is a link to: the hub's cache links every file to one of another folder.
        if name in ("", ".", "..") or any(mark in name for mark in "/\\\0:"):
            raise ValueError(f"{index} names {name!r}; the files of a checkpoint lie beside their index.")
    return names


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files in a folder, in Hugging Face's order: safetensors before pickles, one file before shards.

    Raises: FileNotFoundError if an index names files that are missing."""
    for index, single, pattern in LAYOUTS:
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            names = _indexed(folder / index)
            if missing := [n for n in names if not (folder / n).is_file()]:
                raise FileNotFoundError(f"{folder / index} names files that are missing: {', '.join(missing)}.")
            return [folder / n for n in names]
        if found := sorted(folder.glob(pattern)):
            return found
    return []


class WeightFile:
    """Read one weight file: its keys with shapes, and its tensors one by one.

    Raises: ValueError for a file that is broken or is not a weight file."""

    def __init__(self, path: Path) -> None:
        require_regular(path)
        self.path = path
        self._is_safe = self.is_mapped = path.suffix == ".safetensors"

    def shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype | str]]:
        """Return key -> (shape, dtype) from the header; a dtype unknown to torch stays the file's name of it."""
        if not self._is_safe:
            return {k: (tuple(v.shape), v.dtype) for k, v in self._unpickled().items()}
        dtypes = _dtypes()
        with self._opened() as f:
            slices: dict[str, Any] = {key: f.get_slice(key) for key in f.keys()}  # noqa: SIM118
            kinds = {key: str(s.get_dtype()) for key, s in slices.items()}
            return {key: (tuple(s.get_shape()), dtypes.get(kinds[key], kinds[key])) for key, s in slices.items()}

    def about(self) -> dict[str, str]:
        """Return the metadata of a safetensors header; a pickle has none."""
        if not self._is_safe:
            return {}
        with self._opened() as f:
            return dict(f.metadata() or {})

    def tensors(self, keys: list[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield (key, tensor) of the chosen keys; tensors are mapped from the file, not yet read."""
        if self._is_safe:
            with self._opened() as f:
                for key in keys:
                    yield key, f.get_tensor(key)
        else:
            loaded = self._unpickled()
            for key in keys:
                yield key, loaded[key]

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        from safetensors import SafetensorError, safe_open

        from veena_lens.checkpoints.mapped import ReadFile

        try:
            try:
                opened = safe_open(str(self.path), framework="pt")
            except OSError:  # some network and user-space file systems map nothing
                self.is_mapped = False
                yield ReadFile(self.path)
                return
            with opened as file:
                yield file
        except SafetensorError as error:
            raise ValueError(
                f"{self.path} ({self.path.stat().st_size:,} bytes) is not a complete safetensors file: {error}. "
                "Download it again."
            ) from error

    def _unpickled(self) -> dict[str, Any]:
        import torch

        # Without weights_only a pickle could run code.
        try:
            loaded = torch.load(self.path, weights_only=True, mmap=True, map_location="cpu")
        except Exception as error:
            raise ValueError(f"{self.path} cannot be read as plain weights: {_first(error)}") from error
        if not isinstance(loaded, dict) or not all(isinstance(v, torch.Tensor) for v in loaded.values()):
            raise ValueError(f"{self.path} contains more than a dictionary of tensors; save only the state dict.")
        for key, tensor in loaded.items():
            # A view can show one number any number of times.
            plain = isinstance(key, str) and tensor.device.type == "cpu" and tensor.layout == torch.strided
            if not plain or tensor.nbytes > tensor.untyped_storage().nbytes():
                raise ValueError(f"{self.path}: {key!r} is not a plain tensor; save only the state dict.")
        return loaded


def _first(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _dtypes() -> dict[str, torch.dtype]:
    """Return torch's dtypes by their names in safetensors headers."""
    import torch

    return {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
    }


_BUNDLED = Path(__file__).parent / "bundled"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """Describe a sample image: what it shows, the question about it, and the `pair` that it shares with its twin."""

    file: str
    emotion: str
    pair: str | None
    identity: str
    style: str
    attributes: Mapping[str, str]
    split: str
    question: str
    context: str | None
    context_emotion: str | None
    context_strength: str | None

    @property
    def path(self) -> Path:
        return _BUNDLED / "pictures" / self.file

    @property
    def prompt(self) -> str:
        """Return the context, if any, followed by the question."""
        return f"{self.context} {self.question}" if self.context else self.question

    def open(self) -> Image.Image:
        """Read the image in RGB."""
        with Image.open(self.path) as image:
            return image.convert("RGB")


def bundled_names() -> list[str]:
    """Return the names of the embedded checkpoints."""
    return sorted(path.parent.name for path in _BUNDLED.glob("*/config.json"))


def bundled_path(name: str) -> Path:
    """Return the folder of an embedded checkpoint.

    Raises: ValueError for an unknown name, with the known ones."""
    if name not in bundled_names():
        known = ", ".join(bundled_names()) or "none"
        raise ValueError(f"No embedded checkpoint {name!r}; known: {known}.{did_you_mean(name)}")
    return _BUNDLED / name


@lru_cache(maxsize=1)
def _manifest() -> tuple[Picture, ...]:
    lines = (_BUNDLED / "pictures" / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(Picture(**json.loads(line)) for line in lines)


def bundled_pictures(split: str | None = None) -> list[Picture]:
    """Return the sample images of a split ("development", "test", "held-out style", "emoji"). None: all.

    Raises: ValueError for an unknown split, with the known ones."""
    splits = sorted({picture.split for picture in _manifest()})
    if split is not None and split not in splits:
        raise ValueError(f"No sample images of split {split!r}; known: {', '.join(splits)}.")
    return [picture for picture in _manifest() if split in (None, picture.split)]


def bundled_pairs(split: str = "development") -> list[tuple[Picture, Picture]]:
    """Return the emotional images of a split with their neutral twins, without context sentences.

    Twins show the same person on the same background; only mouth, eyes and brows differ."""
    pictures = [picture for picture in bundled_pictures(split) if picture.context is None and picture.pair is not None]
    neutral = {picture.pair: picture for picture in pictures if picture.emotion == "neutral"}
    return [(p, neutral[p.pair]) for p in pictures if p.emotion != "neutral" and p.pair in neutral]
