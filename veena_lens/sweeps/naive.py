"""The naive engine: one whole forward a row. The specification that the suffix engine is tested against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from veena_lens.sweeps.rows import BaseRun, Row


@torch.no_grad()
def run_naive(
    model: Any, base: BaseRun, rows: Sequence[Row], metric_site: str | None = None
) -> tuple[Float[Tensor, "rows d_vocab"] | None, Tensor | None]:
    """As `run_staircase`, each row by a forward of its own."""
    logits, seen = [], []
    for row in rows:

        def edit(tensor: Tensor, hook: Any, row: Row = row) -> Tensor:
            return row.edit(tensor[0], 0)[None]

        with model.hooks([(row.site, edit)]):
            if metric_site is None:
                logits.append(model(base.inputs)[0, -1])
            else:
                _, cache = model.run_with_cache(base.inputs, names_filter=metric_site)
                seen.append(cache[metric_site][0])
    return (torch.stack(logits), None) if metric_site is None else (None, torch.stack(seen))
