"""Tiny checkpoints on disk: a case's model as Hugging Face writes it, with a small processor or tokenizer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.checkpoints.tiny_processors import WORDS, WRITERS, gemma_processor, gemma_tokenizer, write_json
from tests.families import Case, build_hf, tiny_tokenizer
from tests.odd_inputs import IMAGE_TOKEN

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
    config = case.config()
    return transformers.LlavaProcessor(
        image_processor=image_processor(config.vision_config.image_size, **settings),
        tokenizer=tokenizer(template),
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(config.vision_config.model_type == "clip_vision_model"),
        chat_template=template,
    )


def word_tokenizer() -> Any:
    """Words "w3" and on, split at "<image>" wherever it stands."""
    words = copy.deepcopy(tiny_tokenizer())
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return words


def next_processor(case: Case, words: Any = None) -> Any:
    """LLaVA-1.6's."""
    side = dict(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return transformers.LlavaNextProcessor(
        transformers.LlavaNextImageProcessorPil(**side, image_grid_pinpoints=case.config().image_grid_pinpoints),
        tokenizer(LLAVA_TEMPLATE) if words is None else words,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=LLAVA_TEMPLATE,
    )


def write_processor(case: Case, folder: Path, **settings: Any) -> Path:
    """The processor's or tokenizer's files of a case."""
    if case.family in WRITERS:
        return WRITERS[case.family](case, folder, **settings)
    found = dict(
        text=lambda: tokenizer(TEXT_TEMPLATE),
        llava=lambda: llava_processor(case, **settings),
    ) | {
        "llava-next": lambda: next_processor(case),
        "gemma3": lambda: gemma_processor(case, **settings),
        "gemma3-text": gemma_tokenizer,
    }
    found[case.family]().save_pretrained(folder)
    return folder


def save(
    case: Case,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    with_processor: bool = True,
    *,
    gain: float = 1.0,
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Any, Path]:
    """(the Hugging Face model, its folder) of a case; `options` are those of `save_pretrained`.

    Gemma's scale of embeddings is that of a model which is loaded in this dtype, not cast to it."""
    model = build_hf(case, dtype, gain)
    model.save_pretrained(folder, **options)
    if case.has("post norms"):
        scale = model.get_input_embeddings().embed_scale
        model.get_input_embeddings().embed_scale = torch.full_like(
            scale, model.get_input_embeddings().embedding_dim ** 0.5, dtype=dtype
        )
    if with_processor:
        write_processor(case, folder, **settings or {})
    return model, folder


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Rewrite a folder's tensors after `change(state)`, which edits the dictionary in place."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


TOWER_FIELDS = dict(
    qwen2_vl=("embed_dim", "mlp_ratio", "hidden_size"),
    qwen2_5_vl=(
        "hidden_act",
        "hidden_size",
        "intermediate_size",
        "out_hidden_size",
        "window_size",
        "fullatt_block_indexes",
        "tokens_per_second",
    ),
)


def on_disk(key: str) -> str:
    """The name that the hub's Qwen2-VL files have for today's."""
    return key.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def save_as_in_2024(case: Case, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Path]:
    """As `save`, in the hub's form of 2024: a flat configuration and old names (Qwen2-VL, Qwen2.5-VL)."""
    model, folder = save(case, folder, dtype)
    tensors = {on_disk(k): v.contiguous() for k, v in model.state_dict().items()}
    config = case.config()
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    text = model.config.text_config.to_dict()
    rope = text.pop("rope_parameters")
    today = ("model_type", "dtype", "layer_types", "architectures", "_name_or_path")
    flat = {k: text[k] for k in text if k not in today}
    vision = model.config.vision_config
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    flat |= {name: getattr(config, name) for name in ids}
    flat |= dict(
        architectures=[case.model_class.__name__],
        model_type=case.family,
        vision_token_id=124,
        rope_theta=rope["rope_theta"],
        rope_scaling=dict(type="mrope", mrope_section=rope["mrope_section"]),
        tie_word_embeddings=config.tie_word_embeddings,
        torch_dtype=str(dtype).removeprefix("torch."),
        vision_config=dict(
            depth=vision.depth,
            **{name: getattr(vision, name) for name in TOWER_FIELDS[case.family]},
            num_heads=vision.num_heads,
            in_chans=3,
            patch_size=vision.patch_size,
            spatial_merge_size=vision.spatial_merge_size,
            spatial_patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
        ),
    )
    write_json(folder / "config.json", flat)
    return model, folder


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    """Noise, so that every patch differs."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
