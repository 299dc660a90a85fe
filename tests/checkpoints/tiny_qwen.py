"""Tiny Qwen-VL checkpoints on disk, in the files and the form in which the hub has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers.utils import is_torchvision_available

from tests.cases import build_hf
from tests.checkpoints.tiny import WORDS
from tests.qwen_cases import END, IMAGE, START, VIDEO, QwenCase
from veena_lens.checkpoints.image_only import (
    ImageOnlyQwen2_5_VLProcessor,
    ImageOnlyQwen2VLProcessor,
    ImageOnlyQwen3VLProcessor,
)

IMAGE_ONLY: dict[str, Any] = dict(
    qwen2_vl=ImageOnlyQwen2VLProcessor,
    qwen2_5_vl=ImageOnlyQwen2_5_VLProcessor,
    qwen3_vl=ImageOnlyQwen3VLProcessor,
)
NAMES = dict(qwen2_vl="Qwen2VL", qwen2_5_vl="Qwen2_5_VL", qwen3_vl="Qwen3VL")  # of Hugging Face's classes
# Hugging Face's own need torchvision, for videos.
CLASSES: dict[str, Any] = IMAGE_ONLY
if is_torchvision_available():
    CLASSES = {kind: getattr(transformers, f"{name}Processor") for kind, name in NAMES.items()}
SPECIAL = {
    "<|endoftext|>": 0,
    "<|im_start|>": 1,
    "<|im_end|>": 2,
    "<|image_pad|>": IMAGE,
    "<|video_pad|>": VIDEO,
    "<|vision_start|>": START,
    "<|vision_end|>": END,
}
SYSTEM = (
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nthis is a person .<|im_end|>\n{% endif %}"
)
# As in the hub's files, without the counting of images.
TEMPLATE = (
    "{% for message in messages %}SYSTEM<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = dict(qwen2_vl=TEMPLATE.replace("SYSTEM", SYSTEM), qwen3_vl=TEMPLATE.replace("SYSTEM", ""))
TEMPLATES["qwen2_5_vl"] = TEMPLATES["qwen2_vl"]


def pictures_config(case: QwenCase, **settings: Any) -> dict[str, Any]:
    """`preprocessor_config.json`: areas as two numbers (Qwen2-VL, Qwen2.5-VL) or as a size (Qwen3-VL)."""
    vision = case.config().vision_config
    factor = (vision.patch_size * vision.spatial_merge_size) ** 2
    common = dict(
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size,
    )
    if case.kind != "qwen3_vl":
        return (
            dict(
                min_pixels=factor * 2,
                max_pixels=factor * 30,
                image_mean=[0.48145466, 0.4578275, 0.40821073],
                image_std=[0.26862954, 0.26130258, 0.27577711],
                image_processor_type="Qwen2VLImageProcessor",
                processor_class=f"{NAMES[case.kind]}Processor",
                **common,
            )
            | settings
        )
    return (
        dict(
            size={"shortest_edge": factor * 2, "longest_edge": factor * 30},
            image_mean=[0.5, 0.5, 0.5],
            image_std=[0.5, 0.5, 0.5],
            image_processor_type="Qwen2VLImageProcessorFast",
            processor_class="Qwen3VLProcessor",
            **common,
        )
        | settings
    )


def write_processor(case: QwenCase, folder: Path, template: str | None = "", **settings: Any) -> Path:
    """The processor's files; `template` None writes none."""
    folder.mkdir(parents=True, exist_ok=True)
    template = TEMPLATES[case.kind] if template == "" else template
    pictures = pictures_config(case, **settings)
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    if case.kind == "qwen3_vl":
        video = {k: v for k, v in pictures.items() if k != "image_processor_type"}
        video |= dict(video_processor_type="Qwen3VLVideoProcessor")
        (folder / "video_preprocessor_config.json").write_text(json.dumps(video))
    vocab = dict(SPECIAL) | {word: 3 + i for i, word in enumerate([*WORDS, "user", "system", "assistant", "cat"])}
    taken = set(vocab.values())
    vocab |= {f"word{i}": i for i in range(128) if i not in taken}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<|endoftext|>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL])
    raw.save(str(folder / "tokenizer.json"))
    about = dict(
        add_prefix_space=False,
        additional_special_tokens=list(SPECIAL)[1:],
        bos_token=None,
        clean_up_tokenization_spaces=False,
        eos_token="<|im_end|>",
        errors="replace",
        model_max_length=32768,
        pad_token="<|endoftext|>",
        padding_side="left",
        split_special_tokens=False,
        tokenizer_class="PreTrainedTokenizerFast",
        unk_token=None,
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    if template is not None:
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    return folder


def processor(case: QwenCase, folder: Path, **settings: Any) -> Any:
    """Hugging Face's own, where torchvision is missing without videos."""
    return CLASSES[case.kind].from_pretrained(write_processor(case, folder, **settings))


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


def save(
    case: QwenCase,
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


def save_as_on_the_hub(case: QwenCase, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Path]:
    """As `save`, in the hub's form of 2024: a flat configuration and old names (Qwen2-VL, Qwen2.5-VL)."""
    assert case.kind != "qwen3_vl"
    model, folder = save(case, folder, dtype)
    tensors = {on_disk(k): v.contiguous() for k, v in model.state_dict().items()}
    if case.config().tie_word_embeddings:
        del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    text = model.config.text_config.to_dict()
    rope = text.pop("rope_parameters")
    flat = {
        k: text[k] for k in text if k not in ("model_type", "dtype", "layer_types", "architectures", "_name_or_path")
    }
    vision = model.config.vision_config
    flat |= dict(
        architectures=[case.model_class.__name__],
        model_type=case.kind,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        vision_token_id=124,
        rope_theta=rope["rope_theta"],
        rope_scaling=dict(type="mrope", mrope_section=rope["mrope_section"]),
        tie_word_embeddings=case.config().tie_word_embeddings,
        torch_dtype=str(dtype).removeprefix("torch."),
        vision_config=dict(
            depth=vision.depth,
            **{name: getattr(vision, name) for name in TOWER_FIELDS[case.kind]},
            num_heads=vision.num_heads,
            in_chans=3,
            patch_size=vision.patch_size,
            spatial_merge_size=vision.spatial_merge_size,
            spatial_patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
        ),
    )
    (folder / "config.json").write_text(json.dumps(flat))
    return model, folder
