"""The odd tiny Qwen models: images of any size, videos, multimodal rotary positions.

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
    qwen2_5_vl=dict(
        depth=3,
        hidden_size=32,
        out_hidden_size=48,
        intermediate_size=40,
        num_heads=2,
        patch_size=4,
        window_size=16,
        fullatt_block_indexes=[1],
        tokens_per_second=2,
    ),
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
    qwen2_5_vl=dict(rope_parameters=MROPE),
    qwen3_vl=dict(
        head_dim=16,
        num_attention_heads=4,
        rope_parameters=dict(rope_type="default", rope_theta=5e6, mrope_section=[4, 2, 2], mrope_interleaved=True),
    ),
)
CONFIGS = dict(
    qwen2_vl=transformers.Qwen2VLConfig,
    qwen2_5_vl=transformers.Qwen2_5_VLConfig,
    qwen3_vl=transformers.Qwen3VLConfig,
)
MODELS = dict(
    qwen2_vl=transformers.Qwen2VLForConditionalGeneration,
    qwen2_5_vl=transformers.Qwen2_5_VLForConditionalGeneration,
    qwen3_vl=transformers.Qwen3VLForConditionalGeneration,
)
KINDS = tuple(MODELS)


@dataclass(frozen=True, eq=False, kw_only=True)
class QwenCase:
    """A tiny model and a batch.

    rows: a string a row; a number is text tokens, "i4x6" an image of 4 x 6 patches, "v3x4x6" a video of three such
    images. Images stand between vision start and end tokens as in the hub's prompts; Qwen3-VL's video frames each
    stand between their own, two text tokens (a time stamp) before them. seconds: those that an image of each video
    stands for (Qwen2.5-VL), by turns; none where it is empty."""

    name: str
    kind: str
    text: Mapping[str, Any] = field(default_factory=dict)
    vision: Mapping[str, Any] = field(default_factory=dict)
    root: Mapping[str, Any] = field(default_factory=dict)
    rows: tuple[str, ...] = ("3 i4x6 5", "2 i2x2 1 i8x4 6", "4")
    padding: str = "left"
    seconds: tuple[float, ...] = (1.0, 0.3, 1.7)

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
                elif self.kind != "qwen3_vl":
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
        if self.kind == "qwen2_5_vl" and grids["v"] and self.seconds:
            raw["second_per_grid_ts"] = torch.tensor(
                [self.seconds[i % len(self.seconds)] for i in range(len(grids["v"]))]
            )
        return raw


def both(name: str, **kw: Any) -> list[QwenCase]:
    """The same case of the first and the last model."""
    return [QwenCase(name=name, kind=kind, **kw) for kind in ("qwen2_vl", "qwen3_vl")]


def _two(name: str, **kw: Any) -> QwenCase:
    return QwenCase(name=name, kind="qwen2_vl", **kw)


def _two_and_a_half(name: str, **kw: Any) -> QwenCase:
    return QwenCase(name=name, kind="qwen2_5_vl", **kw)


def _three(name: str, **kw: Any) -> QwenCase:
    return QwenCase(name=name, kind="qwen3_vl", **kw)


def _rope(sections: list[int], kind: str = "default", **numbers: Any) -> dict[str, Any]:
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=1e4, mrope_section=sections, **numbers))


YARN = dict(factor=4.0, original_max_position_embeddings=16)
WINDOW = dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)
VIDEOS = ("v2x4x4 2", "3 v4x2x2 1 v1x6x2 2")


QWEN_CASES: tuple[QwenCase, ...] = (
    *both("plain"),
    *both("one-kv-head", text=dict(num_key_value_heads=1)),
    *both("image-and-video", rows=("2 i4x4 3 v2x4x6 1 i2x6 4", "1 v3x2x4 2", "5")),
    *both("right-padding", padding="right"),
    # heads, widths, activations
    *both("all-kv-heads", text=dict(num_attention_heads=6, num_key_value_heads=6)),
    _two("one-head", text=dict(num_attention_heads=1, num_key_value_heads=1) | _rope([8, 8, 8])),
    _three("one-head", text=dict(num_attention_heads=1, num_key_value_heads=1, head_dim=20) | _rope([4, 3, 3])),
    _three("wide-heads", text=dict(head_dim=32) | _rope([6, 5, 5])),
    _three("narrow-heads", text=dict(head_dim=4) | _rope([1, 1, 0])),
    _three("attention-bias", text=dict(attention_bias=True)),
    *both("tied", root=dict(tie_word_embeddings=True)),
    *both("gelu", text=dict(hidden_act="gelu"), vision=dict(hidden_act="silu")),
    *both("large-epsilon", text=dict(rms_norm_eps=1e-2)),
    _two("one-layer", text=dict(num_hidden_layers=1), vision=dict(depth=1)),
    _three("one-layer", text=dict(num_hidden_layers=1), vision=dict(depth=1, deepstack_visual_indexes=[0])),
    # the tower
    *both("merge-1", vision=dict(spatial_merge_size=1), rows=("3 i3x5 2", "i1x1 1 i1x4 6")),
    *both("merge-3", vision=dict(spatial_merge_size=3), rows=("3 i3x6 2", "2 i9x3 1 v2x3x3 1")),
    *both("temporal-1", vision=dict(temporal_patch_size=1), rows=("1 v3x2x4 2 i4x2 1",)),
    *both("temporal-3", vision=dict(temporal_patch_size=3), rows=("1 v2x2x4 2 i4x2 1", "i2x2 3")),
    *both("patch-2-grey", vision=dict(patch_size=2, in_channels=1)),
    *both("patch-7-four-channels", vision=dict(patch_size=7, in_channels=4)),
    *both("one-tower-head", vision=dict(num_heads=1)),
    *both("eight-tower-heads", vision=dict(num_heads=8)),
    *both("tower-rotary-base", vision=dict(rope_parameters=dict(rope_type="axial", rope_theta=50.0))),
    _two("narrow-tower-mlp", vision=dict(mlp_ratio=2)),
    _three("position-table-2x2", vision=dict(num_position_embeddings=4)),
    _three("position-table-1x1", vision=dict(num_position_embeddings=1)),
    _three("position-table-9x9", vision=dict(num_position_embeddings=81), rows=("i18x18 2 i2x10 1",)),
    # deep-stack features
    _three("deepstack-none", vision=dict(deepstack_visual_indexes=[])),
    _three("deepstack-one", vision=dict(deepstack_visual_indexes=[1])),
    _three("deepstack-every-decoder-layer", vision=dict(deepstack_visual_indexes=[0, 1, 2])),
    _three("deepstack-of-one-layer", text=dict(num_hidden_layers=1), vision=dict(deepstack_visual_indexes=[2])),
    _three(
        "deepstack-past-the-decoder", text=dict(num_hidden_layers=1), vision=dict(deepstack_visual_indexes=[0, 1, 2])
    ),
    _three("deepstack-video", rows=("1 i2x2 2 v3x4x2 1", "v2x2x2 4", "3")),
    # batches
    *both("one-picture", rows=("3 i6x4 5",)),
    *both("thin-pictures", rows=("1 i2x40 2", "2 i40x2 1", "i2x2 3")),
    *both("many-pictures", rows=("1 i2x2 1 i4x2 2 i2x6 1", "i6x6 3", "4", "2 i2x4 1")),
    *both("touching-wrappers", rows=("i2x4 i4x2 v2x2x2 i2x2", "i2x2 9")),
    *both("nothing-but-pictures", rows=("i4x4", "i2x2 i2x4")),
    *both("no-picture-at-all", rows=("5", "8")),
    *both("no-picture-right-padding", rows=("5", "8", "2"), padding="right"),
    *both("text-rows-between", rows=("4", "2 i4x6 1", "9", "i2x2 2")),
    *both("videos", rows=VIDEOS),
    *both("videos-right-padding", rows=VIDEOS, padding="right"),
    *both("long-video", rows=("2 v9x2x2 3", "4 i2x4 5")),
    # rotary positions and windows
    *both("rotary-base", text=dict(num_attention_heads=6, num_key_value_heads=3, head_dim=8) | _rope([2, 1, 1])),
    _two("four-sections", text=_rope([1, 1, 1, 1])),
    _two("six-sections", text=dict(num_attention_heads=3, num_key_value_heads=1) | _rope([1, 1, 1, 1, 2, 2])),
    _two("time-section-alone", text=_rope([4, 0, 0])),
    _three("uneven-sections", text=_rope([2, 1, 5])),
    _three("time-section-alone", text=_rope([8, 0, 0])),
    _two("yarn", text=_rope([1, 1, 2], "yarn", **YARN) | dict(max_position_embeddings=64)),
    _three("yarn", text=_rope([4, 2, 2], "yarn", **YARN) | dict(max_position_embeddings=64)),
    _two("yarn-scaled", text=_rope([1, 1, 2], "yarn", **YARN, attention_factor=1.7)),
    _two("linear", text=_rope([1, 1, 2], "linear", factor=3.0)),
    _two("window", text=WINDOW),
    _two("window-right-padding", text=WINDOW | dict(max_window_layers=0), padding="right"),
    _two("window-longer-than-rows", text=WINDOW | dict(sliding_window=200), rows=VIDEOS),
    # windows and seconds
    *map(_two_and_a_half, ("plain",)),
    _two_and_a_half("image-and-video", rows=("2 i4x4 3 v2x4x6 1 i2x6 4", "1 v3x2x4 2", "5")),
    _two_and_a_half("right-padding", padding="right"),
    _two_and_a_half("one-kv-head", text=dict(num_key_value_heads=1)),
    _two_and_a_half("one-head", text=dict(num_attention_heads=1, num_key_value_heads=1) | _rope([8, 8, 8])),
    _two_and_a_half("tied", root=dict(tie_word_embeddings=True)),
    _two_and_a_half("gelu", text=dict(hidden_act="gelu"), vision=dict(hidden_act="gelu_pytorch_tanh")),
    _two_and_a_half("large-epsilon", text=dict(rms_norm_eps=1e-2)),
    _two_and_a_half("one-layer", text=dict(num_hidden_layers=1), vision=dict(depth=1, fullatt_block_indexes=[])),
    _two_and_a_half("merge-1", vision=dict(spatial_merge_size=1, window_size=11), rows=("3 i3x5 2", "i1x1 1 i1x4 6")),
    _two_and_a_half(
        "merge-3", vision=dict(spatial_merge_size=3, window_size=25), rows=("3 i3x12 2", "2 i15x9 1 v2x3x9 1")
    ),
    _two_and_a_half("temporal-1", vision=dict(temporal_patch_size=1), rows=("1 v3x2x8 2 i4x6 1",)),
    _two_and_a_half("temporal-3", vision=dict(temporal_patch_size=3), rows=("1 v2x6x4 2 i4x2 1", "i2x2 3")),
    _two_and_a_half("patch-2-grey", vision=dict(patch_size=2, in_channels=1)),
    _two_and_a_half("patch-7-four-channels", vision=dict(patch_size=7, in_channels=4)),
    _two_and_a_half("one-tower-head", vision=dict(num_heads=1)),
    _two_and_a_half("eight-tower-heads", vision=dict(num_heads=8)),
    _two_and_a_half("tower-rotary-base", vision=dict(rope_parameters=dict(rope_type="axial", rope_theta=50.0))),
    _two_and_a_half("windows-everywhere", vision=dict(fullatt_block_indexes=[])),
    _two_and_a_half("windows-nowhere", vision=dict(fullatt_block_indexes=[0, 1, 2])),
    _two_and_a_half("window-of-one-token", vision=dict(window_size=8)),
    _two_and_a_half("window-no-multiple-of-a-patch", vision=dict(window_size=30), rows=("i8x14 3", "2 i10x6 1 i2x2 1")),
    _two_and_a_half("window-larger-than-pictures", vision=dict(window_size=400)),
    _two_and_a_half("full-layers-past-the-tower", vision=dict(fullatt_block_indexes=[2, 7, 15])),
    _two_and_a_half("one-picture", rows=("3 i10x6 5",)),
    _two_and_a_half("thin-pictures", rows=("1 i2x40 2", "2 i40x2 1", "i2x2 3")),
    _two_and_a_half("many-pictures", rows=("1 i2x2 1 i4x2 2 i2x6 1", "i6x6 3", "4", "2 i2x4 1")),
    _two_and_a_half("touching-wrappers", rows=("i2x4 i4x2 v2x2x2 i2x2", "i2x2 9")),
    _two_and_a_half("nothing-but-pictures", rows=("i4x4", "i2x2 i2x4")),
    _two_and_a_half("no-picture-at-all", rows=("5", "8")),
    _two_and_a_half("no-picture-right-padding", rows=("5", "8", "2"), padding="right"),
    _two_and_a_half("text-rows-between", rows=("4", "2 i4x6 1", "9", "i2x2 2")),
    _two_and_a_half("videos", rows=VIDEOS),
    _two_and_a_half("videos-right-padding", rows=VIDEOS, padding="right"),
    _two_and_a_half("long-video", rows=("2 v9x2x2 3", "4 i2x4 5"), seconds=(0.7,)),
    _two_and_a_half("slow-videos", rows=VIDEOS, seconds=(9.0, 0.1), vision=dict(tokens_per_second=3)),
    _two_and_a_half("videos-of-unknown-speed", rows=VIDEOS, seconds=()),
    _two_and_a_half("time-section-alone", text=_rope([4, 0, 0]), rows=VIDEOS),
    _two_and_a_half("yarn", text=_rope([1, 1, 2], "yarn", **YARN) | dict(max_position_embeddings=64)),
    _two_and_a_half("window", text=WINDOW),
)
QWEN_BY_NAME = {str(case): case for case in QWEN_CASES}
