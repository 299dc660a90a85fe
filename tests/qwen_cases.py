"""The odd tiny Qwen models: pictures of any size, videos, multimodal rotary positions.

A `QwenCase` stands where a `Case` does: `hf_config`, `build_hf`, `hf_model`, `native_model` and `raw_inputs` of
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

IMAGE, VIDEO, START, END, PAD = 120, 121, 122, 123, 0
TEXT = dict(
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    vocab_size=128,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_id=2,
)
MROPE = dict(rope_type="default", rope_theta=1e6, mrope_section=[1, 1, 2])
TOWERS: Mapping[str, Mapping[str, Any]] = dict(
    qwen2_vl=dict(depth=2, embed_dim=32, hidden_size=48, num_heads=2, patch_size=4),
    qwen3_vl=dict(
        depth=3,
        hidden_size=32,
        out_hidden_size=48,
        intermediate_size=40,
        num_heads=2,
        patch_size=4,
        num_position_embeddings=25,
        deepstack_visual_indexes=[0, 2],
    ),
)
TEXTS: Mapping[str, Mapping[str, Any]] = dict(
    qwen2_vl=dict(rope_parameters=MROPE),
    qwen3_vl=dict(
        head_dim=16,
        num_attention_heads=4,
        rope_parameters=dict(rope_type="default", rope_theta=5e6, mrope_section=[4, 2, 2], mrope_interleaved=True),
    ),
)
CONFIGS = dict(qwen2_vl=transformers.Qwen2VLConfig, qwen3_vl=transformers.Qwen3VLConfig)
MODELS = dict(
    qwen2_vl=transformers.Qwen2VLForConditionalGeneration, qwen3_vl=transformers.Qwen3VLForConditionalGeneration
)


@dataclass(frozen=True, eq=False, kw_only=True)
class QwenCase:
    """A tiny model and a batch.

    rows: a string a row; a number is text tokens, "i4x6" an image of 4 x 6 patches, "v3x4x6" a video of three such
    pictures. Images stand between vision start and end tokens as in the hub's prompts; Qwen3-VL's video frames each
    stand between their own, two text tokens (a time stamp) before them."""

    name: str
    kind: str
    text: Mapping[str, Any] = field(default_factory=dict)
    vision: Mapping[str, Any] = field(default_factory=dict)
    root: Mapping[str, Any] = field(default_factory=dict)
    rows: tuple[str, ...] = ("3 i4x6 5", "2 i2x2 1 i8x4 6", "4")
    padding: str = "left"

    def __str__(self) -> str:
        return f"{self.kind}-{self.name}"

    def text_only(self) -> bool:
        return not any("x" in row for row in self.rows)

    def config(self) -> Any:
        """The Hugging Face configuration."""
        return CONFIGS[self.kind](
            text_config={**TEXT, **copy.deepcopy(dict(TEXTS[self.kind])), **copy.deepcopy(dict(self.text))},
            vision_config={**copy.deepcopy(dict(TOWERS[self.kind])), **copy.deepcopy(dict(self.vision))},
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=START,
            vision_end_token_id=END,
            **copy.deepcopy(dict(self.root)),
        )

    @property
    def model_class(self) -> Any:
        return MODELS[self.kind]

    def raw(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """What a processor would emit for the rows."""
        generator = torch.Generator().manual_seed(2)
        vision = self.config().vision_config
        merge, width = vision.spatial_merge_size, vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        grids: dict[str, list[list[int]]] = {"i": [], "v": []}
        rows = []
        for row in self.rows:
            ids: list[int] = []
            for word in row.split():
                if word.isdigit():
                    ids += torch.randint(3, 100, (int(word),), generator=generator).tolist()
                    continue
                sizes = [int(n) for n in re.findall(r"\d+", word)]
                t, h, w = sizes if word[0] == "v" else [1, *sizes]
                grids[word[0]].append([t, h, w])
                n = h * w // merge**2
                if word[0] == "i":
                    ids += [START, *[IMAGE] * n, END]
                elif self.kind == "qwen2_vl":
                    ids += [START, *[VIDEO] * (t * n), END]
                else:
                    for _ in range(t):
                        stamp = torch.randint(3, 100, (2,), generator=generator).tolist()
                        ids += [*stamp, START, *[VIDEO] * n, END]
            rows.append(ids)
        length = max(map(len, rows))
        tokens, mask = torch.full((len(rows), length), PAD), torch.zeros(len(rows), length, dtype=torch.long)
        for i, ids in enumerate(rows):
            at = slice(length - len(ids), length) if self.padding == "left" else slice(0, len(ids))
            tokens[i, at], mask[i, at] = torch.tensor(ids), 1
        raw = dict(input_ids=tokens, attention_mask=mask)
        raw["mm_token_type_ids"] = (tokens == IMAGE).long() + 2 * (tokens == VIDEO).long()
        for letter, pixels, key in (
            ("i", "pixel_values", "image_grid_thw"),
            ("v", "pixel_values_videos", "video_grid_thw"),
        ):
            if grids[letter]:
                raw[key] = torch.tensor(grids[letter])
                n = int(raw[key].prod(-1).sum())
                raw[pixels] = torch.randn(n, width, generator=generator, dtype=torch.float64).to(dtype)
        return raw


def both(name: str, **kw: Any) -> list[QwenCase]:
    """The same case of both models."""
    return [QwenCase(name=name, kind=kind, **kw) for kind in ("qwen2_vl", "qwen3_vl")]


QWEN_CASES: tuple[QwenCase, ...] = (
    *both("plain"),
    *both("one-kv-head", text=dict(num_key_value_heads=1)),
    *both("image-and-video", rows=("2 i4x4 3 v2x4x6 1 i2x6 4", "1 v3x2x4 2", "5")),
    *both("right-padding", padding="right"),
)
QWEN_BY_NAME = {str(case): case for case in QWEN_CASES}
