"""Gemma-3's configurations as they lie on the hub, and the parameters that models of them have."""

from __future__ import annotations

from typing import Any

TOWER = dict(
    hidden_size=1152, image_size=896, intermediate_size=4304, model_type="siglip_vision_model", num_attention_heads=16,
    num_hidden_layers=27, patch_size=14, vision_use_head=False,
)  # fmt: skip


def _with_tower(**text: Any) -> dict[str, Any]:
    """The short form of the hub, which leaves defaults out."""
    scaled = dict(rope_scaling=dict(factor=8.0, rope_type="linear"), sliding_window=1024)
    return dict(
        architectures=["Gemma3ForConditionalGeneration"], model_type="gemma3", boi_token_index=255999,
        eoi_token_index=256000, eos_token_id=[1, 106], image_token_index=262144, initializer_range=0.02,
        mm_tokens_per_image=256, torch_dtype="bfloat16", transformers_version="4.50.0.dev0",
        text_config=dict(model_type="gemma3_text", **scaled, **text), vision_config=TOWER,
    )  # fmt: skip


HUB: dict[str, dict[str, Any]] = {
    "google/gemma-3-4b-it": _with_tower(hidden_size=2560, intermediate_size=10240, num_hidden_layers=34),
    "google/gemma-3-12b-it": _with_tower(
        hidden_size=3840, intermediate_size=15360, num_attention_heads=16, num_hidden_layers=48, num_key_value_heads=8
    ),
    "google/gemma-3-27b-it": _with_tower(
        head_dim=128, hidden_size=5376, intermediate_size=21504, num_attention_heads=32, num_hidden_layers=62,
        num_key_value_heads=16, query_pre_attn_scalar=168,
    ),
    "google/gemma-3-1b-it": dict(
        architectures=["Gemma3ForCausalLM"], model_type="gemma3_text", attention_bias=False, attention_dropout=0.0,
        attn_logit_softcapping=None, bos_token_id=2, cache_implementation="hybrid", eos_token_id=[1, 106],
        final_logit_softcapping=None, head_dim=256, hidden_activation="gelu_pytorch_tanh", hidden_size=1152,
        initializer_range=0.02, intermediate_size=6912, max_position_embeddings=32768, num_attention_heads=4,
        num_hidden_layers=26, num_key_value_heads=1, pad_token_id=0, query_pre_attn_scalar=256, rms_norm_eps=1e-6,
        rope_local_base_freq=10000, rope_scaling=None, rope_theta=1000000, sliding_window=512,
        sliding_window_pattern=6, torch_dtype="bfloat16", transformers_version="4.50.0.dev0", use_cache=True,
        vocab_size=262144,
    ),
}  # fmt: skip
# Parameters, counted on the models that transformers builds of the same files; and those of tower and connector.
COUNTS = {
    "google/gemma-3-4b-it": (4_300_079_472, 419_816_304),
    "google/gemma-3-12b-it": (12_187_325_040, 421_290_864),
    "google/gemma-3-27b-it": (27_432_406_640, 423_060_336),
    "google/gemma-3-1b-it": (999_885_952, 0),
}
