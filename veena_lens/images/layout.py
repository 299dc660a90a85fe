"""The table of image layouts, and what is asked of them; runs of image tokens that read each other.

A new kind of layout is a module that answers `ImageLayout` (`images/base.py`) and a row of `LAYOUTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from veena_lens.config import HookedVLMConfig
from veena_lens.images.anyres import AnyresLayout
from veena_lens.images.base import ArrangedBatch, ArrangedImage, ImageLayout, Size, count_image_tokens
from veena_lens.images.dynamic import DynamicLayout
from veena_lens.images.fixed import FixedLayout
from veena_lens.images.tiles import TilesLayout
from veena_lens.inputs import MultimodalInputs, is_any_of

LAYOUTS: dict[str, Callable[[HookedVLMConfig], ImageLayout]] = {
    "fixed": FixedLayout,
    "anyres": AnyresLayout,
    "dynamic": DynamicLayout,
    "tiles": TilesLayout,
}


def layout_of(cfg: HookedVLMConfig) -> ImageLayout:
    """Return the image layout of a model.

    Raises:
        ValueError: `cfg.image_layout` is unknown, or the configuration lacks what the layout needs.
    """
    if cfg.image_layout not in LAYOUTS:
        raise ValueError(f"image_layout={cfg.image_layout!r} is unknown; known: {', '.join(LAYOUTS)}.")
    return LAYOUTS[cfg.image_layout](cfg)


def arrange_images(
    cfg: HookedVLMConfig,
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"],
    pixel_values: Any,
    extras: Mapping[str, Any],
) -> ArrangedBatch:
    """Find out which crops and tokens make up each image of a batch.

    Args:
        cfg: the model's configuration.
        tokens: ids with every image expanded to its tokens.
        mask: True at real tokens.
        pixel_values: the processor's; None without images.
        extras: the processor's further tensors by name.

    Raises:
        ValueError: images and tokens do not fit, or a crop has a size that the tower does not take.
    """
    layout = layout_of(cfg)
    if pixel_values is None and all(extras.get(key) is None for key in layout.image_keys):
        n = sum(count_image_tokens(cfg, tokens, mask))
        if n:
            ids = ", ".join(map(str, cfg.image_token_ids))
            raise ValueError(f"The prompt holds {n} image tokens (id {ids}) but no image was given.")
        return ArrangedBatch(images=((),) * len(tokens))
    return layout.arrange(tokens, mask, pixel_values, extras)


def pack_features(
    cfg: HookedVLMConfig,
    features: Float[Tensor, "crop pos d_model"],
    inputs: MultimodalInputs,
    newline: Float[Tensor, " d_model"] | None,
) -> Float[Tensor, "n_image_tokens d_model"]:
    """Put the connector's output into the order of the image tokens.

    Args:
        cfg: the model's configuration.
        features: one entry per crop of the inputs.
        inputs: what the model runs on.
        newline: the vector that ends a row of image tokens; None where the model has none.
    """
    return layout_of(cfg).pack(features, [image for row in inputs.layouts for image in row], newline)


def pixel_boxes(
    inputs: MultimodalInputs, sizes: Sequence[Sequence[Size]], image_processor: Any
) -> tuple[tuple[Float[Tensor, "n_tokens 4"], ...], ...]:
    """Return, per row and image, the box of each image token in pixels of the original image.

    Args:
        inputs: what the processor's output was arranged to.
        sizes: per row, (height, width) of each original image.
        image_processor: the Hugging Face image processor.
    """
    return tuple(
        tuple(
            arranged_image(inputs, row, image).boxes(size, image_processor)
            for image, (_, size) in enumerate(zip(images, given, strict=True))
        )
        for row, (images, given) in enumerate(zip(inputs.layouts, sizes, strict=True))
    )


def arranged_image(inputs: MultimodalInputs, row: int, image: int) -> ArrangedImage:
    """Return the record of one image of a row.

    Raises:
        ValueError: the inputs were read from a file, which does not hold all that a layout knows.
    """
    found = inputs.layouts[row][image]
    if not isinstance(found, ArrangedImage):
        raise ValueError("These inputs were read from a file, without their images; prepare them again.")
    return found


def require_own_images(cfg: HookedVLMConfig, inputs: MultimodalInputs) -> None:
    """Check that the images of inputs were prepared for this model.

    Raises:
        ValueError: they were prepared for a model of another tower or layout.
    """
    if inputs.pixel_values is None or cfg.vision is None:
        return
    layout = layout_of(cfg)
    if not layout.fits(inputs):
        raise ValueError(
            f"The inputs were prepared for another model: their images are {list(inputs.pixel_values.shape)}, this "
            f"model takes {layout.expects()}. Prepare them with this model's own prepare or inputs_from_hf."
        )


# --- runs of image tokens that read each other in both directions (Gemma-3) --------------------------------
# Images that touch are one run, as in Hugging Face, which finds runs in the types of the tokens. In a causal decoder an
# edit at position p leaves everything before p unchanged; inside a run it reaches the run from its first token.
def image_runs(cfg: HookedVLMConfig, inputs: MultimodalInputs) -> Int[Tensor, "batch pos"] | None:
    """Return the number of each position's run in its row, -1 for text.

    None if the model reads images in one direction, or no row has an image.
    """
    return runs_of_images(inputs) if cfg.bidirectional_images and any(inputs.n_images) else None


def runs_of_images(inputs: MultimodalInputs) -> Int[Tensor, "batch pos"]:
    """Return the number of each run of image tokens in its row, -1 for text.

    A hole in the attention mask does not split a run.
    """
    inside = torch.zeros_like(inputs.attention_mask)
    for row, spans in enumerate(inputs.spans):
        for span in spans.images:
            inside[row, span] = is_any_of(inputs.tokens[row, span], inputs.image_token_ids)
    begins = inside & ~F.pad(inside, (1, 0))[:, :-1]
    return torch.where(inside, begins.long().cumsum(-1) - 1, -1)


def reached_from(cfg: HookedVLMConfig, inputs: MultimodalInputs) -> Int[Tensor, " pos"]:
    """Return, for every position of a single row, the first one that an edit there reaches: itself, or the first of
    its run of image tokens."""
    places = torch.arange(inputs.shape[1])
    runs = image_runs(cfg, inputs)
    if runs is None:
        return places
    mine = runs[0].cpu()
    begins = (mine >= 0) & (mine != F.pad(mine, (1, 0), value=-1)[:-1])
    return torch.where(mine >= 0, torch.where(begins, places, 0).cummax(0).values, places)
