"""The image sides of the plain model (`tests/reference.py`) beyond LLaVA's: Gemma's, Idefics3's and Qwen's.

Qwen's images (an image, or one frame of a video) stand in reading order, each padded to the longest with a large number
that must reach nothing; patches come in the processor's order, squares of patches, one a token. Idefics3's tiles are
found by their markers, one token each; of every image the tower sees the whole view first.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.odd_inputs import FIRST_TILE, WHOLE
from tests.reference import ACTIVATIONS, DECODER, PROJECTOR, TOWER, Reference, turn

PAD_PATCH = 9.0
Grid = tuple[int, int]  # (height, width) in patches


class GemmaReference(Reference):
    """Gemma-3: norms on both sides, squares of patches averaged, an image's tokens that read each other."""

    norms = dict(
        ln1="input_layernorm",
        ln1_post="post_attention_layernorm",
        ln2="pre_feedforward_layernorm",
        ln2_post="post_feedforward_layernorm",
    )
    weight_offset = 1.0

    def embedded(self, ids: Tensor) -> Tensor:
        return super().embedded(ids) * float(torch.tensor(self.text.hidden_size**0.5))

    def features(self, pixels: Tensor) -> Tensor:
        x = self.at("vision.hook_embed", self.patches(pixels))
        side = int(x.shape[1] ** 0.5)
        positions = self.state[f"{TOWER}.embeddings.position_embedding.weight"].expand_as(x)
        x = x + self.at("vision.hook_pos_embed", positions)
        for layer in range(self.vision.num_hidden_layers):
            x = self.tower_block(layer, x)
        x = self.layer_norm("vision.ln_post", f"{TOWER}.post_layernorm", x).unflatten(1, (side, side))
        n = int(self.root.mm_tokens_per_image**0.5)
        m = side // n
        cells = [x[:, y * m : (y + 1) * m, z * m : (z + 1) * m].mean((1, 2)) for y in range(n) for z in range(n)]
        x = self.at("connector.hook_in", torch.stack(cells, 1))
        x = self.rms("connector.norm", f"{PROJECTOR}.mm_soft_emb_norm", x)
        x = self.at("connector.hook_out", x @ self.state[f"{PROJECTOR}.mm_input_projection_weight"])
        return self.at("hook_image_features", x.flatten(0, 1))

    def reads(self, raw: Mapping[str, Tensor]) -> Tensor:
        allowed, image = super().reads(raw).clone(), self.filled(raw)
        for row in range(len(image)) if "pixel_values" in raw else ():
            at, length = 0, image.shape[1]
            while at < length:  # every run of image tokens reads itself
                stop = at
                while stop < length and image[row, stop]:
                    stop += 1
                allowed[row, at:stop, at:stop] = True
                at = max(stop, at + 1)
        return allowed


TODAY = {"model.text_model.": f"{DECODER}.", "model.vision_model.": f"{TOWER}."}


def renamed(key: str) -> str:
    """The names that the plain model of LLaVA has for the same parts."""
    for theirs, ours in TODAY.items():
        key = key.replace(theirs, ours)
    return key.replace("model.connector.modality_projection.", f"{PROJECTOR}.")


class TileReference(Reference):
    """Idefics3 and SmolVLM; images without a mask of their pixels fill their square."""

    def __init__(self, config: Any, state: Mapping[str, Tensor], *args: Any, **kw: Any) -> None:
        super().__init__(config, {renamed(key): value for key, value in state.items()}, *args, **kw)
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
        x = self.at("vision.hook_embed", self.patches(pixels))
        table = self.state[f"{TOWER}.embeddings.position_embedding.weight"]
        x = x + self.at("vision.hook_pos_embed", torch.stack([table[self.places(r.view(s, s))] for r in real]))
        for layer in range(c.num_hidden_layers):
            x = self.tower_block(layer, x, real[:, None, None])
        x = self.layer_norm("vision.ln_post", f"{TOWER}.post_layernorm", x)
        squares = [
            torch.cat([x[:, (y + a) * s + z + b] for a in range(m) for b in range(m)], -1)
            for y in range(0, s, m)
            for z in range(0, s, m)
        ]
        x = self.at("connector.hook_in", torch.stack(squares, 1))
        x = self.at("connector.hook_out", self.linear(f"{PROJECTOR}.proj", x))
        back = torch.argsort(torch.tensor(self.order))
        return self.at("hook_image_features", x[back].flatten(0, 1))

    def see(self, raw: Mapping[str, Tensor]) -> tuple[Tensor | None, list[Tensor]]:
        self.order = self.read_tiles(raw["input_ids"], raw["attention_mask"])
        self.real = raw.get("pixel_attention_mask")
        return super().see(raw)


