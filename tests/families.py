"""The table of model families: what a tiny model of each consists of, and how its two halves are built.

A `Family` is a row: Hugging Face's configuration, what its processor would emit (`tests/odd_inputs.py`), the plain
model that recomputes it (`tests/reference.py`) and tags by which tests choose. A `Case` is an odd model of a family and
a batch for it; `tests/cases.py` lists them. Every parameter is shaken after building, since a fresh model has norm
weights of 1 and biases of 0, which hide a norm that is missing or swapped.

To add a family, add its row to `ROWS` and its odd cases to `tests/cases.py`: parity, the way back and weight maps then
run over all of them. Name in `tests/model/hooked.py` the cases that hooks are tested on, in `tests/parity/drawing.py`
how a configuration is drawn, and in `tests/checkpoints/tiny.py` the files of its processor. What no other family has
goes into a file of special checks.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor

from tests import odd_inputs, reference, reference_towers
from tests.odd_inputs import IMAGE_TOKEN, PAD, QWEN_END, QWEN_IMAGE, QWEN_START, QWEN_VIDEO, VIDEO_TOKEN

TEXT: Mapping[str, Any] = dict(
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    vocab_size=128,
    max_position_embeddings=256,
)
TOWER: Mapping[str, Any] = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=14
)
SLIDE, FULL = "sliding_attention", "full_attention"
GEMMA_TEXT: Mapping[str, Any] = TEXT | dict(
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    head_dim=8,
    sliding_window=6,
    layer_types=[SLIDE, FULL, SLIDE],
    query_pre_attn_scalar=11,
)
GEMMA_TOWER = dict(
    model_type="siglip_vision_model",
    hidden_size=24,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=30,
    patch_size=7,
    vision_use_head=False,
)
TILE_TEXT = dict(model_type="llama", max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=PAD)
TILE_TOWER = dict(
    hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4
)
QWEN_TEXT = TEXT | dict(num_hidden_layers=3, max_position_embeddings=512, bos_token_id=1, eos_token_id=2)
QWEN_ROOT = dict(
    image_token_id=QWEN_IMAGE, video_token_id=QWEN_VIDEO, vision_start_token_id=QWEN_START, vision_end_token_id=QWEN_END
)
MROPE = dict(rope_type="default", rope_theta=1e6, mrope_section=[1, 1, 2])
LATER_TOWER = dict(depth=3, hidden_size=32, out_hidden_size=48, intermediate_size=40, num_heads=2, patch_size=4)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row of the table.

    model, config: Hugging Face's classes; without them `text` is the configuration of a model of text alone.
    text, vision, root: its defaults, which a case's own values overrule. raw(case, config, dtype): what a processor
    would emit for the rows. plain: the model written a second time. prefix: what its cases' names begin with."""

    name: str
    model: Any = None
    config: Any = None
    text: Mapping[str, Any]
    vision: Mapping[str, Any] = field(default_factory=dict)
    root: Mapping[str, Any] = field(default_factory=dict)
    raw: Callable[..., dict[str, Tensor]]
    plain: type[reference.Reference]
    prefix: str
    tags: frozenset[str] = frozenset()


def _qwen(name: str, classes: str, text: Mapping[str, Any], vision: Mapping[str, Any], *tags: str) -> Family:
    return Family(
        name=name,
        model=getattr(transformers, f"{classes}ForConditionalGeneration"),
        config=getattr(transformers, f"{classes}Config"),
        text=QWEN_TEXT | text,
        vision=vision,
        root=QWEN_ROOT,
        raw=odd_inputs.any_size,
        plain=reference_towers.QwenReference,
        prefix=f"{name}-",
        tags=frozenset({"tower", "videos", "streams", "any size", *tags}),
    )


def _tiles(name: str, classes: str) -> Family:
    return Family(
        name=name,
        model=getattr(transformers, f"{classes}ForConditionalGeneration"),
        config=getattr(transformers, f"{classes}Config"),
        text=TEXT | TILE_TEXT,
        vision=TILE_TOWER,
        root=dict(image_token_id=IMAGE_TOKEN),
        raw=odd_inputs.in_tiles,
        plain=reference_towers.TileReference,
        prefix=f"{name}-",
        tags=frozenset({"tower", "tiles"}),
    )


