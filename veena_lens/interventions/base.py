"""What a model asks of an intervention, and the checks and selections that interventions share.

An intervention names a hook point, positions and an edit of an activation; it knows nothing of the model that
applies it. `intervene` resolves and checks its layer once; whether the tensors that it carries fit the inputs is
checked before a forward pass computes anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from veena_lens.activation_cache import ActivationCache
from veena_lens.config import HookedVLMConfig
from veena_lens.hook_table import canonical, hooks_of, require_hook, row_of
from veena_lens.inputs import MultimodalInputs
from veena_lens.positions import as_int

HEAD_AXES = ("n_heads", "n_key_value_heads")


@dataclass(frozen=True, eq=False)
class Place:
    """Where an edit acts in the chunk of positions that runs.

    at: [rows pos], True at the positions to edit (query positions of scores and patterns).
    keys: [batch key_pos], True at the chosen keys; None for an intervention without keys.
    earlier: counts the chosen positions of each row in earlier chunks of cached decoding; None in the first chunk.
    known: [batch query_pos key_pos], False at tokens that are generated after a query was computed; None without any.
    """

    at: Bool[Tensor, "rows pos"]
    keys: Bool[Tensor, "batch key_pos"] | None = None
    earlier: Callable[[], Int[Tensor, " rows"]] | None = None
    known: Bool[Tensor, "batch query_pos key_pos"] | None = None


@runtime_checkable
class Intervention(Protocol):
    """What a model asks of an intervention: a hook point, positions, and an edit of the activation there.

    Derive from it and give `positions`, `site` and `edit`; the other members have defaults. An object that does not
    derive from it works too where it has all of the members.
    """

    positions: Any  # which positions it edits: words, numbers, a slice, a mask, a Box or a Tile
    keys: Any = None  # which keys an edit of scores or patterns is limited to; None: it takes none

    def site(self, cfg: HookedVLMConfig) -> str:
        """Return the name of the hook point that is edited.

        Raises: ValueError where the intervention does not fit a model of this configuration."""
        raise NotImplementedError(f"{type(self).__name__} has no site().")

    def edit(self, activation: Float[Tensor, ...], at: Bool[Tensor, "rows pos"]) -> Float[Tensor, ...]:
        """Return the edited activation, a new tensor, or the one that was given where nothing changes.

        activation: the value of the hook point, rows first. at: True at the positions to edit."""
        raise NotImplementedError(f"{type(self).__name__} has no edit().")

    def edit_at(self, activation: Float[Tensor, ...], place: Place) -> Float[Tensor, ...]:
        """Return the edited activation; the model calls this one. Override it to use keys or earlier chunks."""
        return self.edit(activation, place.at)

    def fits(self, cfg: HookedVLMConfig, inputs: MultimodalInputs, at: Bool[Tensor, "rows pos"]) -> None:
        """Check what the intervention carries against the inputs of a run, before anything is computed.

        at: the positions of the whole run that it edits.
        Raises: ValueError where they do not fit."""

    def bias(
        self, at: Bool[Tensor, "batch query_pos"], keys: Bool[Tensor, "batch key_pos"], n_heads: int, dtype: torch.dtype
    ) -> Float[Tensor, "batch n_heads query_pos key_pos"] | None:
        """Return what is added to the attention scores, where `is_bias`; None changes nothing."""
        return None

    @property
    def is_bias(self) -> bool:
        """Return True where the edit is an additive bias on the scores, which the fused kernel takes; `site` names
        them."""
        return False

    @property
    def changes_nothing(self) -> bool:
        """Return True where the edit leaves every activation unchanged, so that no hook needs to run."""
        return False

    @property
    def is_whole(self) -> bool:
        """Return True where what it carries belongs to whole rows, so that a run cannot begin behind their first
        position."""
        return False

    @property
    def caches(self) -> Sequence[ActivationCache]:
        """Return the caches of other runs that it reads; those of another model are refused."""
        return ()

    @property
    def likeness(self) -> str | None:
        """Return a text that is equal for edits that do the same, which act on several rows as one; None: each
        alone."""
        return None


MEMBERS = tuple(name for name in (*Intervention.__annotations__, *vars(Intervention)) if not name.startswith("_"))


def require_intervention(item: Any, who: str) -> Intervention:
    """Return what is an intervention.

    Raises: TypeError for anything else, naming the members that it lacks."""
    if isinstance(item, Intervention) and hasattr(item, "positions"):
        return item
    missing = [name for name in dict.fromkeys(MEMBERS) if not hasattr(item, name)]
    hint = f"; it lacks {', '.join(missing)}" if len(missing) < len(set(MEMBERS)) else ""
    raise TypeError(
        f"{who}: {item!r} is not an intervention{hint}. Give Steer, Patch, ..., or a class that derives from "
        "veena_lens.interventions.Intervention."
    )


def require_layer(layer: Any, n_layers: int, who: str) -> int:
    """Return a layer in 0 .. n_layers - 1, negative ones counted from the end.

    Raises: ValueError when it is outside; TypeError when it is not an integer."""
    layer = as_int(layer, f"{who}: layer")
    resolved = layer + n_layers if layer < 0 else layer
    if not 0 <= resolved < n_layers:
        raise ValueError(f"{who}: layer {layer} does not exist; the model has layers 0 to {n_layers - 1}.")
    return resolved


def require_unit(unit: Any, n: int, who: str, what: str) -> int:
    """Return a head, neuron or the like in 0 .. n - 1, negative ones counted from the end.

    Raises: ValueError when it is outside; TypeError when it is not an integer."""
    unit = as_int(unit, f"{who}: {what}")
    if not -n <= unit < n:
        raise ValueError(f"{who}: {what} {unit} does not exist; there are {n}.")
    return unit % n


def require_units(units: Sequence[int] | None, n: int, who: str, what: str) -> None:
    """Raise ValueError for an empty selection of heads or neurons, or one outside 0 .. n - 1."""
    if units is None:
        return
    if len(units) == 0:
        raise ValueError(f"{who}: the list of {what}s is empty; leave it out to take all.")
    for unit in units:
        require_unit(unit, n, who, what)


def require_site(
    cfg: HookedVLMConfig, name: str, heads: Sequence[int] | None, neurons: Sequence[int] | None, who: str
) -> str:
    """Return the canonical hook name, with heads and neurons checked against its axes.

    Raises: ValueError for an unknown site, or a selection that the site has no axis for."""
    full = require_hook(name, hooks_of(cfg))
    axes = row_of(full).axis_names
    tower = cfg.vision if full.startswith("vision.") and cfg.vision is not None else cfg
    if heads is not None:
        axis = next((a for a in axes if a in HEAD_AXES), None)
        if axis is None:
            raise ValueError(f"{who}: {full} has axes {axes}; heads can be chosen at hook_z, hook_q, hook_pattern, ...")
        require_units(heads, getattr(tower, axis), who, "head")
    if neurons is not None:
        if axes[-1] != "d_mlp":
            raise ValueError(f"{who}: {full} has axes {axes}; neurons can be chosen at mlp.hook_post or hook_pre.")
        require_units(neurons, tower.d_mlp, who, "neuron")
    return full


def selection(
    name: str,
    activation: Float[Tensor, ...],
    at: Bool[Tensor, "rows pos"],
    heads: Sequence[int] | None = None,
    neurons: Sequence[int] | None = None,
) -> Bool[Tensor, ...]:
    """Return True where an activation is edited: positions, heads and neurons together, broadcastable to it."""
    axes = row_of(canonical(name)).axis_names
    shape = [1] * activation.ndim
    if axes[0] == "n_image_tokens":
        shape[0] = len(at.flatten())
        mask = at.reshape(shape)
    else:
        axis = axes.index("pos") if "pos" in axes else axes.index("query_pos")
        shape[0], shape[axis] = at.shape
        mask = at.view(at.shape[0], *[1] * (axis - 1), at.shape[1]).reshape(shape)
    for units, names in ((heads, HEAD_AXES), (neurons, ("d_mlp",))):
        if units is None:
            continue
        axis = next(i for i, a in enumerate(axes) if a in names)
        chosen = torch.zeros(activation.shape[axis], dtype=torch.bool, device=activation.device)
        chosen[[int(u) for u in units]] = True
        mask = mask & chosen.view(*[-1 if i == axis else 1 for i in range(activation.ndim)])
    return mask


def plain(value: Any) -> Any:
    """Return numbers and lists of numpy and torch as Python's, which JSON and a repr can hold; the rest unchanged.

    A mask stays a tensor."""
    if isinstance(value, Tensor) and value.dtype == torch.bool:
        return value
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (list, tuple, range)):
        return [plain(part) for part in value]
    return value


def content(item: Any, of_tensor: Callable[[Tensor], Any] = lambda tensor: None) -> list[Any] | None:
    """Return an intervention's type and fields as JSON can hold them; equal for two that do the same.

    of_tensor: gives the content of a tensor, None where it has none.
    None where a field has no content."""
    if not is_dataclass(item):
        return None
    found: list[Any] = [type(item).__name__]
    for name in (f.name for f in fields(item)):
        value = getattr(item, name)
        if isinstance(value, Tensor):
            value = of_tensor(value)
            if value is None:
                return None
        value = repr(value) if isinstance(value, slice) else plain(value)
        if not isinstance(value, (int, float, str, list, type(None))):
            return None
        found.append([name, value])
    return found


def shown(value: Any) -> str:
    """Return a value as a repr shows it: of a mask its shape and how much it selects, of a long list its ends."""
    value = plain(value)
    if isinstance(value, Tensor):
        return f"<mask {list(value.shape)}, {int(value.sum())} chosen>"
    if isinstance(value, list) and len(value) > 12:
        return f"[{', '.join(map(repr, value[:4]))}, ... {value[-1]!r} ({len(value)})]"
    return repr(value)


def show_units(**parts: Any) -> str:
    """Return `heads=[3], positions='query'` for a repr; parts that are None are left out."""
    return ", ".join(f"{k}={shown(v)}" for k, v in parts.items() if v is not None)


def show(item: Any) -> str:
    """Return the repr of an intervention that is numbers and words: its fields, readably."""
    return f"{type(item).__name__}({show_units(**{f.name: getattr(item, f.name) for f in fields(item)})})"


PLACES = ("batch", "crop", "pos", "query_pos", "key_pos", "n_image_tokens")
SAMPLED = 16  # numbers of each weight that tell one model from another


def unit_sizes(cfg: HookedVLMConfig, name: str) -> dict[str, int]:
    """Return the sizes of those axes of a hook point that do not depend on the inputs."""
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
    """Raise ValueError for a source whose activation has other axes or sizes than this model's."""
    axes, shape = row_of(canonical(name)).axis_names, list(shape)
    if len(shape) != len(axes):
        raise ValueError(f"{who}: the source of {name} is {shape}; the hook point has axes {' '.join(axes)}.")
    for axis, size in unit_sizes(cfg, name).items():
        found = shape[axes.index(axis)]
        if found != size:
            raise ValueError(
                f"{who}: the source of {name} is {shape}, with {axis} {found}; this model has {axis} {size}: it comes "
                "from another model."
            )


