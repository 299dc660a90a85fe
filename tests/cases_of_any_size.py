"""The odd cases of the Qwen families: images of any size, videos, multimodal rotary positions."""

from __future__ import annotations

from typing import Any

from tests.families import QWEN, Case


def _qwen(family: str, name: str, **kw: Any) -> Case:
    return Case(name=name, family=family, **dict(rows=("3 i4x6 5", "2 i2x2 1 i8x4 6", "4")) | kw)


def _two(name: str, **kw: Any) -> Case:
    return _qwen("qwen2_vl", name, **kw)


def _windowed(name: str, **kw: Any) -> Case:
    return _qwen("qwen2_5_vl", name, **kw)


def _three(name: str, **kw: Any) -> Case:
    return _qwen("qwen3_vl", name, **kw)


def _both(name: str, **kw: Any) -> list[Case]:
    """The same case of the first and the last model."""
    return [_two(name, **kw), _three(name, **kw)]


def _every(name: str, **kw: Any) -> list[Case]:
    return [_qwen(family, name, **kw) for family in QWEN]


def _sections(sections: list[int], kind: str = "default", **numbers: Any) -> dict[str, Any]:
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=1e4, mrope_section=sections, **numbers))


STRETCH = dict(factor=4.0, original_max_position_embeddings=16)
WINDOW = dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)
CLIPS = ("v2x4x4 2", "3 v4x2x2 1 v1x6x2 2")
SIZED_CASES: tuple[Case, ...] = (
    *_every("plain"),
    *_every("one-kv-head", text=dict(num_key_value_heads=1)),
    *_every("image-and-video", rows=("2 i4x4 3 v2x4x6 1 i2x6 4", "1 v3x2x4 2", "5")),
    *_every("right-padding", padding="right"),
    # heads, widths, activations
    *_both("all-kv-heads", text=dict(num_attention_heads=6, num_key_value_heads=6)),
    _two("one-head", text=dict(num_attention_heads=1, num_key_value_heads=1) | _sections([8, 8, 8])),
    _three("one-head", text=dict(num_attention_heads=1, num_key_value_heads=1, head_dim=20) | _sections([4, 3, 3])),
    _three("wide-heads", text=dict(head_dim=32) | _sections([6, 5, 5])),
    _three("narrow-heads", text=dict(head_dim=4) | _sections([1, 1, 0])),
    _three("attention-bias", text=dict(attention_bias=True)),
    *_every("tied", root=dict(tie_word_embeddings=True)),
    *_both("gelu", text=dict(hidden_act="gelu"), vision=dict(hidden_act="silu")),
    *_every("large-epsilon", text=dict(rms_norm_eps=1e-2)),
    _two("one-layer", text=dict(num_hidden_layers=1), vision=dict(depth=1)),
    _three("one-layer", text=dict(num_hidden_layers=1), vision=dict(depth=1, deepstack_visual_indexes=[0])),
    # the tower
    *_both("merge-1", vision=dict(spatial_merge_size=1), rows=("3 i3x5 2", "i1x1 1 i1x4 6")),
    *_both("merge-3", vision=dict(spatial_merge_size=3), rows=("3 i3x6 2", "2 i9x3 1 v2x3x3 1")),
    *_both("temporal-1", vision=dict(temporal_patch_size=1), rows=("1 v3x2x4 2 i4x2 1",)),
    *_both("temporal-3", vision=dict(temporal_patch_size=3), rows=("1 v2x2x4 2 i4x2 1", "i2x2 3")),
    *_every("patch-2-grey", vision=dict(patch_size=2, in_channels=1)),
    *_every("patch-7-four-channels", vision=dict(patch_size=7, in_channels=4)),
    *_every("one-tower-head", vision=dict(num_heads=1)),
    *_every("eight-tower-heads", vision=dict(num_heads=8)),
    *_every("tower-rotary-base", vision=dict(rope_parameters=dict(rope_type="axial", rope_theta=50.0))),
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
    *_both("one-picture", rows=("3 i6x4 5",)),
    *_every("thin-pictures", rows=("1 i2x40 2", "2 i40x2 1", "i2x2 3")),
    *_every("many-pictures", rows=("1 i2x2 1 i4x2 2 i2x6 1", "i6x6 3", "4", "2 i2x4 1")),
    *_every("touching-wrappers", rows=("i2x4 i4x2 v2x2x2 i2x2", "i2x2 9")),
    *_every("nothing-but-pictures", rows=("i4x4", "i2x2 i2x4")),
    *_every("no-picture-at-all", rows=("5", "8")),
    *_every("no-picture-right-padding", rows=("5", "8", "2"), padding="right"),
    *_every("text-rows-between", rows=("4", "2 i4x6 1", "9", "i2x2 2")),
    *_every("videos", rows=CLIPS),
    *_every("videos-right-padding", rows=CLIPS, padding="right"),
    *_both("long-video", rows=("2 v9x2x2 3", "4 i2x4 5")),
    # rotary positions and windows
    *_both("rotary-base", text=dict(num_attention_heads=6, num_key_value_heads=3, head_dim=8) | _sections([2, 1, 1])),
    _two("four-sections", text=_sections([1, 1, 1, 1])),
    _two("six-sections", text=dict(num_attention_heads=3, num_key_value_heads=1) | _sections([1, 1, 1, 1, 2, 2])),
    _two("time-section-alone", text=_sections([4, 0, 0])),
    _three("uneven-sections", text=_sections([2, 1, 5])),
    _three("time-section-alone", text=_sections([8, 0, 0])),
    _two("yarn", text=_sections([1, 1, 2], "yarn", **STRETCH) | dict(max_position_embeddings=64)),
    _three("yarn", text=_sections([4, 2, 2], "yarn", **STRETCH) | dict(max_position_embeddings=64)),
    _two("yarn-scaled", text=_sections([1, 1, 2], "yarn", **STRETCH, attention_factor=1.7)),
    _two("linear", text=_sections([1, 1, 2], "linear", factor=3.0)),
    _two("window", text=WINDOW),
    _two("window-right-padding", text=WINDOW | dict(max_window_layers=0), padding="right"),
    _two("window-longer-than-rows", text=WINDOW | dict(sliding_window=200), rows=CLIPS),
    # windows and seconds
    _windowed("one-head", text=dict(num_attention_heads=1, num_key_value_heads=1) | _sections([8, 8, 8])),
    _windowed("gelu", text=dict(hidden_act="gelu"), vision=dict(hidden_act="gelu_pytorch_tanh")),
    _windowed("one-layer", text=dict(num_hidden_layers=1), vision=dict(depth=1, fullatt_block_indexes=[])),
    _windowed("merge-1", vision=dict(spatial_merge_size=1, window_size=11), rows=("3 i3x5 2", "i1x1 1 i1x4 6")),
    _windowed("merge-3", vision=dict(spatial_merge_size=3, window_size=25), rows=("3 i3x12 2", "2 i15x9 1 v2x3x9 1")),
    _windowed("temporal-1", vision=dict(temporal_patch_size=1), rows=("1 v3x2x8 2 i4x6 1",)),
    _windowed("temporal-3", vision=dict(temporal_patch_size=3), rows=("1 v2x6x4 2 i4x2 1", "i2x2 3")),
    _windowed("windows-everywhere", vision=dict(fullatt_block_indexes=[])),
    _windowed("windows-nowhere", vision=dict(fullatt_block_indexes=[0, 1, 2])),
    _windowed("window-of-one-token", vision=dict(window_size=8)),
    _windowed("window-no-multiple-of-a-patch", vision=dict(window_size=30), rows=("i8x14 3", "2 i10x6 1 i2x2 1")),
    _windowed("window-larger-than-pictures", vision=dict(window_size=400)),
    _windowed("full-layers-past-the-tower", vision=dict(fullatt_block_indexes=[2, 7, 15])),
    _windowed("one-picture", rows=("3 i10x6 5",)),
    _windowed("long-video", rows=("2 v9x2x2 3", "4 i2x4 5"), seconds=(0.7,)),
    _windowed("slow-videos", rows=CLIPS, seconds=(9.0, 0.1), vision=dict(tokens_per_second=3)),
    _windowed("videos-of-unknown-speed", rows=CLIPS, seconds=()),
    _windowed("time-section-alone", text=_sections([4, 0, 0]), rows=CLIPS),
    _windowed("yarn", text=_sections([1, 1, 2], "yarn", **STRETCH) | dict(max_position_embeddings=64)),
    _windowed("window", text=WINDOW),
)
