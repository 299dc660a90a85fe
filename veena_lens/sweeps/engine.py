"""Runs the rows of a sweep and measures each, by one of two engines that give the same numbers.

The suffix engine runs the unpatched input once (`base_run`) and recomputes only the layers and positions that a row's
edit can reach. With a causal decoder an edit at layer l and positions >= p leaves every activation of layers < l and of
positions < p unchanged (an image whose tokens read each other in both directions counts as one position: an edit inside
reaches it from its first token). Rows of many edits travel through the layers together, each joining the batch at the
layer of its edit (a staircase), as further queries on the base run's keys.

The naive engine runs one whole forward per row; it is the specification that the suffix engine is tested against.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from veena_lens.components.hooks import heard
from veena_lens.components.kv_cache import SharedPrefix
from veena_lens.hook_table import layer_of
from veena_lens.images.layout import image_runs
from veena_lens.inputs import MultimodalInputs
from veena_lens.long_runs import Store
from veena_lens.model.forward import LAST, ResidualState, forward
from veena_lens.model.span import PassSpan
from veena_lens.sweeps.measuring import apply_metrics, read_logits, sites_of
from veena_lens.sweeps.rows import AnyRow, BaseRun, PictureRow, Row
from veena_lens.sweeps.tower import encode_again, names_to_keep, seen_pictures

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM


@torch.no_grad()
def base_run(
    model: HookedVLM, inputs: MultimodalInputs, sites: Sequence[str] = (), on_pictures: Sequence[str] = ()
) -> BaseRun:
    """Run one row of inputs without edits, and keep what the rows of a sweep and their metrics need.

    Images are encoded here, and again only where an edit changes them.
    sites: hooks that metrics read. on_pictures: hooks of the tower or the connector that rows edit.
    """
    n = model.cfg.n_layers
    names = {f"blocks.{i}.{part}" for i in range(n) for part in ("hook_resid_pre", "attn.hook_rot_k", "attn.hook_v")}
    names |= set(sites)
    inner = [f"deepstack.{i}.hook_out" for i in range(model.cfg.n_deepstack) if inputs.pixel_values is not None]
    again = names_to_keep(model, on_pictures) if on_pictures else {}
    names |= {*inner, *again.values()}
    logits, cache = model.run_with_cache(inputs, names_filter=sorted(names))

    def layers(part: str) -> list[Tensor]:
        return [cache[f"blocks.{i}.{part}"][0] for i in range(n)]

    return BaseRun(
        inputs,
        layers("hook_resid_pre"),
        layers("attn.hook_rot_k"),
        layers("attn.hook_v"),
        logits[0, -1],
        {site: cache[site][0] for site in sites},
        {i + 1: model.scatter_deepstack(cache[name], inputs) for i, name in enumerate(inner)},
        seen_pictures(model, {key: cache[name] for key, name in again.items()}) if again else None,
    )


def chunks(rows: Sequence[AnyRow], max_rows: int) -> Iterator[list[int]]:
    """Yield the indices of rows that share a first position, at most `max_rows` together, earlier layers first."""
    groups: dict[tuple[int, bool], list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        groups[row.start, row.is_picture].append(i)
    for _, members in sorted(groups.items()):
        members.sort(key=lambda i: rows[i].layer)
        for first in range(0, len(members), max_rows):
            yield members[first : first + max_rows]


@torch.no_grad()
def run_staircase(
    model: HookedVLM, base: BaseRun, rows: Sequence[AnyRow], sites: Sequence[str] = (), with_logits: bool = True
) -> tuple[Float[Tensor, "rows d_vocab"] | None, dict[str, Tensor]]:
    """Return the logits of each row's last position (None without `with_logits`), and its activations at `sites`.

    rows: edits that share their first position, all in the blocks of the text or all in the images.
    sites: hooks of the decoder whose activations [rows pos ...] are returned by name."""
    start = rows[0].start
    last_layer = model.cfg.n_layers - 1 if with_logits else max(layer_of(site) or 0 for site in sites)
    order = sorted(range(len(rows)), key=lambda i: rows[i].layer)
    tail = base.length - start
    device = base.resid[0].device
    prefix = SharedPrefix(
        [k[:start] for k in base.keys],
        [v[:start] for v in base.values],
        start,
        model.cfg.window,
        image_runs(model.cfg, base.inputs),
    )
    entering = encode_again(model, base, rows) if rows[0].is_picture else None
    span = PassSpan(base.inputs, start, base.length)
    added = (base if entering is None else entering).deepstack
    deepstack = {layer: x[:, start:] for layer, x in added.items()}
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
        state = ResidualState(resid, deepstack, layer)
        stop = None if with_logits and layer == last_layer else layer + 1
        with model.hooks(hooks):
            resid = forward(model, span, entering=state, stop=stop, prefix=prefix, positions=LAST)
    # Rows that join nowhere cannot exist here: every edit lies in a block or before the first.
    if not with_logits:
        return None, seen
    logits = resid[:, 0]
    return logits[torch.argsort(torch.tensor(order, device=logits.device))], seen


def _edits(rows: Sequence[Any], new: list[int], joined: int, start: int) -> list[tuple[str, Callable[..., Any]]]:
    """Return the hooks of one layer that edit the rows that just joined, one per site."""
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
    """Return a hook that keeps a metric's activation of the rows present, in the order of the rows."""

    def keep(tensor: Tensor, hook: Any) -> None:
        seen[torch.tensor(order), start:] = tensor.to(seen)

    return keep


