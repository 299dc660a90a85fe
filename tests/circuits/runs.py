"""Pairs of runs for the circuit tools' tests: every kind of tiny model, in pure float64, batches left padded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from tests import pairs
from tests.cases import BY_NAME, Case

LLAVA, NEXT, GEMMA3, QWEN2, QWEN3, TEXT = (
    "three-images-and-none",
    "llava-next",
    "gemma3-unequal-rows",
    "qwen2_vl-plain",
    "qwen3_vl-plain",
    "text-qwen3",
)
KINDS = [LLAVA, GEMMA3, QWEN2, QWEN3, TEXT]
TWO = replace(BY_NAME["llava-next-llama"], name="two", rows=("2 i40x75 5", "4 i90x30 3"))


def case_of(name: str) -> Case:
    return TWO if name == NEXT else BY_NAME[name]


def pair_of(model_of: Callable[..., Any], name: str) -> tuple[Any, Any, Any]:
    """(model, clean, corrupted): the same rows with other images and one other word a row."""
    return pairs.pair_of(model_of, case_of(name), generator=torch.default_generator)


def difference(logits: torch.Tensor) -> torch.Tensor:
    """A metric that is linear in the logits."""
    return logits[:, 5] - logits[:, 6]
