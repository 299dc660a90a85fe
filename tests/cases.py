"""The odd cases of every family (`tests/families.py`): what parity, hooks, caches and generation are all tested on."""

from __future__ import annotations

from typing import Any

from tests.cases_of_any_size import SIZED_CASES
from tests.families import (
    FULL,
    QWEN,
    SLIDE,
    TEXT,
    TILED,
    TOWER,
    Case,
    build_hf,
    counted,
    counted_inputs,
    hf_config,
    hf_model,
    native_model,
    raw_inputs,
    relative_error,
    tiny_tokenizer,
)
from tests.odd_inputs import IMAGE_TOKEN, PAD

__all__ = [
    "BY_NAME", "CASES", "IMAGE_TOKEN", "PAD", "QWEN", "TEXT", "TOWER", "Case", "build_hf", "counted", "counted_inputs",
    "hf_config", "hf_model", "native_model", "raw_inputs", "relative_error", "tiny_tokenizer",
]  # fmt: skip

# What tells a decoder or a tower from the family's own.
DECODERS: dict[str, dict[str, Any]] = dict(
    llama=dict(model_type="llama"),
    mistral=dict(model_type="mistral", sliding_window=None),
    qwen2=dict(model_type="qwen2"),
    qwen3=dict(model_type="qwen3", head_dim=8),
)
CLIP = dict(model_type="clip_vision_model")
SIGLIP = dict(model_type="siglip_vision_model")
SIGLIP_ROOT = dict(vision_feature_layer=-1, vision_feature_select_strategy="full")


def _rope(kind: str, **numbers: Any) -> dict[str, Any]:
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=10_000.0, **numbers))


LLAMA3 = _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=16)


def _llava(name: str, tower: str, decoder: str, **kw: Any) -> Case:
    kw["text"] = DECODERS[decoder] | kw.get("text", {})
    if tower == "siglip":
        kw |= dict(vision=SIGLIP | kw.get("vision", {}), root=SIGLIP_ROOT | kw.get("root", {}))
    return Case(name=name, **kw)


def _text(name: str, decoder: str, **kw: Any) -> Case:
    kw["text"] = DECODERS[decoder] | kw.get("text", {})
    return Case(name=name, family="text", **dict(rows=("9", "14", "4")) | kw)


