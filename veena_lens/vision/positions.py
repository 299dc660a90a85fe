"""Positions of patches in pictures of any size, and of their tokens in the text (Qwen2-VL, Qwen2.5-VL, Qwen3-VL).

Patches come square by square: a square of `merge` x `merge` patches lies together, since one token reads it, and
the squares follow row by row. Pure functions of grids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from veena_lens.components.rotary import RotaryTables
from veena_lens.inputs import in_squares

Grid: TypeAlias = tuple[int, int]  # (height, width) in patches


@dataclass(frozen=True)
class Group:
    """Image tokens that lie together: the first of them among its row's real tokens, the place in time of each picture
    and (height, width) of all in tokens."""

    start: int
    times: tuple[int, ...]
    grid: Grid


def patch_places(grid: Grid, merge: int) -> Int[Tensor, "patch 2"]:
    """(row, column) of every patch, in the order of the patches."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    return torch.stack([in_squares(rows, merge), in_squares(columns, merge)], -1)


def window_numbers(
    places: Int[Tensor, "picture patch 2"], widths: Int[Tensor, " picture"], side: int
) -> Int[Tensor, "picture patch"]:
    """The window of every patch, counted row by row from the top left; windows have `side` patches a side, those at the
    right and the bottom fewer. `widths` are the pictures' own, in patches."""
    rows, columns = (places // side).unbind(-1)
    return rows * ((widths + side - 1) // side)[:, None] + columns


def axial_tables(
    places: Int[Tensor, "picture patch 2"], theta: float, d_head: int, dtype: torch.dtype = torch.float32
) -> RotaryTables:
    """(cos, sin) of rotary positions over rows and columns: half of the planes turn with each."""
    exponents = torch.arange(0, d_head // 2, 2, dtype=torch.float32) / (d_head // 2)
    frequencies = (1.0 / theta**exponents).to(places.device)
    angles = rearrange(places[..., None].to(dtype) * frequencies, "n p xy f -> n p (xy f)")
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def resampled(table: Float[Tensor, "side_squared d_model"], grid: Grid, merge: int) -> Float[Tensor, "patch d_model"]:
    """A square table of position embeddings resampled to a grid, corner on corner, bilinearly.

    The weights are float32 whatever the table's dtype, as in Hugging Face."""
    side = int(table.shape[0] ** 0.5)

    def axis(n: int) -> tuple[Tensor, Tensor]:
        where = torch.arange(n, dtype=torch.float32, device=table.device) * (side - 1) / max(n - 1, 1)
        low = where.floor()
        offsets = torch.arange(2, device=table.device)
        weights = (1 - (where[:, None] - low[:, None] - offsets).abs()).clamp(min=0)
        return (low.long()[:, None] + offsets).clamp(0, side - 1), weights

    (rows, row_weights), (columns, column_weights) = axis(grid[0]), axis(grid[1])
    index = (rows[:, None, :, None] * side + columns[None, :, None, :]).flatten(2)
    weights = (row_weights[:, None, :, None] * column_weights[None, :, None, :]).flatten(2)
    order = in_squares(torch.arange(grid[0] * grid[1]).view(*grid), merge).to(table.device)
    index, weights = (x.flatten(0, 1)[order] for x in (index, weights))
    return (table[index] * weights[..., None]).sum(1)


def multimodal_positions(
    mask: Bool[Tensor, "batch pos"], groups: Sequence[Sequence[Group]]
) -> Int[Tensor, "streams batch pos"]:
    """Position of every token in three streams (time, height, width); pads get 0.

    Text advances all streams together. A group of h x w image tokens a picture starts where the text stopped and
    counts its times, rows and columns; the text goes on after max(h, w) further positions, whatever its times are."""
    positions = torch.zeros(3, *mask.shape, dtype=torch.long)
    for row, mine in enumerate(groups):
        real = mask[row].nonzero().flatten().cpu()
        parts, token, position = [], 0, 0
        for group in mine:
            h, w = group.grid
            parts.append((torch.arange(group.start - token) + position).expand(3, -1))
            position += group.start - token
            times = torch.tensor(group.times)
            parts.append(torch.cartesian_prod(times, torch.arange(h), torch.arange(w)).T + position)
            position, token = position + max(h, w), group.start + len(times) * h * w
        parts.append((torch.arange(len(real) - token) + position).expand(3, -1))
        positions[:, row, real] = torch.cat(parts, 1)
    return positions.to(mask.device)
