"""`model.intervene`: interventions become hooks for the length of a `with` block.

The same list acts alike in forward, run_with_cache, run_with_hooks and generate. Everything is checked before
a hook is added; at the first position of a pass, a selection that is empty in each of its rows is an error.
Interventions act in the order of their list, before hooks that are added inside the block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from veena_lens.activation_cache import ActivationCache
from veena_lens.hook_table import layer_of, row_of
from veena_lens.interventions.attention import BoostAttention, SuppressHeads
from veena_lens.interventions.base import Intervention, content, is_same_model, picture_positions
from veena_lens.interventions.patch import Patch
from veena_lens.model.span import PassSpan
from veena_lens.positions import parse, position_mask, reaches_generated

if TYPE_CHECKING:
    from veena_lens.model.attention_rows import AttentionRows
    from veena_lens.model.model import HookedVLM


@dataclass(frozen=True, eq=False)
class Applied:
    """One intervention in force: its hook point, and the rows it is for (None: every row of any batch)."""

    intervention: Any
    name: str
    of: tuple[int, ...] | None = None

    def rows(self, span: PassSpan) -> Bool[Tensor, " batch"]:
        """True at the rows it is for."""
        n = len(span.inputs)
        chosen = torch.full((n,), self.of is None, dtype=torch.bool, device=span.inputs.device)
        if self.of is not None:
            chosen[list(self.of)] = True
        return chosen

    def mask(self, span: PassSpan, n_positions: int = 1) -> Bool[Tensor, "rows pos"]:
        """True at the positions of this chunk that it edits; at a hook of the tower, of each image's `n_positions`."""
        rows, axes = self.rows(span), row_of(self.name).axis_names
        if axes[0] == "batch":
            return span.mask(self.intervention.positions) & rows[:, None]
        if axes[0] == "crop":
            return span.picture_mask(self.intervention.positions, rows, n_positions)
        chosen = position_mask(span.inputs, self.intervention.positions) & rows[:, None]
        return chosen[span.inputs.image_mask][:, None]

    def nowhere(self, at: Bool[Tensor, "rows pos"]) -> str | None:
        """Which of its rows a mask leaves empty, in words, or None; several rows only where a site has a row each."""
        if self.of is None or len(self.of) == 1:
            where = "every row" if self.of is None else f"row {self.of[0]}"
            return None if bool(at.any()) else where
        return next((f"row {row}" for row in self.of if not bool(at[row].any())), None)

    @property
    def bias_layer(self) -> int | None:
        """The layer whose fused attention takes it as a bias, None for an edit of an activation."""
        return layer_of(self.name) if getattr(self.intervention, "is_bias", False) else None


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
    """What is in force on a model: a frame for each `with` block that was entered and not yet left."""

    def __init__(self) -> None:
        self._frames: list[Frame] = []

    @contextmanager
    def entered(self, frame: Frame) -> Iterator[None]:
        """Put a frame in force inside the block; it is gone after it, however the block ends."""
        try:
            self._frames.append(frame)
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
        """The interventions in force, outer blocks first."""
        return [applied for frame in self._visible for applied in frame.applied]

    @property
    def row_counts(self) -> list[int]:
        """The numbers of rows that the lists in force were given for."""
        return [frame.n_rows for frame in self._visible if frame.n_rows is not None]

    @property
    def recorder(self) -> AttentionRows | None:
        """Who reads attention, the innermost; None for nobody."""
        return next((frame.recorder for frame in reversed(self._visible) if frame.recorder is not None), None)

    @property
    def span(self) -> PassSpan | None:
        """The pass that runs, None between passes."""
        return next((frame.span for frame in reversed(self._frames) if frame.span is not None), None)


def intervene(
    model: HookedVLM, interventions: Sequence[Any] | None = None, per_row: Sequence[Any] | None = None
) -> AbstractContextManager[HookedVLM]:
    """Check interventions and return the block in which they act: see `HookedVLM.intervene`."""
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
    # A factor of 1 is no edit: to hear the pattern for it would leave the fused kernel, whose last bits differ.
    acting = [p for p in frame.applied if getattr(p.intervention, "factor", None) != 1]
    edits = [(p.name, _hook_of(model, p)) for p in acting if p.bias_layer is None]
    with model._edits.entered(frame), model.hooks(edits):
        yield model


def _words(positions: Any) -> tuple[str, ...]:
    chosen = parse(positions)
    return chosen if isinstance(chosen, tuple) else ()


