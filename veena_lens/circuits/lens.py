"""The logit lens at every position, image patches included: what the stream would say if the model stopped there.

Residuals go through the last norm and the unembedding, a bounded number of positions at a time, so that no
[pos d_vocab] table of a whole prompt is held.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from veena_lens.activation_cache import ActivationCache
from veena_lens.circuits.image_cells import image_cells
from veena_lens.circuits.reading import ROOM, Reading, chosen_layers, exact, read
from veena_lens.scores import Scores

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM

UNITS = {"log_prob": "log probability", "prob": "probability", "logit": "logit"}


def logit_lens(
    model: HookedVLM,
    source: Any,
    positions: Any = "all",
    tokens: Sequence[int | str] | None = None,
    layers: Any = None,
    *,
    k: int = 5,
    values: str = "log_prob",
) -> Scores:
    """Return what each layer's residual says at each position: softmax(W_U ln_final(resid_post[layer])).

    The last layer's line is the model's own prediction (save at image tokens of a model with as many deep-stack
    features as layers, the last of which join after it).

    source: a cache with `hook_resid_post`, or inputs. positions: a selection, default all. tokens: ids, or texts that
    are one token; default the `k` likeliest of each cell. layers: default all. values: "log_prob", "prob" or "logit".
    Returns Scores with axes (batch, layer, pos, token), or (batch, layer, pos, rank) without `tokens`; then
    meta["tokens"] `[batch][layer][pos][rank]` holds ids and meta["texts"] (id as text -> text, where the model has a
    tokenizer) what they say. Positions that a row lacks are masked; meta["positions"] has those it has.
    Raises: MissingActivation, naming the layers whose `hook_resid_post` the cache lacks; ValueError for a text that is
    not one token, an id outside the vocabulary, an unknown layer, or an empty selection.
    Source: nostalgebraist 2020, "interpreting GPT: the logit lens"; at image tokens Neo et al. 2024, arXiv 2410.07149.
    """
    who = "logit_lens"
    if values not in UNITS:
        raise ValueError(f"{who}: values={values!r} must be one of {', '.join(UNITS)}.")
    ids = None if tokens is None else token_ids(model, tokens, who)
    if k < 1:
        raise ValueError(f"{who}: k={k} must be at least 1.")
    chosen = chosen_layers(layers, model.cfg, who)
    names = [f"blocks.{layer}.hook_resid_post" for layer in chosen]
    reading = read(source, names, positions, model, who)
    axis = "rank" if ids is None else "token"
    n = min(k, model.cfg.d_vocab) if ids is None else len(ids)
    shape = (*reading.index.shape, n)
    found, best = [], []
    for name in names:
        numbers, which = _said(model, reading[name][reading.mask.to(reading[name].device)], ids, n, values)
        found.append(_spread(numbers, reading.mask, shape))
        if which is not None:
            best.append(_spread(which, reading.mask, shape))
    meta: dict[str, Any] = {**reading.meta, "values": values}
    labels: dict[str, Sequence] = {"layer": chosen, "pos": reading.labels}
    if tokens is not None:
        labels["token"] = list(tokens)
        meta["tokens"] = ids
    else:
        meta |= _texts_of(model, torch.stack(best, 1), reading)
    there = reading.mask[:, None, :, None]
    return Scores(
        torch.stack(found, 1),
        ("batch", "layer", "pos", axis),
        labels,
        "logit lens",
        UNITS[values],
        None if bool(there.all()) else there.expand(-1, len(chosen), -1, n).to(found[0].device),
        meta,
    )


def logit_lens_grid(
    model: HookedVLM,
    source: Any,
    tokens: int | str | Sequence[int | str],
    row: int = 0,
    image: int = 0,
    layers: Any = None,
    *,
    values: str = "log_prob",
    grid: str = "grid",
) -> Scores:
    """Return the logit lens of one or several tokens as maps over one image.

    source, layers, values: as in `logit_lens`. tokens: ids or texts; several give a first axis "token". row, image:
    which image. grid: "grid" (through the tiles of tiled images, default) or "whole" (the whole view).
    Returns Scores with axes ([token,] layer, height, width).
    Raises: as `logit_lens`; ValueError where the row has no such image; IndexError where it has no whole grid.
    Source: Neo et al. 2024, arXiv 2410.07149.
    """
    many = [tokens] if isinstance(tokens, (int, str)) else list(tokens)
    inputs = source.inputs if isinstance(source, ActivationCache) else model.as_inputs(source)
    if inputs is None:
        raise ValueError("logit_lens_grid: the cache was sliced or made without its inputs, so its images are unknown.")
    if not 0 <= row < len(inputs) or not 0 <= image < inputs.n_images[row]:
        raise ValueError(f"logit_lens_grid: no image {image} in row {row}; images per row: {inputs.n_images}.")
    cells = image_cells(inputs[row], image, grid, "logit_lens_grid").index[0]
    if not isinstance(source, ActivationCache):
        source, row, inputs = inputs[row], 0, inputs[row]
    at = torch.zeros(inputs.shape, dtype=torch.bool, device=inputs.device)
    at[row, cells.flatten()] = True
    scores = logit_lens(model, source, at, many, layers, values=values)
    order = torch.searchsorted(at[row].nonzero().flatten(), cells)
    maps = scores.values[row].permute(2, 0, 1)[..., order.to(scores.values.device)]
    meta = {"row": row, "image": image, "grid": grid, "values": values, "tokens": scores.meta["tokens"]}
    out = Scores(
        maps,
        ("token", "layer", "height", "width"),
        {"token": many, "layer": scores.labels["layer"]},
        "logit lens",
        scores.unit,
        meta=meta,
    )
    if not isinstance(tokens, (int, str)):
        return out
    return replace(out, values=maps[0], axes=out.axes[1:], labels={"layer": scores.labels["layer"]})


def token_ids(model: HookedVLM, tokens: Sequence[int | str], who: str) -> list[int]:
    """Return ids of tokens given as ids or texts.

    Raises: ValueError for none, a text that is not one token, or an id outside the vocabulary."""
    if len(tokens) == 0:
        raise ValueError(f"{who}: the list of tokens is empty; leave it out for the likeliest.")
    ids = [model.to_single_token(token) if isinstance(token, str) else int(token) for token in tokens]
    bad = [i for i in ids if not 0 <= i < model.cfg.d_vocab]
    if bad:
        raise ValueError(f"{who}: token id {bad[0]} is outside the vocabulary of {model.cfg.d_vocab}.")
    return ids


@torch.no_grad()
def _said(
    model: HookedVLM, resid: Float[Tensor, "row d_model"], ids: list[int] | None, n: int, values: str
) -> tuple[Float[Tensor, "row token"], Tensor | None]:
    """Return the values of the tokens, or of the likeliest with their ids."""
    size = max(1, ROOM // model.cfg.d_vocab)
    numbers, which = [], []
    for logits in _logits(model, resid, size):
        if values != "logit":
            logits = logits.log_softmax(-1)
        if ids is None:
            top = logits.topk(n, dim=-1)
            numbers.append(top.values)
            which.append(top.indices)
        else:
            numbers.append(logits[:, ids])
    out = torch.cat(numbers)
    return out.exp() if values == "prob" else out, torch.cat(which) if which else None


def _logits(
    model: HookedVLM, resid: Float[Tensor, "row d_model"], size: int
) -> Iterator[Float[Tensor, "rows d_vocab"]]:
    for part in resid.split(size):
        normed = model.ln_final(part.to(model.ln_final.weight.device))
        matrix = model.unembed.matrix
        logits = F.linear(normed.to(matrix), matrix, model.unembed.bias)
        yield logits.to(exact(logits.dtype))


def _spread(rows: Tensor, mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Put rows of the positions that exist back in their places, 0 elsewhere."""
    out = rows.new_zeros(shape)
    out[mask.to(rows.device)] = rows
    return out


def _texts_of(model: HookedVLM, best: Tensor, reading: Reading) -> dict[str, Any]:
    """Return the likeliest tokens' ids, cut to the positions that exist, and their texts."""
    ids = [[layer[: int(n)].tolist() for layer in row] for row, n in zip(best.cpu(), reading.mask.sum(-1), strict=True)]
    if model.tokenizer is None:
        return {"tokens": ids}
    known = sorted({token for row in ids for layer in row for cell in layer for token in cell})
    return {"tokens": ids, "texts": {str(i): model.tokenizer.decode([i]) for i in known}}
