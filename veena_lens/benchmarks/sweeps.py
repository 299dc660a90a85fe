"""Patch sweeps: the suffix engine against whole forwards, as multiples of one ordinary forward pass.

The naive engine is timed on a sample of its patches and scaled up: every one of them is one forward.
"""

from __future__ import annotations

import torch

from veena_lens.benchmarks.models import prompt, random_llava, seconds, table
from veena_lens.sweeps import patch_sweep
from veena_lens.sweeps.metrics import logit_diff


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    _, model = random_llava()
    clean, corrupted = (model.inputs_from_hf(**prompt(seed=s)) for s in (0, 1))
    metric = logit_diff(5, 6)
    kw = {"metric": metric, "progress": False}
    n_heads = model.cfg.n_layers * model.cfg.n_heads
    sample = {"layers": [0, 8], "units": [0, 1]}
    few = patch_sweep(model, clean, corrupted, engine="naive", **sample, **kw)
    fast = patch_sweep(model, clean, corrupted, **sample, **kw)
    error = float((few.values - fast.values).abs().max())
    base = seconds(lambda: model(clean))
    none = seconds(lambda: patch_sweep(model, clean, corrupted, layers=[15], units=[0], **kw))
    heads = seconds(lambda: patch_sweep(model, clean, corrupted, **kw))
    ten = list(range(590, 600))
    resid = seconds(lambda: [patch_sweep(model, clean, corrupted, sites="resid", positions=p, **kw) for p in ten[-2:]])
    naive = seconds(lambda: patch_sweep(model, clean, corrupted, engine="naive", **sample, **kw), repeats=1)
    rows = [
        ("one forward", base),
        ("both base runs and one head", none),
        (f"suffix: all {n_heads} heads, last position", heads),
        ("  of it the staircase", max(heads - none, 0.0)),
        ("suffix: resid of all layers, two positions", resid),
        (f"naive: all {n_heads} heads (from a sample of 4)", none + (naive - none) / 4 * n_heads),
    ]
    title = f"16 layers, d_model 512, 8 heads, 600 tokens, float32, one thread; engines differ by {error:.1e}"
    print(table(title, rows, ("one forward", base)))
    plan = patch_sweep(model, clean, corrupted, plan_only=True)
    print(f"  {plan!r}")


if __name__ == "__main__":
    main()
