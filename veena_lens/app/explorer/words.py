"""Words that a visitor names, as single tokens: one of several tokens is refused, and its tokens are offered."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from veena_lens import HookedVLM


class SeveralTokens(ValueError):
    """A word that is several tokens to a model; `pieces`: each as (id, text)."""

    def __init__(self, word: str, pieces: Sequence[tuple[int, str]]) -> None:
        listed = ", ".join(f"“{text}” (#{token})" for token, text in pieces)
        super().__init__(
            f"“{word}” is {len(pieces)} tokens to this model: {listed}. Choose one of them, written as "
            f"#{pieces[0][0]}, or name another word."
        )
        self.word, self.pieces = word, list(pieces)


def single_token(model: HookedVLM, word: str) -> int:
    """Return the token of a word as it follows a space, or the one that is written as #id.

    Raises: ValueError for an empty word or an id outside the vocabulary; SeveralTokens, naming them, for others."""
    text = word.strip()
    if not text:
        raise ValueError("Name two words whose logits are compared, for example happy and neutral.")
    if re.fullmatch(r"#\d{1,9}", text):
        if int(text[1:]) >= model.cfg.d_vocab:
            raise ValueError(f"There is no token {text}; the model's vocabulary has {model.cfg.d_vocab:,}.")
        return int(text[1:])
    after_space, alone = (model.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (f" {text}", text))
    if len(after_space) == 1:
        return int(after_space[0])
    # SentencePiece puts the space there itself, and makes a second token of the one that was written.
    if len(alone) == 1 and str(model.tokenizer.convert_ids_to_tokens(alone)[0]).startswith("▁"):
        return int(alone[0])
    raise SeveralTokens(text, [(int(token), model.tokenizer.decode([token])) for token in after_space])


def named(model: HookedVLM, word: str) -> str:
    """Return a word as figures name it; of a token's id the text, too."""
    if not word.strip().startswith("#"):
        return word.strip()
    return f"{word.strip()} “{model.tokenizer.decode([single_token(model, word)])}”"


def note_of(model: HookedVLM, word: str) -> str:
    """Return a sentence where a word is several tokens, else an empty text."""
    try:
        single_token(model, word)
    except SeveralTokens as error:
        pieces = ", ".join(f"“{text}”" for _, text in error.pieces)
        return f"“{word}” is {len(error.pieces)} tokens to this model ({pieces}); answers are compared as whole text."
    return ""
