"""The one loop over blocks, and what enters it.

Forward, caching, generation and sweeps all call `run_blocks`; there is no second forward. The residual stream
moves to a block's device when blocks lie on several.

One forward pass as edits and listeners see it: its inputs, and which positions this chunk holds.

Cached decoding runs chunk by chunk; positions keep their meaning: those past the prompt are "generated".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from veena_lens.components.block import Block
from veena_lens.components.context import Context
from veena_lens.inputs import MultimodalInputs
from veena_lens.positions import BEYOND_PROMPT, Box, Tile, parse, position_mask

PICTURE_WORDS = ("all", "image")


@dataclass(frozen=True, eq=False)
class PassSpan:
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
        return PassSpan(self.inputs, 0, self.stop).mask(positions)

    def picture_mask(self, positions: Any, rows: Bool[Tensor, " batch"], n_positions: int) -> Bool[Tensor, "crop pos"]:
        """True at the chosen positions of the images that the chosen rows own; positions count in the tower.

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

    @property
    def is_prefill(self) -> bool:
        return self.start == 0


def run_blocks(
    blocks: Sequence[Block] | object,
    resid: Float[Tensor, "batch pos d_model"],
    context: Context,
    start_layer: int = 0,
    stop_layer: int | None = None,
) -> Float[Tensor, "batch pos d_model"]:
    """The residual stream after blocks start_layer .. stop_layer - 1."""
    for block in list(blocks)[start_layer:stop_layer]:  # type: ignore[call-overload]
        device = block.ln1.weight.device
        resid = block(resid if resid.device == device else resid.to(device), context)
    return resid


def scatter_features(
    embeds: Float[Tensor, "batch pos d_model"],
    image_mask: Bool[Tensor, "batch pos"],
    features: Float[Tensor, "n_image_tokens d_model"],
) -> Float[Tensor, "batch pos d_model"]:
    """Token embeddings with image features in place of the image tokens, row after row.

    Raises: ValueError when the numbers of features and image tokens differ."""
    wanted = int(image_mask.sum())
    if wanted != len(features):
        raise ValueError(
            f"The prompt holds {wanted} image tokens but the images give {len(features)} features. "
            "Prepare the inputs with the checkpoint's own processor, one image for each placeholder."
        )
    return embeds.masked_scatter(image_mask[..., None].to(embeds.device), features.to(embeds))


def resolve_layer(layer: int | None, n_layers: int, what: str) -> int | None:
    """A layer bound in 0..n_layers; negative ones count from the end.

    Raises: ValueError when it is outside."""
    if layer is None:
        return None
    resolved = layer + n_layers if layer < 0 else layer
    if not 0 <= resolved <= n_layers:
        raise ValueError(f"{what}={layer} is outside a model of {n_layers} layers.")
    return resolved


def next_token_targets(
    tokens: Int[Tensor, "batch pos"], counted: Bool[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"]
) -> tuple[Int[Tensor, "batch pos_less_one"], Bool[Tensor, "batch pos_less_one"]]:
    """Each position's next token, and whether it counts in a loss: text, predicted from a real position."""
    return tokens[:, 1:], counted[:, 1:] & real[:, :-1]
