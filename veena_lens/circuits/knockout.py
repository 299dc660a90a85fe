"""Attention knockout over layers: which flow of information between parts of the prompt the answer needs, and where.

A cut forbids some queries to read some keys in a window of layers; the change of the metric, layer by layer, is the
curve of information flow. Each run goes on from what enters the first layer of its window, so images are encoded
once and the layers before are not computed again; cuts and rows of one window travel together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veena_lens.images.layout import image_runs
from veena_lens.inputs import MultimodalInputs
from veena_lens.interventions import Box, KnockOutAttention, Tile
from veena_lens.interventions.base import require_units
from veena_lens.long_runs import counting
from veena_lens.positions import listed, parse
from veena_lens.scores import Scores
from veena_lens.sweeps.alignment import bare, places_of
from veena_lens.sweeps.measuring import entering_layers, measure_of, parts, require_rows, wide

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM

FLOWS = (("image", "query"), ("query", "last"), ("image", "last"))


def attention_knockout(
    model: HookedVLM,
    inputs: MultimodalInputs,
    cuts: Sequence[Any] = FLOWS,
    metric: Any = None,
    *,
    layers: Any = None,
    window: int = 1,
    heads: Any = None,
    relative: bool = True,
    max_rows: int = 32,
    progress: bool = False,
) -> Scores:
    """Return how the metric changes when attention between two parts of the prompt is cut in a window of layers.

    Entry: (m_cut - m) / |m|, or m_cut - m with relative=False; m is the metric of the row without a cut, m_cut that
    under `KnockOutAttention` of the cut's keys for its queries in the layers l - (window - 1) // 2 .. l + window // 2
    that exist (the other weights of a query are renormalised).

    cuts: pairs (keys, queries), information flows from the former to the latter; each a selection of positions: words
    ("image", "query", "last", ...), numbers of the row without its pads, slices, a `Box` of pixels or a `Tile`. Where
    both name a position, it counts as a query alone, so that ("query", "last") leaves the last token its look at
    itself; a selection cut from itself, ("query", "query"), loses every key within it, each position itself included.
    metric: as in `patch_sweep`, or a list with one per row. layers: the middles l of the windows; default each layer.
    window: layers per cut, default one. heads: default all. max_rows: runs that travel together. progress: show a bar.
    Returns Scores with axes (pair, cut, layer), pair being the row of `inputs`; unit: a share of |m| (NaN where m is
    0), or the metric's. meta: "baseline" (m, per row), "window", "layers" (those of each window).
    Raises: ValueError for a cut that selects nothing, or no key that one of its queries can read, in some row; unknown
    layers, heads or words; a metric that is not one finite number per row, or that is read before a window.
    Source: Geva et al. 2023, arXiv 2304.14767, section 4; for images Zhang et al. 2024, arXiv 2411.18620.
    """
    who, cfg = "attention_knockout", model.cfg
    require_rows(who, max_rows)
    measure = measure_of(who, model, metric, len(inputs))
    windows = _windows(who, cfg.n_layers, layers, window)
    heads = None if heads is None else listed(heads, cfg.n_heads, f"{who}: heads")
    require_units(heads, cfg.n_heads, who, "head")
    names = [_name(who, cut) for cut in cuts]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{who}: cuts must be pairs (keys, queries), at least one and each once, not {list(cuts)!r}.")
    late = [w for w in windows.values() if measure.stop is not None and w[0] >= measure.stop]
    if late:
        raise ValueError(f"{who}: the metric reads layer {measure.stop - 1 if measure.stop else 0}, before {late[0]}.")
    masks = [[_masks(who, cfg, inputs, row, cut) for cut in cuts] for row in range(len(inputs))]
    base, starts = [], sorted({w[0] for w in windows.values()})
    change = torch.zeros(len(inputs), len(names), len(windows), dtype=torch.float64)
    with counting(change.numel(), "cuts", progress) as advance:
        for rows in parts(len(inputs), max_rows):
            mine = inputs[rows]
            with torch.no_grad(), entering_layers(model, mine, starts) as entering:
                plain = measure(mine, rows, plain=True)
            base.append(plain)
            without = bare(mine)
            todo = [(at, cut) for at in range(len(rows)) for cut in range(len(names))]
            for column, within in enumerate(windows.values()):
                for some in parts(len(todo), max_rows):
                    at, cut = (list(x) for x in zip(*(todo[k] for k in some)))
                    pairs = [rows[i] for i in at]
                    chosen = [masks[pair][c] for pair, c in zip(pairs, cut, strict=True)]
                    knocks = [
                        [KnockOutAttention(layer, heads, keys, queries) for layer in within] for keys, queries in chosen
                    ]
                    with torch.no_grad(), model.intervene(per_row=knocks):
                        found = measure(without[at], pairs, entering=entering[within[0]].rows(at))
                    change[pairs, cut, column] = (found - plain[at]).double().cpu()
                    advance(len(some))
    before = torch.cat(base).double().cpu()
    if relative:
        change = change / torch.where(before == 0, torch.nan, before.abs())[:, None, None]
    return Scores(
        change.to(wide(base[0]).dtype),
        ("pair", "cut", "layer"),
        {"cut": names, "layer": list(windows)},
        name="knockout",
        unit="share of the metric" if relative else "metric",
        meta={"baseline": before.tolist(), "window": window, "layers": list(windows.values())},
    )


def _windows(who: str, n_layers: int, layers: Any, window: int) -> dict[int, list[int]]:
    """Return middle -> layers of its window. Raises: ValueError for layers or a width that do not exist."""
    if window < 1:
        raise ValueError(f"{who}: window={window} must be at least one layer wide.")
    chosen = listed(layers, n_layers, f"{who}: layers")
    require_units(chosen, n_layers, who, "layer")
    middles = [i % n_layers for i in chosen]
    return {m: [i for i in range(m - (window - 1) // 2, m + window // 2 + 1) if 0 <= i < n_layers] for m in middles}


def _name(who: str, cut: Any) -> str:
    """Return keys -> queries, in words. Raises: ValueError for what is not a pair of selections."""
    if isinstance(cut, str) or not isinstance(cut, Sequence) or len(cut) != 2:
        raise ValueError(f"{who}: a cut is a pair (keys, queries) such as ('image', 'last'), not {cut!r}.")
    for part in cut:
        parse(part)
    return " -> ".join(_short(part) for part in cut)


def _short(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Tensor):
        part = part.nonzero()[:, -1] if part.dtype == torch.bool else part
        return f"positions {part.flatten().tolist()}"
    return repr(part) if isinstance(part, (Box, Tile, int, slice)) else f"positions {list(part)}"


def _masks(who: str, cfg: Any, inputs: MultimodalInputs, row: int, cut: tuple[Any, Any]) -> tuple[Tensor, Tensor]:
    """Return (keys, queries) [pos] of one row. Raises: ValueError where there is nothing to cut."""
    found = []
    for part in cut:
        mask = torch.zeros(inputs.shape[1], dtype=torch.bool, device=inputs.device)
        try:
            mask[places_of(inputs, row, part)] = True
        except ValueError as error:
            raise ValueError(f"{who}: cut {_name(who, cut)}: {error}") from error
        found.append(mask)
    keys, queries = found
    if _short(cut[0]) != _short(cut[1]):
        keys = keys & ~queries
    if not _are_read(keys, queries, image_runs(cfg, inputs[row])):
        raise ValueError(
            f"{who}: cut {_name(who, cut)} cuts nothing in row {row}: it has no key that one of its queries can read "
            "(positions read earlier ones, and those in both parts count as queries). Cuts are (keys, queries)."
        )
    return keys, queries


def _are_read(keys: Tensor, queries: Tensor, blocks: Tensor | None) -> bool:
    """Return True where some query stands after some key, or both lie in one image whose tokens read each other."""
    first, last = keys.nonzero().flatten(), queries.nonzero().flatten()
    if not len(first):
        return False
    shared = set() if blocks is None else set(blocks[0, keys].tolist()) & set(blocks[0, queries].tolist()) - {-1}
    return int(first[0]) <= int(last[-1]) or bool(shared)
