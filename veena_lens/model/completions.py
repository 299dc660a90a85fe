"""Completions in the form that was asked for: texts, tokens or embeddings, whole or in pieces as they grow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from veena_lens.inputs import MultimodalInputs
from veena_lens.model.embedded import is_embeddings
from veena_lens.model.encoding import is_text

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM


RETURN_TYPES = ("str", "tokens", "input", "tensor", "embeds")


class GenerateOutput(NamedTuple):
    """What `output_logits=True` returns: the completions, and for each step the logits [batch d_vocab]."""

    sequences: Any
    logits: tuple[Tensor, ...]


class Wanted(NamedTuple):
    """In which form a completion is returned."""

    return_type: str
    progress: bool
    output_logits: bool


def returned(model: HookedVLM, given: Any, prompt: MultimodalInputs, new: Tensor, return_type: str) -> Any:
    """Return a completion in the form that was asked for."""
    if return_type == "tokens":
        return new
    if return_type == "str":
        return model.tokenizer.batch_decode(new, skip_special_tokens=True)
    if return_type == "input" and isinstance(given, MultimodalInputs):
        return prompt.with_answer(new)
    is_embedded = is_embeddings(given)
    if return_type == "embeds" or is_embedded:
        return torch.cat([given if is_embedded else model.embed_inputs(prompt), model.embed(new)], 1)
    whole = torch.cat([prompt.tokens, new], 1)
    if return_type == "input" and is_text(given):
        texts = whole_texts(model, prompt, new)
        return texts[0] if isinstance(given, str) else texts
    return whole


def whole_texts(model: HookedVLM, prompt: MultimodalInputs, new: Tensor) -> list[str]:
    """Return the texts of prompts and completions, special tokens skipped."""
    whole = torch.cat([prompt.tokens, new], 1)
    mask = torch.cat([prompt.attention_mask, torch.ones_like(new, dtype=torch.bool)], 1)
    rows = [row[real] for row, real in zip(whole, mask, strict=True)]
    return [model.tokenizer.decode(row, skip_special_tokens=True) for row in rows]


def every(steps: Iterator[Tensor], stride: int) -> Iterator[Tensor]:
    """Yield every so manieth step, and the last."""
    last = None
    for number, tokens in enumerate(steps, start=1):
        last = None if number % stride == 0 else tokens
        if last is None:
            yield tokens
    if last is not None:
        yield last


def text_pieces(steps: Iterator[Tensor], texts_of: Callable[[Tensor], list[str]]) -> Iterator[Any]:
    """Yield text as it grows; `texts_of` gives the text of each row so far."""
    said: list[str] = []
    texts: list[str] = []
    for tokens in steps:
        texts = texts_of(tokens)
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
