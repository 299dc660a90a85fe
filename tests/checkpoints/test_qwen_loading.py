"""Qwen-VL files: every layout gives the weights bit for bit, fused qkv included, and goes back the same way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.cases import build_hf, hf_model, raw_inputs, relative_error
from tests.checkpoints import tiny_qwen
from tests.checkpoints.test_loading import assert_same_model
from tests.model_adapters.test_keys import QWEN_LAYOUTS
from tests.qwen_cases import KINDS, QWEN_BY_NAME, QWEN_CASES, QwenCase
from veena_lens import HookedVLM
from veena_lens.checkpoints import open_checkpoint, save_pretrained
from veena_lens.checkpoints.files import weight_files

NAMES = [f"{kind}-{name}" for kind in KINDS for name in ("plain", "tied")]
SHAPES = ["plain", "tied", "merge-3", "temporal-1", "patch-2-grey", "one-head", "attention-bias", "narrow-tower-mlp"]
SHAPES += ["window-of-one-token", "deepstack-none", "deepstack-past-the-decoder", "position-table-1x1", "one-layer"]
QKV = "model.visual.blocks.1.attn.qkv"


def with_state(folder: Path, change: Any) -> None:
    """Rewrite the folder's tensors after `change(state)`, which edits the dictionary in place."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", [*NAMES, "qwen3_vl-attention-bias", "qwen3_vl-deepstack-none", "qwen2_vl-merge-3"])
def test_saved_folder_gives_the_weights_bit_for_bit(name: str, tmp_path: Path) -> None:
    theirs, folder = tiny_qwen.save(QWEN_BY_NAME[name], tmp_path, with_processor=False)
    assert_same_model(folder, theirs)


@pytest.mark.parametrize("layout, sharded", [*((layout, False) for layout in QWEN_LAYOUTS), ("hub files", True)])
@pytest.mark.parametrize("name", NAMES)
def test_every_layout_of_a_file_gives_the_same_logits(name: str, layout: str, sharded: bool, tmp_path: Path) -> None:
    case = QWEN_BY_NAME[name]
    theirs, folder = tiny_qwen.save(case, tmp_path, torch.float64, with_processor=False)
    (folder / "model.safetensors").unlink()
    stored = {QWEN_LAYOUTS[layout](k): v.contiguous() for k, v in theirs.state_dict().items()}
    if "tied" in name:
        del stored["lm_head.weight"]
    stored |= {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}  # of old files
    if sharded:
        files = {k: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, k in enumerate(sorted(stored))}
        for file in set(files.values()):
            save_file({k: v for k, v in stored.items() if files[k] == file}, folder / file, metadata={"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    else:
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    assert len(weight_files(folder)) == (3 if sharded else 1)
    ours = assert_same_model(folder, theirs)
    raw = raw_inputs(case)
    with torch.no_grad():
        assert relative_error(ours.forward_hf(**raw), theirs(**raw).logits, raw["attention_mask"]) < 1e-9


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("qwen3")])
def test_folder_of_2024_loads_here_as_in_hugging_face(name: str, tmp_path: Path) -> None:
    """A flat configuration, `rope_scaling` of the type "mrope", old names."""
    case = QWEN_BY_NAME[name]
    theirs, folder = tiny_qwen.save_as_on_the_hub(case, tmp_path, torch.float64)
    ours = assert_same_model(folder, theirs)
    again = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    raw = raw_inputs(case)
    with torch.no_grad():
        logits = ours.forward_hf(**raw)
        assert relative_error(logits, theirs(**raw).logits, raw["attention_mask"]) < 1e-9
        assert relative_error(logits, again(**raw).logits, raw["attention_mask"]) < 1e-9
    assert ours.prepare("how does this person feel ?").shape[0] == 1


def test_sharded_files_of_transformers_load(tmp_path: Path) -> None:
    for kind in KINDS:
        theirs, folder = tiny_qwen.save(
            QWEN_BY_NAME[f"{kind}-plain"], tmp_path / kind, with_processor=False, max_shard_size="40KB"
        )
        assert len(weight_files(folder)) > 3
        assert_same_model(folder, theirs)


@pytest.mark.parametrize("case", [case for case in QWEN_CASES if case.name in SHAPES], ids=str)
def test_state_dict_goes_back_bit_for_bit(case: QwenCase) -> None:
    theirs = hf_model(case)
    back, expected = HookedVLM.from_hf(theirs, copy=True).to_hf_state_dict(), theirs.state_dict()
    assert set(back) == set(expected)
    assert all(torch.equal(back[k], expected[k]) for k in expected)


