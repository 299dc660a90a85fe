"""Views of an image equal the pattern's rows; planted sinks are found, and only they; grids must agree."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.circuits.tiny import PICTURED, ready, twin
from veena_lens.circuits.attention_maps import attention_difference, attention_sinks, image_attention, mask_sinks
from veena_lens.positions import position_mask
from veena_lens.scores import Scores


def patterns(model: Any, inputs: Any) -> list[Tensor]:
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
    return [cache["pattern", layer] for layer in range(model.cfg.n_layers)]


@pytest.mark.parametrize("name", PICTURED)
def test_maps_are_rows_of_the_pattern_in_the_grids_order(name: str, model_of) -> None:
    model, inputs = ready(model_of, name)
    view = image_attention(model, inputs, "query")
    each = image_attention(model, inputs, "query", reduce="none")
    asked = position_mask(inputs, "query")
    assert view.axes == ("batch", "layer", "head", "height", "width") and each.axes[-1] == "pos"
    for layer, pattern in enumerate(patterns(model, inputs)):
        for row, images in enumerate(inputs.grids):
            if not images:
                assert not view.exists[row].any()
                continue
            height, width = images[0]
            rows = pattern[row][:, asked[row]][:, :, inputs.grid_tokens(row, 0)]
            n = int(asked[row].sum())
            got = each.values[row, layer, :, :height, :width, :n].movedim(-1, 1)
            assert torch.allclose(got, rows, rtol=0, atol=1e-10)
            assert torch.allclose(view.values[row, layer, :, :height, :width], rows.mean(1), rtol=0, atol=1e-10)
            assert view.exists[row, layer].sum() == height * width * model.cfg.n_heads


def test_later_images_whole_views_and_chosen_heads(model_of) -> None:
    model, inputs = ready(model_of, "llava-next")
    pattern = patterns(model, inputs)[1][:, :, -1]
    second = image_attention(model, inputs, image=1, layers=[1], heads=[4, -6])
    cells = inputs.grid_tokens(0, 1)
    height, width = cells.shape
    assert torch.allclose(second.values[0, 0, 0, :height, :width], pattern[0, 4][cells], rtol=0, atol=1e-10)
    assert second.labels["head"] == [4, 0] and not second.exists[1:].any()
    whole = image_attention(model, inputs, grid="whole", layers=[1])
    start, side = inputs.spans[2].images[0].start, whole.shape[-1]
    expected = pattern[2, 3, start : start + side * side].view(side, side)
    assert torch.allclose(whole.values[2, 0, 3], expected, rtol=0, atol=1e-10)


@contextmanager
def planted(model: Any, row: int, key: int, layer: int = 1, shift: float = 12.0, scale: float = 40.0) -> Iterator[None]:
    """Every head of a layer looks at one token, whose residual is made massive there."""

    def look(scores: Tensor, hook: Any) -> Tensor:
        out = scores.clone()
        out[row, :, :, key] += shift
        return out

    def grow(resid: Tensor, hook: Any) -> Tensor:
        out = resid.clone()
        out[row, key] *= scale
        return out

    with model.hooks([(f"blocks.{layer}.attn.hook_attn_scores", look), (f"blocks.{layer}.hook_resid_pre", grow)]):
        yield


@pytest.mark.parametrize("name", ["clip-llama", "right-padding", "qwen3_vl-plain"])
def test_planted_sinks_are_found_and_nothing_else(name: str, model_of) -> None:
    model, inputs = ready(model_of, name)
    row, key = 0, int(inputs.grid_tokens(0)[0, 1])
    assert not attention_sinks(model, inputs).values.any(), "a random model has none"
    with planted(model, row, key):
        found = attention_sinks(model, inputs)
    assert found.axes == ("batch", "layer", "pos") and found.values.nonzero().tolist() == [[row, 1, key]]
    assert found.meta["positions"]["1"][0] == [key] and found.meta["positions"]["0"][0] == []
    assert found.meta["rule"] == {"multiple": 10.0, "share": 0.8, "norm_multiple": 5.0, "queries": "all"}
    assert found.exists[:, 0].equal(inputs.attention_mask)


def test_both_parts_of_the_rule_are_needed(model_of) -> None:
    model, inputs = ready(model_of, "clip-llama")
    key = int(inputs.grid_tokens(0)[0, 1])
    with planted(model, 0, key, scale=1.0):
        assert not attention_sinks(model, inputs).values.any(), "attended to, but of a usual norm"
        alone = attention_sinks(model, inputs, norm_multiple=None)
        assert alone.values[0, 1, key] and alone.values.sum() == 1
    with planted(model, 0, key, shift=0.0):
        assert not attention_sinks(model, inputs, multiple=200.0).values.any(), "massive, but not attended to"


def test_sinks_counted_in_pieces_are_the_same(model_of, monkeypatch) -> None:
    from veena_lens.circuits import reading

    model, inputs = ready(model_of, "qwen3_vl-plain")
    options = dict(multiple=1.2, share=0.5, norm_multiple=None)
    plain = attention_sinks(model, inputs, **options)
    monkeypatch.setattr(reading, "ROOM", 700)
    assert attention_sinks(model, inputs, **options).values.equal(plain.values) and plain.values.any()


def test_rule_counts_heads_and_queries(model_of) -> None:
    """The share of (head, later query) pairs that exceed the multiple, from the whole pattern."""
    model, inputs = ready(model_of, "window-mistral")
    multiple, share = 1.5, 0.4
    found = attention_sinks(model, inputs, multiple=multiple, share=share, norm_multiple=None)
    for layer, pattern in enumerate(patterns(model, inputs)):
        for row in range(len(inputs)):
            for key in range(inputs.shape[1]):
                hits = pairs = 0
                for head in range(model.cfg.n_heads):
                    for query in range(key + 1, inputs.shape[1]):
                        weights = pattern[row, head, query]
                        seen = weights[weights > 0]
                        if weights[key] > 0 and len(seen) >= 4:
                            pairs += 1
                            hits += bool(weights[key] > multiple * seen.median())
                assert bool(found.values[row, layer, key]) == (pairs > 0 and hits >= share * pairs)


@pytest.mark.parametrize("renormalise", [True, False])
def test_sinks_are_taken_out_and_rows_made_whole(renormalise: bool, model_of) -> None:
    model, inputs = ready(model_of, "clip-llama")
    key = int(inputs.grid_tokens(0)[0, 1])
    with planted(model, 0, key):
        view = mask_sinks(model, inputs, "query", renormalise=renormalise)
        plain = image_attention(model, inputs, "query")
        pattern = patterns(model, inputs)[1][0][:, position_mask(inputs, "query")[0]]
    assert view.meta["sinks"] == {"0": [[], []], "1": [[key], []]} and view.meta["rule"]["multiple"] == 10.0
    assert view.exists[0, 1, :, 0, 1].sum() == 0 and view.exists[0, 0].all() and view.exists[0, 1, :, 0, 0].all()
    pattern[..., key] = 0
    if renormalise:
        pattern = pattern / pattern.sum(-1, keepdim=True)
    expected = pattern[:, :, inputs.grid_tokens(0)].mean(1)
    assert torch.allclose(view.values[0, 1], expected, rtol=0, atol=1e-10)
    assert torch.allclose(view.values[0, 0], plain.values[0, 0], rtol=0, atol=1e-12), "a layer without sinks stays"


def test_sinks_by_rules_of_ones_own_are_taken(model_of) -> None:
    model, inputs = ready(model_of, "clip-llama")
    mine = attention_sinks(model, inputs, multiple=1.1, share=0.3, norm_multiple=None, layers=[1])
    view = mask_sinks(model, inputs, sinks=mine, layers=[1])
    assert view.meta["sinks"]["1"] == mine.meta["positions"]["1"] and view.meta["rule"] == mine.meta["rule"]
    with pytest.raises(ValueError, match=r"sinks of layers \[0\] were not looked for"):
        mask_sinks(model, inputs, sinks=mine)
    with pytest.raises(ValueError, match="must be the Scores of attention_sinks"):
        mask_sinks(model, inputs, sinks=image_attention(model, inputs))
    with pytest.raises(ValueError, match=r"sinks of \[batch pos\]"):
        mask_sinks(model, inputs[:1], sinks=mine, layers=[1])


def test_difference_needs_the_same_grid(model_of) -> None:
    model, inputs = ready(model_of, "qwen2_vl-image-and-video")
    first, second = image_attention(model, inputs), image_attention(model, twin(inputs))
    difference = attention_difference(first, second)
    assert torch.equal(difference.values[first.exists], (first.values - second.values)[first.exists])
    assert difference.values.abs().max() > 1e-6 and difference.exists.equal(first.exists)
    with pytest.raises(ValueError, match="token grids are .* only images with the same grid"):
        attention_difference(first, image_attention(model, inputs[[1, 0, 2]]))
    with pytest.raises(ValueError, match="layers .* differ"):
        attention_difference(
            image_attention(model, inputs, layers=[0]), image_attention(model, twin(inputs), layers=[1])
        )
    with pytest.raises(ValueError, match="two maps of the same axes"):
        attention_difference(first, first.mean("head"))


def test_difference_masks_what_is_masked_in_one() -> None:
    mask = torch.ones(2, 2, dtype=torch.bool)
    mask[0, 1] = False
    one = Scores(torch.ones(2, 2), ("height", "width"), mask=mask)
    difference = attention_difference(Scores(torch.full((2, 2), 3.0), ("height", "width")), one)
    assert difference.exists.equal(mask) and difference.values.tolist() == [[2.0, 0.0], [2.0, 2.0]]


@pytest.mark.parametrize(
    ("call", "telling"),
    [
        (lambda m, i: image_attention(m, i, image=5), "no row has an image 5"),
        (lambda m, i: image_attention(m, i, "answer"), "select no position"),
        (lambda m, i: image_attention(m, i, heads=[9]), "head 9 does not exist; there are 6"),
        (lambda m, i: image_attention(m, i, heads=[]), "list of heads is empty"),
        (lambda m, i: image_attention(m, i, reduce="max"), "must be one of mean, none"),
        (lambda m, i: attention_sinks(m, i, multiple=0.5), "must be above 1"),
        (lambda m, i: attention_sinks(m, i, share=2.0), r"share=2.0 in \(0, 1\]"),
    ],
)
def test_bad_input_says_what_is_wrong(call: Any, telling: str, model_of) -> None:
    model, inputs = ready(model_of, "clip-llama")
    with pytest.raises(ValueError, match=telling):
        call(model, inputs)


def test_text_alone_has_no_picture_to_look_at(model_of) -> None:
    model, inputs = ready(model_of, "text-qwen3")
    with pytest.raises(ValueError, match="no row has an image 0"):
        image_attention(model, inputs)
    assert attention_sinks(model, inputs).shape == (3, 2, inputs.shape[1])
