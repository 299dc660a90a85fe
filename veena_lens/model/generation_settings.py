"""Settings of generation as transformers names them: followed through its own processors and criteria, or refused.

Every attribute of transformers' GenerationConfig stands in one of three tables: followed, without effect on the tokens
that a loop like ours says, or refused unless neutral. One that a later release adds is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veena_lens.inputs import MultimodalInputs

SETTINGS = (
    "max_new_tokens",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "freq_penalty",
    "no_repeat_ngram_size",
    "min_new_tokens",
    "eos_token_id",
    "stop_at_eos",
    "stop_strings",
    "logits_processor",
    "stopping_criteria",
    "seed",
    "use_past_kv_cache",
)
FOLLOWED = (
    "temperature",
    "top_k",
    "top_p",
    "top_h",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "repetition_penalty",
    "encoder_repetition_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "min_length",
    "min_new_tokens",
    "bad_words_ids",
    "sequence_bias",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "exponential_decay_length_penalty",
    "remove_invalid_values",
    "stop_strings",
    "max_time",
)
# Set by arguments of `generate`, about speed, memory or what else is returned, or read by beam search alone.
WITHOUT_EFFECT = (
    *("max_length", "max_new_tokens", "do_sample", "eos_token_id", "pad_token_id", "bos_token_id"),
    *("decoder_start_token_id", "is_assistant", "transformers_version", "_from_model_config", "renormalize_logits"),
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size", "low_memory"),
    *("compile_config", "disable_compile", "continuous_batching_config", "speculation_type", "use_mtp"),
    *("assistant_confidence_threshold", "assistant_early_exit", "assistant_ensemble_weight", "assistant_lookbehind"),
    *("target_lookbehind", "num_assistant_tokens", "num_assistant_tokens_schedule", "prompt_lookup_num_tokens"),
    *("max_matching_ngram_size", "output_attentions", "output_hidden_states", "output_logits", "output_scores"),
    *("return_dict_in_generate", "early_stopping", "length_penalty"),
)
# What changes nothing, where that is not None, False or what GenerationConfig() has.
NEUTRAL = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "diversity_penalty": 0.0,
    "guidance_scale": 1,
}


# What reads the tokens of the prompt, and the values at which a penalty does nothing beside None and 0.
READ_THE_PROMPT = (
    *("repetition_penalty", "freq_penalty", "no_repeat_ngram_size"),
    *("encoder_repetition_penalty", "encoder_no_repeat_ngram_size"),
)
NEUTRAL_PENALTY = {"repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0}


def end_tokens(generation_config: Any) -> tuple[int, ...]:
    """Return the tokens that end a completion, as the checkpoint's generation config says."""
    return _as_tuple(getattr(generation_config, "eos_token_id", None))


def _as_tuple(ids: Any) -> tuple[int, ...]:
    if ids is None:
        return ()
    return tuple(int(i) for i in ids) if isinstance(ids, (list, tuple)) else (int(ids),)


