"""LLaVA-1.6, also called LLaVA-NeXT: LLaVA-1.5 with any-resolution tiles and a newline vector after each row."""

from __future__ import annotations

from typing import Any

from model_adapters.decoders import TESTED
from model_adapters.llava import HARMLESS, READ, RENAMES, llava_fields, llava_weights
from model_adapters.reading import refuse_unread
from veena_lens.config import HookedVLMConfig
from veena_lens.weight_map import Adapter, WeightMap


def pinpoints(config: Any) -> tuple[tuple[int, int], ...]:
    """Return (height, width) in pixels of the canvases that images are fitted into."""
    return tuple((int(height), int(width)) for height, width in config.image_grid_pinpoints)


def llava_next_config(config: Any) -> HookedVLMConfig:
    """Return the native configuration."""
    refuse_unread(config, (*READ, "image_grid_pinpoints"), (*HARMLESS, "use_image_newline_parameter"))
    return HookedVLMConfig(image_layout="anyres", image_pinpoints=pinpoints(config), **llava_fields(config))


def llava_next_weights(cfg: HookedVLMConfig) -> WeightMap:
    """Return the map of the whole model, in the names of today's transformers."""
    return llava_weights(cfg) | WeightMap({"image_newline": "model.image_newline"})


ADAPTER = Adapter(
    architecture="LlavaNextForConditionalGeneration",
    read_config=llava_next_config,
    weight_map=llava_next_weights,
    image_layout="anyres",
    renames=RENAMES,
    hub_ids=(
        "llava-hf/llava-v1.6-mistral-7b-hf",
        "llava-hf/llava-v1.6-vicuna-7b-hf",
        "llava-hf/llava-v1.6-vicuna-13b-hf",
    ),
    note="any-resolution tiles; CLIP or SigLIP tower; Llama, Mistral, Qwen2 or Qwen3 decoder",
    tested=f"{TESTED}; odd image sizes, grids and pixel boxes through tiles",
)
