"""Keep banks of drawn faces in memory, and compose and augment batches of training images from them.

A bank has layers for the main style and whole faces for the others. The background is painted per batch, so that colour
is independent of emotion. Banks are stored in a cache folder, because drawing them takes a minute or two.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from veena_lens.zoo.drawing import (
    LAYER_SIZE,
    PICTURE_SIZE,
    draw_identity,
    draw_parts,
    draw_style_face,
    style_attributes,
    style_identities,
)
from veena_lens.zoo.faces import (
    AVATAAARS,
    BROW_WORDS,
    EYE_WORDS,
    MOUTH_WORDS,
    STYLES,
    Combination,
    combinations,
)
from veena_lens.zoo.people import BACKGROUNDS, EMOTIONS, identity, identity_numbers

__all__ = ["Bank", "Face", "StyleBank", "compose", "load_bank", "load_style_bank", "recolour"]

_OVER = tuple[UInt8[Tensor, "size size 4"], ...]


@dataclass(frozen=True, kw_only=True)
class Face:
    """Describe one image: what is drawn, and the attributes that questions ask about."""

    style: str
    identity: int
    emotion: str
    clear: bool
    background: str
    attributes: dict[str, str]


@dataclass(frozen=True)
class Bank:
    """Hold the layers of the main style for one split."""

    numbers: list[int]
    below: UInt8[Tensor, "identity size size 4"]
    above: UInt8[Tensor, "identity size size 4"]

    def draw(
        self,
        rng: random.Random,
        emotion: str | None = None,
        index: int | None = None,
        combination: Combination | None = None,
    ) -> tuple[Face, _OVER]:
        """Return a face with its layers; what is not given is random, with clear and subtle equally often."""
        index = rng.randrange(len(self.numbers)) if index is None else index
        if combination is None:
            emotion = emotion or rng.choice(EMOTIONS)
            combination = rng.choice(rng.choice(_MAIN[emotion]))
        mouth, eyes, brows = combination.variants
        person = identity(self.numbers[index])
        background = rng.choice(list(BACKGROUNDS))
        face = Face(
            style="avataaars",
            identity=person.number,
            emotion=combination.emotion,
            clear=combination.clear,
            background=background,
            attributes=person.attributes
            | {
                "background": background,
                "mouth": MOUTH_WORDS[mouth],
                "eyes": EYE_WORDS[eyes],
                "brows": BROW_WORDS[brows],
            },
        )
        parts = draw_parts(self.below.shape[1])
        drawn = (parts["mouth", mouth], parts["eyes", eyes], parts["brows", brows])
        return face, (self.below[index], *drawn, self.above[index])


@dataclass(frozen=True)
class StyleBank:
    """Hold whole faces of another style for one split."""

    style: str
    rows: list[tuple[int, str, bool]]
    drawn: UInt8[Tensor, "face size size 4"]

    def draw(self, rng: random.Random) -> tuple[Face, _OVER]:
        """Return a face and its one layer, with emotions equally often."""
        emotion = rng.choice(sorted({row[1] for row in self.rows}))
        index = rng.choice([i for i, row in enumerate(self.rows) if row[1] == emotion])
        number, emotion, clear = self.rows[index]
        background = rng.choice(list(BACKGROUNDS))
        face = Face(
            style=self.style,
            identity=number,
            emotion=emotion,
            clear=clear,
            background=background,
            attributes=style_attributes(self.style, number) | {"background": background},
        )
        return face, (self.drawn[index],)


_MAIN = combinations(AVATAAARS)


def load_bank(split: str, cache: Path, count: int | None = None, size: int = LAYER_SIZE) -> Bank:
    """Return the main style's layers for a split, from the cache folder or newly drawn."""
    numbers = identity_numbers(split, count)
    path = cache / f"avataaars-{split}-{len(numbers)}-{size}.pt"
    if not path.exists():
        pairs = [draw_identity(identity(number), size) for number in numbers]
        cache.mkdir(parents=True, exist_ok=True)
        torch.save({"below": torch.stack([p[0] for p in pairs]), "above": torch.stack([p[1] for p in pairs])}, path)
    layers = torch.load(path, weights_only=True)
    return Bank(numbers, layers["below"], layers["above"])


