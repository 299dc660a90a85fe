"""Gemma-3 against Hugging Face in float64: logits, hidden states, features, generation, the way back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cases import build_hf, counted, hf_model, native_model, raw_inputs, relative_error
from tests.gemma_cases import FULL, GEMMA_BY_NAME, GEMMA_CASES, SLIDE, GemmaCase
from veena_lens import HookedVLM


def assert_equals_hugging_face(case: GemmaCase, hf: Any, model: HookedVLM) -> None:
    """Logits, every hidden state and the features, at every real place."""
    raw = raw_inputs(case)
    keep = raw["attention_mask"]
    wanted = lambda name: name.endswith("hook_resid_pre") or name == "hook_image_features"  # noqa: E731
    with torch.no_grad():
        theirs = hf(**raw, output_hidden_states=True)
        ours, cache = model.run_with_cache(model.inputs_from_hf(**raw), names_filter=wanted)
        assert relative_error(ours, theirs.logits, keep) < 1e-9
        for layer, state in enumerate(theirs.hidden_states[:-1]):
            assert relative_error(cache["resid_pre", layer], state, keep) < 1e-9, layer
        if not case.text_only():
            features = hf.model.get_image_features(raw["pixel_values"], return_dict=True).pooler_output
            assert relative_error(cache["hook_image_features"], features.flatten(0, 1)) < 1e-9


@pytest.mark.parametrize("case", GEMMA_CASES, ids=str)
def test_logits_hidden_states_and_features_equal_hugging_face(case: GemmaCase, model_of) -> None:
    assert_equals_hugging_face(case, hf_model(case), model_of(case))


@st.composite
def cases(draw: st.DrawFn) -> GemmaCase:
    """A model that a checkpoint could hold, and a batch of texts and images."""
    kv = draw(st.integers(1, 3))
    heads = kv * draw(st.integers(1, 3))
    n_layers = draw(st.integers(1, 4))
    slide = draw(
        st.sampled_from([dict(rope_type="default", rope_theta=1e4), dict(rope_type="default", rope_theta=5.0)])
    )
    full = draw(
        st.sampled_from([
            dict(rope_type="default", rope_theta=1e6),
            dict(rope_type="linear", rope_theta=1e6, factor=8.0),
            dict(rope_type="linear", rope_theta=20.0, factor=1.5),
        ])
    )  # fmt: skip
    tied = draw(st.booleans())
    text: dict[str, Any] = dict(
        hidden_size=heads * draw(st.sampled_from([4, 6, 9])),
        intermediate_size=draw(st.sampled_from([8, 20, 33])),
        num_hidden_layers=n_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=draw(st.sampled_from([4, 10, 16])),
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5, 1e-3])),
        hidden_activation=draw(st.sampled_from(["gelu_pytorch_tanh", "silu", "gelu"])),
        attention_bias=draw(st.booleans()),
        sliding_window=draw(st.sampled_from([1, 3, 7, 100])),
        layer_types=draw(st.lists(st.sampled_from([SLIDE, FULL]), min_size=n_layers, max_size=n_layers)),
        query_pre_attn_scalar=draw(st.sampled_from([3, 16, 168])),
        rope_parameters={FULL: full, SLIDE: slide},
        tie_word_embeddings=tied,
    )
    side, patch, pool = draw(st.integers(1, 3)), draw(st.sampled_from([2, 3, 5])), draw(st.integers(1, 3))
    vision = dict(
        hidden_size=16,
        intermediate_size=draw(st.sampled_from([8, 24])),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=draw(st.sampled_from([1, 2, 4])),
        patch_size=patch,
        image_size=patch * pool * side + draw(st.integers(0, patch - 1)),
        hidden_act=draw(st.sampled_from(["gelu_pytorch_tanh", "gelu", "relu"])),
        vision_use_head=draw(st.booleans()),
    )
    has_tower = draw(st.integers(0, 4)) > 0
    parts = st.lists(st.sampled_from(["1", "4", "7"] + (["i", "i", "b"] if has_tower else [])), max_size=4)
    return GemmaCase(
        name="drawn",
        text=text,
        vision=vision,
        root=dict(tie_word_embeddings=tied) if has_tower else {},
        tokens=side**2 if has_tower else None,
        rows=tuple(" ".join([*row, "2"]) for row in draw(st.lists(parts, min_size=1, max_size=3))),
        padding=draw(st.sampled_from(["left", "right"])),
    )


@settings(max_examples=30)
@given(case=cases())
def test_drawn_configuration_equals_hugging_face(case: GemmaCase) -> None:
    hf = build_hf(case, gain=2.0)
    assert_equals_hugging_face(case, hf, HookedVLM.from_hf(hf))


NAMES = ["narrow-window", "unequal-rows", "touching-pictures", "ends-with-a-picture", "text-plain"]


@pytest.mark.parametrize("name", NAMES)
def test_forty_greedy_tokens_of_a_left_padded_batch_equal_hugging_face(name: str) -> None:
    """Longer than every window: Hugging Face's cache of a layer that slides forgets, ours is masked."""
    case = GEMMA_BY_NAME[f"gemma3-{name}"]
    hf, raw = build_hf(case, gain=4.0), raw_inputs(case)
    hf.generation_config.eos_token_id, hf.generation_config.pad_token_id = None, 0
    with torch.no_grad():
        theirs = hf.generate(**raw, max_new_tokens=40, do_sample=False)[:, raw["input_ids"].shape[1] :]
    model = HookedVLM.from_hf(hf)
    inputs = model.inputs_from_hf(**raw)
    ours = model.generate(inputs, max_new_tokens=40, eos_token_id=[], return_type="tokens")
    assert ours.tolist() == theirs.tolist()
    assert len(set(ours.flatten().tolist())) > 4, "the model says too little for the test to show much"
    uncached = model.generate(inputs, max_new_tokens=12, eos_token_id=[], return_type="tokens", use_past_kv_cache=False)
    assert torch.equal(uncached, ours[:, :12])


