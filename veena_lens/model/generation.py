"""Generation: a short loop over cached forwards, with transformers' logits processors and stopping criteria.

The loop is written here so that hooks and interventions act at every step and positions keep their meaning; logits
processors and stopping criteria are transformers' own classes, set by the checkpoint's generation config.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veena_lens.components.kv_cache import KVCache
from veena_lens.inputs import MultimodalInputs, text_positions
from veena_lens.model.completions import (
    RETURN_TYPES,
    GenerateOutput,
    Wanted,
    every,
    returned,
    text_pieces,
    whole_texts,
)
from veena_lens.model.embedded import continued, embedded_prompt, is_embeddings, refuse_what_reads_tokens
from veena_lens.model.encoding import is_text, refuse_unknown, require_tokenizer
from veena_lens.model.forward import LAST, forward, residual_state
from veena_lens.model.generation_settings import (
    SETTINGS,
    make_criteria,
    make_processors,
    resolve_settings,
)
from veena_lens.model.span import PassSpan

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM


class Generating:
    """View of a model as it writes: `generate` and `generate_stream`."""

    tokenizer: Any

    def generate(
        self,
        inputs: Any = None,
        max_new_tokens: int = 64,
        *by_position: Any,
        input: Any = None,
        do_sample: bool = False,
        temperature: float | int | None = None,
        top_k: int | None = None,
        top_p: float | int | None = None,
        repetition_penalty: float | int | None = None,
        freq_penalty: float | int | None = None,
        no_repeat_ngram_size: int | None = None,
        min_new_tokens: int | None = None,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        stop_strings: str | Sequence[str] | None = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        seed: int | None = None,
        use_past_kv_cache: bool = True,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        attention_mask: Tensor | None = None,
        chat: bool | None = None,
        return_type: str = "str",
        progress: bool = False,
        verbose: bool | None = None,
        output_logits: bool = False,
        return_cache: bool = False,
        names_filter: Any = None,
        device: Any = None,
        return_input_tokens: bool = False,
        **unknown: Any,
    ) -> Any:
        """Return the completions of a batch: list[str], or ("tokens") [batch new], padded at the end.

        Generation stops as the checkpoint's generation config says, at `stop_strings`, at the context's end, or after
        `max_new_tokens`. Hooks and interventions act at every step. Everything after `max_new_tokens` goes by name.
        inputs (or input): prepared inputs, tokens, or text, which the chat template wraps where there is one; also
            embeddings of text [batch pos d_model], which enter block 0.
        temperature .. eos_token_id: as in transformers; None takes the generation config's value (where it has
            none, nothing is filtered when sampling). A temperature of 0 is greedy. logits_processor,
            stopping_criteria: transformers' classes. freq_penalty: lowers a sampled token's logit per time it was said.
        stop_at_eos: False lets every row run to its full length.
        seed: makes sampling repeat itself. use_past_kv_cache: False recomputes the whole sequence at each step.
        prepend_bos, padding_side: of raw text, as `to_tokens` takes them; giving one means that the text is raw.
        attention_mask: of bare tokens. chat: False takes text raw; None wraps it where there is a template.
        return_type: "str" or "tokens", the completion alone; "input" (in the type of the input), "tensor" (tokens) or
            "embeds" (what enters block 0): prompt and completion, as in HookedTransformer.
        progress (or verbose): show a bar. output_logits: return a `GenerateOutput`, with the logits of each step.
        return_cache, return_input_tokens: return a tuple of the output, the cache of prompt and completion
            (`names_filter` and `device` as in `run_with_cache`), and the prompt's tokens.
        Raises: ValueError for a prompt that leaves no room in the context, or text without a tokenizer; TypeError for
        an unknown setting, or one given by its place.
        """
        settings = {name: value for name, value in locals().items() if name in SETTINGS}
        _refuse("generate", by_position, unknown)
        how = Wanted(return_type, progress if verbose is None else verbose, output_logits)
        of_text: dict[str, Any] = dict(
            prepend_bos=prepend_bos, padding_side=padding_side, attention_mask=attention_mask, chat=chat
        )
        model = cast("HookedVLM", self)
        given = one_input("generate", inputs, input)
        if is_embeddings(given):
            refuse_what_reads_tokens(model, settings, return_type, return_input_tokens)
            prompt = embedded_prompt(model, given, attention_mask)
        else:
            prompt = as_prompt(model, given, **of_text)
        new, out = _generate(model, given, prompt, settings, how)
        more: list[Any] = []
        if return_cache:
            caching: dict[str, Any] = dict(names_filter=names_filter, device=device)
            if is_embeddings(given):
                whole, run = continued(model, given, prompt, new)
                caching |= run
            else:
                whole = prompt.with_answer(new)
            more.append(model.run_with_cache(whole, **caching)[1])
        if return_input_tokens:
            more.append(prompt.tokens)
        return (out, *more) if more else out

    def generate_stream(
        self,
        inputs: Any = None,
        max_new_tokens: int = 64,
        *by_position: Any,
        input: Any = None,
        do_sample: bool = False,
        max_tokens_per_yield: int = 1,
        return_type: str = "str",
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        attention_mask: Tensor | None = None,
        chat: bool | None = None,
        verbose: bool | None = None,
        **settings: Any,
    ) -> Iterator[Any]:
        """Yield text as it grows: the new piece, str for one row, list[str] for a batch; joined they are `generate`'s.

        max_tokens_per_yield: the steps between two pieces. return_type: "str" for text; "tokens" for new tokens
            [batch n]; "input" (in the type of the input) or "tensor", where the first piece holds the prompt too.
        verbose: accepted; no bar is shown beside the text. The others and settings: those of `generate`.
        Raises: as `generate`; TypeError for an unknown setting."""
        _refuse("generate_stream", by_position, {name: 0 for name in settings if name not in SETTINGS})
        if max_tokens_per_yield < 1:
            raise ValueError(f"generate_stream: max_tokens_per_yield={max_tokens_per_yield} must be at least 1.")
        if return_type not in ("str", "tokens", "input", "tensor"):
            raise ValueError(
                f"generate_stream: return_type={return_type!r} must be 'str', 'tokens', 'input' or 'tensor'."
            )
        settings.update(max_new_tokens=max_new_tokens, do_sample=do_sample)
        of_text: dict[str, Any] = dict(
            prepend_bos=prepend_bos, padding_side=padding_side, attention_mask=attention_mask, chat=chat
        )
        given = one_input("generate_stream", inputs, input)
        return _stream(cast(Any, self), given, of_text, settings, return_type, max_tokens_per_yield)


def one_input(what: str, inputs: Any, input: Any) -> Any:
    """Return what is given under either name. Raises: TypeError for none, or both."""
    if (inputs is None) == (input is None):
        raise TypeError(f"{what} takes one input: prepared inputs, tokens or text.")
    return input if inputs is None else inputs


def _refuse(what: str, by_position: tuple[Any, ...], unknown: Mapping[str, Any]) -> None:
    """Raise TypeError for settings given by their place, or that do not exist."""
    if by_position:
        raise TypeError(
            f"{what} takes the input and max_new_tokens by their places, everything else by name: do_sample=..., "
            "stop_at_eos=... (HookedTransformer has stop_at_eos in the third place)."
        )
    names = (*SETTINGS, "return_type", "prepend_bos", "padding_side", "attention_mask", "chat", "verbose")
    refuse_unknown(what, unknown, (*names, "progress", "return_cache", "output_logits", "return_input_tokens"))


@torch.no_grad()
def _generate(
    model: HookedVLM, given: Any, prompt: MultimodalInputs, settings: dict[str, Any], how: Wanted
) -> tuple[Int[Tensor, "batch new"], Any]:
    """Return the new tokens of a batch, and what `generate` returns of them."""
    if how.return_type not in RETURN_TYPES:
        kinds = ", ".join(map(repr, RETURN_TYPES[2:]))
        raise ValueError(f"generate: return_type={how.return_type!r} must be 'str' or 'tokens', or one of {kinds}.")
    in_text = how.return_type == "str" or (how.return_type == "input" and is_text(given))
    if in_text:
        require_tokenizer(model.tokenizer, f"generate(return_type={how.return_type!r})")
    logits: list[Tensor] = []
    embeds = given if is_embeddings(given) else None
    steps = _steps(model, prompt, settings, logits if how.output_logits else None, embeds)
    if how.progress:
        from tqdm.auto import tqdm

        steps = tqdm(steps, total=settings["max_new_tokens"], desc="tokens", leave=False)
    tokens = torch.empty(0)
    for grown in steps:
        tokens = grown
    # `inputs.with_answer(tokens)` reads it, to tell an answer's end from the padding after it.
    cast(Any, tokens).end_token_ids = tuple(resolve_settings(model.generation_config, settings)["eos"])
    out = returned(model, given, prompt, tokens, how.return_type)
    return tokens, GenerateOutput(out, tuple(logits)) if how.output_logits else out


@torch.no_grad()  # on a generator torch enters it for each step, so none leaks between steps
def _stream(
    model: HookedVLM, given: Any, of_text: dict[str, Any], settings: dict[str, Any], return_type: str, stride: int
) -> Iterator[Any]:
    """Yield pieces of completions: see `Generating.generate_stream`."""
    in_text = return_type == "str" or (return_type == "input" and is_text(given))
    if in_text:
        require_tokenizer(model.tokenizer, "generate_stream")
    prompt = as_prompt(model, given, **of_text)
    steps = every(_steps(model, prompt, settings), stride)
    if in_text:
        if return_type == "str":
            yield from text_pieces(steps, partial(model.tokenizer.batch_decode, skip_special_tokens=True))
        else:
            yield from text_pieces(steps, partial(whole_texts, model, prompt))
        return
    n_said = 0
    for tokens in steps:
        piece = tokens[:, n_said:]
        if not n_said and return_type != "tokens":
            piece = torch.cat([prompt.tokens, piece], 1)
        n_said = tokens.shape[1]
        yield piece


@torch.no_grad()
def _steps(
    model: HookedVLM,
    prompt: MultimodalInputs,
    settings: dict[str, Any],
    kept: list[Tensor] | None = None,
    embeds: Float[Tensor, "batch pos d_model"] | None = None,
) -> Iterator[Int[Tensor, "batch new"]]:
    """Return the tokens generated so far, after each step; `kept` takes the logits that each step chose from.

    embeds: what enters block 0 in the place of the prompt's tokens."""
    cache = KVCache(model.cfg.n_layers) if settings.get("use_past_kv_cache", True) else None

    def after(new: Int[Tensor, "batch new"]) -> Float[Tensor, "batch d_vocab"]:
        logits = next_logits(model, prompt, new, cache, embeds)
        if kept is not None:
            kept.append(logits)
        return logits

    yield from decode_steps(model, prompt, settings, after)


