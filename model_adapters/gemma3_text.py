"""Gemma-3 (Gemma Team 2025, arXiv 2503.19786), text only: layers that slide and layers that do not, each with rotary
positions of its own, and norms on both sides of attention and MLP."""

from __future__ import annotations

from typing import Any

from model_adapters.decoders import TESTED, text_weights
from model_adapters.reading import activation, refuse_unread, rope
from veena_lens.config import HookedVLMConfig
from veena_lens.weight_map import Adapter

READ = (
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
# Read by the configuration class itself, which turns them into `rope_parameters` and `layer_types`; and a word on how
# generation keeps its cache.
HARMLESS = ("rope_theta", "rope_scaling", "rope_local_base_freq", "sliding_window_pattern", "cache_implementation")
LAYER_TYPES = ("sliding_attention", "full_attention")


def gemma3_fields(config: Any, root: Any = None) -> dict[str, Any]:
    """Fields of HookedVLMConfig that the text config gives; `root` is the whole model's config where it differs.

    Raises: ValueError for soft-capped logits, attention in both directions over text, or a kind of layer that is not
    known."""
    for name in ("final_logit_softcapping", "attn_logit_softcapping"):
        if getattr(config, name, None) is not None:
            raise ValueError(
                f"{name}={getattr(config, name)}: soft-capped logits are not supported (Gemma-3 is released without); "
                "they need a tanh after the scores or the unembedding, with hooks on both sides."
            )
    if getattr(config, "use_bidirectional_attention", False):
        raise ValueError(
            "use_bidirectional_attention=True makes an encoder of the text; only causal text is supported."
        )
    refuse_unread(config, READ, HARMLESS)
    kinds = tuple(config.layer_types)
    unknown = sorted(set(kinds) - set(LAYER_TYPES))
    if unknown or len(kinds) != config.num_hidden_layers:
        raise ValueError(f"layer_types={list(kinds)} must name one of {', '.join(LAYER_TYPES)} for each layer.")
    windows = tuple(config.sliding_window if kind == "sliding_attention" else None for kind in kinds)
    slides = "sliding_attention" in kinds
    if slides and config.sliding_window is None:
        raise ValueError("layer_types name sliding_attention, but sliding_window is None.")
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
    """The native configuration of a text-only checkpoint."""
    return HookedVLMConfig(**gemma3_fields(config))


ADAPTER = Adapter(
    architecture="Gemma3ForCausalLM",
    read_config=text_config,
    weight_map=text_weights,
    hub_ids=("google/gemma-3-1b-it", "google/gemma-3-270m-it"),
    note="text only",
    tested=TESTED,
)
