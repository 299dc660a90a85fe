"""The odd tiny models whose images stand in tiles among text: Idefics3 and SmolVLM.

A `TileCase` stands where a `Case` does: `hf_config`, `build_hf`, `hf_model`, `native_model` and `raw_inputs` of
`tests/cases.py` take both.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

PAD, IMAGE, FAKE, NEWLINE, WHOLE, FIRST_TILE = 0, 127, 120, 121, 122, 100  # tile (r, c) is called 100 + 4 r + c
TEXT = dict(
    model_type="llama",
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    vocab_size=128,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=PAD,
)
TOWER = dict(
    hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4
)
CONFIGS = dict(idefics3=transformers.Idefics3Config, smolvlm=transformers.SmolVLMConfig)
MODELS = dict(
    idefics3=transformers.Idefics3ForConditionalGeneration, smolvlm=transformers.SmolVLMForConditionalGeneration
)


@dataclass(frozen=True, eq=False, kw_only=True)
class TileCase:
    """A tiny model and a batch.

    rows: a string a row; a number is text tokens, "i" an image that is not cut, "i9x5" one of which only 9 x 5 pixels
    (height, width) are real, "t2x3" one cut into 2 x 3 tiles, "b" the bare tokens of an image without markers.
    n_name: tokens that the name of a tile takes. has_mask: a processor's mask of real pixels is given."""

    name: str
    kind: str = "idefics3"
    text: Mapping[str, Any] = field(default_factory=dict)
    vision: Mapping[str, Any] = field(default_factory=dict)
    root: Mapping[str, Any] = field(default_factory=dict)
    rows: tuple[str, ...] = ("3 t1x2 5", "2 i 1 i9x16 6", "4")
    padding: str = "left"
    n_name: int = 1
    has_mask: bool = True

    def __str__(self) -> str:
        return f"{self.kind}-{self.name}"

    def text_only(self) -> bool:
        return not any(re.search("[itb]", row) for row in self.rows)

    def config(self) -> Any:
        """The Hugging Face configuration."""
        return CONFIGS[self.kind](
            text_config={**TEXT, **copy.deepcopy(dict(self.text))},
            vision_config={**TOWER, **self.vision},
            **{"image_token_id": IMAGE, **self.root},
        )

    @property
    def model_class(self) -> Any:
        return MODELS[self.kind]

    @property
    def tile_tokens(self) -> int:
        """Image tokens of one tile."""
        config = self.config()
        side = config.vision_config.image_size // config.vision_config.patch_size // config.scale_factor
        return side * side

    def picture_tokens(self, rows: int, columns: int) -> list[int]:
        """The tokens of one image as a processor writes them."""

        def tile(name: int) -> list[int]:
            return [FAKE, *[7] * (self.n_name - 1), name, *[IMAGE] * self.tile_tokens]

        out = []
        for r in range(rows):
            for c in range(columns):
                out += tile(FIRST_TILE + 4 * r + c)
            out.append(NEWLINE)
        return [*out, *[NEWLINE] * (rows > 0), *tile(WHOLE), FAKE]

    def raw(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """What a processor would emit for the rows."""
        generator = torch.Generator().manual_seed(2)
        side = self.config().vision_config.image_size
        rows: list[list[int]] = []
        sizes: list[list[tuple[int, int]]] = []  # (height, width) of the real pixels of each tile
        for row in self.rows:
            ids: list[int] = []
            mine: list[tuple[int, int]] = []
            for word in row.split():
                if word.isdigit():
                    ids += torch.randint(3, 100, (int(word),), generator=generator).tolist()
                    continue
                numbers = [int(n) for n in re.findall(r"\d+", word)]
                cut = (numbers[0], numbers[1]) if word[0] == "t" else (0, 0)
                ids += [IMAGE] * self.tile_tokens if word[0] == "b" else self.picture_tokens(*cut)
                size = (numbers[0], numbers[1]) if word[0] == "i" and numbers else (side, side)
                mine += [size] * (cut[0] * cut[1] + 1)
            rows.append(ids)
            sizes.append(mine)
        length = max(map(len, rows))
        tokens, mask = torch.full((len(rows), length), PAD), torch.zeros(len(rows), length, dtype=torch.long)
        for i, ids in enumerate(rows):
            at = slice(length - len(ids), length) if self.padding == "left" else slice(0, len(ids))
            tokens[i, at], mask[i, at] = torch.tensor(ids), 1
        raw = dict(input_ids=tokens, attention_mask=mask)
        most = max(map(len, sizes))
        if not most:
            return raw
        pixels = torch.zeros(len(rows), most, 3, side, side, dtype=torch.float64)
        real = torch.zeros(len(rows), most, side, side, dtype=torch.long)
        for i, mine in enumerate(sizes):
            for j, (height, width) in enumerate(mine):
                shape = (3, height, width)
                pixels[i, j, :, :height, :width] = torch.randn(shape, generator=generator, dtype=torch.float64)
                real[i, j, :height, :width] = 1
        raw["pixel_values"] = pixels.to(dtype)
        return raw | dict(pixel_attention_mask=real) if self.has_mask else raw


def _both(name: str, **kw: Any) -> list[TileCase]:
    """The same case of both models."""
    return [TileCase(name=name, kind=kind, **kw) for kind in MODELS]


def _rope(kind: str, **numbers: Any) -> dict[str, Any]:
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=1e4, **numbers))


