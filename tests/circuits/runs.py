"""Pairs of runs for the circuit tools' tests: every kind of tiny model, in pure float64, batches left padded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from tests.cases import BY_NAME, counted, raw_inputs
from tests.parity.test_llava_next import batch, build

LLAVA, NEXT, GEMMA3, QWEN2, QWEN3, TEXT = (
    "three-images-and-none",
    "llava-next",
    "gemma3-unequal-rows",
    "qwen2_vl-plain",
    "qwen3_vl-plain",
    "text-qwen3",
)
KINDS = [LLAVA, GEMMA3, QWEN2, QWEN3, TEXT]


def case_of(name: str) -> Any:
    return BY_NAME[name]


def pair_of(model_of: Any, name: str) -> tuple[Any, Any, Any]:
    """(model, clean, corrupted): the same rows with other images and one other token a row."""
    if name == NEXT:
        from veena_lens import HookedVLM

        hf, _ = build("llama")
        model = HookedVLM.from_hf(hf, casts="none")
        raw = batch(model, [[(40, 75)], [(90, 30)]], seed=5)
        sides = [model.inputs_from_hf(**raw), model.inputs_from_hf(**{**raw, "pixel_values": -raw["pixel_values"]})]
        return model, *(_counted(side) for side in sides)
    model = model_of(case_of(name), casts="none")
    raw = raw_inputs(case_of(name))
    other = dict(raw)
    if "pixel_values" in raw:
        other["pixel_values"] = torch.randn(raw["pixel_values"].shape, dtype=torch.float64)
    ids = raw["input_ids"].clone()
    last = raw["attention_mask"].flip(1).argmax(1)
    place = ids.shape[1] - 2 - last
    rows = torch.arange(len(ids))
    words = raw["attention_mask"][rows, place].bool() & (ids[rows, place] < 100)
    ids[rows[words], place[words]] = (ids[rows[words], place[words]] + 3) % 90 + 2
    other["input_ids"] = ids
    if not case_of(name).has("streams"):
        raw, other = counted(raw), counted(other)
    return model, model.inputs_from_hf(**raw), model.inputs_from_hf(**other)


def _counted(inputs: Any) -> Any:
    from veena_lens.inputs import text_positions

    return replace(inputs, position_ids=text_positions(inputs.attention_mask))


def difference(logits: torch.Tensor) -> torch.Tensor:
    """A metric that is linear in the logits."""
    return logits[:, 5] - logits[:, 6]
