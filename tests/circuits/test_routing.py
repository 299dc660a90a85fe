"""The parts of a head's push add up to it, and the map over an image to the image's part, in every layout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.circuits.tiny import NAMES, PICTURED, directions, ready, twin, unit
from veena_lens.circuits.heads import head_intention
from veena_lens.circuits.routing import attention_by_source, direct_attribution_map, image_attention_share
from veena_lens.positions import position_mask
from veena_lens.scores import Scores


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("at", ["last", "image+query"])
def test_sources_add_up_to_the_projection(name: str, at: str, model_of) -> None:
    """Method, section 5: the split shares out <r_h[p], S> exactly; likewise of differences."""
    model, inputs = ready(model_of, name)
    S, other = directions(model), twin(inputs)
    for baseline in (None, other):
        routes = attention_by_source(model, inputs, S, positions=at, baseline=baseline, reduce="none")
        whole = head_intention(
            inputs, S, positions=at, kind="projection", baseline=baseline, model=model, reduce="none"
        )
        assert routes.axes == ("batch" if baseline is None else "pair", "layer", "head", "source", "pos")
        total = routes.values.sum(3)
        there = whole.exists
        assert torch.allclose(total[there], whole.values[there], rtol=0, atol=1e-10)
    mean = attention_by_source(model, inputs, S, positions=at, baseline=other)
    expected = head_intention(inputs, S, positions=at, kind="projection", baseline=other, model=model)
    assert torch.allclose(mean.values.sum(-1)[mean.exists[..., 0]], expected.values[expected.exists], atol=1e-10)


@pytest.mark.parametrize("name", ["attention-bias", "right-padding", "llava-next", "qwen3_vl-plain"])
def test_each_source_is_the_sum_over_its_keys(name: str, model_of) -> None:
    model, inputs = ready(model_of, name)
    S = directions(model)
    routes = attention_by_source(model, inputs, S)
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
    group = model.cfg.n_heads // model.cfg.n_key_value_heads
    for layer in range(model.cfg.n_layers):
        worth = cache["v", layer].repeat_interleave(group, 2)
        worth = torch.einsum("bkhd,hdm,m->bhk", worth, model.blocks[layer].attn.W_O, unit(S[layer]))
        for row, spans in enumerate(inputs.spans):
            parts = cache["pattern", layer][row, :, spans.last] * worth[row]
            image, query, real = inputs.image_mask[row], position_mask(inputs, "query")[row], inputs.attention_mask[row]
            own = torch.arange(len(real)) == spans.last
            masks = (image & ~own, query & ~own, real & ~image & ~query & ~own, own)
            expected = torch.stack([parts[:, mask].sum(-1) for mask in masks], -1)
            assert torch.allclose(routes.values[row, layer], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", PICTURED)
def test_maps_over_all_pictures_add_up_to_the_images_part(name: str, model_of) -> None:
    model, inputs = ready(model_of, name)
    S, other = directions(model), twin(inputs)
    routes = attention_by_source(model, inputs, S, baseline=other).select(source="image").values
    images = range(max(inputs.n_images))
    maps = [direct_attribution_map(model, inputs, S, image=i, baseline=other) for i in images]
    if inputs.token_tiles:  # the whole view stands beside the grid through the tiles, newlines in neither
        maps += [
            direct_attribution_map(model, inputs, S, image=i, baseline=other, grid="whole")
            for i in range(max(inputs.n_images))
        ]
        newline = torch.zeros_like(routes)
        for sign, run in ((1, inputs), (-1, other)):
            newline += sign * newline_part(model, run, S)
        routes = routes - newline
    total = sum(torch.where(m.exists, m.values, 0.0).sum((-1, -2)) for m in maps)
    assert torch.allclose(total, routes, rtol=0, atol=1e-10)
    assert maps[0].axes == ("pair", "layer", "head", "height", "width")


def newline_part(model: Any, inputs: Any, S: torch.Tensor) -> torch.Tensor:
    """The push from newline tokens of tiled images, from the whole pattern."""
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
    out = torch.zeros(len(inputs), model.cfg.n_layers, model.cfg.n_heads, dtype=torch.float64)
    for layer in range(model.cfg.n_layers):
        worth = cache["v", layer].repeat_interleave(model.cfg.n_heads // model.cfg.n_key_value_heads, 2)
        worth = torch.einsum("bkhd,hdm,m->bhk", worth, model.blocks[layer].attn.W_O, unit(S[layer]))
        for row, spans in enumerate(inputs.spans):
            for image, span in enumerate(spans.images):
                places = torch.arange(span.start, span.stop)[inputs.image_mask[row, span]]
                ends = places[torch.tensor(inputs.token_tiles[row][image]) == -1]
                parts = cache["pattern", layer][row, :, spans.last] * worth[row]
                out[row, layer] += parts[:, ends].sum(-1).detach()
    return out


def test_map_has_each_patch_in_its_place(model_of) -> None:
    """Silencing one image token's value changes its cell alone."""
    model, inputs = ready(model_of, "qwen2_vl-image-and-video")
    S, row, image = directions(model), 0, 0
    cells = inputs.grid_tokens(row, image)
    before = direct_attribution_map(model, inputs, S, layers=[1])

    def silence(v: torch.Tensor, hook: Any) -> torch.Tensor:
        out = v.clone()
        out[row, cells[1, 0]] = 0.0
        return out

    with model.hooks([("blocks.1.attn.hook_v", silence)]):
        after = direct_attribution_map(model, inputs, S, layers=[1])
    changed = (after.values - before.values).abs()[row, 0].amax(0) > 0
    height, width = inputs.grids[row][image]
    assert changed.nonzero().tolist() == [[1, 0]] and before.meta["sizes"][row] == [height, width]
    assert not before.exists[row, ..., height:, :].any() and before.exists[row, ..., :height, :width].all()
    assert not before.exists[2].any(), "the third row has no picture"


