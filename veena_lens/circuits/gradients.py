"""Gradients of a metric at chosen places of hook points, and the cells of an image's grid that such places make.

A graph begins where a site is recorded: parameters take no gradient, nothing is edited, and nothing is left behind on
the model. Gradients are taken in one run, or along a line between two runs. Where features enter the sequence a place
is an image token; at the tower's input it is a patch, and several patches may make one cell (joined squares), lie in a
tile, or in none of the grid (class token, whole view, letterbox).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from veena_lens.circuits.image_cells import image_places
from veena_lens.hook_table import layer_of, row_of
from veena_lens.images.layout import arranged_image
from veena_lens.inputs import MultimodalInputs
from veena_lens.sweeps.alignment import bare
from veena_lens.sweeps.measuring import Entering, Measure, entering_layers, padded

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM

TOWER_SITE = "vision.hook_embed"
PICTURE_SITES = ("hook_image_features", "hook_embed", TOWER_SITE)


@dataclass(frozen=True, eq=False)
class Patches:
    """Entries of one image: `places` along the position axis, the `cells` of the grid they make (-1: none), and at
    the tower the `pictures` (tiles) they lie in, counted within this image."""

    grid: tuple[int, int]
    places: Int[Tensor, " n"]
    cells: Int[Tensor, " n"]
    pictures: Int[Tensor, " n"] | None = None

    def map_of(self, values: Float[Tensor, " n"]) -> Float[Tensor, "height width"]:
        """Return sums over the entries of each cell."""
        cells = self.cells.to(values.device)
        out = values.new_zeros(self.grid[0] * self.grid[1])
        return out.index_add(0, cells[cells >= 0], values[cells >= 0]).view(self.grid)


def patches_of(who: str, cfg: Any, inputs: MultimodalInputs, row: int, image: int, site: str) -> Patches:
    """Return the entries of one image at a site.

    Raises: ValueError where the row has no such image, or no whole grid."""
    if not 0 <= image < len(inputs.spans[row].images):
        raise ValueError(f"{who}: row {row} of {inputs!r} has no image {image}.")
    try:
        tokens = inputs.grid_tokens(row, image).flatten()
    except IndexError as error:
        raise ValueError(f"{who}: {error}") from error
    grid = inputs.grids[row][image]
    if site == TOWER_SITE:
        return _at_tower(cfg, inputs, row, image, grid)
    places = image_places(inputs, row, image)
    cells = torch.full((inputs.shape[1],), -1, device=inputs.device)
    cells[tokens] = torch.arange(len(tokens), device=inputs.device)
    return Patches(grid, places, cells[places])


def _at_tower(cfg: Any, inputs: MultimodalInputs, row: int, image: int, grid: tuple[int, int]) -> Patches:
    """Return patches as the tower takes them in; a class token stands before them."""
    cells = arranged_image(inputs, row, image).patch_cells()
    crop, patch = torch.meshgrid(*(torch.arange(n) for n in cells.shape), indexing="ij")
    return Patches(grid, patch.flatten() + int(cfg.vision.has_class_token), cells.flatten(), crop.flatten())


def batch_places(inputs: MultimodalInputs, patches: Sequence[Patches], image: int) -> Places:
    """Return the entries of a batch's rows, one `Patches` per row, for listening and editing."""
    index, exists = padded([p.places for p in patches])
    if all(p.pictures is not None for p in patches):
        assert inputs.crop_rows is not None and inputs.crop_images is not None
        owned = [(inputs.crop_rows == row) & (inputs.crop_images == image) for row in range(len(patches))]
        mine = [own.nonzero().flatten().cpu()[p.pictures] for own, p in zip(owned, patches, strict=True)]
        return Places(index, exists, pictures=padded(mine)[0])
    order = inputs.image_mask.flatten().long().cumsum(0).view(inputs.shape) - 1
    rows = torch.arange(len(index), device=order.device)[:, None]
    return Places(index, exists, tokens=order[rows, index.to(order.device)].clamp(min=0))


@dataclass(frozen=True, eq=False)
class Places:
    """Chosen positions of a batch, padded. `tokens` are the same as indices of `n_image_tokens` activations; `pictures`
    says, for activations on images, which image each position lies in."""

    index: Int[Tensor, "batch n"]
    exists: Bool[Tensor, "batch n"]
    tokens: Int[Tensor, "batch n"] | None = None
    pictures: Int[Tensor, "batch n"] | None = None

    def take(self, name: str, value: Float[Tensor, ...]) -> Float[Tensor, "batch n ..."]:
        """Return the activation at the chosen places."""
        axes = row_of(name).axis_names
        return (value if axes[0] == "n_image_tokens" else value.movedim(_pos_axis(axes), 1))[self._at(axes, value)]

    def put(self, name: str, value: Float[Tensor, ...], new: Float[Tensor, "batch n ..."]) -> Float[Tensor, ...]:
        """Return a copy of the activation with `new` at the chosen places."""
        axes, exists = row_of(name).axis_names, self.exists.to(value.device)
        out = value.clone()
        moved = out if axes[0] == "n_image_tokens" else out.movedim(_pos_axis(axes), 1)
        moved[tuple(at.expand(exists.shape)[exists] for at in self._at(axes, value))] = new[exists]
        return out

    def _at(self, axes: tuple[str, ...], value: Tensor) -> tuple[Tensor, ...]:
        """Return indices of the first axis, or of the first two."""
        if axes[0] == "n_image_tokens":
            assert self.tokens is not None
            return (self.tokens.to(value.device),)
        if axes[0] == "crop":
            assert self.pictures is not None
            return self.pictures.to(value.device), self.index.to(value.device)
        return torch.arange(len(self.index), device=value.device)[:, None], self.index.to(value.device)


