"""The odd tiny LLaVA-OneVision models: images in tiles, several of one tile each, frames of videos.

An `OnevisionCase` stands where a `Case` does: `hf_config`, `build_hf`, `hf_model`, `native_model` and `raw_inputs` of
`tests/cases.py` take both.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.cases import IMAGE_TOKEN, PAD, TEXT, TOWER

VIDEO_TOKEN = 126
PINS = [[28 * a, 28 * b] for a in range(1, 5) for b in range(1, 5)]


@dataclass(frozen=True, eq=False, kw_only=True)
class OnevisionCase:
    """A tiny model and a batch.

    rows: a string a row; a number is text tokens, "i40x75" an image of 40 rows of 75 pixels, "v3" a video of three
    frames. `says_numbers`: the processor's batch_num_images is passed on, so that images that share a row are one
    tile each."""

    name: str
    text: Mapping[str, Any] = field(default_factory=dict)
    vision: Mapping[str, Any] = field(default_factory=dict)
    root: Mapping[str, Any] = field(default_factory=dict)
    tower: str = "siglip"
    pins: tuple[tuple[int, int], ...] = ()
    rows: tuple[str, ...] = ("3 i40x75 5", "2 i30x30 1 i100x20 6", "4")
    padding: str = "left"
    says_numbers: bool = True

    def __str__(self) -> str:
        return f"onevision-{self.name}"

    def text_only(self) -> bool:
        return not any(word[0] in "iv" for row in self.rows for word in row.split())

    def config(self) -> Any:
        """The Hugging Face configuration."""
        vision: dict[str, Any] = {**TOWER, **copy.deepcopy(dict(self.vision))}
        if self.tower == "siglip":
            vision.setdefault("vision_use_head", False)
        kind = transformers.SiglipVisionConfig if self.tower == "siglip" else transformers.CLIPVisionConfig
        return transformers.LlavaOnevisionConfig(
            vision_config=kind(**vision),
            text_config=transformers.Qwen2Config(**{**TEXT, **copy.deepcopy(dict(self.text))}),
            image_token_index=IMAGE_TOKEN,
            video_token_index=VIDEO_TOKEN,
            image_grid_pinpoints=[list(p) for p in self.pins] or PINS,
            **copy.deepcopy(dict(self.root)),
        )

    @property
    def model_class(self) -> Any:
        return transformers.LlavaOnevisionForConditionalGeneration

    def raw(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """What a processor would emit for the rows, counted by Hugging Face's own processor."""
        config = self.config()
        generator = torch.Generator().manual_seed(2)
        side, patch = config.vision_config.image_size, config.vision_config.patch_size
        grid = side // patch
        counter = token_counter(config)
        sizes: list[tuple[int, int]] = []
        tiles, numbers, videos, rows = [], [], [], []
        for row in self.rows:
            words = row.split()
            several = self.says_numbers and sum(word[0] == "i" for word in words) > 1
            numbers.append(sum(word[0] == "i" for word in words))
            ids: list[int] = []
            for word in words:
                if word[0] == "i":
                    height, width = (int(n) for n in word[1:].split("x"))
                    sizes.append((height, width))
                    best = transformers.image_processing_utils.select_best_resolution(
                        (height, width), config.image_grid_pinpoints
                    )
                    n = 1 if several else 1 + math.ceil(best[0] / side) * math.ceil(best[1] / side)
                    tiles.append(torch.randn(n, 3, side, side, generator=generator, dtype=torch.float64))
                    n = grid**2 + 1 if several else counter._get_number_of_features(height, width, side, side)
                    ids += [IMAGE_TOKEN] * n
                elif word[0] == "v":
                    frames = int(word[1:])
                    videos.append(torch.randn(frames, 3, side, side, generator=generator, dtype=torch.float64))
                    ids += [VIDEO_TOKEN] * (frames * math.ceil(grid / 2) ** 2 + 1)
                else:
                    ids += torch.randint(3, 100, (int(word),), generator=generator).tolist()
            rows.append(ids)
        length = max(map(len, rows))
        tokens, mask = torch.full((len(rows), length), PAD), torch.zeros(len(rows), length, dtype=torch.long)
        for i, ids in enumerate(rows):
            at = slice(length - len(ids), length) if self.padding == "left" else slice(0, len(ids))
            tokens[i, at], mask[i, at] = torch.tensor(ids), 1
        raw = dict(input_ids=tokens, attention_mask=mask)
        if tiles:
            most = max(map(len, tiles))
            padded = [torch.cat([t, t.new_zeros(most - len(t), *t.shape[1:])]) for t in tiles]
            raw |= dict(pixel_values=torch.stack(padded).to(dtype), image_sizes=torch.tensor(sizes))
            if self.says_numbers:  # rows without an image are left out, as the processor does
                raw["batch_num_images"] = torch.tensor([n for n in numbers if n])
        if videos:
            raw["pixel_values_videos"] = torch.stack(videos).to(dtype)
        return raw


