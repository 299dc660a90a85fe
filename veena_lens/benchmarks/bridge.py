"""transformer_lens's TransformerBridge on the same weights, with the picture in every call.

Its patching functions pass bare tokens on, and the bridge then runs without the picture and says nothing. So it is
wrapped: every forward, cached or hooked, gets the pixels that belong to the tokens.
"""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import torch
from torch import Tensor


def bridge_of(hf: Any) -> Any:
    """A bridge over a copy of a Hugging Face LLaVA (its attention is eager: that is what its hooks need)."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformer_lens.model_bridge.sources.transformers.source import boot
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    theirs = copy.deepcopy(hf)
    theirs.set_attn_implementation("eager")
    theirs.config.architectures = [type(hf).__name__]
    words = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1}, unk_token="<unk>"))
    plain = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<unk>", bos_token="<s>", eos_token="<s>")
    with tempfile.TemporaryDirectory() as folder:
        plain.save_pretrained(folder)
        theirs.config.save_pretrained(folder)  # asked for by name, though the model is given
        tokenizer = AutoTokenizer.from_pretrained(folder)
        bridge = boot(folder, hf_model=theirs, tokenizer=tokenizer, dtype=torch.float32, device="cpu")
    return bridge.eval()


class WithPicture:
    """What `transformer_lens.patching` asks of a model, the picture added to every call."""

    def __init__(self, bridge: Any, pixels: Tensor) -> None:
        self.bridge, self.pixels, self.cfg = bridge, pixels, bridge.cfg

    def __call__(self, tokens: Tensor, **options: Any) -> Tensor:
        return self.bridge(tokens, pixel_values=self.pixels, **options)

    def run_with_hooks(self, tokens: Tensor, **options: Any) -> Tensor:
        return self.bridge.run_with_hooks(tokens, pixel_values=self.pixels, **options)

    def run_with_cache(self, tokens: Tensor, **options: Any) -> Any:
        return self.bridge.run_with_cache(tokens, pixel_values=self.pixels, **options)

    def eval(self) -> WithPicture:
        return self
