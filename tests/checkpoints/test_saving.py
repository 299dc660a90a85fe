"""Going back: names and bits are Hugging Face's own, and a saved folder loads in both worlds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from tests.cases import BY_NAME, CASES, Case, build_hf, raw_inputs
from tests.checkpoints import tiny
from veena_lens.checkpoints import open_checkpoint, save_pretrained
from veena_lens.model.model import HookedVLM


@pytest.mark.parametrize("case", CASES, ids=str)
def test_state_dict_goes_back_bit_for_bit(case: Case) -> None:
    theirs = build_hf(case, torch.float32)
    back, expected = HookedVLM.from_hf(theirs, copy=True).to_hf_state_dict(), theirs.state_dict()
    assert set(back) == set(expected)
    assert all(torch.equal(back[k], expected[k]) for k in expected)
    theirs.load_state_dict(back)


@pytest.mark.parametrize("name", ["clip-llama", "tied-qwen2", "text-mistral"])
def test_saved_folder_loads_in_hugging_face_with_the_edited_weights(name: str, tmp_path: Path) -> None:
    case = BY_NAME[name]
    _, folder = tiny.save(case, tmp_path / "first")
    model = HookedVLM.from_pretrained(str(folder), dtype=torch.float64)
    with torch.no_grad():
        model.blocks[0].attn.v.weight.mul_(2.0)  # type: ignore[union-attr]
    out = save_pretrained(model, tmp_path / "second", open_checkpoint(folder).hf_config)
    kind = transformers.AutoModelForCausalLM if case.text_only() else transformers.AutoModelForImageTextToText
    theirs, told = kind.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert theirs.dtype == torch.float64
    again = HookedVLM.from_pretrained(str(out))
    raw = raw_inputs(case)
    with torch.no_grad():
        expected = theirs(**raw).logits
        keep = raw["attention_mask"].bool()
        torch.testing.assert_close(model.forward_hf(**raw)[keep], expected[keep], rtol=1e-9, atol=1e-12)
        assert torch.equal(again.forward_hf(**raw), model.forward_hf(**raw))
    text = "how does this person feel ?"
    assert torch.equal(again.prepare(text).tokens, model.prepare(text).tokens)


def test_model_without_a_checkpoint_cannot_go_back(tmp_path: Path) -> None:
    theirs = build_hf(BY_NAME["clip-llama"])
    model = HookedVLM(HookedVLM.from_hf(theirs).cfg)
    with pytest.raises(ValueError, match="came from no Hugging Face checkpoint"):
        save_pretrained(model, tmp_path, theirs.config)
    with pytest.raises(ValueError, match="came from no Hugging Face checkpoint"):
        model.to_hf_state_dict()
