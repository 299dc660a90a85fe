"""Processors for images and text alone, for where torchvision is missing.

The video part of Hugging Face's classes needs torchvision, and they cannot be built without it. Leaving the part out of
the constructor's signature is enough, since `ProcessorMixin` reads there which parts a processor has: images, text and
the expansion of image tokens remain Hugging Face's own code. Folders are read and written under the names of the full
classes, so they load anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, no_type_check

import torch
from transformers.image_processing_utils import BatchFeature
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor
from transformers.processing_utils import ProcessorMixin
from transformers.video_utils import make_batched_videos

from veena_lens.images.fixed import pair_of

__all__ = [
    "ImageOnlyLlavaOnevisionProcessor",
    "ImageOnlyQwen2VLProcessor",
    "ImageOnlyQwen2_5_VLProcessor",
    "ImageOnlyQwen3VLProcessor",
    "ImageOnlySmolVLMProcessor",
]


class _ImageOnly:
    """Mixin of a class `ImageOnlyX`: X without videos, built from an image processor and a tokenizer.

    special_tokens: kinds of special tokens, each with the text to use if the tokenizer names none; the processor gets
    `{kind}_token` and `{kind}_token_id`. written_tokens: the same for tokens that it only writes, whose ids it does not
    have. own_settings: further settings of X with their defaults.
    """

    special_tokens: dict[str, str] = {}
    written_tokens: dict[str, str] = {}
    own_settings: dict[str, Any] = {}

    # No runtime type check: `from_pretrained` reads the names of the arguments from the function's code and drops all
    # others, which a checking wrapper would hide. So the settings of every class are named here.
    @no_type_check
    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_seq_len: int | None = None,
        num_image_tokens: int | None = None,
        vision_feature_select_strategy: str | None = None,
        vision_aspect_ratio: str | None = None,
        image_token: str | None = None,
        video_token: str | None = None,
        **kwargs: Any,
    ) -> None:
        given = {name: value for name, value in locals().items() if value is not None}
        settings = {name: given.get(name, default) for name, default in self.own_settings.items()}
        for name, value in settings.items():
            setattr(self, name, value)
        for kind, default in (self.special_tokens | self.written_tokens).items():
            name = f"{kind}_token"
            token = getattr(tokenizer, name, None) or settings.get(name, default)
            setattr(self, name, token)
            if kind in self.special_tokens:
                setattr(self, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Write the folder that the full class reads: `preprocessor_config.json`, and a `processor_config.json` for the
        processor's own settings alone, where it has any."""
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)  # type: ignore[misc]
        folder, of_class = Path(save_directory), {"processor_class": type(self).__name__.removeprefix("ImageOnly")}
        image, joint, text = (folder / f"{part}_config.json" for part in ("preprocessor", "processor", "tokenizer"))
        cast(Any, self).image_processor.save_pretrained(folder)
        # Some versions put a lone image processor into `processor_config.json` instead.
        kept = json.loads((image if image.exists() else joint).read_text(encoding="utf-8"))
        kept = kept.get("image_processor", kept)
        kept["image_processor_type"] = kept["image_processor_type"].removesuffix("Pil")
        _write(image, kept | of_class)
        joint.unlink(missing_ok=True)
        if self.own_settings:
            _write(joint, {name: getattr(self, name) for name in self.own_settings} | of_class)
        _write(text, json.loads(text.read_text(encoding="utf-8")) | of_class)


def _write(path: Path, settings: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


QWEN_TOKENS = {"image": "<|image_pad|>", "video": "<|video_pad|>"}


class ImageOnlyQwen2VLProcessor(_ImageOnly, Qwen2VLProcessor):
    """`Qwen2VLProcessor` without videos."""

    special_tokens = QWEN_TOKENS


class ImageOnlyQwen2_5_VLProcessor(_ImageOnly, Qwen2_5_VLProcessor):
    """`Qwen2_5_VLProcessor` without videos."""

    special_tokens = QWEN_TOKENS


class ImageOnlyQwen3VLProcessor(_ImageOnly, Qwen3VLProcessor):
    """`Qwen3VLProcessor` without videos."""

    special_tokens = QWEN_TOKENS | {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}


class ImageOnlySmolVLMProcessor(_ImageOnly, SmolVLMProcessor):
    """`SmolVLMProcessor` without videos, and without the package that spells out the number of their frames."""

    own_settings = {"image_seq_len": 169}
    special_tokens = {"image": "<image>"}
    written_tokens = {
        "fake_image": "<fake_token_around_image>",
        "global_image": "<global-img>",
        "end_of_utterance": "<end_of_utterance>",
        "video": "<video>",  # stands for no token: a video is written as frames
    }

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Apply the template as every processor does; `SmolVLMProcessor`'s own adds settings of the video part."""
        return ProcessorMixin.apply_chat_template(self, conversation, chat_template, **kwargs)


class ImageOnlyLlavaOnevisionProcessor(_ImageOnly, LlavaOnevisionProcessor):
    """`LlavaOnevisionProcessor` without a reader of videos; lists of frames are taken as `videos=`."""

    own_settings = {
        "num_image_tokens": None,
        "vision_feature_select_strategy": None,
        "vision_aspect_ratio": "anyres_max_9",
        "image_token": "<image>",
        "video_token": "<video>",
    }
    special_tokens = {"image": "<image>", "video": "<video>"}

    @property
    def video_processor(self) -> Any:
        """Return a function from videos of frames (PIL images or arrays) to their pixels [video frame channel height
        width].

        A frame is processed like the whole view of an image, with Pillow's resampling instead of torchvision's.
        """
        width, height = pair_of(self.image_processor.size)

        def process(videos: Any, **kwargs: Any) -> BatchFeature:
            whole = [
                self.image_processor(list(frames), image_grid_pinpoints=[[height, width]], return_tensors="pt")
                for frames in make_batched_videos(videos)
            ]
            numbers = {len(one["pixel_values"]) for one in whole}
            if len(numbers) > 1:
                raise ValueError(f"Videos of one batch must have the same number of frames, not {sorted(numbers)}.")
            return BatchFeature({"pixel_values_videos": torch.stack([one["pixel_values"][:, 0] for one in whole])})

        return process
