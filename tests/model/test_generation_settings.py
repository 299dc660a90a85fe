"""Every setting of transformers' GenerationConfig is followed or refused; HookedTransformer's arguments act."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

from tests.cases import BY_NAME, PAD, build_hf, counted, raw_inputs, tiny_tokenizer
from veena_lens.model.generation_settings import FOLLOWED, WITHOUT_EFFECT, frequency_penalty

NAMES = sorted(vars(transformers.GenerationConfig()))
END = 3
# A value of each followed setting that changes what is said.
STRONG: dict[str, Any] = dict(
    temperature=0.3, top_k=2, top_p=0.2, top_h=0.3, min_p=0.5, typical_p=0.3, epsilon_cutoff=0.05, eta_cutoff=0.3,
    repetition_penalty=3.0, encoder_repetition_penalty=5.0, no_repeat_ngram_size=1, encoder_no_repeat_ngram_size=1,
    min_length=22, min_new_tokens=9, bad_words_ids=[[7], [8, 9]], sequence_bias=[[[11], 40.0]],
    suppress_tokens=list(range(20, 110)), begin_suppress_tokens=list(range(20, 110)), forced_bos_token_id=5,
    forced_eos_token_id=END, exponential_decay_length_penalty=(2, 3.0), remove_invalid_values=True,
    stop_strings=["w11"], max_time=1e-9,
)  # fmt: skip
SAMPLING = ("temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    """A text model that says many tokens, Hugging Face's and ours."""
    from veena_lens import HookedVLM

    hf = build_hf(BY_NAME["text-llama"], gain=5.0)
    hf.generation_config = transformers.GenerationConfig(eos_token_id=END, pad_token_id=PAD)
    return hf, HookedVLM.from_hf(hf, processor=copy.deepcopy(tiny_tokenizer()))


@pytest.fixture
def inputs(pair: tuple[Any, Any]) -> Any:
    return pair[1].inputs_from_hf(**counted(raw_inputs(BY_NAME["text-llama"])))


def with_setting(pair: tuple[Any, Any], name: str, value: Any) -> Any:
    """Return the config with one setting, for both models."""
    config = transformers.GenerationConfig(eos_token_id=END, pad_token_id=PAD)
    setattr(config, name, value)
    pair[0].generation_config = pair[1].generation_config = config
    return config


def test_every_followed_setting_is_one_that_the_test_changes() -> None:
    assert set(STRONG) == set(FOLLOWED) and set(FOLLOWED) | set(WITHOUT_EFFECT) <= set(NAMES)


@pytest.mark.parametrize("name", [n for n in FOLLOWED if n not in (*SAMPLING, "stop_strings")])
def test_followed_setting_says_what_hugging_face_says(name: str, pair: tuple[Any, Any], inputs: Any) -> None:
    hf, model = pair
    with_setting(pair, name, STRONG[name])
    ours = model.generate(inputs, max_new_tokens=12, return_type="tokens")
    raw = dict(input_ids=inputs.tokens, attention_mask=inputs.attention_mask.long())
    theirs = hf.generate(**raw, max_new_tokens=12, do_sample=False, tokenizer=model.tokenizer)[:, inputs.shape[1] :]
    assert ours.tolist() == theirs.tolist()


def test_stop_strings_of_the_config_stop() -> None:
    """Of a checkpoint whose tokenizer writes spaces, as transformers' criterion asks."""
    from veena_lens import HookedVLM

    model = HookedVLM.from_pretrained("tiny-llava-emotion")
    (free,) = model.generate("the person", 10)
    word = free.split()[2]
    (short,) = model.generate("the person", 10, stop_strings=[word])
    model.generation_config.stop_strings = [word]
    assert model.generate("the person", 10) == [short] and short.endswith(word) and len(short) < len(free)


@pytest.mark.parametrize("name", SAMPLING)
def test_followed_setting_of_sampling_draws_as_hugging_face_draws(
    name: str, pair: tuple[Any, Any], inputs: Any
) -> None:
    hf, model = pair
    with_setting(pair, name, STRONG[name])
    raw = dict(input_ids=inputs.tokens[-1:], attention_mask=inputs.attention_mask[-1:].long())
    plain: dict[str, Any] = dict(max_new_tokens=12, do_sample=True)
    torch.manual_seed(5)
    ours = model.generate(inputs[-1], return_type="tokens", **plain)
    torch.manual_seed(5)
    # Without a value transformers keeps the best 50.
    wanted = {} if name == "top_k" else dict(top_k=0)
    theirs = hf.generate(**raw, **plain, **wanted)[:, inputs.shape[1] :]
    assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("name", [n for n in NAMES if n not in FOLLOWED and n not in WITHOUT_EFFECT])
