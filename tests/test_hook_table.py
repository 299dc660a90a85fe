"""The table of hook points: names that resolve, axes, conditions, and errors that say what is near."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.cases import BY_NAME, CASES, native_model
from veena_lens.hook_table import (
    DECODER_HOOKS,
    HOOK_TABLE,
    aliases,
    canonical,
    hooks_of,
    layer_of,
    require_hook,
    row_of,
    to_markdown,
)

FEW = ["clip-llama", "siglip-qwen2", "feature-zero", "text-mistral"]
# HookedTransformer's own names of a gated model with rotary positions, per block and around them.
HOOKED_TRANSFORMER = [
    "hook_resid_pre",
    "hook_q_input",
    "hook_k_input",
    "hook_v_input",
    "ln1.hook_scale",
    "ln1.hook_normalized",
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "attn.hook_rot_q",
    "attn.hook_rot_k",
    "attn.hook_attn_scores",
    "attn.hook_pattern",
    "attn.hook_z",
    "attn.hook_result",
    "hook_attn_out",
    "hook_resid_mid",
    "hook_mlp_in",
    "ln2.hook_scale",
    "ln2.hook_normalized",
    "mlp.hook_pre",
    "mlp.hook_pre_linear",
    "mlp.hook_post",
    "hook_mlp_out",
    "hook_resid_post",
]


def test_decoder_has_exactly_hooked_transformers_names() -> None:
    cfg = native_model(BY_NAME["text-llama"]).cfg
    expected = {f"blocks.{layer}.{name}" for layer in range(cfg.n_layers) for name in HOOKED_TRANSFORMER}
    expected |= {"hook_embed", "ln_final.hook_scale", "ln_final.hook_normalized", "unembed.hook_in", "unembed.hook_out"}
    assert set(hooks_of(cfg)) == expected


@pytest.mark.parametrize("name", FEW)
def test_every_name_finds_its_row_and_layer(name: str) -> None:
    for each, row in hooks_of(native_model(BY_NAME[name]).cfg).items():
        assert row_of(each) is row and row_of(f"{each}_grad") is row
        layer = layer_of(each)
        assert each == (row.name.format(l=layer) if layer is not None else row.name)
        assert canonical(each) == each
        for alias in aliases(each):
            assert (
                canonical(alias) == each
                and row_of(alias) is row
                and alias not in hooks_of(native_model(BY_NAME[name]).cfg)
            )


def test_tower_layers_past_the_features_have_no_hooks() -> None:
    for case in CASES:
        if case.family != "llava":
            continue
        cfg = native_model(case).cfg
        layers = {layer_of(n) for n in hooks_of(cfg) if n.startswith("vision.blocks.")}
        assert layers == set(range(cfg.vision.n_layers)), str(case)


def test_conditions_of_the_configuration_are_kept() -> None:
    clip, siglip, text = (
        set(hooks_of(native_model(BY_NAME[n]).cfg)) for n in ("clip-llama", "siglip-qwen2", "text-llama")
    )
    assert "vision.ln_pre.hook_scale" in clip and "vision.ln_pre.hook_scale" not in siglip
    assert "vision.hook_pos_embed" in clip and "vision.hook_pos_embed" in siglip
    assert not [n for n in clip if n.startswith("vision.") and ("rot_" in n or "pre_linear" in n or "q_norm" in n)]
    assert not [n for n in text if n.startswith(("vision.", "connector.")) or n == "hook_image_features"]
    cfg = native_model(BY_NAME["text-llama"]).cfg
    normed = set(hooks_of(replace(cfg, qk_norm=True))) - set(hooks_of(cfg))
    assert normed == {
        f"blocks.{layer}.attn.{x}_norm.hook_{y}" for layer in range(2) for x in "qk" for y in ("scale", "normalized")
    }
    assert not [n for n in hooks_of(replace(cfg, gated_mlp=False)) if n.endswith("pre_linear")]


def test_no_row_names_what_does_not_exist() -> None:
    assert not [row for row in HOOK_TABLE if row.name in ("hook_pos_embed", "hook_tokens", "vision.hook_attn_in")]
    grouped = native_model(BY_NAME["text-llama"]).cfg
    assert not [name for name in hooks_of(grouped) if "hook_attn_in" in name], "it needs as many heads of each kind"
    assert not [row for row in DECODER_HOOKS if row.name.startswith("vision")]


@pytest.mark.parametrize("name, instead", [
    ("hook_pos_embed", "hook_pos_embed': positions are rotary.*hook_rot_q"),
    ("hook_tokens", "pass other tokens, or edit hook_embed"),
    ("blocks.1.hook_attn_in", "hook_q_input, hook_k_input, hook_v_input"),
    ("blocks.0.mlp.hook_mid", "hook_pre, .*hook_post"),
])  # fmt: skip
def test_names_of_hooked_transformer_say_what_takes_their_place(name: str, instead: str) -> None:
    with pytest.raises(ValueError, match=instead):
        require_hook(name, hooks_of(native_model(BY_NAME["text-llama"]).cfg))


@pytest.mark.parametrize("wrong, near", [
    ("blocks.0.hook_residpre", "blocks.0.hook_resid_pre"),
    ("blocks.0.attn.hook_scores", "blocks.0.attn.hook_attn_scores"),
    ("hook_embd", "hook_embed"),
    ("conector.hook_out", "connector.hook_out"),
    ("vision.blocks.0.attn.hook_patern", "vision.blocks.0.attn.hook_pattern"),
])  # fmt: skip
def test_unknown_name_raises_with_near_names(wrong: str, near: str) -> None:
    known = hooks_of(native_model(BY_NAME["clip-llama"]).cfg)
    with pytest.raises(ValueError, match=f"{wrong}.*{near}"):
        require_hook(wrong, known)
    assert require_hook(near, known) == near


def test_name_of_another_spelling_is_accepted() -> None:
    known = hooks_of(native_model(BY_NAME["clip-llama"]).cfg)
    assert require_hook("blocks.1.attn.hook_q_input", known) == "blocks.1.hook_q_input"
    with pytest.raises(ValueError, match="no hook|No hook"):
        row_of("blocks.1.attn.hook_nothing")


def test_markdown_has_a_line_a_row() -> None:
    lines = to_markdown().splitlines()
    assert len(lines) == len(HOOK_TABLE) + 2
    for row, line in zip(HOOK_TABLE, lines[2:], strict=True):
        assert f"`{row.name}`" in line and f"`{row.axes}`" in line and row.live in line


# --- images of any size ----------------------------------------------------------------------------
def test_deepstack_features_have_a_hook_each_and_one_in_the_layer_that_receives_them() -> None:
    case = BY_NAME["qwen3_vl-plain"]
    names = list(hooks_of(native_model(case).cfg))
    assert [n for n in names if "deepstack" in n] == [
        "deepstack.0.hook_out",
        "deepstack.1.hook_out",
        "blocks.1.hook_deepstack",
        "blocks.2.hook_deepstack",
    ]
    assert names.index("blocks.1.hook_deepstack") == names.index("blocks.1.hook_resid_pre") + 1
    assert row_of("deepstack.11.hook_out").axis_names == ("n_image_tokens", "d_model")
    assert layer_of("deepstack.11.hook_out") == 11 and layer_of("blocks.12.hook_deepstack") == 12
    assert row_of("blocks.7.attn.q_norm.hook_scale").axis_names == ("batch", "pos", "n_heads", "1")
    with pytest.raises(ValueError, match=r"deepstack\.2.*deepstack\.1"):
        require_hook("deepstack.2.hook_out", names)


def test_tower_of_any_size_has_rotary_hooks_and_a_last_norm() -> None:
    second, third = (set(hooks_of(native_model(BY_NAME[f"{kind}-plain"]).cfg)) for kind in ("qwen2_vl", "qwen3_vl"))
    for names in (second, third):
        assert {"vision.blocks.0.attn.hook_rot_q", "vision.blocks.1.attn.hook_rot_k"} <= names
        assert {"vision.ln_post.hook_scale", "vision.ln_post.hook_normalized"} <= names
        assert not [
            n for n in names if n.startswith("vision.") and ("q_norm" in n or "deepstack" in n or "ln_pre" in n)
        ]
    assert "vision.hook_pos_embed" in third - second
    norms = {f"blocks.0.attn.{x}_norm.hook_{what}" for x in "qk" for what in ("scale", "normalized")}
    assert norms <= third and not norms & second