LLAVA_CASES = (
    # towers and decoders
    _llava("clip-llama", "clip", "llama"),
    _llava("clip-mistral", "clip", "mistral"),
    _llava("clip-qwen2", "clip", "qwen2"),
    _llava("siglip-llama", "siglip", "llama"),
    _llava("siglip-mistral", "siglip", "mistral"),
    _llava("siglip-qwen2", "siglip", "qwen2"),
    # heads
    _llava("one-kv-head", "clip", "llama", text=dict(num_key_value_heads=1)),
    _llava("all-kv-heads", "clip", "mistral", text=dict(num_key_value_heads=6)),
    _llava("one-head", "clip", "qwen2", text=dict(num_attention_heads=1, num_key_value_heads=1)),
    _llava("wide-heads", "clip", "mistral", text=dict(head_dim=16)),
    _llava("narrow-heads", "siglip", "llama", text=dict(head_dim=4, num_key_value_heads=3)),
    _llava("wide-heads-qwen2", "clip", "qwen2", text=dict(head_dim=14)),
    # biases, activations, widths
    _llava("attention-bias", "clip", "llama", text=dict(attention_bias=True)),
    _llava("mlp-bias", "clip", "llama", text=dict(mlp_bias=True)),
    _llava(
        "both-biases-tied",
        "clip",
        "llama",
        text=dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
        root=dict(tie_word_embeddings=True),
    ),
    _llava("tied-qwen2", "siglip", "qwen2", text=dict(tie_word_embeddings=True), root=dict(tie_word_embeddings=True)),
    _llava("projector-without-bias", "clip", "llama", root=dict(multimodal_projector_bias=False)),
    _llava("projector-silu", "clip", "llama", root=dict(projector_hidden_act="silu")),
    _llava("text-gelu", "clip", "llama", text=dict(hidden_act="gelu"), vision=dict(hidden_act="gelu")),
    _llava("text-relu", "siglip", "mistral", text=dict(hidden_act="relu"), root=dict(projector_hidden_act="relu")),
    _llava(
        "text-gelu-tanh",
        "clip",
        "qwen2",
        text=dict(hidden_act="gelu_pytorch_tanh"),
        vision=dict(hidden_act="gelu_pytorch_tanh"),
    ),
    _llava("large-epsilons", "clip", "llama", text=dict(rms_norm_eps=1e-2), vision=dict(layer_norm_eps=1e-2)),
    # images and features
    _llava("image-30-patch-14", "clip", "llama", vision=dict(image_size=30)),
    _llava("image-28-patch-7", "clip", "qwen2", vision=dict(patch_size=7)),
    _llava("image-45-patch-7-siglip", "siglip", "llama", vision=dict(image_size=45, patch_size=7)),
    _llava("one-patch", "clip", "llama", vision=dict(image_size=15)),
    _llava("feature-list", "clip", "llama", root=dict(vision_feature_layer=[-2, 1])),
    _llava(
        "feature-list-full-ends",
        "clip",
        "mistral",
        root=dict(vision_feature_layer=[0, -1, 2], vision_feature_select_strategy="full"),
    ),
    _llava("feature-list-siglip", "siglip", "qwen2", root=dict(vision_feature_layer=[1, 3])),
    _llava("feature-last", "clip", "llama", root=dict(vision_feature_layer=-1)),
    _llava("feature-zero", "clip", "llama", root=dict(vision_feature_layer=[0])),
    _llava(
        "feature-minus-three-full",
        "clip",
        "qwen2",
        root=dict(vision_feature_layer=-3, vision_feature_select_strategy="full"),
    ),
    _llava("siglip-without-pooling-head", "siglip", "llama", vision=dict(vision_use_head=False)),
    _llava(
        "siglip-default-strategy",
        "siglip",
        "llama",
        root=dict(vision_feature_select_strategy="default"),
        vision=dict(patch_size=7),
    ),
    # rotary positions
    _llava("rope-linear", "clip", "llama", text=_rope("linear", factor=3.0)),
    _llava("rope-llama3", "clip", "llama", text=LLAMA3),
    _llava("rope-yarn", "clip", "mistral", text=dict(YARN, max_position_embeddings=64)),
    _llava(
        "rope-yarn-qwen2",
        "clip",
        "qwen2",
        text=_rope("yarn", factor=2.0, original_max_position_embeddings=32, beta_fast=16.0, beta_slow=2.0)
        | dict(max_position_embeddings=64),
    ),
    _llava("rope-dynamic", "clip", "llama", text=_rope("dynamic", factor=2.0)),
    _llava("rope-base", "siglip", "qwen2", text=dict(rope_parameters=dict(rope_type="default", rope_theta=1e6))),
    # sliding windows
    _llava("window-mistral", "clip", "mistral", text=dict(sliding_window=5)),
    _llava("window-longer-than-rows", "clip", "mistral", text=dict(sliding_window=200)),
    _llava(
        "window-qwen2",
        "clip",
        "qwen2",
        text=dict(use_sliding_window=True, sliding_window=4, max_window_layers=1, num_hidden_layers=3),
    ),
    # batches
    _llava("three-images-and-none", "clip", "llama", rows=("1 i 2 i i 3", "7", "2 i 4")),
    _llava("touching-images-first", "siglip", "mistral", rows=("i i 4", "1 i 9")),
    _llava("right-padding", "clip", "llama", rows=("3 i 5", "2 i 1 i 6", "4"), padding="right"),
    _llava("right-padding-window", "clip", "mistral", text=dict(sliding_window=4), padding="right"),
    _llava("one-row-no-padding", "clip", "llama", rows=("3 i 5",)),
    _llava("equal-rows", "clip", "qwen2", rows=("3 i 5", "5 i 3")),
    _llava("no-picture-at-all", "clip", "llama", rows=("5", "8")),
    # text alone
    _text("text-llama", "llama"),
    _text("text-llama-bias", "llama", text=dict(attention_bias=True, mlp_bias=True, num_key_value_heads=6)),
    _text("text-llama-tied-llama3", "llama", text=dict(LLAMA3, tie_word_embeddings=True)),
    _text("text-mistral", "mistral", text=dict(sliding_window=6, head_dim=10)),
    _text("text-mistral-right", "mistral", padding="right"),
    _text("text-qwen2", "qwen2"),
    _text("text-qwen2-window", "qwen2", text=dict(use_sliding_window=True, sliding_window=3, max_window_layers=0)),
    _text("text-qwen3", "qwen3"),
    _text(
        "text-qwen3-bias-tied-window",
        "qwen3",
        text=dict(
            attention_bias=True,
            tie_word_embeddings=True,
            head_dim=12,
            use_sliding_window=True,
            sliding_window=5,
            max_window_layers=1,
        ),
    ),
    _llava("clip-qwen3", "clip", "qwen3"),
    _text("text-one-token", "llama", rows=("1",)),
)


