"""The cases that hook points, gradients and attention are tested on in every family, and the names of their hooks."""

from __future__ import annotations

from dataclasses import dataclass

from tests.cases import BY_NAME, QWEN, Case

ROWS = ("2 i4x4 3 v2x2x4 2", "1 i2x2 1 i2x6 3", "4")


@dataclass(frozen=True)
class Counts:
    """Of a batch: images that the tower sees, tokens that they fill, patches of the longest, and its features."""

    crops: int
    tokens: int
    patches: int = 16
    features: int = 4


# One small case per family, whose every hook point is edited.
SMALL = {
    "gemma3": Case(
        name="hooks",
        family="gemma3",
        rows=("2 i 1", "1 i 1 b 3", "4"),
        text=dict(num_hidden_layers=2, layer_types=None, sliding_window=5),
    ),
    "idefics3": Case(
        name="hooks", family="idefics3", rows=("2 i9x13 1", "1 t1x2 1 i 3", "4"), text=dict(num_hidden_layers=1)
    ),
    "qwen2_vl": Case(name="hooks", family="qwen2_vl", rows=ROWS, text=dict(num_hidden_layers=2)),
    "qwen2_5_vl": Case(
        name="hooks",
        family="qwen2_5_vl",
        rows=ROWS,
        text=dict(num_hidden_layers=2),
        vision=dict(depth=2, window_size=8),
    ),
    "qwen3_vl": Case(name="hooks", family="qwen3_vl", rows=ROWS, vision=dict(depth=2, deepstack_visual_indexes=[0, 1])),
}
COUNTS = {
    "gemma3-hooks": Counts(crops=3, tokens=12),
    "idefics3-hooks": Counts(crops=5, tokens=20),
    **{f"{family}-hooks": Counts(crops=5, tokens=4 + 2 + 2 + 1 + 3) for family in QWEN},
    "clip-llama": Counts(crops=3, tokens=12, patches=5),
}

# The odd ones of LLaVA, of which some are edited in place as well.
LLAVA = [
    "clip-llama",
    "equal-rows",
    "both-biases-tied",
    "wide-heads",
    "image-28-patch-7",
    "feature-list-full-ends",
    "feature-zero",
    "siglip-default-strategy",
    "window-qwen2",
    "right-padding",
    "text-llama-bias",
    "text-mistral",
]
IN_PLACE = ["clip-llama", "both-biases-tied", "feature-list-full-ends", "siglip-default-strategy", "text-mistral"]
EDITED = [*(BY_NAME[name] for name in LLAVA), *SMALL.values()]

# Beyond those, cases whose every value equals the plain model's.
ODD = [f"gemma3-{name}" for name in ("narrow-window", "touching-pictures", "scaled-rope", "right-padding", "untied")]
ODD += ["gemma3-many-tokens", "gemma3-text-plain"]
ODD += ["idefics3-scale-3", "idefics3-smaller-pictures", "smolvlm-one-token-a-tile", "smolvlm-tied"]
ODD += ["idefics3-side-25", "idefics3-no-markers", "qwen2_vl-merge-3", "qwen2_vl-one-kv-head"]
ODD += ["qwen2_5_vl-slow-videos", "qwen2_5_vl-window-no-multiple-of-a-patch", "qwen3_vl-temporal-1"]
ODD += ["qwen3_vl-thin-pictures", "qwen3_vl-position-table-9x9", "qwen3_vl-tied"]
COMPARED = [
    *EDITED,
    *(Case(name="hooks-right", family=family, rows=ROWS, padding="right") for family in QWEN),
    Case(name="hooks-right", family="smolvlm", rows=("i 3", "t2x1 1"), padding="right", has_mask=False),
    *(BY_NAME[name] for name in ODD),
]

