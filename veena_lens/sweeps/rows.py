"""A row of a sweep: one edit of one activation, and the runs it is made from.

A row knows the layer where it leaves the base run and the first position it reaches; everything before either
is the base run's own. An edit of the image's way into the text (tower, connector, features) leaves it before block 0,
at the first token of that image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veena_lens.hook_table import layer_of, row_of
from veena_lens.inputs import MultimodalInputs
from veena_lens.interventions.base import HEAD_AXES


@dataclass(frozen=True, eq=False)
class Row:
    """Edit of `site` at `positions` of the base run: the source's `value` put in place, or (`add`) added.

    value: [n ...] for the n positions, in the site's axes without batch; unit: one head or neuron, None for all.
    `first`: the first position that it reaches, where that lies before its own (an image whose tokens read each other
    in both directions is reached from its first token).
    """

    site: str
    positions: Int[Tensor, " n"]
    value: Float[Tensor, ...]
    unit: int | None = None
    add: bool = False
    first: int | None = None

    @property
    def layer(self) -> int:
        """Return the block where the row leaves the base run."""
        return layer_of(self.site) or 0

    @property
    def start(self) -> int:
        """Return the first position it reaches."""
        return int(self.positions.min()) if self.first is None else self.first

    is_picture = False

    def edit(self, activation: Float[Tensor, ...], start: int) -> Float[Tensor, ...]:
        """Return the activation of this row (no batch axis), which begins at position `start`, edited out of place."""
        axes = row_of(self.site).axis_names[1:]
        axis = axes.index("pos") if "pos" in axes else axes.index("query_pos")
        moved = activation.movedim(axis, 0)
        value, places = self.value.to(activation), (self.positions - start).to(activation.device)
        new = moved[places] + value if self.add else value
        if self.unit is not None:
            # The unit's axis among the others once positions stand first.
            rest = [a for i, a in enumerate(axes) if i != axis]
            unit_axis = 1 + next(i for i, a in enumerate(rest) if a in (*HEAD_AXES, "d_mlp"))
            kept = moved[places].clone()
            kept.select(unit_axis, self.unit).copy_(new.select(unit_axis, self.unit))
            new = kept
        out = moved.clone()
        out[places] = new
        return out.movedim(0, axis)


@dataclass(frozen=True, eq=False)
class PictureRow:
    """Edit of a site on images: `value` [n ...] at `places`, of which `pictures` [n] says the image (None where
    the site's first axis counts image tokens). `start`: the first position of the text that it reaches."""

    site: str
    places: Int[Tensor, " n"]
    pictures: Int[Tensor, " n"] | None
    value: Float[Tensor, ...]
    start: int
    unit: int | None = None
    layer: int = 0
    is_picture = True

    @property
    def held(self) -> list[int]:
        """Return the images that it edits."""
        return [] if self.pictures is None else sorted(set(self.pictures.tolist()))

    def edit(
        self, activation: Float[Tensor, ...], start: int, pictures: Sequence[int] | None = None
    ) -> Float[Tensor, ...]:
        """Return the activation on this row's images (or its image tokens), edited out of place; `pictures` are
        those that it holds (default: those that are edited)."""
        axes = row_of(self.site).axis_names
        places, value = self.places.to(activation.device), self.value.to(activation)
        axis = axes.index("query_pos") if "query_pos" in axes else 1
        moved = activation if self.pictures is None else activation.movedim(axis, 1)
        index: tuple[Tensor, ...] = (places,)
        if self.pictures is not None:
            there = list(self.held if pictures is None else pictures)
            index = (torch.tensor([there.index(p) for p in self.pictures.tolist()], device=places.device), places)
        if self.unit is not None:
            rest = [a for i, a in enumerate(axes) if i not in (0, axis)]
            unit_axis = 1 + next(i for i, a in enumerate(rest) if a in (*HEAD_AXES, "d_mlp"))
            kept = moved[index].clone()
            kept.select(unit_axis, self.unit).copy_(value.select(unit_axis, self.unit))
            value = kept
        out = moved.clone()
        out[index] = value
        return out if self.pictures is None else out.movedim(1, axis)


AnyRow: TypeAlias = Row | PictureRow


@dataclass(frozen=True, eq=False)
class SeenPictures:
    """What the base run's tower and connector made of every image [image ...]: the residual that enters a block
    (n_layers: leaves the last), what features and inner layers are read from, features, and what the connector and
    the mergers of inner layers make of them."""

    entering: Mapping[int, Tensor]
    kept: Mapping[int, Tensor]
    features: Tensor
    projected: Tensor
    merged: Sequence[Tensor]


@dataclass(frozen=True, eq=False)
class BaseRun:
    """One unpatched run of one row: residuals that enter each block, keys (after rotary) and values."""

    inputs: MultimodalInputs
    resid: list[Tensor]  # a layer: [pos d_model]
    keys: list[Tensor]  # a layer: [pos n_key_value_heads d_head]
    values: list[Tensor]
    logits: Float[Tensor, " d_vocab"]
    seen: Mapping[str, Tensor] = field(default_factory=dict)  # activations that metrics read, [pos ...] each
    deepstack: Mapping[int, Tensor] = field(default_factory=dict)  # a layer: what is added at its input [1 pos d_model]
    pictures: SeenPictures | None = None  # where rows edit tower or connector

    @property
    def length(self) -> int:
        return self.inputs.shape[1]
