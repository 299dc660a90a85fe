"""Caches that travel with their images and the words of their tokens, and open as views without a model.

The file is `ActivationCache.save`'s with a few further entries, so `ActivationCache.load` reads it as any other.
"""

from __future__ import annotations

import io
import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from veena_lens.activation_cache import ActivationCache
from veena_lens.app.view.rows import rule_of
from veena_lens.images.files import MAX_PIXELS, open_image
from veena_lens.own_files import opened

ABOUT = "veena_lens.view"
PICTURE = "inputs.picture."
MOST_PICTURES = 1000
# The axes of what a view reads of each layer.
SHAPES = {
    "attn.hook_pattern": ("head", "pos", "pos"),
    "attn.hook_rot_q": ("pos", "head", "d"),
    "attn.hook_rot_k": ("pos", "head", "d"),
    "hook_resid_pre": ("pos", "d"),
    "hook_resid_post": ("pos", "d"),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenedCache:
    """A cache from a file, and what the file says of it: images of the first row, words of its tokens, the model."""

    cache: ActivationCache
    pictures: tuple[Image.Image, ...] | None = None
    texts: tuple[str, ...] | None = None
    model_name: str = ""
    about: dict[str, Any] = field(default_factory=dict)


def save_cache(
    cache: ActivationCache,
    path: str | Path,
    *,
    pictures: Sequence[Image.Image] | None = None,
    tokenizer: Any = None,
    model_name: str = "",
    windows: Sequence[int | None] | None = None,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Save a cache with the images of its first row and the words of its tokens; the file is replaced in one step.

    pictures: the images of the first row (default: none are stored). tokenizer: gives the words; None stores none.
    model_name: shown with the view. windows: sliding window of each layer, None where it has none. about: what else
    the file should say of itself, such as question and answer; JSON must hold it."""
    path = Path(path)
    draft = cache.save(path.with_name(f".{path.name}.{os.getpid()}"))
    try:
        with safe_open(str(draft), framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        told: dict[str, Any] = {"model": model_name, "pictures": 0 if pictures is None else len(pictures)}
        if about is not None:
            told["about"] = dict(about)
        if cache.model is not None:
            told |= rule_of(cache.model.cfg)
        if windows is not None:
            told["windows"] = list(windows)
        if tokenizer is not None and cache.inputs is not None:
            told["texts"] = [tokenizer.decode([token]) for token in cache.inputs.tokens[0].tolist()]
        for i, picture in enumerate(pictures or ()):
            buffer = io.BytesIO()
            picture.convert("RGB").save(buffer, format="PNG")
            tensors[f"{PICTURE}{i}"] = torch.from_numpy(np.frombuffer(buffer.getvalue(), np.uint8).copy())
        save_file(tensors, str(draft), metadata={**metadata, ABOUT: json.dumps(told)})
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def open_cache(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> OpenedCache:
    """Open a cache file, with images and words where `save_cache` wrote it.

    max_pixels: of all its images together.
    Raises: FileNotFoundError; ValueError for a file that was cut short, is not a cache, or whose parts do not fit
    together, saying which."""
    cache = ActivationCache.load(path)
    require_whole(cache, path)
    with opened(path, "an activation cache") as file:
        try:
            about = json.loads((file.metadata() or {}).get(ABOUT, "{}"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} says of its view what is not JSON: {error}.") from error
        n_pictures = _require_about(about, cache, path)
        found = [file.get_tensor(f"{PICTURE}{i}").numpy().tobytes() for i in range(n_pictures)]
    return OpenedCache(
        cache=cache,
        pictures=tuple(_images(found, max_pixels, path)) or None,
        texts=tuple(about["texts"]) if "texts" in about else None,
        model_name=about.get("model", ""),
        about=about,
    )


def require_whole(cache: ActivationCache, path: str | Path) -> None:
    """Check that a file's activations and inputs are of the same positions, and its layers of the same heads.

    Raises: ValueError for a span, a grid or an activation that reaches beyond them, or numbers that are not finite."""
    inputs = cache.inputs
    if inputs is None:
        return
    length = inputs.shape[1]
    for spans in inputs.spans:
        answer = [] if spans.answer is None else [spans.answer]
        for span in [*spans.images, spans.query, *answer, slice(spans.last, spans.last)]:
            if not (
                isinstance(span.start, int) and isinstance(span.stop, int) and 0 <= span.start <= span.stop <= length
            ):
                raise ValueError(f"{path} has a span from {span.start} to {span.stop}, but {length} positions.")
    for height, width in (grid for row in inputs.grids for grid in row):
        if not (height >= 0 and width >= 0 and height * width <= 16 * length):
            raise ValueError(f"{path} has an image of {height} x {width} cells, but {length} positions.")
    heads: dict[str, tuple[int, ...]] = {}
    for name, value in cache.cache_dict.items():
        part = name.partition(".")[2].partition(".")[2]
        if not name.startswith("blocks.") or part not in SHAPES:
            continue
        shape = value.shape[1:] if cache.has_batch_dim else value.shape
        known = dict(zip(SHAPES[part], shape, strict=False))
        places = [n for axis, n in zip(SHAPES[part], shape, strict=False) if axis == "pos"]
        others = heads.setdefault(part, tuple(n for axis, n in known.items() if axis != "pos"))
        mine = tuple(n for axis, n in known.items() if axis != "pos")
        if len(shape) != len(SHAPES[part]) or set(places) != {length} or mine != others:
            raise ValueError(
                f"{path}: {name} has the shape {tuple(value.shape)}, which does not fit {length} positions and the "
                "other layers."
            )
        there = inputs.attention_mask.to(value.device)
        rows = (value if cache.has_batch_dim else value[None]).movedim(1 + SHAPES[part].index("pos"), 1)
        if value.is_floating_point() and not bool(rows[there].isfinite().all()):
            raise ValueError(f"{path}: {name} holds numbers that are not finite.")


def mean_map_bytes(cache: ActivationCache) -> int:
    """Return the bytes of the maps that every view of a cache holds: of each token of text, the mean over heads."""
    if cache.inputs is None:
        return 0
    text = int((cache.inputs.attention_mask[0] & ~cache.inputs.image_mask[0]).sum())
    return text * cache._n_layers() * (cache.inputs.shape[1] + 8)


def _require_about(about: Any, cache: ActivationCache, path: str | Path) -> int:
    """Return the number of images. Raises: ValueError for what `save_cache` does not write."""
    n = cache._n_layers()
    length = None if cache.inputs is None else cache.inputs.shape[1]
    kinds: dict[str, Any] = {
        "pictures": lambda v: type(v) is int and 0 <= v <= MOST_PICTURES,
        "model": lambda v: isinstance(v, str),
        "texts": lambda v: _list_of(v, str) and len(v) == length,
        "windows": lambda v: v is None or (_list_of(v, (int, type(None))) and len(v) == n),
        "scale": lambda v: v is None or (isinstance(v, (int, float)) and math.isfinite(v)),
        "image_blocks": lambda v: isinstance(v, bool),
    }
    if not isinstance(about, dict):
        raise ValueError(f"{path} says of its view {about!r:.40}, which is not an object.")
    for name, fits in kinds.items():
        if name in about and not fits(about[name]):
            raise ValueError(f"{path} says of its view {name}={about[name]!r:.40}, which does not fit its activations.")
    return about.get("pictures", 0)


def _list_of(value: Any, kinds: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, kinds) for item in value)


def _images(found: Sequence[bytes], max_pixels: int, path: str | Path) -> Iterator[Image.Image]:
    """Yield a file's images. Raises: ValueError for one that cannot be read, or too many pixels in all."""
    left = max_pixels
    for i, data in enumerate(found):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit follows
                image = Image.open(io.BytesIO(data), formats=("PNG",))
            left -= image.width * image.height
            if left >= 0:
                yield open_image(image)
        except Exception as error:  # whatever a decoder says of broken bytes
            raise ValueError(f"{path}: its image {i} cannot be read: {error}.") from error
        if left < 0:
            raise ValueError(f"{path}: its images have more than {max_pixels:,} pixels, the limit here.")
