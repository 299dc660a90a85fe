"""One table of odd tiny models: what parity, hooks, cache and generation are all tested on.

A `Case` is a Hugging Face configuration and the rows of a batch. Every parameter is shaken after building,
since a fresh model has norm weights of 1 and biases of 0, which hide a norm that is missing or swapped.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor

IMAGE_TOKEN = 127
PAD = 0
TEXT = dict(
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    vocab_size=128,
    max_position_embeddings=256,
)
TOWER = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=14
)
TEXT_CONFIGS: Mapping[str, Any] = dict(
    llama=transformers.LlamaConfig,
    mistral=transformers.MistralConfig,
    qwen2=transformers.Qwen2Config,
    qwen3=transformers.Qwen3Config,
)
TEXT_MODELS: Mapping[str, Any] = dict(
    llama=transformers.LlamaForCausalLM,
    mistral=transformers.MistralForCausalLM,
    qwen2=transformers.Qwen2ForCausalLM,
    qwen3=transformers.Qwen3ForCausalLM,
)
NO_WINDOW: Mapping[str, Mapping[str, Any]] = dict(
    llama={}, mistral=dict(sliding_window=None), qwen2={}, qwen3=dict(head_dim=8)
)


@dataclass(frozen=True, eq=False, kw_only=True)
class Case:
    """A tiny model and a batch. `rows`: a string a row, numbers are text tokens, "i" is an image."""

    name: str
    decoder: str = "llama"
    tower: str | None = "clip"
    text: Mapping[str, Any] = field(default_factory=dict)
    vision: Mapping[str, Any] = field(default_factory=dict)
    llava: Mapping[str, Any] = field(default_factory=dict)
    rows: tuple[str, ...] = ("3 i 5", "2 i 1 i 6")
    padding: str = "left"

    def __str__(self) -> str:
        return self.name

    @property
    def n_images(self) -> int:
        return sum(row.split().count("i") for row in self.rows)

    @property
    def tokens_per_image(self) -> int:
        """Image tokens of one image, counted as Hugging Face counts features."""
        vision = {**TOWER, **self.vision}
        patches = (vision["image_size"] // vision["patch_size"]) ** 2
        keeps_all = self.llava.get("vision_feature_select_strategy", "default") == "full"
        return patches + (self.tower == "clip") - (not keeps_all)

    @property
    def image_size(self) -> int:
        return {**TOWER, **self.vision}["image_size"]

    def text_only(self) -> bool:
        return self.tower is None


def _llava(name: str, tower: str, decoder: str, **kw: Any) -> Case:
    if tower == "siglip":
        kw["llava"] = dict(vision_feature_layer=-1, vision_feature_select_strategy="full") | kw.get("llava", {})
    return Case(name=name, tower=tower, decoder=decoder, **kw)


def _text(name: str, decoder: str, **kw: Any) -> Case:
    return Case(name=name, tower=None, decoder=decoder, rows=kw.pop("rows", ("9", "14", "4")), **kw)


def _rope(kind: str, **numbers: Any) -> dict[str, Any]:
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=10_000.0, **numbers))


LLAMA3 = _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=16)

CASES: tuple[Case, ...] = (
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
        llava=dict(tie_word_embeddings=True),
    ),
    _llava("tied-qwen2", "siglip", "qwen2", text=dict(tie_word_embeddings=True), llava=dict(tie_word_embeddings=True)),
    _llava("projector-without-bias", "clip", "llama", llava=dict(multimodal_projector_bias=False)),
    _llava("projector-silu", "clip", "llama", llava=dict(projector_hidden_act="silu")),
    _llava("text-gelu", "clip", "llama", text=dict(hidden_act="gelu"), vision=dict(hidden_act="gelu")),
    _llava("text-relu", "siglip", "mistral", text=dict(hidden_act="relu"), llava=dict(projector_hidden_act="relu")),
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
    _llava("feature-list", "clip", "llama", llava=dict(vision_feature_layer=[-2, 1])),
    _llava(
        "feature-list-full-ends",
        "clip",
        "mistral",
        llava=dict(vision_feature_layer=[0, -1, 2], vision_feature_select_strategy="full"),
    ),
    _llava("feature-list-siglip", "siglip", "qwen2", llava=dict(vision_feature_layer=[1, 3])),
    _llava("feature-last", "clip", "llama", llava=dict(vision_feature_layer=-1)),
    _llava("feature-zero", "clip", "llama", llava=dict(vision_feature_layer=[0])),
    _llava(
        "feature-minus-three-full",
        "clip",
        "qwen2",
        llava=dict(vision_feature_layer=-3, vision_feature_select_strategy="full"),
    ),
    _llava("siglip-without-pooling-head", "siglip", "llama", vision=dict(vision_use_head=False)),
    _llava(
        "siglip-default-strategy",
        "siglip",
        "llama",
        llava=dict(vision_feature_select_strategy="default"),
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
BY_NAME = {case.name: case for case in CASES}


def hf_config(case: Any) -> Any:
    """The Hugging Face configuration of a case (a `Case`, or one that makes its own)."""
    if not isinstance(case, Case):
        return case.config()
    text = TEXT_CONFIGS[case.decoder](**{**TEXT, **NO_WINDOW[case.decoder], **copy.deepcopy(dict(case.text))})
    if case.tower is None:
        return text
    kind = transformers.CLIPVisionConfig if case.tower == "clip" else transformers.SiglipVisionConfig
    return transformers.LlavaConfig(
        vision_config=kind(**{**TOWER, **case.vision}),
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        **copy.deepcopy(dict(case.llava)),
    )


def build_hf(case: Any, dtype: torch.dtype = torch.float64, gain: float = 1.0) -> Any:
    """A fresh Hugging Face model of a case, its parameters shaken, the same numbers at every call.

    `gain` multiplies the decoder's attention and MLP: what it says then depends on its whole context."""
    if not isinstance(case, Case):
        cls = case.model_class
    else:
        cls = TEXT_MODELS[case.decoder] if case.tower is None else transformers.LlavaForConditionalGeneration
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cls._from_config(hf_config(case), attn_implementation="sdpa").to(torch.float64).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * (0.2 if p.ndim == 1 else 0.05))
        for name, p in model.named_parameters():
            if "vision" not in name and "visual" not in name and ("self_attn" in name or "mlp" in name):
                p.mul_(gain)
    return model.to(dtype)


