"""The certificate: it passes where the models agree, and fails, naming the line, where they do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.cases import BY_NAME
from tests.checkpoints import tiny
from veena_lens import cli
from veena_lens.hook_table import hooks_of
from veena_lens.images.anyres import OneCropImage
from veena_lens.model.model import HookedVLM
from veena_lens.verify import Certificate, Check, dead_hooks, probe, verify


def loaded(name: str, folder: Path, dtype: torch.dtype, with_processor: bool = True) -> tuple[Any, str]:
    _, path = tiny.save(BY_NAME[name], folder, dtype, with_processor)
    return HookedVLM.from_pretrained(path), str(path)


# Every hook point is edited where the last is true, which takes long.
@pytest.mark.parametrize(
    ("name", "dtype", "with_processor", "every_hook"),
    [
        ("image-28-patch-7", torch.float64, True, True),
        ("siglip-qwen2", torch.float32, True, True),
        ("clip-mistral", torch.float64, False, True),
        ("tied-qwen2", torch.bfloat16, False, True),
        ("text-llama", torch.float32, True, True),
        ("text-qwen2", torch.float16, False, True),
        ("llava-next-mistral", torch.float64, True, False),
        ("llava-next-mistral", torch.float32, False, True),
        ("onevision-resampled", torch.float64, True, False),
        ("onevision-one-layer", torch.float32, False, True),
        ("onevision-tied", torch.bfloat16, True, False),
        ("gemma3-plain", torch.float64, True, False),
        ("gemma3-untied", torch.bfloat16, True, False),
        ("gemma3-one-token", torch.float32, False, True),
        ("gemma3-text-plain", torch.float64, True, False),
        ("qwen2_vl-one-layer", torch.float64, True, True),
        ("qwen2_vl-tied", torch.float32, False, False),
        ("qwen2_vl-plain", torch.bfloat16, True, False),
        ("qwen2_5_vl-one-layer", torch.float64, True, True),
        ("qwen2_5_vl-plain", torch.bfloat16, False, False),
        ("qwen3_vl-one-layer", torch.float32, False, True),
        ("qwen3_vl-deepstack-every-decoder-layer", torch.float64, False, False),
        ("qwen3_vl-plain", torch.bfloat16, True, False),
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
    model, path = loaded(name, tmp_path, dtype, with_processor)
    certificate = verify(model, path, progress=False)
    assert certificate.passed, str(certificate)
    assert certificate.n_hooks == len(hooks_of(model.cfg)) and not certificate.dead_hooks
    assert len(certificate.checks) == 5
    if BY_NAME[name].has("tower"):
        assert probe(model).n_images == [1, 2]
        assert certificate.checks[0].name.startswith(("logits with pictures", "logits with images"))
    assert [c.name.split(",")[0] for c in certificate.checks][-2:] == [
        "greedy decoding with a cache",
        "greedy decoding",
    ]
    lines = str(certificate).splitlines()
    assert lines[-1] == "passed" and any(f"{certificate.n_hooks} of {certificate.n_hooks}" in line for line in lines)
    assert not [n for n, h in model.hook_dict.items() if h._forward_hooks], "hooks are left"


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_certificate_passes_where_the_processor_has_no_template(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompts are then raw text, their images apart: Hugging Face takes touching ones for one."""
    monkeypatch.setattr("veena_lens.verify.dead_hooks", lambda *_: ())
    _, folder = tiny.save(BY_NAME[f"{family}-plain"], tmp_path, torch.float64)
    (folder / "chat_template.json").unlink()
    model = HookedVLM.from_pretrained(folder)
    assert probe(model).n_images == [1, 2]
    certificate = verify(model, str(folder), progress=False)
    assert certificate.passed, str(certificate)


