"""The output of a tower, and the connectors that map it to the decoder's width."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from veena_lens.components.hooks import uncompiled
from veena_lens.components.mlp import ACTIVATION_FUNCTIONS
from veena_lens.components.norms import RMSNorm
from veena_lens.config import ConnectorConfig


@dataclass(frozen=True, eq=False)
class TowerOutput:
    """Features of the crops, and the outputs of the inner layers that the decoder reads in addition."""

    features: Float[Tensor, "crop pos d_features"]
    inner: tuple[Float[Tensor, "crop patch d_model"], ...] = ()


class Connector(nn.Module):
    """Map features to the decoder's width by two linear maps with an activation in between."""

    def __init__(self, cfg: ConnectorConfig) -> None:
        super().__init__()
        self.act = ACTIVATION_FUNCTIONS[cfg.act_fn]
        self.proj_in = nn.Linear(cfg.d_in, cfg.d_hidden, bias=cfg.bias)
        self.proj_out = nn.Linear(cfg.d_hidden, cfg.d_out, bias=cfg.bias)
        self.hook_in, self.hook_pre, self.hook_post, self.hook_out = (HookPoint() for _ in range(4))

    @uncompiled
    def forward(self, features: Float[Tensor, "crop pos d_in"]) -> Float[Tensor, "crop pos d_model"]:
        pre = self.hook_pre(self.proj_in(self.hook_in(features)))
        return self.hook_out(self.proj_out(self.hook_post(self.act(pre))))


class LinearConnector(nn.Module):
    """Map features to the decoder's width by one linear map."""

    def __init__(self, cfg: ConnectorConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(cfg.d_in, cfg.d_out, bias=cfg.bias)
        self.hook_in, self.hook_out = HookPoint(), HookPoint()

    @uncompiled
    def forward(self, features: Float[Tensor, "crop pos d_in"]) -> Float[Tensor, "crop pos d_model"]:
        return self.hook_out(self.proj(self.hook_in(features)))


class NormedConnector(nn.Module):
    """Map features to the decoder's width by norm(x) @ weight; the weight is stored as [d_in d_out]."""

    def __init__(self, cfg: ConnectorConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(cfg.d_in, cfg.norm_eps, cfg.casts, adds_one=True)
        self.weight = nn.Parameter(torch.empty(cfg.d_in, cfg.d_out).normal_(std=0.02))
        self.hook_in, self.hook_out = HookPoint(), HookPoint()

    @uncompiled
    def forward(self, features: Float[Tensor, "crop pos d_in"]) -> Float[Tensor, "crop pos d_model"]:
        return self.hook_out(self.norm(self.hook_in(features)) @ self.weight)


CONNECTORS: dict[str, Callable[[ConnectorConfig], nn.Module]] = {
    "mlp": Connector,
    "linear": LinearConnector,
    "normed": NormedConnector,
}


def make_connector(cfg: ConnectorConfig) -> nn.Module:
    """Return the connector that a configuration asks for, with random weights."""
    return CONNECTORS[cfg.kind](cfg)
