"""What only Gemma-3 has: an image's tokens that read each other, within the windows of layers that slide."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.cases import BY_NAME, native_model, raw_inputs


def test_an_images_tokens_read_later_ones_of_their_own_image_and_no_other(model_of) -> None:
    case = BY_NAME["gemma3-unequal-rows"]
    model = model_of(case)
    inputs = model.inputs_from_hf(**raw_inputs(case))
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
    for layer in range(model.cfg.n_layers):
        looks = cache["pattern", layer][0].amax(0) > 0
        window = model.cfg.window(layer) or 10**6
        for query in inputs.attention_mask[0].nonzero().flatten().tolist():
            block = next((s for s in inputs.spans[0].images if s.start <= query < s.stop), slice(query, query + 1))
            wanted = [
                k for k in range(inputs.shape[1])
                if bool(inputs.attention_mask[0, k]) and k < max(query + 1, block.stop) and k > query - window
            ]  # fmt: skip
            assert looks[query].nonzero().flatten().tolist() == wanted, (layer, query)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (dict(token_type_ids=None), "token_type_ids are missing"),
        (dict(token_type_ids=torch.zeros(3, 5, dtype=torch.long)), "token_type_ids .*do not fit"),
        (dict(token_type_ids="off"), "token_type_ids differ from input_ids in rows \\[0, 1\\]"),
    ],
    ids=["missing", "shape", "values"],
)
def test_types_of_tokens_that_say_otherwise_are_refused(change: dict[str, Any], told: str, model_of) -> None:
    """Hugging Face reads them to let an image's tokens read each other; ours reads the tokens."""
    case = BY_NAME["gemma3-plain"]
    raw = raw_inputs(case)
    if isinstance(change["token_type_ids"], str):
        change = dict(token_type_ids=torch.zeros_like(raw["input_ids"]))
    with pytest.raises(ValueError, match=told):
        model_of(case).inputs_from_hf(**{**raw, **change})


def test_a_residual_needs_the_inputs_it_came_from() -> None:
    """Which tokens are an image's decides what reads what."""
    case = BY_NAME["gemma3-plain"]
    model = native_model(case)
    inputs = model.inputs_from_hf(**raw_inputs(case))
    with torch.no_grad():
        resid = model(inputs, stop_at_layer=1)
        with pytest.raises(ValueError, match="tokens="):
            model(resid, start_at_layer=1)
        assert torch.equal(model(resid, start_at_layer=1, tokens=inputs), model(inputs))
