"""What a sweep will cost, before it runs: rows, token-layers, and the saving against whole forwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from veena_lens.sweeps.rows import Row


@dataclass(frozen=True)
class Plan:
    """`token_layers` counts positions times layers that are recomputed; `naive` the same for whole forwards."""

    n_rows: int
    n_positions: int
    n_layers: int
    token_layers: int
    n_whole: int  # rows that reach everything, which no engine can shorten

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


def plan_of(rows: Sequence[Row], n_positions: int, n_layers: int) -> Plan:
    """The plan of one pair's rows."""
    cost = sum((n_positions - row.start) * (n_layers - row.layer) for row in rows)
    whole = sum(row.start == 0 and row.layer == 0 for row in rows)
    return Plan(len(rows), n_positions, n_layers, cost, whole)
