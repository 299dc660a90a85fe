"""Pictures of any size (Qwen): which patches fill which run of tokens.

A processor gives the patches of all images in one tensor and those of all videos in another, with a grid
(time, height, width in patches) each. Images and videos may alternate in a row, so tokens are walked in reading
order and each run of one kind takes the next grids of that kind.

Positions of patches in pictures of any size, and of their tokens in the text (Qwen2-VL, Qwen2.5-VL, Qwen3-VL).

Patches come square by square: a square of `merge` x `merge` patches lies together, since one token reads it, and
the squares follow row by row. Pure functions of grids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NoReturn, TypeAlias

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from veena_lens.components.rotary import RotaryTables
from veena_lens.config import VisionConfig
from veena_lens.inputs import to_merge_order

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
    return torch.stack([to_merge_order(rows, merge), to_merge_order(columns, merge)], -1)


def window_numbers(
    places: Int[Tensor, "crop patch 2"], widths: Int[Tensor, " crop"], side: int
) -> Int[Tensor, "crop patch"]:
    """The window of every patch, counted row by row from the top left; windows have `side` patches a side, those at the
    right and the bottom fewer. `widths` are the pictures' own, in patches."""
    rows, columns = (places // side).unbind(-1)
    return rows * ((widths + side - 1) // side)[:, None] + columns


def axial_tables(
    places: Int[Tensor, "crop patch 2"], theta: float, d_head: int, dtype: torch.dtype = torch.float32
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
    order = to_merge_order(torch.arange(grid[0] * grid[1]).view(*grid), merge).to(table.device)
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


@dataclass(frozen=True, eq=False)
class Source:
    """A processor's patches of one kind. `frames_apart`: each frame of a video has a run of tokens of its own.
    `steps`: positions in time from one picture of a video to its next, one number a video; None for 1."""

    kind: str  # "image" or "video"
    token_id: int | None
    pixels: Any
    grids: Any
    frames_apart: bool
    steps: Sequence[Any] | None = None


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture: its patches [patch numbers], and (height, width) in patches."""

    patches: Tensor
    grid: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Clip:
    """An image, or the frames of a video that share a run of tokens."""

    frames: list[Frame]
    merge: int
    step: Any = 1  # a number, or one in a tensor: rounding follows its dtype

    @property
    def times(self) -> tuple[int, ...]:
        """The place in time of each picture, in whole positions (rounded down)."""
        return tuple((torch.arange(len(self.frames)) * self.step).long().tolist())

    @property
    def grid(self) -> tuple[int, int, int]:
        """(time, height, width) in tokens."""
        height, width = self.frames[0].grid
        return len(self.frames), height // self.merge, width // self.merge

    @property
    def n_tokens(self) -> int:
        t, h, w = self.grid
        return t * h * w


@dataclass(frozen=True, eq=False)
class Match:
    """Row by row: the pictures in reading order, and where their groups of tokens stand among the real tokens."""

    frames: list[list[Frame]]
    groups: list[list[Group]]


def match_tokens(vision: VisionConfig, tokens: Tensor, mask: Tensor, sources: Sequence[Source]) -> Match:
    """The pictures that the tokens of a batch [batch pos] stand for.

    Raises: ValueError when patches, grids and tokens do not fit."""
    by_id = {source.token_id: list(clips(vision, source)) for source in sources}
    names = {source.token_id: source.kind for source in sources}
    given = {token: len(mine) for token, mine in by_id.items()}
    match = Match([], [])
    for row, keep in zip(tokens, mask, strict=True):
        frames, groups, at = [], [], 0
        for token, run in groupby(row[keep].tolist()):
            length = len(list(run))
            if token in by_id:
                start, end = at, at + length
                while start < end:
                    clip = by_id[token].pop(0) if by_id[token] else None
                    if clip is None or start + clip.n_tokens > end:
                        _refuse_run(names[token], length, clip, given[token])
                    frames += clip.frames
                    groups.append(Group(start, clip.times, clip.grid[1:]))
                    start += clip.n_tokens
            at += length
        match.frames.append(frames)
        match.groups.append(groups)
    for token, left in by_id.items():
        if left:
            raise ValueError(
                f"{len(left)} of {given[token]} {names[token]} grids have no tokens in the prompt: put one placeholder "
                f"for each {names[token]}."
            )
    return match


def _refuse_run(kind: str, length: int, clip: Clip | None, given: int) -> NoReturn:
    if clip is None:
        raise ValueError(
            f"The prompt holds more {kind} tokens than the {given} {kind}s given fill: a run of {length} is left over. "
            f"Give a {kind} for each placeholder, through the checkpoint's own processor."
        )
    t, h, w = clip.grid
    raise ValueError(
        f"A run of {length} {kind} tokens meets a grid of {t} x {h} x {w} = {clip.n_tokens} tokens. Processor and "
        "checkpoint do not match (merge_size, patch_size), or the prompt was not made by the processor."
    )


def clips(vision: VisionConfig, source: Source) -> Iterator[Clip]:
    """The images or videos of a source, their patches cut out.

    Raises: ValueError for patches without grids or grids without patches, or patches of another number or width than
    the grids and the tower say."""
    keys = ("pixel_values", "image_grid_thw") if source.kind == "image" else ("pixel_values_videos", "video_grid_thw")
    if source.pixels is None and source.grids is None:
        return
    if source.pixels is None:
        raise ValueError(f"{keys[1]} came without {keys[0]}, the patches of each {source.kind}.")
    if source.grids is None:
        raise ValueError(f"{keys[0]} came without {keys[1]}, the (time, height, width) of each {source.kind}.")
    pixels, grids = torch.as_tensor(source.pixels), torch.as_tensor(source.grids).long()
    if grids.ndim != 2 or grids.shape[1] != 3:
        raise ValueError(
            f"{keys[1]} must be [{source.kind}s 3], the (time, height, width) of each in patches, not "
            f"{list(grids.shape)}."
        )
    merge, width = vision.merge_size, vision.patch_width
    if pixels.ndim != 2 or pixels.shape[1] != width or not pixels.is_floating_point():
        raise ValueError(
            f"{keys[0]} must be floats [patches {width}] ({vision.n_channels} channels, {vision.temporal_patch_size} "
            f"frames, {vision.patch_size} x {vision.patch_size} pixels), not {pixels.dtype} {list(pixels.shape)}. "
            "Processor and checkpoint do not match (patch_size, temporal_patch_size)."
        )
    bad = [g for g in grids.tolist() if min(g) < 1 or g[1] % merge or g[2] % merge]
    if bad:
        raise ValueError(
            f"{keys[1]} holds {bad[0]}: time must be at least 1, height and width multiples of merge_size={merge}."
        )
    wanted = int(grids.prod(-1).sum())
    if wanted != len(pixels):
        raise ValueError(f"{keys[1]} {grids.tolist()} asks for {wanted} patches; {keys[0]} holds {len(pixels)}.")
    if source.steps is not None and len(source.steps) != len(grids):
        raise ValueError(
            f"{len(grids)} {source.kind}s have {len(source.steps)} times a picture; give one a {source.kind}."
        )
    at = 0
    for i, (t, h, w) in enumerate(grids.tolist()):
        frames = [Frame(pixels[at + j * h * w : at + (j + 1) * h * w], (h, w)) for j in range(t)]
        at += t * h * w
        if source.frames_apart:
            yield from (Clip([frame], merge) for frame in frames)
        else:
            yield Clip(frames, merge, 1 if source.steps is None else source.steps[i])
