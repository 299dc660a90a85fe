"""CLIP and SigLIP towers: patches, positions, blocks; features are residual streams of chosen depth.

SigLIP differs from CLIP by a bias on the patches, no class token and no norm before the blocks. Some models norm the
features after the blocks, take crops that fill only a part of the square, or join squares of patches into one feature.
Weights that never reach the features (later blocks, a last norm that is not applied, SigLIP's pooling head) are kept,
without hooks, so that a model can be exported whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from veena_lens.components.block import Block
from veena_lens.components.context import Context
from veena_lens.components.hooks import drop_hooks, uncompiled
from veena_lens.components.norms import LayerNorm
from veena_lens.config import VisionConfig
from veena_lens.vision.connector import TowerOutput

ALMOST_ONE = 1.0 - 1e-6  # the last share that still falls into the last bucket


def fraction_positions(real: Bool[Tensor, "crop height width"], side: int) -> Int[Tensor, "crop patch"]:
    """Return the row of the table of side * side positions for every patch; patches of padding get row 0 (Idefics3).

    The table is read at floor(side * share), the share of the crop's height and width at which a patch lies: a crop
    that fills only a part of its square still spreads over the whole table. The rounding of the shares to float32,
    which sometimes puts a patch into the bucket before its own, is the checkpoints' own.

    Args:
        real: True at the patches that a crop has; its first column and row give its height and width.
        side: patches per side of the square.
    """
    edges = torch.arange(1 / side, 1.0, 1 / side, device=real.device)

    def buckets(n_real: Int[Tensor, " crop"], length: int) -> Int[Tensor, "crop length"]:
        at = torch.arange(length, dtype=torch.float32, device=real.device)
        shares = (at[None] * (1.0 / n_real)[:, None]).clamp(max=ALMOST_ONE)
        return torch.bucketize(shares, edges, right=True)

    rows = buckets(real[:, :, 0].sum(1), real.shape[1])
    columns = buckets(real[:, 0, :].sum(1), real.shape[2])
    places = rows[:, :, None] * side + columns[:, None, :]
    return torch.where(real, places, torch.zeros_like(places)).flatten(1)


class PatchEmbed(nn.Module):
    """Map non-overlapping patches to vectors, row by row."""

    def __init__(self, cfg: VisionConfig) -> None:
        super().__init__()
        self.patch_size = cfg.patch_size
        size = (cfg.d_model, cfg.n_channels, cfg.patch_size, cfg.patch_size)
        self.weight = nn.Parameter(torch.empty(size).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(cfg.d_model)) if cfg.kind == "siglip" else None

    def forward(self, pixels: Float[Tensor, "crop channel height width"]) -> Float[Tensor, "crop pos d_model"]:
        x = F.conv2d(pixels, self.weight, self.bias, stride=self.patch_size)
        return rearrange(x, "n c h w -> n (h w) c")


class PoolingHead(nn.Module):
    """Hold the parameters of SigLIP's attention pooling under Hugging Face's own names; it never runs."""

    def __init__(self, cfg: VisionConfig) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.zeros(1, 1, cfg.d_model))
        self.attention = nn.MultiheadAttention(cfg.d_model, cfg.n_heads, batch_first=True)
        self.layernorm = nn.LayerNorm(cfg.d_model, eps=cfg.norm_eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(cfg.d_model, cfg.d_mlp), "fc2": nn.Linear(cfg.d_mlp, cfg.d_model)})


class Unused(nn.Module):
    """Hold what a checkpoint's tower has past the features."""

    def __init__(self, cfg: VisionConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(cfg, cfg.n_layers + i, has_rotary=False) for i in range(cfg.n_unused_layers))
        if not cfg.has_last_norm:
            self.ln_post = LayerNorm(cfg.d_model, cfg.norm_eps)
        if cfg.has_pooling_head:
            self.head = PoolingHead(cfg)
        drop_hooks(self)


