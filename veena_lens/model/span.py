"""One forward pass as edits and listeners see it: its inputs, and which positions it computes.

Cached decoding runs chunk by chunk; positions keep their meaning: those past the prompt are "generated".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from veena_lens.inputs import MultimodalInputs
from veena_lens.positions import BEYOND_PROMPT, Box, Tile, parse, position_mask

PICTURE_WORDS = ("all", "image")


@dataclass(frozen=True, eq=False)
class PassSpan:
    """Positions start .. stop - 1 of a prompt and its continuation, which one pass computes.

    inputs: the whole prompt. new_tokens: [batch chunk], the tokens of a chunk behind the prompt.
    """

    inputs: MultimodalInputs
    start: int
    stop: int
    new_tokens: Int[Tensor, "batch chunk"] | None = None

    @classmethod
    def whole(cls, inputs: MultimodalInputs) -> PassSpan:
        """Return the span of a pass over all positions of the inputs."""
        return cls(inputs, 0, inputs.shape[1])

    @property
    def is_prefill(self) -> bool:
        """Return True where the pass begins with the first position."""
        return self.start == 0

    @property
    def tokens(self) -> Int[Tensor, "batch chunk"]:
        """Return the tokens of this chunk, all of the prompt or all behind it."""
        return self.inputs.tokens[:, self.start : self.stop] if self.new_tokens is None else self.new_tokens

    @property
    def position_ids(self) -> Int[Tensor, "*streams batch chunk"]:
        """Return the position ids of this chunk; those behind the prompt count on from its last one."""
        known, length = self.inputs.position_ids, self.inputs.shape[1]
        if self.stop <= length:
            return known[..., self.start : self.stop]
        steps = torch.arange(max(self.start, length), self.stop, device=known.device) - length + 1
        beyond = known[..., -1:] + steps
        return beyond if self.start >= length else torch.cat([known[..., self.start :], beyond], -1)

    def mask(self, positions: Any) -> Bool[Tensor, "batch chunk"]:
        """Return True at the chosen positions of this chunk."""
        n, length = self.inputs.shape
        parts = []
        if self.start < length:
            parts.append(position_mask(self.inputs, positions)[:, self.start : min(self.stop, length)])
        if self.stop > length:
            chosen = parse(positions)
            beyond = isinstance(chosen, tuple) and any(word in BEYOND_PROMPT for word in chosen)
            new = self.stop - max(self.start, length)
            parts.append(torch.full((n, new), beyond, dtype=torch.bool, device=self.inputs.device))
        return torch.cat(parts, 1)

    def key_mask(self, positions: Any) -> Bool[Tensor, "batch key_pos"]:
        """Return True at the chosen positions among all keys so far, those of the prompt and of the continuation."""
        return PassSpan(self.inputs, 0, self.stop).mask(positions)

    def picture_mask(self, positions: Any, rows: Bool[Tensor, " batch"], n_positions: int) -> Bool[Tensor, "crop pos"]:
        """Return True at the chosen positions of the images that the chosen rows own; positions count in the tower.

        Raises: ValueError for words that name text positions."""
        owners = self.inputs.crop_rows
        chosen = parse(positions)
        if owners is None:
            return torch.zeros(0, n_positions, dtype=torch.bool, device=rows.device)
        at = torch.zeros(len(owners), n_positions, dtype=torch.bool, device=rows.device)
        numbers = [chosen] if isinstance(chosen, int) else chosen if isinstance(chosen, list) else []
        for number in numbers:
            if not -n_positions <= number < n_positions:
                raise IndexError(f"position {number} is outside images of {n_positions} positions.")
        if isinstance(chosen, tuple):
            if any(word not in PICTURE_WORDS for word in chosen):
                raise ValueError(
                    f"positions={positions!r} name text; at a hook of the tower use 'all', ints or a slice."
                )
            at[:] = True
        elif isinstance(chosen, (Box, Tile)):
            raise ValueError(
                f"positions={positions!r} name tokens of the text; at a hook of the tower use 'all', ints or a slice, "
                "and edit hook_image_features for a region of the image."
            )
        elif isinstance(chosen, Tensor):
            at |= chosen.to(at.device)
        else:
            at[:, chosen] = True
        return at & rows[owners.to(rows.device)][:, None]
