"""LLaVA-OneVision (Li et al. 2024, arXiv 2408.03326): LLaVA-1.6 with a SigLIP tower.

Large grids of tiles are resampled, images that share a prompt become one tile each, and a video frame has a quarter of
the tokens of a tile.
"""

from __future__ import annotations

import re
from typing import Any

from model_adapters.decoders import TESTED
from model_adapters.llava import HARMLESS, READ, RENAMES, llava_fields
from model_adapters.llava_next import llava_next_weights, pinpoints
from model_adapters.reading import refuse_unread
from veena_lens.config import HookedVLMConfig
from veena_lens.weight_map import Adapter

OWN = ("image_grid_pinpoints", "vision_aspect_ratio", "video_token_index", "video_token_id")


def max_tiles(aspect_ratio: str) -> int:
    """Return the largest number of tiles, 9 for "anyres_max_9". Raises: ValueError for another rule."""
    found = re.fullmatch(r"anyres_max_([1-9]\d*)", aspect_ratio)
    if found is None:
        raise ValueError(f"vision_aspect_ratio={aspect_ratio!r} must be 'anyres_max_N', at most N tiles.")
    return int(found[1])


def llava_onevision_config(config: Any) -> HookedVLMConfig:
    """Return the native configuration."""
    refuse_unread(config, (*READ, *OWN), (*HARMLESS, "use_image_newline_parameter"))
    return HookedVLMConfig(
        image_layout="anyres",
        image_pinpoints=pinpoints(config),
        max_tiles=max_tiles(config.vision_aspect_ratio),
        tiles_single_images_only=True,
        video_token_id=config.video_token_id,
        **llava_fields(config),
    )


ADAPTER = Adapter(
    architecture="LlavaOnevisionForConditionalGeneration",
    read_config=llava_onevision_config,
    weight_map=llava_next_weights,
    image_layout="anyres",
    renames=RENAMES,
    hub_ids=(
        "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
        "llava-hf/llava-onevision-qwen2-7b-ov-hf",
        "llava-hf/llava-onevision-qwen2-72b-ov-hf",
    ),
    note="any-resolution tiles, resampled to nine; several images and video frames as one tile each",
    tested=f"{TESTED}; odd image sizes, several images per row, frames; sweeps, grids and pixel boxes through tiles",
)