def require_fill(cfg: HookedVLMConfig, name: str, shape: Sequence[int], who: str) -> None:
    """Raise ValueError for a value that cannot be laid over the activation, whatever the inputs."""
    axes, sizes = row_of(canonical(name)).axis_names, unit_sizes(cfg, name)
    if len(shape) > len(axes):
        raise ValueError(f"{who}: the value is {list(shape)}; {name} has only the axes {' '.join(axes)}.")
    for axis, size in zip(reversed(axes), reversed(list(shape)), strict=False):
        if axis in sizes and size not in (1, sizes[axis]):
            raise ValueError(f"{who}: the value is {list(shape)}; {name} has {axis} {sizes[axis]} in this model.")


def picture_positions(cfg: HookedVLMConfig, inputs: MultimodalInputs, name: str) -> int:
    """Return how many positions an image has at a hook point of the tower or the connector, padding included."""
    assert cfg.vision is not None
    in_tower = name.startswith("vision.")
    if inputs.crop_grids is None or inputs.pixel_values is None:
        return cfg.vision.n_positions if in_tower else cfg.vision.n_features
    length = inputs.pixel_values.shape[1]
    return length if in_tower else length // cfg.vision.merge_size**2


def places_of_run(cfg: HookedVLMConfig, inputs: MultimodalInputs, name: str, length: int) -> dict[str, int]:
    """Return the sizes of the other axes: rows, images, positions."""
    sizes = {"batch": len(inputs), "pos": length, "query_pos": length, "key_pos": length}
    axes = row_of(canonical(name)).axis_names
    if axes[0] == "crop":
        n = 0 if inputs.crop_rows is None else len(inputs.crop_rows)
        inside = picture_positions(cfg, inputs, name)
        sizes = {"crop": n, "pos": inside, "query_pos": inside, "key_pos": inside}
    elif axes[0] == "n_image_tokens":
        sizes = {"n_image_tokens": int(inputs.image_mask.sum())}
    return {axis: size for axis, size in sizes.items() if axis in axes}


def is_same_model(a: Any, b: Any) -> bool:
    """Return True for one model, or two with equal shapes and (but for the dtype's rounding) equal weights."""
    if a is b:
        return True
    mine, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    if {n: p.shape for n, p in mine.items()} != {n: p.shape for n, p in theirs.items()}:
        return False
    return all(bool(torch.allclose(_some(mine[n]), _some(theirs[n]), rtol=0.02, atol=1e-4)) for n in mine)


def _some(weight: Tensor) -> Tensor:
    flat = weight.detach().flatten()
    return flat[:: max(1, len(flat) // SAMPLED)][:SAMPLED].float().cpu()
