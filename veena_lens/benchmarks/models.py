"""A random LLaVA of middling size, in Hugging Face and here on the same weights, and a prompt with a picture."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

IMAGE_TOKEN = 999


def random_llava(n_layers: int = 16, d_model: int = 512, n_heads: int = 8) -> tuple[Any, Any]:
    """(Hugging Face model, native model), sharing storage: 576 image tokens, a tower of two layers, float32."""
    import transformers

    from veena_lens import HookedVLM

    torch.manual_seed(0)
    text = transformers.LlamaConfig(
        hidden_size=d_model,
        intermediate_size=4 * d_model,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_heads,
        vocab_size=1000,
        max_position_embeddings=4096,
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=336,
        patch_size=14,
        projection_dim=64,
    )
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE_TOKEN)
    hf = transformers.LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()
    return hf, HookedVLM.from_hf(hf)


def prompt(n_tokens: int = 600, seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of one prompt: text, 576 image tokens, text; pictures differ by seed."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 990, (1, n_tokens), generator=torch.Generator().manual_seed(1))
    ids[0, 5:581] = IMAGE_TOKEN
    pixels = torch.randn(1, 3, 336, 336, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def seconds(run: Callable[[], Any], repeats: int = 3) -> float:
    """Median time of a call after one warm-up, without gradients."""
    with torch.no_grad():
        run()
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def table(title: str, rows: list[tuple[str, float]], unit: tuple[str, float]) -> str:
    """Rows of (what, seconds) with ratios to a unit."""
    name, base = unit
    lines = [title, f"  {'':44}{'seconds':>10}{'ratio to ' + name:>28}"]
    lines += [f"  {what:<44}{value:>10.3f}{value / base:>28.2f}" for what, value in rows]
    return "\n".join(lines)
