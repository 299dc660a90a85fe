"""Gemma-3 (Gemma Team 2025, arXiv 2503.19786): a SigLIP tower, means of squares of patches, and images whose tokens
read each other in both directions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from model_adapters.decoders import TESTED, decoder_weights, head_weights
from model_adapters.gemma3_text import gemma3_fields
from model_adapters.llava import RENAMES
from model_adapters.reading import refuse_unread
from model_adapters.towers import tower_config, tower_weights
from veena_lens.config import ConnectorConfig, HookedVLMConfig
from veena_lens.weight_map import Adapter, WeightMap

READ = ("text_config", "vision_config", "mm_tokens_per_image", "image_token_index", "tie_word_embeddings")
# The wrappers around image tokens are text like any other.
HARMLESS = ("image_token_id", "boi_token_index", "eoi_token_index", "boi_token_id", "eoi_token_id")


def gemma3_config(config: Any) -> HookedVLMConfig:
    """The native configuration. Raises: ValueError for a number of tokens an image that makes no square of squares."""
    refuse_unread(config, READ, HARMLESS)
    text, tower = config.text_config, config.vision_config
    vision = tower_config(tower, -1, "full")
    patches, side = vision.grid[0], int(config.mm_tokens_per_image**0.5)
    if vision.kind != "siglip":
        raise ValueError(f"Means of squares of patches belong to a SigLIP tower; the tower is a {tower.model_type!r}.")
    if side < 1 or side**2 != config.mm_tokens_per_image or patches % side:
        raise ValueError(
            f"mm_tokens_per_image={config.mm_tokens_per_image} must be a square whose side divides the {patches} "
            "patches a side of the tower."
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
    """The whole model, in today's names in memory."""
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
    note="SigLIP tower, means of squares of patches; a picture's tokens read each other in both directions",
    tested=f"{TESTED}; tower, several pictures a row, padding; patching and sweeps",
)
