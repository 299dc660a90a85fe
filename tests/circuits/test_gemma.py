"""Circuit tools where an image's tokens read each other and stand for squares of patches (Gemma-3)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.circuits.runs import GEMMA3, difference, pair_of
from veena_lens.circuits import attention_knockout, image_attribution
from veena_lens.interventions import (
    Ablate,
    BoostAttention,
    KnockOutAttention,
    Patch,
    ScaleNeurons,
    Steer,
    SteerKeepingNorm,
    SuppressHeads,
)


def test_map_at_the_tower_sums_each_square_of_patches(model_of) -> None:
    model, clean, corrupted = pair_of(model_of, GEMMA3)
    clean, corrupted = clean[[0, 2]], corrupted[[0, 2]]
    found = image_attribution(model, clean, corrupted, difference, image=0, site="vision.hook_embed")
    seen: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Any) -> None:
        value.retain_grad()
        seen["here"] = value

    with torch.no_grad():
        _, cache = model.run_with_cache(clean, names_filter="vision.hook_embed")
    with model.hooks([("vision.hook_embed", keep)]):
        difference(model(corrupted)[:, -1]).sum().backward()
    model.zero_grad()
    gradient = seen["here"].grad
    assert gradient is not None
    product = ((cache["vision.hook_embed"] - seen["here"].detach()) * gradient).sum(-1)
    first = [int((clean.crop_rows == row).nonzero()[0]) for row in range(2)]
    squares = product[first].view(2, 2, 2, 2, 2).sum((2, 4))  # row of cells, row in it, column of cells, column in it
    torch.testing.assert_close(found.values, squares, rtol=1e-9, atol=1e-12)
    assert max(abs(x) for x in found.meta["elsewhere"]) < 1e-10


def test_cuts_within_a_picture_equal_hand_masked_forwards(model_of) -> None:
    """Of its last token from its first: a cut that a causal decoder would not have."""
    model, inputs, _ = pair_of(model_of, GEMMA3)
    row = inputs[0].without_padding()
    span = row.spans[0].images[-1]
    cut = ([span.stop - 1], [span.start, span.start + 1])
    found = attention_knockout(model, row, [cut, ("image", "query")], difference, relative=False)

    def mask(scores: Tensor, hook: Any) -> Tensor:
        out = scores.clone()
        out[:, :, span.start : span.start + 2, span.stop - 1] = -torch.inf
        return out

    with torch.no_grad():
        plain = difference(model(row)[:, -1])
        for layer in range(3):
            hooked = model.run_with_hooks(row, fwd_hooks=[(f"blocks.{layer}.attn.hook_attn_scores", mask)])
            by_hand = difference(hooked[:, -1]) - plain
            torch.testing.assert_close(found.values[:, 0, layer], by_hand, rtol=1e-9, atol=1e-11)
    assert float(found.values[0, 0, 0].abs()) > 1e-9
    with pytest.raises(ValueError, match="cuts nothing"):
        attention_knockout(model, row, [([span.stop], [span.start])], difference)


def kinds(model: Any, inputs: Any, cache: Any) -> dict[str, Any]:
    vector = torch.randn(48, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return {
        "steer": Steer(1, vector, positions="image+generated"),
        "patch": Patch("blocks.1.hook_attn_out", cache, positions="image"),
        "ablate": Ablate("blocks.0.ln1_post.hook_normalized", positions="query+generated"),
        "ablate in the tower": Ablate("connector.norm.hook_normalized", positions=[1, 2]),
        "neurons": ScaleNeurons(2, [3, 4], 3.0, positions="image+query+generated"),
        "boost": BoostAttention(1, keys="image", queries="image+query+generated", factor=4.0),
        "boost of scores": BoostAttention(0, keys="image", queries="image", factor=2.0, mode="abs"),
        "cut": KnockOutAttention(1, keys="image", queries="image"),
        "quiet": SuppressHeads(1, 0.5, queries="image+generated"),
        "turn": SteerKeepingNorm(1, vector, 0.3, positions="image+generated"),
    }


def test_every_kind_acts_alike_with_and_without_a_cache_and_row_by_row(model_of) -> None:
    model, inputs, other = pair_of(model_of, GEMMA3)
    inputs, other = inputs[[0, 2, 3]], other[[0, 2, 3]]
    with torch.no_grad():
        _, cache = model.run_with_cache(other)
        plain = model(inputs)
    options: dict[str, Any] = dict(max_new_tokens=5, eos_token_id=[], return_type="tokens")
    for name, item in kinds(model, inputs, cache).items():
        with torch.no_grad(), model.intervene([item]):
            whole = model(inputs)
            cached = model.generate(inputs, **options)
            assert torch.equal(cached, model.generate(inputs, use_past_kv_cache=False, **options)), name
            heard = model.run_with_hooks(inputs, fwd_hooks=[(lambda n: n.endswith("pattern"), lambda x, hook: None)])
        torch.testing.assert_close(heard[inputs.attention_mask], whole[inputs.attention_mask], rtol=1e-9, atol=1e-11)
        assert float((whole - plain)[inputs.attention_mask].abs().max()) > 1e-6, name
        if name == "patch":
            continue
        for row in range(3):
            with torch.no_grad(), model.intervene([item]):
                alone = model(inputs[row].without_padding())[0]
            torch.testing.assert_close(alone, whole[row][inputs.attention_mask[row]], rtol=1e-9, atol=1e-11)