@cache
def hf_model(case: Any, dtype: torch.dtype = torch.float64) -> Any:
    """The Hugging Face model of a case, built once a run: do not edit it."""
    return build_hf(case, dtype)


@cache
def native_model(case: Any, dtype: torch.dtype = torch.float64, casts: str = "hf") -> Any:
    """The native model of a case, built once a run; the fixture `model_of` checks that no hook is left on it."""
    from veena_lens import HookedVLM

    return HookedVLM.from_hf(hf_model(case, dtype), casts=casts)


def raw_inputs(case: Any, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """What a processor would emit for the case's rows: ids, mask and, where there are images, pixels."""
    if not isinstance(case, Case):
        return case.raw(dtype)
    generator = torch.Generator().manual_seed(2)
    rows = []
    for row in case.rows:
        ids: list[int] = []
        for word in row.split():
            if word == "i":
                ids += [IMAGE_TOKEN] * case.tokens_per_image
            else:
                ids += torch.randint(3, 100, (int(word),), generator=generator).tolist()
        rows.append(ids)
    length = max(map(len, rows))
    tokens, mask = torch.full((len(rows), length), PAD), torch.zeros(len(rows), length, dtype=torch.long)
    for i, ids in enumerate(rows):
        at = slice(length - len(ids), length) if case.padding == "left" else slice(0, len(ids))
        tokens[i, at], mask[i, at] = torch.tensor(ids), 1
    raw = dict(input_ids=tokens, attention_mask=mask)
    if case.n_images:
        side = case.image_size
        raw["pixel_values"] = torch.randn(case.n_images, 3, side, side, generator=generator, dtype=torch.float64)
        raw["pixel_values"] = raw["pixel_values"].to(dtype)
    return raw


def counted(raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same inputs with positions counted over real tokens, so that a padded row equals the row alone."""
    positions = (raw["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return dict(raw, position_ids=positions)


def relative_error(ours: Tensor, theirs: Tensor, keep: Tensor | None = None) -> float:
    """max|a - b| / max|b|, over the positions that `keep` marks."""
    assert ours.shape == theirs.shape, f"shapes differ: {tuple(ours.shape)} and {tuple(theirs.shape)}"
    if keep is not None:
        ours, theirs = ours[keep.bool()], theirs[keep.bool()]
    ours, theirs = ours.detach().double(), theirs.detach().double()
    difference = (ours - theirs).abs().max()
    assert torch.isfinite(difference), "not finite"
    return float(difference / theirs.abs().max())


@cache
def tiny_tokenizer() -> Any:
    """Words "w3" .. "w126" and "<image>"; "<s>" begins a text."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing

    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, IMAGE_TOKEN)), "<image>"]
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
