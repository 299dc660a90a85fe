"""Emoji faces: pictures of another kind, shown only when the finished model is judged."""

from pathlib import Path

from jaxtyping import UInt8
from torch import Tensor

from veena_lens.zoo.layers import rasterise
from veena_lens.zoo.styles import cropped

__all__ = ["EMOJI", "draw_emoji"]

_ART = Path(__file__).parent / "art" / "twemoji"

# Code points by emotion, after their Unicode names and a look at the drawings.
EMOJI: dict[str, tuple[str, ...]] = {
    "happy": ("1f600", "1f603", "1f604", "1f601", "1f642", "1f60a"),
    "sad": ("1f622", "1f62d", "1f61e", "1f614", "2639", "1f641"),
    "angry": ("1f620", "1f621", "1f624"),
    "surprised": ("1f62e", "1f62f", "1f632"),
    "afraid": ("1f628", "1f631", "1f627"),
    "disgusted": ("1f922", "1f92e"),
    "loving": ("1f60d", "1f970", "1f618"),
    "neutral": ("1f610", "1f611"),
}


def draw_emoji(code: str, size: int) -> UInt8[Tensor, "size size 4"]:
    """One emoji on a transparent ground, with a little room around it."""
    return rasterise(cropped((_ART / f"{code}.svg").read_text(), (-0.06, -0.06, 1.12)), size)
