"""The processors of tiny checkpoints, in the files and the form in which the hub has them: Gemma's, OneVision's, Qwen's
and Idefics3's."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import transformers
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.utils import is_torchvision_available

from tests.families import Case
from tests.odd_inputs import (
    FAKE,
    FIRST_TILE,
    GEMMA_END,
    GEMMA_START,
    IMAGE_TOKEN,
    NEWLINE,
    QWEN_END,
    QWEN_IMAGE,
    QWEN_START,
    QWEN_VIDEO,
    VIDEO_TOKEN,
    WHOLE,
    tile_tokens,
)
from veena_lens.checkpoints import image_only

WORDS = ["how", "does", "this", "person", "feel", "?", "happy", "sad", "the", "a", "is", "in", "first", "second"]
WORDS += ["USER", ":", "ASSISTANT", "says", "INST", "/", "[", "]", ".", "what", "who"]
# Of Hugging Face's classes; its own processors need torchvision, for videos.
NAMES = dict(qwen2_vl="Qwen2VL", qwen2_5_vl="Qwen2_5_VL", qwen3_vl="Qwen3VL", onevision="LlavaOnevision")
NAMES |= dict(idefics3="Idefics3", smolvlm="SmolVLM")
IMAGE_ONLY: dict[str, Any] = {
    family: getattr(image_only, f"ImageOnly{name}Processor") for family, name in NAMES.items() if family != "idefics3"
}
CLASSES: dict[str, Any] = IMAGE_ONLY
if is_torchvision_available():
    CLASSES = {family: getattr(transformers, f"{NAMES[family]}Processor") for family in IMAGE_ONLY}


def video_class(family: str) -> str:
    """Hugging Face's processor of videos (Qwen2.5-VL shares Qwen2-VL's)."""
    return f"Qwen{family[4]}VLVideoProcessor"


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value))


def write_template(folder: Path, template: str | None) -> None:
    if template is not None:
        write_json(folder / "chat_template.json", {"chat_template": template})


def hub_tokenizer(special: Mapping[str, int], words: list[str]) -> Tokenizer:
    """Words and punctuation; every id under 128 has its word."""
    vocab = dict(special) | {word: 3 + i for i, word in enumerate([*WORDS, *words])}
    taken = set(vocab.values())
    vocab |= {f"word{i}": i for i in range(128) if i not in taken}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<|endoftext|>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    return raw


# --- Gemma-3: its placeholder is not the token that images fill ---------------------------------------------
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn> ' + m['role'] + ' ' }}{% if m['content'] is string %}"
    "{{ m['content'] }}{% else %}{% for p in m['content'] %}"
    "{{ '<start_of_image>' if p['type'] == 'image' else p['text'] }}{% endfor %}{% endif %}"
    "{{ ' <end_of_turn> ' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn> model ' }}{% endif %}"
)
GEMMA_NAMES = {GEMMA_START: "<start_of_image>", GEMMA_END: "<end_of_image>", IMAGE_TOKEN: "<image_soft_token>"}


def gemma_tokenizer() -> Any:
    """Words, the cases' image tokens at their ids, and a BOS token of its own accord."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {w: 4 + i for i, w in enumerate(WORDS)}
    vocab |= {w: len(vocab) + i for i, w in enumerate(["<start_of_turn>", "<end_of_turn>", "user", "model"])}
    vocab |= {GEMMA_NAMES.get(i, f"word{i}"): i for i in range(len(vocab), IMAGE_TOKEN + 1)}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=dict(
            boi_token=GEMMA_NAMES[GEMMA_START], eoi_token=GEMMA_NAMES[GEMMA_END], image_token=GEMMA_NAMES[IMAGE_TOKEN]
        ),
        chat_template=GEMMA_TEMPLATE,
    )


def gemma_processor(case: Case, **settings: Any) -> Any:
    """A processor that counts image tokens as the case's model does."""
    config = case.config()
    side = config.vision_config.image_size
    return transformers.Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size={"height": side, "width": side}, **settings),
        tokenizer=gemma_tokenizer(),
        chat_template=GEMMA_TEMPLATE,
        image_seq_length=config.mm_tokens_per_image,
    )