LLAMA3 = _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)

TILE_CASES: tuple[TileCase, ...] = (
    *_both("plain"),
    *_both("tied", root=dict(tie_word_embeddings=True), text=dict(tie_word_embeddings=True)),
    *_both("unequal-pictures", rows=("2 t2x1 1 t1x3 2 i 1", "1 i 3", "t2x2 4", "6"), vision=dict(num_hidden_layers=1)),
    TileCase(name="right-padding", padding="right", kind="smolvlm"),
    TileCase(name="no-mask", has_mask=False, rows=("1 i 2 t2x2 3", "i i 1")),
    TileCase(name="smaller-pictures", rows=("1 i1x16 2 i16x1 1", "i5x9 3 i13x12 1"), vision=dict(image_size=17)),
    TileCase(name="long-names", n_name=5, rows=("1 t2x2 i 2", "3 i t1x2 1"), kind="smolvlm"),
    TileCase(name="no-markers", rows=("3 b 2 b b 1", "b 4")),
    TileCase(name="no-picture-at-all", rows=("5", "8"), kind="smolvlm"),
    # sides: 3 patches of 6 are joined, 4 of 4, 5 of 25 (whose patches do not all get their own place)
    TileCase(name="scale-1", root=dict(scale_factor=1), rows=("2 t1x2 2", "i5x7 1")),
    TileCase(name="scale-3", root=dict(scale_factor=3), vision=dict(image_size=25), rows=("2 t1x2 2", "1 i17x9 1")),
    TileCase(name="one-token-a-tile", root=dict(scale_factor=4), rows=("2 t2x3 2", "i 1 i"), kind="smolvlm"),
    TileCase(
        name="side-25",
        vision=dict(image_size=25, patch_size=1, num_hidden_layers=1),
        root=dict(scale_factor=5),
        rows=("i 2", "1 i19x7 1"),
    ),
    # heads, biases, activations
    TileCase(name="one-kv-head", text=dict(num_key_value_heads=1, head_dim=10), kind="smolvlm"),
    TileCase(name="biases", text=dict(attention_bias=True, mlp_bias=True, num_key_value_heads=6) | LLAMA3),
    TileCase(name="one-tower-head", vision=dict(num_attention_heads=1, hidden_act="gelu", layer_norm_eps=1e-2)),
    TileCase(name="mistral", text=dict(model_type="mistral", sliding_window=7), kind="smolvlm"),
    TileCase(name="qwen2", text=dict(model_type="qwen2")),
    TileCase(name="many-patches", vision=dict(patch_size=2), root=dict(scale_factor=4), kind="smolvlm"),
)
TILE_BY_NAME = {str(case): case for case in TILE_CASES}
