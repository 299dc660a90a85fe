"""Gemma-3 (Gemma Team 2025, arXiv 2503.19786), with images and as a text-only model.

The decoder has layers with and without sliding windows, each kind with its own rotary positions, and norms before and
after attention and MLP. The SigLIP tower averages squares of patches, and the tokens of an image attend to each other
in both directions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from model_adapters.decoders import TESTED, decoder_weights, head_weights, text_weights
from model_adapters.llava import RENAMES
from model_adapters.reading import activation, refuse_unread, rope
from model_adapters.towers import tower_config, tower_weights
from veena_lens.config import ConnectorConfig, HookedVLMConfig
from veena_lens.weight_map import Adapter, WeightMap

TEXT_READ = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_activation",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "attention_bias",
    "query_pre_attn_scalar",
    "sliding_window",
    "layer_types",
)
# Read by the configuration class itself, which turns them into `rope_parameters` and `layer_types`; and a setting of
# the cache of generation.
TEXT_HARMLESS = ("rope_theta", "rope_scaling", "rope_local_base_freq", "sliding_window_pattern", "cache_implementation")
LAYER_TYPES = ("sliding_attention", "full_attention")


def gemma3_fields(config: Any, root: Any = None) -> dict[str, Any]:
    """Return the fields of HookedVLMConfig that a text config determines.

    config: the Hugging Face configuration of the decoder.
    root: the configuration of the whole model where it is another one. None: `config`.

    Raises: ValueError for soft-capped logits, bidirectional attention over text, or an unknown kind of layer."""
    for name in ("final_logit_softcapping", "attn_logit_softcapping"):
        if getattr(config, name, None) is not None:
            raise ValueError(
                f"{name}={getattr(config, name)}: soft-capped logits are not supported; they need a tanh "
                "after the scores or the unembedding. Use a released Gemma-3, which has none."
            )
    if getattr(config, "use_bidirectional_attention", False):
        raise ValueError("use_bidirectional_attention=True is not supported: the decoder must attend to text causally.")
    refuse_unread(config, TEXT_READ, TEXT_HARMLESS)
    kinds = tuple(config.layer_types)
    unknown = sorted(set(kinds) - set(LAYER_TYPES))
    if unknown or len(kinds) != config.num_hidden_layers:
        raise ValueError(f"layer_types={list(kinds)} must name one of {', '.join(LAYER_TYPES)} for each layer.")
    windows = tuple(config.sliding_window if kind == "sliding_attention" else None for kind in kinds)
    slides = "sliding_attention" in kinds
    if slides and config.sliding_window is None:
        raise ValueError("layer_types contains sliding_attention, but sliding_window is None; set its size in tokens.")
    root, parameters = config if root is None else root, config.rope_parameters
    return dict(
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_heads=config.num_attention_heads,
        n_key_value_heads=config.num_key_value_heads,
        d_head=config.head_dim,
        d_mlp=config.intermediate_size,
        act_fn=activation(config.hidden_activation, "text decoder"),
        normalization_type="RMS",
        norm_eps=config.rms_norm_eps,
        norm_weight_plus_one=True,
        post_norms=True,
        qkv_bias=bool(config.attention_bias),
        attn_out_bias=bool(config.attention_bias),
        gated_mlp=True,
        qk_norm=True,
        query_scalar=config.query_pre_attn_scalar,
        d_vocab=config.vocab_size,
        n_ctx=config.max_position_embeddings,
        rope=rope(config, parameters["full_attention"]),
        sliding_rope=rope(config, parameters["sliding_attention"]) if slides else None,
        sliding_windows=windows if slides else (),
        scales_embeddings=True,
        tie_word_embeddings=bool(root.tie_word_embeddings),
        pad_token_id=config.pad_token_id,
    )


def text_config(config: Any) -> HookedVLMConfig:
    """Return the native configuration of a text-only checkpoint."""
    return HookedVLMConfig(**gemma3_fields(config))


TEXT = Adapter(
    architecture="Gemma3ForCausalLM",
    read_config=text_config,
    weight_map=text_weights,
    hub_ids=("google/gemma-3-1b-it", "google/gemma-3-270m-it"),
    note="text only",
    tested=TESTED,
)

READ = ("text_config", "vision_config", "mm_tokens_per_image", "image_token_index", "tie_word_embeddings")
# The tokens around an image are ordinary text.
HARMLESS = ("image_token_id", "boi_token_index", "eoi_token_index", "boi_token_id", "eoi_token_id")


def gemma3_config(config: Any) -> HookedVLMConfig:
    """Return the native configuration.

    Raises: ValueError for a tower other than SigLIP, or a number of tokens that its patches cannot be averaged to."""
    refuse_unread(config, READ, HARMLESS)
    text, tower = config.text_config, config.vision_config
    vision = tower_config(tower, -1, "full")
    patches, side = vision.grid[0], int(config.mm_tokens_per_image**0.5)
    if vision.kind != "siglip":
        raise ValueError(f"Vision tower: model_type={tower.model_type!r} must be 'siglip_vision_model' for Gemma-3.")
    if side < 1 or side**2 != config.mm_tokens_per_image or patches % side:
        raise ValueError(
            f"mm_tokens_per_image={config.mm_tokens_per_image} must be a square whose side divides the {patches} "
            "patches per side of the tower."
        )
    vision = replace(vision, has_last_norm=True, averages_patches=True, merge_size=patches // side)
    return HookedVLMConfig(
        image_layout="fixed",
        bidirectional_images=True,
        image_token_id=config.image_token_index,
        vision=vision,
        connector=ConnectorConfig(
            kind="normed", d_in=vision.d_model, d_hidden=0, d_out=text.hidden_size, bias=False, norm_eps=vision.norm_eps
        ),
        **gemma3_fields(text, root=config),
    )


def gemma3_weights(cfg: HookedVLMConfig) -> WeightMap:
    """Return the map of the whole model, in the names of today's transformers."""
    assert cfg.vision is not None
    connector = WeightMap({"weight": "mm_input_projection_weight", "norm.weight": "mm_soft_emb_norm.weight"})
    return (
        decoder_weights(cfg).under("", "model.language_model")
        | head_weights(cfg)
        | tower_weights(cfg.vision).under("vision", "model.vision_tower")
        | connector.under("connector", "model.multi_modal_projector")
    )


ADAPTER = Adapter(
    architecture="Gemma3ForConditionalGeneration",
    read_config=gemma3_config,
    weight_map=gemma3_weights,
    image_layout="fixed",
    renames=RENAMES,
    hub_ids=("google/gemma-3-4b-it", "google/gemma-3-12b-it", "google/gemma-3-27b-it"),
    note="SigLIP tower, squares of patches averaged; the tokens of an image attend to each other in both directions",
    tested=f"{TESTED}; tower, several images per row, padding; patching and sweeps",
)
