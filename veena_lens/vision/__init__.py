"""Vision towers and the connector to the decoder."""

from __future__ import annotations

from collections.abc import Callable

from veena_lens.config import VisionConfig
from veena_lens.vision.clip import ClipTower
from veena_lens.vision.qwen import QwenTower

TOWERS: dict[str, Callable[[VisionConfig], ClipTower | QwenTower]] = {
    "clip": ClipTower,
    "siglip": ClipTower,
    "qwen": QwenTower,
}


def make_tower(cfg: VisionConfig) -> ClipTower | QwenTower:
    """Return the tower that a configuration asks for, with random weights."""
    return TOWERS[cfg.kind](cfg)
