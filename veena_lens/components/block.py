"""A transformer block, in which attention and MLP each read a norm of the residual stream and add to it.

Also the token embedding and the unembedding; a tied unembedding reads the weight of the embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, empty, nn
from transformer_lens.hook_points import HookPoint

from veena_lens.components.attention import Attention, AttentionInputs, Copies
from veena_lens.components.context import Context
from veena_lens.components.hooks import heard, listen, uncompiled
from veena_lens.components.mlp import MLP
from veena_lens.components.norms import make_norm
from veena_lens.config import HookedVLMConfig, TransformerConfig


class Embed(nn.Module):
    """Maps a token id to a residual: a row of the weight, times the square root of d_model where `scales` (Gemma).

    `W_E` is the stored weight without that factor, as a tied unembedding reads it."""

    def __init__(self, d_vocab: int, d_model: int, scales: bool = False) -> None:
        super().__init__()
        self.scale = d_model**0.5 if scales else None
        self.weight = nn.Parameter(empty(d_vocab, d_model).normal_(std=0.02))

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        # An image token may lie outside the vocabulary: its row is replaced by image features anyway.
        rows = F.embedding(tokens.clamp(max=self.weight.shape[0] - 1), self.weight)
        return rows if self.scale is None else rows * self.factor(rows.dtype)

    def factor(self, dtype: torch.dtype) -> float:
        """Return the scale as the model's dtype holds it: sqrt(3072) is 55.5 in bfloat16."""
        assert self.scale is not None
        return float(torch.tensor(self.scale, dtype=torch.float64).to(dtype))

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        return self.weight


class Unembed(nn.Module):
    """Maps the residual after the last norm to logits."""

    def __init__(self, d_vocab: int, d_model: int, tied_to: Embed | None, bias: bool = False) -> None:
        super().__init__()
        self._tied = [tied_to]  # in a list: the embedding stays the only owner of a shared weight
        if tied_to is None:
            self.weight = nn.Parameter(empty(d_vocab, d_model).normal_(std=0.02))
        self.bias = nn.Parameter(empty(d_vocab).zero_()) if bias else None
        self.hook_in, self.hook_out = HookPoint(), HookPoint()

    @property
    def matrix(self) -> Float[Tensor, "d_vocab d_model"]:
        """Return the weight in use, own or tied."""
        return self._tied[0].weight if self._tied[0] is not None else self.weight

    @uncompiled
    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        return self.hook_out(F.linear(self.hook_in(x), self.matrix, self.bias))

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """Return the unembedding; a view."""
        return self.matrix.T

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        return self.matrix.new_zeros(self.matrix.shape[0]) if self.bias is None else self.bias


