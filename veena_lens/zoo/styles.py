"""Draws faces in the other art styles, from SVG text kept in `art/` with the face parts cut out.

The files are written once by `art/export_styles.mjs`; each style's licence lies beside its file.
"""

import gzip
import json
import random
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from jaxtyping import UInt8
from torch import Tensor

from veena_lens.zoo.faces import STYLES, Combination, Style
from veena_lens.zoo.layers import LAYER_SIZE, rasterise

__all__ = ["draw_style_face", "style_attributes", "style_identities"]

_ART = Path(__file__).parent / "art"


@lru_cache(maxsize=8)
def _drawing(name: str) -> dict[str, Any]:
    with gzip.open(_ART / f"{name}.json.gz") as file:
        return json.load(file)


def style_identities(name: str, split: str) -> list[int]:
    """Identity numbers of a style: three quarters for training, the others for development and test.

    A held-out style has no training identities, so "all" gives every one of any style.
    """
    numbers = list(range(len(_drawing(name)["identities"])))
    if split == "all":
        return numbers
    random.Random(f"split {name}").shuffle(numbers)
    first, second = int(0.75 * len(numbers)), int(0.85 * len(numbers))
    return {"train": numbers[:first], "development": numbers[first:second], "test": numbers[second:]}[split]


def style_attributes(name: str, number: int) -> dict[str, str]:
    """What is known of an identity of this style."""
    entry = _drawing(name)["identities"][number]
    worn = [str(entry["extra"].get(key) or "") for key in ("glasses", "accessories")]
    known = {"hair": entry["hair"]}
    if STYLES[name].has_glasses:
        known["glasses"] = "yes" if any(worn) else "no"
    return known


def draw_style_face(
    style: Style, number: int, combination: Combination, size: int = LAYER_SIZE
) -> UInt8[Tensor, "size size 4"]:
    """One face of another style on a transparent ground."""
    drawing = _drawing(style.name)
    svg: str = drawing["identities"][number]["svg"]
    for part, variant in zip(style.parts, combination.variants, strict=True):
        svg = svg.replace(f"@@{part}@@", drawing["parts"][part][variant])
    return rasterise(cropped(svg, style.crop), size)


def cropped(svg: str, crop: tuple[float, float, float]) -> str:
    """The SVG with its view box narrowed to a square given in fractions (x, y, side)."""
    found = re.search(r'viewBox="([^"]+)"', svg)
    if found is None:
        raise ValueError("The drawing has no viewBox.")
    x, y, width, _ = map(float, found.group(1).split())
    view = f'viewBox="{x + crop[0] * width} {y + crop[1] * width} {crop[2] * width} {crop[2] * width}"'
    return svg.replace(found.group(0), view, 1)
