"""config.json files as they lie on the hub: the short form of 2023-2025, which leaves defaults out."""

from __future__ import annotations

from typing import Any

from tests.model_adapters import hub_tiles

CLIP_LARGE = dict(
    model_type="clip_vision_model",
    hidden_size=1024,
    image_size=336,
    intermediate_size=4096,
    num_attention_heads=16,
    num_hidden_layers=24,
    patch_size=14,
    projection_dim=768,
    vocab_size=32000,
)


def _llava(text: dict[str, Any], vision: dict[str, Any] = CLIP_LARGE, **further: Any) -> dict[str, Any]:
    return dict(
        architectures=["LlavaForConditionalGeneration"],
        model_type="llava",
        ignore_index=-100,
        projector_hidden_act="gelu",
        text_config=text,
        vision_config=vision,
        torch_dtype="float16",
        transformers_version="4.36.0.dev0",
    ) | (
        dict(
            image_token_index=32000,
            pad_token_id=32001,
            tie_word_embeddings=False,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            vocab_size=32064,
        )
        | further
    )


def _vicuna(name: str, **sizes: Any) -> dict[str, Any]:
    return dict(
        _name_or_path=name,
        architectures=["LlamaForCausalLM"],
        max_position_embeddings=4096,
        model_type="llama",
        rms_norm_eps=1e-5,
        torch_dtype="float16",
        vocab_size=32064,
        **sizes,
    )


def _mistral(name: str, **further: Any) -> dict[str, Any]:
    return dict(
        _name_or_path=name,
        architectures=["MistralForCausalLM"],
        intermediate_size=14336,
        max_position_embeddings=32768,
        model_type="mistral",
        num_key_value_heads=8,
        rms_norm_eps=1e-5,
        torch_dtype="bfloat16",
        vocab_size=32064,
        **further,
    )


# Fields that transformers of 2023 wrote into every configuration, at their defaults.
WRITTEN_OUT: dict[str, Any] = dict(
    return_dict=True, output_hidden_states=False, output_attentions=False, torchscript=False, torch_dtype="float16",
    use_bfloat16=False, tf_legacy_loss=False, pruned_heads={}, tie_word_embeddings=False, chunk_size_feed_forward=0,
    is_encoder_decoder=False, is_decoder=False, cross_attention_hidden_size=None, add_cross_attention=False,
    tie_encoder_decoder=False, max_length=20, min_length=0, do_sample=False, early_stopping=False, num_beams=1,
    num_beam_groups=1, diversity_penalty=0.0, temperature=1.0, top_k=50, top_p=1.0, typical_p=1.0,
    repetition_penalty=1.0, length_penalty=1.0, no_repeat_ngram_size=0, encoder_no_repeat_ngram_size=0,
    bad_words_ids=None, num_return_sequences=1, output_scores=False, return_dict_in_generate=False,
    forced_bos_token_id=None, forced_eos_token_id=None, remove_invalid_values=False,
    exponential_decay_length_penalty=None, suppress_tokens=None, begin_suppress_tokens=None, finetuning_task=None,
    id2label={"0": "LABEL_0", "1": "LABEL_1"}, label2id={"LABEL_0": 0, "LABEL_1": 1}, tokenizer_class=None,
    prefix=None, pad_token_id=None, sep_token_id=None, decoder_start_token_id=None, task_specific_params=None,
    problem_type=None,
)  # fmt: skip
LLAMA_OUT: dict[str, Any] = dict(
    bos_token_id=1, eos_token_id=2, vocab_size=32064, max_position_embeddings=4096, hidden_size=4096,
    intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32, hidden_act="silu",
    initializer_range=0.02, rms_norm_eps=1e-5, pretraining_tp=1, use_cache=True, rope_theta=10000.0,
    rope_scaling=None, attention_bias=False, attention_dropout=0.0, mlp_bias=False,
)  # fmt: skip
CLIP_OUT: dict[str, Any] = dict(
    projection_dim=768, dropout=0.0, num_channels=3, initializer_range=0.02, initializer_factor=1.0,
    attention_dropout=0.0, layer_norm_eps=1e-5, hidden_act="quick_gelu", bos_token_id=None, eos_token_id=None,
)  # fmt: skip

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def _next(text: dict[str, Any]) -> dict[str, Any]:
    further = dict(image_grid_pinpoints=PINPOINTS, use_image_newline_parameter=True, image_seq_length=576)
    return _llava(text) | dict(architectures=["LlavaNextForConditionalGeneration"], model_type="llava_next") | further


