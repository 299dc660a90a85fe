"""What a sweep will cost, before it runs: rows, token-layers, memory, and the saving against whole forwards."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from veena_lens.sweeps.rows import AnyRow


@dataclass(frozen=True)
class Plan:
    """`token_layers` counts positions times layers that are recomputed; `naive` the same for whole forwards."""

    n_rows: int
    n_positions: int
    n_layers: int
    token_layers: int
    n_whole: int  # rows that reach everything, which no engine can shorten
    row_bytes: int = 0  # activations of the longest row while it is in a block

    @property
    def naive(self) -> int:
        return self.n_rows * self.n_positions * self.n_layers

    @property
    def saving(self) -> float:
        """How many times less the suffix engine computes (the base run counted in)."""
        return self.naive / max(1, self.token_layers + self.n_positions * self.n_layers)

    def __repr__(self) -> str:
        whole = f"; {self.n_whole} rows reach everything and cost a whole run each" if self.n_whole else ""
        return (
            f"Plan({self.n_rows} rows of {self.n_positions} positions and {self.n_layers} layers: "
            f"{self.token_layers:,} token-layers against {self.naive:,}, about {self.saving:.1f} times less{whole})"
        )


def plan_of(cfg: Any, rows: Sequence[AnyRow], n_positions: int) -> Plan:
    """The plan of one pair's rows."""
    cost = sum((n_positions - row.start) * (cfg.n_layers - row.layer) for row in rows)
    whole = sum(row.start == 0 and row.layer == 0 for row in rows)
    longest = max((n_positions - row.start for row in rows), default=0)
    return Plan(len(rows), n_positions, cfg.n_layers, cost, whole, row_bytes(cfg, longest, n_positions))


def row_bytes(cfg: Any, tail: int, n_positions: int) -> int:
    """Bytes that a row holds while it passes a block: residuals, norms, queries, keys and values, scores and pattern
    over all positions, and the MLP's hidden layer."""
    width = 6 * cfg.d_model + (2 * cfg.n_heads + 4 * cfg.n_key_value_heads) * cfg.d_head + 3 * cfg.d_mlp
    per_token = width + 3 * cfg.n_heads * n_positions
    size = getattr(cfg.dtype, "itemsize", 4)
    return tail * per_token * size


def whole_plan(plans: Sequence[Plan]) -> Plan:
    """The plans of all pairs as one."""
    return Plan(
        sum(p.n_rows for p in plans),
        max(p.n_positions for p in plans),
        plans[0].n_layers,
        sum(p.token_layers for p in plans),
        sum(p.n_whole for p in plans),
        max(p.row_bytes for p in plans),
    )


def rows_within(plan: Plan, max_rows: int, max_bytes: int | None) -> int:
    """How many rows travel together. Raises: ValueError for a budget that holds no single row."""
    if max_bytes is None:
        return max_rows
    if max_bytes < plan.row_bytes:
        raise ValueError(
            f"max_bytes={max_bytes:,} holds no single row: the longest needs about {plan.row_bytes:,} bytes. Raise it, "
            "or patch later positions."
        )
    return max(1, min(max_rows, max_bytes // max(1, plan.row_bytes)))


def announce(plan: Plan) -> None:
    """Tell the plan before a sweep runs, where the progress bar goes."""
    from tqdm.auto import tqdm

    tqdm.write(repr(plan), file=sys.stderr)
