"""Build a random LLaVA of medium size in Hugging Face, here and in TransformerBridge, on the same weights.

transformer_lens's patching functions pass bare tokens on, and the bridge then silently runs without the image. It is
therefore wrapped: every call, cached or hooked, gets the pixels that belong to the tokens.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor


def bridge_of(hf: Any) -> Any:
    """Return a bridge over a copy of a Hugging Face LLaVA, with eager attention, which its hooks need."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformer_lens.model_bridge.sources.transformers import helpers
    from transformer_lens.model_bridge.sources.transformers.source import boot
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    theirs = copy.deepcopy(hf)
    theirs.set_attn_implementation("eager")
    theirs.config.architectures = [type(hf).__name__]
    words = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1}, unk_token="<unk>"))
    plain = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<unk>", bos_token="<s>", eos_token="<s>")
    with tempfile.TemporaryDirectory() as folder:
        plain.save_pretrained(folder)
        theirs.config.save_pretrained(folder)  # the bridge reads it by name although the model is given
        tokenizer = AutoTokenizer.from_pretrained(folder)
        # Without torchvision the bridge would install it with pip, and another torch along with it.
        with mock.patch.object(helpers, "_ensure_torchvision", return_value=False):
            bridge = boot(folder, hf_model=theirs, tokenizer=tokenizer, dtype=torch.float32, device="cpu")
    return bridge.eval()


class WithImage:
    """Provide what `transformer_lens.patching` needs of a model, with the image added to every call."""

    def __init__(self, bridge: Any, pixels: Tensor) -> None:
        self.bridge, self.pixels, self.cfg = bridge, pixels, bridge.cfg

    def __call__(self, tokens: Tensor, **options: Any) -> Tensor:
        return self.bridge(tokens, pixel_values=self.pixels, **options)

    def run_with_hooks(self, tokens: Tensor, **options: Any) -> Tensor:
        return self.bridge.run_with_hooks(tokens, pixel_values=self.pixels, **options)

    def run_with_cache(self, tokens: Tensor, **options: Any) -> Any:
        return self.bridge.run_with_cache(tokens, pixel_values=self.pixels, **options)

    def eval(self) -> WithImage:
        return self


IMAGE_TOKEN = 999


def random_llava(n_layers: int = 16, d_model: int = 512, n_heads: int = 8) -> tuple[Any, Any]:
    """Return (Hugging Face model, native model) with shared storage: 576 image tokens, two tower layers, float32."""
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
    """Return the tensors of one prompt: text, 576 image tokens, text; the image depends on the seed."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 990, (1, n_tokens), generator=torch.Generator().manual_seed(1))
    ids[0, 5:581] = IMAGE_TOKEN
    pixels = torch.randn(1, 3, 336, 336, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def seconds(run: Callable[[], Any], repeats: int = 3) -> float:
    """Return the median time of a call after one warm-up, without gradients."""
    with torch.no_grad():
        run()
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def table(title: str, rows: list[tuple[str, float]], unit: tuple[str, float]) -> str:
    """Format rows of (name, seconds) with ratios to a unit."""
    name, base = unit
    lines = [title, f"  {'':44}{'seconds':>10}{'ratio to ' + name:>28}"]
    lines += [f"  {what:<44}{value:>10.3f}{value / base:>28.2f}" for what, value in rows]
    return "\n".join(lines)
