"""Where the data that travel with the package lie: small checkpoints, sample pictures and their manifest.

Plain files and dataclasses; neither torch nor transformers is imported here.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image

__all__ = ["Picture", "bundled_names", "bundled_pairs", "bundled_path", "bundled_pictures"]

_BUNDLED = Path(__file__).parent / "bundled"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A sample picture: what is drawn, which question goes with it, and the neutral twin's `pair`."""

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
        """The context, if any, and the question."""
        return f"{self.context} {self.question}" if self.context else self.question

    def open(self) -> Image.Image:
        """The picture in RGB."""
        with Image.open(self.path) as image:
            return image.convert("RGB")


def bundled_names() -> list[str]:
    """Names of the embedded checkpoints."""
    return sorted(path.parent.name for path in _BUNDLED.glob("*/config.json"))


def bundled_path(name: str) -> Path:
    """Folder of an embedded checkpoint.

    Raises ValueError, naming the known ones, when there is none of this name.
    """
    if name not in bundled_names():
        known = ", ".join(bundled_names()) or "none"
        raise ValueError(f"No embedded checkpoint {name!r}; there are: {known}.")
    return _BUNDLED / name


@lru_cache(maxsize=1)
def _manifest() -> tuple[Picture, ...]:
    lines = (_BUNDLED / "pictures" / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(Picture(**json.loads(line)) for line in lines)


def bundled_pictures(split: str | None = None) -> list[Picture]:
    """Sample pictures of a split ("development", "test", "held-out style", "emoji"), or all.

    Raises ValueError, naming the splits, when there is none of this name.
    """
    splits = sorted({picture.split for picture in _manifest()})
    if split is not None and split not in splits:
        raise ValueError(f"No sample pictures of split {split!r}; there are: {', '.join(splits)}.")
    return [picture for picture in _manifest() if split in (None, picture.split)]


def bundled_pairs(split: str = "development") -> list[tuple[Picture, Picture]]:
    """Emotional pictures with their neutral twins, asked without a context.

    Twins show the same person on the same ground; only mouth, eyes and brows differ.
    """
    pictures = [picture for picture in bundled_pictures(split) if picture.context is None and picture.pair is not None]
    neutral = {picture.pair: picture for picture in pictures if picture.emotion == "neutral"}
    return [(p, neutral[p.pair]) for p in pictures if p.emotion != "neutral" and p.pair in neutral]
