"""How pictures fill image tokens: a fixed number each, tiles packed together or apart, or patches of any size.

Given a processor's pixel tensors and the token counts of each row, says which row owns which picture, how many
tokens each image fills, and which of them are the cells of its grid.

Blocks of image tokens that read each other in both directions (Gemma-3), and how far back an edit reaches there.

A block is a run of image tokens; pictures that touch are one block, as in Hugging Face, which finds runs in the types
of the tokens. In a causal decoder an edit at position p leaves everything before p as it was; inside a block it reaches
the block from its first token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from veena_lens.config import HookedVLMConfig, ImageLayout
from veena_lens.images.anyres_tiles import rows_of_tiles
from veena_lens.images.dynamic import Source, match_tokens, multimodal_positions
from veena_lens.images.tiles import TileLayout, in_tower_order, tile_grids, tiles_of
from veena_lens.inputs import MultimodalInputs, is_any_of


def image_runs(cfg: HookedVLMConfig, inputs: MultimodalInputs) -> Int[Tensor, "batch pos"] | None:
    """The number of each position's block in its row, -1 for text; None where the model has no blocks, or no row a
    picture."""
    return runs_of_images(inputs) if cfg.bidirectional_images and any(inputs.n_images) else None


def runs_of_images(inputs: MultimodalInputs) -> Int[Tensor, "batch pos"]:
    """The number of each run of image tokens in its row, -1 for text. A hole in the attention mask leaves it whole."""
    inside = torch.zeros_like(inputs.attention_mask)
    for row, spans in enumerate(inputs.spans):
        for span in spans.images:
            inside[row, span] = is_any_of(inputs.tokens[row, span], inputs.image_token_ids)
    begins = inside & ~F.pad(inside, (1, 0))[:, :-1]
    return torch.where(inside, begins.long().cumsum(-1) - 1, -1)


def reached_from(cfg: HookedVLMConfig, inputs: MultimodalInputs) -> Int[Tensor, " pos"]:
    """For every position of a single row the first one that an edit there reaches: itself, or its block's first."""
    places = torch.arange(inputs.shape[1])
    blocks = image_runs(cfg, inputs)
    if blocks is None:
        return places
    mine = blocks[0].cpu()
    begins = (mine >= 0) & (mine != F.pad(mine, (1, 0), value=-1)[:-1])
    return torch.where(mine >= 0, torch.where(begins, places, 0).cummax(0).values, places)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """The images of a batch. `lengths`, `grids` and `places` have one entry a row and, in it, one an image.

    Pictures of any size bring `crop_grids` and the `positions` of all tokens in three streams."""

    pixels: Tensor | None
    crop_rows: Tensor | None
    image_rows: Tensor | None
    lengths: list[list[int]]
    grids: tuple[tuple[tuple[int, int], ...], ...]
    places: tuple[tuple[tuple[int, ...], ...], ...]
    extras: dict[str, Tensor] = field(default_factory=dict)
    tiles: tuple[tuple[tuple[int, ...], ...], ...] = ()
    crop_images: Tensor | None = None
    crop_grids: Tensor | None = None
    patch_mask: Tensor | None = None
    positions: Tensor | None = None


def arrange_images(
    cfg: HookedVLMConfig, tokens: Tensor, mask: Tensor, pixel_values: Any, extras: Mapping[str, Any]
) -> ImageSet:
    """The images of a batch of tokens [batch pos].

    Raises: ValueError when pictures and tokens do not fit, or a picture has a size that the tower does not take."""
    counts = _image_tokens(cfg, tokens, mask)
    given = [extras.get(key) for key in ("image_grid_thw", "pixel_values_videos", "video_grid_thw")]
    if pixel_values is None and all(x is None for x in given):
        if sum(counts):
            ids = ", ".join(map(str, cfg.image_token_ids))
            raise ValueError(f"The prompt holds {sum(counts)} image tokens (id {ids}) but no picture was given.")
        return _no_images(len(counts))
    return ARRANGERS[cfg.image_layout](cfg, tokens, mask, pixel_values, extras)


