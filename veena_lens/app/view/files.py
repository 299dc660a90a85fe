"""Caches that travel with their images and the words of their tokens, and open as views without a model.

The file is `ActivationCache.save`'s with a few further entries, so `ActivationCache.load` reads it as any other.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
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
from veena_lens.images.files import open_image
from veena_lens.own_files import opened, words_of

ABOUT = "veena_lens.view"
PICTURE = "inputs.picture."
SCHEMA = {"model?": str, "pictures?": int, "texts?": [str], "windows?": (None, [(None, int)])}
SCHEMA |= {"scale?": (None, int, float), "image_blocks?": bool}


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
) -> Path:
    """Save a cache with the images of its first row and the words of its tokens; the file is replaced in one step.

    pictures: the images of the first row (default: none are stored). tokenizer: gives the words; None stores none.
    model_name: shown with the view. windows: sliding window of each layer, None where it has none."""
    path = Path(path)
    draft = cache.save(path.with_name(f".{path.name}.{os.getpid()}"))
    try:
        with safe_open(str(draft), framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about: dict[str, Any] = {"model": model_name, "pictures": 0 if pictures is None else len(pictures)}
        if cache.model is not None:
            about |= rule_of(cache.model.cfg)
        if windows is not None:
            about["windows"] = list(windows)
        if tokenizer is not None and cache.inputs is not None:
            about["texts"] = [tokenizer.decode([token]) for token in cache.inputs.tokens[0].tolist()]
        for i, picture in enumerate(pictures or ()):
            buffer = io.BytesIO()
            picture.convert("RGB").save(buffer, format="PNG")
            tensors[f"{PICTURE}{i}"] = torch.from_numpy(np.frombuffer(buffer.getvalue(), np.uint8).copy())
        save_file(tensors, str(draft), metadata={**metadata, ABOUT: json.dumps(about)})
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def open_cache(path: str | Path) -> OpenedCache:
    """Open a cache file, with images and words where `save_cache` wrote it.

    Raises: FileNotFoundError; ValueError for a file that was cut short, or is no cache, saying which."""
    cache = ActivationCache.load(path)
    with opened(path, "an activation cache") as file:
        about = words_of(file, ABOUT, SCHEMA, path)
        found = []
        for i in range(about.get("pictures", 0)):
            data = file.get_tensor(f"{PICTURE}{i}")
            if data.dtype != torch.uint8 or data.ndim != 1:
                raise ValueError(f"image {i} is stored as {data.dtype} {list(data.shape)}, not as bytes.")
            found.append(open_image(data.numpy().tobytes()))
        return OpenedCache(
            cache=cache,
            pictures=tuple(found) or None,
            texts=tuple(about["texts"]) if "texts" in about else None,
            model_name=about.get("model", ""),
            about=about,
        )
