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
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from veena_lens.interventions.base import Intervention
from veena_lens.model.run import Run, reaches_generated


@dataclass(frozen=True, eq=False)
class Applied:
    """One intervention in force: its hook point, and the row it is for (None: every row of `n_rows` or any batch)."""

    intervention: Any
    name: str
    row: int | None = None
    n_rows: int | None = None

    def mask(self, run: Run) -> Tensor:
        """Positions of this chunk that it edits."""
        at = run.mask(self.intervention.positions)
        if self.row is None:
            return at
        only = torch.zeros(len(at), 1, dtype=torch.bool, device=at.device)
        only[self.row] = True
        return at & only


class Intervening:
    """Mixin of HookedVLM."""

    _applied: list[Applied]
    _run: Run | None

    def intervene(
        self, interventions: Sequence[Any] | None = None, *, per_row: Sequence[Sequence[Any]] | None = None
    ) -> Any:
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
            planned = [self._plan(i, row, len(per_row)) for row, mine in enumerate(per_row) for i in mine]
        return self._intervening(planned)

    def _plan(self, intervention: Any, row: int | None = None, n_rows: int | None = None) -> Applied:
        if not isinstance(intervention, Intervention):
            raise TypeError(f"intervene: {intervention!r} is no intervention (Steer, ...).")
        return Applied(intervention, intervention.site(self.cfg), row, n_rows)  # type: ignore[attr-defined]

    @contextmanager
    def _intervening(self, planned: list[Applied]) -> Iterator[Any]:
        before = self._applied
        self._applied = [*before, *planned]
        try:
            with self.hooks([(p.name, self._hook_of(p)) for p in planned]):  # type: ignore[attr-defined]
                yield self
        finally:
            self._applied = before

    def _hook_of(self, applied: Applied) -> Any:
        def edit(tensor: Tensor, hook: HookPoint) -> Tensor | None:
            if self._run is None:
                return None
            at = applied.mask(self._run).to(tensor.device)
            return applied.intervention.edit(tensor, at) if bool(at.any()) else None

        return edit

    def _check_reach(self, run: Run) -> None:
        """Raises: ValueError, before any computing, for an intervention that cannot act on these inputs."""
        for applied in self._applied:
            n = len(run.inputs)
            if applied.n_rows is not None and applied.n_rows != n:
                raise ValueError(f"intervene(per_row=...): {applied.n_rows} lists for a batch of {n} rows.")
            if not reaches_generated(applied.intervention.positions) and not bool(applied.mask(run).any()):
                where = "every row" if applied.row is None else f"row {applied.row}"
                raise ValueError(f"{applied.intervention!r} selects no position in {where} of {run.inputs!r}.")
