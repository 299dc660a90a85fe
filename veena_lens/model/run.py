"""One forward pass as edits and listeners see it: its inputs, and which positions this chunk holds.

Cached decoding runs chunk by chunk; positions keep their meaning: those past the prompt are "generated".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from veena_lens.inputs import MultimodalInputs
from veena_lens.positions import BEYOND_PROMPT, Box, Tile, parse, position_mask

PICTURE_WORDS = ("all", "image")


@dataclass(frozen=True, eq=False)
class Run:
    """`inputs` is the whole prompt; the pass computes positions start .. stop - 1 of prompt and continuation."""

    inputs: MultimodalInputs
    start: int
    stop: int

    def mask(self, positions: Any) -> Bool[Tensor, "batch chunk"]:
        """True at the chosen positions of this chunk."""
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
        """True at the chosen positions among all keys so far, the prompt's and the continuation's."""
        return Run(self.inputs, 0, self.stop).mask(positions)

    def picture_mask(
        self, positions: Any, rows: Bool[Tensor, " batch"], n_positions: int
    ) -> Bool[Tensor, "picture pos"]:
        """True at the chosen positions of the pictures that the chosen rows own; positions count in the tower.

        Raises: ValueError for words that name text positions."""
        owners = self.inputs.picture_rows
        chosen = parse(positions)
        if owners is None:
            return torch.zeros(0, n_positions, dtype=torch.bool, device=rows.device)
        at = torch.zeros(len(owners), n_positions, dtype=torch.bool, device=rows.device)
        numbers = [chosen] if isinstance(chosen, int) else chosen if isinstance(chosen, list) else []
        for number in numbers:
            if not -n_positions <= number < n_positions:
                raise IndexError(f"position {number} is outside pictures of {n_positions} positions.")
        if isinstance(chosen, tuple):
            if any(word not in PICTURE_WORDS for word in chosen):
                raise ValueError(
                    f"positions={positions!r} name text; at a hook of the tower use 'all', ints or a slice."
                )
            at[:] = True
        elif isinstance(chosen, (Box, Tile)):
            raise ValueError(
                f"positions={positions!r} name tokens of the text; at a hook of the tower use 'all', ints or a slice, "
                "and edit hook_image_features for a region of the picture."
            )
        elif isinstance(chosen, Tensor):
            at |= chosen.to(at.device)
        else:
            at[:, chosen] = True
        return at & rows[owners.to(rows.device)][:, None]

    @property
    def is_prefill(self) -> bool:
        return self.start == 0
