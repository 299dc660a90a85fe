"""Refuse weights that are not finite, and read names of dtypes and devices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
DTYPES = {
    "float64": torch.float64,
    "double": torch.float64,
    "float32": torch.float32,
    "float": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "half": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}


def dtype_of(given: torch.dtype | str | None) -> torch.dtype | None:
    """Return the dtype that a value or its name means; None stays None.

    given: a float dtype of torch, or its name ("bfloat16", "bf16", "torch.bfloat16").

    Raises: ValueError for any other dtype or name, TypeError for anything else."""
    if isinstance(given, str):
        found = DTYPES.get(given.strip().lower().removeprefix("torch."))
        if found is None:
            raise ValueError(f"dtype={given!r} is not a torch dtype that a model can have; known: {', '.join(DTYPES)}.")
        return found
    if given is not None and not isinstance(given, torch.dtype):
        raise TypeError(f"dtype={given!r} must be a dtype of torch or its name ({', '.join(DTYPES)}).")
    if given is not None and given not in FLOATS:
        raise ValueError(f"dtype={given} is not supported; supported: {', '.join(map(str, FLOATS))}.")
    return given


def device_of(given: Any) -> torch.device | None:
    """Return the device that a value or its name means; None stays None.

    given: a device of torch, its name ("cuda", "cuda:1"), or the number of a GPU.

    Raises: ValueError for what is no device, or one that this machine lacks; TypeError for anything else."""
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, (str, int, torch.device)):
        raise TypeError(f"device={given!r} must be a device of torch or its name, such as 'cpu' or 'cuda:0'.")
    try:
        device = torch.device(f"cuda:{given}" if isinstance(given, int) else given)
    except RuntimeError:
        raise ValueError(f"device={given!r} is not a device of torch, such as 'cpu', 'cuda' or 'cuda:1'.") from None
    if device.type in ("cpu", "meta"):
        return device
    here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    try:
        if device.type != "cuda":
            torch.empty(0, device=device)
        elif (device.index or 0) >= len(here) - 1:
            raise ValueError
    except (AssertionError, RuntimeError, ValueError, ImportError):
        raise ValueError(
            f"device={str(given)!r} is not there: this machine (torch {torch.__version__}) has {', '.join(here)}."
        ) from None
    return device


def require_finite(tensor: Tensor, key: str, where: str) -> None:
    """Check that no number of a float tensor is NaN or infinite; other tensors pass.

    tensor: on any device.
    key: its name in the file.
    where: what messages call the file or model.

    Raises: ValueError with the name and how many numbers are not finite."""
    if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel() or tensor.itemsize < 2:
        return
    # A sum reads once and makes nothing (a quarter of a copy's time); it can overflow where every number is finite.
    if bool(tensor.sum().isfinite()):
        return
    wrong = int((~tensor.isfinite()).sum())
    if wrong:
        raise ValueError(
            f"{where}: {key} has {wrong:,} numbers of {tensor.numel():,} that are NaN or infinite ({tensor.dtype}). "
            "Every output would be NaN; download or save the weights again, or load them in another dtype."
        )
