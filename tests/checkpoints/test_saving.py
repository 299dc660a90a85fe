"""Every family from files and back: each layout of a file gives the weights bit for bit, and so does going back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from tests.cases import BY_NAME, CASES, QWEN, Case, build_hf, hf_model, raw_inputs, relative_error
from tests.checkpoints import tiny
from tests.checkpoints.tiny import picture
from tests.model_adapters.layouts import LAYOUTS
from veena_lens import HookedVLM
from veena_lens.checkpoints import open_checkpoint, save_pretrained
from veena_lens.checkpoints.files import weight_files

OF_QWEN = [f"{family}-{name}" for family in QWEN for name in ("plain", "tied")]
SINGLE = ["clip-llama", "siglip-qwen2", "tied-qwen2", "both-biases-tied", "feature-list", "text-mistral"]
SINGLE += [*OF_QWEN, "qwen3_vl-attention-bias", "qwen3_vl-deepstack-none", "qwen2_vl-merge-3", "gemma3-text-untied"]
OF_GEMMA = ["gemma3-plain", "gemma3-untied", "gemma3-many-tokens"]
OF_TILES = ["idefics3-plain", "smolvlm-tied", "smolvlm-plain", "idefics3-biases"]
SINGLE += [*OF_GEMMA, *OF_TILES, "llava-next-qwen2"]
SHARDED = ["clip-llama", *OF_GEMMA, *OF_TILES, *(f"{family}-plain" for family in QWEN)]
# Written in a layout and, where the last is true, in three files.
STORED = [
    (name, layout, False) for name in ("clip-llama", "onevision-plain", "onevision-tied") for layout in LAYOUTS["llava"]
]
STORED += [(f"onevision-{name}", "hub files of 2023 to 2025", True) for name in ("plain", "tied")]
STORED += [(name, layout, False) for name in OF_QWEN for layout in LAYOUTS["qwen"]]
STORED += [(name, "hub files", True) for name in OF_QWEN]
STORED += [(name, "hub files", False) for name in OF_GEMMA] + [(name, "in memory", False) for name in OF_TILES]
# What old files hold besides.
SPARE = {
    "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    "vision_tower.vision_model.embeddings.position_ids": torch.arange(5)[None],
}
SPARE_OF = dict(
    llava=SPARE,
    qwen={"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
    tiles={
        "model.vision_model.embeddings.position_ids": torch.arange(16)[None],
        "model.text_model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    },
    gemma={},
)


def assert_same_model(folder: Path, theirs: Any) -> HookedVLM:
    """The folder's weights equal a Hugging Face model's, bit for bit."""
    ours = HookedVLM.from_pretrained(folder)
    state, expected = ours.to_hf_state_dict(), theirs.state_dict()
    assert set(state) == set(expected)
    for key, tensor in expected.items():
        assert torch.equal(state[key], tensor), key
    return ours


def kind_of(case: Case) -> str:
    """Which layouts of keys a case's files have had."""
    kinds = {"any size": "qwen", "tiles": "tiles", "post norms": "gemma"}
    return next((kind for tag, kind in kinds.items() if case.has(tag)), "llava")


def assert_same_logits(ours: Any, theirs: Any, case: Case) -> None:
    raw = raw_inputs(case)
    with torch.no_grad():
        assert relative_error(ours.forward_hf(**raw), theirs(**raw).logits, raw["attention_mask"]) < 1e-9


@pytest.mark.parametrize("name", SINGLE)
def test_saved_folder_gives_the_weights_bit_for_bit(name: str, tmp_path: Path) -> None:
    theirs, folder = tiny.save(BY_NAME[name], tmp_path)
    assert_same_model(folder, theirs)


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_files_of_transformers_load(name: str, tmp_path: Path) -> None:
    theirs, folder = tiny.save(BY_NAME[name], tmp_path, with_processor=False, max_shard_size="20KB")
    assert len(weight_files(folder)) > 3
    assert_same_model(folder, theirs)


