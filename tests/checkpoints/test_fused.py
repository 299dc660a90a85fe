"""Weights of Qwen, whose queries, keys and values lie in one tensor, and of Idefics3: what does not fit is listed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cases import BY_NAME, build_hf, raw_inputs, relative_error
from tests.checkpoints import tiny
from tests.checkpoints.test_saving import OF_QWEN, assert_same_model
from veena_lens import HookedVLM

QKV = "model.visual.blocks.1.attn.qkv"


def with_state(folder: Path, change: Any) -> None:
    """Rewrite the folder's tensors after `change(state)`, which edits the dictionary in place."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["qwen2_vl-plain", "qwen3_vl-plain"])
def test_missing_and_misshapen_fused_weights_are_listed_with_key_and_shape(name: str, tmp_path: Path) -> None:
    _, folder = tiny.save(BY_NAME[name], tmp_path, with_processor=False)
    stored = QKV.removeprefix("model.") if name.startswith("qwen2") else QKV

    def spoil(state: dict[str, torch.Tensor]) -> None:
        at = stored if f"{stored}.weight" in state else QKV
        del state[f"{at}.bias"]
        state[f"{at}.weight"] = torch.zeros(95, 32)
        patches = next(k for k in state if k.endswith("patch_embed.proj.weight"))
        state[patches] = torch.zeros(32, 3, 2, 4, 5)

    with_state(folder, spoil)
    with pytest.raises(ValueError) as told:
        HookedVLM.from_pretrained(folder)
    lines = str(told.value).splitlines()
    assert "(3 keys)" in lines[0]
    assert f"  missing   {QKV}.bias: wanted [96]" in lines
    assert f"  misshapen {QKV}.weight: wanted [96, 32], found [95, 32]" in lines
    assert any("patch_embed.proj.weight: wanted [32, 3, 2, 4, 4], found [32, 3, 2, 4, 5]" in line for line in lines)


def test_patch_weight_of_permuted_axes_is_not_taken_for_the_flat_one(tmp_path: Path) -> None:
    """As many numbers in another order would load in silence."""
    _, folder = tiny.save(BY_NAME["qwen3_vl-plain"], tmp_path, with_processor=False)
    key = "model.visual.patch_embed.proj.weight"
    with_state(folder, lambda state: state.update({key: state[key].permute(0, 2, 3, 4, 1).contiguous()}))
    with pytest.raises(ValueError, match=r"misshapen .*patch_embed.proj.weight: wanted \[32, 3, 2, 4, 4\]"):
        HookedVLM.from_pretrained(folder)


def test_spare_deepstack_merger_is_told_of(tmp_path: Path) -> None:
    _, folder = tiny.save(BY_NAME["qwen3_vl-plain"], tmp_path, with_processor=False)
    key = "model.visual.deepstack_merger_list.2.norm.weight"
    with_state(folder, lambda state: state.update({key: torch.zeros(128)}))
    with pytest.raises(ValueError, match=f"spare     {key}: found"):
        HookedVLM.from_pretrained(folder)


@pytest.mark.parametrize("name", ["qwen2_5_vl-plain", "qwen3_vl-plain"])
def test_loaded_weights_do_not_depend_on_the_file(name: str, tmp_path: Path) -> None:
    theirs, folder = tiny.save(BY_NAME[name], tmp_path, with_processor=False)
    ours = HookedVLM.from_pretrained(folder)
    file = folder / "model.safetensors"
    with file.open("r+b") as f:  # in place: a mapping of the file would see it
        f.write(b"\0" * file.stat().st_size)
    state = ours.to_hf_state_dict()
    assert all(torch.equal(state[k], v) for k, v in theirs.state_dict().items())
    storages = {p.untyped_storage().data_ptr() for p in ours.parameters()}
    assert len(storages) == len(list(ours.parameters())), "parts of a fused tensor hold each other's memory"


