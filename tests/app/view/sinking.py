"""A small cache in which one cell of the image and the first token are attention sinks, in layer 1 alone."""

from __future__ import annotations

import torch

from veena_lens.activation_cache import ActivationCache
from veena_lens.images.base import cell_boxes
from veena_lens.inputs import MultimodalInputs
from veena_lens.spans import Spans, StoredImage

LAYERS, HEADS, LENGTH = 2, 3, 24
IMAGE = slice(2, 18)  # 4 x 4 cells
SINKS = [0, 7]


def sinking_cache(seed: int = 0) -> ActivationCache:
    """Patterns and residuals; every row sums to 1."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.arange(10, 10 + LENGTH)[None]
    tokens[0, IMAGE] = 5
    inputs = MultimodalInputs(
        tokens=tokens,
        attention_mask=torch.ones_like(tokens, dtype=torch.bool),
        position_ids=torch.arange(LENGTH)[None],
        image_token_id=5,
        spans=(Spans([IMAGE], slice(18, LENGTH), LENGTH - 1),),
        layouts=((StoredImage(grid=(4, 4)),),),
        patch_boxes=((cell_boxes((96, 96), (4, 4)),),),
    )
    kept = {}
    for layer in range(LAYERS):
        weights = torch.rand(1, HEADS, LENGTH, LENGTH, generator=random) + 0.2
        resid = torch.randn(1, LENGTH, 8, generator=random)
        if layer == 1:
            weights[..., SINKS] = 40.0
            resid[:, SINKS] *= 100
        weights = weights.tril()
        kept[f"blocks.{layer}.attn.hook_pattern"] = weights / weights.sum(-1, keepdim=True)
        kept[f"blocks.{layer}.hook_resid_pre"] = resid
        kept[f"blocks.{layer}.hook_resid_post"] = resid
    return ActivationCache(kept, inputs=inputs)