def load_style_bank(name: str, split: str, cache: Path, per_emotion: int = 3, size: int = LAYER_SIZE) -> StyleBank:
    """Return faces of another style: every identity of the split with `per_emotion` combinations per emotion."""
    path = cache / f"{name}-{split}-{per_emotion}-{size}.pt"
    if not path.exists():
        rng = random.Random(f"bank {name} {split}")
        style, rows, drawn = STYLES[name], [], []
        for number in style_identities(name, split):
            for emotion, (clear, subtle) in combinations(style).items():
                for turn in range(per_emotion):
                    combination = rng.choice((clear, subtle)[turn % 2])
                    rows.append((number, emotion, combination.clear))
                    drawn.append(draw_style_face(style, number, combination, size))
        cache.mkdir(parents=True, exist_ok=True)
        torch.save({"rows": rows, "drawn": torch.stack(drawn)}, path)
    stored = torch.load(path, weights_only=True)
    return StyleBank(name, [tuple(row) for row in stored["rows"]], stored["drawn"])


def compose(
    faces: list[tuple[Face, _OVER]], generator: torch.Generator | None = None, size: int = PICTURE_SIZE
) -> Float[Tensor, "batch 3 height width"]:
    """Return images in [0, 1]: layers over the background, augmented if a generator is given, else the plain middle."""
    background = torch.tensor([BACKGROUNDS[face.background] for face, _ in faces], dtype=torch.float32)
    side = faces[0][1][0].shape[0]
    canvas = background[:, None, None, :].expand(len(faces), side, side, 3).clone()
    for depth in range(max(len(layers) for _, layers in faces)):
        rows = [i for i, (_, layers) in enumerate(faces) if depth < len(layers)]
        layer = torch.stack([faces[i][1][depth] for i in rows]).float()
        alpha = layer[..., 3:] / 255
        under = canvas if len(rows) == len(faces) else canvas[rows]
        over = torch.lerp(under, layer[..., :3], alpha)
        if len(rows) == len(faces):
            canvas = over
        else:
            canvas[rows] = over
    pictures = canvas.permute(0, 3, 1, 2) / 255
    margin = (side - size) // 2
    if generator is None:
        return pictures[:, :, margin : margin + size, margin : margin + size].contiguous()
    return augment(pictures, size, generator)


def augment(
    pictures: Float[Tensor, "batch 3 side side"], size: int, generator: torch.Generator
) -> Float[Tensor, "batch 3 size size"]:
    """Shift, mirror and vary the brightness; half of the images are also rotated and scaled, which blurs them."""
    batch, side = len(pictures), pictures.shape[-1]
    spare = side - size

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) * (high - low) + low

    out = torch.empty(batch, 3, size, size)
    corners: Int[Tensor, "batch 2"] = torch.randint(0, spare + 1, (batch, 2), generator=generator)
    for i, (top, left) in enumerate(corners.tolist()):
        out[i] = pictures[i, :, top : top + size, left : left + size]
    turned = torch.rand(batch, generator=generator) < 0.5
    count = int(turned.sum())
    if count:
        angle, scale = uniform(-0.14, 0.14, count), uniform(0.84, 1.04, count)
        cos, sin = angle.cos() * scale, angle.sin() * scale
        shift = uniform(-0.05, 0.05, count, 2)
        theta = torch.stack(
            [torch.stack([cos, -sin, shift[:, 0]], -1), torch.stack([sin, cos, shift[:, 1]], -1)], dim=1
        )
        grid = F.affine_grid(theta, [count, 3, size, size], align_corners=False)
        out[turned] = F.grid_sample(pictures[turned], grid, padding_mode="border", align_corners=False)
    mirrored = torch.rand(batch, generator=generator) < 0.5
    out[mirrored] = out[mirrored].flip(-1)
    factor, offset = uniform(0.85, 1.15, batch, 1, 1, 1), uniform(-0.05, 0.05, batch, 1, 1, 1)
    return (out * factor + offset).clamp(0, 1)


def recolour(
    pictures: Float[Tensor, "batch 3 height width"], share: float, generator: torch.Generator
) -> tuple[Float[Tensor, "batch 3 height width"], Bool[Tensor, " batch"]]:
    """Give about a share of the images swapped channels, paler colours and another contrast; return them and which.

    Shapes stay the same, so the emotion is still visible; the colours of hair and background lose their names."""
    batch = len(pictures)
    changed = torch.rand(batch, generator=generator) < share
    order = torch.rand(batch, 3, generator=generator).argsort(1)
    pale, contrast = torch.rand(batch, 1, 1, 1, generator=generator), torch.rand(batch, 1, 1, 1, generator=generator)
    swapped = pictures.gather(1, order[:, :, None, None].expand_as(pictures))
    swapped = torch.lerp(swapped, swapped.mean(1, keepdim=True).expand_as(swapped), pale)
    middle = swapped.mean((1, 2, 3), keepdim=True)
    swapped = (middle + (swapped - middle) * (0.6 + 0.7 * contrast)).clamp(0, 1)
    return torch.where(changed[:, None, None, None], swapped, pictures), changed
