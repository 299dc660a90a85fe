"""The naive engine: one whole forward a row. The specification that the suffix engine is tested against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from veena_lens.sweeps.rows import AnyRow, BaseRun, PictureRow


@torch.no_grad()
def run_naive(
    model: Any, base: BaseRun, rows: Sequence[AnyRow], sites: Sequence[str] = (), with_logits: bool = True
) -> tuple[Float[Tensor, "rows d_vocab"] | None, dict[str, Tensor]]:
    """As `run_staircase`, each row by a forward of its own."""
    logits, seen = [], {site: [] for site in sites}
    for row in rows:

        def edit(tensor: Tensor, hook: Any, row: AnyRow = row) -> Tensor:
            if isinstance(row, PictureRow):
                return row.edit(tensor, 0, range(len(tensor)))
            return row.edit(tensor[0], 0)[None]

        with model.hooks([(row.site, edit)]):
            out, cache = model.run_with_cache(base.inputs, names_filter=list(sites))
        logits.append(out[0, -1])
        for site in sites:
            seen[site].append(cache[site][0])
    return torch.stack(logits) if with_logits else None, {site: torch.stack(found) for site, found in seen.items()}
