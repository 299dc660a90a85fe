"""Configurations: the hub's own are read, and what nobody reads is refused by name."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import transformers

from tests.cases import CASES, build_hf, hf_config
from tests.model_adapters.hub_configs import COUNTS, HUB
from veena_lens.checkpoints.filling import parameter_shapes, require_fit
from veena_lens.checkpoints.registry import find_adapter
from veena_lens.config import HookedVLMConfig
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
    assert cfg.d_head * cfg.n_heads == cfg.d_model


@pytest.mark.parametrize("name", COUNTS)
def test_hub_model_has_the_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        model = HookedVLM(read(HUB[name]))
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]


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


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weight_map_names_every_parameter_once(case: Any) -> None:
    config = hf_config(case)
    architecture = type(build_hf(case)).__name__
    adapter = find_adapter(architecture)
    cfg = adapter.read_config(config)
    with torch.device("meta"):
        wanted = parameter_shapes(HookedVLM(cfg))
    weights = adapter.weight_map(cfg)
    assert set(weights.names) == set(wanted)
    assert len(set(weights.names.values())) == len(weights)


def test_llava_of_the_hub_has_its_numbers() -> None:
    cfg = read(HUB["llava-hf/llava-1.5-7b-hf"])
    assert cfg.vision is not None and cfg.connector is not None
    assert (cfg.n_layers, cfg.d_model, cfg.n_heads, cfg.d_head, cfg.d_mlp) == (32, 4096, 32, 128, 11008)
    assert (cfg.vision.n_layers, cfg.vision.n_unused_layers, cfg.vision.feature_layers) == (23, 1, (23,))
    assert (cfg.vision.grid, cfg.vision.n_positions, cfg.vision.n_features) == ((24, 24), 577, 576)
    assert (cfg.connector.d_in, cfg.connector.d_hidden, cfg.connector.d_out) == (1024, 4096, 4096)
    assert (cfg.image_token_id, cfg.pad_token_id, cfg.n_ctx) == (32000, 32001, 4096)


def test_written_out_configuration_equals_the_short_one() -> None:
    assert read(HUB["llava-hf/llava-1.5-7b-hf, written out"]) == read(HUB["llava-hf/llava-1.5-7b-hf"])


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


def test_mistral_and_qwen2_ignore_the_bias_field_that_their_own_model_ignores() -> None:
    raw = HUB["mistralai/Mistral-7B-Instruct-v0.2"] | dict(attention_bias=True, mlp_bias=True)
    cfg = read(raw)
    assert (cfg.qkv_bias, cfg.attn_out_bias, cfg.mlp_bias) == (False, False, False)