def _no_images(n_rows: int) -> ImageSet:
    none: tuple[tuple[Any, ...], ...] = ((),) * n_rows
    return ImageSet(None, None, None, [[] for _ in none], none, none)


def _fixed(
    cfg: HookedVLMConfig, tokens: Tensor, mask: Tensor, pixel_values: Any, extras: Mapping[str, Any]
) -> ImageSet:
    assert cfg.vision is not None
    pixels = torch.as_tensor(pixel_values)
    n_images, counts = _require_pixels(cfg, pixels), _image_tokens(cfg, tokens, mask)
    n_tokens, (height, width) = cfg.vision.n_features, cfg.vision.token_grid
    owners = _owners(n_tokens, n_images, counts)
    first = n_tokens - height * width  # a class token stands first; a strategy that drops a patch leaves no whole grid
    places = tuple(range(first, n_tokens)) if first >= 0 else ()
    numbers = [owners.count(row) for row in range(len(counts))]
    return ImageSet(
        pixels,
        torch.tensor(owners, dtype=torch.long),
        torch.tensor(owners, dtype=torch.long),
        [[n_tokens] * n for n in numbers],
        tuple(((height, width),) * n for n in numbers),
        tuple((places,) * n for n in numbers),
        crop_images=torch.tensor([i for n in numbers for i in range(n)]),
    )


def _anyres(
    cfg: HookedVLMConfig, tokens: Tensor, mask: Tensor, pixel_values: Any, extras: Mapping[str, Any]
) -> ImageSet:
    """Images cut into tiles or seen as one, and frames of videos, in the order in which the text reads them."""
    rows = rows_of_tiles(cfg, tokens, mask, pixel_values, extras)
    images = [(row, image) for row, mine in enumerate(rows) for image in mine]
    pixels = torch.cat([image.pixels for _, image in images])
    _require_pixels(cfg, pixels)
    return ImageSet(
        pixels,
        torch.tensor([row for row, image in images for _ in image.pixels]),
        torch.tensor([row for row, _ in images]),
        [[image.layout.n_tokens for image in row] for row in rows],
        tuple(tuple((image.layout.rows, image.layout.cols) for image in row) for row in rows),
        tuple(tuple(tuple(image.layout.grid_places()) for image in row) for row in rows),
        {
            "image_sizes": torch.tensor([image.layout.picture for _, image in images]),
            "image_kinds": torch.tensor([image.kind for _, image in images]),
        },
        tuple(tuple(tuple(image.layout.token_tiles()) for image in row) for row in rows),
        torch.tensor([i for row in rows for i, image in enumerate(row) for _ in image.pixels]),
    )


