"""Map CLIP and SigLIP towers; they differ in the class token, the patch bias and the norms around the blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from model_adapters.reading import activation, refuse_unread
from veena_lens.config import VisionConfig
from veena_lens.weight_map import WeightMap

READ = [
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
    "vision_use_head",
]
KINDS = {"clip_vision_model": "clip", "siglip_vision_model": "siglip"}


def tower_config(config: Any, feature_layer: int | Sequence[int], strategy: str) -> VisionConfig:
    """Return the native tower.

    config: the Hugging Face configuration of the tower.
    feature_layer: the hidden states that are features (0 enters block 0); negative numbers count from the end.
    strategy: "default" drops the class token, "full" keeps it.

    Raises: ValueError for a tower, a feature layer or a strategy that does not exist."""
    if config.model_type not in KINDS:
        raise ValueError(f"Vision tower {config.model_type!r} is not supported; supported: {', '.join(KINDS)}.")
    if strategy not in ("default", "full"):
        raise ValueError(f"vision_feature_select_strategy={strategy!r} must be 'default' or 'full'.")
    refuse_unread(config, READ, harmless=("vocab_size",))
    n_states = config.num_hidden_layers + 1
    asked = (feature_layer,) if isinstance(feature_layer, int) else tuple(feature_layer)
    if not asked:
        raise ValueError(f"vision_feature_layer={feature_layer!r} must name at least one hidden state.")
    for layer in asked:
        if not -n_states <= layer < n_states:
            raise ValueError(f"vision_feature_layer {layer} is outside the tower's {n_states} hidden states.")
    layers = tuple(layer % n_states for layer in asked)
    n_live = max(layers)
    kind = KINDS[config.model_type]
    return VisionConfig(
        kind=kind,  # type: ignore[arg-type]
        n_layers=n_live,
        n_unused_layers=config.num_hidden_layers - n_live,
        feature_layers=layers,
        drop_class_token=strategy == "default",
        has_pooling_head=kind == "siglip" and bool(getattr(config, "vision_use_head", True)),
        **block_fields(config),
    )


def block_fields(config: Any) -> dict[str, Any]:
    """Return the fields of VisionConfig that describe blocks and patches."""
    return dict(
        d_model=config.hidden_size,
        n_heads=config.num_attention_heads,
        d_head=config.hidden_size // config.num_attention_heads,
        d_mlp=config.intermediate_size,
        act_fn=activation(config.hidden_act, "vision tower"),
        normalization_type="LN",
        norm_eps=config.layer_norm_eps,
        qkv_bias=True,
        attn_out_bias=True,
        mlp_bias=True,
        image_size=config.image_size,
        patch_size=config.patch_size,
        n_channels=config.num_channels,
    )


def _with_bias(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.{p}": f"{theirs}.{p}" for p in ("weight", "bias")}


def tower_weights(vision: VisionConfig) -> WeightMap:
    """Return the map below the tower's prefix, including unused parts."""
    block = _with_bias("ln1", "layer_norm1") | _with_bias("ln2", "layer_norm2")
    block |= _with_bias("mlp.up", "mlp.fc1") | _with_bias("mlp.down", "mlp.fc2")
    for ours, theirs in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("o", "out_proj")):
        block |= _with_bias(f"attn.{ours}", f"self_attn.{theirs}")
    ends = {
        "patch_embed.weight": "embeddings.patch_embedding.weight",
        "pos_embed.weight": "embeddings.position_embedding.weight",
    } | _with_bias("ln_post" if vision.has_last_norm else "unused.ln_post", "post_layernorm")
    if vision.kind == "clip":
        # The name in the checkpoints lacks a letter.
        ends |= {"class_embedding": "embeddings.class_embedding"} | _with_bias("ln_pre", "pre_layrnorm")
    else:
        ends["patch_embed.bias"] = "embeddings.patch_embedding.bias"
    if vision.has_pooling_head:
        names = ["probe", "attention.in_proj_weight", "attention.in_proj_bias"]
        for part in ("attention.out_proj", "layernorm", "mlp.fc1", "mlp.fc2"):
            names += [f"{part}.weight", f"{part}.bias"]
        ends |= {f"unused.head.{n}": f"head.{n}" for n in names}
    live = WeightMap(block).for_layers(range(vision.n_layers), theirs="encoder.layers.{l}")
    unused = WeightMap({})
    for i in range(vision.n_unused_layers):
        unused |= WeightMap(block).under(f"unused.blocks.{i}", f"encoder.layers.{vision.n_layers + i}")
    return WeightMap(ends) | live | unused
