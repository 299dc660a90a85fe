"""Configurations: the hub's own are read, and what nobody reads is refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

from tests.cases import CASES, Case
from tests.model_adapters import hub_gemma
from tests.model_adapters.hub_configs import COUNTS as OTHERS
from tests.model_adapters.hub_configs import HUB as OTHER_HUB
from tests.model_adapters.hub_configs import TOWER_COUNTS as OTHER_TOWERS
from veena_lens.checkpoints.filling import parameter_shapes, require_fit
from veena_lens.checkpoints.registry import find_adapter
from veena_lens.config import HookedVLMConfig
from veena_lens.images.anyres import image_in_tiles
from veena_lens.model.model import HookedVLM

HUB = OTHER_HUB | hub_gemma.HUB
COUNTS = OTHERS | {name: whole for name, (whole, _) in hub_gemma.COUNTS.items()}
TOWER_COUNTS = OTHER_TOWERS | {name: tower for name, (_, tower) in hub_gemma.COUNTS.items()}


def read(raw: dict[str, Any]) -> HookedVLMConfig:
    raw = copy.deepcopy(raw)
    config = transformers.CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    return find_adapter(raw["architectures"][0]).read_config(config)


@pytest.mark.parametrize("name", HUB)
def test_configuration_of_the_hub_is_read(name: str) -> None:
    raw = HUB[name]
    text = raw.get("text_config", raw)
    cfg = read(raw)
    assert cfg.d_vocab == text.get("vocab_size", 262208)
    assert cfg.norm_eps == text.get("rms_norm_eps", 1e-6)
    assert (cfg.vision is None) == ("vision_config" not in raw)
    default = 256 if name in hub_gemma.HUB else cfg.d_model // cfg.n_heads
    assert cfg.d_head == text.get("head_dim", default)


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
    if name in hub_gemma.HUB:
        assert sum(p.numel() for p in theirs.parameters()) == COUNTS[name]
    require_fit(ours, shapes, adapter, adapter.weight_map(cfg), name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weight_map_names_every_parameter_once(case: Case) -> None:
    adapter = find_adapter(case.model_class.__name__)
    cfg = adapter.read_config(case.config())
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


def test_gemma_models_of_the_hub_have_their_numbers() -> None:
    four, large, one = (read(HUB[f"google/gemma-3-{size}-it"]) for size in ("4b", "27b", "1b"))
    assert (four.n_heads, four.n_key_value_heads, four.d_head, four.d_vocab, four.n_ctx) == (8, 4, 256, 262208, 131072)
    assert four.rope.theta == 1e6 and four.rope.parameters == {"factor": 8.0} and four.sliding_rope is not None
    assert four.sliding_rope.theta == 1e4 and four.sliding_rope.rope_type == "default"
    assert four.sliding_windows[:6] == (1024,) * 5 + (None,) and len(four.sliding_windows) == 34
    assert four.score_scale == 256**-0.5 and large.score_scale == 168**-0.5 and large.d_head == 128
    assert four.vision is not None and four.connector is not None and one.vision is None
    assert (four.vision.grid, four.vision.token_grid, four.vision.n_features) == ((64, 64), (16, 16), 256)
    assert (four.vision.merge_size, four.vision.has_last_norm, four.vision.n_unused_layers) == (4, True, 0)
    assert (four.connector.kind, four.connector.d_in, four.connector.d_out) == ("normed", 1152, 2560)
    assert (
        four.bidirectional_images and not one.bidirectional_images and four.scales_embeddings and one.scales_embeddings
    )
    assert four.tie_word_embeddings and one.tie_word_embeddings and one.rope.rope_type == "default"
    assert (one.window(0), one.window(5), one.n_ctx, one.d_vocab) == (512, None, 32768, 262144)


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


@pytest.mark.parametrize("pair", [[14, 14], (14, 14)])
def test_patch_size_written_as_a_pair_of_equal_numbers_is_read(pair: Any) -> None:
    raw = copy.deepcopy(HUB["Qwen/Qwen2-VL-7B-Instruct"])
    raw["vision_config"] |= dict(patch_size=pair, temporal_patch_size=[2, 2])
    assert read(raw) == read(HUB["Qwen/Qwen2-VL-7B-Instruct"])


def test_mistral_and_qwen2_ignore_the_bias_field_that_their_own_model_ignores() -> None:
    raw = HUB["mistralai/Mistral-7B-Instruct-v0.2"] | dict(attention_bias=True, mlp_bias=True)
    cfg = read(raw)
    assert (cfg.qkv_bias, cfg.attn_out_bias, cfg.mlp_bias) == (False, False, False)
