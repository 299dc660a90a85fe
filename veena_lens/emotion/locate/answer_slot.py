"""A differentiable stand-in for the hit rate: probabilities of emotion words at the place where an answer names one.

Generation is dear and gives 0 or 1. After a fixed lead-in ("The person feels") the next token's distribution tells
the same story smoothly: p_e sums the first tokens of emotion e's words. Used to rank; generation confirms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from veena_lens.emotion.words.wheels import EmotionWheels
from veena_lens.sweeps.metrics import Metric, soft_hit

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM

LEAD_IN = "The person feels"


@dataclass(frozen=True, kw_only=True)
class AnswerPosition:
    """A place in an answer: `lead_in`, and for each emotion the ids of the tokens that name it there.

    `dropped` counts tokens that two emotions share, or that begin words of no single emotion."""

    lead_in: str
    tokens: Mapping[str, tuple[int, ...]]
    dropped: int = 0

    @property
    def emotions(self) -> list[str]:
        return list(self.tokens)

    def metric(self, emotion: str, others: Sequence[str] | None = None) -> Metric:
        """Return R_e = log p_e - log mean p of the `others`, as a metric for sweeps.

        Args:
            emotion: the emotion e.
            others: emotions that e is compared with; by default all other emotions.


        Raises: ValueError for an emotion that the slot does not know."""
        for name in (emotion, *(others or ())):
            if name not in self.tokens:
                raise ValueError(f"AnswerPosition: no tokens for {name!r}; known: {', '.join(self.tokens)}.")
        wanted = [e for e in self.tokens if e != emotion] if others is None else others
        return soft_hit(self.tokens[emotion], [self.tokens[e] for e in wanted])

    def log_probs(self, logits: Float[Tensor, "row d_vocab"]) -> Float[Tensor, "row emotion"]:
        """Return log p_e of each emotion."""
        logp = logits.double().log_softmax(-1)
        return torch.stack([logp[:, list(ids)].logsumexp(-1) for ids in self.tokens.values()], -1)

    def soft_hits(self, logits: Float[Tensor, "row d_vocab"]) -> Float[Tensor, "row emotion"]:
        """Return R_e of each emotion: log p_e - log mean_{e' != e} p_e'."""
        logp = self.log_probs(logits)
        n = logp.shape[-1]
        others = torch.stack([logp[:, [j for j in range(n) if j != i]].logsumexp(-1) for i in range(n)], -1)
        return logp - others + math.log(n - 1)

    def fingerprint(self) -> list[Any]:
        """Return what tells one answer position from another: its lead-in and every emotion's token ids."""
        return [self.lead_in, {emotion: list(ids) for emotion, ids in self.tokens.items()}]

    def __repr__(self) -> str:
        counts = ", ".join(f"{e} {len(ids)}" for e, ids in self.tokens.items())
        return f"AnswerPosition({self.lead_in!r}: tokens {counts}; {self.dropped} dropped)"


def answer_position(
    model: HookedVLM, emotions: Sequence[str], wheels: Any = None, lead_in: str = LEAD_IN
) -> AnswerPosition:
    """Return the slot after `lead_in` with the words that `wheels` list for each emotion.

    A word counts by its first token where that token is the whole word; an emotion without such a word takes the
    first tokens of all its words. Tokens that two emotions share are dropped from both.

    Args:
        model: the model, with a tokenizer.
        emotions: the emotions that are compared, at least two.
        wheels: emotion wheels with the emotion words; by default the project's own.
        lead_in: the begun answer that the emotion follows.

    Raises: ValueError for a model without tokenizer, fewer than two emotions, or an emotion left without tokens.
    """
    if model.tokenizer is None:
        raise ValueError("answer_position needs a model with a tokenizer.")
    if len(set(emotions)) < 2:
        raise ValueError(f"answer_position: {list(emotions)} must name at least two emotions.")
    wheels = EmotionWheels.default() if wheels is None else wheels
    wheels.require(emotions)
    start = _ids(model, lead_in)
    found: dict[str, set[int]] = {}
    for emotion in dict.fromkeys(emotions):
        whole, begun = set(), set()
        for word in wheels.lexicon(emotion):
            ids = _ids(model, f"{lead_in} {word}")
            after = ids[len(start) :] if ids[: len(start)] == start else _ids(model, f" {word}")
            if after:
                begun.add(after[0])
                if len(after) == 1:
                    whole.add(after[0])
        found[emotion] = whole or begun
    counts: dict[int, int] = {}
    for ids in found.values():
        for token in ids:
            counts[token] = counts.get(token, 0) + 1
    shared = {token for token, n in counts.items() if n > 1}
    tokens = {emotion: tuple(sorted(ids - shared)) for emotion, ids in found.items()}
    empty = [emotion for emotion, ids in tokens.items() if not ids]
    if empty:
        raise ValueError(
            f"answer_position: no token after {lead_in!r} names {', '.join(empty)} alone; leave these emotions out, or "
            "give wheels with other words for them."
        )
    return AnswerPosition(lead_in=lead_in, tokens=tokens, dropped=len(shared))


def emotion_tokens(model: HookedVLM, emotions: Sequence[str], wheels: EmotionWheels) -> set[int]:
    """Return the ids of all tokens of words that name one of the emotions, in the middle of a text and at its start."""
    texts = [f"{space}{word}" for e in emotions for word in wheels.lexicon(e) if " " not in word for space in (" ", "")]
    return {token for text in texts for token in _ids(model, text)}


def _ids(model: HookedVLM, text: str) -> list[int]:
    return list(model.tokenizer(text, add_special_tokens=False)["input_ids"])
