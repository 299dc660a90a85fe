"""Raw text to rows of token ids and back, with the tokenizer's own special tokens unless others are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from veena_lens.config import HookedVLMConfig
from veena_lens.inputs import MultimodalInputs


def is_text(input: Any) -> bool:
    """Return True for a text or a sequence of texts."""
    return isinstance(input, str) or (isinstance(input, (list, tuple)) and bool(input) and isinstance(input[0], str))


def require_tokenizer(tokenizer: Any, what: str) -> Any:
    """Return the tokenizer. Raises: ValueError, naming what needs it, where there is none."""
    if tokenizer is None:
        raise ValueError(f"{what} needs a tokenizer, and this model was loaded without one; give token ids instead.")
    return tokenizer


def encode_text(tokenizer: Any, text: Any, special: bool = True) -> list[list[int]]:
    """Return the token ids of each text, with or without special tokens."""
    tokenizer = require_tokenizer(tokenizer, "Text input")
    if not is_text(text):
        raise TypeError(f"A text or a list of texts is needed, not {type(text).__name__}.")
    texts = [text] if isinstance(text, str) else list(text)
    return [list(tokenizer(t, add_special_tokens=special)["input_ids"]) for t in texts]


def encode_rows(tokenizer: Any, cfg: HookedVLMConfig, text: Any, prepend_bos: bool | None) -> list[list[int]]:
    """Return the token ids of each text with its special tokens.

    prepend_bos: as `TextInterface.to_tokens` takes it; None is what `cfg.default_prepend_bos` was set to, else what
        the tokenizer does itself."""
    if prepend_bos is None:
        prepend_bos = cfg.flags.default_prepend_bos
    rows = encode_text(tokenizer, text, special=prepend_bos is not False)
    bos = getattr(tokenizer, "bos_token_id", None)
    if prepend_bos and bos is not None:
        rows = [r if r[:1] == [bos] else [bos, *r] for r in rows]
    return rows


def padding_side_of(tokenizer: Any, given: str | None = None) -> str:
    """Return "left" or "right": what is given, else the tokenizer's own side.

    Raises: ValueError for another word."""
    side = getattr(tokenizer, "padding_side", "left") if given is None else given
    if side not in ("left", "right"):
        raise ValueError(f"padding_side={side!r} must be 'left' or 'right'.")
    return side


def padded(rows: Sequence[Sequence[int]], pad: int, side: str) -> tuple[Tensor, Tensor]:
    """Return rows of tokens as one tensor [batch pos], padded on one side, and its mask."""
    length = max(map(len, rows))
    tokens = torch.full((len(rows), length), pad, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        at = slice(length - len(row), None) if side == "left" else slice(len(row))
        tokens[i, at] = torch.tensor(row, dtype=torch.long)
        mask[i, at] = True
    return tokens, mask


def prepends_bos(tokenizer: Any) -> bool:
    """Return True where a tokenizer writes its BOS token before a text."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos is not None and encode_text(tokenizer, "a")[0][:1] == [bos]


def ids_of(tokens: Any) -> Tensor | list[Any]:
    """Return one row of ids as a tensor, several as a list of rows."""
    if isinstance(tokens, MultimodalInputs):
        tokens = tokens.tokens
    if isinstance(tokens, (list, tuple)) and tokens and not isinstance(tokens[0], (int, float)):
        return [torch.as_tensor(row).flatten() for row in tokens]
    ids = torch.as_tensor(tokens)
    if ids.ndim > 2 or ids.is_floating_point():
        raise ValueError(f"Tokens must be integers [pos] or [batch pos], not {ids.dtype} {list(ids.shape)}.")
    return list(ids) if ids.ndim == 2 else ids.reshape(-1)


def refuse_unknown(what: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise TypeError for arguments that a function does not have, with near names."""
    for name in given:
        near = get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise TypeError(f"{what}: unknown argument {name!r}.{hint} It takes {', '.join(known)}.")