def test_setting_that_is_not_followed_is_refused(name: str, pair: tuple[Any, Any], inputs: Any) -> None:
    _, model = pair
    with_setting(pair, name, 3)
    with pytest.raises(ValueError, match=rf"sets {name}=3.*does not follow"):
        model.generate(inputs, max_new_tokens=2)
    for neutral in (None, False, getattr(transformers.GenerationConfig(), name)):
        with_setting(pair, name, neutral)
        model.generate(inputs, max_new_tokens=2, return_type="tokens")


# --- arguments of HookedTransformer ----------------------------------------------------------------------
@pytest.fixture
def model(pair: tuple[Any, Any]) -> Any:
    with_setting(pair, "eos_token_id", END)
    return pair[1]


def test_settings_go_by_name(model: Any) -> None:
    tokens = torch.tensor([[5, 6]])
    for call in (model.generate, model.generate_stream):
        with pytest.raises(TypeError, match="by name"):
            call(tokens, 5, True)
        with pytest.raises(TypeError, match="'temprature'. Did you mean temperature"):
            call(tokens, temprature=1.0)
        with pytest.raises(TypeError, match="one input"):
            call(max_new_tokens=3)
    assert torch.equal(
        model.generate(input=tokens, max_new_tokens=3, return_type="tokens", verbose=False),
        model.generate(tokens, 3, return_type="tokens"),
    )


def test_end_tokens_can_be_ignored(model: Any) -> None:
    tokens = torch.tensor([[5, 6]])
    free = model.generate(tokens, 12, return_type="tokens", stop_at_eos=False)
    assert free.shape == (1, 12)
    end = int(free[0, 4])
    assert model.generate(tokens, 12, return_type="tokens", eos_token_id=end).shape[1] <= 5
    assert torch.equal(model.generate(tokens, 12, return_type="tokens", eos_token_id=end, stop_at_eos=False), free)


def test_temperature_of_zero_is_greedy(model: Any) -> None:
    options: dict[str, Any] = dict(max_new_tokens=8, return_type="tokens")
    greedy = model.generate("w5 w6", **options)
    assert torch.equal(model.generate("w5 w6", do_sample=True, temperature=0, **options), greedy)
    assert torch.equal(model.generate("w5 w6", do_sample=True, temperature=0.0, top_k=3, **options), greedy)


@torch.no_grad()
def test_frequency_penalty_lowers_by_the_times_said(model: Any) -> None:
    inputs = model.as_inputs(["w5 w6 w5", "w7"])
    scores = torch.zeros(2, model.cfg.d_vocab)
    new = torch.tensor([[6], [7]])
    lowered = frequency_penalty(2.0, inputs)(torch.cat([inputs.tokens, new], 1), scores)
    assert lowered[0, [5, 6, 7, 1]].tolist() == [-4, -4, 0, -2] and lowered[1, [7, 1, 0]].tolist() == [-4, -2, 0]
    options: dict[str, Any] = dict(max_new_tokens=20, do_sample=True, seed=0, return_type="tokens", stop_at_eos=False)
    out = model.generate("w5", freq_penalty=1e4, **options)[0].tolist()
    assert len(set(out)) == 20 and len(set(model.generate("w5", **options)[0].tolist())) < 20
    with pytest.raises(ValueError, match="freq_penalty=-1"):
        model.generate("w5", freq_penalty=-1)


