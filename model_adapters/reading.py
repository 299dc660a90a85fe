"""Read a Hugging Face config object by duck typing, and reject fields that no mapping reads.

A field that differs from its class default and that nothing reads could silently change the forward pass. It is
rejected by name unless it is known to be harmless (initialisation, training, generation, book-keeping).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from veena_lens.config import Activation, RopeConfig

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}
# What each scaling rule of rotary positions needs.
ROPE_NUMBERS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
# Fields of every config class that do not affect a forward pass: book-keeping, initialisation, training.
HARMLESS = frozenset(
    """
    output_attentions output_hidden_states output_scores return_dict torch_dtype dtype use_bfloat16 architectures
    model_type transformers_version use_cache initializer_range initializer_factor attention_dropout hidden_dropout
    dropout pretraining_tp id2label label2id num_labels problem_type task_specific_params chunk_size_feed_forward
    is_encoder_decoder is_decoder add_cross_attention tokenizer_class auto_map projection_dim base_model_tp_plan
    base_model_pp_plan base_model_ep_plan finetuning_task keys_to_ignore_at_inference gradient_checkpointing
    per_layer_config torchscript tie_encoder_decoder tf_legacy_loss cross_attention_hidden_size
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id
    """.split()  # noqa: SIM905
)
# Settings of generation that files of 2023 store in the model's configuration.
GENERATION = frozenset(
    """
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences prefix remove_invalid_values
    repetition_penalty return_dict_in_generate suppress_tokens temperature top_k top_p typical_p
    """.split()  # noqa: SIM905
)


def activation(name: str, where: str) -> Activation:
    """Return our name of an activation function. Raises: ValueError for one that is not supported."""
    if name not in ACTIVATIONS:
        raise ValueError(f"{where}: activation {name!r} is not supported; supported: {', '.join(sorted(ACTIVATIONS))}.")
    return ACTIVATIONS[name]


def refuse_unread(config: Any, read: Iterable[str], harmless: Iterable[str] = ()) -> None:
    """Check that every field which differs from its class default is either read or harmless.

    A field that the class does not know counts as unset if it is False, None or empty.

    Raises: ValueError that names the other fields."""
    known = HARMLESS | GENERATION | set(read) | set(harmless)
    plain = type(config)().to_dict()
    odd = {}
    for name, value in config.to_dict().items():
        is_default = name in plain and plain[name] == value
        is_off = value is None or (name not in plain and not value)
        if not (name in known or is_default or is_off or name.startswith("_") or name.endswith("_version")):
            odd[name] = value
    if "quantization_config" in odd:
        raise ValueError(
            f"{type(config).__name__}: the weights are quantised (quantization_config={odd['quantization_config']!r}). "
            "from_pretrained reads bitsandbytes and torchao weights from a folder; otherwise pass float weights."
        )
    if odd:
        listed = ", ".join(f"{k}={v!r}" for k, v in odd.items())
        raise ValueError(
            f"{type(config).__name__}: no mapping reads {listed}. If it has no effect at inference, list it as "
            "harmless in the adapter; otherwise the adapter must read it."
        )


def rope(config: Any, parameters: Mapping[str, Any] | None = None) -> RopeConfig:
    """Return the rotary positions of a text config (`rope_parameters` of transformers 5, or one of its parts)."""
    given = dict(config.rope_parameters if parameters is None else parameters)
    theta, kind = given.pop("rope_theta"), given.pop("rope_type", "default")
    given.pop("type", None)
    sections = given.pop("mrope_section", None)
    interleaved = bool(given.pop("mrope_interleaved", False))
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor={given['partial_rotary_factor']} is not supported (only 1.0).")
    given.pop("partial_rotary_factor", None)
    if kind in ("yarn", "llama3"):
        given.setdefault("original_max_position_embeddings", config.max_position_embeddings)
    if kind == "dynamic":  # the only length that Hugging Face knows here
        given["original_max_position_embeddings"] = config.max_position_embeddings
    if kind == "yarn" and given.get("factor") is None:
        given["factor"] = config.max_position_embeddings / given["original_max_position_embeddings"]
    missing = [name for name in ROPE_NUMBERS.get(kind, ()) if given.get(name) is None]
    if missing:
        raise ValueError(f"rope_parameters of type {kind!r} lack {', '.join(missing)}.")
    if given.get("factor") is not None and given["factor"] <= 0:
        raise ValueError(f"rope_parameters: factor={given['factor']} must be positive.")
    return RopeConfig(
        theta=float(theta),
        rope_type=kind,
        scaling=tuple(sorted(given.items())) if kind != "default" else (),
        sections=tuple(sections) if sections else None,
        interleaved=interleaved,
    )


def longest_context(config: Any) -> int:
    """Return the longest context of a text config in tokens, as far as its scaling of rotary positions reaches.

    `max_position_embeddings` is the trained length, which the factor stretches, unless the rule names another one:
    then it may be the stretched length already, and llama3 always means it so."""
    stated, given = config.max_position_embeddings, config.rope_parameters or {}
    kind, factor = given.get("rope_type", "default"), given.get("factor")
    trained = given.get("original_max_position_embeddings") or stated
    if kind == "dynamic":
        trained = stated
    if kind == "default" or factor is None or (kind == "llama3" and trained != stated):
        return stated
    return max(stated, int(trained * factor))
