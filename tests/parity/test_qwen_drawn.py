"""Qwen configurations drawn at random: logits, hidden states and greedy tokens equal Hugging Face's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cases import build_hf, raw_inputs, relative_error
from tests.qwen_cases import KINDS, QwenCase


@st.composite
def cases(draw: st.DrawFn, kind: str) -> QwenCase:
    """A Qwen model that a checkpoint could hold, and a batch of texts, images and videos."""
    kv = draw(st.integers(1, 3))
    heads = kv * draw(st.integers(1, 3))
    width = draw(st.sampled_from([8, 12, 16]))
    first = draw(st.integers(0, width // 2))
    second = draw(st.integers(0, width // 2 - first))
    sections = [first, second, width // 2 - first - second]
    rope = dict(rope_theta=draw(st.sampled_from([1e4, 1e6])), mrope_section=sections)
    rope |= draw(
        st.sampled_from([
            dict(rope_type="default"),
            dict(rope_type="linear", factor=2.0),
            dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32),
        ])
    )  # fmt: skip
    text: dict[str, Any] = dict(
        hidden_size=heads * width,
        intermediate_size=draw(st.sampled_from([8, 20, 33])),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads,
        num_key_value_heads=kv,
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-3])),
        hidden_act=draw(st.sampled_from(["silu", "gelu", "gelu_pytorch_tanh"])),
        rope_parameters=rope,
    )
    merge, depth = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    vision: dict[str, Any] = dict(
        depth=depth,
        num_heads=draw(st.sampled_from([1, 2, 4])),
        patch_size=draw(st.sampled_from([1, 2, 3])),
        in_channels=draw(st.sampled_from([1, 3])),
        temporal_patch_size=draw(st.integers(1, 3)),
        spatial_merge_size=merge,
        hidden_act=draw(st.sampled_from(["quick_gelu", "silu", "gelu_pytorch_tanh"])),
    )
    if kind == "qwen2_vl":
        vision |= dict(embed_dim=16, hidden_size=heads * width, mlp_ratio=draw(st.integers(1, 4)))
    elif kind == "qwen2_5_vl":
        vision |= dict(
            hidden_size=16,
            out_hidden_size=heads * width,
            intermediate_size=draw(st.sampled_from([8, 24])),
            window_size=merge * vision["patch_size"] * draw(st.integers(1, 3)) + draw(st.integers(0, 2)),
            fullatt_block_indexes=draw(st.lists(st.integers(0, depth), unique=True, max_size=2)),
            tokens_per_second=draw(st.integers(1, 5)),
        )
    if kind != "qwen3_vl":
        if draw(st.booleans()):
            text |= dict(
                use_sliding_window=True,
                sliding_window=draw(st.integers(2, 9)),
                max_window_layers=draw(st.integers(0, 2)),
            )
    else:
        deep = draw(st.lists(st.integers(0, depth - 1), unique=True, max_size=3))
        vision |= dict(
            hidden_size=16,
            out_hidden_size=(d_model := draw(st.sampled_from([20, 24]))),
            intermediate_size=draw(st.sampled_from([8, 24])),
            num_position_embeddings=draw(st.integers(1, 6)) ** 2,
            deepstack_visual_indexes=sorted(deep),
        )
        text |= dict(hidden_size=d_model, head_dim=width, attention_bias=draw(st.booleans()))
    side = st.integers(1, 4).map(lambda n: n * merge)
    image = st.builds("i{}x{}".format, side, side)
    video = st.builds("v{}x{}x{}".format, st.integers(1, 3), side, side)
    parts = st.lists(st.one_of(st.sampled_from(["1", "4", "7"]), image, video), max_size=4)
    rows = tuple(" ".join([*row, "2"]) for row in draw(st.lists(parts, min_size=1, max_size=3)))
    return QwenCase(
        name="drawn",
        kind=kind,
        text=text,
        vision=vision,
        root=dict(tie_word_embeddings=draw(st.booleans())),
        rows=rows,
        padding=draw(st.sampled_from(["left", "right"])),
        seconds=tuple(draw(st.lists(st.sampled_from([0.2, 0.5, 1.0, 1.9]), max_size=2))),
    )


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30)
@given(data=st.data())
def test_drawn_configuration_equals_hugging_face(kind: str, data: st.DataObject) -> None:
    from veena_lens import HookedVLM

    case = data.draw(cases(kind))
    hf, raw = build_hf(case, gain=2.0), raw_inputs(case)
    model, keep = HookedVLM.from_hf(hf), raw["attention_mask"]
    with torch.no_grad():
        theirs = hf(**raw, output_hidden_states=True)
        ours, cache = model.run_with_cache(model.inputs_from_hf(**raw), names_filter=lambda n: "resid_pre" in n)
    assert relative_error(ours, theirs.logits, keep) < 1e-9
    for layer, state in enumerate(theirs.hidden_states[:-1]):
        assert relative_error(cache["resid_pre", layer], state, keep) < 1e-9, layer


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8)
@given(data=st.data())
def test_drawn_configuration_generates_as_hugging_face(kind: str, data: st.DataObject) -> None:
    from veena_lens import HookedVLM

    case = data.draw(cases(kind))
    case = QwenCase(**{**vars(case), "padding": "left"})
    hf, raw = build_hf(case, gain=2.0), raw_inputs(case)
    hf.generation_config.eos_token_id, hf.generation_config.pad_token_id = None, 0
    model = HookedVLM.from_hf(hf)
    with torch.no_grad():
        theirs = hf.generate(**raw, max_new_tokens=12, do_sample=False)[:, raw["input_ids"].shape[1] :]
    ours = model.generate(model.inputs_from_hf(**raw), max_new_tokens=12, return_type="tokens")
    assert ours.tolist() == theirs.tolist()
