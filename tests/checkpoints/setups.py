"""One tiny model with its processor per family, for what is checked of prompts and images in all of them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.cases import BY_NAME, QWEN, TILED, Case
from tests.checkpoints import tiny
from veena_lens.checkpoints import find_adapter, load_processor
from veena_lens.config import HookedVLMConfig

NAMES = ("image-28-patch-7", "llava-next-llama", "onevision-resampled", "gemma3-many-tokens")
NAMES += tuple(f"{family}-plain" for family in (*QWEN, *TILED))


@dataclass(frozen=True, eq=False)
class Setup:
    """A case, its configuration, and a processor that was loaded from files."""

    case: Case
    cfg: HookedVLMConfig
    processor: Any

    @property
    def mark(self) -> str:
        """What stands for an image in a prompt."""
        return "<start_of_image>" if self.case.family == "gemma3" else self.processor.image_token

    def fill(self, value: Any) -> Any:
        """A text, list or dictionary with "IMAGE" and "VIDEO" as this family writes them."""
        if isinstance(value, str):
            return value.replace("IMAGE", self.mark).replace("VIDEO", getattr(self.processor, "video_token", ""))
        if isinstance(value, Mapping):
            return {key: self.fill(item) for key, item in value.items()}
        return [self.fill(item) for item in value] if isinstance(value, list) else value


def config_of(name: str) -> HookedVLMConfig:
    case = BY_NAME[name]
    return find_adapter(case.model_class.__name__).read_config(case.config())


@cache
def processor_of(name: str, template: str | None = "", **settings: Any) -> Any:
    """The processor of a case, as it is loaded from its files; without a chat template where `template` is None."""
    case = BY_NAME[name]
    if template is None and case.family in (*QWEN, *TILED):
        settings |= dict(template=None)  # its folder holds none
    with tempfile.TemporaryDirectory() as folder:
        tiny.write_processor(case, Path(folder), **settings)
        case.config().save_pretrained(folder)
        processor = load_processor(Path(folder))
    if template is None:
        processor.chat_template = processor.tokenizer.chat_template = None
    return processor


@cache
def setup_of(name: str) -> Setup:
    return Setup(BY_NAME[name], config_of(name), processor_of(name))