def _onevision(**text: Any) -> dict[str, Any]:
    return dict(
        architectures=["LlavaOnevisionForConditionalGeneration"], ignore_index=-100,
        image_grid_pinpoints=[[384 * a, 384 * b] for a in range(1, 7) for b in range(1, 7)], image_token_index=151646,
        model_type="llava_onevision", projector_hidden_act="gelu",
        text_config=dict(
            architectures=["Qwen2ForCausalLM"], bos_token_id=151643, eos_token_id=151645,
            max_position_embeddings=32768, model_type="qwen2", rope_theta=1000000.0, rms_norm_eps=1e-6,
            torch_dtype="bfloat16", **text,
        ),
        tie_word_embeddings=False, torch_dtype="float16", transformers_version="4.44.0.dev0",
        use_image_newline_parameter=True, video_token_index=151647, vision_aspect_ratio="anyres_max_9",
        vision_config=dict(
            hidden_size=1152, image_size=384, intermediate_size=4304, model_type="siglip_vision_model",
            num_attention_heads=16, num_hidden_layers=26, patch_size=14, vision_use_head=False,
        ),
        vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip


# Qwen2-VL's files are flat: the decoder's fields stand at the root, `rope_scaling` has a type of its own name.
def _qwen2_vl(vision_hidden_size: int, **text: Any) -> dict[str, Any]:
    return dict(
        architectures=["Qwen2VLForConditionalGeneration"], attention_dropout=0.0, bos_token_id=151643,
        eos_token_id=151645, vision_start_token_id=151652, vision_end_token_id=151653, vision_token_id=151654,
        image_token_id=151655, video_token_id=151656, hidden_act="silu", initializer_range=0.02,
        max_position_embeddings=32768, max_window_layers=28, model_type="qwen2_vl", num_hidden_layers=28,
        rms_norm_eps=1e-6, rope_theta=1000000.0, sliding_window=32768, torch_dtype="bfloat16",
        transformers_version="4.41.2", use_cache=True, use_sliding_window=False,
        vision_config=dict(
            depth=32, embed_dim=1280, mlp_ratio=4, num_heads=16, in_chans=3, hidden_size=vision_hidden_size,
            patch_size=14, spatial_merge_size=2, spatial_patch_size=14, temporal_patch_size=2,
        ),
        rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]),
        **text,
    )  # fmt: skip


# Qwen2.5-VL's files are as flat; three sizes of towers differ in the MLP's width.
def _qwen25_vl(tower_mlp: int, **text: Any) -> dict[str, Any]:
    return dict(
        architectures=["Qwen2_5_VLForConditionalGeneration"], attention_dropout=0.0, bos_token_id=151643,
        eos_token_id=151645, vision_start_token_id=151652, vision_end_token_id=151653, vision_token_id=151654,
        image_token_id=151655, video_token_id=151656, hidden_act="silu", initializer_range=0.02,
        max_position_embeddings=128000, model_type="qwen2_5_vl", rms_norm_eps=1e-6, rope_theta=1000000.0,
        sliding_window=32768, torch_dtype="bfloat16", transformers_version="4.41.2", use_cache=True,
        use_sliding_window=False,
        vision_config=dict(
            depth=32, hidden_act="silu", hidden_size=1280, intermediate_size=tower_mlp, num_heads=16, in_chans=3,
            out_hidden_size=text["hidden_size"], patch_size=14, spatial_merge_size=2, spatial_patch_size=14,
            window_size=112, fullatt_block_indexes=[7, 15, 23, 31], tokens_per_second=2, temporal_patch_size=2,
        ),
        rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]),
        **text,
    )  # fmt: skip


