"""Generation sweeps: one prompt continued under many interventions, decoded as one batch.

Images are encoded once and the prompt runs once. With a causal decoder an intervention at positions >= p leaves
every earlier position as it was, so the rows share the keys and values before the first position that any of them
edits; each recomputes its own tail and goes on from there, token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veena_lens.components.kv_cache import KVCache, SharedPrefix
from veena_lens.hook_table import row_of
from veena_lens.images.layout import image_runs, reached_from
from veena_lens.inputs import MultimodalInputs
from veena_lens.interventions.base import Intervention, require_intervention
from veena_lens.long_runs import Result, Store, counting
from veena_lens.model.edits import require_reach, running
from veena_lens.model.forward import LAST, ResidualState, embed, forward
from veena_lens.model.generation import as_prompt, decode_steps
from veena_lens.model.span import PassSpan
from veena_lens.scores import Scores
from veena_lens.sweeps.engine import require_engine

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM


def generation_sweep(
    model: HookedVLM,
    inputs: MultimodalInputs,
    entries: Sequence[Any],
    score: Callable[[list[str]], Any] | None = None,
    *,
    max_new_tokens: int = 64,
    engine: str = "suffix",
    max_rows: int = 64,
    progress: bool = True,
    out: str | Path | None = None,
    **settings: Any,
) -> Scores:
    """Continue each prompt under each entry, greedily, and return what the model says.

    inputs: prompts [row]. entries: each a list of interventions, one alone, a Circuit, or [] (nothing is edited).
    score: a function of the texts of one prompt, one per entry, that returns as many numbers; default none.
    max_new_tokens: tokens per continuation. engine: "suffix" shares everything before the first edited position;
    "naive" generates under `model.intervene(per_row=...)`, whole prompts every time, with the same result. max_rows:
    continuations that decode together. progress: show a bar. out: a folder where continuations are kept as they come;
    the same sweep resumes there. settings: as for `model.generate`; sampling is not supported, since a row would not
    repeat itself alone.
    Returns Scores with axes (row, entry): `values` are the scores, NaN without `score`; `.texts` and `.tokens` are
    nested `[row][entry]`, and tables and files have them as columns.
    Raises: ValueError for no entries, an intervention that does not fit, sampling, or a score of another length;
    TypeError for an entry that is not an intervention; with `out`, as `Store`.
    """
    require_engine(model, engine)
    if settings.get("do_sample"):
        raise ValueError("generation_sweep compares entries, so it decodes greedily; do_sample is not supported.")
    lists = [_as_list(entry) for entry in entries]
    if not lists or not len(inputs):
        raise ValueError("generation_sweep: give at least one entry and one prompt.")
    if max_rows < 1:
        raise ValueError(f"max_rows={max_rows} must be at least 1.")
    for mine in lists:
        for intervention in mine:
            intervention.site(model.cfg)
    settings = {"use_past_kv_cache": True, "max_new_tokens": max_new_tokens, **settings}
    store = Store(out, ("generation_sweep", model, inputs, lists, engine, max_rows, settings))
    with counting(len(inputs) * len(lists), "continuations", progress) as advance:
        tokens: list[list[list[int]]] = []
        for i in range(len(inputs)):
            row = as_prompt(model, inputs[i].without_padding())
            found: list[list[int]] = [[] for _ in lists]
            starts = [first_edited(model, row, mine) for mine in lists]
            again = [any(_on_pictures(model, item) for item in mine) for mine in lists]  # these encode their own images
            for members in _batches(again, starts, max_rows):
                mine, start = [lists[j] for j in members], starts[members[0]]
                continued = partial(_continued, model, row, mine, start, engine, settings)
                grown = store.do([i, members], continued)["tokens"]
                for j, ids in zip(members, grown.tolist(), strict=True):
                    found[j] = ids
                advance(len(members))
            tokens.append(found)
    texts = [model.tokenizer.batch_decode(rows, skip_special_tokens=True) if model.tokenizer else [] for rows in tokens]
    values = torch.full((len(inputs), len(lists)), torch.nan, dtype=torch.float64)
    if score is not None:
        values = torch.stack([_scored(score, row, len(lists)) for row in texts])
    columns = {"text": [text for row in texts for text in row]} if model.tokenizer else {}
    return Scores(
        values,
        ("row", "entry"),
        {"entry": [", ".join(map(repr, mine)) or "nothing" for mine in lists]},
        name="score",
        columns={**columns, "tokens": [ids for row in tokens for ids in row]},
    )


def _continued(
    model: HookedVLM, row: MultimodalInputs, lists: list[list[Any]], start: int, engine: str, settings: dict[str, Any]
) -> Result:
    """Return the tokens [entry new] that continue one prompt under each list."""
    if engine == "suffix":
        return {"tokens": _continue(model, row, lists, start, settings)}
    with model.intervene(per_row=lists):
        return {"tokens": model.generate(row[[0] * len(lists)], return_type="tokens", **settings)}


def _on_pictures(model: HookedVLM, item: Any) -> bool:
    return not row_of(item.site(model.cfg)).of_text


def _batches(again: Sequence[bool], starts: Sequence[int], max_rows: int) -> Iterator[list[int]]:
    """Return entries that decode together: those that edit images apart from the others, earlier starts first."""
    for kind in (False, True):
        order = sorted((j for j in range(len(starts)) if again[j] == kind), key=lambda j: starts[j])
        for at in range(0, len(order), max_rows):
            yield order[at : at + max_rows]


def _as_list(entry: Any) -> list[Any]:
    mine = [entry] if isinstance(entry, Intervention) else list(entry)
    return [require_intervention(item, "generation_sweep") for item in mine]


def _scored(score: Callable[[list[str]], Any], texts: list[str], n: int) -> Tensor:
    values = torch.as_tensor(score(texts), dtype=torch.float64)
    if values.shape != (n,):
        raise ValueError(f"The score must give one number per text, [{n}], not {list(values.shape)}.")
    return values


def first_edited(model: HookedVLM, row: MultimodalInputs, interventions: Sequence[Any]) -> int:
    """Return the first position of a prompt that a list of interventions can change.

    At most the last one, which is run anew for its logits."""
    first, run = row.shape[1] - 1, PassSpan.whole(row)
    for item in interventions:
        if item.is_whole:
            return 0  # its values are those of whole rows, position by position
        if _on_pictures(model, item):
            places = row.image_mask[0].nonzero().flatten()
        else:
            places = run.mask(item.positions)[0].nonzero().flatten()
        if len(places):
            first = min(first, int(places[0]))
    return int(reached_from(model.cfg, row)[first])


@torch.no_grad()
def _continue(
    model: HookedVLM, row: MultimodalInputs, lists: Sequence[list[Any]], start: int, settings: dict[str, Any]
) -> Tensor:
    """Return the tokens [entry new] that continue a prompt under each list; what lies before `start` is shared."""
    n, length, n_layers = len(lists), row.shape[1], model.cfg.n_layers
    base, whole = KVCache(n_layers), PassSpan.whole(row)
    with running(model, whole):
        plain = embed(model, whole)
    forward(model, whole, entering=plain, stop=n_layers, cache=base)
    keys, values = zip(*(base.layer(layer) for layer in range(n_layers)), strict=True)
    prefix = SharedPrefix(
        [k[0, :start] for k in keys],
        [v[0, :start] for v in values],
        start,
        model.cfg.window,
        image_runs(model.cfg, row),
    )
    rows = row[[0] * n]
    tail = KVCache(n_layers)
    on_pictures = any(_on_pictures(model, item) for mine in lists for item in mine)

    def entering() -> ResidualState:
        """Return what enters block 0 from `start` on, of each row under its own edits."""
        span = PassSpan.whole(rows) if on_pictures else PassSpan(rows, start, length)
        with running(model, span):
            if on_pictures:
                state = embed(model, span)
                resid, added = state.resid[:, start:], state.deepstack
            else:
                resid, added = model.hook_embed(plain.resid[:, start:].expand(n, -1, -1).clone()), plain.deepstack
        return ResidualState(resid, {layer: x[:, start:] for layer, x in added.items()})

    def next_logits(new: Tensor) -> Tensor:
        if new.shape[1]:
            last = length + new.shape[1] - 1
            span, state = PassSpan(rows, last, last + 1, new[:, -1:]), None
        else:
            span, state = PassSpan(rows, start, length), entering()
        return forward(model, span, entering=state, cache=tail, prefix=prefix, positions=LAST)[:, -1]

    with model.intervene(per_row=lists):
        require_reach(model, PassSpan.whole(rows))
        return list(decode_steps(model, rows, settings, next_logits))[-1]
