"""Attention with grouped keys and values (Ainslie et al. 2023, arXiv 2305.13245), every step behind a hook.

Scores, pattern and head results exist only where a hook listens; otherwise the fused kernel runs. A listener
that only reads leaves the fused numbers in place; an edit goes on through the explicit formula.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens import FactoredMatrix
from transformer_lens.hook_points import HookPoint

from veena_lens.components.context import Context
from veena_lens.components.hooks import carry, heard, listen, uncompiled
from veena_lens.components.kv_cache import SharedPrefix
from veena_lens.components.masks import AreaMask, Mask, add_bias, attend_in_areas, join_biases, masked_softmax
from veena_lens.components.norms import RMSNorm
from veena_lens.components.rotary import rotate
from veena_lens.config import TransformerConfig


@dataclass(frozen=True, eq=False)
class Copies:
    """The normed residual, one copy per head, and whether a hook edited it."""

    value: Float[Tensor, "batch pos heads d_model"]
    edited: bool


@dataclass(frozen=True, eq=False)
class AttentionInputs:
    """What attention reads: one normed residual for all heads, and one copy per head where hooks listen to them."""

    shared: Float[Tensor, "batch pos d_model"]
    q: Copies | None = None
    k: Copies | None = None
    v: Copies | None = None


class Attention(nn.Module):
    """One layer's attention. Weights keep Hugging Face's `[out, in]`; `W_Q` and its kin are views of them."""

    def __init__(self, cfg: TransformerConfig, layer: int, has_rotary: bool) -> None:
        super().__init__()
        self.layer, self.d_head = layer, cfg.d_head
        self.n_heads, self.n_kv = cfg.n_heads, cfg.n_key_value_heads
        self.scale = cfg.score_scale
        self.q = nn.Linear(cfg.d_model, cfg.n_heads * cfg.d_head, bias=cfg.qkv_bias)
        self.k = nn.Linear(cfg.d_model, self.n_kv * cfg.d_head, bias=cfg.qkv_bias)
        self.v = nn.Linear(cfg.d_model, self.n_kv * cfg.d_head, bias=cfg.qkv_bias)
        self.o = nn.Linear(cfg.n_heads * cfg.d_head, cfg.d_model, bias=cfg.attn_out_bias)
        if cfg.qk_norm:
            self.q_norm = RMSNorm(cfg.d_head, cfg.norm_eps, cfg.casts, cfg.norm_weight_plus_one)
            self.k_norm = RMSNorm(cfg.d_head, cfg.norm_eps, cfg.casts, cfg.norm_weight_plus_one)
        self.has_qk_norm, self.has_rotary = cfg.qk_norm, has_rotary
        self.hook_q, self.hook_k, self.hook_v = HookPoint(), HookPoint(), HookPoint()
        if has_rotary:
            self.hook_rot_q, self.hook_rot_k = HookPoint(), HookPoint()
        self.hook_attn_scores, self.hook_pattern = HookPoint(), HookPoint()
        self.hook_z, self.hook_result = HookPoint(), HookPoint()

    @uncompiled
    def forward(self, inputs: Any = None, context: Any = None, *other: Any, **named: Any) -> Tensor:
        """Return [batch pos d_model], what attention adds; a block calls it with `AttentionInputs` and a `Context`."""
        if other or named or not isinstance(inputs, AttentionInputs):
            raise TypeError(
                "Attention reads masks and positions of its block: model.blocks[l](resid) runs one alone, and "
                "hooks at hook_q_input, hook_k_input and hook_v_input give its queries, keys and values other inputs."
            )
        q = self.hook_q(self._project(self.q, inputs.shared, inputs.q))
        repeats = self.n_heads // self.n_kv if context.ungrouped else 1
        k = self.hook_k(self._project(self.k, inputs.shared, inputs.k, repeats))
        v = self.hook_v(self._project(self.v, inputs.shared, inputs.v, repeats))
        if self.has_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        tables = context.tables(self.layer, q.device)
        if self.has_rotary and tables is not None:
            q, k = self.hook_rot_q(rotate(q, tables)), self.hook_rot_k(rotate(k, tables))
        if context.kv_cache is not None:
            k, v = context.kv_cache.append(self.layer, k, v)
        z = self.hook_z(self._attend(q, k, v, context))
        out = self.o(rearrange(z, "b p h d -> b p (h d)"))
        if not heard(self.hook_result):
            return out
        results, edited = listen(self.hook_result, torch.einsum("bphd,hdm->bphm", z, self.W_O))
        summed = results.sum(2) if self.o.bias is None else results.sum(2) + self.o.bias
        return summed if edited else carry(out, summed)

    def _project(
        self, linear: nn.Linear, shared: Tensor, copies: Copies | None, repeats: int = 1
    ) -> Float[Tensor, "batch pos heads d_head"]:
        """Map linearly to heads, from the shared input or from one copy per head; each head `repeats` times."""
        out = rearrange(linear(shared), "b p (h d) -> b p h d", d=self.d_head)
        out = out if repeats == 1 else out.repeat_interleave(repeats, 2)
        if copies is None or not (copies.edited or (torch.is_grad_enabled() and copies.value.requires_grad)):
            return out
        weight = rearrange(linear.weight, "(h d) m -> h m d", d=self.d_head)
        weight = weight if repeats == 1 else weight.repeat_interleave(repeats, 0)
        split = torch.einsum("bphm,hmd->bphd", copies.value, weight)
        if linear.bias is not None:
            bias = rearrange(linear.bias, "(h d) -> h d", d=self.d_head)
            split = split + (bias if repeats == 1 else bias.repeat_interleave(repeats, 0))
        return split if copies.edited else carry(out, split)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Float[Tensor, "batch pos n_heads d_head"]:
        """Return softmax(scale q k^T) v; q, k, v come as [batch pos heads d_head]."""
        biases = [bias.to(q.device) for bias in context.biases(self.layer)]
        if context.prefix is not None:
            return self._attend_with_prefix(q, k, v, context.prefix, biases)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mask = context.mask(self.layer, q.device)
        bias = join_biases(biases, mask.explicit(q.shape[2], k.shape[2], q.device)) if biases else None
        if not heard(self.hook_attn_scores, self.hook_pattern):
            if context.rows is not None:
                context.rows.read(self.layer, q, k, mask, bias, None)
            return self._fused(q, k, v, mask, bias).transpose(1, 2)
        groups = q.shape[1] // k.shape[1]
        wide_k, wide_v = (x.repeat_interleave(groups, 1) for x in (k, v))
        allowed = mask.explicit(q.shape[2], k.shape[2], q.device)
        scores = q @ wide_k.mT * self.scale
        if allowed is not None:
            scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
        scores, scores_edited = self._edited_scores(scores, biases)
        pattern = masked_softmax(scores, allowed)
        if scores_edited:  # a row set to minus infinity everywhere attends to nothing
            pattern = pattern.nan_to_num(0.0)
        pattern, edited = listen(self.hook_pattern, pattern)
        if context.rows is not None:
            context.rows.read(self.layer, q, k, mask, bias, pattern)
        if scores_edited or edited:
            return (pattern @ wide_v).transpose(1, 2)
        if torch.is_grad_enabled() and pattern.requires_grad:
            with torch.no_grad():
                fused = self._fused(q, k, v, mask, bias)
            return carry(fused, pattern @ wide_v).transpose(1, 2)
        return self._fused(q, k, v, mask, bias).transpose(1, 2)

    def _edited_scores(self, scores: Tensor, biases: list[Tensor]) -> tuple[Tensor, bool]:
        """Return the scores after every edit, and whether one is more than a bias, which the fused kernel takes.

        Where hooks listen to the scores, biases are hooks among them, in the order in which all were put in force."""
        if not heard(self.hook_attn_scores):
            return reduce(add_bias, biases, scores), False
        expected = reduce(add_bias, biases, scores) if biases else None
        out, edited = listen(self.hook_attn_scores, scores)
        return out, edited if expected is None else not torch.equal(out, expected)

    def _attend_with_prefix(
        self, q: Tensor, k: Tensor, v: Tensor, prefix: SharedPrefix, biases: list[Tensor]
    ) -> Float[Tensor, "batch pos n_heads d_head"]:
        """Attend from rows that share a prefix: its keys are read once for all, each row's tail joins the softmax."""
        scores, _ = self._edited_scores(prefix.scores(self.layer, q, k, self.scale), biases)
        pattern, _ = listen(self.hook_pattern, masked_softmax(scores, None))
        return prefix.values(self.layer, pattern, v)

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, bias: Tensor | None) -> Tensor:
        """Call the fused kernel; a bias holds the mask in it."""
        if isinstance(mask, AreaMask) and bias is None:
            return attend_in_areas(q, k, v, mask, self.scale)
        attn_mask, is_causal = mask.allowed, mask.is_causal
        if bias is not None:
            attn_mask, is_causal = bias.to(q.dtype), False
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=self.scale, enable_gqa=q.shape[1] != k.shape[1]
        )

    # --- weights in HookedTransformer's shapes ---------------------------------------------------------
    def _heads(self, linear: nn.Linear) -> Float[Tensor, "heads d_model d_head"]:
        return linear.weight.view(-1, self.d_head, linear.in_features).transpose(1, 2)

    def _expand(self, x: Tensor) -> Tensor:
        """Return key/value heads repeated to query heads (a copy), or the view itself where they are as many."""
        return x if self.n_heads == self.n_kv else repeat(x, "g ... -> (g r) ...", r=self.n_heads // self.n_kv)

    def _head_bias(self, linear: nn.Linear) -> Float[Tensor, "heads d_head"]:
        if linear.bias is None:
            return linear.weight.new_zeros(linear.out_features // self.d_head, self.d_head)
        return linear.bias.view(-1, self.d_head)

    @property
    def W_Q(self) -> Float[Tensor, "n_heads d_model d_head"]:
        """Return the query weights; a view: writing to it edits the model."""
        return self._heads(self.q)

    @property
    def W_K(self) -> Float[Tensor, "n_heads d_model d_head"]:
        """Return the key weights; a view, but a copy repeated to n_heads under grouped queries (edit `_W_K` then)."""
        return self._expand(self._heads(self.k))

    @property
    def W_V(self) -> Float[Tensor, "n_heads d_model d_head"]:
        """Return the value weights; as `W_K`."""
        return self._expand(self._heads(self.v))

    @property
    def _W_K(self) -> Float[Tensor, "n_key_value_heads d_model d_head"]:
        return self._heads(self.k)

    @property
    def _W_V(self) -> Float[Tensor, "n_key_value_heads d_model d_head"]:
        return self._heads(self.v)

    @property
    def W_O(self) -> Float[Tensor, "n_heads d_head d_model"]:
        """Return the output weights; a view."""
        return self.o.weight.view(-1, self.n_heads, self.d_head).permute(1, 2, 0)

    @property
    def b_Q(self) -> Float[Tensor, "n_heads d_head"]:
        return self._head_bias(self.q)

    @property
    def b_K(self) -> Float[Tensor, "n_heads d_head"]:
        return self._expand(self._head_bias(self.k))

    @property
    def b_V(self) -> Float[Tensor, "n_heads d_head"]:
        return self._expand(self._head_bias(self.v))

    @property
    def b_O(self) -> Float[Tensor, " d_model"]:
        """Return the output bias; zeros where the model has none."""
        return self.o.weight.new_zeros(self.o.out_features) if self.o.bias is None else self.o.bias

    @property
    def OV(self) -> Any:
        """Return the FactoredMatrix W_V W_O, one per head: what a head moves from source to destination."""
        return FactoredMatrix(self.W_V, self.W_O)

    @property
    def QK(self) -> Any:
        """Return the FactoredMatrix W_Q W_K^T, one per head: what a head matches."""
        return FactoredMatrix(self.W_Q, self.W_K.transpose(-2, -1))
