"""Sweeps in both engines: the suffix engine must give what whole forwards give, and the edits must do something."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.cases import BY_NAME, Case
from veena_lens.scores import Scores
from veena_lens.sweeps import generation_sweep, patch_sweep, steer_sweep
from veena_lens.sweeps.metrics import logit_diff

KW: dict[str, Any] = dict(metric=logit_diff(5, 6), progress=False)
ENGINES = ("suffix", "naive")
# One decoder for each feature that can break the suffix engine.
STREAMS = ("2 i4x4 1 v2x2x4 3", "1 i2x6 3")
LLAVA = {
    "several images": BY_NAME["three-images-and-none"],
    "window": BY_NAME["window-qwen2"],
    "scaled rotary positions": BY_NAME["rope-llama3"],
}
MULTIMODAL = {
    "multimodal rotary positions": Case(name="sweeps", family="qwen2_vl", rows=STREAMS),
    "deep-stack features": Case(name="sweeps", family="qwen3_vl", rows=STREAMS),
}
BIDIRECTIONAL = {
    "bidirectional images in a narrow window": BY_NAME["gemma3-narrow-window"],
    "bidirectional images that touch": BY_NAME["gemma3-touching-pictures"],
}
BESIDE = {"bidirectional images beside each other": BY_NAME["gemma3-unequal-rows"]}
FEATURES = LLAVA | MULTIMODAL | BIDIRECTIONAL | BESIDE


def agree(model: Any, clean: Any, corrupted: Any, least: float = 1e-6, **kw: Any) -> Any:
    """Sweep patches in both engines and compare every metric; return what the suffix engine found."""
    fast, plain = (patch_sweep(model, clean, corrupted, engine=engine, **(KW | kw)) for engine in ENGINES)
    for name in fast if isinstance(fast, dict) else [None]:
        one, other = (fast, plain) if name is None else (fast[name], plain[name])
        assert one.axes == other.axes
        assert float((other.values - base_of(other)).abs().max()) > least, "no patch did anything"
        torch.testing.assert_close(one.values, other.values, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(one.scores, other.scores, rtol=1e-10, atol=1e-10)
    return fast


def base_of(result: Scores) -> Tensor:
    """The metric of the run that is patched, shaped as the values."""
    base = result.corrupted if result.direction == "denoising" else result.clean
    return base.view([-1 if axis == "pair" else 1 for axis in result.axes]) if "pair" in result.axes else base


def steering_agrees(model: Any, inputs: Any, vectors: Tensor, **kw: Any) -> Scores:
    """Sweep steering vectors in both engines; return what the suffix engine found."""
    fast, plain = (steer_sweep(model, inputs, vectors, engine=engine, **(KW | kw)) for engine in ENGINES)
    torch.testing.assert_close(fast.values, plain.values, rtol=1e-10, atol=1e-12)
    return fast


def texts_agree(model: Any, inputs: Any, entries: list[Any], **kw: Any) -> Scores:
    """Generate under every entry in both engines; return what the suffix engine found."""
    fast, plain = (generation_sweep(model, inputs, entries, engine=e, progress=False, **kw) for e in ENGINES)
    assert fast.tokens == plain.tokens
    return fast
