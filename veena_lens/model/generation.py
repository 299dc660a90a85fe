"""Generation: a short loop over cached forwards, with transformers' logits processors and stopping criteria.

The loop is written here so that hooks and interventions act at every step and positions keep their meaning; logits
processors and stopping criteria are transformers' own classes, set by the checkpoint's generation config.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veena_lens.components.kv_cache import KVCache
from veena_lens.inputs import MultimodalInputs, text_positions
from veena_lens.model.forward import LAST, forward
from veena_lens.model.span import PassSpan
from veena_lens.model.text import require_tokenizer

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM


@torch.no_grad()
def generate(model: HookedVLM, inputs: Any, settings: dict[str, Any], return_type: str, progress: bool) -> Any:
    """Return the completions of a batch: see `HookedVLM.generate`, whose further arguments are `settings`."""
    if return_type not in ("str", "tokens"):
        raise ValueError(f"generate: return_type={return_type!r} must be 'str' or 'tokens'.")
    if return_type == "str":
        require_tokenizer(model.tokenizer, "generate(return_type='str')")
    steps = _steps(model, inputs, settings)
    if progress:
        from tqdm.auto import tqdm

        steps = tqdm(steps, total=settings["max_new_tokens"], desc="tokens", leave=False)
    tokens = torch.empty(0)
    for grown in steps:
        tokens = grown
    if return_type == "tokens":
        # `inputs.with_answer(tokens)` reads it, to tell an answer's end from the padding after it.
        cast(Any, tokens).end_token_ids = tuple(_settings(model.generation_config, settings)["eos"])
        return tokens
    return model.tokenizer.batch_decode(tokens, skip_special_tokens=True)


@torch.no_grad()
def generate_stream(model: HookedVLM, inputs: Any, settings: dict[str, Any]) -> Iterator[Any]:
    """Yield text as it grows: see `HookedVLM.generate_stream`."""
    tokenizer = require_tokenizer(model.tokenizer, "generate_stream")
    unknown = set(settings) - set(SETTINGS)
    if unknown:
        raise TypeError(f"generate_stream: unknown settings {sorted(unknown)}; known: {sorted(SETTINGS)}.")
    said: list[str] = []
    texts: list[str] = []
    for tokens in _steps(model, inputs, settings):
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        said = said or [""] * len(texts)
        # A character in the middle of its bytes decodes to U+FFFD: wait for the rest.
        ready = [t if not t.endswith("\ufffd") and t.startswith(s) else s for t, s in zip(texts, said, strict=True)]
        pieces = [t[len(s) :] for t, s in zip(ready, said, strict=True)]
        said = ready
        if any(pieces):
            yield pieces[0] if len(pieces) == 1 else pieces
    rest = [t[len(s) :] if t.startswith(s) else "" for t, s in zip(texts, said, strict=True)]
    if any(rest):
        yield rest[0] if len(rest) == 1 else rest


@torch.no_grad()  # on a generator torch enters it for each step, so none leaks between steps
def _steps(model: HookedVLM, inputs: Any, settings: dict[str, Any]) -> Iterator[Int[Tensor, "batch new"]]:
    """Return the tokens generated so far, after each step."""
    prompt = as_prompt(model, inputs)
    cache = KVCache(model.cfg.n_layers) if settings.get("use_past_kv_cache", True) else None
    yield from decode_steps(model, prompt, settings, lambda new: next_logits(model, prompt, new, cache))


def as_prompt(model: HookedVLM, inputs: Any) -> MultimodalInputs:
    """Return prepared inputs whose rows end at the last position, where generation appends.

    inputs: prepared inputs, tokens, or text, which is wrapped in the chat template."""
    if isinstance(inputs, str) or (isinstance(inputs, (list, tuple)) and inputs and isinstance(inputs[0], str)):
        inputs = model.prepare(text=inputs if isinstance(inputs, str) else list(inputs))
    prompt = model.as_inputs(inputs).left_padded()
    if prompt.position_ids.ndim == 2:  # generation counts real tokens whatever a forward was given
        prompt = replace(prompt, position_ids=text_positions(prompt.attention_mask))
    return prompt


def next_logits(
    model: HookedVLM, prompt: MultimodalInputs, new: Int[Tensor, "batch new"], cache: KVCache | None = None
) -> Float[Tensor, "batch d_vocab"]:
    """Return the logits after the last of the new tokens, or after the prompt where there is none yet.

    prompt: inputs of `as_prompt`. cache: holds everything before the last new token and is appended to; None
    computes the whole sequence."""
    n_prompt, n_new = prompt.shape[1], new.shape[1]
    if n_new and cache is not None:
        last = n_prompt + n_new - 1
        span = PassSpan(prompt, last, last + 1, new[:, -1:])
    else:
        span = PassSpan(prompt, 0, n_prompt + n_new, new if n_new else None)
    return forward(model, span, cache=cache, positions=LAST)[:, -1]


@torch.no_grad()
def decode_steps(
    model: HookedVLM,
    prompt: MultimodalInputs,
    settings: dict[str, Any],
    next_logits: Callable[[Int[Tensor, "batch new"]], Float[Tensor, "batch d_vocab"]],
) -> Iterator[Int[Tensor, "batch new"]]:
    """Decode with logits of your own; yields the tokens generated so far after each step.

    prompt: inputs of `as_prompt`.
    settings: those of `HookedVLM.generate`, by name; `max_new_tokens` must be among them.
    next_logits: gives the logits after the last of the new tokens [batch new], after the prompt for none.
    Raises: ValueError for a prompt that leaves no room in the context, or no token to generate."""
    n_rows = len(prompt)
    longest = int(prompt.lengths.max())
    room = model.cfg.n_ctx - longest
    max_new = settings["max_new_tokens"]
    if max_new < 1:
        raise ValueError(f"generate: max_new_tokens={max_new} must be at least 1.")
    if room < 1:
        raise ValueError(
            f"The prompt has {longest} tokens and the model's context is {model.cfg.n_ctx}: no room to generate."
        )
    config = _settings(model.generation_config, settings)
    ends = torch.tensor(config["eos"], dtype=torch.long, device=prompt.device)
    processors = _processors(config, prompt)
    processors.extend(settings.get("logits_processor") or [])
    criteria = _criteria(config, settings, model.tokenizer)
    pad = model.pad_token_id
    if len(config["eos"]):
        # Hugging Face pads finished rows with the end token where the configuration has no pad token.
        pad = config["pad"] if config["pad"] is not None else pad
    generator = None
    if settings.get("seed") is not None:
        generator = torch.Generator(device=prompt.device).manual_seed(settings["seed"])
    new = torch.empty(n_rows, 0, dtype=torch.long, device=prompt.device)
    unfinished = torch.ones(n_rows, dtype=torch.bool, device=prompt.device)
    for _ in range(min(max_new, room)):
        logits = next_logits(new).to(torch.float32)
        ids = torch.cat([prompt.tokens, new], 1)
        scores = processors(ids, logits.to(ids.device))
        if config["do_sample"]:
            chosen = torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]
        else:
            chosen = scores.argmax(-1)
        chosen = torch.where(unfinished, chosen, torch.full_like(chosen, pad))
        new = torch.cat([new, chosen[:, None]], 1)
        unfinished &= ~torch.isin(chosen, ends)
        if criteria:
            unfinished &= ~criteria(torch.cat([prompt.tokens, new], 1), scores).to(unfinished.device)
        yield new
        if not bool(unfinished.any()):
            break


SETTINGS = (
    "max_new_tokens",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "min_new_tokens",
    "eos_token_id",
    "stop_strings",
    "logits_processor",
    "stopping_criteria",
    "seed",
    "use_past_kv_cache",
)


def end_tokens(generation_config: Any) -> tuple[int, ...]:
    """Return the tokens that end a completion, as the checkpoint's generation config says."""
    return _as_tuple(getattr(generation_config, "eos_token_id", None))