# --- any resolution ----------------------------------------------------------------------------------------
def _next(name: str, decoder: str, *rows: str, **kw: Any) -> Case:
    odd = dict(llama=dict(head_dim=16, attention_bias=True)).get(decoder, {})
    return Case(name=name, family="llava-next", rows=rows, text=DECODERS[decoder] | odd, **kw)


SEVERAL, LAST = dict(vision_feature_layer=[-2, 1]), dict(vision_feature_layer=-1)
NEXT_CASES = (
    _next("llama", "llama", "3 i40x75 5", "2 i90x30 1 i28x28 6", "4"),
    _next("mistral", "mistral", "3 i40x75 5", "2 i90x30 1 i28x28 6", "4 i200x1 1"),
    _next("qwen2", "qwen2", "1 i56x56 2", "5 i300x299 1"),
    _next("feature-list", "llama", "1 i13x57 4", "2 i29x83 1 i171x96 3", root=SEVERAL),
    _next("feature-list-mistral", "mistral", "1 i1x200 4", "i84x28 2", root=SEVERAL),
    _next("feature-list-qwen2", "qwen2", "2 i118x7 3 i28x28 1", root=SEVERAL),
    _next("feature-last", "llama", "2 i200x1 1", "3 i1x200 3", root=LAST),
    _next("feature-last-mistral", "mistral", "2 i56x56 1", "3", "1 i44x101 3 i150x160 1", root=LAST),
    _next("feature-last-qwen2", "qwen2", "2 i300x299 1 i13x57 2", "9", root=LAST),
    _next("right-padding", "llama", "2 i40x75 1", "3 i29x83 2 i90x30 1", padding="right"),
    _next("small-pictures", "mistral", "2 i1x1 1 i2x2 3", "1 i3x29 2"),
    _next("touching-pictures", "qwen2", "1 i28x28 i84x28 1", "i61x30 i40x75 2"),
    _next("no-picture-at-all", "llama", "5", "8"),
)


def _onevision(name: str, **kw: Any) -> Case:
    vision = kw.pop("vision", {})
    if "model_type" not in vision:
        vision = dict(vision_use_head=False) | vision
    rows = ("3 i40x75 5", "2 i30x30 1 i100x20 6", "4")
    return Case(name=name, family="onevision", vision=vision, **dict(rows=rows) | kw)


def _max(tiles: int) -> dict[str, Any]:
    return dict(vision_aspect_ratio=f"anyres_max_{tiles}")


