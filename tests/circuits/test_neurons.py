"""Neurons' pushes add up to the MLP's, tables hold what was planted, tokens and drivers equal the plain computation."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import torch

from tests.circuits.tiny import NAMES, directions, ready, twin, unit
from veena_lens.activation_cache import MissingActivation
from veena_lens.circuits.neurons import (
    classify_neurons,
    max_activating_tokens,
    neuron_trace,
    promoted_tokens,
    row_logits,
    top_neurons,
)
from veena_lens.scores import Scores


@pytest.mark.parametrize("name", [*NAMES, "mlp-bias"])
def test_neurons_add_up_to_the_difference_of_mlp_outputs(name: str, model_of) -> None:
    """Method, section 8: sum over n of (a+ - a-) <W_out[n], S> = <Delta mlp_out, S>; the bias cancels."""
    model, inputs = ready(model_of, name)
    S, other = directions(model), twin(inputs)
    with torch.no_grad():
        first, second = (model.run_with_cache(run)[1] for run in (inputs, other))
    for at in ("last", "query"):
        trace = neuron_trace(first, S, positions=at, baseline=second, reduce="none")
        for layer in range(model.cfg.n_layers):
            from_layer = trace.values[:, layer].sum(1)
            names = [cache.at(at, "mlp_out", layer) for cache in (first, second)]
            expected = (names[0] - names[1]) @ unit(S[layer])
            expected = expected[:, None] if at == "last" else expected
            there = trace.exists[:, layer, 0]
            assert torch.allclose(from_layer[there], expected[there], rtol=0, atol=1e-10)
    raw = neuron_trace(first, S, kind="raw")
    bias = torch.stack([block.mlp.b_out.detach() for block in model.blocks])
    expected = torch.stack(
        [(first.at("last", "mlp_out", i) - bias[i]) @ unit(S[i]) for i in range(model.cfg.n_layers)], 1
    )
    assert torch.allclose(raw.values.sum(-1), expected, rtol=0, atol=1e-10)


def test_inputs_give_what_their_cache_gives(model_of) -> None:
    model, inputs = ready(model_of, "qwen3_vl-plain")
    S, other = directions(model), twin(inputs)
    caches = [model.run_with_cache(run)[1] for run in (inputs, other)]
    from_cache = neuron_trace(caches[0], S, positions="query", baseline=caches[1])
    from_inputs = neuron_trace(inputs, S, positions="query", baseline=other, model=model)
    assert from_inputs.axes == ("pair", "layer", "neuron")
    assert torch.allclose(from_inputs.values, from_cache.values, rtol=0, atol=1e-12)


def test_contrast_reads_each_class_against_the_mean(model_of) -> None:
    model, inputs = ready(model_of, "clip-llama")
    stack = torch.stack([directions(model, seed) for seed in (1, 2, 3)])
    trace = neuron_trace(
        inputs, stack, kind="contrast", baseline=twin(inputs), classes=["joy", "fear", "awe"], model=model
    )
    assert trace.axes == ("pair", "category", "layer", "neuron") and trace.labels["category"] == ["joy", "fear", "awe"]
    for i, name in enumerate(trace.labels["category"]):
        alone = neuron_trace(inputs, stack[i] - stack.mean(0), baseline=twin(inputs), model=model)
        chosen = trace.select(category=name)
        assert torch.allclose(chosen.values, alone.values, rtol=0, atol=1e-12)
    raw = neuron_trace(inputs, stack, kind="contrast", model=model, reduce="none", positions="query")
    assert raw.axes == ("batch", "category", "layer", "neuron", "pos")


def made_up(values: torch.Tensor) -> Scores:
    return Scores(values, ("pair", "layer", "neuron"), {"layer": [3, 5]})


def test_top_neurons_are_large_and_consistent() -> None:
    values = 0.01 * torch.randn(10, 2, 50, dtype=torch.float64)
    values[:, 0, 7] = 2.0
    values[:, 1, 4] = 1.0
    values[:, 1, 9] = -3.0
    values[:, 0, 20] = torch.tensor([9.0] * 6 + [-1.0] * 4)  # large in the mean, yet of either sign
    table = top_neurons(made_up(values), k=2)
    assert table[["layer", "neuron"]].values.tolist() == [[3, 7], [5, 4]]
    assert table["value"].tolist() == [2.0, 1.0] and table["consistency"].tolist() == [1.0, 1.0]
    assert top_neurons(made_up(values), k=1, by="abs")[["layer", "neuron"]].values.tolist() == [[5, 9]]
    assert top_neurons(made_up(values), k=1, consistency=0.6)[["layer", "neuron"]].values.tolist() == [[3, 20]]
    with pytest.raises(ValueError, match=r"axes are \('pair', 'category'"):
        top_neurons(Scores(torch.zeros(2, 2, 2, 2), ("pair", "category", "layer", "neuron")))


@pytest.mark.parametrize("name", ["clip-llama", "tied-qwen2", "qwen3_vl-plain"])
def test_promoted_tokens_are_those_of_the_scaled_row(name: str, model_of) -> None:
    from tests.cases import BY_NAME

    model = model_of(BY_NAME[name], casts="none") if name in BY_NAME else ready(model_of, name)[0]
    both = promoted_tokens(model, -1, [5, -1], k=4)
    last = model.cfg.n_layers - 1
    for neuron in (5, model.cfg.d_mlp - 1):
        logits = (model.blocks[last].mlp.W_out[neuron] * model.ln_final.weight) @ model.W_U
        order = logits.argsort(descending=True)
        at = both.labels["neuron"].index(neuron)
        assert both.meta["tokens"][at] == [order[:4].tolist(), order.flip(0)[:4].tolist()]
        assert torch.allclose(both.values[at, 0], logits[order[:4]])
        assert torch.allclose(both.values[at, 1], logits[order.flip(0)[:4]])
    single = promoted_tokens(model, last, 5, k=4)
    assert single.axes == ("sign", "rank") and torch.allclose(single.values, both.values[0], rtol=0, atol=1e-12)
    assert single.meta["tokens"] == both.meta["tokens"][0]


@pytest.mark.parametrize("name", ["three-images-and-none", "llava-next", "qwen2_vl-image-and-video"])
def test_drivers_are_the_largest_activations_of_all_batches(name: str, model_of) -> None:
    model, inputs = ready(model_of, name)
    batches = [inputs[:1], inputs[1:], twin(inputs)]
    found = max_activating_tokens(model, batches, layer=-1, neurons=[2, 11], k=6)
    assert found.meta["rows"] == 2 * len(inputs)
    for i, neuron in enumerate((2, 11)):
        every = []
        for number, run in enumerate((inputs, twin(inputs))):
            with torch.no_grad():
                a = model.run_with_cache(run)[1]["post", model.cfg.n_layers - 1][..., neuron]
            for row in range(len(run)):
                every += [
                    (float(a[row, p]), number * len(inputs) + row) for p in run.attention_mask[row].nonzero().flatten()
                ]
        every.sort(key=lambda pair: -pair[0])
        assert found.values[i].tolist() == pytest.approx([value for value, _ in every[:6]], abs=1e-9)
        assert [place["row"] for place in found.meta["where"][i]] == [row for _, row in every[:6]]


@pytest.mark.parametrize("name", ["clip-llama", "llava-next", "qwen2_vl-image-and-video"])
def test_drivers_say_where_in_the_picture_they_stand(name: str, model_of) -> None:
    model, inputs = ready(model_of, name)
    found = max_activating_tokens(model, inputs, layer=0, neurons=[0], k=10_000)
    places = {(place["row"], place["pos"]): place for place in found.meta["where"][0]}
    assert len(places) == int(inputs.attention_mask.sum())
    for row, images in enumerate(inputs.grids):
        for image, (height, width) in enumerate(images):
            cells = inputs.grid_tokens(row, image)
            for y in range(height):
                for x in range(width):
                    place = places[row, int(cells[y, x])]
                    assert place["image"] == image and place["cell"] == [y, x]
    text = [p for p in places.values() if "image" not in p]
    assert len(text) == int((inputs.attention_mask & ~inputs.image_mask).sum())
    assert (found.values[0].diff() <= 0).all()


def test_drivers_keep_few_positions_and_either_sign(model_of) -> None:
    model, inputs = ready(model_of, "right-padding")
    last = max_activating_tokens(model, inputs, layer=1, neurons=[3], k=50, positions="last")
    assert last.shape == (1, 3) and {p["pos"] for p in last.meta["where"][0]} == {s.last for s in inputs.spans}
    size = max_activating_tokens(model, inputs, layer=1, neurons=[3], k=50, by="abs").values[0].abs()
    assert (size.diff() <= 0).all()


def test_kinds_follow_the_rule(model_of) -> None:
    """Neuron 4 of the last layer is made to write a lexicon of tokens, and neuron 6 to lower it."""
    import copy

    from tests.cases import BY_NAME

    model = copy.deepcopy(model_of(BY_NAME["text-llama"], casts="none"))
    lexicon = [40, 41, 42, 43]
    with torch.no_grad():
        word = (torch.linalg.pinv(model.W_U)[lexicon].sum(0)) / model.ln_final.weight
        for layer in (0, 1):
            model.blocks[layer].mlp.W_out[4] = 30 * word
            model.blocks[layer].mlp.W_out[6] = -30 * word
    S = word[None].expand(2, -1).detach().clone()
    table = pd.DataFrame(dict(layer=[1, 1, 1, 0, 0], neuron=[4, 6, 6, 4, 9], value=[1.0, 1.0, -1.0, 1.0, 1.0]))
    assert set(promoted_tokens(model, 1, 4, k=4).meta["tokens"][0]) == set(lexicon)
    last = classify_neurons(model, table, lexicon, S, key_layer=0, positions="last")
    # Neuron 6 with a push along the direction must be active the other way round, where it speaks of the lexicon too.
    assert last["lexicon_tokens"].tolist()[:2] == [4, 4] and last["lexicon_tokens"][2] < 3
    assert last["kind"].tolist() == ["explicit state", "explicit state", "unlabelled", "explicit state", "unlabelled"]
    image = classify_neurons(model, table, lexicon, S, key_layer=0, positions="image")
    assert image["kind"].tolist()[3:] == ["unlabelled", "unlabelled"] and "not tested" in image["why"][4]
    told = classify_neurons(model, table, lexicon, S, key_layer=0, positions="query", confirmed={(0, 9)})
    assert told["kind"].tolist()[3:] == ["unlabelled", "contextual trigger"] and "early" in told["why"][3]
    refused = classify_neurons(model, table, lexicon, S, key_layer=0, positions="query", confirmed=set())
    assert refused["kind"][4] == "unlabelled" and "not confirmed" in refused["why"][4]


def test_row_logits_center_the_rows_of_layer_norms(model_of) -> None:
    from types import SimpleNamespace

    model, _ = ready(model_of, "clip-llama")
    centred = SimpleNamespace(
        cfg=SimpleNamespace(normalization_type="LN"), blocks=model.blocks, ln_final=model.ln_final, W_U=model.W_U
    )
    row = model.blocks[0].mlp.W_out[3]
    expected = ((row - row.mean()) * model.ln_final.weight) @ model.W_U
    assert torch.allclose(row_logits(centred, 0, [3])[0], expected)


@pytest.mark.parametrize(
    ("call", "telling"),
    [
        (lambda m, i, S: neuron_trace(i, S, model=m), "give baseline=, or kind='raw'"),
        (lambda m, i, S: neuron_trace(i, S, kind="raw", baseline=i, model=m), "leave baseline out"),
        (lambda m, i, S: neuron_trace(i, S, kind="sum", model=m), "kind='sum' must be one of direct, contrast, raw"),
        (lambda m, i, S: neuron_trace(i, S, kind="contrast", model=m), r"\[2 or more, 2, 48\], not \[2, 48\]"),
        (
            lambda m, i, S: neuron_trace(i, torch.stack([S, 2 * S]), kind="contrast", classes=["a"], model=m),
            "1 classes",
        ),
        (lambda m, i, S: neuron_trace(i, S, kind="raw"), "pass model="),
        (lambda m, i, S: promoted_tokens(m, 0, 96), "neuron 96 does not exist; there are 96"),
        (lambda m, i, S: max_activating_tokens(m, i, 5, [0]), "layer 5 does not exist"),
        (lambda m, i, S: max_activating_tokens(m, i, 0, []), "list of neurons is empty"),
        (lambda m, i, S: max_activating_tokens(m, [], 0, [1]), "there is no batch"),
        (lambda m, i, S: max_activating_tokens(m, i, 0, [1], by="size"), "'value' or 'abs'"),
        (lambda m, i, S: classify_neurons(m, pd.DataFrame({"layer": [0]}), [1], S, 0), "lacks the column 'neuron'"),
        (lambda m, i, S: classify_neurons(m, pd.DataFrame(), ["joy"], S, 0), "needs a model with a tokenizer"),
        (lambda m, i, S: classify_neurons(m, pd.DataFrame(), [], S, 0), "lexicon is empty"),
    ],
)
def test_bad_input_says_what_is_wrong(call: Any, telling: str, model_of) -> None:
    model, inputs = ready(model_of, "clip-llama")
    with pytest.raises(ValueError, match=telling):
        call(model, inputs, directions(model))


def test_missing_activations_are_named_with_their_layers(model_of) -> None:
    model, inputs = ready(model_of, "clip-llama")
    _, cache = model.run_with_cache(inputs, names_filter=["blocks.0.mlp.hook_post"])
    with pytest.raises(MissingActivation, match="lacks mlp.hook_post of layers 1"):
        neuron_trace(cache, directions(model), kind="raw")