@pytest.mark.parametrize("name", OF_QWEN)
def test_from_hf_shares_storage_also_of_fused_weights(name: str) -> None:
    hf = build_hf(BY_NAME[name])
    model: Any = HookedVLM.from_hf(hf)
    theirs = {p.untyped_storage().data_ptr() for p in hf.parameters()}
    assert all(p.untyped_storage().data_ptr() in theirs for p in model.parameters())
    raw = raw_inputs(BY_NAME[name])
    with torch.no_grad():
        before = model.forward_hf(**raw)
        hf.model.visual.blocks[0].attn.qkv.weight[32:64].mul_(3.0)  # keys alone
        after, expected = model.forward_hf(**raw), hf(**raw).logits
    assert relative_error(after, before, raw["attention_mask"]) > 1e-4
    assert relative_error(after, expected, raw["attention_mask"]) < 1e-9
    copied = HookedVLM.from_hf(hf, copy=True)
    assert not any(p.untyped_storage().data_ptr() in theirs for p in copied.parameters())


@pytest.mark.parametrize("name", ["qwen2_vl-tied", "qwen3_vl-tied"])
def test_tied_head_is_one_parameter_and_a_stored_copy_must_equal_it(name: str, tmp_path: Path) -> None:
    theirs, folder = tiny.save(BY_NAME[name], tmp_path, with_processor=False)
    ours: Any = assert_same_model(folder, theirs)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert "unembed.weight" not in dict(ours.named_parameters())
    assert ours.W_U.untyped_storage().data_ptr() == ours.embed.weight.untyped_storage().data_ptr()
    head = theirs.state_dict()["lm_head.weight"]
    with_state(folder, lambda state: state.update({"lm_head.weight": head.clone()}))
    assert_same_model(folder, theirs)
    with_state(folder, lambda state: state.update({"lm_head.weight": head + 1.0}))
    with pytest.raises(ValueError, match="ties its unembedding .* of other values"):
        HookedVLM.from_pretrained(folder)


def test_device_map_may_split_a_fused_tensor(tmp_path: Path) -> None:
    _theirs, folder = tiny.save(BY_NAME["qwen2_vl-plain"], tmp_path, with_processor=False)
    split = {"": "cpu", "vision.blocks.1.attn.k": "meta"}
    placed: Any = HookedVLM.from_pretrained(folder, device_map=split)
    assert placed.vision.blocks[1].attn.k.weight.is_meta and not placed.vision.blocks[1].attn.q.weight.is_meta
    assert HookedVLM.from_pretrained(folder, device_map="auto").cfg.device.type == "cpu"


def test_missing_and_spare_weights_of_tiled_models_are_listed(tmp_path: Path) -> None:
    _, folder = tiny.save(BY_NAME["idefics3-plain"], tmp_path, with_processor=False)
    state = load_file(folder / "model.safetensors")
    del state["model.vision_model.post_layernorm.bias"]
    state["model.perceiver.latents"] = torch.ones(2)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError) as told:
        HookedVLM.from_pretrained(folder)
    lines = str(told.value).splitlines()
    assert "  missing   model.vision_model.post_layernorm.bias: wanted [24]" in lines
    assert any(line.startswith("  spare     model.perceiver.latents: found [2]") for line in lines)


@pytest.mark.parametrize(
    ("name", "architecture", "model_type", "told"),
    [
        (
            "qwen3_vl-plain",
            "Qwen3VLMoeForConditionalGeneration",
            "qwen3_vl_moe",
            "No adapter .*'Qwen3VLMoeForConditionalGeneration'.*Known: .*Qwen3VLForCond",
        ),
        (
            "idefics3-plain",
            "Idefics2ForConditionalGeneration",
            "idefics2",
            "'Idefics2ForConditionalGeneration'.*would need a perceiver resampler",
        ),
        (
            "onevision-plain",
            "LLaVAOneVision1_5_ForConditionalGeneration",
            "llavaonevision1_5",
            "model_type 'llavaonevision1_5' .*is unknown to transformers.*LlavaOnevision",
        ),
    ],
)
def test_relative_of_another_build_is_refused_before_its_fields_are_read(
    name: str, architecture: str, model_type: str, told: str, tmp_path: Path
) -> None:
    _, folder = tiny.save(BY_NAME[name], tmp_path, with_processor=False)
    raw = json.loads((folder / "config.json").read_text())
    raw |= dict(architectures=[architecture], model_type=model_type)
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=told):
        HookedVLM.from_pretrained(folder)
