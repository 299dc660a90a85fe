"""Tiny Gemma-3 checkpoints on disk, with Gemma's own processor: its placeholder is not the token that images fill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from tests.cases import build_hf
from tests.checkpoints.tiny import WORDS
from tests.gemma_cases import END, IMAGE, START, GemmaCase

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn> ' + m['role'] + ' ' }}{% if m['content'] is string %}"
    "{{ m['content'] }}{% else %}{% for p in m['content'] %}"
    "{{ '<start_of_image>' if p['type'] == 'image' else p['text'] }}{% endfor %}{% endif %}"
    "{{ ' <end_of_turn> ' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn> model ' }}{% endif %}"
)
NAMES = {START: "<start_of_image>", END: "<end_of_image>", IMAGE: "<image_soft_token>"}


def tokenizer() -> Any:
    """Words, the cases' image tokens at their ids, and a BOS token of its own accord."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {w: 4 + i for i, w in enumerate(WORDS)}
    vocab |= {w: len(vocab) + i for i, w in enumerate(["<start_of_turn>", "<end_of_turn>", "user", "model"])}
    vocab |= {NAMES.get(i, f"word{i}"): i for i in range(len(vocab), IMAGE + 1)}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=dict(boi_token=NAMES[START], eoi_token=NAMES[END], image_token=NAMES[IMAGE]),
        chat_template=TEMPLATE,
    )


def processor(case: GemmaCase, **settings: Any) -> Any:
    """A processor that counts image tokens as the case's model does."""
    assert case.tokens is not None
    side = case.config().vision_config.image_size
    return transformers.Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size={"height": side, "width": side}, **settings),
        tokenizer=tokenizer(),
        chat_template=TEMPLATE,
        image_seq_length=case.tokens,
    )


def save(
    case: GemmaCase, folder: Path, dtype: torch.dtype = torch.float32, with_processor: bool = True, **options: Any
) -> tuple[Any, Path]:
    """(the Hugging Face model, its folder) of a case; `options` go to `save_pretrained`."""
    model = build_hf(case, dtype)
    model.save_pretrained(folder, **options)
    if with_processor:
        (tokenizer() if case.tokens is None else processor(case)).save_pretrained(folder)
    return model, folder
