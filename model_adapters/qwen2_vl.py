"""Qwen2-VL (Wang et al. 2024, arXiv 2409.12191): images of any size, multimodal rotary positions, videos."""

from __future__ import annotations

from typing import Any

from model_adapters.decoders import TESTED
from model_adapters.qwen_vl import (
    RENAMES,
    TOWER_HARMLESS,
    TOWER_READ,
    qwen_vl_config,
    tower_fields,
    tower_weights,
    whole,
    with_bias,
)
from model_adapters.reading import activation, refuse_unread
from veena_lens.config import HookedVLMConfig, VisionConfig
from veena_lens.weight_map import Adapter, WeightMap


def qwen2_vl_config(config: Any) -> HookedVLMConfig:
    """Return the native configuration."""
    tower = config.vision_config
    refuse_unread(tower, (*TOWER_READ, "embed_dim", "hidden_size", "mlp_ratio"), TOWER_HARMLESS)
    vision = VisionConfig(
        d_model=tower.embed_dim,
        d_head=tower.embed_dim // tower.num_heads,
        d_mlp=int(tower.embed_dim * tower.mlp_ratio),
        act_fn=activation(tower.hidden_act, "vision tower"),
        **tower_fields(tower),
    )
    return qwen_vl_config(config, vision, tower.hidden_size, sections=(16, 24, 24), interleaved=False)


def qwen2_vl_weights(cfg: HookedVLMConfig) -> WeightMap:
    """Return the map of the whole model, in the names of today's transformers."""
    assert cfg.vision is not None
    merger = with_bias("vision.ln_post", "merger.ln_q")
    merger |= with_bias("connector.proj_in", "merger.mlp.0") | with_bias("connector.proj_out", "merger.mlp.2")
    return whole(cfg, tower_weights(cfg.vision, dict(up="fc1", down="fc2")), merger)


ADAPTER = Adapter(
    architecture="Qwen2VLForConditionalGeneration",
    read_config=qwen2_vl_config,
    weight_map=qwen2_vl_weights,
    image_layout="dynamic",
    renames=RENAMES,
    hub_ids=("Qwen/Qwen2-VL-2B-Instruct", "Qwen/Qwen2-VL-7B-Instruct", "Qwen/Qwen2-VL-72B-Instruct"),
    note="images of any size, several per row, video frames; multimodal rotary positions",
    tested=f"{TESTED}; tower, unequal images, videos and text in one batch, positions in three streams",
)
