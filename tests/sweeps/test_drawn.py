"""Property: whatever is patched, where, in which direction and how many at once, the engine equals whole forwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.cases import BY_NAME, counted, native_model, raw_inputs
from veena_lens.hook_table import hooks_of
from veena_lens.sweeps import patch_sweep, steer_sweep
from veena_lens.sweeps.metrics import logit_diff, project

CASES = [
    BY_NAME["three-images-and-none"],
    BY_NAME["window-qwen2"],
    BY_NAME["both-biases-tied"],
    BY_NAME["text-qwen3"],
    BY_NAME["gemma3-unequal-rows"],
    BY_NAME["qwen2_vl-plain"],
    BY_NAME["qwen3_vl-plain"],
    BY_NAME["qwen3_vl-image-and-video"],
    BY_NAME["onevision-image-and-video"],
    BY_NAME["idefics3-unequal-pictures"],
]


def runs(case: Any) -> tuple[Any, Any, Any]:
    """A model in pure float64, and two batches that differ in images and one token."""
    model, raw = native_model(case, casts="none"), raw_inputs(case)
    raw = raw if "mm_token_type_ids" in raw else counted(raw)
    other = {key: -value if key.startswith("pixel_values") else value for key, value in raw.items()}
    ids = raw["input_ids"].clone()
    ids[:, -1] = (ids[:, -1] + 3) % 90 + 3
    other["input_ids"] = ids
    return model, model.inputs_from_hf(**raw), model.inputs_from_hf(**other)


@given(data=st.data())
def test_patch_sweeps_equal_whole_forwards(data: st.DataObject) -> None:
    model, clean, corrupted = runs(data.draw(st.sampled_from(CASES), label="case"))
    row = data.draw(st.integers(0, len(clean) - 1), label="row")
    clean, corrupted = clean[row].without_padding(), corrupted[row].without_padding()
    known = [n for n, hook in hooks_of(model.cfg).items() if n.startswith("blocks.") and hook.of_text]
    sites = data.draw(st.lists(st.sampled_from(known), min_size=1, max_size=4, unique=True), label="sites")
    length = clean.shape[1]
    positions = data.draw(
        st.one_of(
            st.sampled_from(["last", "query", "all", "each"]),
            st.lists(st.integers(0, length - 1), min_size=1, max_size=4, unique=True),
        ),
        label="positions",
    )
    direction = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    last = model.cfg.n_layers - 1
    metrics = {"logits": logit_diff(5, 6), "stream": project(f"blocks.{last}.hook_resid_post", direction)}
    kw: dict[str, Any] = dict(
        sites=sites,
        positions=positions,
        metric=metrics,
        direction=data.draw(st.sampled_from(["denoising", "noising"]), label="direction"),
        progress=False,
    )
    fast = patch_sweep(model, clean, corrupted, max_rows=data.draw(st.integers(1, 40), label="max_rows"), **kw)
    plain = patch_sweep(model, clean, corrupted, engine="naive", **kw)
    for name in metrics:
        torch.testing.assert_close(fast[name].values, plain[name].values, rtol=1e-10, atol=1e-11)


def test_a_steering_sweep_resumes_where_it_was(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    from veena_lens.sweeps import engine

    model, inputs, _ = runs(CASES[0])
    vectors = torch.randn(model.cfg.n_layers, model.cfg.d_model, dtype=torch.float64)
    kw: dict[str, Any] = dict(alphas=[0.5, 1, 2], progress=False, max_rows=2, out=tmp_path)
    real, calls = engine.run_staircase, []

    def dies(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(engine, "run_staircase", dies)
    with pytest.raises(KeyboardInterrupt):
        steer_sweep(model, inputs, vectors, logit_diff(5, 6), **kw)
    result = steer_sweep(model, inputs, vectors, logit_diff(5, 6), **kw)
    assert len(calls) == len(inputs) * 3 + 1, "chunks that were kept ran again"
    fresh = steer_sweep(model, inputs, vectors, logit_diff(5, 6), **{**kw, "out": None})
    torch.testing.assert_close(result.values, fresh.values, rtol=0, atol=0)
    other = steer_sweep(model, inputs, -vectors, logit_diff(5, 6), **kw)  # another sweep, not the kept one
    assert not torch.equal(other.values, fresh.values)
