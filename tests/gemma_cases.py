"""The odd tiny Gemma-3 models: layers that slide and layers that do not, images that read themselves both ways.

A `GemmaCase` stands where a `Case` does: `hf_config`, `build_hf`, `hf_model`, `native_model` and `raw_inputs` of
`tests/cases.py` take both.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

PAD, START, END, IMAGE = 0, 120, 121, 127
SLIDE, FULL = "sliding_attention", "full_attention"
TEXT: Mapping[str, Any] = dict(
    hidden_size=48,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=128,
    max_position_embeddings=256,
    sliding_window=6,
    layer_types=[SLIDE, FULL, SLIDE],
    query_pre_attn_scalar=11,
)
TOWER: Mapping[str, Any] = dict(
    model_type="siglip_vision_model",
    hidden_size=24,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=30,
    patch_size=7,
    vision_use_head=False,
)


@dataclass(frozen=True, eq=False, kw_only=True)
class GemmaCase:
    """A tiny model and a batch. `tokens`: image tokens of an image; None for a model of text alone.

    rows: a string a row; a number is text tokens, "i" an image between its start and end tokens, "b" its bare tokens
    (two of them touch)."""

    name: str
    text: Mapping[str, Any] = field(default_factory=dict)
    vision: Mapping[str, Any] = field(default_factory=dict)
    root: Mapping[str, Any] = field(default_factory=dict)
    tokens: int | None = 4
    rows: tuple[str, ...] = ("3 i 5", "2 i 1 i 6", "4")
    padding: str = "left"

    def __str__(self) -> str:
        return f"gemma3-{self.name}"

    def text_only(self) -> bool:
        return not any(word in "ib" for row in self.rows for word in row.split())

    def config(self) -> Any:
        """The Hugging Face configuration."""
        text = {**TEXT, **copy.deepcopy(dict(self.text))}
        if self.tokens is None:
            return transformers.Gemma3TextConfig(**text)
        return transformers.Gemma3Config(
            text_config=text,
            vision_config={**TOWER, **copy.deepcopy(dict(self.vision))},
            mm_tokens_per_image=self.tokens,
            image_token_index=IMAGE,
            boi_token_index=START,
            eoi_token_index=END,
            **copy.deepcopy(dict(self.root)),
        )

    @property
    def model_class(self) -> Any:
        return transformers.Gemma3ForCausalLM if self.tokens is None else transformers.Gemma3ForConditionalGeneration

    def raw(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """What a processor would emit for the rows; a model of text gets no types, and no batch without an image."""
        generator = torch.Generator().manual_seed(2)
        rows = []
        for row in self.rows:
            ids: list[int] = []
            for word in row.split():
                if word.isdigit():
                    ids += torch.randint(3, 100, (int(word),), generator=generator).tolist()
                else:
                    image = [IMAGE] * (self.tokens or 0)
                    ids += [START, *image, END] if word == "i" else image
            rows.append(ids)
        length = max(map(len, rows))
        tokens, mask = torch.full((len(rows), length), PAD), torch.zeros(len(rows), length, dtype=torch.long)
        for i, ids in enumerate(rows):
            at = slice(length - len(ids), length) if self.padding == "left" else slice(0, len(ids))
            tokens[i, at], mask[i, at] = torch.tensor(ids), 1
        raw = dict(input_ids=tokens, attention_mask=mask)
        if not self.text_only():
            n, side = (
                sum(word in "ib" for row in self.rows for word in row.split()),
                self.config().vision_config.image_size,
            )
            raw["pixel_values"] = torch.randn(n, 3, side, side, generator=generator, dtype=torch.float64).to(dtype)
            raw["token_type_ids"] = (tokens == IMAGE).long()
        return raw


def after_norm(model: Any, cache: Any, layer: int, part: str, value: Tensor) -> Tensor:
    """What becomes of [batch pos ... d_model] in the norm that follows attention ("ln1_post") or MLP, given the run's
    denominator: the value itself where there is none."""
    if not model.cfg.post_norms:
        return value
    scale = cache[f"blocks.{layer}.{part}.hook_scale"]
    return value / scale.view(*scale.shape[:2], *[1] * (value.ndim - 2)) * getattr(model.blocks[layer], part).w


def _rope(full: dict[str, Any], slides: dict[str, Any] | None = None) -> dict[str, Any]:
    rules = {FULL: full, SLIDE: slides or dict(rope_type="default", rope_theta=1e2)}
    return dict(rope_parameters=rules)


def _text(name: str, **kw: Any) -> GemmaCase:
    return GemmaCase(name=f"text-{name}", tokens=None, rows=kw.pop("rows", ("9", "14", "4")), **kw)


GEMMA_CASES: tuple[GemmaCase, ...] = (
    GemmaCase(name="plain"),
    # layers and windows
    GemmaCase(name="all-slide", text=dict(layer_types=[SLIDE] * 3)),
    GemmaCase(name="none-slides", text=dict(layer_types=[FULL] * 3)),
    GemmaCase(name="narrow-window", text=dict(sliding_window=2)),  # narrower than an image
    GemmaCase(name="wide-window", text=dict(sliding_window=200)),
    GemmaCase(name="pattern", text=dict(layer_types=None, num_hidden_layers=7, sliding_window=4)),
    # rotary positions
    GemmaCase(name="scaled-rope", text=_rope(dict(rope_type="linear", rope_theta=1e6, factor=8.0))),
    GemmaCase(name="both-bases", text=_rope(dict(rope_type="default", rope_theta=50.0), dict(rope_theta=7.0))),
    # heads, norms, widths
    GemmaCase(name="one-kv-head", text=dict(num_key_value_heads=1)),
    GemmaCase(name="all-kv-heads", text=dict(num_key_value_heads=4, head_dim=14, query_pre_attn_scalar=5)),
    GemmaCase(name="one-head", text=dict(num_attention_heads=1, num_key_value_heads=1, head_dim=20)),
    GemmaCase(name="large-epsilons", text=dict(rms_norm_eps=1e-2), vision=dict(layer_norm_eps=1e-2)),
    GemmaCase(name="attention-bias", text=dict(attention_bias=True)),
    GemmaCase(name="untied", text=dict(tie_word_embeddings=False), root=dict(tie_word_embeddings=False)),
    GemmaCase(name="silu", text=dict(hidden_activation="silu"), vision=dict(hidden_act="gelu")),
    # images
    GemmaCase(name="a-token-a-patch", tokens=16),
    GemmaCase(name="one-token", tokens=1),
    GemmaCase(name="many-tokens", tokens=9, vision=dict(image_size=19, patch_size=3, vision_use_head=True)),
    GemmaCase(name="touching-pictures", rows=("b b 3", "1 b i b 2")),
    GemmaCase(name="ends-with-a-picture", rows=("5 b", "2 i")),
    GemmaCase(name="unequal-rows", rows=("1 i 2 i i 3", "7", "2 i 4", "i 1")),
    GemmaCase(name="right-padding", padding="right"),
    GemmaCase(name="no-padding", rows=("3 i 5", "5 i 3")),
    GemmaCase(name="no-picture-at-all", rows=("5", "8")),
    # text alone
    _text("plain"),
    _text("right", padding="right", text=dict(attention_bias=True)),
    _text("untied", text=dict(tie_word_embeddings=False, query_pre_attn_scalar=8)),
    _text("one-row", rows=("12",), text=_rope(dict(rope_type="linear", rope_theta=1e5, factor=4.0))),
)
GEMMA_BY_NAME = {str(case): case for case in GEMMA_CASES}
