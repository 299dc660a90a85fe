"""Map Llama, Mistral, Qwen2 and Qwen3 decoders; they differ in biases, sliding windows and norms of q and k."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from model_adapters.reading import activation, longest_context, refuse_unread, rope
from veena_lens.config import HookedVLMConfig
from veena_lens.weight_map import WeightMap

READ = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "rope_theta",
    "rope_scaling",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
]
# Token ids of the whole model, which transformers 4.5x also wrote into the part of the decoder.
HARMLESS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "vision_token_id")
KINDS = ("llama", "mistral", "qwen2", "qwen3", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text")
TESTED = "logits, hidden states, greedy generation; every hook point edited"
ALWAYS_BIASED = ("qwen2", "qwen2_vl_text", "qwen2_5_vl_text")  # q, k and v, never o
MAY_BE_BIASED = ("llama", "qwen3", "qwen3_vl_text")  # all four, if attention_bias is set
NORMED = ("qwen3", "qwen3_vl_text")  # q and k, before rotary


def decoder_fields(config: Any, root: Any = None, harmless: Sequence[str] = ()) -> dict[str, Any]:
    """Return the fields of HookedVLMConfig that a text config determines.

    config: the Hugging Face configuration of the decoder.
    root: the configuration of the whole model where it is another one. None: `config`.
    harmless: further fields that do not need to be read.

    Raises: ValueError for an unknown kind of decoder, or a field that nothing reads."""
    kind = config.model_type
    if kind not in KINDS:
        raise ValueError(f"Text decoder {kind!r} is not supported; supported: {', '.join(KINDS)}.")
    refuse_unread(config, READ, (*HARMLESS, *harmless))
    n_layers, n_heads = config.num_hidden_layers, config.num_attention_heads
    bias = kind in MAY_BE_BIASED and bool(config.attention_bias)
    root = config if root is None else root
    return dict(
        n_layers=n_layers,
        d_model=config.hidden_size,
        n_heads=n_heads,
        n_key_value_heads=config.num_key_value_heads or n_heads,
        d_head=getattr(config, "head_dim", None) or config.hidden_size // n_heads,
        d_mlp=config.intermediate_size,
        act_fn=activation(config.hidden_act, "text decoder"),
        normalization_type="RMS",
        norm_eps=config.rms_norm_eps,
        qkv_bias=kind in ALWAYS_BIASED or bias,
        attn_out_bias=bias,
        mlp_bias=kind == "llama" and bool(config.mlp_bias),
        gated_mlp=True,
        qk_norm=kind in NORMED,
        d_vocab=config.vocab_size,
        n_ctx=longest_context(config),
        rope=rope(config),
        tie_word_embeddings=bool(root.tie_word_embeddings),
        sliding_windows=sliding_windows(config),
        pad_token_id=_first(getattr(config, "pad_token_id", None), getattr(root, "pad_token_id", None)),
    )


def _first(*values: Any) -> Any:
    """Return the first value that is not None (a pad token may be 0)."""
    return next((v for v in values if v is not None), None)


def sliding_windows(config: Any) -> tuple[int | None, ...]:
    """Return one entry per layer, or () if every layer has full attention."""
    window = getattr(config, "sliding_window", None)
    if window is None or config.model_type == "llama" or getattr(config, "use_sliding_window", True) is False:
        return ()
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return (window,) * config.num_hidden_layers
    found = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return found if any(found) else ()


def decoder_weights(cfg: HookedVLMConfig) -> WeightMap:
    """Return the map below the decoder's prefix, without the head."""
    block = {"ln1.weight": "input_layernorm.weight", "ln2.weight": "post_attention_layernorm.weight"}
    if cfg.post_norms:  # the norm before the MLP is renamed if a norm follows attention
        block = {"ln1.weight": "input_layernorm.weight", "ln2.weight": "pre_feedforward_layernorm.weight"}
        block |= {"ln1_post.weight": "post_attention_layernorm.weight"}
        block |= {"ln2_post.weight": "post_feedforward_layernorm.weight"}
    for part in "qkvo":
        block[f"attn.{part}.weight"] = f"self_attn.{part}_proj.weight"
        if cfg.attn_out_bias if part == "o" else cfg.qkv_bias:
            block[f"attn.{part}.bias"] = f"self_attn.{part}_proj.bias"
    if cfg.qk_norm:
        block |= {f"attn.{p}_norm.weight": f"self_attn.{p}_norm.weight" for p in "qk"}
    for part in ("gate", "up", "down"):
        block[f"mlp.{part}.weight"] = f"mlp.{part}_proj.weight"
        if cfg.mlp_bias:
            block[f"mlp.{part}.bias"] = f"mlp.{part}_proj.bias"
    ends = WeightMap({"embed.weight": "embed_tokens.weight", "ln_final.weight": "norm.weight"})
    return ends | WeightMap(block).for_layers(range(cfg.n_layers))


def head_weights(cfg: HookedVLMConfig) -> WeightMap:
    """Return the map of the unembedding at the root of a checkpoint; it is empty if tied."""
    return WeightMap({} if cfg.tie_word_embeddings else {"unembed.weight": "lm_head.weight"})


def text_config(config: Any) -> HookedVLMConfig:
    """Return the native configuration of a text-only checkpoint."""
    return HookedVLMConfig(**decoder_fields(config))


def text_weights(cfg: HookedVLMConfig) -> WeightMap:
    """Return the map of a text-only checkpoint."""
    return decoder_weights(cfg).under("", "model") | head_weights(cfg)
