"""Qwen2.5-VL (Bai et al. 2025, arXiv 2502.13923): a tower of windows, RMS norms and gated MLPs; videos in seconds."""

from __future__ import annotations

from typing import Any

from model_adapters.decoders import TESTED
from model_adapters.qwen_vl import (
    RENAMES,
    TOWER_HARMLESS,
    TOWER_READ,
    norm,
    qwen_vl_config,
    tower_fields,
    tower_weights,
    whole,
    with_bias,
)
from model_adapters.reading import activation, refuse_unread
from veena_lens.config import HookedVLMConfig, VisionConfig
from veena_lens.weight_map import Adapter, WeightMap

FURTHER = (
    "hidden_size",
    "intermediate_size",
    "out_hidden_size",
    "window_size",
    "fullatt_block_indexes",
    "tokens_per_second",
)


def qwen2_5_vl_config(config: Any) -> HookedVLMConfig:
    """Return the native configuration. Raises: ValueError for windows narrower than what one token reads."""
    tower = config.vision_config
    refuse_unread(tower, (*TOWER_READ, *FURTHER), TOWER_HARMLESS)
    fields: dict[str, Any] = {**tower_fields(tower), "normalization_type": "RMS"}
    window_side = tower.window_size // fields["merge_size"] // fields["patch_size"]
    if window_side < 1:
        raise ValueError(
            f"Vision tower: window_size={tower.window_size} must be at least the {fields['merge_size']} patches of "
            f"{fields['patch_size']} pixels that one token reads."
        )
    vision = VisionConfig(
        d_model=tower.hidden_size,
        d_head=tower.hidden_size // tower.num_heads,
        d_mlp=tower.intermediate_size,
        act_fn=activation(tower.hidden_act, "vision tower"),
        gated_mlp=True,
        window_side=window_side,
        full_attention_layers=tuple(i for i in range(tower.depth) if i in tower.fullatt_block_indexes),
        **fields,
    )
    return qwen_vl_config(
        config,
        vision,
        tower.out_hidden_size,
        sections=(16, 24, 24),
        interleaved=False,
        positions_per_second=tower.tokens_per_second,
    )


def qwen2_5_vl_weights(cfg: HookedVLMConfig) -> WeightMap:
    """Return the map of the whole model, in the names of today's transformers."""
    assert cfg.vision is not None
    tower = tower_weights(cfg.vision, dict(gate="gate_proj", up="up_proj", down="down_proj"))
    merger = norm(cfg.vision, "vision.ln_post", "merger.ln_q")
    merger |= with_bias("connector.proj_in", "merger.mlp.0") | with_bias("connector.proj_out", "merger.mlp.2")
    return whole(cfg, tower, merger)


ADAPTER = Adapter(
    architecture="Qwen2_5_VLForConditionalGeneration",
    read_config=qwen2_5_vl_config,
    weight_map=qwen2_5_vl_weights,
    image_layout="dynamic",
    renames=RENAMES,
    hub_ids=("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-VL-72B-Instruct"),
    note="as Qwen2-VL, with windows, RMS norms and gated MLPs in the tower and videos timed in seconds",
    tested=f"{TESTED}; tower, unequal images, videos and text in one batch, positions in three streams",
)
