"""Features of pictures in the order of the image tokens that they fill: one function a layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from veena_lens.config import HookedVLMConfig, ImageLayout
from veena_lens.inputs import MultimodalInputs
from veena_lens.vision.anyres import AnyresLayout, anyres_layout, pack
from veena_lens.vision.tiles import reading_order

Packer = Callable[[HookedVLMConfig, Tensor, MultimodalInputs, Tensor | None], Tensor]


def pack_features(
    cfg: HookedVLMConfig,
    features: Float[Tensor, "picture pos d_model"],
    inputs: MultimodalInputs,
    newline: Float[Tensor, " d_model"] | None,
) -> Float[Tensor, "n_image_tokens d_model"]:
    """What the connector gives, as the text reads it; `newline` is the vector that ends a row of tiles."""
    return PACKERS[cfg.image_layout](cfg, features, inputs, newline)


def layout_of(cfg: HookedVLMConfig, size: Sequence[int]) -> AnyresLayout:
    """The any-resolution layout of a picture of (height, width) pixels."""
    assert cfg.vision is not None
    height, width = (int(s) for s in size)
    return anyres_layout((height, width), cfg.image_pinpoints, cfg.vision.image_size, cfg.vision.patch_size)


def _fixed(cfg: HookedVLMConfig, features: Tensor, inputs: MultimodalInputs, newline: Tensor | None) -> Tensor:
    return features.flatten(0, 1)


def _anyres(cfg: HookedVLMConfig, features: Tensor, inputs: MultimodalInputs, newline: Tensor | None) -> Tensor:
    assert newline is not None
    layouts = [layout_of(cfg, size) for size in inputs.extras["image_sizes"].tolist()]
    tiles = features.split([layout.n_tiles for layout in layouts])
    return torch.cat([pack(t, layout, newline) for t, layout in zip(tiles, layouts, strict=True)])


def _dynamic(cfg: HookedVLMConfig, features: Tensor, inputs: MultimodalInputs, newline: Tensor | None) -> Tensor:
    """Pictures are padded to the longest of the batch."""
    sizes = [h * w for row in inputs.grids for h, w in row]
    return torch.cat([x[:n] for x, n in zip(features, sizes, strict=True)])


def _tiles(cfg: HookedVLMConfig, features: Tensor, inputs: MultimodalInputs, newline: Tensor | None) -> Tensor:
    """The whole view of every image goes behind its tiles."""
    return features[reading_order(inputs.extras["tile_grids"]).to(features.device)].flatten(0, 1)


PACKERS: dict[ImageLayout, Packer] = {"fixed": _fixed, "anyres": _anyres, "dynamic": _dynamic, "tiles": _tiles}