@pytest.mark.parametrize("name", ["plain", "unequal-rows", "touching-pictures", "ends-with-a-picture"])
def test_row_of_a_batch_is_the_row_alone(name: str, model_of) -> None:
    model = model_of(GEMMA_BY_NAME[f"gemma3-{name}"], casts="none")
    inputs = model.inputs_from_hf(**counted(raw_inputs(GEMMA_BY_NAME[f"gemma3-{name}"])))
    with torch.no_grad():
        whole = model(inputs)
        for row in range(len(inputs)):
            alone = inputs[row].without_padding()
            assert relative_error(model(alone)[0], whole[row][inputs.attention_mask[row]]) < 1e-12


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["plain", "large-epsilons", "text-untied"])
def test_lower_precision_equals_hugging_face(name: str, dtype: torch.dtype, bound: float, model_of) -> None:
    case = GEMMA_BY_NAME[f"gemma3-{name}"]
    raw = raw_inputs(case, dtype)
    with torch.no_grad():
        theirs, ours = hf_model(case, dtype)(**raw).logits, model_of(case, dtype).forward_hf(**raw)
    assert ours.dtype == dtype and relative_error(ours, theirs, raw["attention_mask"]) < bound


def test_a_pictures_tokens_read_later_ones_of_their_own_picture_and_no_other(model_of) -> None:
    case = GEMMA_BY_NAME["gemma3-unequal-rows"]
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


@pytest.mark.parametrize("name", ["plain", "untied", "many-tokens", "attention-bias", "text-plain"])
def test_every_weight_goes_back_bit_for_bit(name: str, model_of) -> None:
    case = GEMMA_BY_NAME[f"gemma3-{name}"]
    theirs, ours = hf_model(case).state_dict(), model_of(case).to_hf_state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


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
    case = GEMMA_BY_NAME["gemma3-plain"]
    raw = raw_inputs(case)
    if isinstance(change["token_type_ids"], str):
        change = dict(token_type_ids=torch.zeros_like(raw["input_ids"]))
    with pytest.raises(ValueError, match=told):
        model_of(case).inputs_from_hf(**{**raw, **change})


def test_a_residual_needs_the_inputs_it_came_from() -> None:
    """Which tokens are an image's decides what reads what."""
    case = GEMMA_BY_NAME["gemma3-plain"]
    model = native_model(case)
    inputs = model.inputs_from_hf(**raw_inputs(case))
    with torch.no_grad():
        resid = model(inputs, stop_at_layer=1)
        with pytest.raises(ValueError, match="tokens="):
            model(resid, start_at_layer=1)
        assert torch.equal(model(resid, start_at_layer=1, tokens=inputs), model(inputs))


def test_every_case_differs_from_the_others() -> None:
    assert len(GEMMA_BY_NAME) == len(GEMMA_CASES), "two cases share a name"
    seen = {(c.config().to_json_string(), c.rows, c.padding) for c in GEMMA_CASES}
    assert len(seen) == len(GEMMA_CASES)
