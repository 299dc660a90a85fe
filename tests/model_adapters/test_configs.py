"""Configurations: the hub's own are read, and what nobody reads is refused by name."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import transformers

from tests.cases import CASES, build_hf, hf_config
from tests.model_adapters.hub_configs import COUNTS, HUB, TOWER_COUNTS
from tests.onevision_cases import ONEVISION_CASES
from tests.qwen_cases import QWEN_CASES
from tests.tile_cases import TILE_CASES
from veena_lens.checkpoints.filling import parameter_shapes, require_fit
from veena_lens.checkpoints.registry import find_adapter
from veena_lens.config import HookedVLMConfig
from veena_lens.images.anyres import image_in_tiles
from veena_lens.model.model import HookedVLM


def read(raw: dict[str, Any]) -> HookedVLMConfig:
    raw = copy.deepcopy(raw)
    config = transformers.CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    return find_adapter(raw["architectures"][0]).read_config(config)


@pytest.mark.parametrize("name", HUB)
def test_configuration_of_the_hub_is_read(name: str) -> None:
    raw = HUB[name]
    text = raw.get("text_config", raw)
    cfg = read(raw)
    assert cfg.d_vocab == text["vocab_size"]
    assert cfg.norm_eps == text.get("rms_norm_eps", 1e-6)
    assert (cfg.vision is None) == ("vision_config" not in raw)
    assert cfg.d_head == text.get("head_dim", cfg.d_model // cfg.n_heads)


@pytest.mark.parametrize("name", COUNTS)
def test_hub_model_has_the_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        model = HookedVLM(read(HUB[name]))
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]


@pytest.mark.parametrize("name", TOWER_COUNTS)
def test_tower_of_a_hub_model_has_the_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        model = HookedVLM(read(HUB[name]))
    parts = ("vision.", "connector.", "deepstack.")
    assert sum(p.numel() for n, p in model.named_parameters() if n.startswith(parts)) == TOWER_COUNTS[name]


@pytest.mark.parametrize("name", COUNTS)
def test_hub_model_maps_onto_every_parameter_that_hugging_face_has(name: str) -> None:
    raw = copy.deepcopy(HUB[name])
    cfg, adapter = read(raw), find_adapter(raw["architectures"][0])
    config = transformers.CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    with torch.device("meta"):
        theirs = getattr(transformers, adapter.architecture)(config)
        ours = HookedVLM(cfg)
    shapes = {k: tuple(v.shape) for k, v in theirs.state_dict().items()}
    require_fit(ours, shapes, adapter, adapter.weight_map(cfg), name)


@pytest.mark.parametrize("case", [*CASES, *QWEN_CASES, *ONEVISION_CASES, *TILE_CASES], ids=str)
def test_weight_map_names_every_parameter_once(case: Any) -> None:
    config = hf_config(case)
    architecture = case.model_class.__name__ if hasattr(case, "model_class") else type(build_hf(case)).__name__
    adapter = find_adapter(architecture)
    cfg = adapter.read_config(config)
    with torch.device("meta"):
        wanted = parameter_shapes(HookedVLM(cfg))
    weights = adapter.weight_map(cfg)
    assert set(weights.names) == set(wanted)
    # A tensor is read once, or in parts: fused queries, keys and values.
    assert len(set(weights.names.values())) == len(weights) - sum(i > 0 for i, _ in weights.parts.values())
    shared = [ours for ours in weights.owners.values() if len(ours) > 1]
    assert all([weights.parts[o] for o in ours] == [(0, 3), (1, 3), (2, 3)] for ours in shared)


def test_llava_of_the_hub_has_its_numbers() -> None:
    cfg = read(HUB["llava-hf/llava-1.5-7b-hf"])
    assert cfg.vision is not None and cfg.connector is not None
    assert (cfg.n_layers, cfg.d_model, cfg.n_heads, cfg.d_head, cfg.d_mlp) == (32, 4096, 32, 128, 11008)
    assert (cfg.vision.n_layers, cfg.vision.n_unused_layers, cfg.vision.feature_layers) == (23, 1, (23,))
    assert (cfg.vision.grid, cfg.vision.n_positions, cfg.vision.n_features) == ((24, 24), 577, 576)
    assert (cfg.connector.d_in, cfg.connector.d_hidden, cfg.connector.d_out) == (1024, 4096, 4096)
    assert (cfg.image_token_id, cfg.pad_token_id, cfg.n_ctx) == (32000, 32001, 4096)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("llava-hf/llava-1.5-7b-hf", "written out"),
        ("Qwen/Qwen2-VL-7B-Instruct", "saved again"),
        ("Qwen/Qwen2.5-VL-7B-Instruct", "saved again"),
    ],
)
def test_written_out_configuration_equals_the_short_one(name: str, how: str) -> None:
    assert read(HUB[f"{name}, {how}"]) == read(HUB[name])


def test_qwen_vl_models_of_the_hub_have_their_numbers() -> None:
    two, three = read(HUB["Qwen/Qwen2-VL-7B-Instruct"]), read(HUB["Qwen/Qwen3-VL-4B-Instruct"])
    assert two.vision is not None and two.connector is not None and three.vision is not None
    assert (two.n_layers, two.d_model, two.n_heads, two.n_key_value_heads, two.d_head) == (28, 3584, 28, 4, 128)
    assert (two.image_token_id, two.video_token_id, two.n_ctx, two.norm_eps) == (151655, 151656, 32768, 1e-6)
    assert (two.rope.theta, two.rope.sections, two.rope.interleaved) == (1e6, (16, 24, 24), False)
    assert (two.qkv_bias, two.attn_out_bias, two.qk_norm, two.sliding_windows) == (True, False, False, ())
    assert (two.vision.n_layers, two.vision.d_model, two.vision.d_head, two.vision.d_mlp) == (32, 1280, 80, 5120)
    assert (two.vision.patch_width, two.vision.merge_size, two.vision.act_fn) == (1176, 2, "quick_gelu")
    assert (two.connector.d_in, two.connector.d_hidden, two.connector.d_out) == (5120, 5120, 3584)
    assert (three.n_heads, three.d_head, three.d_model, three.n_ctx) == (32, 128, 2560, 262144)
    assert (three.rope.theta, three.rope.sections, three.rope.interleaved) == (5e6, (24, 20, 20), True)
    assert (three.qkv_bias, three.qk_norm, three.tie_word_embeddings) == (False, True, True)
    assert (three.vision.deepstack_layers, three.vision.position_grid, three.vision.d_mlp) == ((5, 11, 17), 48, 4096)


def test_onevision_of_the_hub_has_its_numbers() -> None:
    cfg = read(HUB["llava-hf/llava-onevision-qwen2-0.5b-ov-hf"])
    assert cfg.vision is not None
    assert (cfg.n_layers, cfg.d_model, cfg.n_heads, cfg.n_key_value_heads, cfg.d_head) == (24, 896, 14, 2, 64)
    assert (cfg.tie_word_embeddings, cfg.image_token_id, cfg.video_token_id) == (True, 151646, 151647)
    assert (cfg.vision.n_layers, cfg.vision.n_unused_layers, cfg.vision.feature_layers) == (26, 0, (26,))
    assert (cfg.vision.grid, cfg.vision.n_features, cfg.vision.has_pooling_head) == ((27, 27), 729, False)
    assert (len(cfg.image_pinpoints), cfg.max_tiles, cfg.tiles_single_images_only) == (36, 9, True)
    # Tokens as published: the whole view, and a grid of at most about nine tiles with a newline a row.
    assert [image_in_tiles(cfg, size).n_tokens for size in ((100, 100), (600, 800))] == [1485, 4725]


def test_tiled_models_of_the_hub_have_their_numbers() -> None:
    large, small = (read(HUB[f"Hugging{n}"]) for n in ("FaceM4/Idefics3-8B-Llama3", "FaceTB/SmolVLM-256M-Instruct"))
    assert large.vision is not None and small.vision is not None and large.connector is not None
    assert (large.rope.rope_type, large.rope.theta, large.n_key_value_heads) == ("llama3", 5e5, 8)
    assert (large.image_layout, large.image_token_id, large.pad_token_id) == ("tiles", 128257, 128002)
    assert (large.vision.grid, large.vision.token_grid, large.vision.n_features) == ((26, 26), (13, 13), 169)
    assert (large.vision.has_last_norm, large.vision.positions_by_fraction) == (True, True)
    assert (large.connector.kind, large.connector.d_in, large.connector.d_out) == ("linear", 4608, 4096)
    assert (large.connector.bias, large.connector.d_hidden, small.tie_word_embeddings) == (False, 0, False)
    assert (small.vision.n_layers, small.vision.d_mlp, small.vision.n_features) == (12, 3072, 64)
    assert (small.n_heads, small.n_key_value_heads, small.d_head, small.pad_token_id) == (9, 3, 64, 2)


@pytest.mark.parametrize(
    ("part", "field", "value", "told"),
    [
        ("text_config", "qk_layer_norms", True, "qk_layer_norms=True"),
        ("text_config", "use_resampler", True, "use_resampler=True"),
        ("text_config", "rope_interleaved", True, "rope_interleaved=True"),
        ("text_config", "num_local_experts", 8, "num_local_experts=8"),
        ("vision_config", "image_size", [512, 256], "image_size=[512, 256] must be one number"),
        ("vision_config", "image_size", 500, "31 patches per side (image_size=500, patch_size=16) must be a multiple"),
        ("vision_config", "hidden_act", "mish", "activation 'mish' is not supported"),
        (None, "scale_factor", 5, "must be a multiple of merge_size=5"),
        (None, "resampler_config", {"depth": 3}, "resampler_config={'depth': 3}"),
        (None, "quantization_config", {"bits": 4, "quant_method": "gptq"}, "quantised"),
    ],
)
@pytest.mark.parametrize("name", ["SmolVLM-256M-Instruct", "SmolVLM2-500M-Video-Instruct"])
def test_value_of_a_tiled_model_that_cannot_be_followed_is_refused_by_name(
    name: str, part: str | None, field: str, value: Any, told: str
) -> None:
    raw = copy.deepcopy(HUB[f"HuggingFaceTB/{name}"])
    (raw if part is None else raw[part])[field] = value
    with pytest.raises(ValueError, match=re.escape(told)):
        read(raw)


@pytest.mark.parametrize(
    ("architecture", "told"),
    [
        ("Idefics2ForConditionalGeneration", "perceiver resampler"),
        ("IdeficsForVisionText2Text", "gated cross-attention"),
        ("AriaForConditionalGeneration", "mixture of experts"),
    ],
)
def test_relative_of_another_build_is_refused_with_what_it_would_need(architecture: str, told: str) -> None:
    with pytest.raises(ValueError, match=f"{architecture}.*would need .*{told}.*Known: .*Idefics3"):
        find_adapter(architecture)


def test_windowed_tower_of_the_hub_has_its_numbers() -> None:
    three, big = read(HUB["Qwen/Qwen2.5-VL-3B-Instruct"]), read(HUB["Qwen/Qwen2.5-VL-72B-Instruct"])
    assert three.vision is not None and three.connector is not None and big.vision is not None
    assert (three.n_layers, three.d_model, three.n_key_value_heads, three.n_ctx) == (36, 2048, 2, 128000)
    assert (three.tie_word_embeddings, big.tie_word_embeddings, three.sliding_windows) == (True, False, ())
    assert (three.rope.sections, three.positions_per_second, three.qkv_bias) == ((16, 24, 24), 2, True)
    tower = three.vision
    assert (tower.n_layers, tower.d_model, tower.d_mlp, big.vision.d_mlp) == (32, 1280, 3420, 3456)
    assert (tower.normalization_type, tower.gated_mlp, tower.mlp_bias, tower.act_fn) == ("RMS", True, True, "silu")
    assert (tower.window_side, tower.full_attention_layers) == (4, (7, 15, 23, 31))
    assert [tower.is_windowed(layer) for layer in (6, 7, 8, 31)] == [True, False, True, False]
    assert (three.connector.d_in, three.connector.d_hidden, three.connector.d_out) == (5120, 5120, 2048)


def test_llama3_rope_and_qwen2_biases_are_read() -> None:
    llama, qwen = (read(HUB[n]) for n in ("meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"))
    assert llama.rope.rope_type == "llama3" and llama.rope.theta == 500_000.0
    assert llama.rope.parameters["original_max_position_embeddings"] == 8192
    assert (qwen.qkv_bias, qwen.attn_out_bias, qwen.tie_word_embeddings, qwen.sliding_windows) == (
        True,
        False,
        True,
        (),
    )


@pytest.mark.parametrize(
    ("part", "field", "value", "told"),
    [
        ("text_config", "attn_logit_softcapping", 50.0, "attn_logit_softcapping=50.0"),
        ("text_config", "residual_multiplier", 0.22, "residual_multiplier=0.22"),
        ("vision_config", "rotary_embedding", True, "rotary_embedding=True"),
        (None, "use_image_newline", True, "use_image_newline=True"),
        (None, "quantization_config", {"bits": 4, "quant_method": "gptq"}, "quantised"),
        ("text_config", "hidden_act", "xielu", "activation 'xielu' is not supported; supported: "),
        ("text_config", "model_type", "gpt2", "Text decoder 'gpt2' is not supported; supported: llama, mistral, qwen2"),
        ("vision_config", "model_type", "dinov2", "Vision tower 'dinov2' is not supported"),
        (None, "vision_feature_layer", -26, "vision_feature_layer -26 is outside the tower's 25 hidden states"),
        (None, "vision_feature_layer", [], "vision_feature_layer=[] must name at least one"),
    ],
)
def test_value_that_no_mapping_reads_is_refused_by_name(part: str | None, field: str, value: Any, told: str) -> None:
    raw = copy.deepcopy(HUB["llava-hf/llava-1.5-7b-hf"])
    if field == "model_type":
        raw[part] = dict(model_type=value)  # type: ignore[index]
    else:
        (raw if part is None else raw[part])[field] = value
    with pytest.raises(ValueError, match=re.escape(told)):
        read(raw)


ONE = "llava-hf/llava-onevision-qwen2-7b-ov-hf"


@pytest.mark.parametrize(
    ("part", "field", "value", "told"),
    [
        (None, "vision_aspect_ratio", "anyres", "vision_aspect_ratio='anyres' must be 'anyres_max_N'"),
        (None, "vision_aspect_ratio", "square", "vision_aspect_ratio='square' must be 'anyres_max_N'"),
        (None, "vision_feature_select_strategy", "default", "a tile has 728 features, but tiles must have"),
        (None, "mm_newline_position", "one_token", "mm_newline_position='one_token'"),
        ("text_config", "num_experts", 8, "num_experts=8"),
        ("text_config", "model_type", "qwen2_moe", "Text decoder 'qwen2_moe' is not supported"),
    ],
)
def test_onevision_value_that_cannot_be_followed_is_refused_by_name(
    part: str | None, field: str, value: Any, told: str
) -> None:
    raw = copy.deepcopy(HUB[ONE])
    if field == "model_type":
        raw[part] = dict(model_type=value)  # type: ignore[index]
    else:
        (raw if part is None else raw[part])[field] = value
    with pytest.raises(ValueError, match=re.escape(told)):
        read(raw)


LONGROPE = dict(rope_type="longrope", short_factor=[1.0] * 64, long_factor=[1.0] * 64, factor=2.0)
TWO, THREE = "Qwen/Qwen2-VL-7B-Instruct", "Qwen/Qwen3-VL-4B-Instruct"
WINDOWED = "Qwen/Qwen2.5-VL-7B-Instruct"


@pytest.mark.parametrize(
    ("name", "part", "field", "value", "told"),
    [
        (TWO, "vision_config", "patch_size", [14, 16], "patch_size=[14, 16] must be one number"),
        (THREE, "vision_config", "temporal_patch_size", [2, 1], "temporal_patch_size=[2, 1] must be one number"),
        (THREE, "vision_config", "num_position_embeddings", 2000, "num_position_embeddings=2000 must be a square"),
        (THREE, "vision_config", "deepstack_visual_indexes", [17, 5], "indexes=[17, 5] must be in rising order"),
        (THREE, "vision_config", "deepstack_visual_indexes", [5, 5], "indexes=[5, 5] must be in rising order"),
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
    ],
)  # fmt: skip
def test_qwen_vl_value_that_cannot_be_followed_is_refused_by_name(
    name: str, part: str | None, field: str, value: Any, told: str
) -> None:
    raw = copy.deepcopy(HUB[name])
    (raw if part is None else raw[part])[field] = value
    with pytest.raises(ValueError, match=re.escape(told)):
        read(raw)


@pytest.mark.parametrize("name", [TWO, THREE, WINDOWED])
def test_other_rule_of_rotary_positions_in_the_tower_is_refused(name: str) -> None:
    raw = copy.deepcopy(HUB[name])
    config = transformers.CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    config.vision_config.rope_parameters = dict(rope_type="linear", rope_theta=1e4, factor=2.0)
    with pytest.raises(ValueError, match="Vision tower: rope_type 'linear' is not supported"):
        find_adapter(raw["architectures"][0]).read_config(config)


@pytest.mark.parametrize("pair", [[14, 14], (14, 14)])
def test_patch_size_written_as_a_pair_of_equal_numbers_is_read(pair: Any) -> None:
    raw = copy.deepcopy(HUB[TWO])
    raw["vision_config"] |= dict(patch_size=pair, temporal_patch_size=[2, 2])
    assert read(raw) == read(HUB[TWO])


@pytest.mark.parametrize(
    ("architecture", "needed"),
    [
        ("Qwen3VLMoeForConditionalGeneration", "a mixture of experts in its decoder blocks"),
        ("Qwen2_5OmniForConditionalGeneration", "an audio tower"),
        ("Qwen2_5OmniThinkerForConditionalGeneration", "an audio tower"),
        ("Qwen2AudioForConditionalGeneration", "an audio tower"),
        ("Qwen2VLModel", ""),
    ],
)
def test_related_architecture_is_refused_with_the_known_ones(architecture: str, needed: str) -> None:
    with pytest.raises(
        ValueError, match=f"{architecture}.*near names: .*Qwen.*{needed}.*Known: .*Qwen3VLForConditionalGeneration"
    ):
        find_adapter(architecture)


def test_mistral_and_qwen2_ignore_the_bias_field_that_their_own_model_ignores() -> None:
    raw = HUB["mistralai/Mistral-7B-Instruct-v0.2"] | dict(attention_bias=True, mlp_bias=True)
    cfg = read(raw)
    assert (cfg.qkv_bias, cfg.attn_out_bias, cfg.mlp_bias) == (False, False, False)
