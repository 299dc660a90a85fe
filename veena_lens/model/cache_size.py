"""Estimate what a cache of activations will hold, before the pass that fills it, and say what would fit instead."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod
from typing import TYPE_CHECKING

import torch
from transformer_lens.utilities import Slice

from veena_lens.config import TransformerConfig
from veena_lens.hook_table import hooks_of
from veena_lens.inputs import MultimodalInputs
from veena_lens.memory import free_memory, in_words

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM

# Parts of names that tell most for their size, ever fewer of them.
FEWER = (
    ("hook_resid_post", "hook_attn_out", "hook_mlp_out", "hook_z", "hook_post"),
    ("hook_resid_post", "hook_attn_out", "hook_mlp_out"),
    ("hook_resid_post",),
)


def require_room(
    model: HookedVLM,
    inputs: MultimodalInputs,
    names: Iterable[str],
    position: Slice,
    device: torch.device | str | None,
    max_bytes: int | str | None,
) -> None:
    """Refuse a cache that would hold more bytes than it may.

    names: the hook points kept. position: which of their positions. device: where they are kept, None: the model's.
    max_bytes: the most that it may hold; "auto": what is free on the device; None: anything.

    Raises: MemoryError with the size and filters that would fit; ValueError for another `max_bytes`."""
    if max_bytes is None:
        return
    if max_bytes != "auto" and (isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 0):
        raise ValueError(
            f'max_bytes={max_bytes!r} must be a number of bytes, "auto" (what is free) or None (no bound).'
        )
    home = torch.device(device if device is not None else model.embed.weight.device)
    most = free_memory(home) if max_bytes == "auto" else int(max_bytes)
    sizes = bytes_by_name(model, inputs, names, position)
    total = sum(sizes.values())
    if most is None or total <= most:
        return
    limit = f"{in_words(most)} are free on {home}" if max_bytes == "auto" else f"max_bytes allows {in_words(most)}"
    ways = [f"{way} keeps {in_words(size)}" for way, size in _smaller(model, inputs, sizes, position) if size <= most]
    if home.type != "cpu" and total <= (free_memory("cpu") or 0):
        ways.append('device="cpu" keeps all of it in main memory')
    raise MemoryError(
        f"run_with_cache would keep about {in_words(total)} from {len(sizes)} hook points of {len(inputs)} x "
        f"{inputs.shape[1]} positions, and {limit}. {'; '.join(ways) or 'Give fewer rows at once'}. max_bytes=None "
        "lifts the bound."
    )


def bytes_by_name(model: HookedVLM, inputs: MultimodalInputs, names: Iterable[str], position: Slice) -> dict[str, int]:
    """Return, for each of the hook points that the hook table knows, the bytes of its value, nearly."""
    table, itemsize = hooks_of(model.cfg), model.embed.weight.element_size()
    kept = len(inputs) * position.apply(torch.empty(inputs.shape[1]), dim=0).numel()

    def size_of(name: str) -> int:
        hook = table[name]
        if hook.of_text:
            places, cfg = kept, model.cfg
        elif hook.of_features:
            places, cfg = int(inputs.image_mask.sum()), model.cfg
        elif name.startswith("connector"):
            places, cfg = _places_of_crops(model, inputs, True), model.cfg
        else:
            places, cfg = _places_of_crops(model, inputs, False), model.cfg.vision
        axes = [axis for axis in hook.axis_names[1:] if axis not in ("pos", "query_pos")]
        return places * prod(_width(model, cfg, axis, inputs) for axis in axes) * itemsize

    sizes: dict[tuple[str, str], int] = {}  # the values of one part are alike in every layer
    found = {}
    for name in names:
        if name in table:
            kind = (name.partition(".")[0], table[name].axes)
            if kind not in sizes:
                sizes[kind] = size_of(name)
            found[name] = sizes[kind]
    return found


def _places_of_crops(model: HookedVLM, inputs: MultimodalInputs, merged: bool) -> int:
    """Return how many positions the crops have in the tower, or `merged` at the projector."""
    vision, pixels = model.cfg.vision, inputs.pixel_values
    if vision is None or pixels is None:
        return 0
    lengths = inputs.crop_lengths()
    if lengths is None:
        return len(pixels) * (vision.n_features if merged else vision.n_positions)
    return len(lengths) * max(lengths) // (vision.merge_size**2 if merged else 1)


def _width(model: HookedVLM, cfg: TransformerConfig | None, axis: str, inputs: MultimodalInputs) -> int:
    """Return the size of an axis that does not count rows, crops or queries."""
    if axis == "key_pos":
        if cfg is model.cfg:
            return inputs.shape[1]
        return max(inputs.crop_lengths() or [model.cfg.vision.n_positions if model.cfg.vision else 0])
    if axis in ("d_in", "d_hidden"):
        return getattr(model.cfg.connector, axis, 0)
    return int(axis) if axis.isdigit() else int(getattr(cfg, axis, 0))


def _smaller(
    model: HookedVLM, inputs: MultimodalInputs, sizes: dict[str, int], position: Slice
) -> Iterator[tuple[str, int]]:
    """Yield ways to keep less, in the order in which they give things up, each with its size."""
    every = bytes_by_name(model, inputs, model.hook_dict, position)
    for parts in FEWER:
        yield (
            f"names_filter=lambda name: name.endswith({parts!r})",
            sum(size for name, size in every.items() if name.endswith(parts)),
        )
    if position.mode == "identity":
        yield "pos_slice=-1", sum(bytes_by_name(model, inputs, sizes, Slice(-1)).values())
