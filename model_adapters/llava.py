"""LLaVA-1.5 (Liu et al. 2023, arXiv 2310.03744): CLIP or SigLIP tower, two-layer projector, text decoder."""

from __future__ import annotations

from typing import Any

from model_adapters.decoders import TESTED, decoder_fields, decoder_weights, head_weights
from model_adapters.reading import activation, refuse_unread
from model_adapters.towers import tower_config, tower_weights
from veena_lens.config import ConnectorConfig, HookedVLMConfig
from veena_lens.weight_map import Adapter, WeightMap

READ = [
    "text_config",
    "vision_config",
    "image_token_index",
    "image_token_id",
    "projector_hidden_act",
    "vision_feature_layer",
    "vision_feature_select_strategy",
    "multimodal_projector_bias",
    "tie_word_embeddings",
]
HARMLESS = ("image_seq_length", "ignore_index", "vocab_size")

# Translates the key layouts of all releases to the names of today's transformers; the order matters.
RENAMES = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^model\.language_model\.model\.", "model.language_model."),
    (r"^model\.language_model\.lm_head\.", "lm_head."),
    (r"^(vision_tower|multi_modal_projector|image_newline)", r"model.\1"),
    (r"^model\.vision_tower\.vision_model\.", "model.vision_tower."),
)


def llava_fields(config: Any) -> dict[str, Any]:
    """Return the fields of HookedVLMConfig that the LLaVA family shares."""
    text, layers = config.text_config, config.vision_feature_layer
    vision = tower_config(config.vision_config, layers, config.vision_feature_select_strategy)
    return decoder_fields(text, root=config) | dict(
        image_token_id=config.image_token_id,
        vision=vision,
        connector=ConnectorConfig(
            d_in=vision.d_model * len(vision.feature_layers),
            d_hidden=text.hidden_size,
            d_out=text.hidden_size,
            act_fn=activation(config.projector_hidden_act, "projector"),
            bias=config.multimodal_projector_bias,
        ),
    )


def llava_config(config: Any) -> HookedVLMConfig:
    """Return the native configuration."""
    refuse_unread(config, READ, HARMLESS)
    return HookedVLMConfig(image_layout="fixed", **llava_fields(config))


def projector_weights(bias: bool) -> WeightMap:
    """Return the map of the two-layer projector."""
    parts = ("weight", "bias") if bias else ("weight",)
    names = {f"proj_in.{p}": f"linear_1.{p}" for p in parts} | {f"proj_out.{p}": f"linear_2.{p}" for p in parts}
    return WeightMap(names).under("connector", "model.multi_modal_projector")


def llava_weights(cfg: HookedVLMConfig) -> WeightMap:
    """Return the map of the whole model, in the names of today's transformers."""
    assert cfg.vision is not None and cfg.connector is not None
    return (
        decoder_weights(cfg).under("", "model.language_model")
        | head_weights(cfg)
        | tower_weights(cfg.vision).under("vision", "model.vision_tower")
        | projector_weights(cfg.connector.bias)
    )


ADAPTER = Adapter(
    architecture="LlavaForConditionalGeneration",
    read_config=llava_config,
    weight_map=llava_weights,
    image_layout="fixed",
    renames=RENAMES,
    hub_ids=("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-13b-hf", "llava-hf/bakLlava-v1-hf"),
    note="CLIP or SigLIP tower; Llama, Mistral, Qwen2 or Qwen3 decoder",
    tested=f"{TESTED}; towers, several images per row, padding; patching and sweeps",
)
