"""The towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: crops of any size, rotary positions over rows and columns.

Crops (an image, or a pair of frames of a video) are padded to the longest of the batch, and patches attend to those of
their own crop. Windows (Qwen2.5-VL) are a mask within a block: patches keep the order in which the processor gives
them, so that a pattern reads the same in every block. After the blocks, squares of patches are joined: each is what
one token of the text reads.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformer_lens.hook_points import HookPoint

from veena_lens.components.block import Block
from veena_lens.components.context import Context
from veena_lens.components.hooks import drop_hooks, uncompiled
from veena_lens.components.mlp import ACTIVATION_FUNCTIONS
from veena_lens.components.norms import LayerNorm, make_norm
from veena_lens.components.rotary import RotaryTables
from veena_lens.config import ConnectorConfig, VisionConfig
from veena_lens.images.base import Size
from veena_lens.images.dynamic import to_merge_order
from veena_lens.vision.connector import TowerOutput


def joined_squares(x: Float[Tensor, "crop pos d_model"], merge: int) -> Float[Tensor, "crop token d_joined"]:
    """Return the patches of each square side by side, as one vector."""
    return rearrange(x, "n (p k) d -> n p (k d)", k=merge**2)


def _sizes(grids: Int[Tensor, "crop 2"] | None) -> list[tuple[int, int]]:
    assert grids is not None
    return [(int(h), int(w)) for h, w in grids.tolist()]


class FlatPatchEmbed(nn.Module):
    """Map patches that come as flat vectors (channel, frame, row, column of pixels) to the tower's width."""

    def __init__(self, cfg: VisionConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(cfg.d_model, cfg.patch_width).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(cfg.d_model)) if cfg.patch_bias else None

    def forward(self, patches: Float[Tensor, "crop pos d_patch"]) -> Float[Tensor, "crop pos d_model"]:
        return F.linear(patches, self.weight, self.bias)


