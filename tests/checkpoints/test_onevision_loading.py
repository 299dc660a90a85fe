"""LLaVA-OneVision files: every layout gives the weights bit for bit, tied heads and shards too, and goes back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from tests.cases import hf_model, raw_inputs, relative_error
from tests.checkpoints import tiny_onevision
from tests.checkpoints.test_loading import assert_same_model
from tests.model_adapters.test_keys import LAYOUTS
from tests.onevision_cases import ONEVISION_BY_NAME
from veena_lens import HookedVLM
from veena_lens.checkpoints import open_checkpoint, save_pretrained
from veena_lens.checkpoints.files import weight_files

NAMES = ["onevision-plain", "onevision-tied"]
FILES = [*((layout, False) for layout in LAYOUTS), ("hub files of 2023 to 2025", True)]


@pytest.mark.parametrize(
    "layout, sharded", [*((layout, False) for layout in LAYOUTS), ("hub files of 2023 to 2025", True)]
)
@pytest.mark.parametrize("name", NAMES)
def test_every_layout_of_a_file_gives_the_same_logits(name: str, layout: str, sharded: bool, tmp_path: Path) -> None:
    case = ONEVISION_BY_NAME[name]
    theirs, folder = tiny_onevision.save(case, tmp_path, torch.float64, with_processor=False)
    (folder / "model.safetensors").unlink()
    stored = {LAYOUTS[layout](k): v.contiguous() for k, v in theirs.state_dict().items()}
    if name.endswith("tied"):
        del stored[LAYOUTS[layout]("lm_head.weight")]
    if sharded:
        files = {k: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, k in enumerate(sorted(stored))}
        for file in set(files.values()):
            save_file({k: v for k, v in stored.items() if files[k] == file}, folder / file, metadata={"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    else:
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    assert len(weight_files(folder)) == (3 if sharded else 1)
    ours, raw = assert_same_model(folder, theirs), raw_inputs(case)
    with torch.no_grad():
        assert relative_error(ours.forward_hf(**raw), theirs(**raw).logits, raw["attention_mask"]) < 1e-9


@pytest.mark.parametrize("name", [*NAMES, "onevision-clip", "onevision-pooling-head", "onevision-inner-feature-layer"])
def test_state_dict_goes_back_bit_for_bit(name: str) -> None:
    theirs = hf_model(ONEVISION_BY_NAME[name])
    back, expected = HookedVLM.from_hf(theirs, copy=True).to_hf_state_dict(), theirs.state_dict()
    assert set(back) == set(expected)
    assert all(torch.equal(back[k], expected[k]) for k in expected)


@pytest.mark.parametrize("name", NAMES)
def test_saved_folder_loads_in_hugging_face_with_the_edited_weights(name: str, tmp_path: Path) -> None:
    case = ONEVISION_BY_NAME[name]
    _, folder = tiny_onevision.save(case, tmp_path / "first")
    model: Any = HookedVLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        model.image_newline.mul_(2.0)
        model.vision.patch_embed.weight.mul_(1.5)
        model.embed.weight.mul_(1.1)
    out = save_pretrained(model, tmp_path / "second", open_checkpoint(folder).hf_config)
    loaded: Any = transformers.AutoModelForImageTextToText.from_pretrained(out, dtype="auto", output_loading_info=True)
    theirs, told = loaded
    assert not told["missing_keys"] and not told["unexpected_keys"] and theirs.dtype == torch.float64
    again, raw = HookedVLM.from_pretrained(out), raw_inputs(case)
    with torch.no_grad():
        logits = model.forward_hf(**raw)
        assert relative_error(logits, theirs(**raw).logits, raw["attention_mask"]) < 1e-9
        assert torch.equal(again.forward_hf(**raw), logits)
    text = "how does this person feel ?"
    assert torch.equal(again.prepare(text).tokens, model.prepare(text).tokens)


def test_a_relative_of_the_family_is_refused_by_name(tmp_path: Path) -> None:
    told = dict(model_type="llavaonevision1_5", architectures=["LLaVAOneVision1_5_ForConditionalGeneration"])
    (tmp_path / "config.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match="model_type 'llavaonevision1_5' .*is unknown to transformers.*LlavaOnevision"):
        HookedVLM.from_pretrained(tmp_path)
