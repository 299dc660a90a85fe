"""Which places of pictures correspond in two runs, and the rows that edit them.

An edit of the tower, the connector or the features reaches the text at the first token of its picture (of its tile,
where pictures have tiles), in block 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from veena_lens.hook_table import row_of
from veena_lens.inputs import MultimodalInputs
from veena_lens.positions import position_mask
from veena_lens.sweeps.rows import PictureRow
from veena_lens.vision.blocks import reached_from
from veena_lens.vision.packing import layouts_of


def is_picture_site(name: str) -> bool:
    """True for hooks of the tower, the connector and the features."""
    return row_of(name).axis_names[0] != "batch"


@dataclass(frozen=True, eq=False)
class PicturePlaces:
    """Places of a picture site that correspond in two runs: places, pictures (None for image tokens) and the first
    position of the text that each reaches."""

    places: Tensor
    pictures: Tensor | None
    starts: Tensor


def sizes_at(cfg: Any, inputs: MultimodalInputs, name: str) -> list[int]:
    """How many positions each picture has at a site of the tower or the connector, padding left out."""
    assert inputs.picture_rows is not None
    in_tower = name.startswith("vision.")
    if inputs.picture_grids is None:
        return [cfg.vision.n_positions if in_tower else cfg.vision.n_features] * len(inputs.picture_rows)
    sizes = inputs.picture_grids.prod(-1)
    return (sizes if in_tower else sizes // cfg.vision.merge_size**2).tolist()


def first_tokens(cfg: Any, inputs: MultimodalInputs) -> list[int]:
    """Of each picture the first position of the text that reads it; the last position for a tile that none reads."""
    assert inputs.picture_images is not None
    layouts = layouts_of(cfg, inputs)
    found, before = [], [0] * len(inputs.spans[0].images)
    for image in inputs.picture_images.tolist():
        span = inputs.spans[0].images[image]
        tokens = (inputs.image_mask[0, span].nonzero().flatten() + span.start).tolist()
        tile, before[image] = before[image], before[image] + 1
        if layouts:  # a resampled grid reads a tile before the first token that lies in it
            start = layouts[image].tile_starts()[tile]
        else:
            tiles = inputs.token_tiles[0][image] if inputs.token_tiles else [0] * len(tokens)
            start = tiles.index(tile) if tile in tiles else len(tokens)
        found.append(tokens[start] if start < len(tokens) else inputs.shape[1] - 1)
    return found


def picture_places(cfg: Any, inputs: MultimodalInputs, name: str, positions: Any, is_each: bool) -> PicturePlaces:
    """Where a site on pictures is edited. Words and regions choose image tokens (of features); at the tower and the
    connector, numbers and slices count positions of every picture, and "all" or "each" takes them all.

    Raises: ValueError for a selection that the site does not have."""
    if inputs.picture_rows is None or inputs.picture_images is None:
        raise ValueError(f"{name}: {inputs!r} holds no pictures to patch.")
    tokens, reached = inputs.image_mask[0].nonzero().flatten(), reached_from(cfg, inputs)
    if row_of(name).axis_names[0] == "n_image_tokens":
        chosen = position_mask(inputs, "image" if is_each else positions)[0][tokens]
        places = chosen.nonzero().flatten().cpu()
        if not len(places):
            raise ValueError(f"positions={positions!r} select no image token for {name} in {inputs!r}.")
        return PicturePlaces(places, None, reached[tokens.cpu()[places]])
    whole = is_each or (isinstance(positions, str) and positions in ("all", "image"))
    asked: list[int] | None = None
    if isinstance(positions, int):
        asked = [positions]
    elif isinstance(positions, (list, tuple)) and all(isinstance(p, int) for p in positions):
        asked = [int(p) for p in positions]
    if not (whole or asked is not None or isinstance(positions, slice)):
        raise ValueError(
            f"positions={positions!r} name tokens of the text; {name} lies on pictures: give 'all', 'each', numbers "
            "or a slice of its own positions, or patch hook_image_features, what the decoder reads."
        )
    first = reached[first_tokens(cfg, inputs)].tolist()
    places, pictures, starts = [], [], []
    for picture, size in enumerate(sizes_at(cfg, inputs, name)):
        every = list(range(size))
        if asked is None:
            chosen = every[positions] if isinstance(positions, slice) else every
        elif all(-size <= p < size for p in asked):
            chosen = [every[p] for p in asked]
        else:
            raise ValueError(f"positions={positions!r}: picture {picture} has {size} positions at {name}.")
        places += chosen
        pictures += [picture] * len(chosen)
        starts += [first[picture]] * len(chosen)
    if not places:
        raise ValueError(f"positions={positions!r} select nothing at {name}.")
    return PicturePlaces(torch.tensor(places), torch.tensor(pictures), torch.tensor(starts))


def picture_rows(
    name: str,
    value: Tensor | None,
    here: PicturePlaces,
    there: PicturePlaces,
    units: Sequence[int | None],
    groups: Sequence[Sequence[int]],
) -> list[PictureRow]:
    """The rows of a site; `value` is the source's whole activation (None: a plan), `there` the places in it."""
    axes = row_of(name).axis_names
    if value is not None and here.pictures is not None:
        value = value.movedim(axes.index("query_pos") if "query_pos" in axes else 1, 1)
    rows = []
    for unit in units:
        for group in groups:
            chosen = list(group)
            pictures = None if here.pictures is None else here.pictures[chosen]
            taken = torch.empty(0)
            if value is not None:
                at = there.places[chosen].to(value.device)
                taken = value[at] if pictures is None else value[pictures.to(value.device), at]
            rows.append(PictureRow(name, here.places[chosen], pictures, taken, int(here.starts[chosen].min()), unit))
    return rows
