"""Metrics of a sweep: a number a row from the last position's logits, or from an activation elsewhere.

A metric is any function of logits [rows d_vocab]; one with `.site` and `.positions` is given that activation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def _require_tokens(metric: str, tokens: Sequence[int], logits: Tensor) -> None:
    """Raises: ValueError for a token id that the vocabulary lacks."""
    outside = [t for t in tokens if not 0 <= t < logits.shape[-1]]
    if outside:
        raise ValueError(f"{metric}: token id {outside[0]} does not exist; the vocabulary has {logits.shape[-1]}.")


@dataclass(frozen=True)
class logit_diff:  # noqa: N801 (read as a function)
    """Logit of the `correct` token minus that of the `wrong` one."""

    correct: int
    wrong: int

    def __call__(self, logits: Float[Tensor, "rows d_vocab"]) -> Float[Tensor, " rows"]:
        _require_tokens("logit_diff", (self.correct, self.wrong), logits)
        return logits[:, self.correct] - logits[:, self.wrong]


@dataclass(frozen=True)
class log_prob:  # noqa: N801
    """Log probability of a token."""

    token: int

    def __call__(self, logits: Float[Tensor, "rows d_vocab"]) -> Float[Tensor, " rows"]:
        _require_tokens("log_prob", (self.token,), logits)
        return logits.log_softmax(-1)[:, self.token]


@dataclass(frozen=True, eq=False)
class kl:  # noqa: N801
    """KL(reference || run) of next-token distributions; `reference` are logits [d_vocab]."""

    reference: Float[Tensor, " d_vocab"]

    def __call__(self, logits: Float[Tensor, "rows d_vocab"]) -> Float[Tensor, " rows"]:
        if self.reference.shape != logits.shape[-1:]:
            raise ValueError(f"kl: the reference must be [{logits.shape[-1]}], not {list(self.reference.shape)}.")
        want = self.reference.to(logits).log_softmax(-1)
        return (want.exp() * (want - logits.log_softmax(-1))).sum(-1)


@dataclass(frozen=True, eq=False)
class project:  # noqa: N801
    """Inner product of an activation at `positions` (mean over them) with a direction's unit vector."""

    site: str
    direction: Float[Tensor, " d_model"]
    positions: Any = "last"

    def __call__(self, activation: Float[Tensor, "rows n d_model"]) -> Float[Tensor, " rows"]:
        if self.direction.shape != activation.shape[-1:]:
            wanted, shape = activation.shape[-1], list(self.direction.shape)
            raise ValueError(f"project: the direction must be [{wanted}] as {self.site} is, not {shape}.")
        unit = self.direction / (self.direction.norm() + 1e-12)
        return (activation @ unit.to(activation)).mean(-1)


@dataclass(frozen=True)
class soft_hit:  # noqa: N801
    """log p(tokens of the target set) - log mean p(other sets): how far one answer leads the others.

    `tokens` are ids of the target's words, `others` one list a rival. Ids that two sets share are refused.
    """

    tokens: Sequence[int]
    others: Sequence[Sequence[int]]

    def __post_init__(self) -> None:
        sets = [set(self.tokens), *map(set, self.others)]
        if not sets[0] or len(sets) < 2 or not all(sets):
            raise ValueError("soft_hit: give token ids for the target and for at least one rival.")
        shared = {t for i, s in enumerate(sets) for other in sets[i + 1 :] for t in s & other}
        if shared:
            raise ValueError(f"soft_hit: token ids {sorted(shared)} stand in two sets; drop them from both.")

    def __call__(self, logits: Float[Tensor, "rows d_vocab"]) -> Float[Tensor, " rows"]:
        _require_tokens("soft_hit", [*self.tokens, *(t for o in self.others for t in o)], logits)
        logp = logits.log_softmax(-1)
        target = logp[:, list(self.tokens)].logsumexp(-1)
        rivals = torch.stack([logp[:, list(o)].logsumexp(-1) for o in self.others])
        return target - (rivals.logsumexp(0) - torch.log(torch.tensor(float(len(self.others)), dtype=logp.dtype)))