def _written_again(flat: dict[str, Any]) -> dict[str, Any]:
    """A flat file as transformers 4.5x saved it: the decoder's fields at the root and in `text_config`, other keys in
    every part."""
    rope = dict(mrope_section=[16, 24, 24], rope_type="default", type="default")
    tokens = {k: v for k, v in flat.items() if k.endswith("_token_id")}
    left = ("architectures", "model_type", "vision_config", "transformers_version", "rope_scaling")
    text = {k: v for k, v in flat.items() if k not in left}
    layers = ["full_attention"] * flat["num_hidden_layers"]
    text |= dict(model_type=f"{flat['model_type']}_text", rope_scaling=rope, layer_types=layers)
    text |= tokens | dict(image_token_id=None, video_token_id=None, sliding_window=None)
    vision = dict(hidden_act="quick_gelu") | flat["vision_config"] | dict(model_type=flat["model_type"], in_channels=3)
    vision |= dict(initializer_range=0.02, torch_dtype="bfloat16")
    return flat | dict(rope_scaling=rope, text_config=text, vision_config=vision, transformers_version="4.54.0")


def _qwen3_vl(tied: bool, vision: dict[str, Any], **text: Any) -> dict[str, Any]:
    return dict(
        architectures=["Qwen3VLForConditionalGeneration"], image_token_id=151655, model_type="qwen3_vl",
        text_config=dict(
            attention_bias=False, attention_dropout=0.0, bos_token_id=151643, dtype="bfloat16", eos_token_id=151645,
            head_dim=128, hidden_act="silu", initializer_range=0.02, max_position_embeddings=262144,
            model_type="qwen3_vl_text", num_attention_heads=32, num_hidden_layers=36, num_key_value_heads=8,
            rms_norm_eps=1e-6, rope_theta=5000000, use_cache=True, vocab_size=151936,
            rope_scaling=dict(mrope_interleaved=True, mrope_section=[24, 20, 20], rope_type="default"),
            **({"tie_word_embeddings": True} if tied else {}), **text,
        ),
        tie_word_embeddings=tied, transformers_version="4.57.0.dev0", video_token_id=151656,
        vision_config=dict(
            hidden_act="gelu_pytorch_tanh", in_channels=3, initializer_range=0.02, model_type="qwen3_vl",
            num_heads=16, num_position_embeddings=2304, patch_size=16, spatial_merge_size=2, temporal_patch_size=2,
            out_hidden_size=text["hidden_size"], **vision,
        ),
        vision_end_token_id=151653, vision_start_token_id=151652,
    )  # fmt: skip


