"""Attention of a cache that holds queries and keys alone, where an image's tokens read each other (Gemma-3)."""

from __future__ import annotations

from typing import Any

import torch

from tests.cases import BY_NAME, counted, raw_inputs
from veena_lens.app.view.files import open_cache, save_cache
from veena_lens.app.view.rows import RULE, CachedRows, rule_of

KEPT = ("attn.hook_rot_q", "attn.hook_rot_k", "hook_resid_post")


def rows_of(cache: Any, rule: dict[str, Any], row: int) -> torch.Tensor:
    rows, found = CachedRows(cache=cache, row=row, **rule), []
    there = cache.inputs.attention_mask[row].nonzero().flatten().tolist()
    rows.stream(there, lambda layer, at, weights: found.append(weights))
    return torch.stack(found)


def test_rows_of_queries_and_keys_equal_the_pattern_also_from_a_file(model_of, tmp_path: Any) -> None:
    case = BY_NAME["gemma3-unequal-rows"]
    model = model_of(case, casts="none")
    inputs = model.inputs_from_hf(**counted(raw_inputs(case)))
    with torch.no_grad():
        _, whole = model.run_with_cache(inputs, names_filter=lambda name: name.endswith("attn.hook_pattern"))
        _, cache = model.run_with_cache(inputs, names_filter=lambda name: name.endswith(KEPT))
    opened = open_cache(save_cache(cache, tmp_path / "cache.safetensors"))
    told = {name: opened.about[name] for name in RULE}
    assert told == rule_of(model.cfg) and opened.cache.model is None
    for row in range(len(inputs)):
        expected = rows_of(whole, {}, row).float()
        for source, rule in ((cache, rule_of(model.cfg)), (opened.cache, told)):
            torch.testing.assert_close(rows_of(source, rule, row), expected, rtol=1e-5, atol=1e-6)
    plain = {**rule_of(model.cfg), "image_blocks": False}
    assert float((rows_of(cache, plain, 0) - rows_of(whole, {}, 0)).abs().max()) > 1e-2
