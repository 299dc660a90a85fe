"""Configurations drawn at random, beyond the table: logits, features and greedy tokens equal Hugging Face's."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cases import Case, build_hf, raw_inputs, relative_error


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A LLaVA or text model that a checkpoint could hold, and a batch for it."""
    decoder = draw(st.sampled_from(["llama", "mistral", "qwen2"]))
    tower = draw(st.sampled_from(["clip", "siglip", None]))
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
        tie_word_embeddings=draw(st.booleans()),
        rope_parameters=draw(
            st.sampled_from([
                dict(rope_type="default", rope_theta=1e4),
                dict(rope_type="default", rope_theta=5e5),
                dict(rope_type="linear", rope_theta=1e4, factor=2.0),
                dict(rope_type="llama3", rope_theta=1e4, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
                     original_max_position_embeddings=16),
            ])
        ),
    )  # fmt: skip
    if decoder != "qwen2" and draw(st.booleans()):
        text["head_dim"] = draw(st.sampled_from([4, 10, 16]))
    if decoder == "llama":
        text |= dict(attention_bias=draw(st.booleans()), mlp_bias=draw(st.booleans()))
    if decoder == "mistral":
        text["sliding_window"] = draw(st.sampled_from([None, 3, 7, 4096]))
    if decoder == "qwen2" and draw(st.booleans()):
        text |= dict(
            use_sliding_window=True, sliding_window=draw(st.integers(2, 8)), max_window_layers=draw(st.integers(0, 2))
        )
    parts = st.lists(st.sampled_from(["1", "4", "7"] + (["i"] if tower else [])), min_size=1, max_size=4)
    rows = tuple(" ".join([*row, "2"]) for row in draw(st.lists(parts, min_size=1, max_size=3)))
    padding = draw(st.sampled_from(["left", "right"]))
    if tower is None:
        return Case(name="drawn", decoder=decoder, tower=None, text=text, rows=rows, padding=padding)
    depth = draw(st.integers(1, 3))
    patch = draw(st.sampled_from([5, 7, 14]))
    vision: dict[str, Any] = dict(
        hidden_size=16,
        intermediate_size=draw(st.sampled_from([8, 24])),
        num_hidden_layers=depth,
        num_attention_heads=draw(st.sampled_from([1, 2, 4])),
        patch_size=patch,
        image_size=patch * draw(st.integers(2, 3)) + draw(st.integers(0, 4)),
        hidden_act=draw(st.sampled_from(["quick_gelu", "gelu", "gelu_pytorch_tanh"])),
    )
    layer = st.one_of(st.integers(1, depth), st.integers(-depth - 1, -1))
    llava = dict(
        vision_feature_layer=draw(st.one_of(layer, st.lists(layer, min_size=1, max_size=3))),
        vision_feature_select_strategy=draw(st.sampled_from(["default", "full"])),
        multimodal_projector_bias=draw(st.booleans()),
        projector_hidden_act=draw(st.sampled_from(["gelu", "silu"])),
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    return Case(
        name="drawn", decoder=decoder, tower=tower, text=text, vision=vision, llava=llava, rows=rows, padding=padding
    )


@settings(max_examples=40)
@given(case=cases())
def test_drawn_configuration_equals_hugging_face(case: Case) -> None:
    from veena_lens import HookedVLM

    hf, raw = build_hf(case, gain=2.0), raw_inputs(case)
    model, keep = HookedVLM.from_hf(hf), raw["attention_mask"]
    with torch.no_grad():
        theirs = hf(**raw, output_hidden_states=True)
        ours, cache = model.run_with_cache(model.inputs_from_hf(**raw), names_filter=lambda n: "resid_pre" in n)
    assert relative_error(ours, theirs.logits, keep) < 1e-9
    for layer, state in enumerate(theirs.hidden_states[:-1]):
        assert relative_error(cache["resid_pre", layer], state, keep) < 1e-9, layer


@settings(max_examples=8)
@given(case=cases())
def test_drawn_configuration_generates_as_hugging_face(case: Case) -> None:
    from veena_lens import HookedVLM

    case = Case(**{**vars(case), "padding": "left"})
    hf, raw = build_hf(case, gain=2.0), raw_inputs(case)
    hf.generation_config.eos_token_id, hf.generation_config.pad_token_id = None, 0
    model = HookedVLM.from_hf(hf)
    with torch.no_grad():
        theirs = hf.generate(**raw, max_new_tokens=12, do_sample=False)[:, raw["input_ids"].shape[1] :]
    ours = model.generate(model.inputs_from_hf(**raw), max_new_tokens=12, return_type="tokens")
    assert ours.tolist() == theirs.tolist()


def test_hole_in_the_mask_equals_hugging_face() -> None:
    """A token in the middle that nobody may read."""
    from veena_lens import HookedVLM

    case = Case(name="hole", rows=("3 i 6", "9"))
    hf, raw = build_hf(case, gain=2.0), raw_inputs(case)
    raw["attention_mask"][0, 9] = raw["attention_mask"][1, -3] = 0
    with torch.no_grad():
        theirs = hf(**raw).logits
        assert relative_error(HookedVLM.from_hf(hf).forward_hf(**raw), theirs, raw["attention_mask"]) < 1e-9


def test_mask_of_any_number_type_is_read() -> None:
    from veena_lens import HookedVLM

    case = Case(name="types", rows=("3 i 6", "4"))
    model, raw = HookedVLM.from_hf(build_hf(case)), raw_inputs(case)
    with torch.no_grad():
        plain = model.forward_hf(**raw)
        for dtype in (torch.bool, torch.int32, torch.float32, torch.uint8):
            assert torch.equal(model.forward_hf(**dict(raw, attention_mask=raw["attention_mask"].to(dtype))), plain)
        assert torch.equal(model.forward_hf(**dict(raw, input_ids=raw["input_ids"].int())), plain)