# --- OneVision ----------------------------------------------------------------------------------------------
ONEVISION_SPECIAL = {
    "<|endoftext|>": 0,
    "<|im_start|>": 1,
    "<|im_end|>": 2,
    "<video>": VIDEO_TOKEN,
    "<image>": IMAGE_TOKEN,
}
# As in the hub's files: images before videos before text, a line break before the text.
ONEVISION_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\\n' + content['text'] }}"
    "{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_onevision(case: Case, folder: Path, **settings: Any) -> Path:
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
    write_json(folder / "preprocessor_config.json", pictures | settings)
    about = dict(
        image_token="<image>",
        num_image_tokens=(side // patch) ** 2,
        processor_class="LlavaOnevisionProcessor",
        video_token="<video>",
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        vision_aspect_ratio=config.vision_aspect_ratio,
    )
    write_json(folder / "processor_config.json", about)
    tokenizer = hub_tokenizer(ONEVISION_SPECIAL, ["user", "system", "assistant"])
    tokenizer.save(str(folder / "tokenizer.json"))
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
    write_json(folder / "tokenizer_config.json", text)
    write_template(folder, ONEVISION_TEMPLATE)
    return folder


# --- Qwen ---------------------------------------------------------------------------------------------------
QWEN_SPECIAL = {
    "<|endoftext|>": 0,
    "<|im_start|>": 1,
    "<|im_end|>": 2,
    "<|image_pad|>": QWEN_IMAGE,
    "<|video_pad|>": QWEN_VIDEO,
    "<|vision_start|>": QWEN_START,
    "<|vision_end|>": QWEN_END,
}
SYSTEM = (
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nthis is a person .<|im_end|>\n{% endif %}"
)
# As in the hub's files, without the counting of images.
QWEN_TEMPLATE = (
    "{% for message in messages %}SYSTEM<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_TEMPLATES = dict(qwen2_vl=QWEN_TEMPLATE.replace("SYSTEM", SYSTEM), qwen3_vl=QWEN_TEMPLATE.replace("SYSTEM", ""))
QWEN_TEMPLATES["qwen2_5_vl"] = QWEN_TEMPLATES["qwen2_vl"]


def pictures_config(case: Case, **settings: Any) -> dict[str, Any]:
    """`preprocessor_config.json`: areas as two numbers (Qwen2-VL, Qwen2.5-VL) or as a size (Qwen3-VL)."""
    vision = case.config().vision_config
    factor = (vision.patch_size * vision.spatial_merge_size) ** 2
    common: dict[str, Any] = dict(
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size,
    )
    if case.family == "qwen3_vl":
        common |= dict(size={"shortest_edge": factor * 2, "longest_edge": factor * 30})
        common |= dict(image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5])
        common |= dict(image_processor_type="Qwen2VLImageProcessorFast")
    else:
        common |= dict(min_pixels=factor * 2, max_pixels=factor * 30)
        common |= dict(image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711])
        common |= dict(image_processor_type="Qwen2VLImageProcessor")
    return common | dict(processor_class=f"{NAMES[case.family]}Processor") | settings


