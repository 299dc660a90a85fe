"""What a sweep will cost, before it runs: rows, token-layers, memory, and the saving against whole forwards."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch

from veena_lens.inputs import MultimodalInputs
from veena_lens.memory import free_memory, in_words
from veena_lens.sweeps.rows import AnyRow, PictureRow
from veena_lens.sweeps.tower import blocks_again

SHARE = 0.8  # of the free memory; the rest is for what a pass makes on its way


class SweepOptions(TypedDict, total=False):
    """How the rows of a sweep run.

    max_rows: rows that travel together, default 512. max_bytes: or as many as this many bytes of activations hold
    ("auto": those that are free), default no bound. progress: show the plan and a bar, default True. out: a folder
    where results are kept as they come, so that the same sweep resumes there; default none. plan_only: return the Plan
    and run nothing, default False.
    """

    max_rows: int
    max_bytes: int | str | None
    progress: bool
    out: str | Path | None
    plan_only: bool


def require_options(who: str, options: Mapping[str, Any], known: Any) -> None:
    """Raise TypeError for an option that a record of options (a TypedDict) does not have."""
    names = list(known.__annotations__)
    unknown = [name for name in options if name not in names]
    if unknown:
        raise TypeError(f"{who}: no option is called {unknown[0]!r}; there are {', '.join(names)}.")


@dataclass(frozen=True)
class Plan:
    """The cost of a sweep.

    n_rows: edited runs. n_positions, n_layers: of the decoder. token_layers: positions times layers that are
    recomputed; `naive` the same for whole forwards. n_whole: rows that reach everything from the first image on.
    row_bytes: activations of the longest row. tower_blocks: blocks of the tower that images pass again, once per image;
    naive_tower: the same for whole forwards, each of which encodes its images."""

    n_rows: int
    n_positions: int
    n_layers: int
    token_layers: int
    n_whole: int  # rows that reach everything from the first image on, which no engine can shorten
    row_bytes: int = 0  # activations of the longest row while it is in a block
    tower_blocks: int = 0
    naive_tower: int = 0

    @property
    def naive(self) -> int:
        return self.n_rows * self.n_positions * self.n_layers

    @property
    def saving(self) -> float:
        """Return how many times less the suffix engine computes, the base run included."""
        return self.naive / max(1, self.token_layers + self.n_positions * self.n_layers)

    def __repr__(self) -> str:
        rows = f"{self.n_whole} row reaches" if self.n_whole == 1 else f"{self.n_whole} rows reach"
        whole = f"; {rows} everything from the first image on and cost about a whole run each" if self.n_whole else ""
        tower = ""
        if self.naive_tower:
            saved = self.naive_tower - self.tower_blocks
            tower = f"; tower: images pass {self.tower_blocks:,} blocks again, {saved:,} of {self.naive_tower:,} saved"
        return (
            f"Plan({self.n_rows} rows of {self.n_positions} positions and {self.n_layers} layers: "
            f"{self.token_layers:,} token-layers against {self.naive:,}, about {self.saving:.1f} times less"
            f"{tower}{whole})"
        )


def plan_of(cfg: Any, rows: Sequence[AnyRow], inputs: MultimodalInputs) -> Plan:
    """Return the plan of one pair's rows."""
    n_positions, spans = inputs.shape[1], inputs.spans[0].images
    first = spans[0].start if spans else 0
    cost = sum((n_positions - row.start) * (cfg.n_layers - row.layer) for row in rows)
    whole = sum(row.start <= first and row.layer == 0 for row in rows)
    longest = max((n_positions - row.start for row in rows), default=0)
    size = row_bytes(cfg, longest, n_positions)
    n_pictures = 0 if inputs.crop_rows is None else len(inputs.crop_rows)
    again = naive = 0
    if n_pictures:
        n_blocks = cfg.vision.n_layers
        again = sum(len(row.held) * blocks_again(row.site, n_blocks) for row in rows if isinstance(row, PictureRow))
        naive = len(rows) * n_pictures * n_blocks
        held = max((len(row.held) for row in rows if isinstance(row, PictureRow)), default=0)
        patches = cfg.vision.n_positions if inputs.crop_grids is None else int(inputs.crop_grids.prod(-1).max())
        size = max(size, row_bytes(cfg.vision, patches, patches, cfg.dtype) * held)
    return Plan(len(rows), n_positions, cfg.n_layers, cost, whole, size, again, naive)


def row_bytes(cfg: Any, tail: int, n_positions: int, dtype: Any = None) -> int:
    """Return the bytes that a row holds while it passes a block.

    Residuals, norms, queries, keys and values, scores and pattern over all positions, and the MLP's hidden layer."""
    width = 6 * cfg.d_model + (2 * cfg.n_heads + 4 * cfg.n_key_value_heads) * cfg.d_head + 3 * cfg.d_mlp
    per_token = width + 3 * cfg.n_heads * n_positions
    size = getattr(cfg.dtype if dtype is None else dtype, "itemsize", 4)
    return tail * per_token * size


def whole_plan(plans: Sequence[Plan]) -> Plan:
    """Return the plans of all pairs as one."""
    return Plan(
        sum(p.n_rows for p in plans),
        max(p.n_positions for p in plans),
        plans[0].n_layers,
        sum(p.token_layers for p in plans),
        sum(p.n_whole for p in plans),
        max(p.row_bytes for p in plans),
        sum(p.tower_blocks for p in plans),
        sum(p.naive_tower for p in plans),
    )


def rows_within(plan: Plan, max_rows: int, max_bytes: int | str | None, device: torch.device) -> int:
    """Return how many rows travel together on a device.

    Raises: ValueError for a budget that holds no single row, or is neither a number nor "auto"; MemoryError where free
    memory holds none."""
    if max_rows < 1:
        raise ValueError(f"max_rows={max_rows} must be at least 1.")
    if max_bytes == "auto":
        free = free_memory(device)
        if free is None:
            return max_rows
        if free < plan.row_bytes:
            raise MemoryError(
                f"max_bytes='auto': {in_words(free)} are free on {device}, and the longest row needs about "
                f"{in_words(plan.row_bytes)}. Patch later positions, or shorten the prompt."
            )
        # A power of two, so that a run that is resumed beside another process most often takes the same number.
        fitting = max(1, int(SHARE * free) // max(1, plan.row_bytes))
        return min(max_rows, 2 ** (fitting.bit_length() - 1))
    if max_bytes is None:
        return max_rows
    if isinstance(max_bytes, str):
        raise ValueError(f'max_bytes={max_bytes!r} must be a number of bytes, "auto" (what is free) or None.')
    if max_bytes < plan.row_bytes:
        raise ValueError(
            f"max_bytes={max_bytes:,} holds no single row: the longest needs about {plan.row_bytes:,} bytes. Raise it, "
            "or patch later positions."
        )
    return max(1, min(max_rows, max_bytes // max(1, plan.row_bytes)))


def announce(plan: Plan) -> None:
    """Write the plan before a sweep runs, where the progress bar goes."""
    from tqdm.auto import tqdm

    tqdm.write(repr(plan), file=sys.stderr)
