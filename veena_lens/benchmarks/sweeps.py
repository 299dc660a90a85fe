"""Time patch sweeps: the suffix engine, whole forward passes and transformer_lens's bridge, on the same weights.

Times are in units of one ordinary forward pass. The naive engine and the bridge are timed on a sample of their patches
and scaled up, since each patch is one forward pass. The scores of the sample are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from veena_lens.benchmarks.forward import peak_mebibytes
from veena_lens.benchmarks.models import WithImage, bridge_of, prompt, random_llava, seconds, table
from veena_lens.sweeps import patch_sweep
from veena_lens.sweeps.metrics import logit_diff

METRIC = logit_diff(5, 6)
SAMPLE_LAYERS, SAMPLE_HEADS = [0, 8], [0, 1]
# Layers, heads, tokens.
SIZES = ((8, 8, 600), (16, 8, 600), (32, 8, 600), (16, 16, 600), (16, 8, 900), (16, 8, 1200))
LAST_TEN = list(range(590, 600))


def bridge_sweep(model: WithImage, clean: WithImage, raw: dict[str, Tensor], index: pd.DataFrame) -> Tensor:
    """Patch the sample of heads at the last position by `transformer_lens.patching` through the bridge."""
    from transformer_lens import patching

    names = [f"blocks.{layer}.attn.hook_z" for layer in sorted(set(index["layer"]))]
    _, cache = clean.run_with_cache(raw["input_ids"], names_filter=names)

    def put(activation: Tensor, where: Any, source: Tensor) -> Tensor:
        _, pos, head = (int(i) for i in where)
        activation[:, pos, head] = source[:, pos, head]
        return activation

    patch: Any = patching.generic_activation_patch
    metric = partial(_last, METRIC)
    return patch(model, raw["input_ids"], cache, metric, put, "z", index_df=index)


def _last(metric: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    return metric(logits[:, -1])[0]


def against_others() -> str:
    """Return the table of one sweep by the three methods."""
    hf, model = random_llava()
    raw = {seed: prompt(seed=seed) for seed in (0, 1)}
    clean, corrupted = (model.inputs_from_hf(**raw[seed]) for seed in (0, 1))
    sweep = partial(patch_sweep, model, clean, corrupted, metric=METRIC, progress=False)
    few = partial(sweep, layers=SAMPLE_LAYERS, units=SAMPLE_HEADS)
    n_heads, n_sample = model.cfg.n_layers * model.cfg.n_heads, len(SAMPLE_LAYERS) * len(SAMPLE_HEADS)
    fast, plain = few().values, few(engine="naive").values
    bridge = bridge_of(hf)
    mine, theirs = (WithImage(bridge, raw[seed]["pixel_values"]) for seed in (1, 0))
    index = pd.DataFrame(
        [(layer, 599, head) for layer in SAMPLE_LAYERS for head in SAMPLE_HEADS], columns=["layer", "pos", "head"]
    )
    bridged = bridge_sweep(mine, theirs, raw[1], index).reshape(fast.shape)
    errors = (float((fast - other).abs().max()) for other in (plain, bridged))

    base = seconds(lambda: model(clean))
    runs = seconds(lambda: sweep(layers=[15], units=[0]))
    heads = seconds(sweep)
    resid = seconds(lambda: [sweep(sites="resid", positions=p) for p in LAST_TEN[:1]], repeats=1)
    ten = seconds(lambda: sweep(sites="resid", positions=slice(590, 600)))
    one_by_one = seconds(lambda: _ten_positions(model, clean, corrupted))
    naive = (seconds(lambda: few(engine="naive"), repeats=1) - runs) / n_sample
    with_bridge = seconds(lambda: bridge_sweep(mine, theirs, raw[1], index), repeats=1)
    bridge_base = seconds(lambda: theirs.run_with_cache(raw[0]["input_ids"], names_filter=["blocks.0.attn.hook_z"]))
    a_patch = (with_bridge - bridge_base) / n_sample
    rows = [
        ("one forward", base),
        ("Hugging Face forward, sdpa", seconds(lambda: hf(**raw[0]))),
        ("both base runs and one head", runs),
        (f"suffix engine: all {n_heads} heads, last position", heads),
        ("  of it the staircase", max(heads - runs, 0.0)),
        ("suffix: resid of all layers, one position", resid),
        ("suffix: resid, last ten positions together", ten),
        ("suffix: resid, last ten positions one by one", one_by_one),
        (f"whole forwards here, all {n_heads} heads (from {n_sample})", runs + naive * n_heads),
        (f"bridge, all {n_heads} heads (from {n_sample})", bridge_base + a_patch * n_heads),
    ]
    against_whole, against_bridge = errors
    title = (
        "16 layers, d_model 512, 8 heads, 600 tokens (576 of a picture), float32, one thread; scores of the sample "
        f"differ by {against_whole:.1e} from whole forward passes, {against_bridge:.1e} from the bridge"
    )
    lines = [table(title, rows, ("one forward", base))]
    stairs = max(heads - runs, 1e-9)
    total = bridge_base + a_patch * n_heads
    lines.append(f"  the bridge takes {total / stairs:.0f} staircases, {total / heads:.0f} whole sweeps")
    lines.append(f"  {patch_sweep(model, clean, corrupted, plan_only=True)!r}")
    return "\n".join(lines)


def _ten_positions(model: Any, clean: Any, corrupted: Any) -> None:
    for position in LAST_TEN:
        patch_sweep(model, clean, corrupted, sites="resid", positions=position, metric=METRIC, progress=False)


def growth() -> str:
    """Return how the cost of all heads grows with layers, heads and tokens, in forward passes of the same model."""
    lines = ["the staircase of all heads at the last position, in forward passes of the same model"]
    columns = ("layers", "heads", "tokens", "patches", "forward s", "staircase", "with base")
    lines.append("  " + "".join(f"{column:>11}" for column in columns))
    for n_layers, n_heads, n_tokens in SIZES:
        _, model = random_llava(n_layers, 512, n_heads)
        clean, corrupted = (model.inputs_from_hf(**prompt(n_tokens, seed)) for seed in (0, 1))
        sweep = partial(patch_sweep, model, clean, corrupted, metric=METRIC, progress=False)
        base, runs, heads = (
            seconds(job) for job in (lambda m=model, c=clean: m(c), partial(sweep, layers=[0], units=[0]), sweep)
        )
        stairs, whole = max(heads - runs, 0.0) / base, heads / base
        numbers = (n_layers, n_heads, n_tokens, n_layers * n_heads)
        lines.append("  " + "".join(f"{n:>11}" for n in numbers) + f"{base:>11.3f}{stairs:>11.2f}{whole:>11.2f}")
    return "\n".join(lines)


def _forward_job() -> Callable[[], Any]:
    _, model = random_llava()
    inputs = model.inputs_from_hf(**prompt())
    return lambda: model(inputs)


def _sweep_job(**options: Any) -> Callable[[], Any]:
    _, model = random_llava()
    clean, corrupted = (model.inputs_from_hf(**prompt(seed=seed)) for seed in (0, 1))
    return partial(patch_sweep, model, clean, corrupted, metric=METRIC, progress=False, **options)


def memory() -> str:
    """Return the peak memory above model and inputs."""
    jobs: list[tuple[str, Callable[[], Callable[[], Any]]]] = [
        ("one forward", _forward_job),
        ("all 128 heads, last position", _sweep_job),
        ("the same, 16 rows together", partial(_sweep_job, max_rows=16)),
        ("resid of all layers, last ten positions", partial(_sweep_job, sites="resid", positions=slice(590, 600))),
    ]
    lines = ["peak memory above model and inputs, MiB"]
    lines += [f"  {what:<44}{peak_mebibytes(make):>10.0f}" for what, make in jobs]
    return "\n".join(lines)


def main() -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    for part in (against_others, growth, memory):
        print(part(), flush=True)


if __name__ == "__main__":
    main()
