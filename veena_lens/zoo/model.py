"""The small models by the names of their checkpoints."""

import json
from pathlib import Path

from veena_lens.checkpoints.files import bundled_path
from veena_lens.zoo.architecture import Architecture
from veena_lens.zoo.llava import LLAVA
from veena_lens.zoo.qwen2_vl import QWEN2_VL

__all__ = ["ARCHITECTURES", "architecture_of", "checkpoint_folder"]

ARCHITECTURES: dict[str, Architecture] = {each.name: each for each in (LLAVA, QWEN2_VL)}


def architecture_of(folder: Path) -> Architecture:
    """The small model whose checkpoint lies in the folder.

    Raises ValueError, naming the known kinds, when it is none of them.
    """
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    known = {each.model_type: each for each in ARCHITECTURES.values()}
    if kind not in known:
        raise ValueError(f"{folder} holds a {kind!r}; the small models are: {', '.join(known)}.")
    return known[kind]


def checkpoint_folder(name: str) -> Path:
    """A folder by its path, or an embedded checkpoint's by its name."""
    return Path(name) if Path(name).is_dir() else bundled_path(name)