def token_counter(config: Any) -> Any:
    """Hugging Face's processor as far as it counts tokens."""
    from types import SimpleNamespace

    counter = object.__new__(transformers.LlavaOnevisionProcessor)
    counter.image_processor = SimpleNamespace(image_grid_pinpoints=config.image_grid_pinpoints)
    counter.num_image_tokens = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    counter.vision_aspect_ratio = config.vision_aspect_ratio
    return counter


def _case(name: str, **kw: Any) -> OnevisionCase:
    return OnevisionCase(name=name, **kw)


def _max(tiles: int) -> dict[str, Any]:
    return dict(vision_aspect_ratio=f"anyres_max_{tiles}")


FINE = dict(image_size=28, patch_size=7)  # tiles of 4 x 4 features
ODD_SIDE = dict(image_size=35, patch_size=7)  # of 5 x 5, in frames 3 x 3
ODD_PINS = tuple((35 * a, 35 * b) for a in range(1, 4) for b in range(1, 4))
VIDEOS = ("2 v3 4", "v3 1 v3 2", "5")

ONEVISION_CASES: tuple[OnevisionCase, ...] = (
    _case("plain"),
    _case("tied", text=dict(tie_word_embeddings=True)),
    _case("tied-at-the-root", root=dict(tie_word_embeddings=True)),
    _case("one-kv-head", text=dict(num_key_value_heads=1)),
    _case("all-kv-heads", text=dict(num_key_value_heads=6), vision=dict(hidden_act="gelu")),
    _case("one-layer", text=dict(num_hidden_layers=1), vision=dict(num_hidden_layers=1)),
    # grids that are resampled
    _case("resampled", vision=FINE, root=_max(2), rows=("3 i50x75 5", "1 i100x90 2 ", "2 i28x28 1")),
    _case("resampled-to-one-tile", vision=FINE, root=_max(1), rows=("3 i50x75 5", "1 i110x110 2", "4")),
    _case("resampled-pairs", vision=FINE, root=_max(3), rows=("i50x110 1", "i110x40 2"), padding="right"),
    _case("nine-tiles", rows=("2 i112x112 1", "3 i112x90 2"), root=_max(9)),
    # the tower
    _case("odd-side", vision=ODD_SIDE, pins=ODD_PINS, root=_max(2), rows=("1 i70x80 2", "v2 3 i20x99 1")),
    _case("feature-list", root=dict(vision_feature_layer=[-2, 1])),
    _case("inner-feature-layer", root=dict(vision_feature_layer=-2)),
    _case("pooling-head", vision=dict(vision_use_head=True)),
    _case(
        "clip",
        tower="clip",
        root=dict(vision_feature_select_strategy="default", vision_feature_layer=-2),
        rows=("3 i40x75 5", "2 v2 1", "2 i30x30 1 i100x20 6"),
    ),
    _case("projector", root=dict(multimodal_projector_bias=False, projector_hidden_act="silu")),
    # batches
    _case("all-in-tiles", says_numbers=False),
    _case("right-padding", padding="right"),
    _case("many-pictures", rows=("1 i28x28 1 i40x20 2 i9x99 1", "i70x60 3", "4", "2 i20x40 1")),
    _case("touching-pictures", rows=("1 i40x30 i90x30 2", "i50x50 4")),
    _case("thin-pictures", rows=("1 i1x100 2", "i100x1 1", "2 i3x3 1")),
    _case("videos", rows=VIDEOS),
    _case("videos-right-padding", rows=VIDEOS, padding="right", vision=FINE),
    _case("image-and-video", rows=("2 i40x75 3 v2 1 i30x30 4", "1 v2 2 i56x28 1", "5")),
    _case("touching-kinds", rows=("i40x75 v2 v2 i30x30 2", "v2 i20x90 3")),
    _case("no-picture-at-all", rows=("5", "8")),
    # the decoder
    _case("window", text=dict(use_sliding_window=True, sliding_window=6, max_window_layers=1)),
    _case("rotary-base", text=dict(rope_parameters=dict(rope_type="default", rope_theta=1e6))),
)
ONEVISION_BY_NAME = {str(case): case for case in ONEVISION_CASES}
