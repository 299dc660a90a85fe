"""Qwen2-VL and Qwen3-VL against Hugging Face in float64."""

from __future__ import annotations

import pytest
import torch

from tests.cases import hf_model, raw_inputs, relative_error
from tests.qwen_cases import QWEN_CASES, QwenCase


def fresh(hf):
    """The model without the positions that an earlier batch left on it."""
    hf.model.rope_deltas = None
    return hf


@pytest.mark.parametrize("case", QWEN_CASES, ids=str)
def test_logits_equal_hugging_face(case: QwenCase, model_of) -> None:
    raw = raw_inputs(case)
    with torch.no_grad():
        theirs = fresh(hf_model(case))(**raw).logits
        ours = model_of(case).forward_hf(**raw)
    assert relative_error(ours, theirs, raw["attention_mask"]) < 1e-9
