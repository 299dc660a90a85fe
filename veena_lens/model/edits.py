"""`model.intervene`: interventions become hooks for the length of a `with` block.

The same list acts alike in forward, run_with_cache, run_with_hooks and generate. Everything is checked before
a hook is added; at the first position of a pass, a selection that is empty in each of its rows is an error.
At one hook point interventions act in the order of their list, before hooks that are added inside the block. A bias on
the scores is such a hook as well, which nobody needs to call where it meets no other: the fused kernel takes it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from veena_lens.checkpoints.mapped import require_sound
from veena_lens.components.masks import add_bias
from veena_lens.hook_table import layer_of, require_hook, row_of
from veena_lens.interventions.base import (
    Intervention,
    Place,
    is_same_model,
    picture_positions,
    require_intervention,
)
from veena_lens.interventions.circuit import Circuit
from veena_lens.model.span import PassSpan
from veena_lens.model.threads import Added
from veena_lens.positions import parse, position_mask, reaches_generated

if TYPE_CHECKING:
    from veena_lens.model.attention_rows import AttentionRows
    from veena_lens.model.model import HookedVLM


@dataclass(frozen=True, eq=False)
class Applied:
    """One intervention in force: its hook point, and the rows it is for (None: every row of any batch)."""

    intervention: Intervention
    name: str
    of: tuple[int, ...] | None = None

    def rows(self, span: PassSpan) -> Bool[Tensor, " batch"]:
        """Return True at the rows it is for."""
        n = len(span.inputs)
        chosen = torch.full((n,), self.of is None, dtype=torch.bool, device=span.inputs.device)
        if self.of is not None:
            chosen[list(self.of)] = True
        return chosen

    def mask(self, span: PassSpan, n_positions: int = 1) -> Bool[Tensor, "rows pos"]:
        """Return True at the positions of this chunk that it edits; at a hook of the tower, of each image's
        `n_positions`."""
        rows, axes = self.rows(span), row_of(self.name).axis_names
        if axes[0] == "batch":
            return span.mask(self.intervention.positions) & rows[:, None]
        if axes[0] == "crop":
            return span.picture_mask(self.intervention.positions, rows, n_positions)
        chosen = position_mask(span.inputs, self.intervention.positions) & rows[:, None]
        return chosen[span.inputs.image_mask][:, None]

    def nowhere(self, at: Bool[Tensor, "rows pos"]) -> str | None:
        """Name the rows that a mask leaves empty, None where there are none."""
        if self.of is None or len(self.of) == 1:
            where = "every row" if self.of is None else f"row {self.of[0]}"
            return None if bool(at.any()) else where
        return next((f"row {row}" for row in self.of if not bool(at[row].any())), None)

    @property
    def bias_layer(self) -> int | None:
        """Return the layer whose fused attention takes it as a bias, None for an edit of an activation."""
        is_bias = self.intervention.is_bias and self.name.endswith(".attn.hook_attn_scores")
        return layer_of(self.name) if is_bias and self.name.startswith("blocks.") else None


@dataclass(frozen=True, eq=False)
class Frame:
    """What one `with` block puts in force.

    applied: its interventions. n_rows: how many rows they were given for, None for any number.
    span: the pass that runs inside it. recorder: who reads attention inside it.
    hides: whether interventions and recorders of the blocks around it rest.
    """

    applied: tuple[Applied, ...] = ()
    n_rows: int | None = None
    span: PassSpan | None = None
    recorder: AttentionRows | None = None
    hides: bool = False


class EditStack:
    """What is in force on a model: a frame for each `with` block that a thread entered and has not yet left.

    Each thread has blocks of its own. A copy of the model begins without any."""

    def __init__(self) -> None:
        self._of_thread = threading.local()

    def __reduce__(self) -> tuple[Any, ...]:
        return EditStack, ()

    @property
    def _frames(self) -> list[Frame]:
        return getattr(self._of_thread, "frames", [])

    @_frames.setter
    def _frames(self, frames: list[Frame]) -> None:
        self._of_thread.frames = frames

    @contextmanager
    def entered(self, frame: Frame) -> Iterator[None]:
        """Put a frame in force inside the block; it is gone after it, however the block ends."""
        try:
            self._frames = [*self._frames, frame]
            yield
        finally:
            # Found by identity: a generator that was given up may leave after blocks that were entered later.
            self._frames = [other for other in self._frames if other is not frame]

    @property
    def _visible(self) -> list[Frame]:
        last = max((i for i, frame in enumerate(self._frames) if frame.hides), default=0)
        return self._frames[last:]

    @property
    def applied(self) -> list[Applied]:
        """Return the interventions in force, outer blocks first."""
        return [applied for frame in self._visible for applied in frame.applied]

    @property
    def row_counts(self) -> list[int]:
        """Return the numbers of rows that the lists in force were given for."""
        return [frame.n_rows for frame in self._visible if frame.n_rows is not None]

    @property
    def recorder(self) -> AttentionRows | None:
        """Return who reads attention, the innermost; None for nobody."""
        return next((frame.recorder for frame in reversed(self._visible) if frame.recorder is not None), None)

    @property
    def span(self) -> PassSpan | None:
        """Return the pass that runs, None between passes."""
        return next((frame.span for frame in reversed(self._frames) if frame.span is not None), None)


def intervene(
    model: HookedVLM,
    interventions: Sequence[Any] | None = None,
    per_row: Sequence[Any] | None = None,
    allow_other_model: bool = False,
) -> AbstractContextManager[HookedVLM]:
    """Check interventions and return the block in which they act: see `HookedVLM.intervene`."""
    for given in (interventions, *(per_row or ())):
        if isinstance(given, Circuit):
            given.require_model(model.cfg, allow_other_model)
    if (interventions is None) == (per_row is None):
        raise ValueError("intervene: give a list of interventions, or per_row=[list for row 0, ...], and not both.")
    if per_row is None:
        if isinstance(interventions, Intervention):
            interventions = [interventions]
        return _intervening(model, Frame(tuple(_plan(model, i) for i in interventions or ())))
    lists = [[mine] if isinstance(mine, Intervention) else mine for mine in per_row]
    planned = tuple(_plan(model, i, rows) for i, rows in _together(lists))
    return _intervening(model, Frame(planned, n_rows=len(per_row)))


@contextmanager
def _intervening(model: HookedVLM, frame: Frame) -> Iterator[HookedVLM]:
    # To hear a pattern for an edit that changes nothing would leave the fused kernel, whose last bits differ.
    acting = [p for p in frame.applied if not p.intervention.changes_nothing]
    added = Added()
    with model._edits.entered(frame):
        try:
            for p in acting:
                edit = _hook_of(model, p) if p.bias_layer is None else _bias_hook_of(model, p)
                added.add(model.hook_dict[p.name], edit, is_bias=p.bias_layer is not None, is_permanent=True)
            yield model
        finally:
            added.remove()


def _words(positions: Any) -> tuple[str, ...]:
    chosen = parse(positions)
    return chosen if isinstance(chosen, tuple) else ()


def _together(lists: Sequence[Sequence[Any]]) -> Iterator[tuple[Any, tuple[int, ...]]]:
    """Yield (intervention, rows): those at the same place of several rows' lists that are alike act as one edit of all.

    Each row's own order is kept, and rows do not meet."""
    for place in range(max(map(len, lists), default=0)):
        groups: dict[Any, tuple[Any, list[int]]] = {}
        for row, mine in enumerate(lists):
            if place < len(mine):
                item = require_intervention(mine[place], "intervene")
                groups.setdefault(row if item.likeness is None else item.likeness, (item, []))[1].append(row)
        for intervention, rows in groups.values():
            yield intervention, tuple(rows)


