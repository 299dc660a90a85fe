"""Qwen-VL models a second time, written plainly in float64; blocks are those of `tests/reference.py`.

Images (an image, or one image of a video) stand in reading order, each padded to the longest with a large
number that must reach nothing. Patches come in the processor's order: squares of patches, one a token.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.reference import ACTIVATIONS, Edits, Reference

PAD_PATCH = 9.0
Grid = tuple[int, int]  # (height, width) in patches


class QwenReference(Reference):
    """One forward pass of any of them; `merge` patches a side make one token."""

    def __init__(
        self, config: Any, state: Mapping[str, Tensor], edits: Edits | None = None, tracked: bool = False
    ) -> None:
        super().__init__(config, state, edits, tracked)
        self.merge = config.vision_config.spatial_merge_size
        self.is_third = config.model_type.startswith("qwen3")
        self.is_windowed = config.model_type.startswith("qwen2_5")
        for layer in range(config.vision_config.depth):
            at = f"model.visual.blocks.{layer}.attn"
            for part in ("weight", "bias"):
                for letter, value in zip("qkv", self.state[f"{at}.qkv.{part}"].chunk(3), strict=True):
                    self.state[f"{at}.{letter}.{part}"] = value

    # --- images, where they stand and what they look like --------------------------------------------
    def pictures(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        sources: Mapping[int, tuple[Tensor, Tensor] | None],
        seconds: Tensor | None = None,
    ) -> tuple[list[tuple[Tensor, Grid]], Tensor]:
        """(patches and grid of every image in reading order, position ids [3 batch pos]), token by token."""
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

    def see(self, pictures: list[tuple[Tensor, Grid]]) -> tuple[Tensor, list[Tensor]]:
        """(what is scattered into the sequence, what the layers after 0, 1, ... add)."""
        c, tower, grids = self.vision, "model.visual", [grid for _, grid in pictures]
        width = getattr(c, "embed_dim", c.hidden_size)
        norm = self.rms if self.is_windowed else self.layer_norm
        longest = max(h * w for h, w in grids)

        def pad(parts: list[Tensor], value: float) -> Tensor:
            return torch.stack([F.pad(p, (0, 0, 0, longest - len(p)), value=value) for p in parts])

        patches = pad([patches for patches, _ in pictures], PAD_PATCH)
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

    # --- the whole -----------------------------------------------------------------------------------
    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        second_per_grid_ts: Tensor | None = None,
    ) -> Tensor:
        c, model = self.text, "model.language_model"
        sources = {}
        for token, pixels, grids in (
            (self.root.image_token_id, pixel_values, image_grid_thw),
            (self.root.video_token_id, pixel_values_videos, video_grid_thw),
        ):
            sources[token] = None if pixels is None or grids is None else (pixels, grids)
        pictures, positions = self.pictures(input_ids, attention_mask, sources, second_per_grid_ts)
        x = self.state[f"{model}.embed_tokens.weight"][input_ids]
        filled = (input_ids == self.root.image_token_id) | (input_ids == self.root.video_token_id)
        filled = (filled & attention_mask.bool())[..., None]
        added: list[Tensor] = []
        if pictures:
            features, added = self.see(pictures)
            x = x.masked_scatter(filled, features)
            added = [torch.zeros_like(x).masked_scatter(filled, more) for more in added]
        x = self.at("hook_embed", x)
        e = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        exponents = torch.arange(0, e, 2, dtype=torch.int64).float() / e
        frequencies = (1.0 / c.rope_parameters["rope_theta"] ** exponents).double()
        streams = torch.tensor(self.streams(e // 2))  # of each frequency: 0 time, 1 rows, 2 columns
        angles = positions[streams].permute(1, 2, 0).double() * frequencies
        length = input_ids.shape[1]
        allowed = torch.ones(length, length, dtype=torch.bool).tril() & attention_mask.bool()[:, None, None, :]
        heads = (c.num_attention_heads, c.num_key_value_heads, e)
        for layer in range(c.num_hidden_layers):
            at = f"{model}.layers.{layer}"
            keys = {letter: f"{at}.self_attn.{letter}_proj" for letter in "qkvo"}
            keys |= {part: f"{at}.mlp.{part}_proj" for part in ("gate", "up", "down")}
            keys |= dict(ln1=f"{at}.input_layernorm", ln2=f"{at}.post_attention_layernorm")
            if self.is_third:
                keys |= {f"{letter}_norm": f"{at}.self_attn.{letter}_norm" for letter in "qk"}
            more = added[layer - 1] if 1 <= layer <= len(added) else None
            act = ACTIVATIONS[c.hidden_act]
            x = self.block(f"blocks.{layer}", keys, x, self.rms, heads, allowed, turn(angles), act, more)
        if len(added) >= c.num_hidden_layers:
            x = x + added[c.num_hidden_layers - 1]
        x = self.at("unembed.hook_in", self.rms("ln_final", f"{model}.norm", x))
        head = "lm_head" if "lm_head.weight" in self.state else f"{model}.embed_tokens"
        logits = self.at("unembed.hook_out", self.linear(head, x))
        assert not self.edits, f"edits that met no value: {sorted(self.edits)}"
        return logits

    def streams(self, n: int) -> list[int]:
        """Which stream each of the n frequencies reads: by turns (Qwen3-VL), or section after section."""
        sections = self.text.rope_parameters["mrope_section"]
        if not self.is_third:
            return [i % 3 for i, size in enumerate(sections) for _ in range(size)]
        return [i % 3 if i % 3 and i < 3 * sections[i % 3] else 0 for i in range(n)]


def turn(angles: Tensor) -> Any:
    """Rotation of queries or keys [batch pos heads d_head] by [batch pos d_head / 2] angles."""
    both = torch.cat([angles, angles], -1)[:, :, None]

    def rotate(t: Tensor) -> Tensor:
        left, right = t.chunk(2, -1)
        return t * both.cos() + torch.cat([-right, left], -1) * both.sin()

    return rotate


reference_logits, reference_values = QwenReference.logits, QwenReference.named_values


def text_loss(logits: Tensor, raw: Mapping[str, Tensor], filled: tuple[int, ...]) -> Tensor:
    """Mean next-token loss over targets that are text, of real tokens."""
    total, n = logits.new_zeros(()), 0
    for row, keep in enumerate(raw["attention_mask"]):
        places = keep.nonzero().flatten().tolist()
        for now, following in itertools.pairwise(places):
            target = int(raw["input_ids"][row, following])
            if target not in filled:
                total, n = total - logits[row, now].log_softmax(-1)[target], n + 1
    return total / n


def reference_gradients(
    config: Any, state: Mapping[str, Tensor], raw: Mapping[str, Tensor], copies: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """Gradient of the loss with respect to every named value; heads read the copies of the residual in `copies`."""
    plain = QwenReference(config, state, {name: lambda value: value for name in copies}, tracked=True)
    logits = plain.forward(**raw)
    text_loss(logits, raw, (config.image_token_id, config.video_token_id)).backward()
    return {name: torch.zeros_like(v) if v.grad is None else v.grad for name, v in plain.values.items()}
