"""The registry: ours by entry point or without metadata, others' beside them, a broken one alone in its failure."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest
import torch

from tests.cases import BY_NAME, build_hf
from tests.checkpoints import tiny
from veena_lens.checkpoints import all_adapters, find_adapter
from veena_lens.checkpoints.registry import BUILT_IN, adapter_sources, broken_adapters
from veena_lens.model.model import HookedVLM

MODULE = """
from dataclasses import replace

from model_adapters.text_only import LLAMA

ADAPTER = replace(LLAMA, architecture="MyLlamaForCausalLM", hub_ids=("me/my-llama",), note="Llama under another name")
NOT_ONE = 3
"""
ENTRY_POINTS = """
[veena_lens.adapters]
MyLlamaForCausalLM = my_adapters:ADAPTER
BrokenForCausalLM = my_missing_module:ADAPTER
NumberForCausalLM = my_adapters:NOT_ONE
"""


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another package's metadata and module on the path."""
    info = tmp_path / "my_adapters-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-adapters\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    (tmp_path / "my_adapters.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_adapters", raising=False)


def test_our_adapters_are_found_by_their_architecture() -> None:
    for architecture in BUILT_IN:
        assert find_adapter(architecture).architecture == architecture
    assert set(BUILT_IN) <= set(all_adapters())


def test_our_entry_points_are_those_of_the_registry() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    for architecture, value in BUILT_IN.items():
        assert f'{architecture} = "{value}"' in text


def test_adapters_are_found_without_installed_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: ())
    monkeypatch.setattr("veena_lens.checkpoints.registry.entry_points", lambda **_: ())
    assert set(all_adapters()) == set(BUILT_IN)


@pytest.mark.usefixtures("third_party")
def test_third_party_adapter_loads_a_checkpoint_of_its_own_name(tmp_path: Path) -> None:
    theirs, folder = tiny.save(BY_NAME["text-llama"], tmp_path / "mine")
    config = folder / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "MyLlamaForCausalLM"))
    model = HookedVLM.from_pretrained(str(folder))
    assert model.cfg.architecture == "MyLlamaForCausalLM" and model.adapter.hub_ids == ("me/my-llama",)
    assert torch.equal(model.embed.weight, theirs.model.embed_tokens.weight)
    assert adapter_sources()["MyLlamaForCausalLM"] == "my_adapters:ADAPTER"


@pytest.mark.usefixtures("third_party")
def test_broken_entry_point_fails_alone_and_when_asked_for() -> None:
    assert set(all_adapters()) == {*BUILT_IN, "MyLlamaForCausalLM"}
    assert set(broken_adapters()) == {"BrokenForCausalLM", "NumberForCausalLM"}
    with pytest.raises(ValueError, match="BrokenForCausalLM.*my_missing_module:ADAPTER.*No module named"):
        find_adapter("BrokenForCausalLM")
    with pytest.raises(ValueError, match="my_adapters:NOT_ONE is a int, not an Adapter"):
        find_adapter("NumberForCausalLM")


def test_unknown_architecture_names_the_known_ones_near_ones_and_how_to_add_one() -> None:
    with pytest.raises(ValueError) as told:
        find_adapter("LlavaNextForConditionalGenaration")
    text = str(told.value)
    assert "near names: " in text and "LlavaForConditionalGeneration" in text
    assert all(name in text for name in BUILT_IN) and "'veena_lens.adapters'" in text and "docs/adapters.md" in text


def test_class_in_memory_without_an_adapter_is_refused() -> None:
    class MyModel(torch.nn.Module):
        pass

    with pytest.raises(ValueError, match="No adapter for architecture 'MyModel'"):
        HookedVLM.from_hf(MyModel())
    assert HookedVLM.from_hf(build_hf(BY_NAME["text-llama"])).cfg.architecture == "LlamaForCausalLM"
