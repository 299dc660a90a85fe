"""The certificate: it passes where the models agree, and fails, naming the line, where they do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cases import BY_NAME
from tests.checkpoints import tiny
from veena_lens.hook_table import hooks_of
from veena_lens.model.model import HookedVLM
from veena_lens.verify import Certificate, Check, dead_hooks, probe, verify


def loaded(name: str, folder: Path, dtype: torch.dtype, processor: bool = True) -> tuple[Any, str]:
    _, path = tiny.save(BY_NAME[name], folder, dtype, processor)
    return HookedVLM.from_pretrained(str(path)), str(path)


@pytest.mark.parametrize(
    ("name", "dtype", "processor"),
    [
        ("image-28-patch-7", torch.float64, True),
        ("siglip-qwen2", torch.float32, True),
        ("clip-mistral", torch.float64, False),
        ("tied-qwen2", torch.bfloat16, False),
        ("text-llama", torch.float32, True),
        ("text-qwen2", torch.float16, False),
    ],
)
def test_certificate_passes_on_a_true_checkpoint(
    name: str, dtype: torch.dtype, processor: bool, tmp_path: Path
) -> None:
    model, path = loaded(name, tmp_path, dtype, processor)
    certificate = verify(model, path, progress=False)
    assert certificate.passed, str(certificate)
    assert certificate.n_hooks == len(hooks_of(model.cfg)) and not certificate.dead_hooks
    assert [c.name.split(",")[0] for c in certificate.checks][-2:] == [
        "greedy decoding with a cache",
        "greedy decoding",
    ]
    lines = str(certificate).splitlines()
    assert lines[-1] == "passed" and any(f"{certificate.n_hooks} of {certificate.n_hooks}" in line for line in lines)
    assert not [n for n, h in model.hook_dict.items() if h._forward_hooks], "hooks are left"


def test_certificate_fails_on_weights_that_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veena_lens.verify.dead_hooks", lambda *_: ())
    model, path = loaded("clip-llama", tmp_path, torch.float64)
    with torch.no_grad():
        model.vision.blocks[0].mlp.up.weight[0, 0] += 1e-3
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


def test_pictures_of_the_user_take_the_place_of_drawn_ones(tmp_path: Path) -> None:
    model, path = loaded("clip-llama", tmp_path, torch.float32)
    assert probe(model, [tiny.picture(), tiny.picture(50, 20), tiny.picture(9, 30)]).n_images == [1, 2]
    with pytest.raises(ValueError, match="two images or more, not 1"):
        probe(model, [tiny.picture()])


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
