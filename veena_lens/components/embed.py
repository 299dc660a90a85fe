"""Token embedding and unembedding; a tied unembedding reads the embedding's weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, empty, nn
from transformer_lens.hook_points import HookPoint


class Embed(nn.Module):
    """Token id -> residual: a row of the weight, times the square root of d_model where `scales` (Gemma).

    `W_E` is the stored weight without that factor (a tied unembedding reads it as it is)."""

    def __init__(self, d_vocab: int, d_model: int, scales: bool = False) -> None:
        super().__init__()
        self.scale = d_model**0.5 if scales else None
        self.weight = nn.Parameter(empty(d_vocab, d_model).normal_(std=0.02))

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        # An image token may lie outside the vocabulary: its row is replaced by image features anyway.
        rows = F.embedding(tokens.clamp(max=self.weight.shape[0] - 1), self.weight)
        return rows if self.scale is None else rows * self.factor(rows.dtype)

    def factor(self, dtype: torch.dtype) -> float:
        """The scale as the model's dtype holds it: sqrt(3072) is 55.5 in bfloat16."""
        assert self.scale is not None
        return float(torch.tensor(self.scale, dtype=torch.float64).to(dtype))

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        return self.weight


class Unembed(nn.Module):
    """Residual after the last norm -> logits."""

    def __init__(self, d_vocab: int, d_model: int, tied_to: Embed | None, bias: bool = False) -> None:
        super().__init__()
        self._tied = [tied_to]  # in a list: the embedding stays the only owner of a shared weight
        if tied_to is None:
            self.weight = nn.Parameter(empty(d_vocab, d_model).normal_(std=0.02))
        self.bias = nn.Parameter(empty(d_vocab).zero_()) if bias else None
        self.hook_in, self.hook_out = HookPoint(), HookPoint()

    @property
    def matrix(self) -> Float[Tensor, "d_vocab d_model"]:
        """The weight in use, own or tied."""
        return self._tied[0].weight if self._tied[0] is not None else self.weight

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        return self.hook_out(F.linear(self.hook_in(x), self.matrix, self.bias))

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """Unembedding; a view."""
        return self.matrix.T

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        return self.matrix.new_zeros(self.matrix.shape[0]) if self.bias is None else self.bias
