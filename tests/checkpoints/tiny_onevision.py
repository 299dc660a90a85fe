"""Tiny LLaVA-OneVision checkpoints on disk, in the files and the form in which the hub has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers.utils import is_torchvision_available

from tests.cases import IMAGE_TOKEN, build_hf
from tests.checkpoints.tiny import WORDS
from tests.onevision_cases import VIDEO_TOKEN, OnevisionCase
from veena_lens.checkpoints.image_only import ImageOnlyLlavaOnevisionProcessor

# Hugging Face's own needs torchvision, for videos.
PROCESSOR: Any = ImageOnlyLlavaOnevisionProcessor
if is_torchvision_available():
    PROCESSOR = transformers.LlavaOnevisionProcessor
SPECIAL = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "<video>": VIDEO_TOKEN, "<image>": IMAGE_TOKEN}
# As in the hub's files: images before videos before text, a line break before the text.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\\n' + content['text'] }}"
    "{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_processor(case: OnevisionCase, folder: Path, **settings: Any) -> Path:
    """The processor's files; `settings` change what the image processor's file says."""
    folder.mkdir(parents=True, exist_ok=True)
    config = case.config()
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    pictures = dict(
        do_convert_rgb=True,
        do_normalize=True,
        do_pad=True,
        do_rescale=True,
        do_resize=True,
        image_grid_pinpoints=config.image_grid_pinpoints,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        image_processor_type="LlavaOnevisionImageProcessor",
        processor_class="LlavaOnevisionProcessor",
        resample=3,
        rescale_factor=0.00392156862745098,
        size=dict(height=side, width=side),
    )
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures | settings))
    about = dict(
        image_token="<image>",
        num_image_tokens=(side // patch) ** 2,
        processor_class="LlavaOnevisionProcessor",
        video_token="<video>",
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        vision_aspect_ratio=config.vision_aspect_ratio,
    )
    (folder / "processor_config.json").write_text(json.dumps(about))
    vocab = dict(SPECIAL) | {word: 3 + i for i, word in enumerate([*WORDS, "user", "system", "assistant"])}
    taken = set(vocab.values())
    vocab |= {f"word{i}": i for i in range(128) if i not in taken}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<|endoftext|>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL])
    raw.save(str(folder / "tokenizer.json"))
    text = dict(
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        bos_token=None,
        eos_token="<|im_end|>",
        model_max_length=32768,
        pad_token="<|endoftext|>",
        padding_side="left",
        processor_class="LlavaOnevisionProcessor",
        tokenizer_class="PreTrainedTokenizerFast",
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(text))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder


def processor(case: OnevisionCase, folder: Path, **settings: Any) -> Any:
    """Hugging Face's own, where torchvision is missing without a reader of videos."""
    return PROCESSOR.from_pretrained(write_processor(case, folder, **settings))


def save(
    case: OnevisionCase,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    *,
    with_processor: bool = True,
    gain: float = 1.0,
    **options: Any,
) -> tuple[Any, Path]:
    """(the Hugging Face model, its folder) of a case; `options` go to `save_pretrained`."""
    model = build_hf(case, dtype, gain)
    model.save_pretrained(folder, **options)
    if with_processor:
        write_processor(case, folder)
    return model, folder