def test_return_types_hold_prompt_and_completion(model: Any) -> None:
    tokens, n = torch.tensor([[1, 5, 6], [1, 7, 8]]), 4
    new = model.generate(tokens, n, return_type="tokens", stop_at_eos=False)
    whole = torch.cat([tokens, new], 1)
    options: dict[str, Any] = dict(max_new_tokens=n, stop_at_eos=False)
    assert torch.equal(model.generate(tokens, return_type="input", **options), whole)
    assert torch.equal(model.generate(tokens, return_type="tensor", **options), whole)
    assert torch.equal(model.generate(tokens[0], return_type="input", **options), whole[:1])
    assert torch.equal(model.generate(["w5 w6", "w7 w8"], return_type="tensor", **options), whole)
    texts = [model.tokenizer.decode(row, skip_special_tokens=True) for row in whole]
    assert model.generate(["w5 w6", "w7 w8"], return_type="input", **options) == texts
    assert model.generate("w5 w6", return_type="input", **options) == texts[0]
    prepared = model.as_inputs(tokens)
    again = model.generate(prepared, return_type="input", **options)
    assert torch.equal(again.tokens, whole) and again.spans[0].answer == slice(3, 3 + n)
    with torch.no_grad():
        assert torch.equal(model.generate(tokens, return_type="embeds", **options), model.embed(whole))


def test_padded_texts_of_another_length_are_returned_without_pads(model: Any) -> None:
    options: dict[str, Any] = dict(max_new_tokens=3, stop_at_eos=False, return_type="input")
    short, _ = model.generate(["w5", "w7 w8 w9"], **options)
    assert short == model.generate("w5", **options) and short.startswith("w5 w")


def test_raw_text_and_its_bos_token(model: Any) -> None:
    """A text model without a chat template takes raw text."""
    assert model.processor.chat_template is None
    options: dict[str, Any] = dict(max_new_tokens=4, return_type="tokens", stop_at_eos=False)
    expected = model.generate(torch.tensor([[5, 6]]), **options)
    assert torch.equal(model.generate("w5 w6", prepend_bos=False, **options), expected)
    assert torch.equal(model.generate("w5 w6", **options), model.generate(torch.tensor([[1, 5, 6]]), **options))
    assert torch.equal(
        model.generate("w5 w6", chat=False, padding_side="left", **options), model.generate("w5 w6", **options)
    )


def test_caches_logits_and_tokens_come_with_it(model: Any) -> None:
    tokens = torch.tensor([[1, 5, 6], [1, 7, 8]])
    plain = model.generate(tokens, 4, return_type="tokens", stop_at_eos=False)
    out, cache, prompt = model.generate(
        tokens, 4, return_type="tokens", stop_at_eos=False, output_logits=True, return_cache=True,
        return_input_tokens=True, names_filter="blocks.1.hook_resid_post",
    )  # fmt: skip
    assert torch.equal(out.sequences, plain) and torch.equal(prompt, tokens) and len(out.logits) == 4
    assert torch.equal(torch.stack(out.logits, 1).argmax(-1), plain)
    with torch.no_grad():
        _, expected = model.run_with_cache(torch.cat([tokens, plain], 1), names_filter="blocks.1.hook_resid_post")
    assert list(cache) == ["blocks.1.hook_resid_post"]
    torch.testing.assert_close(cache["resid_post", 1], expected["resid_post", 1])


@pytest.mark.parametrize("stride", [1, 3, 50])
def test_streams_join_to_what_is_generated(model: Any, stride: int) -> None:
    tokens = torch.tensor([[1, 5, 6], [1, 7, 8]])
    options: dict[str, Any] = dict(max_new_tokens=8, stop_at_eos=False)
    new = model.generate(tokens, return_type="tokens", **options)
    for return_type, expected in (("tokens", new), ("input", torch.cat([tokens, new], 1))):
        pieces = list(model.generate_stream(tokens, return_type=return_type, max_tokens_per_yield=stride, **options))
        assert torch.equal(torch.cat(pieces, 1), expected) and len(pieces) == -(-8 // stride)
    for return_type in ("str", "input"):
        pieces = list(
            model.generate_stream(
                "w5 w6", return_type=return_type, max_tokens_per_yield=stride, verbose=False, **options
            )
        )
        whole = model.generate("w5 w6", return_type=return_type, **options)
        assert "".join(pieces) == (whole[0] if return_type == "str" else whole)


def test_stream_of_tokens_needs_no_tokenizer() -> None:
    from veena_lens import HookedVLM

    model = HookedVLM.from_hf(build_hf(BY_NAME["text-llama"]))
    pieces = list(model.generate_stream(torch.tensor([[5, 6]]), 3, return_type="tokens", stop_at_eos=False))
    assert [piece.shape for piece in pieces] == [(1, 1)] * 3
    with pytest.raises(ValueError, match="tokenizer"):
        list(model.generate_stream(torch.tensor([[5, 6]]), 3))
