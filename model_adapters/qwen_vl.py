"""Map what the Qwen-VL models share: a tower for images of any size, multimodal rotary positions, image tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from model_adapters.decoders import READ as DECODER_READ
from model_adapters.decoders import decoder_fields, decoder_weights, head_weights
from model_adapters.reading import refuse_unread
from veena_lens.config import ConnectorConfig, HookedVLMConfig, VisionConfig
from veena_lens.weight_map import WeightMap

READ = ("text_config", "vision_config", "image_token_id", "video_token_id", "tie_word_embeddings")
# The tokens around an image are ordinary text; files of the hub name one more that nothing reads.
HARMLESS = ("vision_start_token_id", "vision_end_token_id", "vision_token_id")
TOWER_READ = (
    "depth",
    "num_heads",
    "in_channels",
    "patch_size",
    "spatial_merge_size",
    "temporal_patch_size",
    "hidden_act",
    "rope_parameters",
)
# Fields in files of the hub that no version of the model has read.
TOWER_HARMLESS = ("in_chans", "spatial_patch_size")
# Translates to the names of today's transformers; files of the hub have the decoder at the root. The order matters.
RENAMES = (
    (r"^visual\.", "model.visual."),
    (r"^model\.(?!language_model\.|visual\.)", "model.language_model."),
)


def side(size: Any, name: str) -> int:
    """Return a patch size that may be stored as a pair of equal numbers. Raises: ValueError for unequal ones."""
    sizes = set(size) if isinstance(size, (list, tuple)) else {size}
    if len(sizes) != 1:
        raise ValueError(f"Vision tower: {name}={size!r} must be one number or a pair of equal numbers.")
    return int(sizes.pop())


def tower_fields(config: Any) -> dict[str, Any]:
    """Return the fields of VisionConfig that all towers share. Raises: ValueError for another rotary rule."""
    rope = dict(config.rope_parameters or {})
    if rope.get("rope_type", "axial") != "axial":
        raise ValueError(f"Vision tower: rope_type {rope['rope_type']!r} is not supported (only 'axial').")
    return dict(
        kind="qwen",
        image_size=0,
        n_layers=config.depth,
        n_heads=config.num_heads,
        patch_size=side(config.patch_size, "patch_size"),
        temporal_patch_size=side(config.temporal_patch_size, "temporal_patch_size"),
        merge_size=config.spatial_merge_size,
        n_channels=config.in_channels,
        normalization_type="LN",  # Qwen2.5-VL: RMS
        norm_eps=1e-6,  # fixed in every tower
        qkv_bias=True,
        attn_out_bias=True,
        mlp_bias=True,
        rope_theta=float(rope.get("rope_theta", 10_000.0)),
    )


def qwen_vl_config(
    config: Any,
    vision: VisionConfig,
    d_out: int,
    sections: tuple[int, int, int],
    interleaved: bool,
    positions_per_second: int | None = None,
) -> HookedVLMConfig:
    """Return the native configuration of a whole model.

    config: the Hugging Face configuration.
    vision: the native tower.
    d_out: the width of the merger's output.
    sections: frequencies of the (time, height, width) streams if the configuration names none.
    interleaved: whether the streams alternate; video frames are then separate images in the text (Qwen3-VL).
    positions_per_second: how videos are timed. None: by frames.

    Raises: ValueError for a merger that does not fit the decoder."""
    text = config.text_config
    # Files of transformers 4.5x repeat the fields of the decoder at the root, where no model reads them.
    refuse_unread(config, READ, (*HARMLESS, *DECODER_READ, *text.to_dict()))
    if d_out != text.hidden_size:
        raise ValueError(f"The merger's output has {d_out} dimensions but the decoder expects {text.hidden_size}.")
    width = vision.d_model * vision.merge_size**2
    fields = decoder_fields(text, root=config)
    rope = fields["rope"]
    fields["rope"] = replace(rope, sections=rope.sections or sections, interleaved=interleaved)
    return HookedVLMConfig(
        image_layout="dynamic",
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
        frames_as_images=interleaved,
        positions_per_second=positions_per_second,
        vision=vision,
        connector=ConnectorConfig(d_in=width, d_hidden=width, d_out=d_out),
        **fields,
    )


def with_bias(ours: str, theirs: str) -> WeightMap:
    """Return the map of one module's weight and bias."""
    return WeightMap({f"{ours}.{p}": f"{theirs}.{p}" for p in ("weight", "bias")})


def norm(vision: VisionConfig, ours: str, theirs: str) -> WeightMap:
    """Return the map of a norm of the tower; a layer norm has a bias."""
    parts = ("weight", "bias") if vision.normalization_type == "LN" else ("weight",)
    return WeightMap({f"{ours}.{p}": f"{theirs}.{p}" for p in parts})


def fused_qkv() -> WeightMap:
    """Return the map of a block's q, k and v, which are stored together."""
    names, parts = {}, {}
    for i, letter in enumerate("qkv"):
        for p in ("weight", "bias"):
            names[f"attn.{letter}.{p}"] = f"attn.qkv.{p}"
            parts[f"attn.{letter}.{p}"] = (i, 3)
    return WeightMap(names, parts=parts) | with_bias("attn.o", "attn.proj")


def tower_weights(vision: VisionConfig, mlp: Mapping[str, str]) -> WeightMap:
    """Return the map of patches and blocks below the tower's prefix; `mlp` names the linear maps of the MLP."""
    frames, patch = vision.temporal_patch_size, vision.patch_size
    stored = (vision.d_model, vision.n_channels, frames, patch, patch)
    patches = WeightMap({"patch_embed.weight": "patch_embed.proj.weight"}, {"patch_embed.weight": stored})
    block = fused_qkv() | norm(vision, "ln1", "norm1") | norm(vision, "ln2", "norm2")
    for ours, theirs in mlp.items():
        block |= with_bias(f"mlp.{ours}", f"mlp.{theirs}")
    return patches | block.for_layers(range(vision.n_layers), theirs="blocks.{l}")


def whole(cfg: HookedVLMConfig, tower: WeightMap, rest: WeightMap) -> WeightMap:
    """Join decoder, head, tower (under `vision`) and the rest below the tower's prefix, in today's names."""
    return (
        decoder_weights(cfg).under("", "model.language_model")
        | head_weights(cfg)
        | tower.under("vision", "model.visual")
        | rest.under("", "model.visual")
    )
