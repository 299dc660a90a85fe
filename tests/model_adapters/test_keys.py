"""Key layouts: every one a checkpoint was ever written in arrives at today's names, as transformers renames them."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from tests.cases import BY_NAME, QWEN, hf_model
from tests.model_adapters.layouts import LAYOUTS
from veena_lens.checkpoints.registry import find_adapter

OF_LLAVA = ["clip-llama", "siglip-qwen2", "onevision-plain", "onevision-tied", "llava-next-qwen2"]
OF_QWEN = [f"{family}-{name}" for family in QWEN for name in ("plain", "tied")]
OF_GEMMA = ["gemma3-plain", "gemma3-untied"]
STORED = [(name, "llava", layout) for name in OF_LLAVA for layout in LAYOUTS["llava"]]
STORED += [(name, "qwen", layout) for name in OF_QWEN for layout in LAYOUTS["qwen"]]
STORED += [(name, "gemma", layout) for name in OF_GEMMA for layout in LAYOUTS["gemma"]]
# What transformers itself renames: Qwen3-VL's files always had today's names.
RENAMED = [each for each in STORED if each[2] not in ("5.10 to 5.23, text nested", "text at the root alone")]
RENAMED = [each for each in RENAMED if not (each[0].startswith("qwen3") and each[2] != "in memory")]


@pytest.mark.parametrize("name, family, layout", STORED)
def test_every_layout_arrives_at_todays_names(name: str, family: str, layout: str) -> None:
    theirs = hf_model(BY_NAME[name])
    adapter = find_adapter(type(theirs).__name__)
    for key in theirs.state_dict():
        assert adapter.normalize(LAYOUTS[family][layout](key)) == key


@pytest.mark.parametrize("name, family, layout", RENAMED)
def test_our_names_equal_those_that_transformers_renames_to(name: str, family: str, layout: str) -> None:
    theirs = hf_model(BY_NAME[name])
    rules: list[Any] = get_model_conversion_mapping(theirs)
    renamings = [r for r in rules if isinstance(r, WeightRenaming)]
    converters = [r for r in rules if isinstance(r, WeightConverter)]
    adapter, state = find_adapter(type(theirs).__name__), theirs.state_dict()
    for key in state:
        stored = LAYOUTS[family][layout](key)
        renamed = rename_source_key(stored, renamings, converters, theirs.base_model_prefix, state)[0]
        assert adapter.normalize(stored) == renamed == key


def test_text_only_keys_stay_as_they_are() -> None:
    for case in ("text-llama", "text-mistral", "text-qwen2"):
        theirs = hf_model(BY_NAME[case])
        adapter = find_adapter(type(theirs).__name__)
        assert [adapter.normalize(k) for k in theirs.state_dict()] == list(theirs.state_dict())
