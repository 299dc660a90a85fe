"""The MLP, gated or plain: neurons read the residual through `W_in` (and `W_gate`) and write `W_out`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from veena_lens.components.hooks import uncompiled
from veena_lens.config import TransformerConfig


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
}


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)), or down(act(up(x))) where it is not gated."""

    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__()
        self.act = ACTIVATION_FUNCTIONS[cfg.act_fn]
        self.gate = nn.Linear(cfg.d_model, cfg.d_mlp, bias=cfg.mlp_bias) if cfg.gated_mlp else None
        self.up = nn.Linear(cfg.d_model, cfg.d_mlp, bias=cfg.mlp_bias)
        self.down = nn.Linear(cfg.d_mlp, cfg.d_model, bias=cfg.mlp_bias)
        self.hook_pre = HookPoint()
        if cfg.gated_mlp:
            self.hook_pre_linear = HookPoint()
        self.hook_post = HookPoint()

    @uncompiled
    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        if self.gate is None:
            post = self.act(self.hook_pre(self.up(x)))
        else:
            post = self.act(self.hook_pre(self.gate(x))) * self.hook_pre_linear(self.up(x))
        return self.down(self.hook_post(post))

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        """Return the input weights (of the linear branch where gated); a view."""
        return self.up.weight.T

    @property
    def W_gate(self) -> Float[Tensor, "d_model d_mlp"]:
        """Return the weights of the gate; a view.

        Raises: AttributeError where the MLP is not gated."""
        if self.gate is None:
            raise AttributeError("W_gate: this MLP is not gated.")
        return self.gate.weight.T

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        """Return the output weights, one row per neuron; a view."""
        return self.down.weight.T

    @property
    def b_in(self) -> Float[Tensor, " d_mlp"]:
        return self.up.weight.new_zeros(self.up.out_features) if self.up.bias is None else self.up.bias

    @property
    def b_out(self) -> Float[Tensor, " d_model"]:
        """Return the output bias; zeros where the model has none."""
        return self.down.weight.new_zeros(self.down.out_features) if self.down.bias is None else self.down.bias
