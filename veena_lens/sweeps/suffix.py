"""The exact suffix engine: rows recompute only the layers and positions that their edit can reach.

With a causal decoder an edit at layer l and positions >= p leaves every activation of layers < l and of
positions < p as it was (a picture whose tokens read each other in both directions is one position here: an edit inside
reaches it from its first token). Rows of many edits travel through the layers together, each joining the batch at its
own layer (a staircase), as further queries on the base run's keys.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from veena_lens.components.context import Context
from veena_lens.components.prefix import SharedPrefix
from veena_lens.hook_table import layer_of
from veena_lens.model.decoder import run_blocks
from veena_lens.sweeps.rows import AnyRow, BaseRun, Row
from veena_lens.sweeps.tower import encode_again
from veena_lens.vision.blocks import image_blocks


def chunks(rows: Sequence[AnyRow], max_rows: int) -> Iterator[list[int]]:
    """Indices of rows that share a first position, at most `max_rows` together, earlier layers first."""
    groups: dict[tuple[int, bool], list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        groups[row.start, row.is_picture].append(i)
    for _, members in sorted(groups.items()):
        members.sort(key=lambda i: rows[i].layer)
        for first in range(0, len(members), max_rows):
            yield members[first : first + max_rows]


@torch.no_grad()
def run_staircase(
    model: Any, base: BaseRun, rows: Sequence[AnyRow], sites: Sequence[str] = (), with_logits: bool = True
) -> tuple[Float[Tensor, "rows d_vocab"] | None, dict[str, Tensor]]:
    """(logits of the last position, or None; the activations at `sites` [rows pos ...]) of each row.

    All rows must share their first position, and edit the text's blocks or the pictures, not both."""
    start, n_layers = rows[0].start, model.cfg.n_layers
    last_layer = n_layers - 1 if with_logits else max(layer_of(site) or 0 for site in sites)
    order = sorted(range(len(rows)), key=lambda i: rows[i].layer)
    tail = base.length - start
    device = base.resid[0].device
    positions = base.inputs.position_ids[..., start:]
    prefix = SharedPrefix(
        [k[:start] for k in base.keys],
        [v[:start] for v in base.values],
        start,
        model.cfg.window,
        image_blocks(model.cfg, base.inputs),
    )
    entering = encode_again(model, base, rows) if rows[0].is_picture else None
    deepstack = base.deepstack if entering is None else entering.deepstack
    context = Context(
        key_mask=None,
        n_past=start,
        n_new=tail,
        rotary=model._rotary.tables(positions, model.cfg.dtype),
        windows=model.cfg.window,
        prefix=prefix,
        deepstack={layer: added[:, start:] for layer, added in deepstack.items()},
    )
    seen = {site: base.seen[site][None].repeat(len(rows), *[1] * base.seen[site].ndim) for site in sites}
    resid = base.resid[0].new_empty(0, tail, model.cfg.d_model, device=device)
    joined = 0
    for layer in range(rows[order[0]].layer, last_layer + 1):
        new = [i for i in order[joined:] if rows[i].layer == layer]
        hooks: list[Any] = []
        if new and entering is not None:
            resid = entering.resid[:, start:].to(resid.device)
        elif new:
            joins = base.resid[layer][start:].to(resid.device).expand(len(new), -1, -1)
            resid = torch.cat([resid, joins])
            hooks = _edits(rows, new, joined, start)
        joined += len(new)
        hooks += [(site, _capture(seen[site], order[:joined], start)) for site in sites if layer_of(site) == layer]
        with model.hooks(hooks):
            resid = run_blocks(model.blocks, resid, context, layer, layer + 1)
    if not with_logits:
        return None, seen
    # Rows that join nowhere cannot exist here: every edit lies in a block or before the first.
    logits = model._unembed(context.with_deepstack(n_layers, resid)[:, -1:])[:, 0]
    return logits[torch.argsort(torch.tensor(order, device=logits.device))], seen


def _edits(rows: Sequence[Any], new: list[int], joined: int, start: int) -> list[tuple[str, Callable[..., Any]]]:
    """Hooks of one layer that edit the rows which just joined, site by site."""
    by_site: dict[str, list[tuple[int, Row]]] = defaultdict(list)
    for place, i in enumerate(new, start=joined):
        by_site[rows[i].site].append((place, rows[i]))

    def make(mine: list[tuple[int, Row]]) -> Callable[..., Any]:
        def edit(tensor: Tensor, hook: Any) -> Tensor:
            out = tensor.clone()
            for place, row in mine:
                out[place] = row.edit(tensor[place], start)
            return out

        return edit

    return [(site, make(mine)) for site, mine in by_site.items()]


def _capture(seen: Tensor, order: list[int], start: int) -> Callable[..., None]:
    """A listener that keeps the metric's activation of the rows present, in the rows' own order."""

    def keep(tensor: Tensor, hook: Any) -> None:
        seen[torch.tensor(order), start:] = tensor.to(seen)

    return keep
