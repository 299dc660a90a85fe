"""Key layouts: every one a checkpoint was ever written in arrives at today's names, as transformers renames them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from tests.cases import BY_NAME, build_hf, hf_model
from tests.onevision_cases import ONEVISION_BY_NAME
from tests.qwen_cases import KINDS, QWEN_BY_NAME
from veena_lens.checkpoints.registry import find_adapter

LLAVA: dict[str, Any] = {**BY_NAME, **ONEVISION_BY_NAME}
Rename = Callable[[str], str]


def _sub(*pairs: tuple[str, str]) -> Rename:
    def rename(key: str) -> str:
        for pattern, new in pairs:
            found = re.sub(pattern, new, key)
            if found != key:
                return found
        return key

    return rename


HEAD = (r"^lm_head\.", "language_model.lm_head.")
TEXT = (r"^model\.language_model\.", "language_model.model.")
LAYOUTS: dict[str, Rename] = {
    "in memory": lambda key: key,
    "save_pretrained of transformers 5": _sub(
        HEAD, TEXT, (r"^model\.(vision_tower|multi_modal_projector|image_newline)", r"\1")
    ),
    "hub files of 2023 to 2025": _sub(
        HEAD, TEXT, (r"^model\.vision_tower\.", "vision_tower.vision_model."), (r"^model\.(multi_modal|image_)", r"\1")
    ),
    "some releases of 4.5x": _sub((r"^model\.vision_tower\.", "model.vision_tower.vision_model.")),
    "5.10 to 5.23, text nested": _sub((r"^model\.language_model\.", "model.language_model.model.")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ["clip-llama", "siglip-qwen2", "onevision-plain", "onevision-tied"])
def test_every_layout_arrives_at_todays_names(case: str, layout: str) -> None:
    theirs = build_hf(LLAVA[case])
    adapter = find_adapter(type(theirs).__name__)
    for key in theirs.state_dict():
        assert adapter.normalize(LAYOUTS[layout](key)) == key


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "5.10 to 5.23, text nested"])
@pytest.mark.parametrize("case", ["clip-llama", "siglip-qwen2", "onevision-plain", "onevision-tied"])
def test_our_names_equal_those_that_transformers_renames_to(case: str, layout: str) -> None:
    theirs = build_hf(LLAVA[case], torch.float32)
    rules: list[Any] = get_model_conversion_mapping(theirs)
    renamings = [r for r in rules if isinstance(r, WeightRenaming)]
    converters = [r for r in rules if isinstance(r, WeightConverter)]
    adapter, state = find_adapter(type(theirs).__name__), theirs.state_dict()
    for key in state:
        stored = LAYOUTS[layout](key)
        renamed = rename_source_key(stored, renamings, converters, theirs.base_model_prefix, state)[0]
        assert adapter.normalize(stored) == renamed


# A released file, and what other releases and trainers wrote.
QWEN_LAYOUTS: dict[str, Rename] = {
    "in memory": lambda key: key,
    "hub files": _sub((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual.")),
    "text at the root alone": _sub((r"^model\.language_model\.", "model.")),
}
QWEN = [f"{kind}-{name}" for kind in KINDS for name in ("plain", "tied")]


@pytest.mark.parametrize("layout", QWEN_LAYOUTS)
@pytest.mark.parametrize("name", QWEN)
def test_every_layout_of_a_qwen_model_arrives_at_todays_names(name: str, layout: str) -> None:
    theirs = hf_model(QWEN_BY_NAME[name])
    adapter = find_adapter(type(theirs).__name__)
    for key in theirs.state_dict():
        assert adapter.normalize(QWEN_LAYOUTS[layout](key)) == key


@pytest.mark.parametrize(
    "name, layout", [(n, "in memory") for n in QWEN] + [(n, "hub files") for n in QWEN if n.startswith("qwen2")]
)
def test_our_names_of_a_qwen_model_equal_those_that_transformers_renames_to(name: str, layout: str) -> None:
    """Qwen3-VL's files always had today's names."""
    theirs = hf_model(QWEN_BY_NAME[name])
    rules: list[Any] = get_model_conversion_mapping(theirs)
    renamings = [r for r in rules if isinstance(r, WeightRenaming)]
    converters = [r for r in rules if isinstance(r, WeightConverter)]
    adapter, state = find_adapter(type(theirs).__name__), theirs.state_dict()
    for key in state:
        stored = QWEN_LAYOUTS[layout](key)
        renamed = rename_source_key(stored, renamings, converters, theirs.base_model_prefix, state)[0]
        assert adapter.normalize(stored) == renamed == key


def test_text_only_keys_stay_as_they_are() -> None:
    for case in ("text-llama", "text-mistral", "text-qwen2"):
        theirs = build_hf(BY_NAME[case])
        adapter = find_adapter(type(theirs).__name__)
        assert [adapter.normalize(k) for k in theirs.state_dict()] == list(theirs.state_dict())