class QwenReference(Reference):
    """Qwen-VL; `merge` patches a side make one token."""

    def __init__(self, config: Any, state: Mapping[str, Tensor], *args: Any, **kw: Any) -> None:
        super().__init__(config, state, *args, **kw)
        self.merge = config.vision_config.spatial_merge_size
        self.is_third = config.model_type.startswith("qwen3")
        self.is_windowed = config.model_type.startswith("qwen2_5")
        for layer in range(config.vision_config.depth):
            at = f"model.visual.blocks.{layer}.attn"
            for part in ("weight", "bias"):
                for letter, value in zip("qkv", self.state[f"{at}.qkv.{part}"].chunk(3), strict=True):
                    self.state[f"{at}.{letter}.{part}"] = value

    # --- images, where they stand and what they look like --------------------------------------------
    def sources(self, raw: Mapping[str, Tensor]) -> dict[int, tuple[Tensor, Tensor] | None]:
        """Patches and grids of images and of videos, by the token that they fill."""
        found: dict[int, tuple[Tensor, Tensor] | None] = {}
        for token, pixels, grids in (
            (self.root.image_token_id, "pixel_values", "image_grid_thw"),
            (self.root.video_token_id, "pixel_values_videos", "video_grid_thw"),
        ):
            found[token] = (raw[pixels], raw[grids]) if pixels in raw else None
        return found

    def images(self, raw: Mapping[str, Tensor]) -> tuple[list[tuple[Tensor, Grid]], Tensor]:
        """(patches and grid of every image in reading order, position ids [3 batch pos]), token by token."""
        input_ids, attention_mask, sources = raw["input_ids"], raw["attention_mask"], self.sources(raw)
        seconds = raw.get("second_per_grid_ts")
        left, steps = {}, self.steps(sources, seconds)
        for token, source in sources.items():
            clips = []
            if source is not None:
                pixels, grids = source
                apart = self.is_third and token == self.root.video_token_id
                for t, h, w in grids.tolist():
                    frames, pixels = list(pixels[: t * h * w].double().split(h * w)), pixels[t * h * w :]
                    clips += [([frame], (h, w)) for frame in frames] if apart else [(frames, (h, w))]
            left[token] = clips
        found, positions = [], torch.zeros(3, *input_ids.shape, dtype=torch.long)
        for row in range(len(input_ids)):
            now, skip = 0, 0
            for place in attention_mask[row].nonzero().flatten().tolist():
                token = int(input_ids[row, place])
                if skip:
                    skip -= 1
                elif token in left:
                    frames, (h, w) = left[token].pop(0)
                    found += [(frame, (h, w)) for frame in frames]
                    step = steps.pop(0) if steps and token == self.root.video_token_id else 1.0
                    times = [int(i * step) for i in range(len(frames))]
                    cells = itertools.product(times, range(h // self.merge), range(w // self.merge))
                    for i, cell in enumerate(cells):
                        positions[:, row, place + i] = now + torch.tensor(cell)
                        skip = i
                    now += max(h, w) // self.merge
                else:
                    positions[:, row, place] = now
                    now += 1
        assert not any(left.values())
        return found, positions

    def steps(self, sources: Any, seconds: Tensor | None) -> list[float]:
        """Positions in time from one image of a video to the next; none where images are counted."""
        videos = sources.get(self.root.video_token_id)
        if not self.is_windowed or videos is None:
            return []
        seconds = torch.ones(len(videos[1])) if seconds is None else seconds
        return [float(self.vision.tokens_per_second * s) for s in seconds]

    def areas(self, grid: Grid) -> Tensor:
        """True where two patches of an image share a window."""
        side = self.vision.window_size // self.vision.patch_size // self.merge * self.merge
        own = [(y // side, x // side) for y, x in self.places(grid)]
        return torch.tensor([[a == b for b in own] for a in own])

    def places(self, grid: Grid) -> list[tuple[int, int]]:
        """(row, column) of the patches of an image in their order."""
        m = self.merge
        return [
            (y * m + a, x * m + b)
            for y, x, a, b in itertools.product(range(grid[0] // m), range(grid[1] // m), range(m), range(m))
        ]

    def resampled(self, grid: Grid) -> Tensor:
        """The square table of positions stretched over a grid, corner on corner; float32 weights are the model's."""
        table = self.state["model.visual.pos_embed.weight"]
        side = int(len(table) ** 0.5)
        table = table.unflatten(0, (side, side))

        def line(n: int) -> Tensor:
            at = torch.arange(n, dtype=torch.float32) * (side - 1) / max(n - 1, 1)
            return (1 - (at[:, None] - torch.arange(side)).abs()).clamp(min=0)  # hat functions

        weights = line(grid[0])[:, None, :, None] * line(grid[1])[None, :, None, :]
        whole = torch.einsum("yxrc,rcd->yxd", weights.double(), table)
        return torch.stack([whole[y, x] for y, x in self.places(grid)])

    def join(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, self.merge**2)).flatten(2)

    def packed(self, x: Tensor, grids: list[Grid]) -> Tensor:
        """Tokens of all images one after another, pads left out."""
        return torch.cat([t[: h * w // self.merge**2] for t, (h, w) in zip(x, grids, strict=True)])

    def filled(self, raw: Mapping[str, Tensor]) -> Tensor:
        ids = raw["input_ids"]
        filled = (ids == self.root.image_token_id) | (ids == self.root.video_token_id)
        return filled & raw["attention_mask"].bool()

    def positions(self, raw: Mapping[str, Tensor]) -> Tensor:
        return self.images(raw)[1]

    def angles(self, layer: int, positions: Tensor, d_head: int) -> Tensor:
        streams = torch.tensor(self.streams(d_head // 2))  # of each frequency: 0 time, 1 rows, 2 columns
        each = torch.stack([super(QwenReference, self).angles(layer, stream, d_head) for stream in positions])
        return torch.stack([each[stream, ..., i] for i, stream in enumerate(streams)], -1)

    def streams(self, n: int) -> list[int]:
        """Which stream each of the n frequencies reads: by turns (Qwen3-VL), or section after section."""
        sections = self.text.rope_parameters["mrope_section"]
        if not self.is_third:
            return [i % 3 for i, size in enumerate(sections) for _ in range(size)]
        return [i % 3 if i % 3 and i < 3 * sections[i % 3] else 0 for i in range(n)]

    def see(self, raw: Mapping[str, Tensor]) -> tuple[Tensor | None, list[Tensor]]:
        images, _ = self.images(raw)
        if not images:
            return None, []
        c, tower, grids = self.vision, "model.visual", [grid for _, grid in images]
        width = getattr(c, "embed_dim", c.hidden_size)
        norm = self.rms if self.is_windowed else self.layer_norm
        longest = max(h * w for h, w in grids)

        def pad(parts: list[Tensor], value: float) -> Tensor:
            return torch.stack([F.pad(p, (0, 0, 0, longest - len(p)), value=value) for p in parts])

        patches = pad([patches for patches, _ in images], PAD_PATCH)
        weight, bias = self.state[f"{tower}.patch_embed.proj.weight"], self.state.get(f"{tower}.patch_embed.proj.bias")
        x = self.at("vision.hook_embed", F.linear(patches, weight.flatten(1), bias))
        if self.is_third:
            x = x + self.at("vision.hook_pos_embed", pad([self.resampled(grid) for grid in grids], PAD_PATCH))
        e = width // c.num_heads
        base = (c.rope_parameters or {}).get("rope_theta", 10_000.0)
        frequencies = (1.0 / base ** (torch.arange(0, e // 2, 2).float() / (e // 2))).double()
        places = pad([torch.tensor(self.places(grid)).double() for grid in grids], 0.0)
        angles = torch.cat([places[..., :1] * frequencies, places[..., 1:] * frequencies], -1)
        real = torch.tensor([[i < h * w for i in range(longest)] for h, w in grids])
        act = ACTIVATIONS[c.hidden_act]
        mlp = dict(up="linear_fc1", down="linear_fc2") if self.is_third else dict(up="fc1", down="fc2")
        if self.is_windowed:
            mlp = dict(gate="gate_proj", up="up_proj", down="down_proj")
        whole = real[:, None, None]
        windows = whole.expand(-1, 1, longest, longest).clone()
        for i, grid in enumerate(grids if self.is_windowed else []):
            n = grid[0] * grid[1]
            windows[i, 0, :n, :n] = self.areas(grid)
        added = []
        for layer in range(c.depth):
            at = f"{tower}.blocks.{layer}"
            keys = {letter: f"{at}.attn.{letter}" for letter in "qkv"}
            keys |= dict(ln1=f"{at}.norm1", ln2=f"{at}.norm2", o=f"{at}.attn.proj")
            keys |= {part: f"{at}.mlp.{name}" for part, name in mlp.items()}
            allowed = windows if self.is_windowed and layer not in c.fullatt_block_indexes else whole
            heads = (c.num_heads, c.num_heads, e)
            x = self.block(f"vision.blocks.{layer}", keys, x, norm, heads, allowed, turn(angles), act)
            if layer in getattr(c, "deepstack_visual_indexes", ()):
                i = len(added)
                at = f"{tower}.deepstack_merger_list.{i}"
                inner = self.join(x)
                inner = F.layer_norm(
                    inner, inner.shape[-1:], self.state[f"{at}.norm.weight"], self.state[f"{at}.norm.bias"], 1e-6
                )
                inner = self.linear(f"{at}.linear_fc2", F.gelu(self.linear(f"{at}.linear_fc1", inner)))
                added.append(self.at(f"deepstack.{i}.hook_out", self.packed(inner, grids)))
        last, first, second = ("norm", "linear_fc1", "linear_fc2") if self.is_third else ("ln_q", "mlp.0", "mlp.2")
        x = norm("vision.ln_post", f"{tower}.merger.{last}", x)
        x = self.at("connector.hook_in", self.join(x))
        x = self.at("connector.hook_pre", self.linear(f"{tower}.merger.{first}", x))
        x = self.at("connector.hook_post", F.gelu(x))
        x = self.at("connector.hook_out", self.linear(f"{tower}.merger.{second}", x))
        return self.at("hook_image_features", self.packed(x, grids)), added
