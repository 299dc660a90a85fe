"""Features of pictures in the order of the image tokens that they fill: one function a layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from veena_lens.config import HookedVLMConfig, ImageLayout
from veena_lens.images.anyres import AnyresLayout, anyres_layout, pack
from veena_lens.images.fixed import SingleLayout, frame, image_among_several, pack_single
from veena_lens.images.tiles import TileLayout, reading_order
from veena_lens.inputs import MultimodalInputs

# How an image of a model of tiles is seen (`extras["image_kinds"]`; without it all are cut into tiles).
TILED, AMONG_SEVERAL, FRAME, LAST_FRAME = range(4)
Arrangement = AnyresLayout | SingleLayout
Packer = Callable[[HookedVLMConfig, Tensor, MultimodalInputs, Tensor | None], Tensor]


def pack_features(
    cfg: HookedVLMConfig,
    features: Float[Tensor, "crop pos d_model"],
    inputs: MultimodalInputs,
    newline: Float[Tensor, " d_model"] | None,
) -> Float[Tensor, "n_image_tokens d_model"]:
    """What the connector gives, as the text reads it; `newline` is the vector that ends a row of tiles."""
    return PACKERS[cfg.image_layout](cfg, features, inputs, newline)


def layout_of(cfg: HookedVLMConfig, size: Sequence[int], kind: int = TILED) -> Arrangement:
    """The layout of a picture of (height, width) pixels in a model of tiles; `kind` is one of those above."""
    assert cfg.vision is not None
    height, width = (int(s) for s in size)
    if kind == TILED:
        return anyres_layout(
            (height, width), cfg.image_pinpoints, cfg.vision.image_size, cfg.vision.patch_size, cfg.max_tiles
        )
    base = cfg.vision.grid[0]
    if kind == AMONG_SEVERAL:
        return image_among_several((height, width), base)
    return frame((height, width), base, is_last=kind == LAST_FRAME)


def layouts_of(cfg: HookedVLMConfig, inputs: MultimodalInputs) -> list[Arrangement]:
    """The layout of every image of a batch, row after row, in a model of tiles."""
    if "image_sizes" not in inputs.extras:
        return []
    sizes = inputs.extras["image_sizes"].tolist()
    kinds = inputs.extras["image_kinds"].tolist() if "image_kinds" in inputs.extras else [TILED] * len(sizes)
    return [layout_of(cfg, size, kind) for size, kind in zip(sizes, kinds, strict=True)]


def tile_layouts(cfg: HookedVLMConfig, inputs: MultimodalInputs) -> list[TileLayout]:
    """The layout of every image of a batch, row after row, where tiles lie apart in the text."""
    if "tile_grids" not in inputs.extras:
        return []
    assert cfg.vision is not None
    side = cfg.vision.token_grid[0]
    return [TileLayout(tiles=(rows, columns), side=side) for rows, columns in inputs.extras["tile_grids"].tolist()]


def _fixed(cfg: HookedVLMConfig, features: Tensor, inputs: MultimodalInputs, newline: Tensor | None) -> Tensor:
    return features.flatten(0, 1)


def _anyres(cfg: HookedVLMConfig, features: Tensor, inputs: MultimodalInputs, newline: Tensor | None) -> Tensor:
    assert newline is not None
    layouts = layouts_of(cfg, inputs)
    tiles = features.split([layout.n_tiles for layout in layouts])
    return torch.cat([_packed(t, layout, newline) for t, layout in zip(tiles, layouts, strict=True)])


def _packed(tiles: Tensor, layout: Arrangement, newline: Tensor) -> Tensor:
    if isinstance(layout, SingleLayout):
        return pack_single(tiles, layout, newline)
    return pack(tiles, layout, newline)


def _dynamic(cfg: HookedVLMConfig, features: Tensor, inputs: MultimodalInputs, newline: Tensor | None) -> Tensor:
    """Pictures are padded to the longest of the batch."""
    sizes = [h * w for row in inputs.grids for h, w in row]
    return torch.cat([x[:n] for x, n in zip(features, sizes, strict=True)])


def _tiles(cfg: HookedVLMConfig, features: Tensor, inputs: MultimodalInputs, newline: Tensor | None) -> Tensor:
    """The whole view of every image goes behind its tiles."""
    return features[reading_order(inputs.extras["tile_grids"]).to(features.device)].flatten(0, 1)


PACKERS: dict[ImageLayout, Packer] = {"fixed": _fixed, "anyres": _anyres, "dynamic": _dynamic, "tiles": _tiles}
