"""What an image layout answers, and the geometry that all of them share.

A layout is the way in which a model turns images into tokens. `ImageLayout` is one kind of it, bound to a model's
configuration; `ArrangedImage` is what it makes of one image. A kind is one module of this package and one row of the
table in `images/layout.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from veena_lens.config import HookedVLMConfig, VisionConfig
from veena_lens.inputs import ImageRecord, MultimodalInputs, is_any_of

Size: TypeAlias = tuple[int, int]  # (height, width)


@runtime_checkable
class ArrangedImage(ImageRecord, Protocol):
    """One image as a layout arranges it: what inputs keep of it, and what only its layout knows."""

    def crop_starts(self) -> Sequence[int]:
        """Return, for each crop, the offset of the first token that reads any of it; `n_tokens` if none does."""
        ...

    def patch_cells(self) -> Int[Tensor, "crop patch"]:
        """Return the cell of the token grid in which each patch of each crop lies, -1 outside the grid.

        Patches are counted in the order of the tower, without a class token.
        """
        ...

    def boxes(self, size: Size, image_processor: Any) -> Float[Tensor, "n_tokens 4"]:
        """Return (left, top, right, bottom) of each token in pixels of the original image; NaN for a newline.

        Args:
            size: (height, width) of the original image in pixels.
            image_processor: the Hugging Face image processor that resized, padded or cropped it.
        """
        ...


@dataclass(frozen=True, eq=False, kw_only=True)
class ArrangedBatch:
    """The images of a batch, as the tower and the text take them.

    pixels: what the tower reads, one entry per crop, row after row. images: per row, one record per image.
    patch_mask: False at the patches that a smaller crop does not have; None if all crops are whole. position_ids:
    positions of all tokens [3 batch pos], if the images decide about them.
    """

    images: tuple[tuple[ImageRecord, ...], ...]
    pixels: Float[Tensor, "crop ..."] | None = None
    patch_mask: Bool[Tensor, "crop patch"] | None = None
    position_ids: Int[Tensor, "3 batch pos"] | None = None


@runtime_checkable
class ImageLayout(Protocol):
    """One kind of image layout, bound to a model's configuration.

    has_newline: whether the model has a learned vector that ends a row of image tokens. reads_token_types: whether a
    processor's mm_token_type_ids must agree with the tokens.
    """

    has_newline: bool
    reads_token_types: bool

    @property
    def keys(self) -> tuple[str, ...]:
        """Return the names of the processor's tensors that `arrange` reads in addition to pixel_values."""
        ...

    @property
    def image_keys(self) -> tuple[str, ...]:
        """Return those of `keys` that mean, like pixel_values, that there are images."""
        ...

    def ask(self, images: list[Any]) -> Any:
        """Return the images of one prompt in the form in which its processor takes them."""
        ...

    def require_processor(self, processor: Any) -> None:
        """Check that a processor makes crops and tokens of the model's sizes.

        Raises:
            ValueError: the processor belongs to another checkpoint.
        """
        ...

    def arrange(
        self,
        tokens: Int[Tensor, "batch pos"],
        mask: Bool[Tensor, "batch pos"],
        pixel_values: Any,
        extras: Mapping[str, Any],
    ) -> ArrangedBatch:
        """Find out which crops and tokens make up each image of a batch.

        Args:
            tokens: ids with every image expanded to its tokens.
            mask: True at real tokens.
            pixel_values: the processor's, or None where one of `image_keys` stands for them.
            extras: the processor's further tensors by name.

        Raises:
            ValueError: pixels, sizes and tokens do not fit.
        """
        ...

    def pack(
        self,
        features: Float[Tensor, "crop pos d_model"],
        images: Sequence[Any],
        newline: Float[Tensor, " d_model"] | None,
    ) -> Float[Tensor, "n_image_tokens d_model"]:
        """Put the connector's output into the order of the image tokens.

        Args:
            features: one entry per crop, as `arrange` ordered them.
            images: the records of all images of the batch, row after row.
            newline: the vector that ends a row of image tokens, if the model has one.
        """
        ...

    def expects(self) -> str:
        """Describe the pixel values that the model takes, for a message."""
        ...

    def fits(self, inputs: MultimodalInputs) -> bool:
        """Return whether the images of inputs were prepared for this model."""
        ...

    def as_hf(self, inputs: MultimodalInputs, pixels: Float[Tensor, "crop ..."]) -> dict[str, Tensor]:
        """Return a processor's tensors for the images of inputs, to run Hugging Face's model on them.

        Args:
            inputs: inputs that this layout arranged.
            pixels: their pixel values, in any dtype.
        """
        ...

    def draw(self, counts: Sequence[int], generator: torch.Generator) -> tuple[dict[str, Tensor], list[int]]:
        """Draw noise in the form in which a processor gives images.

        Args:
            counts: the number of images per row.
            generator: source of the noise.

        Returns:
            The processor's tensors, and the number of tokens that each image fills.
        """
        ...


