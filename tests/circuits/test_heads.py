"""Pushes add up to the stream's, cosines and projections equal those of `hook_result`, a cache equals a run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.circuits.tiny import NAMES, directions, ready, twin, unit
from tests.model.checks import after_norm
from veena_lens.activation_cache import MissingActivation
from veena_lens.circuits.heads import copying_strength, direct_attribution, head_intention
from veena_lens.positions import position_mask


def cached(model: Any, inputs: Any) -> Any:
    with torch.no_grad():
        return model.run_with_cache(inputs)[1]


@pytest.mark.parametrize("name", NAMES)
def test_pushes_of_all_components_add_up_to_that_of_the_stream(name: str, model_of) -> None:
    """Method, section 5: sum over layers <= l of <Delta A_c, S_l> + <Delta embed, S_l> = <Delta h_l, S_l>."""
    model, inputs = ready(model_of, name)
    first, second, S = cached(model, inputs), cached(model, twin(inputs)), directions(model)
    for layer in range(model.cfg.n_layers):
        pushes = direct_attribution(first, S, baseline=second, at_layer=layer)
        moved = first.at("last", "resid_post", layer) - second.at("last", "resid_post", layer)
        assert torch.allclose(pushes.values.sum(-1), moved @ unit(S[layer]), rtol=0, atol=1e-10)
        assert pushes.axes == ("pair", "component") and pushes.labels["component"][-1] == f"{layer}_mlp_out"
    alone = direct_attribution(first, S[1])
    assert torch.allclose(alone.values.sum(-1), first.at("last", "resid_post", -1) @ unit(S[1]), rtol=0, atol=1e-10), (
        "one vector for all"
    )


@pytest.mark.parametrize("name", ["qwen3_vl-plain", "qwen3_vl-deepstack-every-decoder-layer"])
def test_deepstack_features_are_components_at_image_positions(name: str, model_of) -> None:
    model, inputs = ready(model_of, name)
    first, second, S = cached(model, inputs), cached(model, twin(inputs)), directions(model)
    last = model.cfg.n_layers - 1
    pushes = direct_attribution(first, S, positions="image", baseline=second, at_layer=last, reduce="none")
    assert [c for c in pushes.labels["component"] if "deepstack" in str(c)] == [
        f"{i}_deepstack" for i in range(1, min(model.cfg.n_deepstack, last) + 1)
    ]
    assert pushes.select(component="1_deepstack").values[0].abs().max() > 1e-3
    moved = first.at("image", "resid_post", last) - second.at("image", "resid_post", last)
    total = torch.where(pushes.exists, pushes.values, 0.0).sum(1)
    assert torch.allclose(total, moved @ unit(S[last]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("at", ["last", "query"])
def test_head_scores_equal_those_of_the_results(name: str, at: str, model_of) -> None:
    model, inputs = ready(model_of, name)
    first, second, S = cached(model, inputs), cached(model, twin(inputs)), directions(model)
    chosen = position_mask(inputs, at)
    for baseline in (None, second):
        scores = {
            kind: head_intention(first, S, positions=at, kind=kind, baseline=baseline)
            for kind in ("cosine", "projection")
        }
        for layer in range(model.cfg.n_layers):
            runs = [first] if baseline is None else [first, baseline]
            each = [after_norm(model, run, layer, "ln1_post", run["result", layer]) for run in runs]
            results = each[0] if baseline is None else each[0] - each[1]
            push = results @ unit(S[layer])
            cosine = push / (results.norm(dim=-1) + 1e-12)
            for kind, value in (("projection", push), ("cosine", cosine)):
                expected = torch.stack([value[row, chosen[row]].mean(0) for row in range(len(inputs))])
                assert torch.allclose(scores[kind].values[:, layer], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["attention-bias", "qwen2_vl-image-and-video"])
def test_heads_and_bias_add_up_to_attention(name: str, model_of) -> None:
    model, inputs = ready(model_of, name)
    cache, S = cached(model, inputs), directions(model)
    heads = head_intention(cache, S, kind="projection", at_layer=1)
    attention = direct_attribution(cache, S, at_layer=1)
    for layer in (0, 1):
        bias = model.blocks[layer].attn.b_O.detach() @ unit(S[1])
        total = heads.values[:, layer].sum(-1) + bias
        assert torch.allclose(total, attention.select(component=f"{layer}_attn_out").values, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["right-padding", "qwen3_vl-plain"])
def test_inputs_give_what_their_cache_gives(name: str, model_of) -> None:
    model, inputs = ready(model_of, name)
    S, other = directions(model), twin(inputs)
    from_cache = head_intention(
        cached(model, inputs), S, positions="query", baseline=cached(model, other), reduce="none"
    )
    from_inputs = head_intention(inputs, S, positions="query", baseline=other, model=model, reduce="none")
    assert from_inputs.axes == ("pair", "layer", "head", "pos")
    assert torch.allclose(from_inputs.values, from_cache.values, rtol=0, atol=1e-12)
    assert from_inputs.exists.equal(from_cache.exists) and from_inputs.meta == from_cache.meta
    pushes = direct_attribution(inputs, S, model=model)
    assert torch.allclose(pushes.values, direct_attribution(cached(model, inputs), S).values, rtol=0, atol=1e-12)


def test_positions_are_kept_averaged_or_maximised(model_of) -> None:
    model, inputs = ready(model_of, "three-images-and-none")
    cache, S = cached(model, inputs), directions(model)
    each = head_intention(cache, S, positions="image", reduce="none")
    counts = position_mask(inputs, "image").sum(-1)
    assert each.exists[:, 0, 0].sum(-1).equal(counts) and counts[1] == 0
    mean, largest = (head_intention(cache, S, positions="image", reduce=how) for how in ("mean", "max"))
    for row in (0, 2):
        mine = each.values[row, ..., : counts[row]]
        assert torch.allclose(mean.values[row], mine.mean(-1)) and torch.allclose(largest.values[row], mine.amax(-1))
    assert not mean.exists[1].any() and mean.values[1].isnan().all(), "a row without a picture has no score"
    assert mean.exists[0].all() and mean.meta["positions"][1] == []


def test_memory_of_cosines_is_bounded(model_of, monkeypatch) -> None:
    """A small room splits the positions; the numbers stay."""
    from veena_lens.circuits import heads as intention

    model, inputs = ready(model_of, "clip-llama")
    cache, S = cached(model, inputs), directions(model)
    plain = head_intention(cache, S, positions="all").values
    monkeypatch.setattr(intention, "ROOM", 1000)
    assert torch.allclose(head_intention(cache, S, positions="all").values, plain, rtol=0, atol=1e-12)


def test_copying_strength_is_the_ov_product(model_of) -> None:
    model, _ = ready(model_of, "clip-llama")
    S = directions(model)
    strength = copying_strength(model, S)
    block, u = model.blocks[1], unit(S[1])
    for head in range(model.cfg.n_heads):
        expected = (u * block.ln1.weight) @ block.attn.W_V[head] @ block.attn.W_O[head] @ u
        assert torch.allclose(strength.values[1, head], expected, rtol=1e-10, atol=1e-12)


def test_float32_sums_agree_with_float64(model_of) -> None:
    from tests.cases import BY_NAME, counted, raw_inputs

    exact, inputs = ready(model_of, "clip-llama")
    S = directions(exact)
    half = model_of(BY_NAME["clip-llama"], dtype=torch.float32)
    raw = counted(raw_inputs(BY_NAME["clip-llama"], torch.float32))
    small = head_intention(half.inputs_from_hf(**raw), S.float(), model=half)
    assert small.values.dtype == torch.float32
    assert torch.allclose(small.values.double(), head_intention(inputs, S, model=exact).values, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "telling"),
    [
        (dict(direction=torch.ones(3, 5, dtype=torch.float64)), r"direction \[3, 5\] must be .* = \[2 48\]"),
        (dict(direction=torch.zeros(48, dtype=torch.float64)), "of layer 0 is 0"),
        (dict(direction=torch.full((48,), torch.nan, dtype=torch.float64)), "NaN"),
        (dict(kind="angle"), "kind='angle' must be one of cosine, projection"),
        (dict(at_layer=9), "layer 9 does not exist; the model has layers 0 to 1"),
        (dict(layers=[]), "list of layers is empty"),
        (dict(positions="answer"), "select no position"),
        (dict(reduce="sum"), "must be one of mean, max, none"),
    ],
)
def test_bad_input_says_what_is_wrong(options: dict[str, Any], telling: str, model_of) -> None:
    model, inputs = ready(model_of, "clip-llama")
    cache = cached(model, inputs)
    with pytest.raises(ValueError, match=telling):
        head_intention(cache, **{"direction": directions(model), **options})


def test_missing_activations_are_named_with_their_layers(model_of) -> None:
    model, inputs = ready(model_of, "window-mistral")
    S = directions(model)
    _, cache = model.run_with_cache(inputs, names_filter=["blocks.0.attn.hook_z"])
    with pytest.raises(MissingActivation, match=r"lacks attn.hook_z of layers 1\. .*names_filter"):
        head_intention(cache, S)
    assert head_intention(cache, S, layers=[0]).labels["layer"] == [0]
    with pytest.raises(MissingActivation, match="hook_embed; hook_attn_out of layers 0, 1; hook_mlp_out"):
        direct_attribution(cache, S)


def test_what_belongs_to_nothing_is_refused(model_of, tmp_path) -> None:
    from veena_lens.activation_cache import ActivationCache

    model, inputs = ready(model_of, "clip-llama")
    cache, S = cached(model, inputs), directions(model)
    loaded = ActivationCache.load(cache.save(tmp_path / "cache.safetensors"))
    with pytest.raises(ValueError, match="pass model="):
        head_intention(loaded, S)
    assert torch.equal(head_intention(loaded, S, model=model).values, head_intention(cache, S).values)
    _, sliced = model.run_with_cache(inputs, pos_slice=-1)
    with pytest.raises(ValueError, match="sliced or made without its inputs"):
        head_intention(sliced, S)
    with pytest.raises(ValueError, match="pairs need the same rows"):
        head_intention(cache, S, positions="query", baseline=cached(model, inputs[:1]))


def test_embedded_model_gives_scores_of_its_pairs() -> None:
    """Difference pushes of two bundled pairs, read at one layer, add up to how far the stream moved."""
    from veena_lens import HookedVLM
    from veena_lens.checkpoints import bundled_pairs

    model = HookedVLM.from_pretrained("tiny-llava-emotion", dtype=torch.float64, casts="none")
    pairs = bundled_pairs()[:2]
    sides = [
        model.prepare(text=[p.prompt for p, _ in pairs], images=[[pair[side].open()] for pair in pairs])
        for side in (0, 1)
    ]
    happy, neutral = (cached(model, side) for side in sides)
    layers = range(model.cfg.n_layers)
    S = torch.stack([(happy.at("last", "resid_post", i) - neutral.at("last", "resid_post", i)).mean(0) for i in layers])
    last = model.cfg.n_layers - 1
    pushes = direct_attribution(happy, S, baseline=neutral, at_layer=last)
    assert torch.allclose(pushes.values.sum(-1).mean(), S[last].norm(), rtol=1e-10, atol=1e-10)
    heads = head_intention(happy, S, baseline=neutral)
    assert heads.shape == (2, model.cfg.n_layers, model.cfg.n_heads) and heads.values.abs().max() <= 1
