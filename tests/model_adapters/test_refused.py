"""Configurations that cannot be followed: a value that no mapping reads is refused by name, and so is a relative."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import transformers

from tests.model_adapters.test_configs import HUB, read
from veena_lens.checkpoints.registry import find_adapter
from veena_lens.config import HookedVLMConfig

LLAVA, ONE = "llava-hf/llava-1.5-7b-hf", "llava-hf/llava-onevision-qwen2-7b-ov-hf"
TWO, THREE, WINDOWED = "Qwen/Qwen2-VL-7B-Instruct", "Qwen/Qwen3-VL-4B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct"
GEMMA, GEMMA_TEXT = "google/gemma-3-4b-it", "google/gemma-3-1b-it"
SMOL = ("HuggingFaceTB/SmolVLM-256M-Instruct", "HuggingFaceTB/SmolVLM2-500M-Video-Instruct")
LONGROPE = dict(rope_type="longrope", short_factor=[1.0] * 64, long_factor=[1.0] * 64, factor=2.0)
TILED = [
    ("text_config", "qk_layer_norms", True, "qk_layer_norms=True"),
    ("text_config", "use_resampler", True, "use_resampler=True"),
    ("text_config", "rope_interleaved", True, "rope_interleaved=True"),
    ("text_config", "num_local_experts", 8, "num_local_experts=8"),
    ("vision_config", "image_size", [512, 256], "image_size=[512, 256] must be one number"),
    ("vision_config", "image_size", 500, "31 patches per side (image_size=500, patch_size=16) must be a multiple of"),
    ("vision_config", "hidden_act", "mish", "activation 'mish' is not supported"),
    (None, "scale_factor", 5, "must be a multiple of merge_size=5"),
    (None, "resampler_config", {"depth": 3}, "resampler_config={'depth': 3}"),
    (None, "quantization_config", {"bits": 4, "quant_method": "gptq"}, "quantised"),
]


@pytest.mark.parametrize(
    ("name", "part", "field", "value", "told"),
    [
        (LLAVA, "text_config", "attn_logit_softcapping", 50.0, "attn_logit_softcapping=50.0"),
        (LLAVA, "text_config", "residual_multiplier", 0.22, "residual_multiplier=0.22"),
        (LLAVA, "vision_config", "rotary_embedding", True, "rotary_embedding=True"),
        (LLAVA, None, "use_image_newline", True, "use_image_newline=True"),
        (LLAVA, None, "quantization_config", {"bits": 4, "quant_method": "gptq"}, "quantised"),
        (LLAVA, "text_config", "hidden_act", "xielu", "activation 'xielu' is not supported; supported: "),
        (LLAVA, "text_config", "model_type", "gpt2", "Text decoder 'gpt2' is not supported; supported: llama, mist"),
        (LLAVA, "vision_config", "model_type", "dinov2", "Vision tower 'dinov2' is not supported"),
        (LLAVA, None, "vision_feature_layer", -26, "vision_feature_layer -26 is outside the tower's 25 hidden states"),
        (LLAVA, None, "vision_feature_layer", [], "vision_feature_layer=[] must name at least one"),
        (ONE, None, "vision_aspect_ratio", "anyres", "vision_aspect_ratio='anyres' must be 'anyres_max_N'"),
        (ONE, None, "vision_aspect_ratio", "square", "vision_aspect_ratio='square' must be 'anyres_max_N'"),
        (ONE, None, "vision_feature_select_strategy", "default", "a tile has 728 features, but tiles must have 27"),
        (ONE, None, "mm_newline_position", "one_token", "mm_newline_position='one_token'"),
        (ONE, "text_config", "num_experts", 8, "num_experts=8"),
        (ONE, "text_config", "model_type", "qwen2_moe", "Text decoder 'qwen2_moe' is not supported"),
        (TWO, "vision_config", "patch_size", [14, 16], "patch_size=[14, 16] must be one number"),
        (THREE, "vision_config", "temporal_patch_size", [2, 1], "temporal_patch_size=[2, 1] must be one number"),
        (THREE, "vision_config", "num_position_embeddings", 2000, "num_position_embeddings=2000 must be a square"),
        (THREE, "vision_config", "deepstack_visual_indexes", [17, 5], "[17, 5] must be in rising order"),
        (THREE, "vision_config", "deepstack_visual_indexes", [5, 5], "[5, 5] must be in rising order"),
        (THREE, "vision_config", "deepstack_visual_indexes", [5, 24], "deep-stack layer 24 is outside the tower's 24"),
        (THREE, "vision_config", "out_hidden_size", 2048, "has 2048 dimensions but the decoder expects 2560"),
        (TWO, "vision_config", "hidden_size", 1536, "has 1536 dimensions but the decoder expects 3584"),
        (TWO, "vision_config", "hidden_act", "mish", "activation 'mish' is not supported"),
        (TWO, "vision_config", "window_size", 112, "window_size=112"),
        (TWO, None, "rope_scaling", dict(type="mrope", mrope_section=[16, 24, 20]), "sections [16, 24, 20] must"),
        (THREE, "text_config", "rope_scaling", LONGROPE, "rope_type 'longrope' is not supported"),
        (THREE, "text_config", "num_experts", 128, "num_experts=128"),
        (TWO, None, "use_mrope_v2", True, "use_mrope_v2=True"),
        (WINDOWED, "vision_config", "window_size", 27, "window_size=27 must be at least the 2 patches of 14 pixels"),
        (WINDOWED, "vision_config", "out_hidden_size", 2048, "has 2048 dimensions but the decoder expects 3584"),
        (WINDOWED, "vision_config", "window_shift", 2, "window_shift=2"),
        (WINDOWED, "vision_config", "patch_size", [14, 16], "patch_size=[14, 16] must be one number"),
        (WINDOWED, None, "num_experts", 8, "num_experts=8"),
        (TWO, None, "quantization_config", {"bits": 4, "quant_method": "gptq"}, "quantised"),
        (GEMMA_TEXT, None, "final_logit_softcapping", 30.0, "final_logit_softcapping=30.0: soft-capped logits"),
        (GEMMA, "text_config", "attn_logit_softcapping", 50.0, "attn_logit_softcapping=50.0: soft-capped logits"),
        (GEMMA_TEXT, None, "use_bidirectional_attention", True, "use_bidirectional_attention=True is not supported"),
        (GEMMA, "text_config", "hidden_activation", "mish", "activation 'mish' is not supported"),
        (GEMMA, "text_config", "num_experts", 8, "num_experts=8"),
        (GEMMA, "text_config", "rope_scaling", dict(rope_type="longrope", short_factor=[1.0] * 128,
                                                   long_factor=[1.0] * 128, factor=2.0), "rope_type 'longrope'"),
        (GEMMA, None, "mm_tokens_per_image", 250, "mm_tokens_per_image=250 must be a square"),
        (GEMMA, None, "mm_tokens_per_image", 49, "mm_tokens_per_image=49 must be a square whose side divides the 64"),
        (GEMMA, None, "projector_hidden_act", "gelu", "projector_hidden_act='gelu'"),
        (GEMMA, "vision_config", "window_size", 112, "window_size=112"),
        (GEMMA, None, "quantization_config", {"bits": 4, "quant_method": "gptq"}, "quantised"),
        (GEMMA, "vision_config", "model_type", "clip_vision_model", "clip_vision_model' must be 'siglip_vision_model"),
        *((name, *row) for name in SMOL for row in TILED),
    ],
)  # fmt: skip
def test_value_that_cannot_be_followed_is_refused_by_name(
    name: str, part: str | None, field: str, value: Any, told: str
) -> None:
    raw = copy.deepcopy(HUB[name])
    if field == "model_type" and name in (LLAVA, ONE):
        raw[str(part)] = dict(model_type=value)
    else:
        (raw if part is None else raw[part])[field] = value
    with pytest.raises(ValueError, match=re.escape(told)):
        read(raw)


NEAR, QWENS = "near names: .*Qwen", "Known: .*Qwen3VLForConditionalGeneration"


@pytest.mark.parametrize(
    ("architecture", "told"),
    [
        ("Idefics2ForConditionalGeneration", "would need .*perceiver resampler.*Known: .*Idefics3"),
        ("IdeficsForVisionText2Text", "would need .*gated cross-attention.*Known: .*Idefics3"),
        ("AriaForConditionalGeneration", "would need .*mixture of experts.*Known: .*Idefics3"),
        ("Gemma3nForConditionalGeneration", "would need .*nested widths.*audio.*Known: .*Gemma3ForCausalLM"),
        ("Gemma3nForCausalLM", "would need .*nested widths.*audio.*Known: .*Gemma3ForCausalLM"),
        ("Qwen3VLMoeForConditionalGeneration", f"{NEAR}.*a mixture of experts in its decoder blocks.*{QWENS}"),
        ("Qwen2_5OmniForConditionalGeneration", f"{NEAR}.*an audio tower.*{QWENS}"),
        ("Qwen2_5OmniThinkerForConditionalGeneration", f"{NEAR}.*an audio tower.*{QWENS}"),
        ("Qwen2AudioForConditionalGeneration", f"{NEAR}.*an audio tower.*{QWENS}"),
        ("Qwen2VLModel", f"{NEAR}.*{QWENS}"),
    ],
)
def test_relative_of_another_build_is_refused_with_what_it_would_need(architecture: str, told: str) -> None:
    with pytest.raises(ValueError, match=f"{architecture}.*{told}"):
        find_adapter(architecture)


@pytest.mark.parametrize(
    ("layers", "told"),
    [
        (["chunked_attention"] * 26, "layer_types=.*must name one of sliding_attention, full_attention"),
        (["full_attention"] * 25, "layer_types=.*for each layer"),
    ],
    ids=["unknown", "too few"],
)
def test_kinds_of_layers_that_are_not_known_are_refused(layers: list[str], told: str) -> None:
    config = transformers.CONFIG_MAPPING["gemma3_text"].from_dict(copy.deepcopy(HUB[GEMMA_TEXT]))
    config.layer_types = layers
    with pytest.raises(ValueError, match=told):
        find_adapter("Gemma3ForCausalLM").read_config(config)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (dict(normalization_type="LN", post_norms=True), "go with normalization_type='RMS'"),
        (dict(query_scalar=0), "query_scalar=0 must be positive"),
    ],
    ids=["layer norm", "scale"],
)
def test_fields_that_make_no_model_are_refused(fields: dict[str, Any], told: str) -> None:
    given = dict(n_layers=1, d_model=8, n_heads=2, d_head=4, d_mlp=8, act_fn="gelu", norm_eps=1e-6, d_vocab=9, n_ctx=9)
    with pytest.raises(ValueError, match=told):
        HookedVLMConfig(**{**given, "normalization_type": "RMS", **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [TWO, THREE, WINDOWED])
def test_other_rule_of_rotary_positions_in_the_tower_is_refused(name: str) -> None:
    raw = copy.deepcopy(HUB[name])
    config = transformers.CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    config.vision_config.rope_parameters = dict(rope_type="linear", rope_theta=1e4, factor=2.0)
    with pytest.raises(ValueError, match="Vision tower: rope_type 'linear' is not supported"):
        find_adapter(raw["architectures"][0]).read_config(config)