class Block(nn.Module):
    """Pre-norm block of a decoder or a vision tower (the same hooks in both).

    With `post_norms` what attention and MLP give is normed before it joins the residual: `hook_attn_out` and
    `hook_mlp_out` are what is added, after `ln1_post` and `ln2_post`."""

    hook_out_is_single_residual_stream = True  # transformer_lens's lenses ask

    def __init__(self, cfg: TransformerConfig, layer: int, has_rotary: bool) -> None:
        super().__init__()
        self.ln1, self.ln2 = make_norm(cfg), make_norm(cfg)
        if cfg.post_norms:
            self.ln1_post, self.ln2_post = make_norm(cfg), make_norm(cfg)
        self.has_post_norms = cfg.post_norms
        self.attn, self.mlp = Attention(cfg, layer, has_rotary), MLP(cfg)
        self.n_heads, self.n_kv = cfg.n_heads, cfg.n_key_value_heads
        self.layer, self.hook_resid_pre = layer, HookPoint()
        self.alone: Callable[[Tensor], Context] | None = None  # what a block reads where it is called by itself
        # Features of inner tower layers join at the input of the first layers after layer 0.
        self.receives = 1 <= layer <= getattr(cfg, "n_deepstack", 0)
        if self.receives:
            self.hook_deepstack = HookPoint()
        self.hook_q_input, self.hook_k_input, self.hook_v_input = HookPoint(), HookPoint(), HookPoint()
        # Only a decoder has it, and only where queries, keys and values have as many heads.
        self.has_attn_in = isinstance(cfg, HookedVLMConfig) and self.n_heads == self.n_kv
        if self.has_attn_in:
            self.hook_attn_in = HookPoint()
        self.hook_attn_out, self.hook_resid_mid = HookPoint(), HookPoint()
        self.hook_mlp_in, self.hook_mlp_out, self.hook_resid_post = HookPoint(), HookPoint(), HookPoint()

    @uncompiled
    def forward(
        self, resid: Float[Tensor, "batch pos d_model"], context: Context | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        if context is None:
            if self.alone is None:
                raise TypeError("A block reads masks and positions: call it inside a model, or give it a Context.")
            context = self.alone(resid)
        resid = self.hook_resid_pre(resid)
        if self.receives:
            resid = self.hook_deepstack(context.with_deepstack(self.layer, resid))
        return self.rest(resid, context)

    def rest(self, resid: Float[Tensor, "batch pos d_model"], context: Context) -> Float[Tensor, "batch pos d_model"]:
        """Run the block from just after `hook_resid_pre`: a tower takes its features there."""
        attn_out = self.attn(self._attention_inputs(resid, context.ungrouped), context)
        attn_out = self.hook_attn_out(self.ln1_post(attn_out) if self.has_post_norms else attn_out)
        resid_mid = self.hook_resid_mid(resid + attn_out)
        mlp_in = self.hook_mlp_in(resid_mid.clone()) if heard(self.hook_mlp_in) else resid_mid
        mlp_out = self.mlp(self.ln2(mlp_in))
        mlp_out = self.hook_mlp_out(self.ln2_post(mlp_out) if self.has_post_norms else mlp_out)
        return self.hook_resid_post(resid_mid + mlp_out)

    def _attention_inputs(self, resid: Tensor, ungrouped: bool) -> AttentionInputs:
        is_shared = self.has_attn_in and heard(self.hook_attn_in)
        if not (is_shared or heard(self.hook_q_input, self.hook_k_input, self.hook_v_input)):
            return AttentionInputs(self.ln1.run(resid).out)
        # Listeners of ln1 see the norm of the residual itself; every path below is a copy that honours their
        # edits. The residual's own gradient flows through the copies, theirs through what they saw.
        normed = self.ln1.run(resid.detach().requires_grad_(resid.requires_grad and torch.is_grad_enabled()))
        shared = self.ln1.of_copies(resid[:, :, None], normed)[:, :, 0]

        # A view made by expand must be cloned before hooks see it: they may write in place.
        common, common_edited = resid[:, :, None], False
        if is_shared:
            common, common_edited = listen(self.hook_attn_in, common.expand(-1, -1, self.n_heads, -1).clone())

        def copies(hook: HookPoint, n: int) -> Copies | None:
            if not (is_shared or heard(hook)):
                return None
            value, edited = common, False
            if heard(hook):
                value, edited = listen(hook, common.expand(-1, -1, n, -1).clone())
            return Copies(self.ln1.of_copies(value, normed), edited or common_edited)

        n_kv = self.n_heads if ungrouped else self.n_kv
        return AttentionInputs(
            shared,
            copies(self.hook_q_input, self.n_heads),
            copies(self.hook_k_input, n_kv),
            copies(self.hook_v_input, n_kv),
        )


class Blocks(nn.ModuleList):
    """The blocks of a decoder, in order; for a type checker, a list of `Block`."""

    if TYPE_CHECKING:

        def __getitem__(self, index: int) -> Block: ...  # pyright: ignore[reportIncompatibleMethodOverride]

        def __iter__(self) -> Iterator[Block]: ...