def test_rows_streamed_in_pieces_give_the_same(model_of, monkeypatch) -> None:
    from veena_lens.circuits import reading

    model, inputs = ready(model_of, "three-images-and-none")
    S = directions(model)
    plain = [attention_by_source(model, inputs, S, positions="all", reduce=how) for how in ("mean", "none")]
    maps = direct_attribution_map(model, inputs, S, positions="text")
    monkeypatch.setattr(reading, "ROOM", 1500)
    for how, before in zip(("mean", "none"), plain):
        after = attention_by_source(model, inputs, S, positions="all", reduce=how)
        assert torch.allclose(after.values, before.values, rtol=0, atol=1e-12)
    assert torch.allclose(
        direct_attribution_map(model, inputs, S, positions="text").values, maps.values, rtol=0, atol=1e-12
    )


def test_no_square_attention_is_made(model_of) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    model, inputs = ready(model_of, "llava-next")
    length, squares = inputs.shape[1], []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-2:] == (length, length) and out.numel() > 3 * length**2:
                squares.append(tuple(out.shape))
            return out

    with Spy():
        attention_by_source(model, inputs, directions(model))
    assert squares == []


def test_layers_heads_and_edits_are_honoured(model_of) -> None:
    from veena_lens.interventions import KnockOutAttention

    model, inputs = ready(model_of, "qwen3_vl-plain")
    S = directions(model)
    whole, part = (
        attention_by_source(model, inputs, S),
        attention_by_source(model, inputs, S, layers=[-1, 0], heads=[2, -4]),
    )
    last = model.cfg.n_layers - 1
    assert part.labels["layer"] == [last, 0] and part.labels["head"] == [2, 0]
    assert torch.allclose(part.values, whole.values[:, [last, 0]][:, :, [2, 0]], rtol=0, atol=1e-12)
    with model.intervene([KnockOutAttention(layer=last, heads=[1], keys="image", queries="last")]):
        blind = attention_by_source(model, inputs, S).select(layer=last, source="image").values
    assert not blind[:2, 1].any() and blind[:2, 0].abs().min() > 0


def test_share_is_signed_and_bounded(model_of) -> None:
    model, inputs = ready(model_of, "clip-llama")
    routes = attention_by_source(model, inputs, directions(model))
    share = image_attention_share(routes)
    assert share.axes == ("batch", "layer", "head") and share.values.abs().max() <= 1
    w = routes.values[0, 1, 3]
    assert torch.allclose(share.values[0, 1, 3], w[0] / (w[0].abs() + (w[1] + w[2]).abs() + w[3].abs()))
    nothing = Scores(torch.zeros(4), ("source",), {"source": routes.labels["source"]})
    assert image_attention_share(nothing).values == 0


@pytest.mark.parametrize(
    ("options", "telling"),
    [
        (dict(direction=torch.ones(7, dtype=torch.float64)), r"direction \[7\] must be"),
        (dict(heads=[6]), "head 6 does not exist; there are 6"),
        (dict(layers=[2]), "layer 2 does not exist"),
        (dict(positions="answer"), "select no position"),
        (dict(reduce="max"), "must be one of mean, none"),
        (dict(image=2), r"no row has an image 2; images per row: \[1, 2\]"),
        (dict(grid="tiles"), "'grid' or 'whole'"),
    ],
)
def test_bad_input_says_what_is_wrong(options: dict[str, Any], telling: str, model_of) -> None:
    model, inputs = ready(model_of, "clip-llama")
    with pytest.raises(ValueError, match=telling):
        direct_attribution_map(model, inputs, **{"direction": directions(model), **options})


def test_pairs_that_do_not_match_are_refused(model_of) -> None:
    model, inputs = ready(model_of, "qwen2_vl-image-and-video")
    S = directions(model)
    swapped = inputs[[1, 0, 2]]
    with pytest.raises(ValueError, match="the grids are .*, those of the baseline"):
        direct_attribution_map(model, inputs, S, baseline=swapped)
    with pytest.raises(ValueError, match="pairs need the same rows"):
        attention_by_source(model, inputs, S, positions="query", baseline=swapped)
    with pytest.raises(ValueError, match="give the Scores of attention_by_source"):
        image_attention_share(
            replace(attention_by_source(model, inputs, S), axes=("batch", "layer", "head", "part"), labels={})
        )
