"""Two runs of one tiny model to compare: the same rows with other images and, where it is asked for, another word."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.families import Case, counted_inputs


def with_other_words(raw: dict[str, Tensor]) -> Tensor:
    """The token ids with another word in the last place but one of each row, where that is a word."""
    ids, mask = raw["input_ids"].clone(), raw["attention_mask"]
    rows = torch.arange(len(ids))
    place = ids.shape[1] - 2 - mask.flip(1).argmax(1)
    words = mask[rows, place].bool() & (ids[rows, place] < 100)
    ids[rows[words], place[words]] = (ids[rows[words], place[words]] + 3) % 90 + 2
    return ids


def with_other_images(raw: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """The inputs with other pixels; zeros stay, since a tile of zeros is padding."""

    def drawn(value: Tensor) -> Tensor:
        return torch.where(value == 0, 0.0, torch.randn(value.shape, generator=generator, dtype=value.dtype))

    return {key: drawn(value) if key.startswith("pixel_values") else value for key, value in raw.items()}


def pair_of(
    models: Callable[..., Any],
    case: Case,
    has_other_words: bool = True,
    dtype: torch.dtype = torch.float64,
    casts: str = "none",
    generator: torch.Generator | None = None,
    **options: Any,
) -> tuple[Any, Any, Any]:
    """(model, clean, corrupted) of a case; `models` is the fixture `model_of`, or `native_model`.

    generator: what draws the other pixels; None means the same numbers at every call."""
    model, raw = models(case, dtype, casts, **options), counted_inputs(case, dtype)
    other = with_other_images(raw, generator or torch.Generator().manual_seed(0))
    if has_other_words:
        other["input_ids"] = with_other_words(raw)
    return model, model.inputs_from_hf(**raw), model.inputs_from_hf(**other)


def ready_of(models: Callable[..., Any], case: Case, casts: str = "none", **options: Any) -> tuple[Any, Any]:
    """(model, inputs) of a case, positions counted over real tokens."""
    model = models(case, torch.float64, casts, **options)
    return model, model.inputs_from_hf(**counted_inputs(case))
