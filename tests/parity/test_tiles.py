"""Idefics3 and SmolVLM against Hugging Face in float64: logits, hidden states, features, generation, the way back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cases import build_hf, counted, hf_model, raw_inputs, relative_error
from tests.tile_cases import TILE_BY_NAME, TILE_CASES, TileCase
from veena_lens import HookedVLM


def assert_equals_hugging_face(case: TileCase, hf: Any, model: HookedVLM) -> None:
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
            given = {key: raw[key] for key in ("pixel_values", "pixel_attention_mask") if key in raw}
            features = hf.model.get_image_features(**given, return_dict=True).pooler_output
            assert relative_error(cache["hook_image_features"], torch.cat(list(features))) < 1e-9


@pytest.mark.parametrize("case", TILE_CASES, ids=str)
def test_logits_hidden_states_and_features_equal_hugging_face(case: TileCase, model_of) -> None:
    assert_equals_hugging_face(case, hf_model(case), model_of(case))


@st.composite
def cases(draw: st.DrawFn) -> TileCase:
    """A model that a checkpoint could hold, and a batch of texts and images."""
    kv = draw(st.integers(1, 3))
    heads = kv * draw(st.integers(1, 3))
    text: dict[str, Any] = dict(
        hidden_size=heads * draw(st.sampled_from([4, 6, 8])),
        intermediate_size=draw(st.sampled_from([8, 20, 33])),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads,
        num_key_value_heads=kv,
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5, 1e-3])),
        hidden_act=draw(st.sampled_from(["silu", "gelu", "gelu_pytorch_tanh"])),
        attention_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        rope_parameters=dict(rope_type="default", rope_theta=draw(st.sampled_from([1e4, 273768.0]))),
    )
    if draw(st.booleans()):
        text["head_dim"] = draw(st.sampled_from([4, 10, 16]))
    scale, patch = draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 4]))
    size = patch * scale * draw(st.integers(1, 3)) + draw(st.integers(0, patch - 1))
    vision = dict(
        hidden_size=16,
        intermediate_size=draw(st.sampled_from([8, 24])),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=draw(st.sampled_from([1, 2, 4])),
        patch_size=patch,
        image_size=size,
        hidden_act=draw(st.sampled_from(["gelu_pytorch_tanh", "gelu", "relu"])),
    )
    side = st.integers(1, size)
    cut = st.tuples(st.integers(1, 2), st.integers(1, 3)).filter(lambda x: x != (1, 1))
    picture = st.one_of(
        st.sampled_from(["i", "b"]), st.builds("i{}x{}".format, side, side), cut.map(lambda x: f"t{x[0]}x{x[1]}")
    )
    parts = st.lists(st.one_of(st.sampled_from(["1", "4", "7"]), picture), max_size=4)
    tied = draw(st.booleans())
    return TileCase(
        name="drawn",
        kind=draw(st.sampled_from(["idefics3", "smolvlm"])),
        text=text | dict(tie_word_embeddings=tied),
        vision=vision,
        root=dict(tie_word_embeddings=tied, scale_factor=scale),
        rows=tuple(" ".join([*row, "2"]) for row in draw(st.lists(parts, min_size=1, max_size=3))),
        padding=draw(st.sampled_from(["left", "right"])),
        n_name=draw(st.sampled_from([1, 4])),
    )


@settings(max_examples=35)
@given(case=cases())
def test_drawn_configuration_equals_hugging_face(case: TileCase) -> None:
    hf = build_hf(case, gain=2.0)
    assert_equals_hugging_face(case, hf, HookedVLM.from_hf(hf))


@pytest.mark.parametrize("name", ["idefics3-plain", "smolvlm-unequal-pictures", "smolvlm-long-names", "idefics3-qwen2"])
def test_forty_greedy_tokens_of_a_left_padded_batch_equal_hugging_face(name: str) -> None:
    case = TILE_BY_NAME[name]
    hf, raw = build_hf(case, gain=4.0), raw_inputs(case)
    hf.generation_config.eos_token_id, hf.generation_config.pad_token_id = None, 0
    with torch.no_grad():
        theirs = hf.generate(**raw, max_new_tokens=40, do_sample=False)[:, raw["input_ids"].shape[1] :]
    model = HookedVLM.from_hf(hf)
    ours = model.generate(model.inputs_from_hf(**raw), max_new_tokens=40, eos_token_id=[], return_type="tokens")
    assert ours.tolist() == theirs.tolist()
    assert len({tuple(row) for row in ours.tolist()}) == len(ours), "every row says the same"


@pytest.mark.parametrize("name", ["idefics3-unequal-pictures", "smolvlm-plain"])
def test_row_of_a_batch_is_the_row_alone(name: str, model_of) -> None:
    """Its smaller images, and rows whose images are whole beside those of others that are not."""
    model = model_of(TILE_BY_NAME[name])
    inputs = model.inputs_from_hf(**counted(raw_inputs(TILE_BY_NAME[name])))
    with torch.no_grad():
        whole = model(inputs)
        for row in range(len(inputs)):
            keep = inputs.attention_mask[row]
            for alone in (inputs[row], inputs[row].without_padding()):
                ours = model(alone)[0][alone.attention_mask[0]]
                assert relative_error(ours, whole[row][keep]) < 1e-7


@pytest.mark.parametrize("name", ["idefics3-plain", "smolvlm-tied", "idefics3-biases", "smolvlm-plain"])
def test_every_weight_goes_back_bit_for_bit(name: str, model_of) -> None:
    theirs, ours = hf_model(TILE_BY_NAME[name]).state_dict(), model_of(TILE_BY_NAME[name]).to_hf_state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_every_case_differs_from_the_others() -> None:
    assert len(TILE_BY_NAME) == len(TILE_CASES), "two cases share a name"
    seen = {(c.config().to_json_string(), c.rows, c.padding, c.n_name, c.has_mask) for c in TILE_CASES}
    assert len(seen) == len(TILE_CASES)
