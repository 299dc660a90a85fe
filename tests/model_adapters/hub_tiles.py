"""config.json files of Idefics3 and SmolVLM as they lie on the hub, with what the training code left in them."""

from __future__ import annotations

from typing import Any

SO400M = dict(
    hidden_size=1152, intermediate_size=4304, num_attention_heads=16, num_hidden_layers=27, patch_size=14
)  # fmt: skip
BASE = dict(hidden_size=768, num_attention_heads=12, patch_size=16)  # the class's own 12 layers of width 3072


def _config(kind: str, scale: int, text: dict[str, Any], vision: dict[str, Any], **further: Any) -> dict[str, Any]:
    architecture = dict(idefics3="Idefics3ForConditionalGeneration", smolvlm="SmolVLMForConditionalGeneration")[kind]
    side = vision["image_size"]
    left_over = dict(
        _attn_implementation_autoset=False,
        _flash_attn_2_enabled=True,
        _name_or_path="/checkpoints/unwrapped_model",
        architectures=["VLlama3ForCausalLM"],
        neftune_noise_alpha=0.0,
        perceiver_config=dict(
            _name_or_path="", attention_dropout=0.0, hidden_act="silu", model_type="vllama3", num_key_value_heads=1,
            qk_layer_norms_perceiver=False, resampler_depth=6, resampler_head_dim=96, resampler_n_heads=16,
            resampler_n_latents=64,
        ),
        pixel_shuffle_factor=scale,
        qk_layer_norms=False,
        torch_dtype="bfloat16",
        use_resampler=False,
    )  # fmt: skip
    return (
        dict(
            architectures=[architecture],
            image_token_id=49190,
            model_type=kind,
            scale_factor=scale,
            text_config=dict(model_type="llama", rms_norm_eps=1e-5, pad_token_id=2) | left_over | text,
            tie_word_embeddings=False,
            torch_dtype="bfloat16",
            transformers_version="4.46.0",
            use_cache=True,
            vision_config=dict(
                model_type=kind,
                max_image_size={"longest_edge": side},
                size={"longest_edge": 4 * side},
                tie_word_embeddings=False,
                use_base_siglip=False,
                **vision,
            ),
            vocab_size=text["vocab_size"],
        )
        | further
    )


_1_7B = dict(
    head_dim=64, hidden_size=2048, intermediate_size=8192, max_position_embeddings=16384, num_attention_heads=32,
    num_hidden_layers=24, num_key_value_heads=32, rope_theta=273768.0,
)  # fmt: skip
_360M = dict(
    head_dim=64, hidden_size=960, intermediate_size=2560, is_llama_config=True, max_position_embeddings=8192,
    num_attention_heads=15, num_hidden_layers=32, num_key_value_heads=5, rope_interleaved=False, rope_theta=100000,
    vocab_size=49280,
)  # fmt: skip
_135M = _360M | dict(
    hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_hidden_layers=30, num_key_value_heads=3
)

HUB: dict[str, dict[str, Any]] = {
    "HuggingFaceM4/Idefics3-8B-Llama3": _config(
        "idefics3",
        2,
        dict(
            bos_token_id=128000, eos_token_id=128001, hidden_size=4096, intermediate_size=14336,
            max_position_embeddings=131072, num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8,
            pad_token_id=128002, rope_theta=500000.0, vocab_size=128259,
            rope_scaling=dict(
                factor=8.0, high_freq_factor=4.0, low_freq_factor=1.0, original_max_position_embeddings=8192,
                rope_type="llama3",
            ),
        ),
        SO400M | dict(image_size=364),
        image_token_id=128257,
    ),
    "HuggingFaceTB/SmolVLM-Instruct": _config(
        "idefics3", 3, _1_7B | dict(vocab_size=49155), SO400M | dict(image_size=384), image_token_id=49153,
        image_seq_len=81,
    ),
    "HuggingFaceTB/SmolVLM-256M-Instruct": _config("idefics3", 4, _135M, BASE | dict(image_size=512)),
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": _config(
        "smolvlm", 3, _1_7B | dict(vocab_size=49280), SO400M | dict(image_size=384)
    ),
    "HuggingFaceTB/SmolVLM2-500M-Video-Instruct": _config("smolvlm", 4, _360M, BASE | dict(image_size=512)),
}  # fmt: skip
# Parameters, counted on the models that transformers builds of the same files.
COUNTS = {
    "HuggingFaceM4/Idefics3-8B-Llama3": 8_462_086_384,
    "HuggingFaceTB/SmolVLM-Instruct": 2_246_272_880,
    "HuggingFaceTB/SmolVLM-256M-Instruct": 256_484_928,
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": 2_246_784_880,
    "HuggingFaceTB/SmolVLM2-500M-Video-Instruct": 507_482_304,
}
