"""Tiny Idefics3 and SmolVLM checkpoints on disk, in the files and the form in which the hub has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

from tests.cases import build_hf
from tests.checkpoints.tiny import WORDS
from tests.tile_cases import FAKE, FIRST_TILE, IMAGE, NEWLINE, WHOLE, TileCase

TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'] is string %}{{ ': ' + message['content'] }}{% else %}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}{% endif %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
NAMES = {f"<row_{r + 1}_col_{c + 1}>": FIRST_TILE + 4 * r + c for r in range(3) for c in range(4)}
SPECIAL = {"<|endoftext|>": 0, "<|im_start|>": 1, "<end_of_utterance>": 2, "<fake_token_around_image>": FAKE}
SPECIAL |= {"<image>": IMAGE}
CLASSES = dict(idefics3="Idefics3", smolvlm="SmolVLM")


def tokenizer_of(has_names: bool = True) -> Tokenizer:
    """Words, line breaks and punctuation. Without `has_names` a tile's name is several tokens, as in the first of the
    hub's checkpoints; a double line break is one token, as it is there."""
    special = SPECIAL | ({"<global-img>": WHOLE} | NAMES if has_names else {})
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


def write_processor(
    case: TileCase, folder: Path, template: str | None = TEMPLATE, has_names: bool = True, **settings: Any
) -> Path:
    """The processor's files; `template` None writes none. `settings` change those of images."""
    folder.mkdir(parents=True, exist_ok=True)
    side = case.config().vision_config.image_size
    kind = CLASSES[case.kind]
    pictures: dict[str, Any] = dict(
        do_convert_rgb=True,
        do_image_splitting=True,
        do_normalize=True,
        do_pad=True,
        do_rescale=True,
        do_resize=True,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        image_processor_type=f"{kind}ImageProcessor",
        max_image_size={"longest_edge": side},
        processor_class=f"{kind}Processor",
        resample=1,
        rescale_factor=1 / 255,
        size={"longest_edge": 3 * side},
    )
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures | settings))
    own = dict(processor_class=f"{kind}Processor", image_seq_len=case.tile_tokens)
    (folder / "processor_config.json").write_text(json.dumps(own))
    tokenizer_of(has_names).save(str(folder / "tokenizer.json"))
    about = dict(
        additional_special_tokens=["<fake_token_around_image>", "<image>", "<end_of_utterance>"],
        bos_token="<|im_start|>",
        clean_up_tokenization_spaces=False,
        eos_token="<end_of_utterance>",
        model_max_length=8192,
        pad_token="<|endoftext|>",
        processor_class=f"{kind}Processor",
        tokenizer_class="PreTrainedTokenizerFast",
        truncation_side="left",
        unk_token="<|endoftext|>",
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    if template is not None:
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    return folder


def save(
    case: TileCase,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    *,
    with_processor: bool = True,
    has_names: bool = True,
    gain: float = 1.0,
    **options: Any,
) -> tuple[Any, Path]:
    """(the Hugging Face model, its folder) of a case; `options` go to `save_pretrained`."""
    model = build_hf(case, dtype, gain)
    model.save_pretrained(folder, **options)
    if with_processor:
        write_processor(case, folder, has_names=has_names)
    return model, folder
