"""Text generation: streaming, sampling settings, and what the end of a completion is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.cases import BY_NAME, IMAGE_TOKEN, PAD, build_hf, counted, raw_inputs, tiny_tokenizer


@pytest.fixture(scope="module")
def model() -> Any:
    from veena_lens import HookedVLM

    hf = build_hf(BY_NAME["three-images-and-none"], gain=5.0)
    hf.generation_config.eos_token_id, hf.generation_config.pad_token_id = None, PAD
    return HookedVLM.from_hf(hf, processor=tiny_tokenizer())


@pytest.fixture
def inputs(model: Any) -> Any:
    return model.inputs_from_hf(**counted(raw_inputs(BY_NAME["three-images-and-none"])))


SHORT: dict[str, Any] = dict(max_new_tokens=12, do_sample=False)


def test_text_is_the_completions_tokens_without_special_ones(model: Any, inputs: Any) -> None:
    tokens = model.generate(inputs, return_type="tokens", **SHORT)
    texts = model.generate(inputs, **SHORT)
    assert isinstance(texts, list) and len(texts) == 3
    expected = [" ".join(f"w{t}" for t in row if 3 <= t < IMAGE_TOKEN) for row in tokens.tolist()]
    assert [t.replace(" <image>", "").replace("<image> ", "") for t in texts] == expected


def test_streamed_pieces_join_to_the_batchs_text(model: Any, inputs: Any) -> None:
    for options in (SHORT, dict(max_new_tokens=12, do_sample=True, seed=3, temperature=0.8)):
        whole = model.generate(inputs, **options)
        pieces = list(model.generate_stream(inputs, **options))
        assert len(pieces) > 3, "everything came in one piece"
        assert ["".join(piece[row] for piece in pieces) for row in range(3)] == whole


def test_streamed_pieces_of_one_row_are_strings(model: Any, inputs: Any) -> None:
    pieces = list(model.generate_stream(inputs[2], **SHORT))
    assert all(isinstance(piece, str) for piece in pieces)
    assert ["".join(pieces)] == model.generate(inputs[2], **SHORT)


def test_stream_gives_the_first_piece_before_the_rest_is_computed(model: Any, inputs: Any) -> None:
    steps: list[int] = []
    with model.hooks([("unembed.hook_out", lambda value, hook: steps.append(1))]):
        stream = model.generate_stream(inputs[2], **SHORT)
        next(stream)
        assert len(steps) < 4
        stream.close()


def test_stream_that_is_dropped_leaves_nothing(model: Any, inputs: Any) -> None:
    with torch.no_grad():
        before = model(inputs)
    stream = model.generate_stream(inputs, **SHORT)
    next(stream)
    assert torch.is_grad_enabled(), "gradients are off only inside a step"
    with torch.no_grad():
        assert torch.equal(model(inputs), before)
    stream.close()
    assert torch.is_grad_enabled()
    assert torch.equal(model(inputs), before)


def test_unknown_setting_is_refused(model: Any, inputs: Any) -> None:
    with pytest.raises(TypeError, match="temprature"):
        list(model.generate_stream(inputs, temprature=0.5))
    with pytest.raises(TypeError, match="temprature"):
        model.generate(inputs, temprature=0.5)


def test_end_token_ends_a_row_and_is_not_shown(model: Any, inputs: Any) -> None:
    free = model.generate(inputs, return_type="tokens", **SHORT).tolist()
    end = free[0][4]
    out = model.generate(inputs, return_type="tokens", eos_token_id=end, **SHORT).tolist()
    for row, whole in zip(out, free, strict=True):
        n = whole.index(end) + 1 if end in whole else len(whole)
        assert row[:n] == whole[:n] and all(t in (PAD, end) for t in row[n:])
    several = model.generate(inputs, return_type="tokens", eos_token_id=[end, free[1][2]], **SHORT).tolist()
    assert several[1][:3] == free[1][:3] and all(t in (PAD, end, free[1][2]) for t in several[1][3:])


@pytest.mark.parametrize("settings", [
    dict(temperature=0.3, top_k=50), dict(temperature=1.7, top_k=50), dict(top_k=5), dict(top_p=0.3, top_k=50),
    dict(temperature=1.5, top_k=20, top_p=0.9),
], ids=str)  # fmt: skip
def test_sampling_follows_transformers_distribution(settings: dict[str, float], model: Any, inputs: Any) -> None:
    """The first token's frequencies over many rows, against the processed softmax of the same logits."""
    import transformers as hf

    many = inputs[[2] * 400]
    drawn = model.generate(many, max_new_tokens=1, do_sample=True, seed=1, return_type="tokens", **settings)[:, 0]
    with torch.no_grad():
        scores = model(inputs[2])[:, -1].float()
    warpers = hf.LogitsProcessorList()
    if "temperature" in settings:
        warpers.append(hf.TemperatureLogitsWarper(settings["temperature"]))
    warpers.append(hf.TopKLogitsWarper(int(settings["top_k"])))
    if "top_p" in settings:
        warpers.append(hf.TopPLogitsWarper(settings["top_p"]))
    expected = warpers(torch.zeros(1, 1, dtype=torch.long), scores).softmax(-1)[0]
    found = torch.bincount(drawn, minlength=len(expected)) / len(drawn)
    assert not found[expected == 0].any(), "a token was drawn that has no probability"
    assert float((found - expected).abs().sum()) < 4 * float((expected * (1 - expected) / 400).sqrt().sum())