@torch.no_grad()
def run_naive(
    model: HookedVLM, base: BaseRun, rows: Sequence[AnyRow], sites: Sequence[str] = (), with_logits: bool = True
) -> tuple[Float[Tensor, "rows d_vocab"] | None, dict[str, Tensor]]:
    """Return the same as `run_staircase`, from one forward per row."""
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


ENGINES = ("suffix", "naive")


def require_engine(model: HookedVLM, engine: str) -> None:
    """Raise ValueError for an unknown engine, or a suffix sweep inside `intervene` or with hooks on the model."""
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r} must be 'suffix' or 'naive'.")
    if engine == "suffix" and (model.interventions or any(map(heard, model.hook_dict.values()))):
        raise ValueError(
            "The suffix engine runs rows through parts of the model, where hooks of whole runs have no meaning: leave "
            "the `with model.intervene(...)` block, call model.reset_hooks(), or use engine='naive'."
        )


def require_inputs(inputs: Any, name: str) -> None:
    """Raise TypeError for anything but prepared inputs, ValueError for a batch without rows."""
    if not isinstance(inputs, MultimodalInputs):
        raise TypeError(f"{name} must be prepared inputs (model.prepare, model.inputs_from_hf), not {inputs!r}.")
    if not len(inputs):
        raise ValueError(f"{name} holds no row; give at least one prompt.")


def run_rows(
    model: HookedVLM,
    base: BaseRun,
    rows: Sequence[AnyRow],
    metrics: Mapping[str, Any],
    *,
    engine: str,
    max_rows: int,
    advance: Callable[[int], Any],
    store: Store,
) -> dict[str, Tensor]:
    """Return each metric of every row, [rows].

    engine: "suffix" or "naive". max_rows: how many rows travel together. advance: moves the progress bar by as many
    rows as are done. store: keeps each batch of rows, and gives it back instead of computing it again."""
    sites, with_logits = sites_of(model, metrics), read_logits(metrics)
    values: dict[str, Tensor] = {}
    for number, members in enumerate(chunks(rows, max_rows if engine == "suffix" else 1)):

        def run(members: Sequence[int] = members) -> dict[str, Tensor]:
            runner = run_staircase if engine == "suffix" else run_naive
            found = runner(model, base, [rows[i] for i in members], sites, with_logits)
            return apply_metrics(model, metrics, base, *found)

        for name, value in store.do(f"{number:06d}", run).items():
            if name not in values:
                values[name] = value.new_empty(len(rows))
            values[name][torch.tensor(members, device=values[name].device)] = value.to(values[name])
        advance(len(members))
    return values