class ClipTower(nn.Module):
    """Map crops to features [crop pos d_features]; several feature layers are joined along the width."""

    def __init__(self, cfg: VisionConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.patch_embed = PatchEmbed(cfg)
        if cfg.has_class_token:
            self.class_embedding = nn.Parameter(torch.zeros(cfg.d_model))
        self.pos_embed = nn.Embedding(cfg.n_positions, cfg.d_model)
        self.hook_embed, self.hook_pos_embed = HookPoint(), HookPoint()
        self.ln_pre = LayerNorm(cfg.d_model, cfg.norm_eps) if cfg.kind == "clip" else None
        self.blocks = nn.ModuleList(Block(cfg, layer, has_rotary=False) for layer in range(cfg.n_layers))
        self.ln_post = LayerNorm(cfg.d_model, cfg.norm_eps) if cfg.has_last_norm else None
        self.unused = Unused(cfg)

    @uncompiled
    def forward(
        self,
        pixels: Float[Tensor, "crop channel height width"],
        real: Bool[Tensor, "crop pos"] | None = None,
    ) -> TowerOutput:
        """Return the features of crops; `real` is False at the patches that a smaller crop does not have."""
        resid, kept = self.embed(pixels, real), {}
        context = self.context(real, resid.shape[1], resid.device)
        for layer in range(self.cfg.n_layers):
            resid = self.step(layer, resid, context, kept)
        return self.leave(resid, kept)

    def context(self, real: Bool[Tensor, "crop pos"] | None, length: int, device: torch.device) -> Context:
        """Return what the blocks share: every patch of a crop attends to every other."""
        return Context(key_mask=None if real is None else real.to(device), n_new=length, is_causal=False)

    def step(
        self, layer: int, resid: Float[Tensor, "crop pos d_model"], context: Context, kept: dict[int, Tensor]
    ) -> Float[Tensor, "crop pos d_model"]:
        """Return the residual after one block, and keep what enters it in `kept` if it is a feature."""
        block: Any = self.blocks[layer]
        resid = block.hook_resid_pre(resid)
        if layer in self.cfg.feature_layers:
            kept[layer] = resid
        return block.rest(resid, context)

    def leave(self, resid: Float[Tensor, "crop pos d_model"], kept: Mapping[int, Tensor]) -> TowerOutput:
        """Return the features: streams of the chosen depths side by side, patches of a square joined or averaged."""
        streams = {**kept, self.cfg.n_layers: resid}
        chosen = torch.cat([streams[i] for i in self.cfg.feature_layers], -1)
        if self.ln_post is not None:
            chosen = self.ln_post(chosen)
        height, side = self.cfg.token_grid[0], self.cfg.merge_size
        if self.cfg.averages_patches:
            squares = rearrange(chosen, "n (h w) d -> n d h w", h=self.cfg.grid[0]).contiguous()
            chosen = F.avg_pool2d(squares, side).flatten(2).transpose(1, 2)
        elif side > 1:
            chosen = rearrange(chosen, "n (h a w b) d -> n (h w) (a b d)", h=height, a=side, b=side)
        return TowerOutput(chosen[:, 1:] if self.cfg.drop_class_token else chosen)

    def kept_names(self) -> dict[int, str]:
        """Return the name of the hook point of each value of `kept`."""
        return {i: f"vision.blocks.{i}.hook_resid_pre" for i in self.cfg.feature_layers if i < self.cfg.n_layers}

    def embed(
        self,
        pixels: Float[Tensor, "crop channel height width"],
        real: Bool[Tensor, "crop pos"] | None = None,
    ) -> Float[Tensor, "crop pos d_model"]:
        """Return the residual stream that enters block 0."""
        x = self.patch_embed(pixels.to(self.patch_embed.weight.dtype))
        if self.cfg.has_class_token:
            x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)
        x = self.hook_embed(x)
        positions = self.pos_embed.weight
        if self.cfg.positions_by_fraction:
            positions = self.pos_embed(self._fractions(real, x.device))
        if self.hook_pos_embed._forward_hooks or self.hook_pos_embed._backward_hooks:
            # One copy per crop: the weight itself must not be reached by an edit in place.
            positions = self.hook_pos_embed(positions.expand(len(x), -1, -1).clone())
        x = x + positions
        return x if self.ln_pre is None else self.ln_pre(x)

    def _fractions(self, real: Bool[Tensor, "crop pos"] | None, device: torch.device) -> Int[Tensor, "#crop pos"]:
        """Return places in the table of positions, one row for all crops where they are whole."""
        height, width = self.cfg.grid
        if real is None:
            real = torch.ones(1, height * width, dtype=torch.bool)
        return fraction_positions(real.to(device).unflatten(1, (height, width)), height)