def as_prompt(
    model: HookedVLM,
    inputs: Any,
    *,
    prepend_bos: bool | None = None,
    padding_side: str | None = None,
    attention_mask: Tensor | None = None,
    chat: bool | None = None,
) -> MultimodalInputs:
    """Return prepared inputs whose rows end at the last position, where generation appends.

    inputs: prepared inputs, tokens, or text. prepend_bos, padding_side: of raw text; giving one means that it is raw.
    attention_mask: of bare tokens. chat: False takes text raw, True wraps it in the chat template, None where there is
    one (text for a model of images always)."""
    if is_text(inputs):
        has_template = model.cfg.vision is not None or bool(getattr(model.processor, "chat_template", None))
        is_raw = prepend_bos is not None or padding_side is not None or attention_mask is not None
        if has_template and not is_raw if chat is None else chat:
            inputs = model.prepare(text=inputs if isinstance(inputs, str) else list(inputs))
    how: dict[str, Any] = dict(prepend_bos=prepend_bos, padding_side=padding_side)
    prompt = model.as_inputs(inputs, attention_mask, **how).left_padded()
    if prompt.position_ids.ndim == 2:  # generation counts real tokens whatever a forward was given
        prompt = replace(prompt, position_ids=text_positions(prompt.attention_mask))
    return prompt


