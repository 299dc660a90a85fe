"""LLaVA-OneVision configurations drawn at random: logits, hidden states and greedy tokens equal Hugging Face's."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.cases import build_hf, raw_inputs, relative_error
from tests.onevision_cases import OnevisionCase
from tests.parity.test_generate import never_ends, theirs

PHASES = (Phase.explicit, Phase.generate)  # a failing model is small enough as it is drawn


@st.composite
def cases(draw: st.DrawFn) -> OnevisionCase:
    """A model that a checkpoint could hold, and a batch of texts, images and videos."""
    kv = draw(st.integers(1, 3))
    heads = kv * draw(st.integers(1, 3))
    width = draw(st.sampled_from([4, 8, 10]))
    text: dict[str, Any] = dict(
        hidden_size=heads * width,
        intermediate_size=draw(st.sampled_from([8, 20, 33])),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads,
        num_key_value_heads=kv,
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-3])),
        hidden_act=draw(st.sampled_from(["silu", "gelu", "gelu_pytorch_tanh"])),
        tie_word_embeddings=draw(st.booleans()),
        max_position_embeddings=1024,
    )
    if draw(st.booleans()):
        text |= dict(use_sliding_window=True, sliding_window=draw(st.integers(2, 9)), max_window_layers=0)
    patch, grid, rest = draw(st.integers(2, 5)), draw(st.integers(2, 5)), draw(st.integers(0, 1))
    side, depth = patch * grid + rest, draw(st.integers(1, 3))
    vision: dict[str, Any] = dict(
        hidden_size=16,
        intermediate_size=draw(st.sampled_from([8, 24])),
        num_hidden_layers=depth,
        num_attention_heads=draw(st.sampled_from([1, 2, 4])),
        image_size=side,
        patch_size=patch,
        num_channels=3,
        hidden_act=draw(st.sampled_from(["gelu_pytorch_tanh", "quick_gelu"])),
    )
    most = draw(st.integers(1, 3))
    pins = tuple((side * a, side * b) for a in range(1, most + 1) for b in range(1, most + 1))
    pixel = st.integers(2, 60)
    image, video = st.builds("i{}x{}".format, pixel, pixel), st.just(f"v{draw(st.integers(1, 3))}")
    parts = st.lists(st.one_of(st.sampled_from(["1", "4", "7"]), image, video), max_size=4)
    rows = tuple(" ".join([*row, "2"]) for row in draw(st.lists(parts, min_size=1, max_size=3)))
    layers = st.integers(-depth, depth)
    alone = layers.filter(bool)  # Hugging Face takes the number 0 for none; in a list it counts
    return OnevisionCase(
        name="drawn",
        text=text,
        vision=vision,
        pins=pins,
        root=dict(
            vision_aspect_ratio=f"anyres_max_{draw(st.integers(2, 9))}",
            vision_feature_layer=draw(st.one_of(st.just(-1), alone, st.lists(layers, min_size=1, max_size=2))),
            multimodal_projector_bias=draw(st.booleans()),
        ),
        rows=rows,
        padding=draw(st.sampled_from(["left", "right"])),
        says_numbers=draw(st.booleans()),
    )


@settings(max_examples=30, phases=PHASES)
@given(data=st.data())
def test_drawn_configuration_equals_hugging_face(data: st.DataObject) -> None:
    from veena_lens import HookedVLM

    case = data.draw(cases())
    hf, raw = build_hf(case, gain=2.0), raw_inputs(case)
    model, keep = HookedVLM.from_hf(hf), raw["attention_mask"]
    with torch.no_grad():
        expected = hf(**raw, output_hidden_states=True)
        ours, cache = model.run_with_cache(model.inputs_from_hf(**raw), names_filter=lambda n: "resid_pre" in n)
    assert relative_error(ours, expected.logits, keep) < 1e-9
    for layer, state in enumerate(expected.hidden_states[:-1]):
        assert relative_error(cache["resid_pre", layer], state, keep) < 1e-9, layer


@settings(max_examples=6, phases=PHASES)
@given(data=st.data())
def test_drawn_configuration_generates_as_hugging_face(data: st.DataObject) -> None:
    from veena_lens import HookedVLM

    case = data.draw(cases())
    case = OnevisionCase(**{**vars(case), "padding": "left"})
    hf, raw = never_ends(build_hf(case, gain=2.0)), raw_inputs(case)
    model = HookedVLM.from_hf(hf)
    ours = model.generate(model.inputs_from_hf(**raw), max_new_tokens=12, return_type="tokens")
    assert ours.tolist() == theirs(hf, raw, max_new_tokens=12)