def _as_tuple(ids: Any) -> tuple[int, ...]:
    if ids is None:
        return ()
    return tuple(int(i) for i in ids) if isinstance(ids, (list, tuple)) else (int(ids),)


def _settings(generation_config: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Return what is given, else what the checkpoint's generation config says."""

    def value(name: str) -> Any:
        mine = given.get(name)
        return mine if mine is not None else getattr(generation_config, name, None)

    given_ends = given.get("eos_token_id")
    ends = list(end_tokens(generation_config) if given_ends is None else _as_tuple(given_ends))
    out: dict[str, Any] = {name: value(name) for name in _READ}
    _refuse_unread(generation_config)
    pad = getattr(generation_config, "pad_token_id", None)
    out |= {"eos": ends, "pad": pad if pad is not None else (ends[0] if ends else None)}
    return out | {"do_sample": bool(given.get("do_sample")), "stop_strings": given.get("stop_strings")}


_READ = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "min_new_tokens",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
)
# Settings of a generation config that would change the tokens and that no code here reads, with their neutral value.
_UNREAD = {
    "num_beams": 1,
    "penalty_alpha": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "sequence_bias": None,
    "guidance_scale": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "watermarking_config": None,
}


def _refuse_unread(generation_config: Any) -> None:
    """Raise ValueError for a setting that would change the tokens and is not followed."""
    for name, neutral in _UNREAD.items():
        value = getattr(generation_config, name, None)
        if value not in (None, neutral):
            raise ValueError(
                f"The generation config sets {name}={value!r}, which generate does not follow. Set "
                f"model.generation_config.{name} = {neutral!r}, or pass a logits_processor of transformers."
            )


