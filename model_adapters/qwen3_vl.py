"""Qwen3-VL, dense: norms of q and k, interleaved rotary streams, resampled positions, deep-stack features."""

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

FURTHER = ("hidden_size", "intermediate_size", "out_hidden_size", "num_position_embeddings", "deepstack_visual_indexes")


def qwen3_vl_config(config: Any) -> HookedVLMConfig:
    """Return the native configuration. Raises: ValueError for a position table that is not square."""
    tower = config.vision_config
    refuse_unread(tower, (*TOWER_READ, *FURTHER), TOWER_HARMLESS)
    side, layers = int(tower.num_position_embeddings**0.5), tuple(tower.deepstack_visual_indexes)
    if side**2 != tower.num_position_embeddings:
        raise ValueError(f"num_position_embeddings={tower.num_position_embeddings} must be a square number.")
    if layers != tuple(sorted(set(layers))):
        raise ValueError(f"deepstack_visual_indexes={list(layers)} must be in rising order without repetition.")
    vision = VisionConfig(
        d_model=tower.hidden_size,
        d_head=tower.hidden_size // tower.num_heads,
        d_mlp=tower.intermediate_size,
        act_fn=activation(tower.hidden_act, "vision tower"),
        patch_bias=True,
        position_grid=side,
        deepstack_layers=layers,
        **tower_fields(tower),
    )
    # The model always interleaves its streams, whatever mrope_interleaved says.
    return qwen_vl_config(config, vision, tower.out_hidden_size, sections=(24, 20, 20), interleaved=True)


def qwen3_vl_weights(cfg: HookedVLMConfig) -> WeightMap:
    """Return the map of the whole model, in the names of today's transformers."""
    assert cfg.vision is not None
    tower = tower_weights(cfg.vision, dict(up="linear_fc1", down="linear_fc2"))
    tower |= WeightMap({"patch_embed.bias": "patch_embed.proj.bias", "pos_embed.weight": "pos_embed.weight"})
    maps = with_bias("proj_in", "linear_fc1") | with_bias("proj_out", "linear_fc2")
    rest = with_bias("vision.ln_post", "merger.norm") | maps.under("connector", "merger")
    inner = with_bias("norm", "norm") | maps
    n = len(cfg.vision.deepstack_layers)
    rest |= inner.for_layers(range(n), ours="deepstack.{l}", theirs="deepstack_merger_list.{l}")
    return whole(cfg, tower, rest)


ADAPTER = Adapter(
    architecture="Qwen3VLForConditionalGeneration",
    read_config=qwen3_vl_config,
    weight_map=qwen3_vl_weights,
    image_layout="dynamic",
    renames=RENAMES,
    hub_ids=("Qwen/Qwen3-VL-2B-Instruct", "Qwen/Qwen3-VL-4B-Instruct", "Qwen/Qwen3-VL-8B-Instruct"),
    note="as Qwen2-VL, with norms of q and k, interleaved rotary streams and deep-stack features",
    tested=f"{TESTED}; tower, unequal images, videos and text in one batch, positions in three streams",
)
