"""Do an intervention's own tensors fit a model and what it runs on? Asked before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from veena_lens.config import HookedVLMConfig
from veena_lens.hook_table import canonical, row_of
from veena_lens.inputs import MultimodalInputs

PLACES = ("batch", "picture", "pos", "query_pos", "key_pos", "n_image_tokens")
SAMPLED = 16  # numbers of each weight that tell one model from another


def unit_sizes(cfg: HookedVLMConfig, name: str) -> dict[str, int]:
    """Sizes of the axes of a hook point that do not depend on the inputs."""
    of: Any = cfg
    if name.startswith("vision."):
        of = cfg.vision
    elif name.startswith("connector."):
        of = cfg.connector
    out = {}
    for axis in row_of(canonical(name)).axis_names:
        size = int(axis) if axis.isdigit() else getattr(of, axis, getattr(cfg, axis, None))
        if axis not in PLACES and size is not None:
            out[axis] = int(size)
    return out


def require_source(cfg: HookedVLMConfig, name: str, shape: Sequence[int], who: str) -> None:
    """Raises: ValueError for a source whose activation has other axes or sizes than this model's."""
    axes, shape = row_of(canonical(name)).axis_names, list(shape)
    if len(shape) != len(axes):
        raise ValueError(f"{who}: the source of {name} is {shape}; the hook point has axes {' '.join(axes)}.")
    for axis, size in unit_sizes(cfg, name).items():
        found = shape[axes.index(axis)]
        if found != size:
            raise ValueError(
                f"{who}: the source of {name} is {shape}, with {axis} {found}; this model has {axis} {size}: it is of "
                "another model."
            )


def require_fill(cfg: HookedVLMConfig, name: str, shape: Sequence[int], who: str) -> None:
    """Raises: ValueError for a value that cannot be laid over the activation, whatever the inputs."""
    axes, sizes = row_of(canonical(name)).axis_names, unit_sizes(cfg, name)
    if len(shape) > len(axes):
        raise ValueError(f"{who}: the value is {list(shape)}; {name} has only the axes {' '.join(axes)}.")
    for axis, size in zip(reversed(axes), reversed(list(shape)), strict=False):
        if axis in sizes and size not in (1, sizes[axis]):
            raise ValueError(f"{who}: the value is {list(shape)}; {name} has {axis} {sizes[axis]} in this model.")


def picture_positions(cfg: HookedVLMConfig, inputs: MultimodalInputs, name: str) -> int:
    """How many positions a picture has at a hook point of the tower or the connector, padding counted in."""
    assert cfg.vision is not None
    in_tower = name.startswith("vision.")
    if inputs.picture_grids is None or inputs.pixel_values is None:
        return cfg.vision.n_positions if in_tower else cfg.vision.n_features
    length = inputs.pixel_values.shape[1]
    return length if in_tower else length // cfg.vision.merge_size**2


def places_of_run(cfg: HookedVLMConfig, inputs: MultimodalInputs, name: str, length: int) -> dict[str, int]:
    """Sizes of the other axes: rows, pictures, positions."""
    sizes = {"batch": len(inputs), "pos": length, "query_pos": length, "key_pos": length}
    axes = row_of(canonical(name)).axis_names
    if axes[0] == "picture":
        n = 0 if inputs.picture_rows is None else len(inputs.picture_rows)
        inside = picture_positions(cfg, inputs, name)
        sizes = {"picture": n, "pos": inside, "query_pos": inside, "key_pos": inside}
    elif axes[0] == "n_image_tokens":
        sizes = {"n_image_tokens": int(inputs.image_mask.sum())}
    return {axis: size for axis, size in sizes.items() if axis in axes}


def is_same_model(a: Any, b: Any) -> bool:
    """True for one model, or two with equal shapes and (but for the dtype's rounding) equal weights."""
    if a is b:
        return True
    mine, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    if {n: p.shape for n, p in mine.items()} != {n: p.shape for n, p in theirs.items()}:
        return False
    return all(bool(torch.allclose(_some(mine[n]), _some(theirs[n]), rtol=0.02, atol=1e-4)) for n in mine)


def _some(weight: Tensor) -> Tensor:
    flat = weight.detach().flatten()
    return flat[:: max(1, len(flat) // SAMPLED)][:SAMPLED].float().cpu()
