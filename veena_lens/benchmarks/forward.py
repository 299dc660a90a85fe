"""Time a forward pass, caches and attention rows against Hugging Face's forward pass (sdpa) on the same weights.

`peak_mebibytes` measures the peak memory of a job in a separate process: the high-water mark above the level before it.
"""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable
from typing import Any

import torch

from veena_lens.benchmarks.models import prompt, random_llava, seconds, table


def _measure(make: Callable[[], Callable[[], Any]], queue: Any) -> None:
    import torch

    torch.set_num_threads(1)
    job = make()
    with torch.no_grad():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        job()
        queue.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def peak_mebibytes(make: Callable[[], Callable[[], Any]]) -> float:
    """Return the MiB that a job takes above its preparation; `make` prepares the job and returns it."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_measure, args=(make, queue))
    process.start()
    found = queue.get()
    process.join()
    return float(found)


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    hf, model = random_llava()
    raw = prompt()
    inputs = model.inputs_from_hf(**raw)
    with torch.no_grad():
        ours, theirs = model(inputs), hf(**raw).logits
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    base = seconds(lambda: hf(**raw))
    resid = [f"blocks.{i}.hook_resid_post" for i in range(model.cfg.n_layers)]
    rows = [
        ("Hugging Face forward, sdpa", base),
        ("forward", seconds(lambda: model(inputs))),
        ("run_with_cache, every resid_post", seconds(lambda: model.run_with_cache(inputs, names_filter=resid))),
        ("run_with_cache, everything", seconds(lambda: model.run_with_cache(inputs))),
        ("attention of the last token, all layers", seconds(lambda: model.attention(inputs))),
        ("Hugging Face forward, sdpa, again", seconds(lambda: hf(**raw))),
    ]
    title = f"16 layers, d_model 512, 600 tokens (576 of an image), float32, one thread; logits differ by {error:.1e}"
    print(table(title, rows, ("Hugging Face", base)))


if __name__ == "__main__":
    main()