FINE = dict(image_size=28, patch_size=7)  # tiles of 4 x 4 features
ODD_SIDE = dict(image_size=35, patch_size=7)  # of 5 x 5, in frames 3 x 3
ODD_PINS = dict(image_grid_pinpoints=[[35 * a, 35 * b] for a in range(1, 4) for b in range(1, 4)])
VIDEOS = ("2 v3 4", "v3 1 v3 2", "5")
ONEVISION_CASES = (
    _onevision("plain"),
    _onevision("tied", text=dict(tie_word_embeddings=True)),
    _onevision("tied-at-the-root", root=dict(tie_word_embeddings=True)),
    _onevision("one-kv-head", text=dict(num_key_value_heads=1)),
    _onevision("all-kv-heads", text=dict(num_key_value_heads=6), vision=dict(hidden_act="gelu")),
    _onevision("one-layer", text=dict(num_hidden_layers=1), vision=dict(num_hidden_layers=1)),
    # grids that are resampled
    _onevision("resampled", vision=FINE, root=_max(2), rows=("3 i50x75 5", "1 i100x90 2 ", "2 i28x28 1")),
    _onevision("resampled-to-one-tile", vision=FINE, root=_max(1), rows=("3 i50x75 5", "1 i110x110 2", "4")),
    _onevision("resampled-pairs", vision=FINE, root=_max(3), rows=("i50x110 1", "i110x40 2"), padding="right"),
    _onevision("nine-tiles", rows=("2 i112x112 1", "3 i112x90 2"), root=_max(9)),
    # the tower
    _onevision("odd-side", vision=ODD_SIDE, root=_max(2) | ODD_PINS, rows=("1 i70x80 2", "v2 3 i20x99 1")),
    _onevision("feature-list", root=dict(vision_feature_layer=[-2, 1])),
    _onevision("inner-feature-layer", root=dict(vision_feature_layer=-2)),
    _onevision("pooling-head", vision=dict(vision_use_head=True)),
    _onevision(
        "clip",
        vision=dict(CLIP),
        root=dict(vision_feature_select_strategy="default", vision_feature_layer=-2),
        rows=("3 i40x75 5", "2 v2 1", "2 i30x30 1 i100x20 6"),
    ),
    _onevision("projector", root=dict(multimodal_projector_bias=False, projector_hidden_act="silu")),
    # batches
    _onevision("all-in-tiles", says_numbers=False),
    _onevision("right-padding", padding="right"),
    _onevision("many-pictures", rows=("1 i28x28 1 i40x20 2 i9x99 1", "i70x60 3", "4", "2 i20x40 1")),
    _onevision("touching-pictures", rows=("1 i40x30 i90x30 2", "i50x50 4")),
    _onevision("thin-pictures", rows=("1 i1x100 2", "i100x1 1", "2 i3x3 1")),
    _onevision("videos", rows=VIDEOS),
    _onevision("videos-right-padding", rows=VIDEOS, padding="right", vision=FINE),
    _onevision("image-and-video", rows=("2 i40x75 3 v2 1 i30x30 4", "1 v2 2 i56x28 1", "5")),
    _onevision("touching-kinds", rows=("i40x75 v2 v2 i30x30 2", "v2 i20x90 3")),
    _onevision("no-picture-at-all", rows=("5", "8")),
    # the decoder
    _onevision("window", text=dict(use_sliding_window=True, sliding_window=6, max_window_layers=1)),
    _onevision("rotary-base", text=dict(rope_parameters=dict(rope_type="default", rope_theta=1e6))),
)


# --- images that read themselves both ways -------------------------------------------------------------------
def _gemma(name: str, **kw: Any) -> Case:
    return Case(name=name, family="gemma3", **dict(rows=("3 i 5", "2 i 1 i 6", "4")) | kw)


def _gemma_text(name: str, **kw: Any) -> Case:
    return Case(name=name, family="gemma3-text", **dict(rows=("9", "14", "4")) | kw)


def _gemma_rope(full: dict[str, Any], slides: dict[str, Any] | None = None) -> dict[str, Any]:
    return dict(rope_parameters={FULL: full, SLIDE: slides or dict(rope_type="default", rope_theta=1e2)})


GEMMA_CASES = (
    _gemma("plain"),
    # layers and windows
    _gemma("all-slide", text=dict(layer_types=[SLIDE] * 3)),
    _gemma("none-slides", text=dict(layer_types=[FULL] * 3)),
    _gemma("narrow-window", text=dict(sliding_window=2)),  # narrower than an image
    _gemma("wide-window", text=dict(sliding_window=200)),
    _gemma("pattern", text=dict(layer_types=None, num_hidden_layers=7, sliding_window=4)),
    # rotary positions
    _gemma("scaled-rope", text=_gemma_rope(dict(rope_type="linear", rope_theta=1e6, factor=8.0))),
    _gemma("both-bases", text=_gemma_rope(dict(rope_type="default", rope_theta=50.0), dict(rope_theta=7.0))),
    # heads, norms, widths
    _gemma("one-kv-head", text=dict(num_key_value_heads=1)),
    _gemma("all-kv-heads", text=dict(num_key_value_heads=4, head_dim=14, query_pre_attn_scalar=5)),
    _gemma("one-head", text=dict(num_attention_heads=1, num_key_value_heads=1, head_dim=20)),
    _gemma("large-epsilons", text=dict(rms_norm_eps=1e-2), vision=dict(layer_norm_eps=1e-2)),
    _gemma("attention-bias", text=dict(attention_bias=True)),
    _gemma("untied", text=dict(tie_word_embeddings=False), root=dict(tie_word_embeddings=False)),
    _gemma("silu", text=dict(hidden_activation="silu"), vision=dict(hidden_act="gelu")),
    # images
    _gemma("a-token-a-patch", root=dict(mm_tokens_per_image=16)),
    _gemma("one-token", root=dict(mm_tokens_per_image=1)),
    _gemma(
        "many-tokens", root=dict(mm_tokens_per_image=9), vision=dict(image_size=19, patch_size=3, vision_use_head=True)
    ),
    _gemma("touching-pictures", rows=("b b 3", "1 b i b 2")),
    _gemma("ends-with-a-picture", rows=("5 b", "2 i")),
    _gemma("unequal-rows", rows=("1 i 2 i i 3", "7", "2 i 4", "i 1")),
    _gemma("right-padding", padding="right"),
    _gemma("no-padding", rows=("3 i 5", "5 i 3")),
    _gemma("no-picture-at-all", rows=("5", "8")),
    # text alone
    _gemma_text("plain"),
    _gemma_text("right", padding="right", text=dict(attention_bias=True)),
    _gemma_text("untied", text=dict(tie_word_embeddings=False, query_pre_attn_scalar=8)),
    _gemma_text("one-row", rows=("12",), text=_gemma_rope(dict(rope_type="linear", rope_theta=1e5, factor=4.0))),
)