def test_greedy_ignores_sampling_settings(model: Any, inputs: Any) -> None:
    plain = model.generate(inputs, return_type="tokens", **SHORT)
    assert torch.equal(model.generate(inputs, return_type="tokens", temperature=0.1, top_k=2, **SHORT), plain)


def test_default_is_greedy(model: Any, inputs: Any) -> None:
    plain = model.generate(inputs, return_type="tokens", **SHORT)
    assert torch.equal(model.generate(inputs, max_new_tokens=12, return_type="tokens"), plain)


def test_bare_tokens_and_their_mask_are_continued(model: Any) -> None:
    tokens = torch.tensor([[5, 6, 7, 8]])
    out = model.generate(tokens, return_type="tokens", **SHORT)
    ids = tokens
    for _ in range(12):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids)[:, -1:].float().argmax(-1)], 1)
    assert out.tolist() == ids[:, 4:].tolist()


def test_gradient_mode_of_the_caller_is_kept(model: Any, inputs: Any) -> None:
    model.generate(inputs, return_type="tokens", max_new_tokens=1)
    assert torch.is_grad_enabled()
    with torch.inference_mode():
        out = model.generate(inputs, return_type="tokens", **SHORT)
    assert out.tolist() == model.generate(inputs, return_type="tokens", **SHORT).tolist()


def test_pictures_are_encoded_once(model: Any, inputs: Any) -> None:
    calls: list[str] = []
    with model.hooks([("connector.hook_out", lambda value, hook: calls.append(hook.name))]):
        model.generate(inputs, return_type="tokens", **SHORT)
    assert len(calls) == 1


# --- prompts as embeddings -----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def reader() -> Any:
    from veena_lens import HookedVLM

    return HookedVLM.from_hf(build_hf(BY_NAME["text-llama"], gain=5.0), processor=tiny_tokenizer())


@torch.no_grad()
@pytest.mark.parametrize("texts", ["w5 w6 w7", ["w5 w6 w7", "w8"]])
def test_embeddings_of_a_prompt_are_continued_as_its_tokens_are(reader: Any, texts: Any) -> None:
    tokens = reader.to_tokens(texts, padding_side="left")
    embeds, mask = reader.embed(tokens), tokens.attention_mask
    for options in (SHORT, dict(SHORT, use_past_kv_cache=False), dict(max_new_tokens=6, do_sample=True, seed=2)):
        expected = reader.generate(tokens, return_type="tokens", **options)
        said = reader.generate(embeds, attention_mask=mask, return_type="tokens", **options)
        assert torch.equal(said, expected)
        assert reader.generate(input=embeds, attention_mask=mask, **options) == reader.generate(tokens, **options)
        for kind in ("input", "embeds"):
            whole = reader.generate(embeds, attention_mask=mask, return_type=kind, **options)
            assert torch.equal(whole, torch.cat([embeds, reader.embed(expected)], 1))
    out = reader.generate(embeds, attention_mask=mask, return_cache=True, output_logits=True, **SHORT)
    given = reader.generate(tokens, return_cache=True, output_logits=True, **SHORT)
    torch.testing.assert_close(out[0].logits, given[0].logits)
    real = given[1].inputs.attention_mask
    torch.testing.assert_close(out[1]["resid_post", 1][real], given[1]["resid_post", 1][real])


@torch.no_grad()
@pytest.mark.parametrize("how, message", [
    (dict(repetition_penalty=1.2), "repetition_penalty needs the prompt's tokens"),
    (dict(freq_penalty=0.5, do_sample=True), "freq_penalty needs"),
    (dict(no_repeat_ngram_size=2), "no_repeat_ngram_size needs"),
    (dict(return_type="tensor"), "return_type='tensor' needs"),
    (dict(return_input_tokens=True), "return_input_tokens needs"),
    (dict(attention_mask=torch.tensor([[1, 1, 0]])), "padded on the left"),
], ids=str)  # fmt: skip
def test_what_embeddings_do_not_tell_is_refused(how: Any, message: str, reader: Any) -> None:
    embeds = reader.embed(torch.tensor([[5, 6, 7]]))
    with pytest.raises(ValueError, match=message):
        reader.generate(embeds, **how)
    assert reader.generate(embeds, repetition_penalty=1.0, freq_penalty=0.0, max_new_tokens=1)
    with pytest.raises(ValueError, match="a residual .batch pos 48."):
        reader.generate(embeds[..., :7])


def test_embeddings_of_a_model_whose_images_need_more_are_refused() -> None:
    from veena_lens import HookedVLM

    model = HookedVLM.from_hf(build_hf(BY_NAME["gemma3-narrow-window"]))
    with pytest.raises(ValueError, match="Give prepared inputs, tokens or text"):
        model.generate(model.embed(torch.tensor([[5, 6, 7]])), return_type="tokens")