class QwenTower(nn.Module):
    """Map patches [crop pos d_patch], padded, with the grid of each crop, to features of joined squares."""

    def __init__(self, cfg: VisionConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.patch_embed = FlatPatchEmbed(cfg)
        self.hook_embed = HookPoint()
        if cfg.position_grid:
            self.pos_embed = nn.Embedding(cfg.position_grid**2, cfg.d_model)
            self.hook_pos_embed = HookPoint()
        self.blocks = nn.ModuleList(Block(cfg, layer, has_rotary=True) for layer in range(cfg.n_layers))
        self.ln_post = make_norm(cfg)

    @uncompiled
    def forward(self, patches: Float[Tensor, "crop pos d_patch"], grids: Int[Tensor, "crop 2"] | None) -> TowerOutput:
        resid, kept = self.embed(patches, grids), {}
        context = self.context(grids, resid.shape[1], resid.device)
        for layer in range(self.cfg.n_layers):
            resid = self.step(layer, resid, context, kept)
        return self.leave(resid, kept)

    def embed(
        self, patches: Float[Tensor, "crop pos d_patch"], grids: Int[Tensor, "crop 2"] | None
    ) -> Float[Tensor, "crop pos d_model"]:
        """Return the residual stream that enters block 0."""
        resid = self.hook_embed(self.patch_embed(patches.to(self.patch_embed.weight.dtype)))
        if not self.cfg.position_grid:
            return resid
        positions = self.position_embeddings(_sizes(grids))
        missing = resid.shape[1] - positions.shape[1]  # crops may be padded beyond the longest of them
        return resid + self.hook_pos_embed(F.pad(positions, (0, 0, 0, missing)) if missing else positions)

    def context(self, grids: Int[Tensor, "crop 2"] | None, length: int, device: torch.device) -> Context:
        """Return what the blocks share: which patches exist, and where each lies in its crop."""
        sizes = _sizes(grids)
        places = pad_sequence([patch_places(size, self.cfg.merge_size) for size in sizes], batch_first=True)
        places = F.pad(places, (0, 0, 0, length - places.shape[1]))
        exact = self.cfg.casts == "none" and self.patch_embed.weight.dtype == torch.float64
        assert self.cfg.rope_theta is not None
        tables = axial_tables(
            places.to(device), self.cfg.rope_theta, self.cfg.d_head, torch.float64 if exact else torch.float32
        )
        mask = self.mask(sizes, length).to(device)
        windows = None
        if self.cfg.window_side:
            side, widths = self.cfg.window_side * self.cfg.merge_size, torch.tensor([w for _, w in sizes])
            windows = window_numbers(places, widths, side).to(device)
        return Context(
            key_mask=mask,
            n_new=length,
            is_causal=False,
            rotary=lambda layer: tables,
            areas=windows,
            within_areas=self.cfg.is_windowed,
        )

    def step(
        self, layer: int, resid: Float[Tensor, "crop pos d_model"], context: Context, kept: dict[int, Tensor]
    ) -> Float[Tensor, "crop pos d_model"]:
        """Return the residual after one block, and keep it in `kept` if the decoder reads it too."""
        resid = self.blocks[layer](resid, context)
        if layer in self.cfg.deepstack_layers:
            kept[layer] = resid.clone()  # a hook of the next block may write into its input
        return resid

    def leave(self, resid: Float[Tensor, "crop pos d_model"], kept: Mapping[int, Tensor]) -> TowerOutput:
        """Return the features of joined squares, and the outputs of the inner layers."""
        features = joined_squares(self.ln_post(resid), self.cfg.merge_size)
        return TowerOutput(features, tuple(kept[layer] for layer in self.cfg.deepstack_layers))

    def kept_names(self) -> dict[int, str]:
        """Return the name of the hook point of each value of `kept`."""
        return {i: f"vision.blocks.{i}.hook_resid_post" for i in self.cfg.deepstack_layers}

    def position_embeddings(self, sizes: list[tuple[int, int]]) -> Float[Tensor, "crop pos d_model"]:
        """Return the learned table resampled to each crop, padded."""
        table = self.pos_embed.weight
        made = {size: resampled(table, size, self.cfg.merge_size).to(table.dtype) for size in set(sizes)}
        return pad_sequence([made[size] for size in sizes], batch_first=True)

    @staticmethod
    def mask(sizes: list[tuple[int, int]], length: int) -> Bool[Tensor, "crop pos"]:
        """Return True at the patches that a crop has."""
        n = torch.tensor([h * w for h, w in sizes])
        return torch.arange(length) < n[:, None]


class DeepstackMerger(nn.Module):
    """Join the squares of an inner layer's output and map them to the decoder's width.

    The model calls `hook_out` on the features of all crops, in the order of their tokens.
    """

    def __init__(self, vision: VisionConfig, cfg: ConnectorConfig, is_live: bool) -> None:
        super().__init__()
        self.merge = vision.merge_size
        self.norm = LayerNorm(cfg.d_in, vision.norm_eps)
        self.proj_in = nn.Linear(cfg.d_in, cfg.d_hidden, bias=cfg.bias)
        self.act = ACTIVATION_FUNCTIONS[cfg.act_fn]
        self.proj_out = nn.Linear(cfg.d_hidden, cfg.d_out, bias=cfg.bias)
        drop_hooks(self)
        if is_live:  # else its features reach nothing; the weights are kept for export
            self.hook_out = HookPoint()

    @uncompiled
    def forward(self, inner: Float[Tensor, "crop pos d_inner"]) -> Float[Tensor, "crop token d_model"]:
        joined = joined_squares(inner, self.merge)
        normed = F.layer_norm(joined, joined.shape[-1:], self.norm.weight, self.norm.bias, self.norm.eps)
        return self.proj_out(self.act(self.proj_in(normed)))


# --- where patches lie -------------------------------------------------------------------------------------
def patch_places(grid: Size, merge: int) -> Int[Tensor, "patch 2"]:
    """Return (row, column) of every patch, in the order of the patches."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    return torch.stack([to_merge_order(rows, merge), to_merge_order(columns, merge)], -1)


def window_numbers(
    places: Int[Tensor, "crop patch 2"], widths: Int[Tensor, " crop"], side: int
) -> Int[Tensor, "crop patch"]:
    """Return the window of every patch, counted row by row from the top left.

    Args:
        places: (row, column) of every patch.
        widths: the width of each crop in patches.
        side: patches per side of a window; windows at the right and the bottom may have fewer.
    """
    rows, columns = (places // side).unbind(-1)
    return rows * ((widths + side - 1) // side)[:, None] + columns


def axial_tables(
    places: Int[Tensor, "crop patch 2"], theta: float, d_head: int, dtype: torch.dtype = torch.float32
) -> RotaryTables:
    """Return (cos, sin) of rotary positions over rows and columns: half of the planes turn with each."""
    exponents = torch.arange(0, d_head // 2, 2, dtype=torch.float32) / (d_head // 2)
    frequencies = (1.0 / theta**exponents).to(places.device)
    angles = rearrange(places[..., None].to(dtype) * frequencies, "n p xy f -> n p (xy f)")
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def resampled(table: Float[Tensor, "side_squared d_model"], grid: Size, merge: int) -> Float[Tensor, "patch d_model"]:
    """Return a square table of position embeddings resampled to a grid, corner on corner, bilinearly.

    The weights are float32 whatever the table's dtype, as in Hugging Face.
    """
    side = int(table.shape[0] ** 0.5)

    def axis(n: int) -> tuple[Tensor, Tensor]:
        where = torch.arange(n, dtype=torch.float32, device=table.device) * (side - 1) / max(n - 1, 1)
        low = where.floor()
        offsets = torch.arange(2, device=table.device)
        weights = (1 - (where[:, None] - low[:, None] - offsets).abs()).clamp(min=0)
        return (low.long()[:, None] + offsets).clamp(0, side - 1), weights

    (rows, row_weights), (columns, column_weights) = axis(grid[0]), axis(grid[1])
    index = (rows[:, None, :, None] * side + columns[None, :, None, :]).flatten(2)
    weights = (row_weights[:, None, :, None] * column_weights[None, :, None, :]).flatten(2)
    order = to_merge_order(torch.arange(grid[0] * grid[1]).view(*grid), merge).to(table.device)
    index, weights = (x.flatten(0, 1)[order] for x in (index, weights))
    return (table[index] * weights[..., None]).sum(1)
