"""A cache as large as LLaVA-1.6's: a whole view and four tiles of 24 x 24 tokens under 32 layers of 32 heads.

The numbers are random and the heads narrow; sizes and structure are what count."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from veena_lens.activation_cache import ActivationCache
from veena_lens.images.base import cell_boxes
from veena_lens.inputs import MultimodalInputs
from veena_lens.spans import Spans, StoredImage

SIDE, TILES, LAYERS, HEADS, KV_HEADS, WIDTH = 24, 4, 32, 32, 8, 4
BEFORE, QUERY, ANSWER = 5, 30, 25
N_IMAGE = SIDE * SIDE * (TILES + 1)
SIZE = 672  # pixels a side


def large_inputs() -> MultimodalInputs:
    """One row: text, 2,880 image tokens, a question and an answer."""
    length = BEFORE + N_IMAGE + QUERY + ANSWER
    tokens = torch.arange(100, 100 + length)[None]
    tokens[0, BEFORE : BEFORE + N_IMAGE] = 7
    end = BEFORE + N_IMAGE + QUERY
    spans = Spans([slice(BEFORE, BEFORE + N_IMAGE)], slice(BEFORE + N_IMAGE, end), end - 1, slice(end, end + ANSWER))
    n = SIDE * SIDE
    whole, tiles = cell_boxes((SIZE, SIZE), (SIDE, SIDE)), cell_boxes((SIZE, SIZE), (2 * SIDE, 2 * SIDE))
    image = StoredImage(
        grid=(2 * SIDE, 2 * SIDE),
        n_crops=5,
        places=tuple(range(n, 5 * n)),
        crops=(0,) * n + tuple(1 + i // n for i in range(4 * n)),
    )
    return MultimodalInputs(
        tokens=tokens,
        attention_mask=torch.ones_like(tokens, dtype=torch.bool),
        position_ids=torch.arange(length)[None],
        image_token_id=7,
        layouts=((image,),),
        spans=(spans,),
        patch_boxes=((torch.cat([whole, tiles]),),),
    )


def large_cache(seed: int = 0) -> ActivationCache:
    """Rotated queries and keys, and residuals, of every layer."""
    random, inputs = torch.Generator().manual_seed(seed), large_inputs()
    length, kept = inputs.shape[1], {}
    for layer in range(LAYERS):
        for part, heads, strength in (("rot_q", HEADS, 3.0), ("rot_k", KV_HEADS, 1.0)):
            value = torch.randn(1, length, heads, WIDTH, generator=random) * strength
            kept[f"blocks.{layer}.attn.hook_{part}"] = value
        kept[f"blocks.{layer}.hook_resid_post"] = torch.randn(1, length, 16, generator=random)
    return ActivationCache(kept, inputs=inputs)


def large_picture() -> Image.Image:
    y, x = np.mgrid[:SIZE, :SIZE]
    return Image.fromarray(np.stack([x % 256, y % 256, (x + y) // 6 % 256], -1).astype(np.uint8))
