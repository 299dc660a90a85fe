"""Filling a model with tensors: what does not fit is listed, and fused and tied tensors lie where they should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.cases import BY_NAME, build_hf, raw_inputs, relative_error
from tests.checkpoints import tiny
from tests.checkpoints.test_saving import OF_QWEN, assert_same_model
from veena_lens.checkpoints import fill_from_state_dict, find_adapter
from veena_lens.model.model import HookedVLM

LLAVA = BY_NAME["clip-llama"]
SAVED_QKV = "model.visual.blocks.1.attn.qkv"  # queries, keys and values in one tensor


def spoil_square(state: dict[str, torch.Tensor]) -> None:
    del state["language_model.model.norm.weight"]
    state["language_model.model.embed_tokens.weight"] = torch.zeros(100, 48)
    state["multi_modal_projector.linear_3.weight"] = torch.zeros(2, 3)


def spoil_fused(state: dict[str, torch.Tensor]) -> None:
    at = next(key for key in state if key.endswith(f"{SAVED_QKV.removeprefix('model.')}.weight"))
    del state[at.replace(".weight", ".bias")]
    state[at] = torch.zeros(95, 32)
    patches = next(k for k in state if k.endswith("patch_embed.proj.weight"))
    state[patches] = torch.zeros(32, 3, 2, 4, 5)


def spoil_tiles(state: dict[str, torch.Tensor]) -> None:
    del state["model.vision_model.post_layernorm.bias"]
    state["model.perceiver.latents"] = torch.ones(2)


FUSED = (
    "  missing   model.visual.blocks.1.attn.qkv.bias: wanted [96]",
    "  misshapen model.visual.blocks.1.attn.qkv.weight: wanted [96, 32], found [95, 32]",
    "  misshapen model.visual.patch_embed.proj.weight: wanted [32, 3, 2, 4, 4], found [32, 3, 2, 4, 5]",
)
SPOILED = [
    (
        "clip-llama",
        spoil_square,
        (
            "  missing   model.language_model.norm.weight: wanted [48]",
            "  misshapen model.language_model.embed_tokens.weight: wanted [128, 48], found [100, 48]",
            "  spare     model.multi_modal_projector.linear_3.weight: found [2, 3]",
        ),
    ),
    ("qwen2_vl-plain", spoil_fused, FUSED),
    ("qwen3_vl-plain", spoil_fused, FUSED),
    (
        "idefics3-plain",
        spoil_tiles,
        (
            "  missing   model.vision_model.post_layernorm.bias: wanted [24]",
            "  spare     model.perceiver.latents: found [2]",
        ),
    ),
]


@pytest.mark.parametrize(("name", "spoil", "lines"), SPOILED, ids=[name for name, _, _ in SPOILED])
def test_all_missing_spare_and_misshapen_keys_are_listed_at_once(
    name: str, spoil: Any, lines: tuple[str, ...], tmp_path: Path
) -> None:
    _, folder = tiny.save(BY_NAME[name], tmp_path, with_processor=False)
    tiny.change_weights(folder, spoil)
    with pytest.raises(ValueError) as told:
        HookedVLM.from_pretrained(str(folder))
    found = str(told.value).splitlines()
    assert f"({len(lines)} keys)" in found[0]
    named = [line if "  spare" not in line else line.split("]")[0] + "]" for line in found]
    assert set(lines) <= set(named)


PATCHES, MERGER = "model.visual.patch_embed.proj.weight", "model.visual.deepstack_merger_list.2.norm.weight"


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        (
            "clip-llama",
            lambda state: state.update({"model.language_model.norm.weight": torch.zeros(48)}),
            "doubled   model.language_model.norm.weight: stored as",
        ),
        (
            "clip-llama",  # a missing head is never tied in silence
            lambda state: state.pop("language_model.lm_head.weight"),
            r"missing   lm_head.weight: wanted \[128, 48\]",
        ),
        (
            "clip-llama",
            lambda state: state.update({"language_model.lm_head.weight": torch.zeros(128, 48, dtype=torch.int8)}),
            "quantised lm_head.weight: stored as torch.int8",
        ),
        (
            "qwen3_vl-plain",  # as many numbers in another order would load in silence
            lambda state: state.update({PATCHES: state[PATCHES].permute(0, 2, 3, 4, 1).contiguous()}),
            r"misshapen .*patch_embed.proj.weight: wanted \[32, 3, 2, 4, 4\]",
        ),
        ("qwen3_vl-plain", lambda state: state.update({MERGER: torch.zeros(128)}), f"spare     {MERGER}: found"),
    ],
    ids=["doubled", "missing head", "quantised", "permuted", "spare merger"],
)
def test_key_that_does_not_fit_is_named(name: str, change: Any, told: str, tmp_path: Path) -> None:
    _, folder = tiny.save(BY_NAME[name], tmp_path, with_processor=False)
    tiny.change_weights(folder, change)
    with pytest.raises(ValueError, match=told):
        HookedVLM.from_pretrained(str(folder))


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("tied-qwen2", "language_model.lm_head.weight"),
        ("qwen2_vl-tied", "lm_head.weight"),
        ("qwen3_vl-tied", "lm_head.weight"),
    ],
)
def test_tied_head_is_one_parameter_and_a_stored_copy_must_equal_it(name: str, head: str, tmp_path: Path) -> None:
    theirs, folder = tiny.save(BY_NAME[name], tmp_path, with_processor=False)
    ours: Any = assert_same_model(folder, theirs)
    assert not any("lm_head" in key for key in load_file(folder / "model.safetensors"))
    assert "unembed.weight" not in dict(ours.named_parameters())
    assert ours.W_U.untyped_storage().data_ptr() == ours.embed.weight.untyped_storage().data_ptr()
    stored = theirs.state_dict()["lm_head.weight"]
    tiny.change_weights(folder, lambda state: state.update({head: stored.clone()}))
    assert_same_model(folder, theirs)
    tiny.change_weights(folder, lambda state: state.update({head: stored + 1.0}))
    with pytest.raises(ValueError, match="ties its unembedding .* of other values"):
        HookedVLM.from_pretrained(str(folder))


@pytest.mark.parametrize("name", ["clip-llama", "qwen2_5_vl-plain", "qwen3_vl-plain"])
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


def test_model_in_memory_shares_its_storage_unless_copied() -> None:
    theirs = build_hf(LLAVA)
    adapter = find_adapter("LlavaForConditionalGeneration")
    cfg = adapter.read_config(theirs.config)
    for copy in (False, True):
        with torch.device("meta"):
            ours = HookedVLM(cfg)
        fill_from_state_dict(ours, theirs.state_dict(), adapter, cfg, copy=copy)
        shared = ours.embed.weight.data_ptr() == theirs.model.language_model.embed_tokens.weight.data_ptr()
        assert shared is not copy


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


def test_tied_model_in_memory_with_a_head_of_its_own_is_refused() -> None:
    theirs = build_hf(BY_NAME["tied-qwen2"])
    state = theirs.state_dict() | {"lm_head.weight": torch.zeros(128, 48, dtype=torch.float64)}
    adapter = find_adapter("LlavaForConditionalGeneration")
    cfg = adapter.read_config(theirs.config)
    with torch.device("meta"):
        ours = HookedVLM(cfg)
    with pytest.raises(ValueError, match="ties its unembedding"):
        fill_from_state_dict(ours, state, adapter, cfg)
