"""Neurons as key-value memories: neuron n adds a_n times row n of W_out, whose projection on u says where it points.

`neuron_trace` measures that projection, `promoted_tokens` reads what a row says in words, `max_activating_tokens` finds
the tokens that excite a neuron most, `classify_neurons` puts the three together by a stated rule.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from veena_lens.circuits.image_cells import image_places
from veena_lens.circuits.reading import (
    Reading,
    as_scores,
    chosen_layers,
    exact,
    model_of,
    prepared,
    read,
    read_both,
    reduced,
    require_reduce,
    unit_directions,
)
from veena_lens.circuits.statistics import sign_consistency
from veena_lens.inputs import MultimodalInputs
from veena_lens.interventions.base import require_layer, require_units
from veena_lens.long_runs import has_screen
from veena_lens.residual_parts import denominators, neuron_rows
from veena_lens.scores import Scores

if TYPE_CHECKING:
    import pandas as pd

    from veena_lens.model.model import HookedVLM

KINDS = ("direct", "contrast", "raw")
EXPLICIT, TRIGGER, UNLABELLED = "explicit state", "contextual trigger", "unlabelled"
UNIT = "projection"


def neuron_trace(
    cache: Any,
    direction: Float[Tensor, ...],
    positions: Any = "last",
    kind: str = "direct",
    at_layer: int | None = None,
    *,
    baseline: Any = None,
    reduce: str = "mean",
    layers: Any = None,
    classes: Sequence[str] | None = None,
    model: HookedVLM | None = None,
) -> Scores:
    """Return the projection of what each neuron adds on a unit direction u: its activation times <W_out row, u>.

    Where a norm follows the MLP (Gemma), a is over that norm's denominator and W_out times its factor.

    cache, positions, baseline, reduce, layers: as in `head_intention`. kind: "direct", (a(X+) - a(X-)) <W_out[n], u>,
    X- the `baseline`; summed over n it is <Delta mlp_out, u> (the bias cancels). "raw": a <W_out[n], u> of one run.
    "contrast": `direction` is [class layer d_model], u the unit vector of each class less the mean over classes, the
    activation a difference where there is a `baseline`; the axis "category" (labels `classes`, default "0", "1", ...)
    follows the rows. direction, at_layer: else as in `head_intention`.
    Returns Scores with axes (batch or pair, [category,] layer, neuron), "pos" last with reduce="none"; unit: that of
    the residual stream.
    Raises: MissingActivation, naming the layers whose `mlp.hook_post` the cache lacks; ValueError for kind="direct"
    without a baseline, "raw" with one, or as `head_intention`.
    Source: Geva et al. 2021, arXiv 2012.14913 (key-value memories); Zhang et al. 2026, arXiv 2605.21980.
    """
    who = "neuron_trace"
    require_reduce(reduce, who)
    _require_kind(kind, baseline)
    model = model_of(cache, model, who)
    chosen = chosen_layers(layers, model.cfg, who)
    source = None if at_layer is None else require_layer(at_layer, model.cfg.n_layers, who)
    cache, n_rows = prepared(cache, model, who)
    if kind == "contrast":  # units are [layer row category d_model]
        stack, names = _contrasts(direction, model.cfg, classes)
        units = torch.stack([unit_directions(one, model.cfg, chosen, source, who) for one in stack], 2)
    else:
        names, units = None, unit_directions(direction, model.cfg, chosen, source, who, n_rows)[:, :, None]
    hooks = [f"blocks.{layer}.mlp.hook_post" for layer in chosen]
    reading, value = read_both(cache, baseline, hooks, positions, model, who, by=denominators(model.cfg, hooks))
    found = []
    for layer, hook, unit in zip(chosen, hooks, units, strict=True):
        W_out = neuron_rows(model.blocks[layer]).detach()
        a = value(hook).to(W_out.device)
        along = unit.to(a) @ W_out.to(a.dtype).T  # [row category neuron]
        if reduce == "mean":  # the projection is linear in the activation, so positions go first
            projected = reduced(a.transpose(1, 2), reading.mask, reduce)[:, None] * along
        else:
            along = along.expand(len(a), -1, -1)
            each = einsum(a, along, "batch n neuron, batch category neuron -> batch category neuron n")
            projected = reduced(each, reading.mask, reduce)
        found.append(projected.to(units.device))
    values = torch.stack(found, 2)
    labels: dict[str, Sequence] = {"layer": chosen}
    if names is not None:
        labels["category"] = names
    return as_scores(
        values if names is not None else values[:, 0],
        ("category", "layer", "neuron") if names is not None else ("layer", "neuron"),
        reading,
        reduce,
        baseline is not None,
        labels,
        name=f"neuron projection ({kind})",
        unit=UNIT,
        meta={"kind": kind, "at_layer": source},
    )


def _require_kind(kind: str, baseline: Any) -> None:
    if kind not in KINDS:
        raise ValueError(f"neuron_trace: kind={kind!r} must be one of {', '.join(KINDS)}.")
    if kind == "direct" and baseline is None:
        raise ValueError("neuron_trace: kind='direct' is a difference of two runs; give baseline=, or kind='raw'.")
    if kind == "raw" and baseline is not None:
        raise ValueError("neuron_trace: kind='raw' is of one run; leave baseline out, or take kind='direct'.")


def _contrasts(
    directions: Tensor, cfg: Any, classes: Sequence[str] | None
) -> tuple[Float[Tensor, "class layer d_model"], list[str]]:
    """Return each class's direction less the mean over classes, and the classes' names."""
    wanted = (cfg.n_layers, cfg.d_model)
    if directions.ndim != 3 or directions.shape[1:] != wanted or len(directions) < 2:
        raise ValueError(
            f"neuron_trace: kind='contrast' takes directions [class layer d_model] = [2 or more, {wanted[0]}, "
            f"{wanted[1]}], not {list(directions.shape)}."
        )
    names = [str(i) for i in range(len(directions))] if classes is None else list(classes)
    if len(names) != len(directions):
        raise ValueError(f"neuron_trace: {len(names)} classes for {len(directions)} directions.")
    wide = directions.to(exact(directions.dtype))
    return wide - wide.mean(0), names


def top_neurons(trace: Scores, k: int = 30, consistency: float | int = 0.8, by: str = "value") -> pd.DataFrame:
    """Return the `k` neurons with the largest mean projection over rows whose sign most rows share, in that order.

    trace: Scores of `neuron_trace` over (pair or batch, layer, neuron). consistency: least share of rows with the
    majority's sign. by: "value", or "abs" for the mean's size. Columns: layer, neuron, value (the mean over rows),
    consistency. Fewer than `k` rows come where fewer neurons are consistent.
    Raises: ValueError for Scores without rows, layers and neurons alone (select a class, average positions first).
    """
    rows = next((axis for axis in ("pair", "batch") if axis in trace.axes), "pair")
    if sorted(trace.axes) != sorted((rows, "layer", "neuron")):
        raise ValueError(
            f"top_neurons: the axes are {trace.axes}; give (pair or batch, layer, neuron): .select() a class, "
            "take reduce='mean'."
        )
    mean, share = trace.mean(rows), sign_consistency(trace, rows)
    kept = Scores(mean.values, mean.axes, mean.labels, mask=mean.exists & (share.values >= consistency))
    table = kept.top(k, by=cast(Any, by))
    consistent = [
        share.select(layer=layer, neuron=n).values.item() for layer, n in zip(table["layer"], table["neuron"])
    ]
    return table.assign(consistency=consistent)


def promoted_tokens(model: HookedVLM, layer: int, neuron: int | Sequence[int], k: int = 20) -> Scores:
    """Return the tokens that a neuron's row of W_out raises most (sign "+") and lowers most ("-").

    The logits are d = (W_out[n] w) W_U; w is the weight of the last norm (a layer norm's row is centred first), whose
    denominator is left out, so that logits are comparable within a neuron.

    layer, neuron: one neuron, or several of one layer. k: tokens per sign.
    Returns Scores with axes (neuron, sign, rank), without "neuron" for a single one; unit: logit per unit of
    activation, before the norm divides. meta["tokens"] holds the ids in the same order, meta["texts"] what they say
    (where the model has a tokenizer).
    Raises: ValueError for a layer or neuron that does not exist.
    Source: Geva et al. 2022, arXiv 2203.14680.
    """
    layer = require_layer(layer, model.cfg.n_layers, "promoted_tokens")
    many = [neuron] if isinstance(neuron, int) else list(neuron)
    require_units(many, model.cfg.d_mlp, "promoted_tokens", "neuron")
    many = [n % model.cfg.d_mlp for n in many]
    logits = row_logits(model, layer, many)
    k = min(k, logits.shape[-1])
    signed = torch.stack([logits, -logits], 1).topk(k, dim=-1)
    values = signed.values * torch.tensor([1.0, -1.0]).to(signed.values)[:, None]
    ids = signed.indices.tolist()
    meta: dict[str, Any] = {"layer": layer, "tokens": ids}
    if model.tokenizer is not None:
        meta["texts"] = [[model.tokenizer.batch_decode([[t] for t in row]) for row in both] for both in ids]
    axes, labels = ("neuron", "sign", "rank"), {"neuron": many, "sign": ["+", "-"]}
    if isinstance(neuron, int):
        values, axes, labels = values[0], axes[1:], {"sign": ["+", "-"]}
        meta |= {key: meta[key][0] for key in ("tokens", "texts") if key in meta} | {"neuron": many[0]}
    return Scores(values, axes, labels, "promoted tokens", "logit", meta=meta)


def row_logits(model: HookedVLM, layer: int, neurons: Sequence[int]) -> Float[Tensor, "neuron d_vocab"]:
    """Return what rows of W_out say through the last norm's weight and the unembedding."""
    rows = neuron_rows(model.blocks[layer]).detach()[list(neurons)]
    rows = rows.to(model.ln_final.weight.device, exact(rows.dtype))
    if model.cfg.normalization_type == "LN":
        rows = rows - rows.mean(-1, keepdim=True)
    scaled = rows * model.ln_final.w.detach().to(rows)
    return scaled.to(model.W_U.device) @ model.W_U.detach().to(rows.dtype)


def max_activating_tokens(
    model: HookedVLM,
    inputs: Any,
    layer: int,
    neurons: Sequence[int],
    k: int = 10,
    positions: Any = "all",
    by: str = "value",
    progress: bool = False,
) -> Scores:
    """Return the `k` tokens that excite each neuron most, over all rows of `inputs`.

    inputs: one batch, or an iterable of batches. layer, neurons: neurons of one layer. k: tokens per neuron. positions:
    which tokens count; only these are kept. by: "value", or "abs" to rank by the activation's size. progress: show a
    bar over batches.
    Returns Scores with axes (neuron, rank), the activation a_n at each. `meta["where"][i][rank]` says the token:
    row (counted over all batches), pos (in its padded row), token id, text (where known), and for a token of an image
    its image, the cell (row, column) of that image's grid, and the box in pixels where known.
    Raises: ValueError for a layer or neuron that does not exist, an empty selection, or no batch.
    Source: Erhan et al. 2009, "Visualizing higher-layer features"; our own for images in prompts.
    """
    who = "max_activating_tokens"
    layer = require_layer(layer, model.cfg.n_layers, who)
    require_units(neurons, model.cfg.d_mlp, who, "neuron")
    chosen = [n % model.cfg.d_mlp for n in neurons]
    if by not in ("value", "abs"):
        raise ValueError(f"{who}: by={by!r} must be 'value' or 'abs'.")
    best = torch.zeros(len(chosen), 0)
    where: list[list[dict[str, Any]]] = [[] for _ in chosen]
    seen = 0
    for batch in _batches(inputs, progress):
        reading = read(model.as_inputs(batch), [f"blocks.{layer}.mlp.hook_post"], positions, model, who)
        a = reading[f"blocks.{layer}.mlp.hook_post"][..., chosen]
        a = a.to(exact(a.dtype)).cpu().flatten(0, 1).T  # [neuron, batch times n]
        best = torch.cat([best.to(a.dtype), a], 1)
        rank = best.abs() if by == "abs" else best
        there = torch.cat([torch.ones(len(where[0]), dtype=torch.bool), reading.mask.cpu().flatten()])
        order = torch.argsort(torch.where(there, rank, -torch.inf), dim=-1, descending=True, stable=True)
        order = order[:, : min(k, int(there.sum()))]
        best = best.gather(1, order)
        before = len(where[0])
        where = [
            [old[i] if i < before else _place(reading, i - before, seen) for i in mine]
            for old, mine in zip(where, order.tolist(), strict=True)
        ]
        seen += len(reading.inputs)
    if seen == 0:
        raise ValueError(f"{who}: there is no batch; give prepared inputs, or a list of them.")
    meta = {"layer": layer, "rows": seen, "by": by, "where": where}
    return Scores(best, ("neuron", "rank"), {"neuron": chosen}, "activation", "activation", meta=meta)


def _batches(inputs: Any, progress: bool) -> Iterable[Any]:
    if isinstance(inputs, (MultimodalInputs, Tensor, str)) or (
        isinstance(inputs, (list, tuple)) and inputs and isinstance(inputs[0], str)
    ):
        return [inputs]
    if not progress or not has_screen():
        return inputs
    from tqdm.auto import tqdm

    return tqdm(inputs, desc="batches", leave=False)


def _place(reading: Reading, flat: int, rows_before: int) -> dict[str, Any]:
    """Return what stands at entry `flat` of the reading's [batch n] positions."""
    inputs = reading.inputs
    row, at = divmod(flat, reading.index.shape[1])
    pos = int(reading.index[row, at])
    token = int(inputs.tokens[row, pos])
    out: dict[str, Any] = {"row": rows_before + row, "pos": pos, "token": token}
    for number in range(len(inputs.spans[row].images)):
        places = image_places(inputs, row, number).tolist()
        if pos not in places:
            continue
        cells = list(inputs.grid_places[row][number]) if inputs.grid_places else list(range(len(places)))
        width = inputs.grids[row][number][1]
        offset = places.index(pos)
        out |= {"image": number, "cell": list(divmod(cells.index(offset), width)) if offset in cells else None}
        boxes = None if inputs.patch_boxes is None else inputs.patch_boxes[row][number]
        if boxes is not None and not bool(boxes[offset].isnan().any()):
            out["box"] = boxes[offset].tolist()
        return out
    tokenizer = getattr(reading.model, "tokenizer", None)
    return out if tokenizer is None else {**out, "text": tokenizer.decode([token])}


def classify_neurons(
    model: HookedVLM,
    neurons: pd.DataFrame,
    lexicon: Collection[str] | Collection[int],
    direction: Float[Tensor, ...],
    key_layer: int,
    positions: str = "last",
    confirmed: Collection[tuple[int, int]] | None = None,
    n_tokens: int = 20,
    at_least: int = 3,
) -> pd.DataFrame:
    """Return each neuron's kind by a fixed rule, with what the rule saw: `neurons` and three more columns.

    "explicit state": of the `n_tokens` tokens that its activation promotes most at least `at_least` are of the
    lexicon, and it lies after `key_layer` or its projection was read at the last or generated tokens (`positions`).
    "contextual trigger": at most at `key_layer`, read at image or query tokens, fewer such tokens, and its effect on
    a key head confirmed by path patching: (layer, neuron) in `confirmed`. Anything else stays "unlabelled"; column
    "why" says what was missing. Column "lexicon_tokens" counts. The names are the paper's, the rule is ours: a label
    says what the weights write and where the projection was seen, not what the neuron stands for.

    neurons: a table with layer, neuron and value, as from `top_neurons`. lexicon: words (compared with the tokens'
    text, stripped, in lower case) or token ids. direction: as for `neuron_trace`; value = a <W_out[n], u> gives with it
    the sign of a, and a negative activation promotes what the row lowers. positions: words joined by "+".
    Raises: ValueError for a table without its columns, an empty lexicon, words without a tokenizer, or a direction of
    another shape.
    Source: Zhang et al. 2026, arXiv 2605.21980, for the two names.
    """
    wanted = _lexicon(model, lexicon)
    _require_table(neurons)
    key_layer = require_layer(key_layer, model.cfg.n_layers, "classify_neurons")
    words = set(positions.split("+"))
    kinds, counts, reasons = [], [], []
    for layer, neuron, value in zip(neurons["layer"], neurons["neuron"], neurons["value"], strict=True):
        unit = unit_directions(direction, model.cfg, [int(layer)], None, "classify_neurons")[0, 0]
        row = neuron_rows(model.blocks[int(layer)]).detach()[int(neuron)]
        is_active = float(value) * float(row.to(unit) @ unit) >= 0
        logits = row_logits(model, int(layer), [int(neuron)])[0] * (1 if is_active else -1)
        found = _count(model, logits.topk(min(n_tokens, len(logits))).indices, wanted)
        kind, why = _kind(int(layer), int(neuron), found >= at_least, key_layer, words, confirmed)
        kinds.append(kind)
        counts.append(found)
        reasons.append(why)
    return neurons.assign(kind=kinds, lexicon_tokens=counts, why=reasons)


def _kind(
    layer: int,
    neuron: int,
    is_emotional: bool,
    key_layer: int,
    words: set[str],
    confirmed: Collection[tuple[int, int]] | None,
) -> tuple[str, str]:
    late = layer > key_layer or bool(words & {"last", "generated", "answer"})
    if is_emotional:
        return (EXPLICIT, "") if late else (UNLABELLED, "speaks of the lexicon, but early and at other tokens")
    if layer > key_layer:
        return UNLABELLED, "does not speak of the lexicon, and lies after the key layer"
    if not words & {"image", "query"}:
        return UNLABELLED, "does not speak of the lexicon, and was not read at image or query tokens"
    if confirmed is None:
        return UNLABELLED, "path effect on a key head not tested"
    return (TRIGGER, "") if (layer, neuron) in confirmed else (UNLABELLED, "path effect on a key head not confirmed")


def _lexicon(model: HookedVLM, lexicon: Collection[Any]) -> set[Any]:
    if not lexicon:
        raise ValueError("classify_neurons: the lexicon is empty.")
    has_words = any(isinstance(word, str) for word in lexicon)
    if has_words and model.tokenizer is None:
        raise ValueError("classify_neurons: a lexicon of words needs a model with a tokenizer; give token ids.")
    return {word.strip().lower() if isinstance(word, str) else int(word) for word in lexicon}


def _require_table(neurons: Any) -> None:
    lacking = [column for column in ("layer", "neuron", "value") if column not in neurons]
    if lacking:
        raise ValueError(f"classify_neurons: the table lacks the column {lacking[0]!r}; give that of top_neurons.")


def _count(model: HookedVLM, tokens: Int[Tensor, " k"], wanted: set[Any]) -> int:
    ids = tokens.tolist()
    if any(isinstance(word, str) for word in wanted):
        ids = [text.strip().lower() for text in model.tokenizer.batch_decode([[t] for t in ids])]
    return sum(one in wanted for one in ids)
