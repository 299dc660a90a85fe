"""Measure the memory that is free, and say sizes in words."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

_CGROUP = Path("/sys/fs/cgroup")


def free_memory(device: torch.device | str) -> int | None:
    """Return the bytes that can still be taken on a device; None for a kind that cannot be asked.

    On a CPU this is what the machine, or the container that the process runs in, has left, files in the page cache
    counted as free. On a GPU what torch holds in reserve counts as free too."""
    device = torch.device(device)
    if device.type == "cpu":
        left = _left_in_container()
        available = int(psutil.virtual_memory().available)
        return available if left is None else min(available, left)
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held
    return None


def _left_in_container() -> int | None:
    """Return the bytes left under the limit of the process's control group (version 2). None: no limit."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        if limit == "max":
            return None
        statistics = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        cached = int(statistics.get("inactive_file", 0)) + int(statistics.get("active_file", 0))
        return max(0, int(limit) - int((_CGROUP / "memory.current").read_text()) + cached)
    except (OSError, ValueError):
        return None


def in_words(n_bytes: float | int) -> str:
    """Return a size as people read it, in binary units ("14.2 GiB")."""
    for unit in ("bytes", "KiB", "MiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} {unit}" if unit == "bytes" or n_bytes >= 100 else f"{n_bytes:.3g} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:,.1f} GiB"