@pytest.mark.parametrize("name, layout, sharded", STORED)
def test_every_layout_of_a_file_gives_the_same_logits(name: str, layout: str, sharded: bool, tmp_path: Path) -> None:
    """Also with what old files hold besides, and without the head of a tied model."""
    case = BY_NAME[name]
    theirs, folder = tiny.save(case, tmp_path, torch.float64, with_processor=False)
    (folder / "model.safetensors").unlink()
    rename = LAYOUTS[kind_of(case)][layout]
    stored = {rename(k): v.contiguous() for k, v in theirs.state_dict().items()}
    if theirs.config.tie_word_embeddings:
        del stored[rename("lm_head.weight")]
    if case.family != "onevision":
        stored |= SPARE_OF[kind_of(case)]
    if sharded:
        files = {k: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, k in enumerate(sorted(stored))}
        for file in set(files.values()):
            save_file({k: v for k, v in stored.items() if files[k] == file}, folder / file, metadata={"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    else:
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    assert len(weight_files(folder)) == (3 if sharded else 1)
    assert_same_logits(assert_same_model(folder, theirs), theirs, case)


def test_layouts_of_other_years_have_other_names() -> None:
    hub = LAYOUTS["gemma"]["hub files"]
    names = {hub(key) for key in hf_model(BY_NAME["gemma3-plain"]).state_dict()}
    assert "language_model.model.layers.0.pre_feedforward_layernorm.weight" in names
    assert "vision_tower.vision_model.post_layernorm.bias" in names


@pytest.mark.parametrize("name", [name for name in OF_QWEN if not name.startswith("qwen3")])
def test_folder_of_2024_loads_here_as_in_hugging_face(name: str, tmp_path: Path) -> None:
    """A flat configuration, `rope_scaling` of the type "mrope", old names."""
    case = BY_NAME[name]
    theirs, folder = tiny.save_as_in_2024(case, tmp_path, torch.float64)
    ours = assert_same_model(folder, theirs)
    assert_same_logits(ours, theirs, case)
    assert_same_logits(ours, transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype="auto"), case)
    assert ours.prepare("how does this person feel ?").shape[0] == 1


# --- going back ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", CASES, ids=str)
def test_state_dict_goes_back_bit_for_bit(case: Case) -> None:
    """Of weights that are shared with Hugging Face's model and of copies."""
    theirs = build_hf(case, torch.float32)
    expected = theirs.state_dict()
    for copy in (False, True):
        back = HookedVLM.from_hf(theirs, copy=copy).to_hf_state_dict()
        assert set(back) == set(expected)
        assert all(torch.equal(back[k], expected[k]) for k in expected)
    theirs.load_state_dict(back)


# The parameters that are edited in a model before it is saved.
EDITED = [(name, ("blocks.0.attn.v.weight",)) for name in ("clip-llama", "tied-qwen2", "text-mistral")]
EDITED += [
    (f"onevision-{n}", ("image_newline", "vision.patch_embed.weight", "embed.weight")) for n in ("plain", "tied")
]
# Keys are the middle third of a fused tensor.
EDITED += [(n, ("vision.blocks.1.attn.k.weight", "vision.patch_embed.weight", "embed.weight")) for n in OF_QWEN]
EDITED += [("gemma3-plain", ("blocks.1.ln2_post.weight", "connector.weight", "embed.weight"))]
EDITED += [(n, ("vision.ln_post.weight", "connector.proj.weight", "embed.weight")) for n in OF_TILES[:2]]
EDITED += [("llava-next-qwen2", ("image_newline",)), ("gemma3-text-untied", ("blocks.0.attn.v.weight",))]


@pytest.mark.parametrize("name, parts", EDITED, ids=lambda value: value if isinstance(value, str) else "")
def test_saved_folder_loads_in_hugging_face_with_the_edited_weights(
    name: str, parts: tuple[str, ...], tmp_path: Path
) -> None:
    case = BY_NAME[name]
    _, folder = tiny.save(case, tmp_path / "first")
    model: Any = HookedVLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        for factor, part in zip((2.0, 1.5, 1.1), parts, strict=False):
            model.get_parameter(part).mul_(factor)
    out = save_pretrained(model, tmp_path / "second", open_checkpoint(folder).hf_config)
    is_text = not case.has("tower")
    loader: Any = transformers.AutoModelForCausalLM if is_text else transformers.AutoModelForImageTextToText
    theirs, told = loader.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and theirs.dtype == torch.float64
    again, raw = HookedVLM.from_pretrained(out), raw_inputs(case)
    assert_same_logits(model, theirs, case)
    with torch.no_grad():
        assert torch.equal(again.forward_hf(**raw), model.forward_hf(**raw))
    text = "how does this person feel ?"
    assert torch.equal(again.prepare(text).tokens, model.prepare(text).tokens)
    assert is_text or again.prepare("what", picture()).n_images == [1]


def test_model_without_a_checkpoint_cannot_go_back(tmp_path: Path) -> None:
    theirs = build_hf(BY_NAME["clip-llama"])
    model = HookedVLM(HookedVLM.from_hf(theirs).cfg)
    with pytest.raises(ValueError, match="came from no Hugging Face checkpoint"):
        save_pretrained(model, tmp_path, theirs.config)
    with pytest.raises(ValueError, match="came from no Hugging Face checkpoint"):
        model.to_hf_state_dict()
