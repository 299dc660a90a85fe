"""List the small models by the names of their checkpoints."""

import json
from pathlib import Path

from veena_lens.checkpoints.files import bundled_path
from veena_lens.zoo.architecture import Architecture
from veena_lens.zoo.llava import LLAVA
from veena_lens.zoo.qwen2_vl import QWEN2_VL

__all__ = ["ARCHITECTURES", "architecture_of", "checkpoint_folder"]

ARCHITECTURES: dict[str, Architecture] = {each.name: each for each in (LLAVA, QWEN2_VL)}


def architecture_of(folder: Path) -> Architecture:
    """Return the small model whose checkpoint is in the folder.

    Raises: ValueError for another kind of checkpoint, with the known kinds."""
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    known = {each.model_type: each for each in ARCHITECTURES.values()}
    if kind not in known:
        raise ValueError(f"{folder} has a model of type {kind!r}; it must be one of {', '.join(known)}.")
    return known[kind]


def checkpoint_folder(name: str) -> Path:
    """Return a folder given by its path, or that of an embedded checkpoint by its name."""
    return Path(name) if Path(name).is_dir() else bundled_path(name)