def _plan(model: HookedVLM, item: Any, of: tuple[int, ...] | None = None) -> Applied:
    """Return an intervention with its hook point in a model, checked.

    Raises: TypeError for what is not an intervention, ValueError where it does not fit the model."""
    intervention = require_intervention(item, "intervene")
    for cache in intervention.caches:
        if cache.model is not None and not is_same_model(model, cache.model):
            raise ValueError(
                f"{intervention!r}: the cache was made by another model, {cache.model!r}. To patch across models on "
                "purpose, give the activation itself: source=cache[name]."
            )
    return Applied(intervention, require_hook(intervention.site(model.cfg), model.hook_dict), of)


def _hook_of(model: HookedVLM, applied: Applied) -> Callable[..., Tensor | None]:
    axes = row_of(applied.name).axis_names

    def edit(tensor: Tensor, hook: HookPoint) -> Tensor | None:
        span = model._edits.span
        if span is None or applied not in model._edits.applied:
            return None
        at = applied.mask(span, tensor.shape[-2 if "query_pos" in axes else 1]).to(tensor.device)
        if not bool(at.any()):
            return None
        place = _place(applied.intervention, span, at)
        edited = applied.intervention.edit_at(tensor, place)
        if place.known is None or axes[0] != "batch" or "key_pos" not in axes:
            return edited
        return torch.where(place.known[:, None], edited, tensor)

    return edit


