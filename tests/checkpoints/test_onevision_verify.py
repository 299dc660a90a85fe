"""The certificate and the description of LLaVA-OneVision checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import tiny_onevision
from tests.checkpoints.tiny import picture
from tests.onevision_cases import ONEVISION_BY_NAME
from veena_lens import HookedVLM, cli
from veena_lens.hook_table import hooks_of
from veena_lens.images.anyres import OneCropImage
from veena_lens.images.canvas import AnyresImage
from veena_lens.verify import probe, verify


@pytest.mark.parametrize(
    ("name", "dtype", "with_processor", "every_hook"),
    [
        ("resampled", torch.float64, True, False),
        ("one-layer", torch.float32, False, True),
        ("tied", torch.bfloat16, True, False),
    ],
)
def test_certificate_passes_on_a_true_checkpoint(
    name: str, dtype: torch.dtype, with_processor: bool, every_hook: bool, tmp_path: Path, monkeypatch: Any
) -> None:
    if not every_hook:
        monkeypatch.setattr("veena_lens.verify.dead_hooks", lambda *_: ())
    case = ONEVISION_BY_NAME[f"onevision-{name}"]
    _, folder = tiny_onevision.save(case, tmp_path, dtype, with_processor=with_processor)
    model = HookedVLM.from_pretrained(folder)
    certificate = verify(model, str(folder), progress=False)
    assert certificate.passed, str(certificate)
    assert certificate.n_hooks == len(hooks_of(model.cfg)) and not certificate.dead_hooks
    assert len(certificate.checks) == 5 and certificate.checks[0].name.startswith("logits with images")


def test_certificate_fails_on_another_newline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veena_lens.verify.dead_hooks", lambda *_: ())
    _, folder = tiny_onevision.save(ONEVISION_BY_NAME["onevision-plain"], tmp_path, torch.float64)
    model = HookedVLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_parameter("image_newline").flatten()[5] += 1e-2
    certificate = verify(model, str(folder), progress=False)
    assert not certificate.passed and not certificate.checks[0].passed


def test_probe_has_a_picture_in_tiles_and_two_of_one_tile(tmp_path: Path) -> None:
    _, folder = tiny_onevision.save(ONEVISION_BY_NAME["onevision-plain"], tmp_path)
    inputs = probe(HookedVLM.from_pretrained(folder), [picture(60, 60), picture(90, 20), picture(9, 30)])
    assert inputs.n_images == [1, 2] and [[type(image) for image in row] for row in inputs.layouts] == [
        [AnyresImage],
        [OneCropImage, OneCropImage],
    ]


def test_inspect_describes_the_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = tiny_onevision.save(ONEVISION_BY_NAME["onevision-plain"], tmp_path, torch.bfloat16)
    assert cli.main(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    model: Any = HookedVLM.from_pretrained(folder)
    n = sum(p.numel() for p in model.parameters())
    for part in (f"{n:,}\n", f"hook points ({len(hooks_of(model.cfg))})", "max_tiles=9", "image newline"):
        assert part in shown, part