ROWS: tuple[Family, ...] = (
    Family(
        name="text",
        text=TEXT | dict(model_type="llama"),
        raw=odd_inputs.one_square,
        plain=reference.Reference,
        prefix="",
    ),
    Family(
        name="llava",
        model=transformers.LlavaForConditionalGeneration,
        config=transformers.LlavaConfig,
        text=TEXT | dict(model_type="llama"),
        vision=TOWER | dict(model_type="clip_vision_model"),
        root=dict(image_token_index=IMAGE_TOKEN),
        raw=odd_inputs.one_square,
        plain=reference.Reference,
        prefix="",
        tags=frozenset({"tower"}),
    ),
    Family(
        name="llava-next",
        model=transformers.LlavaNextForConditionalGeneration,
        config=transformers.LlavaNextConfig,
        text=TEXT | dict(model_type="llama"),
        vision=TOWER | dict(model_type="clip_vision_model", projection_dim=16),
        root=dict(
            image_token_index=IMAGE_TOKEN, image_grid_pinpoints=[[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
        ),
        raw=odd_inputs.any_resolution,
        plain=reference.Reference,
        prefix="llava-next-",
        tags=frozenset({"tower", "any resolution"}),
    ),
    Family(
        name="onevision",
        model=transformers.LlavaOnevisionForConditionalGeneration,
        config=transformers.LlavaOnevisionConfig,
        text=TEXT | dict(model_type="qwen2"),
        vision=TOWER | dict(model_type="siglip_vision_model"),
        root=dict(
            image_token_index=IMAGE_TOKEN,
            video_token_index=VIDEO_TOKEN,
            image_grid_pinpoints=[[28 * a, 28 * b] for a in range(1, 5) for b in range(1, 5)],
        ),
        raw=odd_inputs.any_resolution,
        plain=reference.Reference,
        prefix="onevision-",
        tags=frozenset({"tower", "videos", "any resolution"}),
    ),
    Family(
        name="gemma3",
        model=transformers.Gemma3ForConditionalGeneration,
        config=transformers.Gemma3Config,
        text=GEMMA_TEXT,
        vision=GEMMA_TOWER,
        root=dict(
            mm_tokens_per_image=4,
            image_token_index=IMAGE_TOKEN,
            boi_token_index=odd_inputs.GEMMA_START,
            eoi_token_index=odd_inputs.GEMMA_END,
        ),
        raw=odd_inputs.between_marks,
        plain=reference_towers.GemmaReference,
        prefix="gemma3-",
        tags=frozenset({"tower", "bidirectional", "post norms"}),
    ),
    Family(
        name="gemma3-text",
        text=GEMMA_TEXT | dict(model_type="gemma3_text"),
        raw=odd_inputs.between_marks,
        plain=reference_towers.GemmaReference,
        prefix="gemma3-text-",
        tags=frozenset({"post norms"}),
    ),
    _qwen(
        "qwen2_vl",
        "Qwen2VL",
        dict(rope_parameters=MROPE),
        dict(depth=2, embed_dim=32, hidden_size=48, num_heads=2, patch_size=4),
    ),
    _qwen(
        "qwen2_5_vl",
        "Qwen2_5_VL",
        dict(rope_parameters=MROPE),
        LATER_TOWER | dict(window_size=16, fullatt_block_indexes=[1], tokens_per_second=2),
        "windows",
    ),
    _qwen(
        "qwen3_vl",
        "Qwen3VL",
        dict(
            head_dim=16,
            num_attention_heads=4,
            rope_parameters=dict(rope_type="default", rope_theta=5e6, mrope_section=[4, 2, 2], mrope_interleaved=True),
        ),
        LATER_TOWER | dict(num_position_embeddings=25, deepstack_visual_indexes=[0, 2]),
        "deepstack",
    ),
    _tiles("idefics3", "Idefics3"),
    _tiles("smolvlm", "SmolVLM"),
)
FAMILIES = {family.name: family for family in ROWS}
QWEN = tuple(family.name for family in ROWS if "any size" in family.tags)
TILED = tuple(family.name for family in ROWS if "tiles" in family.tags)


@dataclass(frozen=True, eq=False, kw_only=True)
class Case:
    """A tiny model and a batch.

    text, vision, root: values of the configuration that differ from the family's. rows: a string per row; a number is
    text tokens, any other word an image or a video as `tests/odd_inputs.py` writes those of the family. The rest says
    how its processor writes: seconds that an image of each video stands for, by turns (Qwen2.5-VL; none where it is
    empty); whether the number of images of each row is passed on (OneVision); the tokens of a tile's name, and whether
    a mask of real pixels is given (Idefics3)."""

    name: str
    family: str = "llava"
    text: Mapping[str, Any] = field(default_factory=dict)
    vision: Mapping[str, Any] = field(default_factory=dict)
    root: Mapping[str, Any] = field(default_factory=dict)
    rows: tuple[str, ...] = ("3 i 5", "2 i 1 i 6")
    padding: str = "left"
    seconds: tuple[float, ...] = (1.0, 0.3, 1.7)
    says_numbers: bool = True
    n_name: int = 1
    has_mask: bool = True

    def __str__(self) -> str:
        return f"{self.of.prefix}{self.name}"

    @property
    def of(self) -> Family:
        return FAMILIES[self.family]

    def has(self, tag: str) -> bool:
        return tag in self.of.tags

    @property
    def has_images(self) -> bool:
        return any(re.search("[a-z]", row) for row in self.rows)

    def config(self) -> Any:
        """The Hugging Face configuration."""
        family = self.of
        text, vision, root = (
            {**copy.deepcopy(dict(theirs)), **copy.deepcopy(dict(mine))}
            for theirs, mine in ((family.text, self.text), (family.vision, self.vision), (family.root, self.root))
        )
        if family.config is None:
            return transformers.CONFIG_MAPPING[text.pop("model_type")](**text)
        return family.config(text_config=text, vision_config=vision, **root)

    @property
    def model_class(self) -> Any:
        return self.of.model or transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(self.config())]


def hf_config(case: Case) -> Any:
    """The Hugging Face configuration of a case."""
    return case.config()


def build_hf(case: Case, dtype: torch.dtype = torch.float64, gain: float = 1.0) -> Any:
    """A fresh Hugging Face model of a case, its parameters shaken, the same numbers at every call.

    `gain` multiplies the decoder's attention and MLP: what it says then depends on its whole context."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = case.model_class._from_config(case.config(), attn_implementation="sdpa").to(torch.float64).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * (0.2 if p.ndim == 1 else 0.05))
        for name, p in model.named_parameters():
            if "vision" not in name and "visual" not in name and ("self_attn" in name or "mlp" in name):
                p.mul_(gain)
    return model.to(dtype)


@cache
def _hf_model(case: Case, dtype: torch.dtype, gain: float) -> Any:
    return build_hf(case, dtype, gain)


def hf_model(case: Case, dtype: torch.dtype = torch.float64, gain: float = 1.0) -> Any:
    """The Hugging Face model of a case, built once per run: do not edit it.

    Positions that an earlier batch left on a Qwen model are forgotten."""
    model = _hf_model(case, dtype, gain)
    if case.has("streams"):
        model.model.rope_deltas = None
    return model


@cache
def _native_model(case: Case, dtype: torch.dtype, casts: str, gain: float) -> Any:
    from veena_lens import HookedVLM

    return HookedVLM.from_hf(hf_model(case, dtype, gain), casts=casts)


def native_model(case: Case, dtype: torch.dtype = torch.float64, casts: str = "hf", gain: float = 1.0) -> Any:
    """The native model of a case, built once per run; the fixture `model_of` checks that no hook is left on it."""
    return _native_model(case, dtype, casts, gain)


def raw_inputs(case: Case, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """What a processor would emit for the case's rows: ids, mask and what its images are given as."""
    return case.of.raw(case, case.config(), dtype)


def counted(raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same inputs with positions counted over real tokens, so that a padded row equals the row alone."""
    positions = (raw["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return dict(raw, position_ids=positions)


def counted_inputs(case: Case, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Raw inputs whose positions are counted over real tokens, as Qwen's are of themselves."""
    raw = raw_inputs(case, dtype)
    return raw if case.has("streams") and case.has_images else counted(raw)


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
