"""Text in and out of tokens, as HookedTransformer offers it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veena_lens import checkpoints
from veena_lens.inputs import MultimodalInputs


class TextInterface:
    """Mixin of HookedVLM."""

    tokenizer: Any
    cfg: Any

    def _need_tokenizer(self, what: str) -> Any:
        if self.tokenizer is None:
            raise ValueError(
                f"{what} needs a tokenizer, and this model was loaded without one; give token ids instead."
            )
        return self.tokenizer

    def _encode(self, text: str | Sequence[str], special: bool = True) -> list[list[int]]:
        tokenizer = self._need_tokenizer("Text input")
        texts = [text] if isinstance(text, str) else list(text)
        return [list(tokenizer(t, add_special_tokens=special)["input_ids"]) for t in texts]

    def to_tokens(
        self, input: str | Sequence[str], prepend_bos: bool | None = None, move_to_device: bool = True, **_: Any
    ) -> Int[Tensor, "batch pos"]:
        """Tokens of raw text (no chat template), shorter rows padded on the left.

        prepend_bos: None follows the tokenizer; False leaves every special token out; True adds the BOS token
        where the tokenizer has not."""
        tokenizer = self._need_tokenizer("to_tokens")
        rows = self._encode(input, special=prepend_bos is not False)
        bos = tokenizer.bos_token_id
        if prepend_bos and bos is not None:
            rows = [r if r[:1] == [bos] else [bos, *r] for r in rows]
        length, pad = max(map(len, rows)), self.pad_token_id
        tokens = torch.tensor([[pad] * (length - len(r)) + r for r in rows], dtype=torch.long)
        return tokens.to(self.embed.weight.device) if move_to_device else tokens  # type: ignore[attr-defined]

    @property
    def pad_token_id(self) -> int:
        """The token that pads: the tokenizer's, else the configuration's, else the end of text, else 0."""
        return checkpoints.pad_token_of(self.tokenizer, self.cfg)

    def to_string(self, tokens: Any) -> str | list[str]:
        """Text of tokens: a string for one row [pos], a list for [batch pos]; special tokens shown."""
        tokenizer = self._need_tokenizer("to_string")
        ids = torch.as_tensor(tokens)
        return tokenizer.batch_decode(ids) if ids.ndim == 2 else tokenizer.decode(ids)

    def to_str_tokens(self, input: Any, prepend_bos: bool | None = None) -> list[Any]:
        """Each token as text; for more than one row a list a row."""
        tokenizer = self._need_tokenizer("to_str_tokens")
        if isinstance(input, MultimodalInputs):
            ids = input.tokens
        elif isinstance(input, (str, list)) and (isinstance(input, str) or (input and isinstance(input[0], str))):
            ids = self.to_tokens(input, prepend_bos=prepend_bos, move_to_device=False)
        else:
            ids = torch.as_tensor(input)
        rows = ids if ids.ndim == 2 else ids[None]
        texts = [[tokenizer.decode([int(t)]) for t in row] for row in rows]
        return texts[0] if len(texts) == 1 else texts

    def to_single_token(self, string: str) -> int:
        """The id of a text that is one token.

        Raises: ValueError when it is more, listing them."""
        ids = self._encode(string, special=False)[0]
        if len(ids) != 1:
            parts = [self.tokenizer.decode([i]) for i in ids]
            raise ValueError(f"{string!r} is {len(ids)} tokens, not one: {parts}.")
        return int(ids[0])

    def to_single_str_token(self, int_token: int) -> str:
        """The text of one token."""
        return self._need_tokenizer("to_single_str_token").decode([int_token])

    def tokens_to_residual_directions(self, tokens: Any) -> Float[Tensor, "*pos d_model"]:
        """Directions of the last residual stream that raise these tokens' logits, [d_model] for one token.

        The last norm's weight is folded in, so that a dot product with a residual divided by
        `ln_final.hook_scale` is the logit exactly."""
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        ids = torch.as_tensor(tokens, device=self.unembed.matrix.device)  # type: ignore[attr-defined]
        if ids.ndim and ids.numel() == 1:
            ids = ids.reshape(())
        return self.unembed.matrix[ids] * self.ln_final.w  # type: ignore[attr-defined]
