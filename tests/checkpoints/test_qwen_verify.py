"""The certificate and the description of checkpoints whose images have any size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

from tests.checkpoints import tiny_qwen
from tests.checkpoints.tiny import picture
from tests.parity.test_llava_next import PINS
from tests.parity.test_llava_next import build as build_next
from tests.qwen_cases import QWEN_BY_NAME
from veena_lens import HookedVLM, cli
from veena_lens.hook_table import hooks_of
from veena_lens.verify import probe, verify


def next_folder(folder: Path, dtype: torch.dtype, with_processor: bool) -> Path:
    """A LLaVA-1.6 folder."""
    from tests.checkpoints.tiny import LLAVA_TEMPLATE, tokenizer

    hf, _ = build_next("mistral")
    hf.to(dtype).save_pretrained(folder)
    if with_processor:
        images = transformers.LlavaNextImageProcessorPil(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=PINS
        )
        transformers.LlavaNextProcessor(
            images,
            tokenizer(LLAVA_TEMPLATE),
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=LLAVA_TEMPLATE,
        ).save_pretrained(folder)
    return folder


def saved(name: str, folder: Path, dtype: torch.dtype, with_processor: bool) -> Path:
    if name == "llava-next":
        return next_folder(folder, dtype, with_processor)
    return tiny_qwen.save(QWEN_BY_NAME[name], folder, dtype, with_processor=with_processor)[1]


@pytest.mark.parametrize(
    ("name", "dtype", "with_processor", "every_hook"),
    [
        ("qwen2_vl-one-layer", torch.float64, True, True),
        ("qwen2_vl-tied", torch.float32, False, False),
        ("qwen2_vl-plain", torch.bfloat16, True, False),
        ("qwen2_5_vl-one-layer", torch.float64, True, True),
        ("qwen2_5_vl-plain", torch.bfloat16, False, False),
        ("qwen3_vl-one-layer", torch.float32, False, True),
        ("qwen3_vl-deepstack-every-decoder-layer", torch.float64, False, False),
        ("qwen3_vl-plain", torch.bfloat16, True, False),
        ("llava-next", torch.float64, True, False),
        ("llava-next", torch.float32, False, True),
    ],
)
def test_certificate_passes_on_a_true_checkpoint(
    name: str,
    dtype: torch.dtype,
    with_processor: bool,
    every_hook: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not every_hook:
        monkeypatch.setattr("veena_lens.verify.dead_hooks", lambda *_: ())
    folder = saved(name, tmp_path, dtype, with_processor)
    model = HookedVLM.from_pretrained(folder)
    certificate = verify(model, str(folder), progress=False)
    assert certificate.passed, str(certificate)
    assert certificate.n_hooks == len(hooks_of(model.cfg)) and not certificate.dead_hooks
    assert len(certificate.checks) == 5 and certificate.checks[0].name.startswith("logits with images")
    assert not [n for n, h in model.hook_dict.items() if h._forward_hooks], "hooks are left"


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_vl"])
def test_certificate_passes_where_the_processor_has_no_template(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompts are then raw text, their images apart: Hugging Face takes touching ones for one."""
    monkeypatch.setattr("veena_lens.verify.dead_hooks", lambda *_: ())
    _, folder = tiny_qwen.save(QWEN_BY_NAME[f"{kind}-plain"], tmp_path, torch.float64)
    (folder / "chat_template.json").unlink()
    model = HookedVLM.from_pretrained(folder)
    assert probe(model).n_images == [1, 2]
    certificate = verify(model, str(folder), progress=False)
    assert certificate.passed, str(certificate)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("qwen2_vl-plain", "vision.blocks.1.attn.v.weight"),
        ("qwen2_vl-plain", "connector.proj_in.bias"),
        ("qwen2_5_vl-plain", "vision.blocks.2.mlp.gate.bias"),
        ("qwen3_vl-plain", "deepstack.1.norm.weight"),
        ("qwen3_vl-plain", "vision.pos_embed.weight"),
        ("qwen3_vl-plain", "blocks.2.attn.k_norm.weight"),
        ("llava-next", "image_newline"),
    ],
)
def test_certificate_fails_on_weights_that_differ(
    name: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("veena_lens.verify.dead_hooks", lambda *_: ())
    folder = saved(name, tmp_path, torch.float64, True)
    model = HookedVLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_parameter(part).flatten()[5] += 1e-2
    certificate = verify(model, str(folder), progress=False)
    assert not certificate.passed and not certificate.checks[0].passed
    assert "FAILED" in str(certificate).splitlines()[3]


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_vl"])
def test_pictures_of_the_user_take_the_place_of_drawn_ones(kind: str, tmp_path: Path) -> None:
    _, folder = tiny_qwen.save(QWEN_BY_NAME[f"{kind}-plain"], tmp_path, torch.float32)
    model = HookedVLM.from_pretrained(folder)
    mine = [picture(), picture(90, 20), Image.new("RGB", (9, 30))]
    inputs = probe(model, mine)
    boxes = inputs.patch_boxes
    assert inputs.n_images == [1, 2] and boxes is not None
    assert [b[-1, 2:].tolist() for row in boxes for b in row] == [[40, 30], [90, 20], [9, 30]]


SHOWN = {
    "qwen2_vl-plain": ["Qwen2VLForConditionalGeneration", "vision.blocks.{0..1}.attn.hook_rot_q", "(1, 1, 2)"],
    "qwen2_5_vl-plain": ["vision.blocks.{0..2}.mlp.hook_pre_linear", "window_side=2", "full_attention_layers=(1,)"],
    "qwen3_vl-plain": ["deepstack.{0..1}.hook_out", "blocks.{1..2}.hook_deepstack", "deep stack", "interleaved=True"],
    "llava-next": ["LlavaNextForConditionalGeneration", "image_pinpoints=", "vision.blocks.{0..1}.attn.hook_pattern"],
}


@pytest.mark.parametrize("name", SHOWN)
def test_inspect_describes_the_checkpoint(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(name, tmp_path, torch.bfloat16, True)
    assert cli.main(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    model: Any = HookedVLM.from_pretrained(folder)
    n = sum(p.numel() for p in model.parameters())
    for part in (f"{n:,}\n", f"hook points ({len(hooks_of(model.cfg))})", *SHOWN[name]):
        assert part in shown, part