def resolve_settings(generation_config: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Return what is given, else what the checkpoint's generation config says.

    Sampling at a temperature of 0 is greedy, and `stop_at_eos=False` takes every end token away, as in
    HookedTransformer.
    Raises: ValueError for a setting of the config that is not followed, or a negative penalty of frequencies."""

    def value(name: str) -> Any:
        mine = given.get(name)
        return mine if mine is not None else getattr(generation_config, name, None)

    given_ends = given.get("eos_token_id")
    ends = list(end_tokens(generation_config) if given_ends is None else _as_tuple(given_ends))
    if given.get("stop_at_eos") is False:
        ends = []
    out: dict[str, Any] = {name: value(name) for name in FOLLOWED}
    _refuse_unread(generation_config)
    out["freq_penalty"] = given.get("freq_penalty") or 0.0
    if out["freq_penalty"] < 0:
        raise ValueError(f"generate: freq_penalty={out['freq_penalty']} must not be negative.")
    samples = bool(given.get("do_sample"))
    pad = getattr(generation_config, "pad_token_id", None)
    out |= {"eos": ends, "pad": pad if pad is not None else (ends[0] if ends else None)}
    return out | {"do_sample": samples and out["temperature"] != 0}


def _refuse_unread(generation_config: Any) -> None:
    """Raise ValueError for a setting that would change the tokens and is not followed."""
    if generation_config is None:
        return
    import transformers as hf

    for name, usual in vars(hf.GenerationConfig()).items():
        if name in FOLLOWED or name in WITHOUT_EFFECT:
            continue
        value, neutral = getattr(generation_config, name, None), NEUTRAL.get(name, usual)
        if value is not None and value is not False and value not in (neutral, usual):
            raise ValueError(
                f"The generation config sets {name}={value!r}, which generate does not follow. Set "
                f"model.generation_config.{name} = {neutral!r}, or pass a logits_processor of transformers."
            )


def make_processors(config: dict[str, Any], prompt: MultimodalInputs, max_new_tokens: int) -> Any:
    """Return transformers' logits processors, in the order that its own `generate` has."""
    import transformers as hf
    from transformers.generation.logits_process import ExponentialDecayLengthPenalty

    n_prompt, device, ends = prompt.shape[1], str(prompt.device), config["eos"]
    said: Any = prompt.tokens
    out = hf.LogitsProcessorList()
    if config["sequence_bias"]:
        out.append(hf.SequenceBiasLogitsProcessor(config["sequence_bias"]))
    if config["encoder_repetition_penalty"] not in (None, 1.0):
        penalty = config["encoder_repetition_penalty"]
        out.append(hf.EncoderRepetitionPenaltyLogitsProcessor(penalty, encoder_input_ids=said))
    if config["repetition_penalty"] not in (None, 1.0):
        pads = prompt.attention_mask.int().argmax(1)  # pads are no repeated tokens
        out.append(hf.RepetitionPenaltyLogitsProcessor(config["repetition_penalty"], prompt_ignore_length=pads))
    if config["no_repeat_ngram_size"]:
        out.append(hf.NoRepeatNGramLogitsProcessor(config["no_repeat_ngram_size"]))
    if config["encoder_no_repeat_ngram_size"]:
        size = config["encoder_no_repeat_ngram_size"]
        out.append(hf.EncoderNoRepeatNGramLogitsProcessor(size, encoder_input_ids=said))
    if config["bad_words_ids"]:
        out.append(hf.NoBadWordsLogitsProcessor(config["bad_words_ids"], ends or None))
    if config["min_length"] and ends and not config["min_new_tokens"]:
        out.append(hf.MinLengthLogitsProcessor(config["min_length"], ends, device=device))
    if config["min_new_tokens"] and ends:
        out.append(hf.MinNewTokensLengthLogitsProcessor(n_prompt, config["min_new_tokens"], ends, device=device))
    if config["forced_bos_token_id"] is not None:
        out.append(hf.ForcedBOSTokenLogitsProcessor(config["forced_bos_token_id"]))
    if config["forced_eos_token_id"] is not None:
        last = n_prompt + max_new_tokens
        out.append(hf.ForcedEOSTokenLogitsProcessor(last, config["forced_eos_token_id"], device=device))
    if config["remove_invalid_values"]:
        out.append(hf.InfNanRemoveLogitsProcessor())
    if config["exponential_decay_length_penalty"] is not None and ends:
        decay = tuple(config["exponential_decay_length_penalty"])
        out.append(ExponentialDecayLengthPenalty(decay, torch.tensor(ends, device=device), n_prompt))
    if config["suppress_tokens"]:
        out.append(hf.SuppressTokensLogitsProcessor(config["suppress_tokens"], device=device))
    if config["begin_suppress_tokens"]:
        out.append(hf.SuppressTokensAtBeginLogitsProcessor(config["begin_suppress_tokens"], n_prompt, device=device))
    if config["do_sample"]:
        out.extend(_warpers(config, prompt, device))
    return out


def _warpers(config: dict[str, Any], prompt: MultimodalInputs, device: str) -> list[Any]:
    """Return what acts on a distribution that is sampled from."""
    import transformers as hf

    out: list[Any] = []
    if config["temperature"] not in (None, 1.0):
        out.append(hf.TemperatureLogitsWarper(config["temperature"]))
    if config["freq_penalty"]:
        out.append(frequency_penalty(config["freq_penalty"], prompt))
    if config["top_h"] is not None:
        out.append(hf.TopHLogitsWarper(config["top_h"]))
    if config["top_k"]:
        out.append(hf.TopKLogitsWarper(config["top_k"]))
    if config["top_p"] is not None and config["top_p"] < 1.0:
        out.append(hf.TopPLogitsWarper(config["top_p"]))
    if config["min_p"]:
        out.append(hf.MinPLogitsWarper(config["min_p"]))
    if config["typical_p"] is not None and config["typical_p"] < 1.0:
        out.append(hf.TypicalLogitsWarper(config["typical_p"]))
    if config["epsilon_cutoff"]:
        out.append(hf.EpsilonLogitsWarper(config["epsilon_cutoff"]))
    if config["eta_cutoff"]:
        out.append(hf.EtaLogitsWarper(config["eta_cutoff"], device=device))
    return out


def frequency_penalty(
    penalty: float, prompt: MultimodalInputs
) -> Callable[[Int[Tensor, "batch pos"], Float[Tensor, "batch d_vocab"]], Float[Tensor, "batch d_vocab"]]:
    """Return a logits processor that lowers each token by `penalty` per time it was said, as HookedTransformer does.

    Pads of the prompt do not count."""
    pads, n_prompt = ~prompt.attention_mask, prompt.shape[1]

    def lowered(
        ids: Int[Tensor, "batch pos"], scores: Float[Tensor, "batch d_vocab"]
    ) -> Float[Tensor, "batch d_vocab"]:
        counted = torch.ones_like(ids, dtype=scores.dtype)
        counted[:, :n_prompt][pads.to(ids.device)] = 0
        inside = (ids < scores.shape[-1]) & (ids >= 0)  # the id of an image token may lie outside the vocabulary
        counts = torch.zeros_like(scores).scatter_add(1, ids * inside, counted * inside)
        return scores - penalty * counts

    return lowered


def make_criteria(config: dict[str, Any], given: dict[str, Any], tokenizer: Any) -> Any:
    """Return transformers' stopping criteria beyond length and the end token; None when there are none."""
    import transformers as hf

    mine = given.get("stopping_criteria")
    out = hf.StoppingCriteriaList(mine if isinstance(mine, (list, tuple)) else [mine] if mine is not None else [])
    if config["stop_strings"]:
        if tokenizer is None:
            raise ValueError("generate: stop_strings needs a tokenizer, and this model has none.")
        out.append(hf.StopStringCriteria(tokenizer, config["stop_strings"]))
    if config["max_time"] is not None:
        out.append(hf.MaxTimeCriteria(config["max_time"]))
    return out or None
