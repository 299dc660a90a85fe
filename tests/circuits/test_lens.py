"""The logit lens equals norm and unembedding done plainly, at every position of every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.circuits.tiny import NAMES, ready
from veena_lens.activation_cache import MissingActivation
from veena_lens.circuits.lens import logit_lens, logit_lens_grid
from veena_lens.positions import position_mask


@pytest.mark.parametrize("name", NAMES)
def test_last_layer_says_what_the_model_predicts(name: str, model_of) -> None:
    model, inputs = ready(model_of, name)
    with torch.no_grad():
        expected = model(inputs).log_softmax(-1)
    lens = logit_lens(model, inputs, tokens=[3, 50, 90], layers=[-1])
    assert lens.axes == ("batch", "layer", "pos", "token") and lens.unit == "log probability"
    assert not lens.values.requires_grad
    # Features that join after the last block are no layer's: image tokens then say something else yet.
    joins_later = model.cfg.n_deepstack >= model.cfg.n_layers
    for row, places in enumerate(lens.meta["positions"]):
        got, wanted = lens.values[row, 0, : len(places)], expected[row, places][:, [3, 50, 90]]
        same = (got - wanted).abs().amax(-1) < 1e-10
        assert same.equal(~inputs.image_mask[row, places]) if joins_later else same.all()
        assert lens.exists[row].all(-1).sum() == len(places)


@pytest.mark.parametrize("name", ["right-padding", "llava-next", "tied-qwen2"])
def test_inner_layers_go_through_norm_and_unembedding(name: str, model_of) -> None:
    from tests.cases import BY_NAME, counted, raw_inputs

    if name == "tied-qwen2":
        model = model_of(BY_NAME[name], casts="none")
        inputs = model.inputs_from_hf(**counted(raw_inputs(BY_NAME[name])))
    else:
        model, inputs = ready(model_of, name)
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
        logits = [model.unembed(model.ln_final(cache["resid_post", layer])) for layer in range(model.cfg.n_layers)]
    chosen = position_mask(inputs, "image")
    for source in (cache, inputs):
        for values, f in (
            ("logit", lambda x: x),
            ("prob", lambda x: x.softmax(-1)),
            ("log_prob", lambda x: x.log_softmax(-1)),
        ):
            lens = logit_lens(model, source, "image", values=values, k=3)
            for row in range(len(inputs)):
                n = int(chosen[row].sum())
                for layer in range(model.cfg.n_layers):
                    top = f(logits[layer][row, chosen[row]]).topk(3, dim=-1)
                    assert torch.allclose(lens.values[row, layer, :n], top.values, rtol=0, atol=1e-10)
                    assert lens.meta["tokens"][row][layer] == top.indices.tolist()
    assert lens.axes[-1] == "rank"


def test_positions_in_pieces_give_the_same(model_of, monkeypatch) -> None:
    from veena_lens.circuits import lens as module

    model, inputs = ready(model_of, "clip-llama")
    plain = logit_lens(model, inputs)
    monkeypatch.setattr(module, "ROOM", 500)
    pieces = logit_lens(model, inputs)
    assert torch.allclose(pieces.values, plain.values, rtol=0, atol=1e-12) and pieces.meta == plain.meta


@pytest.mark.parametrize("name", ["clip-llama", "llava-next", "qwen3_vl-plain"])
def test_map_has_each_patch_in_its_place(name: str, model_of) -> None:
    model, inputs = ready(model_of, name)
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
    for row, images in enumerate(inputs.grids):
        for image, grid in enumerate(images):
            for source in (inputs, cache):
                maps = logit_lens_grid(model, source, 17, row=row, image=image, values="logit")
                assert maps.axes == ("layer", "height", "width") and maps.shape == (model.cfg.n_layers, *grid)
                for layer in range(model.cfg.n_layers):
                    with torch.no_grad():
                        resid = cache.image_grid("resid_post", layer, row=row, image=image)
                        expected = model.unembed(model.ln_final(resid))[..., 17]
                    assert torch.allclose(maps.values[layer], expected, rtol=0, atol=1e-10)
    many = logit_lens_grid(model, inputs, [17, 4], layers=[1])
    assert many.axes == ("token", "layer", "height", "width") and many.labels["token"] == [17, 4]
    assert torch.allclose(many.values[0], logit_lens_grid(model, inputs, 17, layers=[1]).values, rtol=0, atol=1e-12)


def test_whole_view_of_a_tiled_picture_has_its_own_map(model_of) -> None:
    model, inputs = ready(model_of, "llava-next")
    maps = logit_lens_grid(model, inputs, 5, row=2, grid="whole", layers=[0], values="logit")
    span, side = inputs.spans[2].images[0], maps.shape[-1]
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
        resid = cache["resid_post", 0][2, span.start : span.start + side * side]
        expected = model.unembed(model.ln_final(resid[None]))[0, :, 5]
    assert torch.allclose(maps.values[0].flatten(), expected, rtol=0, atol=1e-10)


def test_embedded_model_reads_words_off_its_stream() -> None:
    """The last line at the last position begins the model's own answer; texts stand beside their ids."""
    from veena_lens import HookedVLM
    from veena_lens.checkpoints import bundled_pairs

    model = HookedVLM.from_pretrained("tiny-llava-emotion")
    picture = bundled_pairs()[0][0]
    inputs = model.prepare(text=picture.prompt, images=picture.open())
    lens = logit_lens(model, inputs, "last")
    answer = model.generate(inputs, max_new_tokens=1, do_sample=False, return_type="tokens")
    first = lens.meta["tokens"][0][-1][0][0]
    assert first == int(answer[0, 0]) and lens.meta["texts"][str(first)] == model.tokenizer.decode([first])
    maps = logit_lens_grid(model, inputs, " happy")
    assert maps.shape[1:] == inputs.grids[0][0] and maps.values.exp().max() <= 1


@pytest.mark.parametrize(
    ("call", "telling"),
    [
        (lambda m, i: logit_lens(m, i, values="odds"), "values='odds' must be one of log_prob, prob, logit"),
        (lambda m, i: logit_lens(m, i, tokens=[]), "list of tokens is empty"),
        (lambda m, i: logit_lens(m, i, tokens=[128]), "token id 128 is outside the vocabulary of 128"),
        (lambda m, i: logit_lens(m, i, k=0), "k=0"),
        (lambda m, i: logit_lens(m, i, layers=[4]), "layer 4 does not exist"),
        (lambda m, i: logit_lens(m, i, "answer"), "select no position"),
        (lambda m, i: logit_lens_grid(m, i, 3, row=0, image=1), r"no image 1 in row 0; images per row: \[1, 2\]"),
    ],
)
def test_bad_input_says_what_is_wrong(call: Any, telling: str, model_of) -> None:
    model, inputs = ready(model_of, "clip-llama")
    with pytest.raises(ValueError, match=telling):
        call(model, inputs)


def test_missing_activations_are_named_with_their_layers(model_of) -> None:
    model, inputs = ready(model_of, "clip-llama")
    _, cache = model.run_with_cache(inputs, names_filter=["blocks.1.hook_resid_post"])
    with pytest.raises(MissingActivation, match="lacks hook_resid_post of layers 0"):
        logit_lens(model, cache)
    assert logit_lens(model, cache, layers=[1]).shape[1] == 1
