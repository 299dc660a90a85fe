"""One forward pass as edits and listeners see it: its inputs, and which positions it computes.

Cached decoding runs chunk by chunk; positions keep their meaning: those past the prompt are "generated".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
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

    inputs: the whole prompt. new_tokens: [batch chunk], the tokens of the span that lie behind the prompt.
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
        """Return the tokens of this chunk."""
        known = self.inputs.tokens[:, self.start : self.stop]
        return known if self.new_tokens is None else torch.cat([known, self.new_tokens], 1)

    @property
    def holds_images(self) -> bool:
        """Return True where the pass computes positions of the prompt, whose images it then encodes."""
        return self.start < self.inputs.shape[1]

    @property
    def real(self) -> Bool[Tensor, "batch chunk"]:
        """Return True at the positions of this chunk that are not pads of the prompt."""
        known = self.inputs.attention_mask[:, self.start : self.stop]
        n_new = self.stop - self.start - known.shape[1]
        return known if n_new == 0 else torch.cat([known, known.new_ones(len(self.inputs), n_new)], 1)

    @cached_property
    def known_keys(self) -> Bool[Tensor, "batch query_pos key_pos"] | None:
        """Return True at the keys that exist when a query of this chunk is first generated; None where all do.

        Positions of the prompt know the prompt, each token of an answer those up to itself: a pass that computes both
        at once edits a query's attention as decoding token by token does, which never meets the later keys."""
        length, device = self.inputs.shape[1], self.inputs.device
        answered = any(spans.answer is not None for spans in self.inputs.spans)
        if self.start >= length or not (answered or self.stop > length):
            return None
        ends = [length - 1 if spans.answer is None else spans.last for spans in self.inputs.spans]
        query = torch.arange(self.start, self.stop, device=device)
        reach = torch.maximum(query, torch.tensor(ends, device=device)[:, None])
        return torch.arange(self.stop, device=device) <= reach[..., None]

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
