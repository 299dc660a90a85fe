"""Configurations drawn at random, beyond the table: a model that a checkpoint could hold, and a batch for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.cases import QWEN, Case
from tests.families import FULL, SLIDE

PADDINGS, ACTS = st.sampled_from(["left", "right"]), st.sampled_from(["silu", "gelu", "gelu_pytorch_tanh"])
WORDS = st.sampled_from(["1", "4", "7"])


def heads_of(draw: st.DrawFn) -> dict[str, Any]:
    """What every decoder has: grouped queries, widths, depth, epsilon, activation."""
    kv = draw(st.integers(1, 3))
    return dict(
        num_attention_heads=kv * draw(st.integers(1, 3)),
        num_key_value_heads=kv,
        intermediate_size=draw(st.sampled_from([8, 20, 33])),
        num_hidden_layers=draw(st.integers(1, 3)),
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5, 1e-3])),
        hidden_act=draw(ACTS),
    )


def rows_of(draw: st.DrawFn, *images: st.SearchStrategy[str]) -> tuple[str, ...]:
    """One to three rows of texts and images, each with text at its end."""
    parts = st.lists(st.one_of(WORDS, *images), max_size=4)
    return tuple(" ".join([*row, "2"]) for row in draw(st.lists(parts, min_size=1, max_size=3)))


def tower_of(draw: st.DrawFn, acts: list[str]) -> dict[str, Any]:
    """What every CLIP or SigLIP tower has."""
    return dict(
        hidden_size=16,
        intermediate_size=draw(st.sampled_from([8, 24])),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=draw(st.sampled_from([1, 2, 4])),
        hidden_act=draw(st.sampled_from(acts)),
    )


@st.composite
def llava(draw: st.DrawFn) -> Case:
    """LLaVA-1.5, or its decoder alone."""
    decoder = draw(st.sampled_from(["llama", "mistral", "qwen2"]))
    tower = draw(st.sampled_from(["clip", "siglip", None]))
    text = heads_of(draw) | dict(model_type=decoder, tie_word_embeddings=draw(st.booleans()))
    text["hidden_size"] = text["num_attention_heads"] * draw(st.sampled_from([4, 6, 8]))
    llama3 = dict(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
    text["rope_parameters"] = draw(
        st.sampled_from([
            dict(rope_type="default", rope_theta=1e4),
            dict(rope_type="default", rope_theta=5e5),
            dict(rope_type="linear", rope_theta=1e4, factor=2.0),
            dict(rope_type="llama3", rope_theta=1e4, **llama3),
        ])
    )  # fmt: skip
    if decoder != "qwen2" and draw(st.booleans()):
        text["head_dim"] = draw(st.sampled_from([4, 10, 16]))
    if decoder == "llama":
        text |= dict(attention_bias=draw(st.booleans()), mlp_bias=draw(st.booleans()))
    if decoder == "mistral":
        text["sliding_window"] = draw(st.sampled_from([None, 3, 7, 4096]))
    if decoder == "qwen2" and draw(st.booleans()):
        text |= windows(draw)
    common: dict[str, Any] = dict(name="drawn", text=text, padding=draw(PADDINGS))
    if tower is None:
        return Case(family="text", rows=rows_of(draw), **common)
    vision = tower_of(draw, ["quick_gelu", "gelu", "gelu_pytorch_tanh"]) | dict(model_type=f"{tower}_vision_model")
    vision["patch_size"] = draw(st.sampled_from([5, 7, 14]))
    vision["image_size"] = vision["patch_size"] * draw(st.integers(2, 3)) + draw(st.integers(0, 4))
    depth = vision["num_hidden_layers"]
    layer = st.one_of(st.integers(1, depth), st.integers(-depth - 1, -1))
    root = dict(
        vision_feature_layer=draw(st.one_of(layer, st.lists(layer, min_size=1, max_size=3))),
        vision_feature_select_strategy=draw(st.sampled_from(["default", "full"])),
        multimodal_projector_bias=draw(st.booleans()),
        projector_hidden_act=draw(st.sampled_from(["gelu", "silu"])),
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    return Case(vision=vision, root=root, rows=rows_of(draw, st.just("i")), **common)


def windows(draw: st.DrawFn) -> dict[str, Any]:
    return dict(
        use_sliding_window=True, sliding_window=draw(st.integers(2, 9)), max_window_layers=draw(st.integers(0, 2))
    )


@st.composite
def onevision(draw: st.DrawFn) -> Case:
    text = heads_of(draw) | dict(tie_word_embeddings=draw(st.booleans()), max_position_embeddings=1024)
    text["hidden_size"] = text["num_attention_heads"] * draw(st.sampled_from([4, 8, 10]))
    if draw(st.booleans()):
        text |= windows(draw) | dict(max_window_layers=0)
    vision = tower_of(draw, ["gelu_pytorch_tanh", "quick_gelu"]) | dict(vision_use_head=False)
    patch = draw(st.integers(2, 5))
    side = patch * draw(st.integers(2, 5)) + draw(st.integers(0, 1))
    most = draw(st.integers(1, 3))
    pixel = st.integers(2, 60)
    images = (st.builds("i{}x{}".format, pixel, pixel), st.just(f"v{draw(st.integers(1, 3))}"))
    layers = st.integers(-vision["num_hidden_layers"], vision["num_hidden_layers"])
    alone = layers.filter(bool)  # Hugging Face takes the number 0 for none; in a list it counts
    return Case(
        name="drawn",
        family="onevision",
        text=text,
        vision=vision | dict(image_size=side, patch_size=patch, num_channels=3),
        root=dict(
            image_grid_pinpoints=[[side * a, side * b] for a in range(1, most + 1) for b in range(1, most + 1)],
            vision_aspect_ratio=f"anyres_max_{draw(st.integers(2, 9))}",
            vision_feature_layer=draw(st.one_of(st.just(-1), alone, st.lists(layers, min_size=1, max_size=2))),
            multimodal_projector_bias=draw(st.booleans()),
        ),
        rows=rows_of(draw, *images),
        padding=draw(PADDINGS),
        says_numbers=draw(st.booleans()),
    )


@st.composite
def gemma(draw: st.DrawFn) -> Case:
    """Gemma-3, now and then its decoder alone."""
    text = heads_of(draw)
    n_layers = draw(st.integers(1, 4))
    rope = {
        SLIDE: dict(rope_type="default", rope_theta=draw(st.sampled_from([1e4, 5.0]))),
        FULL: draw(
            st.sampled_from([
                dict(rope_type="default", rope_theta=1e6),
                dict(rope_type="linear", rope_theta=1e6, factor=8.0),
                dict(rope_type="linear", rope_theta=20.0, factor=1.5),
            ])
        ),
    }  # fmt: skip
    tied = draw(st.booleans())
    text |= dict(
        hidden_activation=text.pop("hidden_act"),
        hidden_size=text["num_attention_heads"] * draw(st.sampled_from([4, 6, 9])),
        num_hidden_layers=n_layers,
        head_dim=draw(st.sampled_from([4, 10, 16])),
        attention_bias=draw(st.booleans()),
        sliding_window=draw(st.sampled_from([1, 3, 7, 100])),
        layer_types=draw(st.lists(st.sampled_from([SLIDE, FULL]), min_size=n_layers, max_size=n_layers)),
        query_pre_attn_scalar=draw(st.sampled_from([3, 16, 168])),
        rope_parameters=rope,
        tie_word_embeddings=tied,
    )
    common: dict[str, Any] = dict(name="drawn", text=text, padding=draw(PADDINGS))
    if not draw(st.integers(0, 4)):
        return Case(family="gemma3-text", rows=rows_of(draw), **common)
    side, patch, pool = draw(st.integers(1, 3)), draw(st.sampled_from([2, 3, 5])), draw(st.integers(1, 3))
    vision = tower_of(draw, ["gelu_pytorch_tanh", "gelu", "relu"])
    vision |= dict(patch_size=patch, image_size=patch * pool * side + draw(st.integers(0, patch - 1)))
    vision["vision_use_head"] = draw(st.booleans())
    root = dict(tie_word_embeddings=tied, mm_tokens_per_image=side**2)
    rows = rows_of(draw, st.sampled_from(["i", "i", "b"]))
    return Case(family="gemma3", vision=vision, root=root, rows=rows, **common)


@st.composite
def tiles(draw: st.DrawFn) -> Case:
    text = heads_of(draw) | dict(attention_bias=draw(st.booleans()), mlp_bias=draw(st.booleans()))
    text["hidden_size"] = text["num_attention_heads"] * draw(st.sampled_from([4, 6, 8]))
    text["rope_parameters"] = dict(rope_type="default", rope_theta=draw(st.sampled_from([1e4, 273768.0])))
    if draw(st.booleans()):
        text["head_dim"] = draw(st.sampled_from([4, 10, 16]))
    scale, patch = draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 4]))
    size = patch * scale * draw(st.integers(1, 3)) + draw(st.integers(0, patch - 1))
    side = st.integers(1, size)
    cut = st.tuples(st.integers(1, 2), st.integers(1, 3)).filter(lambda x: x != (1, 1))
    images = (st.sampled_from(["i", "b"]), st.builds("i{}x{}".format, side, side), cut.map(lambda x: f"t{x[0]}x{x[1]}"))
    tied = draw(st.booleans())
    return Case(
        name="drawn",
        family=draw(st.sampled_from(["idefics3", "smolvlm"])),
        text=text | dict(tie_word_embeddings=tied),
        vision=tower_of(draw, ["gelu_pytorch_tanh", "gelu", "relu"]) | dict(patch_size=patch, image_size=size),
        root=dict(tie_word_embeddings=tied, scale_factor=scale),
        rows=rows_of(draw, *images),
        padding=draw(PADDINGS),
        n_name=draw(st.sampled_from([1, 4])),
    )


@st.composite
def qwen(draw: st.DrawFn, family: str) -> Case:
    text = heads_of(draw)
    width = draw(st.sampled_from([8, 12, 16]))
    first = draw(st.integers(0, width // 2))
    second = draw(st.integers(0, width // 2 - first))
    rope = draw(
        st.sampled_from([
            dict(rope_type="default"),
            dict(rope_type="linear", factor=2.0),
            dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32),
        ])
    )  # fmt: skip
    sections = [first, second, width // 2 - first - second]
    d_model = text["num_attention_heads"] * width
    theta = draw(st.sampled_from([1e4, 1e6]))
    text |= dict(hidden_size=d_model, rope_parameters=rope | dict(rope_theta=theta, mrope_section=sections))
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
    if family == "qwen2_vl":
        vision |= dict(embed_dim=16, hidden_size=d_model, mlp_ratio=draw(st.integers(1, 4)))
    else:
        vision |= dict(hidden_size=16, out_hidden_size=d_model, intermediate_size=draw(st.sampled_from([8, 24])))
    if family == "qwen2_5_vl":
        vision |= dict(
            window_size=merge * vision["patch_size"] * draw(st.integers(1, 3)) + draw(st.integers(0, 2)),
            fullatt_block_indexes=draw(st.lists(st.integers(0, depth), unique=True, max_size=2)),
            tokens_per_second=draw(st.integers(1, 5)),
        )
    if family == "qwen3_vl":
        d_model = draw(st.sampled_from([20, 24]))
        deep = draw(st.lists(st.integers(0, depth - 1), unique=True, max_size=3))
        vision |= dict(out_hidden_size=d_model, deepstack_visual_indexes=sorted(deep))
        vision["num_position_embeddings"] = draw(st.integers(1, 6)) ** 2
        text |= dict(hidden_size=d_model, head_dim=width, attention_bias=draw(st.booleans()))
    elif draw(st.booleans()):
        text |= windows(draw)
    side = st.integers(1, 4).map(lambda n: n * merge)
    images = (st.builds("i{}x{}".format, side, side), st.builds("v{}x{}x{}".format, st.integers(1, 3), side, side))
    return Case(
        name="drawn",
        family=family,
        text=text,
        vision=vision,
        root=dict(tie_word_embeddings=draw(st.booleans())),
        rows=rows_of(draw, *images),
        padding=draw(PADDINGS),
        seconds=tuple(draw(st.lists(st.sampled_from([0.2, 0.5, 1.0, 1.9]), max_size=2))),
    )


DRAWN: Mapping[str, st.SearchStrategy[Case]] = dict(
    llava=llava(), onevision=onevision(), gemma3=gemma(), tiles=tiles(), **{family: qwen(family) for family in QWEN}
)
EXAMPLES = {family: 30 for family in DRAWN} | dict(llava=40, tiles=35)


def check_drawn(family: str, n: int, check: Callable[[Case], None]) -> None:
    """`check` on n drawn cases; a failing model is small enough as it is drawn."""

    @settings(max_examples=n, phases=(Phase.explicit, Phase.generate))
    @given(case=DRAWN[family])
    def each(case: Case) -> None:
        check(case)

    each()