def _bias_hook_of(model: HookedVLM, applied: Applied) -> Callable[..., Tensor | None]:
    def edit(tensor: Tensor, hook: HookPoint) -> Tensor | None:
        bias = _bias_of(model, applied)
        return None if bias is None else add_bias(tensor, bias.to(tensor.device))

    return edit


def _bias_of(model: HookedVLM, applied: Applied) -> Float[Tensor, "batch n_heads query_pos key_pos"] | None:
    """Return the bias of an intervention for the chunk that runs, None where it does not act there."""
    span = model._edits.span
    if span is None or applied not in model._edits.applied:
        return None
    at, keys = applied.mask(span), span.key_mask(applied.intervention.keys)
    if not (bool(at.any()) and bool(keys.any())):
        return None
    return applied.intervention.bias(at, keys, model.cfg.n_heads, model.cfg.dtype)


def _place(intervention: Intervention, span: PassSpan, at: Bool[Tensor, "rows pos"]) -> Place:
    """Return where an intervention acts in the pass that runs, given the positions of this chunk."""

    def earlier() -> Int[Tensor, " rows"]:
        return PassSpan(span.inputs, 0, span.start).mask(intervention.positions).sum(-1)

    keys = None if intervention.keys is None else span.key_mask(intervention.keys).to(at.device)
    known = None if span.known_keys is None else span.known_keys.to(at.device)
    return Place(at, keys, earlier if span.start > 0 else None, known)


def attention_biases(model: HookedVLM, layer: int) -> list[Float[Tensor, "batch n_heads query_pos key_pos"]]:
    """Return the attention biases in force at a layer, for the chunk that runs, in the order of the interventions."""
    mine = [p for p in model._edits.applied if p.bias_layer == layer and not p.intervention.changes_nothing]
    return [bias for p in mine if (bias := _bias_of(model, p)) is not None]


@contextmanager
def running(model: HookedVLM, span: PassSpan) -> Iterator[PassSpan]:
    """Let interventions resolve their positions against a pass inside the block.

    Raises: ValueError, where the pass begins with the first position, as `require_reach`; as
    `require_sound` for mapped weights."""
    if span.is_prefill:
        require_sound(model, model.mapped_files)
        require_reach(model, span)
    with model._turns.taken(), model._edits.entered(Frame(span=span)):
        yield span


def require_reach(model: HookedVLM, span: PassSpan) -> None:
    """Raise ValueError, before any computing, for an intervention in force that cannot act on these inputs."""
    n = len(span.inputs)
    for lists in model._edits.row_counts:
        if lists != n:
            raise ValueError(f"intervene(per_row=...): {lists} lists for a batch of {n} rows; give one per row.")
    for applied in model._edits.applied:
        intervention = applied.intervention
        needs_image = intervention.keys is not None and "image" in _words(intervention.keys)
        if needs_image and applied.of is None and not bool(span.key_mask(intervention.keys).any()):
            raise ValueError(f"{intervention!r} has no keys to act on: no row of {span.inputs!r} has an image.")
        at = applied.mask(span, _picture_positions(model, applied, span))
        # A pass of uncached decoding also holds what was generated; what an edit carries is for the prompt.
        of_prompt = at[:, : span.inputs.shape[1]] if row_of(applied.name).axis_names[0] == "batch" else at
        intervention.fits(model.cfg, span.inputs, of_prompt)
        if reaches_generated(intervention.positions):
            continue
        if (where := applied.nowhere(at)) is not None:
            raise ValueError(f"{intervention!r} selects no position in {where} of {span.inputs!r}.")


def _picture_positions(model: HookedVLM, applied: Applied, span: PassSpan) -> int:
    """Return how many positions an image has where an intervention edits images."""
    if row_of(applied.name).axis_names[0] != "crop" or span.inputs.pixel_values is None:
        return 1
    return picture_positions(model.cfg, span.inputs, applied.name)
