"""Blocks of image tokens that read each other in both directions (Gemma-3), and how far back an edit reaches there.

A block is a run of image tokens; pictures that touch are one block, as in Hugging Face, which finds runs in the types
of the tokens. In a causal decoder an edit at position p leaves everything before p as it was; inside a block it reaches
the block from its first token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from veena_lens.config import HookedVLMConfig
from veena_lens.inputs import MultimodalInputs, is_any_of


def image_blocks(cfg: HookedVLMConfig, inputs: MultimodalInputs) -> Int[Tensor, "batch pos"] | None:
    """The number of each position's block in its row, -1 for text; None where the model has no blocks, or no row a
    picture."""
    return runs_of_images(inputs) if cfg.image_blocks and any(inputs.n_images) else None


def runs_of_images(inputs: MultimodalInputs) -> Int[Tensor, "batch pos"]:
    """The number of each run of image tokens in its row, -1 for text. A hole in the attention mask leaves it whole."""
    inside = torch.zeros_like(inputs.attention_mask)
    for row, spans in enumerate(inputs.spans):
        for span in spans.images:
            inside[row, span] = is_any_of(inputs.tokens[row, span], inputs.image_token_ids)
    begins = inside & ~F.pad(inside, (1, 0))[:, :-1]
    return torch.where(inside, begins.long().cumsum(-1) - 1, -1)


def reached_from(cfg: HookedVLMConfig, inputs: MultimodalInputs) -> Int[Tensor, " pos"]:
    """For every position of a single row the first one that an edit there reaches: itself, or its block's first."""
    places = torch.arange(inputs.shape[1])
    blocks = image_blocks(cfg, inputs)
    if blocks is None:
        return places
    mine = blocks[0].cpu()
    begins = (mine >= 0) & (mine != F.pad(mine, (1, 0), value=-1)[:-1])
    return torch.where(mine >= 0, torch.where(begins, places, 0).cummax(0).values, places)