# --- tiles -------------------------------------------------------------------------------------------------
def _tile(name: str, family: str = "idefics3", **kw: Any) -> Case:
    return Case(name=name, family=family, **dict(rows=("3 t1x2 5", "2 i 1 i9x16 6", "4")) | kw)


def _tiled(name: str, **kw: Any) -> list[Case]:
    """The same case of both models."""
    return [_tile(name, family, **kw) for family in TILED]


TILE_CASES = (
    *_tiled("plain"),
    *_tiled("tied", root=dict(tie_word_embeddings=True), text=dict(tie_word_embeddings=True)),
    *_tiled("unequal-pictures", rows=("2 t2x1 1 t1x3 2 i 1", "1 i 3", "t2x2 4", "6"), vision=dict(num_hidden_layers=1)),
    _tile("right-padding", padding="right", family="smolvlm"),
    _tile("no-mask", has_mask=False, rows=("1 i 2 t2x2 3", "i i 1")),
    _tile("smaller-pictures", rows=("1 i1x16 2 i16x1 1", "i5x9 3 i13x12 1"), vision=dict(image_size=17)),
    _tile("long-names", n_name=5, rows=("1 t2x2 i 2", "3 i t1x2 1"), family="smolvlm"),
    _tile("no-markers", rows=("3 b 2 b b 1", "b 4")),
    _tile("no-picture-at-all", rows=("5", "8"), family="smolvlm"),
    # sides: 3 patches of 6 are joined, 4 of 4, 5 of 25 (whose patches do not all get their own place)
    _tile("scale-1", root=dict(scale_factor=1), rows=("2 t1x2 2", "i5x7 1")),
    _tile("scale-3", root=dict(scale_factor=3), vision=dict(image_size=25), rows=("2 t1x2 2", "1 i17x9 1")),
    _tile("one-token-a-tile", root=dict(scale_factor=4), rows=("2 t2x3 2", "i 1 i"), family="smolvlm"),
    _tile(
        "side-25",
        vision=dict(image_size=25, patch_size=1, num_hidden_layers=1),
        root=dict(scale_factor=5),
        rows=("i 2", "1 i19x7 1"),
    ),
    # heads, biases, activations
    _tile("one-kv-head", text=dict(num_key_value_heads=1, head_dim=10), family="smolvlm"),
    _tile("biases", text=dict(attention_bias=True, mlp_bias=True, num_key_value_heads=6) | LLAMA3),
    _tile("one-tower-head", vision=dict(num_attention_heads=1, hidden_act="gelu", layer_norm_eps=1e-2)),
    _tile("mistral", text=dict(model_type="mistral", sliding_window=7), family="smolvlm"),
    _tile("qwen2", text=dict(model_type="qwen2")),
    _tile("many-patches", vision=dict(patch_size=2), root=dict(scale_factor=4), family="smolvlm"),
)

CASES: tuple[Case, ...] = LLAVA_CASES + NEXT_CASES + ONEVISION_CASES + GEMMA_CASES + SIZED_CASES + TILE_CASES
BY_NAME = {str(case): case for case in CASES}
