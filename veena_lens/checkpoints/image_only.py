"""Processors for images and text alone, for where torchvision is missing.

Their video part needs torchvision, and Hugging Face's classes cannot be built without it. Leaving the part out of the
constructor's signature is enough, since `ProcessorMixin` reads there which parts a processor has: images, text and
the expansion of image tokens stay Hugging Face's own code. Folders are read and written under the names of the full
classes, so they load anywhere.

The constructors are kept out of runtime type checks: `from_pretrained` reads the names of their arguments from the
function's own code and drops those it does not find, which a checking wrapper would hide.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, no_type_check

import torch
from transformers.image_processing_utils import BatchFeature
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor
from transformers.processing_utils import ProcessorMixin
from transformers.video_utils import make_batched_videos

from veena_lens.images.files import pair_of

__all__ = [
    "ImageOnlyLlavaOnevisionProcessor",
    "ImageOnlyQwen2VLProcessor",
    "ImageOnlyQwen2_5_VLProcessor",
    "ImageOnlyQwen3VLProcessor",
    "ImageOnlySmolVLMProcessor",
]

SMOLVLM_TOKENS = {
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
    "video_token": "<video>",  # stands for no token: a video is written as frames
}


def _set_token(processor: Any, tokenizer: Any, kind: str, default: str) -> None:
    """`{kind}_token` and `{kind}_token_id`, from the tokenizer where it has them."""
    token = getattr(tokenizer, f"{kind}_token", None) or default
    setattr(processor, f"{kind}_token", token)
    setattr(processor, f"{kind}_token_id", tokenizer.convert_tokens_to_ids(token))


def _save_under(name: str, processor: Any, folder: str | Path, **own: Any) -> None:
    """Write a real folder's files and class names: `preprocessor_config.json`, and a `processor_config.json` for the
    processor's own settings alone, where it has any."""
    folder = Path(folder)
    pictures = folder / "preprocessor_config.json"
    processor.image_processor.save_pretrained(folder)
    # Some versions put a lone image processor into `processor_config.json` instead.
    joint = folder / "processor_config.json"
    kept = json.loads((pictures if pictures.exists() else joint).read_text(encoding="utf-8"))
    kept = kept.get("image_processor", kept)
    kept["image_processor_type"] = kept["image_processor_type"].removesuffix("Pil")
    kept["processor_class"] = name
    pictures.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    joint.unlink(missing_ok=True)
    if own:
        joint.write_text(json.dumps(own | {"processor_class": name}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    text = folder / "tokenizer_config.json"
    told = json.loads(text.read_text(encoding="utf-8")) | {"processor_class": name}
    text.write_text(json.dumps(told, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class _SavedAsFull:
    """Mixin of a class `ImageOnlyX`: it writes the folder that X reads, with its `own_settings`."""

    own_settings: tuple[str, ...] = ()

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Write the folder that the full class reads."""
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)  # type: ignore[misc]
        own = {name: getattr(self, name) for name in self.own_settings}
        _save_under(type(self).__name__.removeprefix("ImageOnly"), self, save_directory, **own)


class ImageOnlyQwen2VLProcessor(_SavedAsFull, Qwen2VLProcessor):
    """`Qwen2VLProcessor` without videos."""

    @no_type_check
    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **kwargs: Any
    ) -> None:
        _set_token(self, tokenizer, "image", "<|image_pad|>")
        _set_token(self, tokenizer, "video", "<|video_pad|>")
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


class ImageOnlyQwen2_5_VLProcessor(_SavedAsFull, Qwen2_5_VLProcessor):
    """`Qwen2_5_VLProcessor` without videos."""

    @no_type_check
    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **kwargs: Any
    ) -> None:
        ImageOnlyQwen2VLProcessor.__init__(self, image_processor, tokenizer, chat_template)


class ImageOnlyQwen3VLProcessor(_SavedAsFull, Qwen3VLProcessor):
    """`Qwen3VLProcessor` without videos."""

    @no_type_check
    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **kwargs: Any
    ) -> None:
        _set_token(self, tokenizer, "image", "<|image_pad|>")
        _set_token(self, tokenizer, "video", "<|video_pad|>")
        _set_token(self, tokenizer, "vision_start", "<|vision_start|>")
        _set_token(self, tokenizer, "vision_end", "<|vision_end|>")
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


class ImageOnlySmolVLMProcessor(_SavedAsFull, SmolVLMProcessor):
    """`SmolVLMProcessor` without videos, and without the package that spells out the number of their frames."""

    own_settings = ("image_seq_len",)

    @no_type_check
    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_seq_len: int = 169,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        _set_token(self, tokenizer, "image", "<image>")
        for name, default in SMOLVLM_TOKENS.items():
            setattr(self, name, getattr(tokenizer, name, None) or default)
        self.image_seq_len = image_seq_len
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """As every processor's; `SmolVLMProcessor`'s own adds settings of the video part."""
        return ProcessorMixin.apply_chat_template(self, conversation, chat_template, **kwargs)


class ImageOnlyLlavaOnevisionProcessor(_SavedAsFull, LlavaOnevisionProcessor):
    """`LlavaOnevisionProcessor` without a reader of videos; lists of frames are taken as `videos=`."""

    own_settings = (
        "num_image_tokens",
        "vision_feature_select_strategy",
        "vision_aspect_ratio",
        "image_token",
        "video_token",
    )

    @no_type_check
    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_image_tokens: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        video_token: str = "<video>",
        vision_aspect_ratio: str = "anyres_max_9",
        **kwargs: Any,
    ) -> None:
        self.num_image_tokens = num_image_tokens
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.vision_aspect_ratio = vision_aspect_ratio
        _set_token(self, tokenizer, "image", image_token)
        _set_token(self, tokenizer, "video", video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    @property
    def video_processor(self) -> Any:
        """Videos of frames (PIL images or arrays) -> their pixels [video frame channel height width].

        A frame is made as the whole view of an image is: Pillow's resampling, where the full class has
        torchvision's."""
        width, height = pair_of(self.image_processor.size)

        def process(videos: Any, **kwargs: Any) -> BatchFeature:
            whole = [
                self.image_processor(list(frames), image_grid_pinpoints=[[height, width]], return_tensors="pt")
                for frames in make_batched_videos(videos)
            ]
            numbers = {len(one["pixel_values"]) for one in whole}
            if len(numbers) > 1:
                raise ValueError(f"Videos of one batch have the same number of frames, not {sorted(numbers)}.")
            return BatchFeature({"pixel_values_videos": torch.stack([one["pixel_values"][:, 0] for one in whole])})

        return process
