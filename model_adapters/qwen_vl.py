"""What the Qwen-VL models share: a tower over images of any size, multimodal rotary positions, image tokens."""

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
# The wrappers around image tokens are text like any other; the hub's files name one more that nothing reads.
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
# Fields of the hub's files that no version of the model has read.
TOWER_HARMLESS = ("in_chans", "spatial_patch_size")
# Today's names in memory; the hub's files have the decoder at the root. The order matters.
RENAMES = (
    (r"^visual\.", "model.visual."),
    (r"^model\.(?!language_model\.|visual\.)", "model.language_model."),
)


def side(size: Any, name: str) -> int:
    """A patch size that may be written as a pair of equal numbers. Raises: ValueError for unequal ones."""
    sizes = set(size) if isinstance(size, (list, tuple)) else {size}
    if len(sizes) != 1:
        raise ValueError(f"Vision tower: {name}={size!r} must be one number, or a pair of equal ones.")
    return int(sizes.pop())


def tower_fields(config: Any) -> dict[str, Any]:
    """Fields of VisionConfig that every tower gives. Raises: ValueError for another rule of rotary positions."""
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
        normalization_type="LN",  # but in Qwen2.5-VL
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
    """The native configuration around a tower whose merger gives `d_out` numbers a token.

    sections: frequencies of the (time, height, width) streams where the configuration names none. Interleaved
    streams go with videos whose frames lie apart in the text (Qwen3-VL).
    Raises: ValueError for a merger that does not fit the decoder."""
    text = config.text_config
    # Files of transformers 4.5x hold the decoder's fields a second time, at the root, where no model reads them.
    refuse_unread(config, READ, (*HARMLESS, *DECODER_READ, *text.to_dict()))
    if d_out != text.hidden_size:
        raise ValueError(f"The merger gives {d_out} numbers a token, the decoder takes {text.hidden_size}.")
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
    """Weight and bias of one module."""
    return WeightMap({f"{ours}.{p}": f"{theirs}.{p}" for p in ("weight", "bias")})


def norm(vision: VisionConfig, ours: str, theirs: str) -> WeightMap:
    """A norm of the tower, which has a bias where it is a layer norm."""
    parts = ("weight", "bias") if vision.normalization_type == "LN" else ("weight",)
    return WeightMap({f"{ours}.{p}": f"{theirs}.{p}" for p in parts})


def fused_qkv() -> WeightMap:
    """q, k and v of a block, stored together."""
    names, parts = {}, {}
    for i, letter in enumerate("qkv"):
        for p in ("weight", "bias"):
            names[f"attn.{letter}.{p}"] = f"attn.qkv.{p}"
            parts[f"attn.{letter}.{p}"] = (i, 3)
    return WeightMap(names, parts=parts) | with_bias("attn.o", "attn.proj")


def tower_weights(vision: VisionConfig, mlp: Mapping[str, str]) -> WeightMap:
    """Patches and blocks below the tower's own prefix; `mlp` gives its names of the MLP's maps."""
    frames, patch = vision.temporal_patch_size, vision.patch_size
    stored = (vision.d_model, vision.n_channels, frames, patch, patch)
    patches = WeightMap({"patch_embed.weight": "patch_embed.proj.weight"}, {"patch_embed.weight": stored})
    block = fused_qkv() | norm(vision, "ln1", "norm1") | norm(vision, "ln2", "norm2")
    for ours, theirs in mlp.items():
        block |= with_bias(f"mlp.{ours}", f"mlp.{theirs}")
    return patches | block.for_layers(range(vision.n_layers), theirs="blocks.{l}")


def whole(cfg: HookedVLMConfig, tower: WeightMap, rest: WeightMap) -> WeightMap:
    """Decoder, head, tower (under `vision`) and what else lies below the tower's prefix, in today's names."""
    return (
        decoder_weights(cfg).under("", "model.language_model")
        | head_weights(cfg)
        | tower.under("vision", "model.visual")
        | rest.under("", "model.visual")
    )
