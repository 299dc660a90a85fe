"""Idefics3 (Laurençon et al. 2024, arXiv 2408.12637): images in tiles among text, squares of patches joined."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from model_adapters.decoders import TESTED, decoder_fields, decoder_weights, head_weights
from model_adapters.reading import refuse_unread
from model_adapters.towers import READ as TOWER_READ
from model_adapters.towers import block_fields, tower_weights
from veena_lens.config import ConnectorConfig, HookedVLMConfig, VisionConfig
from veena_lens.weight_map import Adapter, WeightMap

READ = ("text_config", "vision_config", "image_token_id", "scale_factor", "tie_word_embeddings")
# The number of tokens per tile follows from the tower; files of the hub repeat the size of the vocabulary.
HARMLESS = ("image_seq_len", "vocab_size")
# Settings of the training code in files of the hub; no model reads them.
TEXT_HARMLESS = ("is_llama_config", "neftune_noise_alpha", "perceiver_config", "pixel_shuffle_factor")
TEXT_HARMLESS += ("transformers.js_config",)
# Sizes of the processor, and a setting of the training code.
TOWER_HARMLESS = ("max_image_size", "size", "use_base_siglip")


def tower_config(config: Any, merge: int) -> VisionConfig:
    """Return the native tower. Raises: ValueError for sides that are not single numbers, or for an unread field."""
    for name in ("image_size", "patch_size"):
        if not isinstance(getattr(config, name), int):
            raise ValueError(f"Vision tower: {name}={getattr(config, name)!r} must be one number.")
    refuse_unread(config, TOWER_READ, TOWER_HARMLESS)
    return VisionConfig(
        kind="siglip",
        n_layers=config.num_hidden_layers,
        feature_layers=(config.num_hidden_layers,),
        has_last_norm=True,
        positions_by_fraction=True,
        merge_size=merge,
        **block_fields(config),
    )


def idefics3_config(config: Any) -> HookedVLMConfig:
    """Return the native configuration."""
    text = config.text_config
    refuse_unread(config, READ, HARMLESS)
    vision = tower_config(config.vision_config, config.scale_factor)
    fields = decoder_fields(text, harmless=TEXT_HARMLESS)
    fields["tie_word_embeddings"] = bool(config.tie_word_embeddings)  # the decoder's field does not concern the head
    return HookedVLMConfig(
        image_layout="tiles",
        image_token_id=config.image_token_id,
        vision=vision,
        connector=ConnectorConfig(
            kind="linear",
            d_in=vision.d_model * vision.merge_size**2,
            d_hidden=0,
            d_out=text.hidden_size,
            bias=False,
        ),
        **fields,
    )


def idefics3_weights(cfg: HookedVLMConfig) -> WeightMap:
    """Return the map of the whole model, in the names of today's transformers."""
    assert cfg.vision is not None
    return (
        decoder_weights(cfg).under("", "model.text_model")
        | head_weights(cfg)
        | tower_weights(cfg.vision).under("vision", "model.vision_model")
        | WeightMap({"connector.proj.weight": "model.connector.modality_projection.proj.weight"})
    )


ADAPTER = Adapter(
    architecture="Idefics3ForConditionalGeneration",
    read_config=idefics3_config,
    weight_map=idefics3_weights,
    image_layout="tiles",
    hub_ids=(
        "HuggingFaceM4/Idefics3-8B-Llama3",
        "HuggingFaceTB/SmolVLM-Instruct",
        "HuggingFaceTB/SmolVLM-256M-Instruct",
        "HuggingFaceTB/SmolVLM-500M-Instruct",
    ),
    note="images as tiles with text between them, SigLIP tower, one linear map; Llama, Mistral, Qwen2 or Qwen3 decoder",
    tested=f"{TESTED}; tower, tiles, smaller images under a mask, several images and none in one batch",
)

# SmolVLM2 (Marafioti et al. 2025, arXiv 2504.05299): the same model under another name.
SMOLVLM = replace(
    ADAPTER,
    architecture="SmolVLMForConditionalGeneration",
    hub_ids=(
        "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
        "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
        "HuggingFaceTB/SmolVLM2-256M-Video-Instruct",
    ),
    note="as Idefics3; video frames are images that are not tiled",
)
