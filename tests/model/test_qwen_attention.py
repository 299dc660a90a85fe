"""`model.attention` and `record_attention` on the Qwen-VL models: rows equal those of the patterns."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.cases import raw_inputs, relative_error
from tests.qwen_cases import KINDS, QwenCase
from veena_lens.positions import position_mask

ROWS = ("2 i4x4 3 v2x2x4 2", "1 i2x6 3", "4")
CASES = [
    QwenCase(name=f"attention-{padding}", kind=kind, rows=ROWS, padding=padding)
    for kind in KINDS
    for padding in ("left", "right")
]


@pytest.fixture(params=CASES, ids=str)
def ready(request: pytest.FixtureRequest, model_of) -> tuple[Any, Any]:
    model = model_of(request.param)
    return model, model.inputs_from_hf(**raw_inputs(request.param))


@pytest.mark.parametrize(
    "queries, keys", [("last", "image"), ("query", "all"), ("image", "image"), (6, "text"), ("all", "all")], ids=str
)
def test_rows_equal_those_of_the_pattern(queries: Any, keys: Any, ready) -> None:
    model, inputs = ready
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, names_filter=lambda name: name.endswith("attn.hook_pattern"))
        scores = model.attention(inputs, queries=queries, keys=keys)
    q_mask, k_mask = position_mask(inputs, queries), position_mask(inputs, keys)
    assert bool(q_mask.any()) and bool(k_mask.any())
    sizes = (int(q_mask.sum(-1).max()), int(k_mask.sum(-1).max()))
    assert scores.values.shape == (3, model.cfg.n_layers, model.cfg.n_heads, *sizes)
    for row in range(3):
        q, k = q_mask[row].nonzero().flatten(), k_mask[row].nonzero().flatten()
        there = torch.zeros(sizes, dtype=torch.bool)
        there[: len(q), : len(k)] = True
        assert torch.equal(scores.exists[row], there.expand_as(scores.exists[row]))
        for layer in range(model.cfg.n_layers):
            expected = cache["pattern", layer][row][:, q][:, :, k]
            ours = scores.values[row, layer, :, : len(q), : len(k)]
            assert torch.allclose(ours, expected, rtol=1e-9, atol=1e-12)


def test_attention_while_generating_equals_the_teacher_forced_rows(ready) -> None:
    """Each generated token looks back once it is itself fed in: the last one never is."""
    model, inputs = ready
    found = []
    for cached in (True, False):
        with model.record_attention(queries="generated", keys="image") as seen:
            answer = model.generate(
                inputs, max_new_tokens=4, eos_token_id=[], return_type="tokens", use_past_kv_cache=cached
            )
        found.append(seen.scores())
    forced = inputs.left_padded().with_new_tokens(answer[:, :-1])
    expected = model.attention(forced, queries="answer", keys="image")
    for scores in found:
        assert scores.values.shape == expected.values.shape and scores.values.shape[3] == 3
        assert relative_error(scores.values, expected.values) < 1e-9