def _together(lists: Sequence[Sequence[Any]]) -> Iterator[tuple[Any, tuple[int, ...]]]:
    """(intervention, rows): those at the same place of several rows' lists that are alike act as one edit of all
    (edits of attention that are numbers and words alone; the others stand for themselves).

    Each row's own order is kept, and rows do not meet."""
    for place in range(max(map(len, lists), default=0)):
        groups: dict[Any, tuple[Any, list[int]]] = {}
        for row, mine in enumerate(lists):
            if place < len(mine):
                item = mine[place]
                told = content(item) if isinstance(item, (BoostAttention, SuppressHeads)) else None
                groups.setdefault(row if told is None else repr(told), (item, []))[1].append(row)
        for intervention, rows in groups.values():
            yield intervention, tuple(rows)


def _plan(model: HookedVLM, intervention: Any, of: tuple[int, ...] | None = None) -> Applied:
    if not isinstance(intervention, Intervention):
        raise TypeError(f"intervene: {intervention!r} is no intervention (Steer, ...).")
    for source in (getattr(intervention, "source", None), getattr(intervention, "reference", None)):
        theirs = getattr(source, "model", None)
        if isinstance(source, ActivationCache) and theirs is not None and not is_same_model(model, theirs):
            raise ValueError(
                f"{intervention!r}: the cache was made by another model, {theirs!r}. To patch across models on "
                "purpose, give the activation itself: source=cache[name]."
            )
    return Applied(intervention, intervention.site(model.cfg), of)


def _hook_of(model: HookedVLM, applied: Applied) -> Any:
    axes = row_of(applied.name).axis_names

    def edit(tensor: Tensor, hook: HookPoint) -> Tensor | None:
        span = model._edits.span
        if span is None or applied not in model._edits.applied:
            return None
        at = applied.mask(span, tensor.shape[-2 if "query_pos" in axes else 1]).to(tensor.device)
        if not bool(at.any()):
            return None
        if isinstance(applied.intervention, Patch) and span.start > 0:
            earlier = PassSpan(span.inputs, 0, span.start).mask(applied.intervention.positions)
            return applied.intervention.edit(tensor, at, earlier.sum(-1).to(tensor.device))
        keys = getattr(applied.intervention, "keys", None)
        if keys is None:
            return applied.intervention.edit(tensor, at)
        return applied.intervention.edit(tensor, at, span.key_mask(keys).to(tensor.device))

    return edit


def attention_bias(model: HookedVLM, layer: int) -> Float[Tensor, "batch n_heads query_pos key_pos"] | None:
    """Return the sum of the attention biases in force at a layer, for the chunk that runs; None without any."""
    total, span = None, model._edits.span
    for applied in model._edits.applied:
        if applied.bias_layer != layer or span is None:
            continue
        at, keys = applied.mask(span), span.key_mask(applied.intervention.keys)
        if bool(at.any()) and bool(keys.any()):
            bias = applied.intervention.bias(at, keys, model.cfg.n_heads, model.cfg.dtype)
            total = bias if total is None else total + bias
    return total


@contextmanager
def running(model: HookedVLM, span: PassSpan) -> Iterator[PassSpan]:
    """Let interventions resolve their positions against a pass inside the block.

    Raises: ValueError, where the pass begins with the first position, as `require_reach`."""
    if span.is_prefill:
        require_reach(model, span)
    with model._edits.entered(Frame(span=span)):
        yield span


def require_reach(model: HookedVLM, span: PassSpan) -> None:
    """Raises: ValueError, before any computing, for an intervention in force that cannot act on these inputs."""
    n = len(span.inputs)
    for lists in model._edits.row_counts:
        if lists != n:
            raise ValueError(f"intervene(per_row=...): {lists} lists for a batch of {n} rows.")
    for applied in model._edits.applied:
        n_source = getattr(applied.intervention, "n_rows", None)
        if n_source not in (None, 1, n):
            raise ValueError(
                f"{applied.intervention!r}: its source has {n_source} rows, the run {n}; give a source of one row, "
                "or of as many as the run has."
            )
        keys = getattr(applied.intervention, "keys", None)
        needs_image = keys is not None and "image" in _words(keys)
        if needs_image and applied.of is None and not bool(span.key_mask(applied.intervention.keys).any()):
            raise ValueError(f"{applied.intervention!r} has no keys to act on: no row of {span.inputs!r} has an image.")
        at = applied.mask(span, _picture_positions(model, applied, span))
        if isinstance(applied.intervention, Patch):
            applied.intervention.require_fit(model.cfg, span.inputs, span.stop, at)
        if reaches_generated(applied.intervention.positions):
            continue
        if (where := applied.nowhere(at)) is not None:
            raise ValueError(f"{applied.intervention!r} selects no position in {where} of {span.inputs!r}.")


def _picture_positions(model: HookedVLM, applied: Applied, span: PassSpan) -> int:
    """How many positions an image has where an intervention edits images."""
    if row_of(applied.name).axis_names[0] != "crop" or span.inputs.pixel_values is None:
        return 1
    return picture_positions(model.cfg, span.inputs, applied.name)
