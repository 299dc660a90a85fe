"""Images of one size: each is one crop and fills a fixed number of tokens (LLaVA-1.5, Gemma-3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from veena_lens.config import HookedVLMConfig, VisionConfig
from veena_lens.images.base import (
    ArrangedBatch,
    LayoutDefaults,
    Size,
    count_image_tokens,
    crop_shape,
    has_crops,
    require_pixels,
)
from veena_lens.inputs import MultimodalInputs


@dataclass(frozen=True, eq=False)
class FixedImage:
    """An image that is resized to the tower's square."""

    vision: VisionConfig

    @property
    def n_crops(self) -> int:
        return 1

    @property
    def n_tokens(self) -> int:
        return self.vision.n_features

    @property
    def grid(self) -> Size:
        """Return (height, width) in tokens."""
        return self.vision.token_grid

    @property
    def patch_grid(self) -> None:
        return None

    def grid_places(self) -> tuple[int, ...]:
        """Return the offsets of the grid's cells among the image's tokens: all but a class token, which comes first.

        Empty if a feature strategy drops a patch, which leaves no whole grid.
        """
        height, width = self.grid
        first = self.n_tokens - height * width
        return tuple(range(first, self.n_tokens)) if first >= 0 else ()

    def token_crops(self) -> None:
        return None

    def crop_starts(self) -> tuple[int, ...]:
        return (0,)

    def patch_cells(self) -> Int[Tensor, "crop patch"]:
        """Return the cell of each patch: squares of `merge_size` patches per side make one token."""
        rows, columns = (torch.arange(side) // self.vision.merge_size for side in self.vision.grid)
        return (rows[:, None] * self.grid[1] + columns).flatten()[None]

    def boxes(self, size: Size, image_processor: Any) -> Float[Tensor, "n_tokens 4"]:
        """Return the pixel box of each token; a class token looks at the whole image."""
        height, width = size
        side = self.vision.patch_size * self.vision.merge_size
        boxes = patch_boxes((width, height), image_processor, side, self.grid)
        if self.vision.has_class_token:
            boxes = torch.cat([torch.tensor([[0.0, 0.0, float(width), float(height)]]), boxes])
        return boxes[len(boxes) - self.n_tokens :]


@dataclass(frozen=True, eq=False)
class FixedLayout(LayoutDefaults):
    """Every image is one crop of one size and fills as many tokens as any other."""

    cfg: HookedVLMConfig

    def arrange(
        self,
        tokens: Int[Tensor, "batch pos"],
        mask: Bool[Tensor, "batch pos"],
        pixel_values: Any,
        extras: Mapping[str, Any],
    ) -> ArrangedBatch:
        """Share the images out among the rows by their numbers of image tokens."""
        pixels = torch.as_tensor(pixel_values)
        n_images, image = require_pixels(self.vision, pixels), FixedImage(self.vision)
        numbers = _images_per_row(image.n_tokens, n_images, count_image_tokens(self.cfg, tokens, mask))
        return ArrangedBatch(pixels=pixels, images=tuple((image,) * n for n in numbers))

    def pack(
        self,
        features: Float[Tensor, "crop pos d_model"],
        images: Sequence[FixedImage],
        newline: Float[Tensor, " d_model"] | None,
    ) -> Float[Tensor, "n_image_tokens d_model"]:
        return features.flatten(0, 1)

    def expects(self) -> str:
        return f"[crops {' '.join(map(str, crop_shape(self.vision)))}]"

    def fits(self, inputs: MultimodalInputs) -> bool:
        return has_crops(inputs, FixedImage, crop_shape(self.vision))

    def as_hf(self, inputs: MultimodalInputs, pixels: Float[Tensor, "crop ..."]) -> dict[str, Tensor]:
        return {"pixel_values": pixels}

    def draw(self, counts: Sequence[int], generator: torch.Generator) -> tuple[dict[str, Tensor], list[int]]:
        n = sum(counts)
        pixels = torch.randn(n, *crop_shape(self.vision), generator=generator)
        return {"pixel_values": pixels}, [self.vision.n_features] * n


def _images_per_row(n_tokens: int, n_images: int, counts: Sequence[int]) -> list[int]:
    """Return how many images each row has.

    Raises:
        ValueError: the images do not fill the image tokens exactly.
    """
    numbers = [count // n_tokens if n_tokens else 0 for count in counts]
    if sum(numbers) != n_images or sum(counts) != n_tokens * n_images or any(n % n_tokens for n in counts if n_tokens):
        raise ValueError(
            f"Rows hold {list(counts)} image tokens; an image of this model fills {n_tokens}, and {n_images} images "
            "were given. Use the checkpoint's own processor, one image for each placeholder."
        )
    return numbers


# --- what an image processor did to the pixels -------------------------------------------------------------
def patch_boxes(
    size: tuple[int, int], image_processor: Any, patch_size: int, grid: Size
) -> Float[Tensor, "n_tokens 4"]:
    """Return (left, top, right, bottom) of each cell of a fixed grid in pixels of the original image.

    The boxes undo what the image processor did: padding to a square, resizing, centre crop. Parts of a cell that lie
    in padding are cut off.

    Args:
        size: (width, height) of the original image.
        image_processor: the Hugging Face image processor.
        patch_size: side of a cell in pixels of the processed image.
        grid: (height, width) in cells.
    """
    width, height = size
    scale_x = scale_y = 1.0
    off_x = off_y = 0.0
    if getattr(image_processor, "do_pad", False) and type(image_processor).__name__.startswith("Llava"):
        side = max(width, height)
        off_x, off_y = (side - width) // 2, (side - height) // 2
        padded = (side, side)
    else:
        padded = (width, height)
    resized = padded
    if getattr(image_processor, "do_resize", False):
        resized = _resized(padded, image_processor.size)
        scale_x, scale_y = resized[0] / padded[0], resized[1] / padded[1]
    crop_x = crop_y = 0
    if getattr(image_processor, "do_center_crop", False):
        crop = pair_of(image_processor.crop_size)
        crop_x, crop_y = (resized[0] - crop[0]) // 2, (resized[1] - crop[1]) // 2
    rows, cols = grid
    step = patch_size
    out = torch.empty(rows * cols, 4)
    for i in range(rows * cols):
        y, x = divmod(i, cols)
        box = [x * step + crop_x, y * step + crop_y, (x + 1) * step + crop_x, (y + 1) * step + crop_y]
        left, right = (b / scale_x - off_x for b in (box[0], box[2]))
        top, bottom = (b / scale_y - off_y for b in (box[1], box[3]))
        out[i] = torch.tensor([left, top, right, bottom])
    limit = torch.tensor([width, height, width, height], dtype=out.dtype)
    return out.clamp(min=0).minimum(limit)


def _getter(size: Any) -> Any:
    """Return how to read an entry: sizes are dictionaries or objects, depending on the version of transformers."""
    return size.get if hasattr(size, "get") else lambda key: getattr(size, key, None)


def pair_of(size: Any) -> tuple[int, int]:
    """Return (width, height) of a size entry of an image processor."""
    get = _getter(size)
    if get("height") and get("width"):
        return int(get("width")), int(get("height"))
    side = get("shortest_edge")
    return int(side), int(side)


def _resized(size: tuple[int, int], target: Any) -> tuple[int, int]:
    """Return (width, height) after the processor's resize."""
    get = _getter(target)
    if get("height") and get("width"):
        return int(get("width")), int(get("height"))
    side = int(get("shortest_edge"))
    width, height = size
    if width <= height:
        return side, int(side * height / width)
    return int(side * width / height), side
