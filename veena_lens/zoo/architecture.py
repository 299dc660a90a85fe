"""What differs between the small models: how they are built, how a prompt is written, how a packed batch runs.

Training, evaluation and the card know an `Architecture` only; `model.py` lists those there are.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from veena_lens.zoo.packing import Packed

__all__ = ["Architecture", "ChatFormat", "Run", "Stage", "Teacher"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    name: str
    steps: int
    batch: int
    peak_lr: float
    head_weight: float
    # Weight of the distance to a teacher's picture features, where there is a teacher.
    imitation: float = 0.0
    # So many more pictures a step for the tower alone, so that it goes on learning beside the text.
    extra: int = 0
    # Share of the stage in which contexts are rare.
    early: float = 0.3
    # Matrix products in bfloat16, weights and their updates in float32.
    bfloat16: bool = False
    minutes: float = math.inf


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """The texts around questions and answers; the checkpoint's chat template writes the same."""

    opening: str
    system_opening: str
    before_picture: str = ""
    picture: str
    after_picture: str = ""
    next_turn: str
    reply: str
    end: str
    # Three position streams (time, row, column) over a picture, as in multimodal rotary embedding; else one.
    has_grid_positions: bool = False


@dataclass(frozen=True)
class Run:
    """Final hidden states of a packed batch, and the picture features that took the image tokens' places."""

    hidden: Float[Tensor, "batch pos d_model"]
    features: Float[Tensor, "batch image d_model"]


def _unchanged(
    pictures: Float[Tensor, "batch 3 height width"], rng: random.Random
) -> Float[Tensor, "batch 3 height width"]:
    return pictures


Teacher = Callable[[Float[Tensor, "batch 3 height width"]], Float[Tensor, "batch image d_model"]]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One small model. `grid` gives the rows and columns of image tokens of a picture of (height, width) pixels."""

    name: str
    model_type: str
    chat: ChatFormat
    stages: tuple[Stage, ...]
    shares: dict[str, float]
    styles: dict[str, float]
    # Number of picture features that the tower's linear heads read in their places, besides their mean.
    head_places: int = 0
    # Share of the tower's pictures with other colours, which must not matter for the emotion.
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
    # From a folder, what its model makes of square pictures, on the image tokens of this architecture.
    open_teacher: Callable[[Path], Teacher] | None = None
