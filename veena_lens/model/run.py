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
from veena_lens.positions import parse, position_mask

BEYOND_PROMPT = ("generated", "answer", "all", "text")


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

    @property
    def is_prefill(self) -> bool:
        return self.start == 0


def reaches_generated(positions: Any) -> bool:
    """True when a selection names positions that only generation or an answer has."""
    chosen = parse(positions)
    return isinstance(chosen, tuple) and any(word in BEYOND_PROMPT for word in chosen)
