"""Where a checkpoint's weights lie: a folder found by name, its safetensors (or pickle) files and their keys.

Shapes are read from the files' headers, so that everything can be checked before any tensor is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from veena_lens.checkpoints.bundle import bundled_names, bundled_path

DOWNLOAD = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "tokenizer*"]


def resolve_folder(name: str | Path, revision: str | None = None) -> Path:
    """The folder of an embedded checkpoint, a local folder, or a hub id (downloaded through huggingface_hub).

    Raises: FileNotFoundError when there is neither, saying what was tried."""
    if str(name) in bundled_names():
        return Path(bundled_path(str(name)))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{path} holds no config.json; give the folder that `save_pretrained` wrote.")
        return path
    text = str(name)
    if path.is_absolute() or text.startswith((".", "~")) or text.count("/") != 1:
        raise FileNotFoundError(
            f"No checkpoint {text!r}: it is no folder, no embedded name ({', '.join(bundled_names())}) and no hub id "
            "such as llava-hf/llava-1.5-7b-hf."
        )
    import huggingface_hub as hub

    try:
        found = Path(hub.snapshot_download(text, revision=revision, allow_patterns=DOWNLOAD))
        if not weight_files(found):
            found = Path(hub.snapshot_download(text, revision=revision, allow_patterns=[*DOWNLOAD, "*.bin"]))
    except Exception as error:
        raise FileNotFoundError(
            f"No folder {text!r} here, and the hub gave none: {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
    return found


def weight_files(folder: Path) -> list[Path]:
    """Weight files of a folder: safetensors if there are any, else pickle files, sharded or not."""
    for index, single, pattern in (
        ("model.safetensors.index.json", "model.safetensors", "*.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model.bin", "pytorch_model*.bin"),
    ):
        if (folder / index).is_file():
            names = set(json.loads((folder / index).read_text())["weight_map"].values())
            missing = sorted(n for n in names if not (folder / n).is_file())
            if missing:
                raise FileNotFoundError(f"{folder / index} names files that are missing: {', '.join(missing)}.")
            return sorted(folder / n for n in names)
        if (folder / single).is_file():
            return [folder / single]
        if found := sorted(folder.glob(pattern)):
            return found
    return []


class WeightFile:
    """One file: its keys with shapes, and its tensors one by one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._is_safe = path.suffix == ".safetensors"

    def shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Key -> (shape, dtype), from the header."""
        if self._is_safe:
            with safe_open(str(self.path), framework="pt") as f:
                slices = {key: f.get_slice(key) for key in f.keys()}  # noqa: SIM118
                return {k: (tuple(s.get_shape()), _DTYPES[s.get_dtype()]) for k, s in slices.items()}
        return {k: (tuple(v.shape), v.dtype) for k, v in self._unpickled().items()}

    def tensors(self, keys: list[str]) -> Iterator[tuple[str, Tensor]]:
        """(key, tensor) of the chosen keys; tensors are mapped from the file, not yet read."""
        if self._is_safe:
            with safe_open(str(self.path), framework="pt") as f:
                for key in keys:
                    yield key, f.get_tensor(key)
        else:
            loaded = self._unpickled()
            for key in keys:
                yield key, loaded[key]

    def _unpickled(self) -> dict[str, Any]:
        # weights_only: a pickle may run code otherwise.
        return torch.load(self.path, weights_only=True, mmap=True, map_location="cpu")


_DTYPES = {
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