@pytest.mark.parametrize("name", NAMES)
def test_saved_folder_loads_in_hugging_face_with_the_edited_weights(name: str, tmp_path: Path) -> None:
    case = QWEN_BY_NAME[name]
    _, folder = tiny_qwen.save(case, tmp_path / "first")
    model: Any = HookedVLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        model.vision.blocks[1].attn.k.weight.mul_(2.0)  # the middle third of a fused tensor
        model.vision.patch_embed.weight.mul_(1.5)
        model.embed.weight.mul_(1.1)
    out = save_pretrained(model, tmp_path / "second", open_checkpoint(folder).hf_config)
    theirs, told = transformers.AutoModelForImageTextToText.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and theirs.dtype == torch.float64
    again, raw = HookedVLM.from_pretrained(out), raw_inputs(case)
    with torch.no_grad():
        logits = model.forward_hf(**raw)
        assert relative_error(logits, theirs(**raw).logits, raw["attention_mask"]) < 1e-9
        assert torch.equal(again.forward_hf(**raw), logits)
    text = "how does this person feel ?"
    assert torch.equal(again.prepare(text).tokens, model.prepare(text).tokens)


@pytest.mark.parametrize("name", ["qwen2_vl-plain", "qwen3_vl-plain"])
def test_missing_and_misshapen_fused_weights_are_listed_with_key_and_shape(name: str, tmp_path: Path) -> None:
    _, folder = tiny_qwen.save(QWEN_BY_NAME[name], tmp_path, with_processor=False)
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
    _, folder = tiny_qwen.save(QWEN_BY_NAME["qwen3_vl-plain"], tmp_path, with_processor=False)
    key = "model.visual.patch_embed.proj.weight"
    with_state(folder, lambda state: state.update({key: state[key].permute(0, 2, 3, 4, 1).contiguous()}))
    with pytest.raises(ValueError, match=r"misshapen .*patch_embed.proj.weight: wanted \[32, 3, 2, 4, 4\]"):
        HookedVLM.from_pretrained(folder)


def test_spare_deepstack_merger_is_told_of(tmp_path: Path) -> None:
    _, folder = tiny_qwen.save(QWEN_BY_NAME["qwen3_vl-plain"], tmp_path, with_processor=False)
    key = "model.visual.deepstack_merger_list.2.norm.weight"
    with_state(folder, lambda state: state.update({key: torch.zeros(128)}))
    with pytest.raises(ValueError, match=f"spare     {key}: found"):
        HookedVLM.from_pretrained(folder)


@pytest.mark.parametrize("name", ["qwen2_5_vl-plain", "qwen3_vl-plain"])
def test_loaded_weights_do_not_depend_on_the_file(name: str, tmp_path: Path) -> None:
    theirs, folder = tiny_qwen.save(QWEN_BY_NAME[name], tmp_path, with_processor=False)
    ours = HookedVLM.from_pretrained(folder)
    file = folder / "model.safetensors"
    with file.open("r+b") as f:  # in place: a mapping of the file would see it
        f.write(b"\0" * file.stat().st_size)
    state = ours.to_hf_state_dict()
    assert all(torch.equal(state[k], v) for k, v in theirs.state_dict().items())
    storages = {p.untyped_storage().data_ptr() for p in ours.parameters()}
    assert len(storages) == len(list(ours.parameters())), "parts of a fused tensor hold each other's memory"


@pytest.mark.parametrize("name", NAMES)
def test_from_hf_shares_storage_also_of_fused_weights(name: str) -> None:
    hf = build_hf(QWEN_BY_NAME[name])
    model: Any = HookedVLM.from_hf(hf)
    theirs = {p.untyped_storage().data_ptr() for p in hf.parameters()}
    assert all(p.untyped_storage().data_ptr() in theirs for p in model.parameters())
    raw = raw_inputs(QWEN_BY_NAME[name])
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
    theirs, folder = tiny_qwen.save(QWEN_BY_NAME[name], tmp_path, with_processor=False)
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
    theirs, folder = tiny_qwen.save(QWEN_BY_NAME["qwen2_vl-plain"], tmp_path, with_processor=False)
    split = {"": "cpu", "vision.blocks.1.attn.k": "meta"}
    placed: Any = HookedVLM.from_pretrained(folder, device_map=split)
    assert placed.vision.blocks[1].attn.k.weight.is_meta and not placed.vision.blocks[1].attn.q.weight.is_meta
    assert HookedVLM.from_pretrained(folder, device_map="auto").cfg.device.type == "cpu"


def test_mixture_of_experts_is_refused_with_the_known_architectures(tmp_path: Path) -> None:
    _, folder = tiny_qwen.save(QWEN_BY_NAME["qwen3_vl-plain"], tmp_path, with_processor=False)
    raw = json.loads((folder / "config.json").read_text())
    raw |= dict(architectures=["Qwen3VLMoeForConditionalGeneration"], model_type="qwen3_vl_moe")
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="No adapter .*'Qwen3VLMoeForConditionalGeneration'.*Known: .*Qwen3VLForCond"):
        HookedVLM.from_pretrained(folder)