VICUNA_13B = dict(
    hidden_size=5120, intermediate_size=13824, num_attention_heads=40, num_hidden_layers=40, num_key_value_heads=40
)
QWEN25_7B = dict(
    hidden_size=3584, intermediate_size=18944, max_window_layers=28, num_attention_heads=28, num_hidden_layers=28,
    num_key_value_heads=4, tie_word_embeddings=False, vocab_size=152064,
)  # fmt: skip
HUB: dict[str, dict[str, Any]] = {
    "llava-hf/llava-1.5-7b-hf": _llava(_vicuna("lmsys/vicuna-7b-v1.5")),
    "llava-hf/llava-1.5-7b-hf, later": _llava(_vicuna("lmsys/vicuna-7b-v1.5"), image_seq_length=576),
    "llava-hf/llava-1.5-7b-hf, written out": _llava(
        {**WRITTEN_OUT, **LLAMA_OUT, **_vicuna("lmsys/vicuna-7b-v1.5")}, {**WRITTEN_OUT, **CLIP_OUT, **CLIP_LARGE}
    ),
    "llava-hf/llava-1.5-13b-hf": _llava(
        _vicuna("lmsys/vicuna-13b-v1.5", **VICUNA_13B)
    ),
    "llava-hf/bakLlava-v1-hf": _llava(
        _mistral("mistralai/Mistral-7B-v0.1", sliding_window=4096)
    ),
    "llava-hf/llava-v1.6-vicuna-7b-hf": _next(_vicuna("lmsys/vicuna-7b-v1.5")),
    "llava-hf/llava-v1.6-vicuna-13b-hf": _next(_vicuna("lmsys/vicuna-13b-v1.5", **VICUNA_13B)),
    "llava-hf/llava-v1.6-mistral-7b-hf": _next(
        _mistral("mistralai/Mistral-7B-Instruct-v0.2", rope_theta=1000000.0, sliding_window=None)
    ),
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": _onevision(
        hidden_size=896, intermediate_size=4864, max_window_layers=24, num_attention_heads=14, num_hidden_layers=24,
        num_key_value_heads=2, tie_word_embeddings=True, vocab_size=152000,
    ),
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": _onevision(
        hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_hidden_layers=28,
        num_key_value_heads=4, vocab_size=152128,
    ),
    "llava-hf/llava-onevision-qwen2-72b-ov-hf": _onevision(
        hidden_size=8192, intermediate_size=29568, num_attention_heads=64, num_hidden_layers=80,
        num_key_value_heads=8, vocab_size=152128,
    ),
    "llava with Qwen2 and SigLIP": _llava(
        dict(model_type="qwen2", hidden_size=896, intermediate_size=4864, max_window_layers=24, num_attention_heads=14,
             num_hidden_layers=24, num_key_value_heads=2, rope_theta=1000000.0, vocab_size=152000,
             max_position_embeddings=32768, tie_word_embeddings=True, use_mrope=False),
        dict(model_type="siglip_vision_model", hidden_size=1152, image_size=384, intermediate_size=4304,
             num_attention_heads=16, num_hidden_layers=26, patch_size=14, vision_use_head=False),
        image_token_index=151646, vision_feature_layer=-1, vision_feature_select_strategy="full", vocab_size=152000,
    ),
    "meta-llama/Llama-3.1-8B-Instruct": dict(
        architectures=["LlamaForCausalLM"], attention_bias=False, attention_dropout=0.0, bos_token_id=128000,
        eos_token_id=[128001, 128008, 128009], hidden_act="silu", hidden_size=4096, initializer_range=0.02,
        intermediate_size=14336, max_position_embeddings=131072, mlp_bias=False, model_type="llama",
        num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8, pretraining_tp=1, rms_norm_eps=1e-5,
        rope_scaling=dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                          original_max_position_embeddings=8192, rope_type="llama3"),
        rope_theta=500000.0, tie_word_embeddings=False, torch_dtype="bfloat16", transformers_version="4.42.3",
        use_cache=True, vocab_size=128256,
    ),
    "lmsys/vicuna-7b-v1.5": dict(
        _name_or_path="vicuna-7b-v1.5", architectures=["LlamaForCausalLM"], bos_token_id=1, eos_token_id=2,
        hidden_act="silu", hidden_size=4096, initializer_range=0.02, intermediate_size=11008,
        max_position_embeddings=4096, model_type="llama", num_attention_heads=32, num_hidden_layers=32,
        num_key_value_heads=32, pad_token_id=0, pretraining_tp=1, rms_norm_eps=1e-5, rope_scaling=None,
        tie_word_embeddings=False, torch_dtype="float16", transformers_version="4.31.0", use_cache=True,
        vocab_size=32000,
    ),
    "mistralai/Mistral-7B-Instruct-v0.2": dict(
        architectures=["MistralForCausalLM"], attention_dropout=0.0, bos_token_id=1, eos_token_id=2,
        hidden_act="silu", hidden_size=4096, initializer_range=0.02, intermediate_size=14336,
        max_position_embeddings=32768, model_type="mistral", num_attention_heads=32, num_hidden_layers=32,
        num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=1000000.0, sliding_window=None,
        tie_word_embeddings=False, torch_dtype="bfloat16", transformers_version="4.36.0", use_cache=True,
        vocab_size=32000,
    ),
    "Qwen/Qwen2.5-0.5B-Instruct": dict(
        architectures=["Qwen2ForCausalLM"], attention_dropout=0.0, bos_token_id=151643, eos_token_id=151645,
        hidden_act="silu", hidden_size=896, initializer_range=0.02, intermediate_size=4864,
        max_position_embeddings=32768, max_window_layers=21, model_type="qwen2", num_attention_heads=14,
        num_hidden_layers=24, num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=1000000.0, sliding_window=32768,
        tie_word_embeddings=True, torch_dtype="bfloat16", transformers_version="4.43.1", use_cache=True,
        use_mrope=False, use_sliding_window=False, vocab_size=151936,
    ),
    "Qwen/Qwen2-VL-2B-Instruct": _qwen2_vl(
        1536, hidden_size=1536, intermediate_size=8960, num_attention_heads=12, num_key_value_heads=2,
        tie_word_embeddings=True, vocab_size=151936,
    ),
    "Qwen/Qwen2-VL-7B-Instruct": _qwen2_vl(
        3584, hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4,
        tie_word_embeddings=False, vocab_size=152064,
    ),
    "Qwen/Qwen2-VL-7B-Instruct, saved again": _written_again(
        _qwen2_vl(
            3584, hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4,
            tie_word_embeddings=False, vocab_size=152064,
        )
    ),
    "Qwen/Qwen2.5-VL-3B-Instruct": _qwen25_vl(
        3420, hidden_size=2048, intermediate_size=11008, max_window_layers=70, num_attention_heads=16,
        num_hidden_layers=36, num_key_value_heads=2, tie_word_embeddings=True, vocab_size=151936,
    ),
    "Qwen/Qwen2.5-VL-7B-Instruct": _qwen25_vl(3420, **QWEN25_7B),
    "Qwen/Qwen2.5-VL-7B-Instruct, saved again": _written_again(_qwen25_vl(3420, **QWEN25_7B)),
    "Qwen/Qwen2.5-VL-72B-Instruct": _qwen25_vl(
        3456, hidden_size=8192, intermediate_size=29568, max_window_layers=80, num_attention_heads=64,
        num_hidden_layers=80, num_key_value_heads=8, tie_word_embeddings=False, vocab_size=152064,
    ),
    "Qwen/Qwen3-VL-4B-Instruct": _qwen3_vl(
        True,
        dict(deepstack_visual_indexes=[5, 11, 17], depth=24, hidden_size=1024, intermediate_size=4096),
        hidden_size=2560, intermediate_size=9728,
    ),
    "Qwen/Qwen3-VL-8B-Instruct": _qwen3_vl(
        False,
        dict(deepstack_visual_indexes=[8, 16, 24], depth=27, hidden_size=1152, intermediate_size=4304),
        hidden_size=4096, intermediate_size=12288,
    ),
    **hub_tiles.HUB,
}  # fmt: skip
# Parameters, tied weights counted once.
COUNTS = {
    "llava-hf/llava-1.5-7b-hf": 7_063_427_072,
    "llava-hf/llava-1.5-13b-hf": 13_351_494_656,
    "llava-hf/llava-v1.6-vicuna-7b-hf": 7_063_431_168,
    "llava-hf/llava-v1.6-vicuna-13b-hf": 13_351_499_776,
    "llava-hf/llava-v1.6-mistral-7b-hf": 7_566_747_648,
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": 893_675_552,
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": 8_030_807_584,
    "llava-hf/llava-onevision-qwen2-72b-ov-hf": 73_181_570_592,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "mistralai/Mistral-7B-Instruct-v0.2": 7_241_732_096,
    "Qwen/Qwen2-VL-2B-Instruct": 2_208_985_600,
    "Qwen/Qwen2-VL-7B-Instruct": 8_291_375_616,
    "Qwen/Qwen2.5-VL-3B-Instruct": 3_754_622_976,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "Qwen/Qwen2.5-VL-72B-Instruct": 73_410_777_344,
    "Qwen/Qwen3-VL-4B-Instruct": 4_437_815_808,
    "Qwen/Qwen3-VL-8B-Instruct": 8_767_123_696,
    **hub_tiles.COUNTS,
}
# Of these the tower with all that it hands to the decoder (Hugging Face's `model.visual`).
TOWER_COUNTS = {
    "Qwen/Qwen2-VL-2B-Instruct": 665_271_296,
    "Qwen/Qwen2-VL-7B-Instruct": 675_759_104,
    "Qwen/Qwen3-VL-4B-Instruct": 415_347_712,
    "Qwen/Qwen3-VL-8B-Instruct": 576_388_336,
}
