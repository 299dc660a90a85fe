"""Which tokens of a batch are pads: the pad token, the mask that follows from it, and the mask that must be given.

A pad stands at an end of its row. Pads on the right cannot be read by what comes before them; pads on the left must be
masked. Where the tokenizer has no pad token the end-of-text token stands in for it, and may be text as well: an end of
text that every row has at its end, and a beginning of text that is the same token, are kept.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from veena_lens.config import HookedVLMConfig


def pad_token_of(tokenizer: Any, cfg: HookedVLMConfig) -> int:
    """Return the id of the pad token: the tokenizer's, else the configuration's, else the end of text, else 0."""
    known = _known_pad(tokenizer, cfg)
    return 0 if known is None else known


def _known_pad(tokenizer: Any, cfg: HookedVLMConfig) -> int | None:
    """Return the id of the pad token, None where neither tokenizer nor configuration names one or an end of text."""
    for found in (getattr(tokenizer, "pad_token_id", None), cfg.pad_token_id, getattr(tokenizer, "eos_token_id", None)):
        if found is not None:
            return int(found)
    return None


def give_pad_token(tokenizer: Any, cfg: HookedVLMConfig) -> None:
    """Let a tokenizer that names no pad token name the model's, so that whoever asks it finds the same pads.

    A token that is ordinary text stays so: texts would lose it where special tokens are skipped."""
    if tokenizer is None or getattr(tokenizer, "pad_token_id", 0) is not None:
        return
    pad = _known_pad(tokenizer, cfg)
    if pad is not None and pad in tokenizer.all_special_ids:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)


def padding_mask(cfg: HookedVLMConfig, tokenizer: Any, tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    """Return the mask of bare tokens: False at the pads that a row begins or ends with.

    A row of nothing but pads is text. Where the pad token is the end of text too, one at the end of every row is text.
    Where it is the beginning of text too, so is the last of those that a row begins with, if every row begins with one
    or text gets one by default.
    """
    mask = torch.ones_like(tokens, dtype=torch.bool)
    pad = _known_pad(tokenizer, cfg)
    if pad is None:
        return mask
    is_text = tokens != pad
    n_leading = (is_text.cumsum(-1) == 0).sum(-1)
    n_trailing = (is_text.flip(-1).cumsum(-1) == 0).sum(-1)
    if pad == getattr(tokenizer, "eos_token_id", None):
        n_trailing = n_trailing - n_trailing.min().clamp(max=1)
    if pad == getattr(tokenizer, "bos_token_id", None) and (cfg.default_prepend_bos or bool((n_leading > 0).all())):
        n_leading = (n_leading - 1).clamp(min=0)
    places = torch.arange(tokens.shape[1], device=tokens.device)
    mask &= places >= n_leading[:, None]
    mask &= places < tokens.shape[1] - n_trailing[:, None]
    return mask | ~is_text.any(-1, keepdim=True)


def require_mask(cfg: HookedVLMConfig, tokenizer: Any, tokens: Int[Tensor, "batch pos"], mask: Any) -> Tensor:
    """Return a processor's mask as booleans; all True without one, where no row begins or ends with a pad.

    Raises:
        ValueError: padding without a mask, a mask of another shape, or a row without a real token.
    """
    if mask is None:
        found = padding_mask(cfg, tokenizer, tokens)
        rows = (~found.all(-1)).nonzero().flatten().tolist()
        if rows:
            raise ValueError(
                f"Rows {rows} begin or end with the pad token {pad_token_of(tokenizer, cfg)} and no attention_mask was "
                "given: without it pads would be read as text. Pass attention_mask (ones where the token is real)."
            )
        return found
    mask = torch.as_tensor(mask).to(tokens.device) != 0
    if mask.shape != tokens.shape:
        raise ValueError(f"attention_mask {list(mask.shape)} does not fit input_ids {list(tokens.shape)}.")
    empty = (~mask.any(-1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"Rows {empty} have no real token: their attention_mask is zero everywhere.")
    return mask
