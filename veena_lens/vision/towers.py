"""The tower that a configuration asks for."""

from __future__ import annotations

from veena_lens.config import VisionConfig
from veena_lens.vision.clip import ClipTower
from veena_lens.vision.qwen import QwenTower


def make_tower(cfg: VisionConfig) -> ClipTower | QwenTower:
    """A tower with random weights."""
    return QwenTower(cfg) if cfg.kind == "qwen" else ClipTower(cfg)
