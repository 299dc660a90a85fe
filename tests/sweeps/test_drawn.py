"""Property: whatever is patched, where, in which direction and how many at once, the engine equals whole forwards."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.cases import BY_NAME, native_model
from tests.pairs import pair_of
from veena_lens.hook_table import hooks_of
from veena_lens.sweeps import patch_sweep
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
    """A model in pure float64, and two batches that differ in images and words."""
    return pair_of(native_model, case)


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