class LayoutDefaults:
    """What most layouts answer alike: no newline, no tensors beside the pixels, images as they come."""

    cfg: HookedVLMConfig
    has_newline = False
    reads_token_types = False

    @property
    def vision(self) -> VisionConfig:
        """Return the configuration of the vision tower."""
        assert self.cfg.vision is not None
        return self.cfg.vision

    @property
    def keys(self) -> tuple[str, ...]:
        """Return the names of `image_keys`; no other tensor is read."""
        return self.image_keys

    @property
    def image_keys(self) -> tuple[str, ...]:
        """Return no names: pixel_values alone mean that there are images."""
        return ()

    def ask(self, images: list[Any]) -> list[Any]:
        """Return the images as a flat list."""
        return images

    def require_processor(self, processor: Any) -> None:
        """Accept every processor: what it makes is checked by `arrange`."""


def cell_boxes(size: tuple[int, int], grid: Size) -> Float[Tensor, "cell 4"]:
    """Return (left, top, right, bottom) of the cells of a grid that covers a whole image, row by row.

    Args:
        size: (width, height) of the image.
        grid: (height, width) of the grid in cells.
    """
    (width, height), (rows, cols) = size, grid
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    y, x = y.flatten().float(), x.flatten().float()
    step_y, step_x = height / max(rows, 1), width / max(cols, 1)
    return torch.stack([x * step_x, y * step_y, (x + 1) * step_x, (y + 1) * step_y], -1)


def count_image_tokens(
    cfg: HookedVLMConfig, tokens: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"]
) -> list[int]:
    """Return the number of image tokens in each row."""
    return (is_any_of(tokens, cfg.image_token_ids) & mask).sum(-1).tolist()


def crop_shape(vision: VisionConfig) -> tuple[int, int, int]:
    """Return (channels, height, width) of a crop, for towers whose crops all have one size."""
    return vision.n_channels, vision.image_size, vision.image_size


def require_pixels(vision: VisionConfig, pixels: Tensor) -> int:
    """Check that pixels are crops of the tower's size, and return their number.

    Raises:
        ValueError: they have another shape, or are not floats.
    """
    want = crop_shape(vision)
    if pixels.ndim != 4 or tuple(pixels.shape[1:]) != want or not pixels.is_floating_point():
        raise ValueError(
            f"pixel_values must be floats [crops {want[0]} {want[1]} {want[2]}], not {pixels.dtype} "
            f"{list(pixels.shape)}; the checkpoint's own processor makes them so."
        )
    return len(pixels)


def has_crops(inputs: MultimodalInputs, kind: type | tuple[type, ...], shape: tuple[int, ...]) -> bool:
    """Return whether the crops of inputs have a shape, and their images records of a layout's own kind."""
    assert inputs.pixel_values is not None
    own = all(isinstance(image, kind) for row in inputs.layouts for image in row)
    return own and tuple(inputs.pixel_values.shape[1:]) == shape
