"""Draw faces: avataaars as layers, other styles and emoji from SVG files in `art/`.

Layers below and above the face parts are drawn once per identity, and each face part once. Composing layers is about
thirty times faster than drawing each image, and two images of one identity then differ, pixel by pixel, only in the
face parts. Layers are 8 pixels wider than an image, which leaves room for shifting.

`art/export_styles.mjs` wrote the SVG files of the other styles, without face parts; each style's licence is next to its
file. Emoji are used only to evaluate the finished model.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from veena_lens.zoo.faces import AVATAAARS, STYLES, Combination, Style
from veena_lens.zoo.people import Identity

__all__ = [
    "EMOJI",
    "LAYER_SIZE",
    "PICTURE_SIZE",
    "draw_emoji",
    "draw_identity",
    "draw_parts",
    "draw_style_face",
    "rasterise",
    "style_attributes",
    "style_identities",
]


PICTURE_SIZE = 96
LAYER_SIZE = 104
_GROUPS = ("Body", "Clothing", "Mouth", "Nose", "Eyes", "Eyebrow", "Top")
# The part of the drawing that a layer shows: a tight crop of the face; an image is the middle 96/104 of it.
_VIEW = (47.0, 20.0, 170.0)


def rasterise(svg: str, size: int, style_sheet: str | None = None) -> UInt8[Tensor, "size size 4"]:
    """Render an SVG as straight RGBA pixels."""
    import resvg_py

    png = resvg_py.svg_to_bytes(
        svg_string=svg, width=size, height=size, skip_system_fonts=True, style_sheet=style_sheet
    )
    return torch.from_numpy(np.array(Image.open(io.BytesIO(bytes(png))).convert("RGBA")))


def _hide(*groups: str) -> str:
    return ",".join(f"#transparent_{group}" for group in groups) + "{display:none}"


def _svg(identity: Identity | None, mouth: str, eyes: str, brows: str) -> str:
    import python_avatars as pa

    chosen: dict[str, Any] = {}
    if identity is not None:
        from veena_lens.zoo.people import HAIR_COLORS

        hair = pa.HairColor[HAIR_COLORS[identity.hair]]
        chosen = dict(
            top=pa.HairType[identity.hair_type],
            hair_color=hair,
            facial_hair_color=hair,
            skin_color=pa.SkinColor[identity.skin],
            accessory=pa.AccessoryType[identity.glasses],
            facial_hair=pa.FacialHairType[identity.beard],
            clothing=pa.ClothingType[identity.clothes],
            clothing_color=pa.ClothingColor[identity.clothes_color],
        )
    avatar = pa.Avatar(
        style=pa.AvatarStyle.TRANSPARENT,
        mouth=pa.MouthType[mouth],
        eyes=pa.EyeType[eyes],
        eyebrows=pa.EyebrowType[brows],
        **chosen,
    )
    x, y, width = _VIEW
    head = f'width="{LAYER_SIZE}px" height="{LAYER_SIZE}px" viewBox="{x} {y} {width} {width}"'
    return re.sub(r'width="264px" height="280px" viewBox="0 0 264 280"', head, avatar.render(), count=1)


def draw_identity(
    identity: Identity, size: int = LAYER_SIZE
) -> tuple[UInt8[Tensor, "size size 4"], UInt8[Tensor, "size size 4"]]:
    """Return the layers below and above the face parts."""
    svg = _svg(identity, "SERIOUS", "DEFAULT", "DEFAULT")
    below = rasterise(svg, size, _hide("Mouth", "Eyes", "Eyebrow", "Top"))
    above = rasterise(svg, size, _hide("Body", "Clothing", "Mouth", "Nose", "Eyes", "Eyebrow"))
    return below, above


@lru_cache(maxsize=4)
def draw_parts(size: int = LAYER_SIZE) -> dict[tuple[str, str], UInt8[Tensor, "size size 4"]]:
    """Return every mouth, pair of eyes and pair of brows in use, by (part, variant)."""
    from veena_lens.zoo.faces import combinations

    drawn: dict[tuple[str, str], Tensor] = {}
    only = {"mouth": "Mouth", "eyes": "Eyes", "brows": "Eyebrow"}
    default = {"mouth": "SERIOUS", "eyes": "DEFAULT", "brows": "DEFAULT"}
    for clear, subtle in combinations(AVATAAARS).values():
        for combination in clear + subtle:
            for part, variant in zip(AVATAAARS.parts, combination.variants, strict=True):
                if (part, variant) not in drawn:
                    svg = _svg(None, **{**default, part: variant})
                    hidden = [group for group in _GROUPS if group != only[part]]
                    drawn[part, variant] = rasterise(svg, size, _hide(*hidden))
    return drawn


_ART = Path(__file__).parent / "art"


@lru_cache(maxsize=8)
def _drawing(name: str) -> dict[str, Any]:
    with gzip.open(_ART / f"{name}.json.gz") as file:
        return json.load(file)


def style_identities(name: str, split: str) -> list[int]:
    """Return the identity numbers of a style: three quarters for training, the others for development and test.

    A held-out style has no training identities; "all" returns every identity of any style."""
    numbers = list(range(len(_drawing(name)["identities"])))
    if split == "all":
        return numbers
    random.Random(f"split {name}").shuffle(numbers)
    first, second = int(0.75 * len(numbers)), int(0.85 * len(numbers))
    return {"train": numbers[:first], "development": numbers[first:second], "test": numbers[second:]}[split]


def style_attributes(name: str, number: int) -> dict[str, str]:
    """Return the known attributes of an identity of this style."""
    entry = _drawing(name)["identities"][number]
    worn = [str(entry["extra"].get(key) or "") for key in ("glasses", "accessories")]
    known = {"hair": entry["hair"]}
    if STYLES[name].has_glasses:
        known["glasses"] = "yes" if any(worn) else "no"
    return known


def draw_style_face(
    style: Style, number: int, combination: Combination, size: int = LAYER_SIZE
) -> UInt8[Tensor, "size size 4"]:
    """Draw one face of another style on a transparent background."""
    drawing = _drawing(style.name)
    svg: str = drawing["identities"][number]["svg"]
    for part, variant in zip(style.parts, combination.variants, strict=True):
        svg = svg.replace(f"@@{part}@@", drawing["parts"][part][variant])
    return rasterise(cropped(svg, style.crop), size)


def cropped(svg: str, crop: tuple[float, float, float]) -> str:
    """Return the SVG with its view box narrowed to a square given in fractions (x, y, side).

    Raises: ValueError for a drawing without a view box."""
    found = re.search(r'viewBox="([^"]+)"', svg)
    if found is None:
        raise ValueError("The drawing has no viewBox.")
    x, y, width, _ = map(float, found.group(1).split())
    view = f'viewBox="{x + crop[0] * width} {y + crop[1] * width} {crop[2] * width} {crop[2] * width}"'
    return svg.replace(found.group(0), view, 1)


_EMOJI_ART = Path(__file__).parent / "art" / "twemoji"

# Code points by emotion, chosen by their Unicode names and their drawings.
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
    """Draw one emoji on a transparent background, with a little room around it."""
    return rasterise(cropped((_EMOJI_ART / f"{code}.svg").read_text(), (-0.06, -0.06, 1.12)), size)
