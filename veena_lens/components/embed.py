"""Token embedding and unembedding; a tied unembedding reads the embedding's weight."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, empty, nn
from transformer_lens.hook_points import HookPoint


class Embed(nn.Module):
    """Token id -> residual."""

    def __init__(self, d_vocab: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(empty(d_vocab, d_model).normal_(std=0.02))

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        # An image token may lie outside the vocabulary: its row is replaced by image features anyway.
        return F.embedding(tokens.clamp(max=self.weight.shape[0] - 1), self.weight)

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
