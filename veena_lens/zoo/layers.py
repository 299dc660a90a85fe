"""Draws avataaars faces as layers: once per identity what lies under and over the face parts, once each the parts.

Composing layers is some thirty times faster than drawing each picture, and two pictures of one identity then differ
in the face parts only, pixel by pixel. Layers are drawn 8 pixels wider than a picture, room for shifting.
"""

import io
import re
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from veena_lens.zoo.faces import AVATAAARS
from veena_lens.zoo.identities import Identity

__all__ = ["LAYER_SIZE", "PICTURE_SIZE", "draw_identity", "draw_parts", "rasterise"]

PICTURE_SIZE = 96
LAYER_SIZE = 104
_GROUPS = ("Body", "Clothing", "Mouth", "Nose", "Eyes", "Eyebrow", "Top")
# The part of the drawing shown by a layer: the face, tightly; a picture is the middle 96/104 of it.
_VIEW = (47.0, 20.0, 170.0)


def rasterise(svg: str, size: int, style_sheet: str | None = None) -> UInt8[Tensor, "size size 4"]:
    """An SVG as straight RGBA pixels."""
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
        from veena_lens.zoo.identities import HAIR_COLORS

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
    """The layers below and above the face parts."""
    svg = _svg(identity, "SERIOUS", "DEFAULT", "DEFAULT")
    below = rasterise(svg, size, _hide("Mouth", "Eyes", "Eyebrow", "Top"))
    above = rasterise(svg, size, _hide("Body", "Clothing", "Mouth", "Nose", "Eyes", "Eyebrow"))
    return below, above


@lru_cache(maxsize=4)
def draw_parts(size: int = LAYER_SIZE) -> dict[tuple[str, str], UInt8[Tensor, "size size 4"]]:
    """Every mouth, pair of eyes and pair of brows in use, keyed by (part, variant)."""
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
