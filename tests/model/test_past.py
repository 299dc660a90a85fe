"""A pass that goes on from an earlier one equals the pass over everything: HookedTransformer's `past_kv_cache`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

from tests.cases import BY_NAME, build_hf, counted, raw_inputs, tiny_tokenizer

CASES = ("text-llama", "text-mistral", "text-qwen3")


def make_model(name: str) -> Any:
    from veena_lens import HookedVLM

    return HookedVLM.from_hf(build_hf(BY_NAME[name], gain=3.0), processor=tiny_tokenizer())


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: make_model(name) for name in CASES}


@pytest.fixture
def model(models: dict[str, Any]) -> Any:
    return models["text-llama"]


def empty(model: Any, rows: int = 1) -> Any:
    return TransformerLensKeyValueCache.init_cache(model.cfg, model.cfg.device, rows)


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
@settings(max_examples=4, phases=[Phase.generate])
@given(data=st.data())
def test_passes_in_pieces_equal_the_whole(name: str, models: dict[str, Any], data: Any) -> None:
    model = models[name]
    rows, length = data.draw(st.integers(1, 3)), data.draw(st.integers(3, 12))
    tokens = torch.tensor(
        data.draw(
            st.lists(st.lists(st.integers(3, 120), min_size=length, max_size=length), min_size=rows, max_size=rows)
        )
    )
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), min_size=1, max_size=3)))
    past = empty(model, rows)
    pieces = [model(piece, past_kv_cache=past) for piece in tokens.tensor_split(cuts, 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(tokens))
    assert past.entries[0].past_keys.shape[:2] == tokens.shape and past.previous_attention_mask.all()


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("later_side", ["left", "right"])
def test_padded_pieces_equal_each_row_alone(side: str, later_side: str, model: Any) -> None:
    texts, later = ["w5 w6", "w7 w8 w9 w10"], ["w11 w12 w13", "w14"]
    past = empty(model, 2)
    model(model.to_tokens(texts, padding_side=side), past_kv_cache=past)
    more = model.to_tokens(later, padding_side=later_side, prepend_bos=False)
    logits = model(more, past_kv_cache=past)
    for row in range(2):
        n = model.to_tokens(later[row], prepend_bos=False).shape[1]
        at = slice(3 - n, None) if later_side == "left" else slice(n)
        torch.testing.assert_close(logits[row, at], model(f"{texts[row]} {later[row]}")[0, -n:])


@torch.no_grad()
def test_frozen_cache_stays_as_it_was(model: Any) -> None:
    past = empty(model)
    model(model.to_tokens("w5 w6 w7"), past_kv_cache=past)
    past.freeze()
    keys, mask = past.entries[1].past_keys.clone(), past.previous_attention_mask.clone()
    for later in ("w8 w9", "w10", "w8 w9"):
        logits = model(model.to_tokens(later, prepend_bos=False), past_kv_cache=past)
        torch.testing.assert_close(logits[0, -1], model(f"w5 w6 w7 {later}")[0, -1])
        assert torch.equal(past.entries[1].past_keys, keys) and torch.equal(past.previous_attention_mask, mask)
    past.unfreeze()
    model(model.to_tokens("w8", prepend_bos=False), past_kv_cache=past)
    logits = model(model.to_tokens("w9", prepend_bos=False), past_kv_cache=past)
    torch.testing.assert_close(logits[0, -1], model("w5 w6 w7 w8 w9")[0, -1])


@torch.no_grad()
def test_a_mask_inside_a_piece_takes_tokens_out(model: Any) -> None:
    past = empty(model)
    model(model.to_tokens("w5 w6"), past_kv_cache=past)
    later = model.to_tokens("w7 w8 w90 w9", prepend_bos=False)
    logits = model(later, attention_mask=torch.tensor([[1, 1, 0, 1]]), past_kv_cache=past)
    torch.testing.assert_close(logits[0, -1], model("w5 w6 w7 w8 w9")[0, -1])
    last = model(model.to_tokens("w10", prepend_bos=False), past_kv_cache=past)
    torch.testing.assert_close(last[0, -1], model("w5 w6 w7 w8 w9 w10")[0, -1])


@torch.no_grad()
def test_hooks_and_caches_see_the_new_positions(model: Any) -> None:
    before, after = model.to_tokens("w5 w6"), model.to_tokens("w7 w8", prepend_bos=False)
    whole = torch.cat([before, after], 1)
    _, expected = model.run_with_cache(whole)
    past = empty(model)
    model(before, past_kv_cache=past)
    past.freeze()
    _, cache = model.run_with_cache(after, past_kv_cache=past)
    for name in ("resid_pre", "resid_post", "q", "k", "z", "rot_k"):
        torch.testing.assert_close(cache[name, 1], expected[name, 1][:, 3:])
    torch.testing.assert_close(cache["pattern", 1], expected["pattern", 1][:, :, 3:])
    edit = ("blocks.0.hook_resid_post", lambda value, hook: value * 2 if value.shape[1] == 2 else value)
    at_end = ("blocks.0.hook_resid_post", lambda value, hook: torch.cat([value[:, :3], 2 * value[:, 3:]], 1))
    edited = model.run_with_hooks(after, past_kv_cache=past, fwd_hooks=[edit])
    torch.testing.assert_close(edited, model.run_with_hooks(whole, fwd_hooks=[at_end])[:, 3:])


@torch.no_grad()
def test_residuals_go_on_from_a_cache(model: Any) -> None:
    before, after = model.to_tokens("w5 w6"), model.to_tokens("w7 w8", prepend_bos=False)
    past = empty(model)
    model(before, past_kv_cache=past)
    past.freeze()
    expected, cache = model.run_with_cache(after, past_kv_cache=past)
    for layer in (0, 1):
        resid = cache["resid_pre", layer]
        torch.testing.assert_close(model(resid, start_at_layer=layer, tokens=after, past_kv_cache=past), expected)
    torch.testing.assert_close(model(after, stop_at_layer=1, past_kv_cache=past), cache["resid_pre", 1])


@torch.no_grad()
def test_own_decoding_says_what_generate_says(model: Any) -> None:
    tokens = model.to_tokens(["w5", "w6 w7 w8"])
    expected = model.generate(tokens, 6, return_type="tokens", stop_at_eos=False)
    past, new, said = empty(model, 2), tokens, []
    for _ in range(6):
        new = model(new, past_kv_cache=past)[:, -1:].argmax(-1)
        said.append(new)
    assert torch.equal(torch.cat(said, 1), expected)


def test_what_cannot_go_on_is_refused(model: Any, models: dict[str, Any]) -> None:
    tokens, past = torch.tensor([[5, 6]]), empty(model)
    with pytest.raises(TypeError, match="TransformerLensKeyValueCache.*dict"):
        model(tokens, past_kv_cache={})
    model(tokens, past_kv_cache=past)
    with pytest.raises(ValueError, match="holds 1 rows and the input has 2"):
        model(tokens.expand(2, 2), past_kv_cache=past)
    with pytest.raises(ValueError, match="layers and the model has"):
        model(tokens, past_kv_cache=type(past)(past.entries[:1], past.previous_attention_mask))
    long = torch.full((1, model.cfg.n_ctx - 1), 5)
    with pytest.raises(ValueError, match=f"{model.cfg.n_ctx + 1} tokens together"):
        model(long, past_kv_cache=past)
    assert past.previous_attention_mask.shape == (1, 2), "a refused pass leaves the cache as it was"
    from veena_lens.interventions import Ablate

    with model.intervene([Ablate(name="blocks.0.attn.hook_z", heads=[0])]), pytest.raises(ValueError, match="hooks"):
        model(tokens, past_kv_cache=past)


@torch.no_grad()
def test_text_goes_on_after_images() -> None:
    model = make_model("clip-llama")
    inputs = model.inputs_from_hf(**counted(raw_inputs(BY_NAME["clip-llama"])))
    inputs = inputs[0].without_padding()
    more = torch.tensor([[5, 6, 7]])
    past = empty(model)
    model(inputs, past_kv_cache=past)
    logits = model(more, past_kv_cache=past)
    whole: Tensor = model(inputs.with_answer(more))
    torch.testing.assert_close(logits[0], whole[0, -3:])


@torch.no_grad()
def test_embeddings_of_later_tokens_go_on_from_a_cache(model: Any) -> None:
    past, later = empty(model), model.to_tokens("w8 w9", prepend_bos=False)
    model(model.to_tokens("w5 w6 w7"), past_kv_cache=past)
    past.freeze()
    resid, tokens, nothing, mask = model.input_to_embed(later, past_kv_cache=past)
    again = model(
        resid, start_at_layer=0, tokens=tokens, attention_mask=mask, shortformer_pos_embed=nothing, past_kv_cache=past
    )
    torch.testing.assert_close(again, model("w5 w6 w7 w8 w9")[:, -2:])
