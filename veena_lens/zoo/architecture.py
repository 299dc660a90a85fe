"""Describe what differs between the small models: how they are built, how a prompt is written, how a batch runs.

Training, evaluation and the card use only an `Architecture`; `model.py` lists them.

A batch packs several questions about one image into one row. They share the image tokens and do not attend to each
other: a question attends to the prefix and to itself, and its positions continue from the end of the prefix, in every
stream. The loss equals that of the unpacked sequences, with about half as many tokens per answer.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["Architecture", "Branch", "ChatFormat", "Packed", "Row", "Run", "Stage", "Teacher", "pack"]


@dataclass(frozen=True)
class Branch:
    """Hold a question with its answer: token ids, and the loss weight of each token (0 if it is not predicted)."""

    ids: list[int]
    weights: list[float]


@dataclass(frozen=True)
class Row:
    """Hold the shared prefix and the branches; `positions` are those of the prefix unless they are 0, 1, 2, ..."""

    prefix: list[int]
    branches: list[Branch]
    positions: Int[Tensor, "streams prefix"] | None = None


@dataclass(frozen=True, kw_only=True)
class Packed:
    input_ids: Int[Tensor, "batch pos"]
    position_ids: Int[Tensor, "*streams batch pos"]
    attention_mask: Float[Tensor, "batch 1 pos pos"]
    weights: Float[Tensor, "batch pos"]

    def to(self, device: str) -> Packed:
        """Return the batch on a device."""
        return Packed(**{name: value.to(device) for name, value in vars(self).items()})


def pack(rows: list[Row], pad_id: int) -> Packed:
    """Return rows padded on the right, with a four-dimensional mask that separates branches (0 allowed, lowest not)."""
    length = max(len(row.prefix) + sum(len(branch.ids) for branch in row.branches) for row in rows)
    ids = torch.full((len(rows), length), pad_id)
    streams = 1 if rows[0].positions is None else len(rows[0].positions)
    positions = torch.zeros(streams, len(rows), length, dtype=torch.long)
    weights = torch.zeros(len(rows), length)
    segment = torch.full((len(rows), length), -1)
    for i, row in enumerate(rows):
        start = len(row.prefix)
        ids[i, :start] = torch.tensor(row.prefix)
        positions[:, i, :start] = torch.arange(start) if row.positions is None else row.positions
        after = int(positions[:, i, start - 1].max()) + 1
        segment[i, :start] = 0
        for number, branch in enumerate(row.branches, start=1):
            end = start + len(branch.ids)
            ids[i, start:end] = torch.tensor(branch.ids)
            weights[i, start:end] = torch.tensor(branch.weights)
            positions[:, i, start:end] = after + torch.arange(len(branch.ids))
            segment[i, start:end] = number
            start = end
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    query, key = segment[:, :, None], segment[:, None, :]
    # Padding attends to itself, because a softmax without any key gives nan.
    allowed = causal & ((key == query) | (key == 0))
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    positions = positions[0] if rows[0].positions is None else positions
    return Packed(input_ids=ids, position_ids=positions, attention_mask=mask[:, None], weights=weights)


@dataclass(frozen=True, kw_only=True)
class Stage:
    name: str
    steps: int
    batch: int
    peak_lr: float
    head_weight: float
    # Weight of the distance to the image features of a teacher, if there is one.
    imitation: float = 0.0
    # Additional images per step for the tower alone, so that it continues to learn during the text stages.
    extra: int = 0
    # Share of the stage in which contexts are rare.
    early: float = 0.3
    # Matrix products in bfloat16, weights and their updates in float32.
    bfloat16: bool = False
    minutes: float = math.inf


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """Hold the texts around questions and answers, as in the checkpoint's chat template."""

    opening: str
    system_opening: str
    before_picture: str = ""
    picture: str
    after_picture: str = ""
    next_turn: str
    reply: str
    end: str
    # Three position streams (time, row, column) over an image, as in multimodal rotary embedding; else one.
    has_grid_positions: bool = False


@dataclass(frozen=True)
class Run:
    """Hold the final hidden states of a packed batch, and the image features at its image tokens."""

    hidden: Float[Tensor, "batch pos d_model"]
    features: Float[Tensor, "batch image d_model"]


def _unchanged(
    pictures: Float[Tensor, "batch 3 height width"], rng: random.Random
) -> Float[Tensor, "batch 3 height width"]:
    return pictures


Teacher = Callable[[Float[Tensor, "batch 3 height width"]], Float[Tensor, "batch image d_model"]]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Describe one small model. `grid` returns rows and columns of image tokens for (height, width) in pixels."""

    name: str
    model_type: str
    chat: ChatFormat
    stages: tuple[Stage, ...]
    shares: dict[str, float]
    styles: dict[str, float]
    # Number of image features that the tower's linear heads read at their places, in addition to the mean.
    head_places: int = 0
    # Share of the tower's images with other colours, which must not matter for the emotion.
    recoloured: float = 0.0
    build_processor: Callable[[], Any]
    build_model: Callable[[Any, int], Any]
    save_folder: Callable[[Any, Any, Path], None]
    open_processor: Callable[[Path], Any]
    tower_width: Callable[[Any], int]
    tower_features: Callable[[Any, Float[Tensor, "batch 3 height width"]], Float[Tensor, "batch image d_model"]]
    run: Callable[[Any, Packed, Float[Tensor, "batch 3 height width"]], Run]
    grid: Callable[[int, int], tuple[int, int]]
    reshape: Callable[[Float[Tensor, "batch 3 height width"], random.Random], Float[Tensor, "batch 3 _ _"]] = _unchanged
    start_from: Callable[[Any, Any, Path], None] | None = None
    # From a folder: the features of its model for square images, on the image tokens of this architecture.
    open_teacher: Callable[[Path], Teacher] | None = None
