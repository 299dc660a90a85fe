"""`model.intervene`: interventions become hooks for the length of a `with` block.

The same list acts alike in forward, run_with_cache, run_with_hooks and generate. Everything is checked before
a hook is added; at the first position of a pass, a selection that is empty in each of its rows is an error.
Interventions act in the order of their list, before hooks that are added inside the block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from veena_lens.activation_cache import ActivationCache
from veena_lens.hook_table import layer_of, row_of
from veena_lens.interventions.attention import BoostAttention, SuppressHeads
from veena_lens.interventions.base import Intervention, content, is_same_model, picture_positions
from veena_lens.interventions.patch import Patch
from veena_lens.model.forward import PassSpan
from veena_lens.positions import parse, position_mask, reaches_generated


@dataclass(frozen=True, eq=False)
class Applied:
    """One intervention in force: its hook point, and the rows it is for (None: every row of any batch)."""

    intervention: Any
    name: str
    of: tuple[int, ...] | None = None

    def rows(self, run: PassSpan) -> Bool[Tensor, " batch"]:
        """The rows it is for."""
        n = len(run.inputs)
        chosen = torch.full((n,), self.of is None, dtype=torch.bool, device=run.inputs.device)
        if self.of is not None:
            chosen[list(self.of)] = True
        return chosen

    def mask(self, run: PassSpan, n_positions: int = 1) -> Bool[Tensor, "rows pos"]:
        """Positions of this chunk that it edits; at a hook of the tower, of the `n_positions` of each image."""
        rows, axes = self.rows(run), row_of(self.name).axis_names
        if axes[0] == "batch":
            return run.mask(self.intervention.positions) & rows[:, None]
        if axes[0] == "crop":
            return run.picture_mask(self.intervention.positions, rows, n_positions)
        chosen = position_mask(run.inputs, self.intervention.positions) & rows[:, None]
        return chosen[run.inputs.image_mask][:, None]

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


class Intervening:
    """Mixin of HookedVLM."""

    _applied: list[Applied]
    _row_counts: tuple[int, ...] = ()
    _run: PassSpan | None
    _rows: Any

    def intervene(self, interventions: Sequence[Any] | None = None, *, per_row: Sequence[Any] | None = None) -> Any:
        """Apply interventions inside a `with` block; `per_row` gives one list a row of the batch.

        An empty list changes nothing; blocks nest, outer interventions acting first.
        Raises: TypeError for what is no intervention; ValueError for one that does not fit the model.
        """
        if (interventions is None) == (per_row is None):
            raise ValueError("intervene: give a list of interventions, or per_row=[list for row 0, ...], and not both.")
        if per_row is None:
            if isinstance(interventions, Intervention):
                interventions = [interventions]
            planned = [self._plan(i) for i in interventions or ()]
        else:
            lists = [[mine] if isinstance(mine, Intervention) else mine for mine in per_row]
            planned = [self._plan(i, rows) for i, rows in _together(lists)]
        return self._intervening(planned, () if per_row is None else (len(per_row),))

    def _plan(self, intervention: Any, of: tuple[int, ...] | None = None) -> Applied:
        if not isinstance(intervention, Intervention):
            raise TypeError(f"intervene: {intervention!r} is no intervention (Steer, ...).")
        for source in (getattr(intervention, "source", None), getattr(intervention, "reference", None)):
            theirs = getattr(source, "model", None)
            if isinstance(source, ActivationCache) and theirs is not None and not is_same_model(self, theirs):
                raise ValueError(
                    f"{intervention!r}: the cache was made by another model, {theirs!r}. To patch across models on "
                    "purpose, give the activation itself: source=cache[name]."
                )
        return Applied(intervention, intervention.site(self.cfg), of)  # type: ignore[attr-defined]

    @contextmanager
    def _intervening(self, planned: list[Applied], n_rows: tuple[int, ...] = ()) -> Iterator[Any]:
        before, counts = self._applied, self._row_counts
        self._applied, self._row_counts = [*before, *planned], (*counts, *n_rows)
        try:
            # A factor of 1 is no edit: to hear the pattern for it would leave the fused kernel, whose last bits differ.
            acting = [p for p in planned if getattr(p.intervention, "factor", None) != 1]
            edits = [(p.name, self._hook_of(p)) for p in acting if p.bias_layer is None]
            with self.hooks(edits):  # type: ignore[attr-defined]
                yield self
        finally:
            self._applied, self._row_counts = before, counts

    @contextmanager
    def without_interventions(self) -> Iterator[Any]:
        """Interventions in force, and who watches attention, rest inside the block; hooks added by hand do not."""
        before, self._applied = self._applied, []
        counts, self._row_counts = self._row_counts, ()
        watching, self._rows = self._rows, None
        try:
            yield self
        finally:
            self._applied, self._row_counts, self._rows = before, counts, watching

    def _hook_of(self, applied: Applied) -> Any:
        axes = row_of(applied.name).axis_names

        def edit(tensor: Tensor, hook: HookPoint) -> Tensor | None:
            if self._run is None or applied not in self._applied:
                return None
            at = applied.mask(self._run, tensor.shape[-2 if "query_pos" in axes else 1]).to(tensor.device)
            if not bool(at.any()):
                return None
            if isinstance(applied.intervention, Patch) and self._run.start > 0:
                earlier = PassSpan(self._run.inputs, 0, self._run.start).mask(applied.intervention.positions)
                return applied.intervention.edit(tensor, at, earlier.sum(-1).to(tensor.device))
            keys = getattr(applied.intervention, "keys", None)
            if keys is None:
                return applied.intervention.edit(tensor, at)
            return applied.intervention.edit(tensor, at, self._run.key_mask(keys).to(tensor.device))

        return edit

    def _bias(self, layer: int) -> Float[Tensor, "batch n_heads query_pos key_pos"] | None:
        """The sum of the attention biases in force at a layer, for the chunk that runs; None without any."""
        total = None
        for applied in self._applied:
            if applied.bias_layer != layer or self._run is None:
                continue
            at, keys = applied.mask(self._run), self._run.key_mask(applied.intervention.keys)
            if bool(at.any()) and bool(keys.any()):
                bias = applied.intervention.bias(at, keys, self.cfg.n_heads, self.cfg.dtype)  # type: ignore[attr-defined]
                total = bias if total is None else total + bias
        return total

    def _picture_positions(self, applied: Applied, run: PassSpan) -> int:
        """How many positions an image has where an intervention edits images."""
        if row_of(applied.name).axis_names[0] != "crop" or run.inputs.pixel_values is None:
            return 1
        return picture_positions(self.cfg, run.inputs, applied.name)  # type: ignore[attr-defined]

    def _check_reach(self, run: PassSpan) -> None:
        """Raises: ValueError, before any computing, for an intervention that cannot act on these inputs."""
        n = len(run.inputs)
        for lists in self._row_counts:
            if lists != n:
                raise ValueError(f"intervene(per_row=...): {lists} lists for a batch of {n} rows.")
        for applied in self._applied:
            n_source = getattr(applied.intervention, "n_rows", None)
            if n_source not in (None, 1, n):
                raise ValueError(
                    f"{applied.intervention!r}: its source has {n_source} rows, the run {n}; give a source of one row, "
                    "or of as many as the run has."
                )
            keys = getattr(applied.intervention, "keys", None)
            needs_image = keys is not None and "image" in _words(keys)
            if needs_image and applied.of is None and not bool(run.key_mask(applied.intervention.keys).any()):
                raise ValueError(
                    f"{applied.intervention!r} has no keys to act on: no row of {run.inputs!r} has an image."
                )
            at = applied.mask(run, self._picture_positions(applied, run))
            if isinstance(applied.intervention, Patch):
                applied.intervention.require_fit(self.cfg, run.inputs, run.stop, at)  # type: ignore[attr-defined]
            if reaches_generated(applied.intervention.positions):
                continue
            if (where := applied.nowhere(at)) is not None:
                raise ValueError(f"{applied.intervention!r} selects no position in {where} of {run.inputs!r}.")
