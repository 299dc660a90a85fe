"""Idefics3 and SmolVLM from files and back: every layout, sharded and single, and the certificate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.cases import raw_inputs, relative_error
from tests.checkpoints import tiny_tiles
from tests.checkpoints.test_qwen_loading import assert_same_model
from tests.checkpoints.tiny import picture
from tests.tile_cases import TILE_BY_NAME
from veena_lens import HookedVLM, cli
from veena_lens.checkpoints import open_checkpoint, save_pretrained
from veena_lens.checkpoints.files import weight_files
from veena_lens.hook_table import hooks_of
from veena_lens.verify import probe, verify

NAMES = ["idefics3-plain", "smolvlm-tied", "smolvlm-plain", "idefics3-biases"]


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("name", NAMES)
def test_saved_folder_gives_the_weights_bit_for_bit(name: str, sharded: bool, tmp_path: Path) -> None:
    """Also with what old files hold besides."""
    options = dict(max_shard_size="30KB") if sharded else {}
    theirs, folder = tiny_tiles.save(TILE_BY_NAME[name], tmp_path, with_processor=False, **options)
    assert (len(weight_files(folder)) > 2) == sharded
    if not sharded:
        state = load_file(folder / "model.safetensors")
        assert ("lm_head.weight" in state) == ("tied" not in name)
        state["model.vision_model.embeddings.position_ids"] = torch.arange(16)[None]
        state["model.text_model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert_same_model(folder, theirs)


@pytest.mark.parametrize("name", NAMES[:2])
def test_saved_folder_loads_in_hugging_face_with_the_edited_weights(name: str, tmp_path: Path) -> None:
    case = TILE_BY_NAME[name]
    _, folder = tiny_tiles.save(case, tmp_path / "first")
    model: Any = HookedVLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        for weight in (model.vision.ln_post.weight, model.connector.proj.weight, model.embed.weight):
            weight.mul_(1.5)
    out = save_pretrained(model, tmp_path / "second", open_checkpoint(folder).hf_config)
    theirs, told = transformers.AutoModelForImageTextToText.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and theirs.dtype == torch.float64
    again, raw = HookedVLM.from_pretrained(out), raw_inputs(case)
    with torch.no_grad():
        logits = model.forward_hf(**raw)
        assert relative_error(logits, theirs(**raw).logits, raw["attention_mask"]) < 1e-9
        assert torch.equal(again.forward_hf(**raw), logits)
    assert again.prepare("what", picture()).n_images == [1]


def test_missing_and_spare_weights_are_listed(tmp_path: Path) -> None:
    _, folder = tiny_tiles.save(TILE_BY_NAME["idefics3-plain"], tmp_path, with_processor=False)
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
    ("name", "dtype", "with_processor", "every_hook"),
    [
        ("idefics3-one-tower-head", torch.float64, True, False),
        ("smolvlm-plain", torch.float32, True, True),
        ("smolvlm-tied", torch.bfloat16, False, False),
        ("idefics3-scale-3", torch.float64, False, False),
    ],
)
def test_certificate_passes_on_a_true_checkpoint(
    name: str, dtype: torch.dtype, with_processor: bool, every_hook: bool, tmp_path: Path, monkeypatch: Any
) -> None:
    if not every_hook:
        monkeypatch.setattr("veena_lens.verify.dead_hooks", lambda *_: ())
    _, folder = tiny_tiles.save(TILE_BY_NAME[name], tmp_path, dtype, with_processor=with_processor)
    model = HookedVLM.from_pretrained(folder)
    certificate = verify(model, str(folder), progress=False)
    assert certificate.passed, str(certificate)
    assert certificate.n_hooks == len(hooks_of(model.cfg)) and len(certificate.checks) == 5
    assert probe(model).n_images == [1, 2]
    assert not [n for n, h in model.hook_dict.items() if h._forward_hooks], "hooks are left"


@pytest.mark.parametrize("part", ["vision.ln_post.bias", "connector.proj.weight", "vision.pos_embed.weight"])
def test_certificate_fails_on_weights_that_differ(part: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("veena_lens.verify.dead_hooks", lambda *_: ())
    _, folder = tiny_tiles.save(TILE_BY_NAME["idefics3-plain"], tmp_path, torch.float64)
    model = HookedVLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_parameter(part).flatten()[5] += 1e-2
    certificate = verify(model, str(folder), progress=False)
    assert not certificate.passed and not certificate.checks[0].passed


def test_inspect_and_models_describe_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = tiny_tiles.save(TILE_BY_NAME["smolvlm-plain"], tmp_path, torch.bfloat16)
    assert cli.main(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    parts = ["SmolVLMForConditionalGeneration", "image_layout='tiles'", "vision.ln_post.hook_normalized"]
    for part in (*parts, "vision.blocks.{0..1}.attn.hook_pattern", "connector.hook_in", "positions_by_fraction=True"):
        assert part in shown, part
    assert "connector.hook_pre" not in shown
    assert cli.main(["models"]) == 0
    shown = capsys.readouterr().out
    assert "Idefics3ForConditionalGeneration" in shown and "HuggingFaceTB/SmolVLM2-2.2B-Instruct" in shown


def test_relative_of_another_build_is_refused_before_its_fields_are_read(tmp_path: Path) -> None:
    _, folder = tiny_tiles.save(TILE_BY_NAME["idefics3-plain"], tmp_path, with_processor=False)
    raw = json.loads((folder / "config.json").read_text())
    raw |= dict(architectures=["Idefics2ForConditionalGeneration"], model_type="idefics2")
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="'Idefics2ForConditionalGeneration'.*would need a perceiver resampler"):
        HookedVLM.from_pretrained(folder)