@pytest.mark.parametrize(
    ("name", "part", "place", "change"),
    [
        ("clip-llama", "vision.blocks.0.mlp.up.weight", 0, 1e-3),
        ("llava-next-mistral", "image_newline", 5, 1e-2),
        ("onevision-plain", "image_newline", 5, 1e-2),
        ("qwen2_vl-plain", "vision.blocks.1.attn.v.weight", 5, 1e-2),
        ("qwen2_vl-plain", "connector.proj_in.bias", 5, 1e-2),
        ("qwen2_5_vl-plain", "vision.blocks.2.mlp.gate.bias", 5, 1e-2),
        ("qwen3_vl-plain", "deepstack.1.norm.weight", 5, 1e-2),
        ("qwen3_vl-plain", "vision.pos_embed.weight", 5, 1e-2),
        ("qwen3_vl-plain", "blocks.2.attn.k_norm.weight", 5, 1e-2),
        ("gemma3-plain", "connector.norm.weight", 5, 1e-2),
        ("gemma3-plain", "blocks.1.ln1_post.weight", 5, 1e-2),
        ("idefics3-plain", "vision.ln_post.bias", 5, 1e-2),
        ("idefics3-plain", "connector.proj.weight", 5, 1e-2),
        ("idefics3-plain", "vision.pos_embed.weight", 5, 1e-2),
    ],
)
def test_certificate_fails_on_weights_that_differ(
    name: str, part: str, place: int, change: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("veena_lens.verify.dead_hooks", lambda *_: ())
    model, path = loaded(name, tmp_path, torch.float64)
    with torch.no_grad():
        model.get_parameter(part).flatten()[place] += change
    certificate = verify(model, path, progress=False)
    assert not certificate.passed and not certificate.checks[0].passed
    assert "FAILED" in str(certificate).splitlines()[3]


def test_hook_point_that_does_nothing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = loaded("clip-llama", tmp_path, torch.float32)
    with torch.no_grad():  # nothing reads what this neuron layer says any more
        model.blocks[1].mlp.down.weight.zero_()
        model.vision.blocks[0].attn.o.weight.zero_()
    inputs = probe(model)[0]
    dead = dead_hooks(model, inputs, 1e-5, progress=False)
    assert {"blocks.1.mlp.hook_post", "blocks.1.mlp.hook_pre", "vision.blocks.0.attn.hook_z"} <= set(dead)
    assert "blocks.1.hook_mlp_out" not in dead and "blocks.0.mlp.hook_post" not in dead


def test_images_of_the_user_take_the_place_of_drawn_ones(tmp_path: Path) -> None:
    model, _path = loaded("clip-llama", tmp_path, torch.float32)
    assert probe(model, [tiny.picture(), tiny.picture(50, 20), tiny.picture(9, 30)]).n_images == [1, 2]
    with pytest.raises(ValueError, match="two images or more, not 1"):
        probe(model, [tiny.picture()])


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_images_of_the_user_keep_their_sizes(family: str, tmp_path: Path) -> None:
    _, folder = tiny.save(BY_NAME[f"{family}-plain"], tmp_path, torch.float32)
    model = HookedVLM.from_pretrained(folder)
    mine = [tiny.picture(), tiny.picture(90, 20), Image.new("RGB", (9, 30))]
    inputs = probe(model, mine)
    boxes = inputs.patch_boxes
    assert inputs.n_images == [1, 2] and boxes is not None
    assert [b[-1, 2:].tolist() for row in boxes for b in row] == [[40, 30], [90, 20], [9, 30]]


def test_probe_has_an_image_in_tiles_and_two_of_one_tile(tmp_path: Path) -> None:
    _, folder = tiny.save(BY_NAME["onevision-plain"], tmp_path)
    inputs = probe(HookedVLM.from_pretrained(folder), [tiny.picture(60, 60), tiny.picture(90, 20), tiny.picture(9, 30)])
    assert inputs.n_images == [1, 2]
    kinds = [isinstance(image, OneCropImage) for row in inputs.layouts for image in row]
    assert kinds == [False, True, True] and inputs.layouts[0][0].n_crops > 1


def test_model_that_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    model, path = loaded("text-llama", tmp_path, torch.float32)
    with pytest.raises(ValueError, match="the model is torch.float32, asked for torch.float64"):
        verify(model, path, dtype=torch.float64)
    exact = HookedVLM.from_pretrained(path, casts="none")
    with pytest.raises(ValueError, match="casts='hf'"):
        verify(exact, path)


def test_number_that_is_none_fails() -> None:
    check = Check(name="logits", error=float("nan"), allowed=1.0)
    assert not check.passed
    certificate = Certificate(
        model="m",
        architecture="a",
        dtype="float32",
        device="cpu",
        versions="v",
        checks=(check,),
        n_hooks=1,
        dead_hooks=(),
    )
    assert not certificate.passed and "FAILED" in str(certificate)


SHOWN = {
    "qwen2_vl-plain": ["Qwen2VLForConditionalGeneration", "vision.blocks.{0..1}.attn.hook_rot_q", "(1, 1, 2)"],
    "qwen2_5_vl-plain": ["vision.blocks.{0..2}.mlp.hook_pre_linear", "window_side=2", "full_attention_layers=(1,)"],
    "qwen3_vl-plain": ["deepstack.{0..1}.hook_out", "blocks.{1..2}.hook_deepstack", "deep stack", "interleaved=True"],
    "llava-next-mistral": [
        "LlavaNextForConditionalGeneration", "image_pinpoints=", "vision.blocks.{0..1}.attn.hook_pattern",
    ],
    "onevision-plain": ["max_tiles=9", "image newline"],
    "gemma3-plain": [
        "Gemma3ForConditionalGeneration", "bidirectional_images=True", "blocks.{0..2}.ln1_post.hook_scale",
        "connector.norm.hook_normalized", "vision.ln_post.hook_normalized", "averages_patches=True",
        "unembedding (tied)",
    ],
    "smolvlm-plain": [
        "SmolVLMForConditionalGeneration", "image_layout='tiles'", "vision.ln_post.hook_normalized",
        "vision.blocks.{0..1}.attn.hook_pattern", "connector.hook_in", "positions_by_fraction=True",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", SHOWN)
def test_inspect_describes_the_checkpoint(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, path = loaded(name, tmp_path, torch.bfloat16)
    assert cli.main(["inspect", path]) == 0
    shown = capsys.readouterr().out
    n = sum(p.numel() for p in model.parameters())
    for part in (f"{n:,}\n", f"hook points ({len(hooks_of(model.cfg))})", *SHOWN[name]):
        assert part in shown, part
    assert ("connector.hook_pre" in shown) == (name not in ("gemma3-plain", "smolvlm-plain"))


def test_models_lists_checkpoints_of_every_family(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models"]) == 0
    shown = capsys.readouterr().out
    for part in ("google/gemma-3-4b-it", "google/gemma-3-1b-it", "HuggingFaceTB/SmolVLM2-2.2B-Instruct"):
        assert part in shown, part
    assert "Idefics3ForConditionalGeneration" in shown
