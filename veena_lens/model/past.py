"""Forward passes that go on from keys and values of an earlier one: HookedTransformer's `past_kv_cache`.

The cache is a `TransformerLensKeyValueCache` of `transformer_lens.cache.key_value_cache`, made by its
`init_cache(model.cfg, model.cfg.device, n_rows)`, or any object of its form. A pass reads what it holds and, unless it
is frozen, leaves its own keys and values behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from veena_lens.components.kv_cache import KVCache
from veena_lens.inputs import MultimodalInputs

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM


@contextmanager
def taken(model: HookedVLM, past: Any) -> Iterator[KVCache | None]:
    """Yield what a given cache holds, in the form that a pass reads; afterwards the cache holds that pass too.

    past: a cache of transformer_lens's form, or None. A frozen one is left as it was, as is any after an error.
    Raises: TypeError for another object; ValueError for a cache of another model."""
    if past is None:
        yield None
        return
    if not hasattr(past, "entries") or not hasattr(past, "previous_attention_mask"):
        raise TypeError(
            "past_kv_cache must be a TransformerLensKeyValueCache of transformer_lens.cache.key_value_cache, not "
            f"{type(past).__name__}."
        )
    if len(past.entries) != model.cfg.n_layers:
        raise ValueError(
            f"past_kv_cache is of {len(past.entries)} layers and the model has {model.cfg.n_layers}: make it with "
            "init_cache(model.cfg, model.cfg.device, n_rows)."
        )
    held = [(entry.past_keys, entry.past_values) for entry in past.entries]
    mask = past.previous_attention_mask != 0
    cache = KVCache.of(held, mask if mask.shape[1] else None)
    yield cache
    if getattr(past, "frozen", False):
        return
    for layer, entry in enumerate(past.entries):
        if cache.holds(layer) and not getattr(entry, "frozen", False):
            entry.past_keys, entry.past_values = cache.layer(layer)
    if cache.mask is not None:
        past.previous_attention_mask = cache.mask.to(past.previous_attention_mask.dtype)


def after(
    model: HookedVLM, cache: KVCache | None, inputs: MultimodalInputs, position_ids: Tensor | None
) -> MultimodalInputs:
    """Return inputs whose positions count on from the real tokens that a cache holds; unchanged without one.

    position_ids: those that the user gave, which stay.
    Raises: ValueError for another number of rows, a context too long, or inputs whose images cannot follow."""
    if cache is None or cache.mask is None:
        return inputs
    if model.interventions or model._edits.recorder is not None:
        raise ValueError(
            "past_kv_cache: interventions and recorders of attention name positions of a whole prompt. Run the whole "
            "prompt at once, or edit with hooks, which see the new positions."
        )
    if len(cache.mask) != len(inputs):
        raise ValueError(
            f"past_kv_cache holds {len(cache.mask)} rows and the input has {len(inputs)}: repeat the input, or make a "
            "cache of as many rows."
        )
    n_past = cache.mask.sum(-1).to(inputs.device)
    longest = int((n_past + inputs.lengths).max())
    if longest > model.cfg.n_ctx:
        raise ValueError(
            f"past_kv_cache and input have {longest} tokens together; the model's context is {model.cfg.n_ctx}."
        )
    if position_ids is not None:
        return inputs
    if inputs.position_ids.ndim != 2 or (inputs.pixel_values is not None and model.cfg.bidirectional_images):
        raise ValueError(
            "past_kv_cache: where images are read in both directions, or have positions in several streams, the place "
            "of what follows does not follow from the number of tokens. Run the whole prompt at once, or pass "
            "position_ids with bare tokens."
        )
    return replace(inputs, position_ids=inputs.position_ids + n_past[:, None])