def next_logits(
    model: HookedVLM,
    prompt: MultimodalInputs,
    new: Int[Tensor, "batch new"],
    cache: KVCache | None = None,
    embeds: Float[Tensor, "batch pos d_model"] | None = None,
) -> Float[Tensor, "batch d_vocab"]:
    """Return the logits after the last of the new tokens, or after the prompt where there is none yet.

    prompt: inputs of `as_prompt`. cache: holds everything before the last new token and is appended to; None
    computes the whole sequence. embeds: what enters block 0 in the place of the prompt's tokens."""
    n_prompt, n_new = prompt.shape[1], new.shape[1]
    if n_new and cache is not None:
        last = n_prompt + n_new - 1
        span = PassSpan(prompt, last, last + 1, new[:, -1:])
    else:
        span = PassSpan(prompt, 0, n_prompt + n_new, new if n_new else None)
    entering = None
    if embeds is not None and span.start == 0:
        entering = residual_state(model, span, torch.cat([embeds, model.embed(new)], 1) if n_new else embeds, 0)
    return forward(model, span, entering=entering, cache=cache, positions=LAST)[:, -1]


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
    config = resolve_settings(model.generation_config, settings)
    ends = torch.tensor(config["eos"], dtype=torch.long, device=prompt.device)
    processors = make_processors(config, prompt, max_new)
    processors.extend(settings.get("logits_processor") or [])
    criteria = make_criteria(config, settings, model.tokenizer)
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