# Hooks that a family's names must hold and must not hold, beside those of every model.
PARTS = ("q", "k", "v", "rot_q", "rot_k", "attn_scores", "pattern", "z", "result")
QK_NORMS = {f"blocks.1.attn.{x}_norm.hook_{what}" for x in "qk" for what in ("scale", "normalized")}
LAST_NORM = {"vision.ln_post.hook_scale", "vision.ln_post.hook_normalized"}
DEEPSTACK = {"deepstack.0.hook_out", "deepstack.1.hook_out", "blocks.1.hook_deepstack", "blocks.2.hook_deepstack"}
TURNED = {f"vision.blocks.1.attn.hook_{part}" for part in PARTS}
UNTURNED = {name for name in TURNED if "rot" not in name}
PRESENT = {
    "gemma3": LAST_NORM | QK_NORMS | UNTURNED | {"connector.norm.hook_scale", "blocks.0.ln1_post.hook_scale"},
    "idefics3": LAST_NORM | UNTURNED | {"connector.hook_in", "connector.hook_out", "vision.hook_pos_embed"},
    "qwen2_vl": LAST_NORM | TURNED,
    "qwen2_5_vl": LAST_NORM | TURNED,
    "qwen3_vl": LAST_NORM | TURNED | QK_NORMS | DEEPSTACK | {"vision.hook_pos_embed"},
}
ABSENT = {
    "gemma3": DEEPSTACK | {"connector.hook_pre", "vision.ln_pre.hook_scale"} | (TURNED - UNTURNED),
    "idefics3": DEEPSTACK | QK_NORMS | {"connector.hook_pre", "connector.norm.hook_scale", "vision.ln_pre.hook_scale"},
    "qwen2_vl": DEEPSTACK | QK_NORMS | {"vision.hook_pos_embed", "vision.ln_pre.hook_scale"},
    "qwen2_5_vl": DEEPSTACK | QK_NORMS | {"vision.hook_pos_embed", "vision.ln_pre.hook_scale"},
    "qwen3_vl": {"vision.ln_pre.hook_scale", "blocks.0.hook_deepstack", "deepstack.2.hook_out"},
}

# Pairs of hooks that are edited together, where a model has both.
PAIRS = [
    ("blocks.0.attn.hook_pattern", "blocks.1.attn.hook_attn_scores"),
    ("blocks.0.attn.hook_attn_scores", "blocks.0.attn.hook_pattern"),
    ("blocks.1.attn.hook_attn_scores", "blocks.1.attn.hook_pattern"),
    ("blocks.1.attn.hook_z", "blocks.1.attn.hook_result"),
    ("blocks.1.attn.hook_rot_k", "blocks.1.attn.hook_result"),
    ("blocks.0.ln1.hook_scale", "blocks.0.ln1.hook_normalized"),
    ("blocks.0.attn.hook_q", "blocks.0.attn.hook_rot_q"),
    ("blocks.0.hook_q_input", "blocks.0.attn.hook_q"),
    ("blocks.1.hook_q_input", "blocks.1.attn.hook_q"),
    ("blocks.0.hook_q_input", "blocks.0.hook_k_input"),
    ("blocks.1.hook_mlp_in", "blocks.1.mlp.hook_post"),
    ("blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"),
    ("hook_embed", "ln_final.hook_scale"),
]
PAIRS_OF_TOWERS = [
    ("vision.blocks.1.hook_v_input", "vision.ln_post.hook_scale"),
    ("vision.blocks.0.attn.hook_pattern", "blocks.0.hook_mlp_in"),
]
PAIRS_OF_QWEN3 = [
    ("blocks.1.attn.hook_q", "blocks.1.attn.q_norm.hook_scale"),
    ("blocks.1.attn.k_norm.hook_scale", "blocks.1.attn.k_norm.hook_normalized"),
    ("deepstack.0.hook_out", "blocks.1.hook_deepstack"),
    ("blocks.2.hook_resid_pre", "deepstack.1.hook_out"),
    ("blocks.1.hook_deepstack", "blocks.1.hook_k_input"),
]


def pairs_of(case: Case, names: set[str]) -> list[tuple[str, str]]:
    """The pairs of a case; a model of one layer has those of its layer alone."""
    pairs = [pair for pair in PAIRS if set(pair) <= names]
    assert len(pairs) >= (len(PAIRS) if any(name.startswith("blocks.1.") for name in names) else 5)
    if case in SMALL.values():
        assert all(set(pair) <= names for pair in PAIRS_OF_TOWERS)
        pairs += PAIRS_OF_TOWERS
    return pairs + (PAIRS_OF_QWEN3 if case.has("deepstack") else [])