def write_qwen(case: Case, folder: Path, template: str | None = "", **settings: Any) -> Path:
    """The processor's files; `template` None writes none."""
    folder.mkdir(parents=True, exist_ok=True)
    template = QWEN_TEMPLATES[case.family] if template == "" else template
    pictures = pictures_config(case, **settings)
    write_json(folder / "preprocessor_config.json", pictures)
    if case.family == "qwen3_vl":
        video = {k: v for k, v in pictures.items() if k != "image_processor_type"}
        video |= dict(video_processor_type="Qwen3VLVideoProcessor")
        write_json(folder / "video_preprocessor_config.json", video)
    tokenizer = hub_tokenizer(QWEN_SPECIAL, ["user", "system", "assistant", "cat"])
    tokenizer.save(str(folder / "tokenizer.json"))
    about = dict(
        add_prefix_space=False,
        additional_special_tokens=list(QWEN_SPECIAL)[1:],
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
    write_json(folder / "tokenizer_config.json", about)
    write_template(folder, template)
    return folder


# --- Idefics3 and SmolVLM -----------------------------------------------------------------------------------
TILE_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'] is string %}{{ ': ' + message['content'] }}{% else %}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}{% endif %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
TILE_NAMES = {f"<row_{r + 1}_col_{c + 1}>": FIRST_TILE + 4 * r + c for r in range(3) for c in range(4)}
TILE_SPECIAL = {"<|endoftext|>": 0, "<|im_start|>": 1, "<end_of_utterance>": 2, "<fake_token_around_image>": FAKE}
TILE_SPECIAL |= {"<image>": IMAGE_TOKEN}


def tile_tokenizer(has_names: bool = True) -> Tokenizer:
    """Words, line breaks and punctuation. Without `has_names` a tile's name is several tokens, as in the first of the
    hub's checkpoints; a double line break is one token, as it is there."""
    special = TILE_SPECIAL | ({"<global-img>": WHOLE} | TILE_NAMES if has_names else {})
    pieces = ["<", ">", "-", "global", "img", *(f"{x}_{i}" for x in ("row", "col") for i in (1, 2, 3, 4)), "_"]
    vocab = special | {"\n": NEWLINE, "\n\n": NEWLINE + 2}
    free = [i for i in range(3, 127) if i not in vocab.values()]
    words = [*dict.fromkeys([*pieces, *WORDS, "User", "Assistant", "cat", "video"])]
    vocab |= dict(zip(words, free, strict=False))
    vocab |= {f"word{i}": i for i in free[len(words) :]}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<|endoftext|>"))
    raw.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"\n\n|\n|(row|col)_\d|[a-zA-Z0-9]+|[^\w\s]|_"), "removed", invert=True
    )
    raw.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    return raw


def write_tiles(
    case: Case, folder: Path, template: str | None = TILE_TEMPLATE, has_names: bool = True, **settings: Any
) -> Path:
    """The processor's files; `template` None writes none. `settings` change those of images."""
    folder.mkdir(parents=True, exist_ok=True)
    config, name = case.config(), NAMES[case.family]
    side = config.vision_config.image_size
    pictures: dict[str, Any] = dict(
        do_convert_rgb=True,
        do_image_splitting=True,
        do_normalize=True,
        do_pad=True,
        do_rescale=True,
        do_resize=True,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        image_processor_type=f"{name}ImageProcessor",
        max_image_size={"longest_edge": side},
        processor_class=f"{name}Processor",
        resample=1,
        rescale_factor=1 / 255,
        size={"longest_edge": 3 * side},
    )
    write_json(folder / "preprocessor_config.json", pictures | settings)
    own = dict(processor_class=f"{name}Processor", image_seq_len=tile_tokens(config))
    write_json(folder / "processor_config.json", own)
    tile_tokenizer(has_names).save(str(folder / "tokenizer.json"))
    about = dict(
        additional_special_tokens=["<fake_token_around_image>", "<image>", "<end_of_utterance>"],
        bos_token="<|im_start|>",
        clean_up_tokenization_spaces=False,
        eos_token="<end_of_utterance>",
        model_max_length=8192,
        pad_token="<|endoftext|>",
        processor_class=f"{name}Processor",
        tokenizer_class="PreTrainedTokenizerFast",
        truncation_side="left",
        unk_token="<|endoftext|>",
    )
    write_json(folder / "tokenizer_config.json", about)
    write_template(folder, template)
    return folder


WRITERS: dict[str, Callable[..., Path]] = dict(
    onevision=write_onevision,
    qwen2_vl=write_qwen,
    qwen2_5_vl=write_qwen,
    qwen3_vl=write_qwen,
    idefics3=write_tiles,
    smolvlm=write_tiles,
)


def processor(case: Case, folder: Path, **settings: Any) -> Any:
    """Hugging Face's own, where torchvision is missing without videos."""
    return CLASSES[case.family].from_pretrained(WRITERS[case.family](case, folder, **settings))
