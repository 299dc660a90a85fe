"""Peak memory of one job, measured in a process of its own: its high-water mark above what was there before."""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable
from typing import Any


def _measure(make: Callable[[], Callable[[], Any]], queue: Any) -> None:
    import torch

    torch.set_num_threads(1)
    job = make()
    with torch.no_grad():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        job()
        queue.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def peak_mebibytes(make: Callable[[], Callable[[], Any]]) -> float:
    """MiB that a job takes above what its preparation took; `make` prepares it and returns it."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_measure, args=(make, queue))
    process.start()
    found = queue.get()
    process.join()
    return float(found)