def _of_any_size(
    cfg: HookedVLMConfig, tokens: Tensor, mask: Tensor, pixel_values: Any, extras: Mapping[str, Any]
) -> ImageSet:
    assert cfg.vision is not None
    merge = cfg.vision.merge_size
    sources = [
        Source("image", cfg.image_token_id, pixel_values, extras.get("image_grid_thw"), False),
        Source(
            "video",
            cfg.video_token_id,
            extras.get("pixel_values_videos"),
            extras.get("video_grid_thw"),
            cfg.frames_as_images,
            _steps(cfg, extras),
        ),
    ]
    found = match_tokens(cfg.vision, tokens, mask, sources)
    frames = [frame for row in found.frames for frame in row]
    owners = torch.tensor([i for i, row in enumerate(found.frames) for _ in row], dtype=torch.long)
    return ImageSet(
        pad_sequence([frame.patches for frame in frames], batch_first=True),
        owners,
        owners,
        [[frame.grid[0] * frame.grid[1] // merge**2 for frame in row] for row in found.frames],
        tuple(tuple((frame.grid[0] // merge, frame.grid[1] // merge) for frame in row) for row in found.frames),
        (),
        crop_images=torch.tensor([i for row in found.frames for i in range(len(row))]),
        crop_grids=torch.tensor([frame.grid for frame in frames]),
        positions=multimodal_positions(mask, found.groups),
    )


def _in_tiles(
    cfg: HookedVLMConfig, tokens: Tensor, mask: Tensor, pixel_values: Any, extras: Mapping[str, Any]
) -> ImageSet:
    assert cfg.vision is not None and cfg.image_token_id is not None
    pixels, real = tiles_of(cfg.vision, pixel_values, extras)
    size = cfg.vision.n_features
    grids = [tile_grids(row[keep].tolist(), cfg.image_token_id, size) for row, keep in zip(tokens, mask, strict=True)]
    flat = torch.tensor([grid for row in grids for grid in row], dtype=torch.long).reshape(-1, 2)
    pixels, real = in_tower_order(pixels, real, flat)
    rows = [[TileLayout(tiles=grid, side=cfg.vision.token_grid[0]) for grid in row] for row in grids]
    if not len(flat):  # padding and nothing else
        return _no_images(len(rows))
    owned = [(i, image) for i, row in enumerate(rows) for image, x in enumerate(row) for _ in range(x.n_tiles)]
    return ImageSet(
        pixels,
        torch.tensor([row for row, _ in owned]),
        torch.tensor([i for i, row in enumerate(rows) for _ in row]),
        [[x.n_tokens for x in row] for row in rows],
        tuple(tuple(x.grid for x in row) for row in rows),
        tuple(tuple(tuple(x.grid_places()) for x in row) for row in rows),
        {"tile_grids": flat},
        tuple(tuple(tuple(x.token_tiles()) for x in row) for row in rows),
        torch.tensor([image for _, image in owned]),
        patch_mask=real,
    )


ARRANGERS: dict[ImageLayout, Callable[..., ImageSet]] = {
    "fixed": _fixed,
    "anyres": _anyres,
    "dynamic": _of_any_size,
    "tiles": _in_tiles,
}


def _image_tokens(cfg: HookedVLMConfig, tokens: Tensor, mask: Tensor) -> list[int]:
    """How many image tokens each row holds."""
    return (is_any_of(tokens, cfg.image_token_ids) & mask).sum(-1).tolist()


def _steps(cfg: HookedVLMConfig, extras: Mapping[str, Any]) -> list[Any] | None:
    """Positions in time from one picture of each video to its next; None where pictures are counted.

    Without `second_per_grid_ts` every picture stands for a second, as Hugging Face takes it.
    Raises: ValueError for times that are no positive numbers."""
    if cfg.positions_per_second is None or extras.get("video_grid_thw") is None:
        return None
    seconds = extras.get("second_per_grid_ts")
    if seconds is None:
        return [cfg.positions_per_second] * len(extras["video_grid_thw"])
    times = torch.as_tensor(seconds)
    if times.ndim != 1 or not bool((times.isfinite() & (times > 0)).all()):
        raise ValueError(
            f"second_per_grid_ts={times.tolist()} must hold the seconds that one picture of each video stands for "
            "(temporal_patch_size / frames a second), all positive."
        )
    return [cfg.positions_per_second * s for s in seconds]


def _owners(each: int, n_images: int, counts: Sequence[int]) -> list[int]:
    """The row of each of `n_images`, in reading order. Raises: ValueError when they do not fill the rows exactly."""
    owners = [row for row, count in enumerate(counts) for _ in range(count // each)] if each else []
    if len(owners) != n_images or sum(counts) != each * n_images or any(count % each for count in counts if each):
        raise ValueError(
            f"Rows hold {list(counts)} image tokens; a picture of this model fills {each}, and {n_images} pictures "
            "were given. Use the checkpoint's own processor, one picture for each placeholder."
        )
    return owners


def _require_pixels(cfg: HookedVLMConfig, pixels: Tensor) -> int:
    """The number of pictures. Raises: ValueError for a size that the tower does not take."""
    assert cfg.vision is not None
    want = (cfg.vision.n_channels, cfg.vision.image_size, cfg.vision.image_size)
    if pixels.ndim != 4 or tuple(pixels.shape[1:]) != want or not pixels.is_floating_point():
        raise ValueError(
            f"pixel_values must be floats [pictures {want[0]} {want[1]} {want[2]}], not {pixels.dtype} "
            f"{list(pixels.shape)}; the checkpoint's own processor makes them so."
        )
    return len(pixels)
