"""Idefics3 and SmolVLM a second time, written plainly in float64; blocks are those of `tests/reference.py`.

Tiles are found by the markers of `tests/tile_cases.py`, one token each; of every image the tower sees the whole view
first. `no_padding` images fill their square.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.reference import ACTIVATIONS, Edits, Reference
from tests.tile_cases import FIRST_TILE, WHOLE

TOWER = "model.vision_tower"
TODAY = {"model.text_model.": "model.language_model.", "model.vision_model.": f"{TOWER}."}


def renamed(key: str) -> str:
    """The names that the plain model of LLaVA has for the same parts."""
    for theirs, ours in TODAY.items():
        key = key.replace(theirs, ours)
    return key.replace("model.connector.modality_projection.", "model.multi_modal_projector.")


class TileReference(Reference):
    """One forward pass of either model."""

    def __init__(
        self, config: Any, state: Mapping[str, Tensor], edits: Edits | None = None, tracked: bool = False
    ) -> None:
        super().__init__(config, {renamed(key): value for key, value in state.items()}, edits, tracked)
        self.side = self.vision.image_size // self.vision.patch_size
        self.merge = config.scale_factor
        self.order: list[int] = []  # of the tower's images, the places among those in reading order
        self.real: Tensor | None = None

    def read_tiles(self, input_ids: Tensor, attention_mask: Tensor) -> list[int]:
        """Places of the tiles in reading order, the whole view of each image before its tiles."""
        size = (self.side // self.merge) ** 2
        order: list[int] = []
        waiting: list[int] = []
        n = 0
        for row, keep in zip(input_ids, attention_mask.bool(), strict=True):
            tokens, left = row[keep].tolist(), 0
            for before, token in zip([None, *tokens], tokens, strict=False):
                if token != self.root.image_token_id:
                    continue
                if not left:
                    if before is not None and FIRST_TILE <= before < FIRST_TILE + 16:
                        waiting.append(n)
                    else:
                        assert before == WHOLE or not waiting
                        order += [n, *waiting]
                        waiting = []
                    n, left = n + 1, size
                left -= 1
        return order

    def places(self, real: Tensor) -> Tensor:
        """Row of the table of positions for each patch of an image [height width]; row 0 for padding."""
        side = self.side
        edges = torch.arange(1 / side, 1.0, 1 / side)

        def buckets(n: int) -> list[int]:
            shares = [torch.tensor(float(i)) * (1.0 / torch.tensor(float(n))) for i in range(side)]
            return [int((edges <= share.clamp(max=1 - 1e-6)).sum()) for share in shares]

        rows, columns = buckets(int(real[:, 0].sum())), buckets(int(real[0].sum()))
        return torch.tensor([
            rows[y] * side + columns[x] if real[y, x] else 0 for y in range(side) for x in range(side)
        ])  # fmt: skip

    def features(self, pixels: Tensor) -> Tensor:
        c, s, m, p = self.vision, self.side, self.merge, self.vision.patch_size
        pixels, mask = pixels.flatten(0, 1), self.real
        exists = [bool((x != 0).any()) for x in pixels]
        mask = torch.ones(len(pixels), *pixels.shape[2:]) if mask is None else mask.flatten(0, 1)
        pixels, mask = pixels[exists][self.order], mask[exists][self.order]
        real = torch.stack([
            torch.stack([x[y * p : (y + 1) * p, z * p : (z + 1) * p].any() for y in range(s) for z in range(s)])
            for x in mask
        ])  # fmt: skip
        weight, bias = (self.state[f"{TOWER}.embeddings.patch_embedding.{part}"] for part in ("weight", "bias"))
        x = self.at("vision.hook_embed", F.conv2d(pixels, weight, bias, stride=p).flatten(2).transpose(1, 2))
        table = self.state[f"{TOWER}.embeddings.position_embedding.weight"]
        x = x + self.at("vision.hook_pos_embed", torch.stack([table[self.places(r.view(s, s))] for r in real]))
        heads = (c.num_attention_heads, c.num_attention_heads, c.hidden_size // c.num_attention_heads)
        for layer in range(c.num_hidden_layers):
            at = f"{TOWER}.encoder.layers.{layer}"
            keys = {letter: f"{at}.self_attn.{letter}_proj" for letter in "qkv"}
            keys |= dict(ln1=f"{at}.layer_norm1", ln2=f"{at}.layer_norm2", o=f"{at}.self_attn.out_proj")
            keys |= dict(up=f"{at}.mlp.fc1", down=f"{at}.mlp.fc2")
            allowed, act = real[:, None, None], ACTIVATIONS[c.hidden_act]
            x = self.block(f"vision.blocks.{layer}", keys, x, self.layer_norm, heads, allowed, None, act)
        x = self.layer_norm("vision.ln_post", f"{TOWER}.post_layernorm", x)
        squares = [
            torch.cat([x[:, (y + a) * s + z + b] for a in range(m) for b in range(m)], -1)
            for y in range(0, s, m)
            for z in range(0, s, m)
        ]
        x = self.at("connector.hook_in", torch.stack(squares, 1))
        x = self.at("connector.hook_out", self.linear("model.multi_modal_projector.proj", x))
        back = torch.argsort(torch.tensor(self.order))
        return self.at("hook_image_features", x[back].flatten(0, 1))

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
    ) -> Tensor:
        self.order, self.real = self.read_tiles(input_ids, attention_mask), pixel_attention_mask
        return super().forward(input_ids, attention_mask, None, pixel_values)


reference_logits, reference_values = TileReference.logits, TileReference.named_values
