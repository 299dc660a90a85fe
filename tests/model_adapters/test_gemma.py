"""Gemma-3's configurations as they lie on the hub, the weights they ask for, and what cannot be followed."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from tests.cases import hf_model
from tests.gemma_cases import GEMMA_BY_NAME, GEMMA_CASES, GemmaCase
from veena_lens.checkpoints.filling import parameter_shapes, require_fit
from veena_lens.checkpoints.registry import find_adapter
from veena_lens.config import HookedVLMConfig
from veena_lens.model.model import HookedVLM

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


def config_of(raw: dict[str, Any]) -> Any:
    raw = copy.deepcopy(raw)
    return transformers.CONFIG_MAPPING[raw["model_type"]].from_dict(raw)


def read(raw: dict[str, Any]) -> HookedVLMConfig:
    return find_adapter(raw["architectures"][0]).read_config(config_of(raw))


@pytest.mark.parametrize("name", HUB)
def test_hub_model_has_the_published_parameters_and_maps_onto_hugging_faces(name: str) -> None:
    cfg, adapter = read(HUB[name]), find_adapter(HUB[name]["architectures"][0])
    with torch.device("meta"):
        theirs, ours = getattr(transformers, adapter.architecture)(config_of(HUB[name])), HookedVLM(cfg)
    whole, tower = COUNTS[name]
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) == whole
    parts = ("vision.", "connector.")
    assert sum(p.numel() for n, p in ours.named_parameters() if n.startswith(parts)) == tower
    shapes = {k: tuple(v.shape) for k, v in theirs.state_dict().items()}
    require_fit(ours, shapes, adapter, adapter.weight_map(cfg), name)


def test_hub_models_have_their_numbers() -> None:
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


@pytest.mark.parametrize("case", GEMMA_CASES, ids=str)
def test_weight_map_names_every_parameter_once(case: GemmaCase) -> None:
    adapter = find_adapter(case.model_class.__name__)
    cfg = adapter.read_config(case.config())
    with torch.device("meta"):
        wanted = parameter_shapes(HookedVLM(cfg))
    weights = adapter.weight_map(cfg)
    assert set(weights.names) == set(wanted) and len(set(weights.names.values())) == len(weights)


def _sub(key: str, *pairs: tuple[str, str]) -> str:
    return next((found for pattern, new in pairs if (found := re.sub(pattern, new, key)) != key), key)


LAYOUTS: dict[str, Any] = {
    "in memory": lambda key: key,
    "hub files": lambda key: _sub(
        key,
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.language_model\.", "language_model.model."),
        (r"^model\.vision_tower\.", "vision_tower.vision_model."),
        (r"^model\.multi_modal", "multi_modal"),
    ),
    "some releases of 4.5x": lambda key: _sub(key, (r"^model\.vision_tower\.", "model.vision_tower.vision_model.")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["plain", "untied"])
def test_every_layout_arrives_at_the_names_that_transformers_renames_to(name: str, layout: str) -> None:
    theirs = hf_model(GEMMA_BY_NAME[f"gemma3-{name}"])
    rules: list[Any] = get_model_conversion_mapping(theirs)
    renamings = [r for r in rules if isinstance(r, WeightRenaming)]
    converters = [r for r in rules if isinstance(r, WeightConverter)]
    adapter, state = find_adapter(type(theirs).__name__), theirs.state_dict()
    for key in state:
        stored = LAYOUTS[layout](key)
        renamed = rename_source_key(stored, renamings, converters, theirs.base_model_prefix, state)[0]
        assert adapter.normalize(stored) == renamed == key


FOUR, ONE = "google/gemma-3-4b-it", "google/gemma-3-1b-it"


@pytest.mark.parametrize(
    ("name", "part", "field", "value", "told"),
    [
        (ONE, None, "final_logit_softcapping", 30.0, "final_logit_softcapping=30.0: soft-capped logits"),
        (FOUR, "text_config", "attn_logit_softcapping", 50.0, "attn_logit_softcapping=50.0: soft-capped logits"),
        (ONE, None, "use_bidirectional_attention", True, "use_bidirectional_attention=True is not supported"),
        (FOUR, "text_config", "hidden_activation", "mish", "activation 'mish' is not supported"),
        (FOUR, "text_config", "num_experts", 8, "num_experts=8"),
        (FOUR, "text_config", "rope_scaling", dict(rope_type="longrope", short_factor=[1.0] * 128,
                                                   long_factor=[1.0] * 128, factor=2.0), "rope_type 'longrope'"),
        (FOUR, None, "mm_tokens_per_image", 250, "mm_tokens_per_image=250 must be a square"),
        (FOUR, None, "mm_tokens_per_image", 49, "mm_tokens_per_image=49 must be a square whose side divides the 64"),
        (FOUR, None, "projector_hidden_act", "gelu", "projector_hidden_act='gelu'"),
        (FOUR, "vision_config", "window_size", 112, "window_size=112"),
        (FOUR, None, "quantization_config", {"bits": 4, "quant_method": "gptq"}, "quantised"),
        (FOUR, "vision_config", "model_type", "clip_vision_model", "must be 'siglip_vision_model' for Gemma-3"),
    ],
)  # fmt: skip
def test_value_that_cannot_be_followed_is_refused_by_name(
    name: str, part: str | None, field: str, value: Any, told: str
) -> None:
    raw = copy.deepcopy(HUB[name])
    (raw if part is None else raw[part])[field] = value
    with pytest.raises(ValueError, match=re.escape(told)):
        read(raw)


@pytest.mark.parametrize(
    ("layers", "told"),
    [
        (["chunked_attention"] * 26, "layer_types=.*must name one of sliding_attention, full_attention"),
        (["full_attention"] * 25, "layer_types=.*for each layer"),
    ],
    ids=["unknown", "too few"],
)
def test_kinds_of_layers_that_are_not_known_are_refused(layers: list[str], told: str) -> None:
    config = config_of(HUB[ONE])
    config.layer_types = layers
    with pytest.raises(ValueError, match=told):
        find_adapter("Gemma3ForCausalLM").read_config(config)


@pytest.mark.parametrize("architecture", ["Gemma3nForConditionalGeneration", "Gemma3nForCausalLM"])
def test_gemma_3n_is_refused_by_what_it_would_need(architecture: str) -> None:
    with pytest.raises(
        ValueError, match=f"{architecture}.*would need .*nested widths.*audio.*Known: .*Gemma3ForCausalLM"
    ):
        find_adapter(architecture)


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
