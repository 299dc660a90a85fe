"""Weights in HookedTransformer's stacked shapes, and what transformer_lens's tools read of them.

A layer's matrices are views of the parameters (write through them); the stacks over layers are copies.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import FactoredMatrix
from transformer_lens.utilities import composition_scores

from veena_lens.components.block import Blocks, Embed, Unembed
from veena_lens.components.norms import Norm
from veena_lens.config import HookedVLMConfig


class StackedWeights:
    """View of a model's weights as HookedTransformer stacks them: W_Q [layer n_heads d_model d_head] and its kin."""

    blocks: Blocks
    cfg: HookedVLMConfig
    embed: Embed
    unembed: Unembed
    ln_final: Norm

    def _stack(self, part: str, name: str) -> Tensor:
        return torch.stack([getattr(getattr(block, part), name) for block in self.blocks])

    @property
    def W_Q(self) -> Float[Tensor, "layer n_heads d_model d_head"]:
        return self._stack("attn", "W_Q")

    @property
    def W_K(self) -> Float[Tensor, "layer n_heads d_model d_head"]:
        """Return the keys, expanded to query heads under grouped queries."""
        return self._stack("attn", "W_K")

    @property
    def W_V(self) -> Float[Tensor, "layer n_heads d_model d_head"]:
        """Return the values, expanded to query heads under grouped queries."""
        return self._stack("attn", "W_V")

    @property
    def W_O(self) -> Float[Tensor, "layer n_heads d_head d_model"]:
        return self._stack("attn", "W_O")

    @property
    def b_Q(self) -> Float[Tensor, "layer n_heads d_head"]:
        return self._stack("attn", "b_Q")

    @property
    def b_K(self) -> Float[Tensor, "layer n_heads d_head"]:
        return self._stack("attn", "b_K")

    @property
    def b_V(self) -> Float[Tensor, "layer n_heads d_head"]:
        return self._stack("attn", "b_V")

    @property
    def b_O(self) -> Float[Tensor, "layer d_model"]:
        return self._stack("attn", "b_O")

    @property
    def W_in(self) -> Float[Tensor, "layer d_model d_mlp"]:
        return self._stack("mlp", "W_in")

    @property
    def W_gate(self) -> Float[Tensor, "layer d_model d_mlp"] | None:
        """Return the weights of the gates, None where the MLP is not gated."""
        return self._stack("mlp", "W_gate") if self.cfg.gated_mlp else None

    @property
    def W_out(self) -> Float[Tensor, "layer d_mlp d_model"]:
        return self._stack("mlp", "W_out")

    @property
    def b_in(self) -> Float[Tensor, "layer d_mlp"]:
        return self._stack("mlp", "b_in")

    @property
    def b_out(self) -> Float[Tensor, "layer d_model"]:
        return self._stack("mlp", "b_out")

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        return self.embed.W_E

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        return self.unembed.W_U

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        return self.unembed.b_U

    @property
    def QK(self) -> Any:
        """Return the FactoredMatrix W_Q W_K^T over layers and heads."""
        return FactoredMatrix(self.W_Q, self.W_K.transpose(-2, -1))

    @property
    def OV(self) -> Any:
        """Return the FactoredMatrix W_V W_O over layers and heads."""
        return FactoredMatrix(self.W_V, self.W_O)

    def blocks_with(self, part: str) -> list[tuple[int, Any]]:
        """Return (layer, block) of every block that has a part such as "attn"."""
        return [(layer, block) for layer, block in enumerate(self.blocks) if hasattr(block, part)]

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """Return the sum of the output biases that blocks before `layer` added; with `mlp_input` its attention's too.

        Raises: ValueError for a layer that does not exist, or biases that a norm follows, which add another vector at
        each position."""
        n = self.cfg.n_layers
        if not 0 <= layer <= n - mlp_input:
            raise ValueError(
                f"accumulated_bias: layer={layer}{' with mlp_input=True' if mlp_input else ''} is outside 0 .. "
                f"{n - mlp_input} of a model of {n} layers."
            )
        if self.cfg.post_norms and (self.cfg.attn_out_bias or self.cfg.mlp_bias):
            raise ValueError(
                "accumulated_bias: norms follow attention and MLP in this model, so their biases add another vector at "
                "each position. Decompose by attn_out and mlp_out (`decompose_resid`)."
            )
        total = torch.zeros(self.cfg.d_model, dtype=self.cfg.dtype, device=self.cfg.device)
        blocks = list(self.blocks)
        for block in blocks[:layer]:
            total = total + block.attn.b_O
            if include_mlp_biases:
                total = total + block.mlp.b_out
        return total + blocks[layer].attn.b_O if mlp_input else total

    def all_composition_scores(self, mode: str) -> Float[Tensor, "layer head layer head"]:
        """Return the composition of earlier heads' output with later heads' Q, K or V (Elhage et al. 2021).

        Raises: ValueError for a mode other than "Q", "K", "V"."""
        if mode not in ("Q", "K", "V"):
            raise ValueError(f"Composition mode {mode!r} must be 'Q', 'K' or 'V'.")
        right = {"Q": self.QK, "K": self.QK.T, "V": self.OV}[mode]
        scores = composition_scores(self.OV, right, broadcast_dims=True)
        layers = torch.arange(self.cfg.n_layers, device=self.cfg.device)
        later = layers[:, None, None, None] < layers[None, None, :, None]
        return torch.where(later, scores, torch.zeros_like(scores))

    def all_head_labels(self) -> list[str]:
        """Return ["L0H0", "L0H1", ...]."""
        return [f"L{layer}H{head}" for layer in range(self.cfg.n_layers) for head in range(self.cfg.n_heads)]

    def tl_parameters(self) -> dict[str, Tensor]:
        """Return every text parameter under HookedTransformer's name and in its shape."""
        out: dict[str, Tensor] = {"embed.W_E": self.W_E}
        for layer, block in enumerate(self.blocks):
            for part, names in (
                ("attn", ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O")),
                ("mlp", ("W_in", "W_out", "b_in", "b_out", *(("W_gate",) if self.cfg.gated_mlp else ()))),
                ("ln1", ("w",)),
                ("ln2", ("w",)),
                *((part, ("w",)) for part in ("ln1_post", "ln2_post") if self.cfg.post_norms),
            ):
                for name in names:
                    out[f"blocks.{layer}.{part}.{name}"] = getattr(getattr(block, part), name)
        return out | {"ln_final.w": self.ln_final.w, "unembed.W_U": self.W_U, "unembed.b_U": self.b_U}
