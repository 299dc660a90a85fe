"""Tiny checkpoints on disk: a case's model as Hugging Face writes it, with a small processor or tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.cases import IMAGE_TOKEN, Case, build_hf

WORDS = ["how", "does", "this", "person", "feel", "?", "happy", "sad", "the", "a", "is", "in", "first", "second"]
WORDS += ["USER", ":", "ASSISTANT", "says", "INST", "/", "[", "]", ".", "what", "who"]
LLAVA_TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for p in m['content'] %}{{ '<image> ' if p['type'] == 'image' else p['text'] }}{% endfor %}"
    "{% endif %} {% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
TEXT_TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endfor %}"


def tokenizer(template: str | None = None, padding_side: str = "right") -> Any:
    """Words and punctuation, `<image>` at the cases' image token id, a BOS token of its own accord."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {w: 4 + i for i, w in enumerate(WORDS)}
    vocab |= {f"word{i}": i for i in range(len(vocab), IMAGE_TOKEN)} | {"<image>": IMAGE_TOKEN}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side=padding_side,
        chat_template=template,
    )


def image_processor(side: int = 28, **settings: Any) -> Any:
    """CLIP's: the shortest edge resized, the centre cropped."""
    sizes = dict(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return CLIPImageProcessorPil(**(sizes | settings))


def llava_processor(case: Case, template: str | None = LLAVA_TEMPLATE, **settings: Any) -> Any:
    """A processor that counts image tokens as the case's model does."""
    strategy = case.llava.get("vision_feature_select_strategy", "default")
    return transformers.LlavaProcessor(
        image_processor=image_processor(case.image_size, **settings),
        tokenizer=tokenizer(template),
        patch_size=case.vision.get("patch_size", 14),
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(case.tower == "clip"),
        chat_template=template,
    )


def save(
    case: Case, folder: Path, dtype: torch.dtype = torch.float32, processor: bool = True, **options: Any
) -> tuple[Any, Path]:
    """(the Hugging Face model, its folder) of a case; `options` go to `save_pretrained`."""
    model = build_hf(case, dtype)
    model.save_pretrained(folder, **options)
    if processor:
        (tokenizer(TEXT_TEMPLATE) if case.text_only() else llava_processor(case)).save_pretrained(folder)
    return model, folder


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    """Noise, so that every patch differs."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