def _pos_axis(axes: tuple[str, ...]) -> int:
    return axes.index("pos") if "pos" in axes else axes.index("query_pos")


@contextmanager
def frozen_parameters(model: HookedVLM) -> Iterator[None]:
    """Let no parameter take a gradient inside the block: a graph begins where a site is recorded."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in before:
            p.requires_grad_(False)
        yield
    finally:
        for p, wanted in before:
            p.requires_grad_(wanted)


@contextmanager
def recorded_at(model: HookedVLM, names: Sequence[str], places: Places) -> Iterator[dict[str, Tensor]]:
    """Record what a run has at the chosen places of each site."""
    seen: dict[str, Tensor] = {}

    def keep(tensor: Tensor, hook: Any) -> None:
        seen[hook.name] = places.take(hook.name, tensor.detach())

    with model.hooks([(name, keep) for name in dict.fromkeys(names)]):
        yield seen


def products(
    measure: Measure,
    inputs: MultimodalInputs,
    rows: list[int],
    names: Sequence[str],
    theirs: Mapping[str, Tensor],
    places: Places,
    steps: int,
    together: bool = False,
) -> tuple[Float[Tensor, " batch"], list[Tensor | None]]:
    """Return the unedited metric, and (x' - x) * gradient at the chosen places of each site.

    None stands where the metric is read before the site. `together` moves all sites along their lines at once."""
    if torch.is_inference_mode_enabled():
        raise ValueError(f"{measure.who} needs gradients: leave torch.inference_mode().")
    model = measure.model
    with frozen_parameters(model), torch.enable_grad():
        if not steps:
            plain, mine, gradients = _gradients(measure, inputs, rows, names, places, {})
            return plain, [
                None if n not in mine or n not in theirs else (theirs[n] - mine[n]) * gradients[n] for n in names
            ]
        starts = {n: 0 if together else layer_of(n) or 0 for n in names}
        layers = sorted({layer for layer in starts.values() if layer})
        with (
            torch.no_grad(),
            recorded_at(model, names, places) as mine,
            entering_layers(model, inputs, layers) as enters,
        ):
            plain = measure(inputs, rows, plain=True)
        terms: list[Tensor | None] = [None] * len(names)
        for group in [list(range(len(names)))] if together else [[i] for i in range(len(names))]:
            here = [names[i] for i in group]
            if any(n not in mine or n not in theirs for n in here):
                continue
            entering = enters.get(starts[here[0]])
            rest = inputs if entering is None else bare(inputs)
            for step in range(steps):
                part = (step + 0.5) / steps
                line = {n: mine[n] + part * (theirs[n] - mine[n]) for n in here}
                _, _, gradients = _gradients(measure, rest, rows, here, places, line, entering)
                for i, n in zip(group, here, strict=True):
                    term = (theirs[n] - mine[n]) * gradients[n] / steps
                    before = terms[i]
                    terms[i] = term if before is None else before + term
        return plain, terms


def _gradients(
    measure: Measure,
    inputs: MultimodalInputs,
    rows: list[int],
    names: Sequence[str],
    places: Places,
    line: Mapping[str, Tensor],
    entering: Entering | None = None,
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Return (metric, activations at the places, gradients there) of one run, the sites of `line` set to its values."""
    recorded: dict[str, Tensor] = {}

    def listen(tensor: Tensor, hook: Any) -> Tensor | None:
        name = str(hook.name)
        if name in line:
            tensor = places.put(name, tensor.detach(), line[name].to(tensor))
        # Whatever nothing upstream makes depend on a site is a leaf: the graph begins here.
        recorded[name] = tensor if tensor.requires_grad else tensor.requires_grad_()
        return tensor if name in line else None

    with measure.model.hooks([(name, listen) for name in dict.fromkeys(names)]):
        metric = measure(inputs, rows, entering=entering, plain=not line)
    if not metric.requires_grad:
        raise ValueError(
            f"{measure.who}: the metric has no gradient: it detaches what it is given, or reads a layer before every "
            f"site ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})."
        )
    found = torch.autograd.grad(metric.sum(), list(recorded.values()), allow_unused=True)
    values = {name: places.take(name, x.detach()) for name, x in recorded.items()}
    gradients = {
        name: torch.zeros_like(values[name]) if g is None else places.take(name, g)
        for name, g in zip(recorded, found, strict=True)
    }
    return metric.detach(), values, gradients