def _processors(config: dict[str, Any], prompt: MultimodalInputs) -> Any:
    """Return transformers' logits processors, in the order that its own `generate` has."""
    import transformers as hf

    n_prompt, device = prompt.shape[1], str(prompt.device)
    out = hf.LogitsProcessorList()
    if config["repetition_penalty"] not in (None, 1.0):
        pads = prompt.attention_mask.int().argmax(1)  # pads are no repeated tokens
        out.append(hf.RepetitionPenaltyLogitsProcessor(config["repetition_penalty"], prompt_ignore_length=pads))
    if config["no_repeat_ngram_size"]:
        out.append(hf.NoRepeatNGramLogitsProcessor(config["no_repeat_ngram_size"]))
    if config["bad_words_ids"]:
        out.append(hf.NoBadWordsLogitsProcessor(config["bad_words_ids"], config["eos"] or None))
    if config["min_new_tokens"] and config["eos"]:
        out.append(
            hf.MinNewTokensLengthLogitsProcessor(n_prompt, config["min_new_tokens"], config["eos"], device=device)
        )
    if config["suppress_tokens"]:
        out.append(hf.SuppressTokensLogitsProcessor(config["suppress_tokens"], device=device))
    if config["begin_suppress_tokens"]:
        out.append(hf.SuppressTokensAtBeginLogitsProcessor(config["begin_suppress_tokens"], n_prompt, device=device))
    if config["do_sample"]:
        if config["temperature"] not in (None, 1.0):
            out.append(hf.TemperatureLogitsWarper(config["temperature"]))
        if config["top_k"]:
            out.append(hf.TopKLogitsWarper(config["top_k"]))
        if config["top_p"] is not None and config["top_p"] < 1.0:
            out.append(hf.TopPLogitsWarper(config["top_p"]))
        if config["min_p"]:
            out.append(hf.MinPLogitsWarper(config["min_p"]))
        if config["typical_p"] is not None and config["typical_p"] < 1.0:
            out.append(hf.TypicalLogitsWarper(config["typical_p"]))
    return out


def _criteria(config: dict[str, Any], given: dict[str, Any], tokenizer: Any) -> Any:
    """Return transformers' stopping criteria beyond length and the end token; None when there are none."""
    import transformers as hf

    out = hf.StoppingCriteriaList(given.get("stopping_criteria") or [])
    if config["stop_strings"]:
        if tokenizer is None:
            raise ValueError("generate: stop_strings needs a tokenizer, and this model has none.")
        out.append(hf.StopStringCriteria(tokenizer, config["stop_strings"]))
    return out or None
