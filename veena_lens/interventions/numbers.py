"""The numbers, units and vectors that interventions carry: what Python, numpy and torch give, checked and settled."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from veena_lens.positions import as_int


def settle_units(item: Any) -> None:
    """Put the layer, heads and neurons of an intervention into Python's integers.

    Raises: TypeError for one that is not an integer."""
    who = type(item).__name__
    if (layer := getattr(item, "layer", None)) is not None:
        object.__setattr__(item, "layer", as_int(layer, f"{who}: layer"))
    for name in ("heads", "neurons"):
        units = getattr(item, name, None)
        if units is None:
            continue
        try:
            given = list(units)
        except TypeError:
            raise TypeError(f"{who}: {name}={units!r} must be a list of integers.") from None
        if isinstance(units, Tensor) and units.dtype == torch.bool:
            raise TypeError(f"{who}: {name} is a mask; give the numbers of the {name}, mask.nonzero().flatten().")
        settled = [as_int(unit, f"{who}: an entry of {name}") for unit in given]
        object.__setattr__(item, name, tuple(settled) if isinstance(units, tuple) else settled)


def number(value: Any, who: str, what: str, wanted: str = "finite") -> Any:
    """Return a finite number as Python's, or as a tensor without axes, which may carry a gradient.

    Raises: TypeError for what is not a number; ValueError for infinity or NaN."""
    if isinstance(value, bool) or getattr(value, "ndim", 0) or isinstance(value, (str, list, tuple)):
        raise TypeError(f"{who}: {what}={value!r} must be one number.")
    if not math.isfinite(bare(value)):
        raise ValueError(f"{who}: {what}={value} must be {wanted}.")
    return value if isinstance(value, (int, float, Tensor)) else float(value)


def bare(value: Any) -> float:
    """Return a number, or a tensor without axes, as a float."""
    return float(value.detach() if isinstance(value, Tensor) else value)


def is_one(value: Any) -> bool:
    """Return True for the number 1, unless a gradient may be asked of it."""
    return bool(value == 1) and not _has_gradient(value)


def is_zero(value: Any) -> bool:
    """Return True for the number 0, unless a gradient may be asked of it."""
    return bool(value == 0) and not _has_gradient(value)


def _has_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def log(value: Any) -> Any:
    """Return the natural logarithm, of a tensor with its gradient."""
    return value.log() if isinstance(value, Tensor) else math.log(value)


def direction(value: Any, who: str) -> Float[Tensor, " d_model"]:
    """Return a vector [d_model] of floats, made of a tensor, an array or a list of numbers.

    Raises: TypeError for what is none; ValueError for another number of axes, or one that is not finite."""
    vector = floats(value, f"{who}: the vector")
    if vector.ndim != 1:
        raise ValueError(f"{who}: the vector must be [d_model], not {list(vector.shape)}; pick one layer's.")
    if not bool(torch.isfinite(vector).all()):
        raise ValueError(f"{who}: the vector holds values that are not finite.")
    return vector


def floats(value: Any, what: str) -> Float[Tensor, ...]:
    """Return a tensor of floats, made of a tensor, an array or a list of numbers.

    Raises: TypeError for what is none."""
    try:
        tensor = value if isinstance(value, Tensor) else torch.as_tensor(value)
        if tensor.is_floating_point() and not hasattr(value, "__array__"):  # Python's floats have 64 bits
            tensor = torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{what} must be a tensor, an array or a list of numbers, not {value!r:.80}.") from error
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{what} must hold real numbers, not {tensor.dtype}.")
    return tensor if tensor.is_floating_point() else tensor.to(torch.get_default_dtype())


def like(value: Tensor, activation: Tensor) -> Tensor:
    """Return a tensor in the dtype and on the device of an activation, such that a gradient may pass it.

    Torch keeps none made in inference mode for a backward pass."""
    moved = value.to(activation)
    return moved.clone() if moved.is_inference() and not torch.is_inference_mode_enabled() else moved
