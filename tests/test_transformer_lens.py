"""transformer_lens, unmodified, on a model with images: patching, caches, analysis, weights.

Whatever its functions return is compared with the same thing made by hand, with out-of-place hooks of our own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens import FactoredMatrix, SVDInterpreter, head_detector, patching
from transformer_lens.model_protocol import TransformerLensModel, TransformerLensModelWithWeights
from transformer_lens.tools import analysis

from tests.cases import BY_NAME, Case, build_hf, raw_inputs, relative_error, tiny_tokenizer
from tests.model.checks import after_norm

SMALL = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=2)
MHA = Case(name="small-mha", rows=("1 i 2", "2 i 1"), text=SMALL)
GQA = Case(
    name="small-gqa",
    rows=("1 i 2", "2 i 1"),
    text=dict(SMALL, num_attention_heads=4, attention_bias=True, mlp_bias=True),
)
QWEN_ROWS = ("1 i2x4 2", "2 i4x2 1")
QWEN2 = Case(
    name="small",
    family="qwen2_vl",
    rows=QWEN_ROWS,
    text=dict(SMALL, num_hidden_layers=2),
    vision=dict(hidden_size=16),  # the width that its merger gives
)
QWEN25 = Case(
    name="small",
    family="qwen2_5_vl",
    rows=QWEN_ROWS,
    text=dict(SMALL, num_hidden_layers=2),
    vision=dict(depth=2, out_hidden_size=16, window_size=8),
)
QWEN3 = Case(
    name="small",
    family="qwen3_vl",
    rows=QWEN_ROWS,
    text=dict(SMALL, num_hidden_layers=2),
    vision=dict(depth=2, out_hidden_size=16, deepstack_visual_indexes=[0]),
)
GEMMA3 = Case(
    name="small",
    family="gemma3",
    rows=("1 i 2", "2 i 1"),
    text=dict(SMALL, num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"], sliding_window=4),
)
IDEFICS3 = Case(name="small", family="idefics3", rows=("1 i 2", "2 i 1"), text=dict(SMALL, num_hidden_layers=2))
CASES = {
    "mha": MHA,
    "gqa": GQA,
    "qwen2_vl": QWEN2,
    "qwen2_5_vl": QWEN25,
    "qwen3_vl": QWEN3,
    "gemma3": GEMMA3,
    "idefics3": IDEFICS3,
}
GOOD, BAD = 17, 40


class Pair:
    """A model, clean and corrupted inputs (other images), their caches, and a metric."""

    def __init__(self, case: Case) -> None:
        from veena_lens import HookedVLM

        hf = build_hf(case, gain=5.0)  # strong attention, so that every patch shows
        self.model: Any = HookedVLM.from_hf(hf, processor=tiny_tokenizer(), casts="none")
        raw = raw_inputs(case)
        other = dict(raw, pixel_values=raw["pixel_values"].flip(0, -1), input_ids=raw["input_ids"].clone())
        other["input_ids"][:, 0] += 1
        self.clean, self.corrupted = (self.model.inputs_from_hf(**r) for r in (raw, other))
        self.has_deepstack = self.model.cfg.n_deepstack > 0
        with torch.no_grad():
            self.clean_logits, self.clean_cache = self.model.run_with_cache(self.clean)
            self.corrupted_logits, self.corrupted_cache = self.model.run_with_cache(self.corrupted)
        assert relative_error(self.clean_logits, self.corrupted_logits) > 1e-2

    @staticmethod
    def metric(logits: Tensor) -> Tensor:
        return (logits[:, -1, GOOD] - logits[:, -1, BAD]).mean()

    def patched(self, name: str, where: tuple[Any, ...]) -> float:
        """The metric of the corrupted run with the clean value at an index of one hook point."""
        clean = self.clean_cache[name]

        def edit(value: Tensor, hook: Any) -> Tensor:
            new = value.clone()
            new[where] = clean[where]
            return new

        with torch.no_grad():
            return float(self.metric(self.model.run_with_hooks(self.corrupted, fwd_hooks=[(name, edit)])))


@pytest.fixture(scope="session")
def pairs() -> dict[str, Pair]:
    return {name: Pair(case) for name, case in CASES.items()}


@pytest.fixture(params=list(CASES))
def pair(request: pytest.FixtureRequest, pairs: dict[str, Pair]) -> Pair:
    return pairs[request.param]


every = slice(None)
# function -> hook below "blocks.{l}.", axes after the layer, index into the activation
PATCHES: dict[str, tuple[str, str, Callable[..., tuple[Any, ...]]]] = {
    "get_act_patch_resid_pre": ("hook_resid_pre", "pos", lambda p: (every, p)),
    "get_act_patch_resid_mid": ("hook_resid_mid", "pos", lambda p: (every, p)),
    "get_act_patch_attn_out": ("hook_attn_out", "pos", lambda p: (every, p)),
    "get_act_patch_mlp_out": ("hook_mlp_out", "pos", lambda p: (every, p)),
    "get_act_patch_attn_head_out_by_pos": ("attn.hook_z", "pos head", lambda p, h: (every, p, h)),
    "get_act_patch_attn_head_q_by_pos": ("attn.hook_q", "pos head", lambda p, h: (every, p, h)),
    "get_act_patch_attn_head_k_by_pos": ("attn.hook_k", "pos kv", lambda p, h: (every, p, h)),
    "get_act_patch_attn_head_v_by_pos": ("attn.hook_v", "pos kv", lambda p, h: (every, p, h)),
    "get_act_patch_attn_head_pattern_by_pos": ("attn.hook_pattern", "head pos", lambda h, p: (every, h, p)),
    "get_act_patch_attn_head_pattern_dest_src_pos": (
        "attn.hook_pattern",
        "head pos pos",
        lambda h, d, s: (every, h, d, s),
    ),
    "get_act_patch_attn_head_out_all_pos": ("attn.hook_z", "head", lambda h: (every, every, h)),
    "get_act_patch_attn_head_q_all_pos": ("attn.hook_q", "head", lambda h: (every, every, h)),
    "get_act_patch_attn_head_k_all_pos": ("attn.hook_k", "kv", lambda h: (every, every, h)),
    "get_act_patch_attn_head_v_all_pos": ("attn.hook_v", "kv", lambda h: (every, every, h)),
    "get_act_patch_attn_head_pattern_all_pos": ("attn.hook_pattern", "head", lambda h: (every, h)),
}
ON_QWEN = (
    "get_act_patch_resid_pre",
    "get_act_patch_attn_head_v_by_pos",
    "get_act_patch_attn_head_out_all_pos",
    "get_act_patch_attn_head_q_all_pos",
    "get_act_patch_attn_head_pattern_all_pos",
)
STACKED = {"get_act_patch_attn_head_all_pos_every", "get_act_patch_attn_head_by_pos_every", "get_act_patch_block_every"}
PATHS = {"get_act_patch_direct_path", "get_act_patch_direct_path_all_sources"}


def by_hand(pair: Pair, function: str) -> Tensor:
    hook, axes, index = PATCHES[function]
    cfg = pair.model.cfg
    sizes = dict(pos=pair.clean.shape[1], head=cfg.n_heads, kv=cfg.n_key_value_heads)
    shape = [sizes[axis] for axis in axes.split()]
    out = torch.zeros(cfg.n_layers, *shape)
    for layer, *place in itertools.product(range(cfg.n_layers), *map(range, shape)):
        out[(layer, *place)] = pair.patched(f"blocks.{layer}.{hook}", index(*place))
    return out


def close(ours: Tensor, theirs: Tensor) -> bool:
    """transformer_lens stores its results in float32."""
    return ours.shape == theirs.shape and torch.allclose(ours.double(), theirs.double(), rtol=1e-5, atol=1e-6)


def test_model_is_what_transformer_lens_asks_for(model_of) -> None:
    for name in ("clip-llama", "siglip-qwen2", "text-mistral"):
        model = model_of(BY_NAME[name])
        assert isinstance(model, TransformerLensModelWithWeights) and isinstance(model, TransformerLensModel)


def test_every_public_patching_function_is_tested_here() -> None:
    public = {name for name in dir(patching) if name.startswith("get_act_patch_")}
    assert public == set(PATCHES) | STACKED | PATHS


SWEEPS = [
    (size, function)
    for size in CASES
    for function in PATCHES
    if size == "mha" or ("dest_src" not in function if size == "gqa" else function in ON_QWEN)
]


@pytest.mark.parametrize("size, function", SWEEPS)
def test_patching_function_agrees_with_a_patch_made_by_hand(size: str, function: str, pairs: dict[str, Pair]) -> None:
    pair = pairs[size]
    ours = getattr(patching, function)(pair.model, pair.corrupted, pair.clean_cache, pair.metric)
    expected = by_hand(pair, function)
    assert close(ours, expected)
    assert expected.std() > 1e-5, "no patch did anything"


def test_stacked_patching_functions_agree_with_single_ones(pairs: dict[str, Pair]) -> None:
    pair = pairs["gqa"]
    args = (pair.model, pair.corrupted, pair.clean_cache, pair.metric)
    blocks = patching.get_act_patch_block_every(*args)
    for i, part in enumerate(("resid_pre", "attn_out", "mlp_out")):
        assert close(blocks[i], getattr(patching, f"get_act_patch_{part}")(*args))
    heads = patching.get_act_patch_attn_head_all_pos_every(*args)
    by_pos = patching.get_act_patch_attn_head_by_pos_every(*args)
    for i, part in enumerate(("out", "q", "k", "v", "pattern")):
        one = getattr(patching, f"get_act_patch_attn_head_{part}_all_pos")(*args)
        assert close(heads[i][:, : one.shape[1]], one)
        one = getattr(patching, f"get_act_patch_attn_head_{part}_by_pos")(*args)
        if part == "pattern":
            one = one.transpose(1, 2)
        assert close(by_pos[i][..., : one.shape[-1]], one)


def test_generic_patch_keeps_per_example_values(pair: Pair) -> None:
    def each(logits: Tensor) -> Tensor:
        return logits[:, -1, GOOD] - logits[:, -1, BAD]

    result = patching.get_act_patch_resid_pre(
        pair.model, pair.corrupted, pair.clean_cache, each, reduce="none", baseline=True
    )
    expected = by_hand(pair, "get_act_patch_resid_pre")
    assert close(result.values.mean(-1), expected)
    assert torch.allclose(result.baseline.double(), each(pair.corrupted_logits), rtol=1e-5, atol=1e-6)
    table = patching.make_df_from_ranges([2, 2], ["layer", "pos"])
    few = patching.generic_activation_patch(
        pair.model,
        pair.corrupted,
        pair.clean_cache,
        pair.metric,
        patching.layer_pos_patch_setter,
        "resid_pre",
        index_df=table,
    )
    assert close(few, expected[:2, :2].flatten())


def test_patching_the_first_residual_everywhere_restores_the_clean_run(pair: Pair) -> None:
    """With deep-stack features what later layers add of the image is patched besides."""
    names = ["hook_embed", *(["deepstack.0.hook_out"] if pair.has_deepstack else [])]
    edits = [(name, lambda value, hook: pair.clean_cache[hook.name].clone()) for name in names]
    with torch.no_grad():
        logits = pair.model.run_with_hooks(pair.corrupted, fwd_hooks=edits)
    assert relative_error(logits, pair.clean_logits) < 1e-12


@pytest.mark.parametrize("size", ["mha", "qwen3_vl"])
@pytest.mark.parametrize("component", ["q", "k", "v"])
def test_direct_path_patch_agrees_with_one_made_by_hand(component: str, size: str, pairs: dict[str, Pair]) -> None:
    pair = pairs[size]
    model, source, head = pair.model, 0, 1
    ours = patching.get_act_patch_direct_path(
        model,
        pair.corrupted,
        pair.clean_cache,
        pair.corrupted_cache,
        pair.metric,
        source,
        head,
        component,
        verbose=False,
    )
    z = "blocks.0.attn.hook_z"
    write = (pair.clean_cache[z] - pair.corrupted_cache[z])[:, :, head] @ model.W_O[source, head]
    # By hand: the destination's projection of the edited residual, written over hook_q, hook_k or hook_v.
    resid = pair.corrupted_cache["deepstack" if pair.has_deepstack else "resid_pre", 1] + write
    normed = resid / (resid.pow(2).mean(-1, keepdim=True) + model.cfg.eps).sqrt() * model.blocks[1].ln1.w
    weight, bias = (
        getattr(model.blocks[1].attn, f"W_{component.upper()}"),
        getattr(model.blocks[1].attn, f"b_{component.upper()}"),
    )
    for dest in range(model.cfg.n_heads):

        def edit(value: Tensor, hook: Any, dest: int = dest) -> Tensor:
            new = value.clone()
            new[:, :, dest] = normed @ weight[dest] + bias[dest]
            return new

        with torch.no_grad():
            logits = model.run_with_hooks(pair.corrupted, fwd_hooks=[(f"blocks.1.attn.hook_{component}", edit)])
        assert abs(float(ours[1, dest]) - float(pair.metric(logits))) < 1e-6
    assert not ours[0].any()


def test_direct_path_patch_from_all_sources_agrees_with_each(pair: Pair) -> None:
    args = (pair.model, pair.corrupted, pair.clean_cache, pair.corrupted_cache, pair.metric)
    every_source = patching.get_act_patch_direct_path_all_sources(*args, verbose=False)
    for head in range(pair.model.cfg.n_heads):
        one = patching.get_act_patch_direct_path(*args, 0, head, verbose=False)
        assert close(every_source[0, head], one)
    spread = every_source[0, :, 1]
    assert spread.std() > 1e-7


# --- ActivationCache ---------------------------------------------------------------------------------
def test_decompositions_sum_to_the_residual(pair: Pair) -> None:
    cache, n = pair.clean_cache, pair.model.cfg.n_layers
    for layer in range(n + 1):
        target = cache["resid_pre", layer] if layer < n else cache["resid_post", n - 1]
        parts = cache.decompose_resid(layer=layer if layer < n else None)
        assert relative_error(parts.sum(0), target) < 1e-12
    mid = cache.decompose_resid(layer=1, mlp_input=True)
    assert relative_error(mid.sum(0), cache["resid_mid", 1]) < 1e-12
    _, labels = cache.decompose_resid(return_labels=True)
    inner = ["1_deepstack"] if pair.has_deepstack else []
    assert labels == ["embed", "0_attn_out", "0_mlp_out", *inner, "1_attn_out", "1_mlp_out"]


def test_decompositions_hold_what_deepstack_features_add(pairs: dict[str, Pair]) -> None:
    pair = pairs["qwen3_vl"]
    cache, images = pair.clean_cache, pair.clean.image_mask
    parts, labels = cache.decompose_resid(layer=1, mlp_input=True, return_labels=True)
    assert labels == ["embed", "0_attn_out", "0_mlp_out", "1_deepstack", "1_attn_out"]
    added = parts[labels.index("1_deepstack")]
    assert relative_error(added[images], cache["deepstack.0.hook_out"]) < 1e-12
    assert float(added[images].abs().min()) > 0 and not added[~images].any()
    assert cache.decompose_resid(layer=1, return_labels=True)[1] == ["embed", "0_attn_out", "0_mlp_out"]
    assert cache.decompose_resid(mode="attn", return_labels=True)[1] == ["embed", "0_attn_out", "1_attn_out"]
    assert "1_deepstack" in cache.decompose_resid(incl_embeds=False, return_labels=True)[1]
    for options in (dict(pos_slice=2), dict(pos_slice=slice(1, 4)), dict(apply_ln=True)):
        some, names = cache.decompose_resid(**options, return_labels=True)
        whole = cache.decompose_resid()
        if "pos_slice" in options:
            expected = whole[:, :, options["pos_slice"]]
        else:
            expected = whole / cache["ln_final.hook_scale"]
        assert names == ["embed", "0_attn_out", "0_mlp_out", "1_deepstack", "1_attn_out", "1_mlp_out"]
        assert relative_error(some, expected) < 1e-12


@pytest.mark.parametrize("apply_ln", [False, True])
@pytest.mark.parametrize("outputs", [1, 3])
def test_projected_decompositions_hold_what_deepstack_features_add(
    outputs: int, apply_ln: bool, pairs: dict[str, Pair]
) -> None:
    cache = pairs["qwen3_vl"].clean_cache
    onto = torch.randn(16, outputs, dtype=torch.float64)
    onto = onto[:, 0] if outputs == 1 else onto
    options = dict(apply_ln=apply_ln, return_labels=True)
    whole, labels = cache.get_full_resid_decomposition(**options)
    ours, names = cache.get_full_resid_decomposition(**options, project_output_onto=onto)
    assert names == labels and labels[-3:] == ["embed", "1_deepstack", "bias"] and len(labels) == len(whole)
    assert relative_error(ours, whole @ onto) < 1e-12
    end = cache["resid_post", 1] / (cache["ln_final.hook_scale"] if apply_ln else 1)
    assert relative_error(ours.sum(0), end @ onto) < 1e-10


def test_cache_without_what_deepstack_adds_says_so(pairs: dict[str, Pair]) -> None:
    pair = pairs["qwen3_vl"]
    with torch.no_grad():
        _, cache = pair.model.run_with_cache(pair.clean, names_filter=lambda name: not name.endswith("hook_deepstack"))
    with pytest.raises(KeyError, match="blocks.1.hook_deepstack"):
        cache.decompose_resid()


def test_accumulated_residuals_are_those_of_the_run(pair: Pair) -> None:
    stack, labels = pair.clean_cache.accumulated_resid(incl_mid=True, return_labels=True)
    names = ["hook_resid_pre", "hook_resid_mid"]
    expected = [pair.clean_cache[f"blocks.{i}.{name}"] for i in range(2) for name in names]
    expected.append(pair.clean_cache["resid_post", 1])
    assert len(labels) == len(expected) == len(stack)
    for ours, theirs in zip(stack, expected, strict=True):
        assert torch.equal(ours, theirs)
    normed = pair.clean_cache.accumulated_resid(apply_ln=True)[-1]
    assert relative_error(normed, pair.clean_cache["unembed.hook_in"]) < 1e-12


def test_head_results_sum_to_the_residual(pair: Pair) -> None:
    cache, n_heads = pair.clean_cache, pair.model.cfg.n_heads
    stack, labels = cache.stack_head_results(layer=-1, incl_remainder=True, return_labels=True)
    assert labels[0] == "L0H0" and len(labels) == 2 * n_heads + 1
    assert relative_error(stack.sum(0), cache["resid_post", 1]) < 1e-12
    for layer, head in itertools.product(range(2), range(n_heads)):
        result = after_norm(pair.model, cache, layer, "ln1_post", cache["result", layer][:, :, head])
        assert relative_error(stack[layer * n_heads + head], result) < 1e-12


def test_head_results_are_computed_from_z_where_they_were_not_cached(pair: Pair) -> None:
    with torch.no_grad():
        _, cache = pair.model.run_with_cache(pair.clean, names_filter=lambda n: not n.endswith("hook_result"))
    assert not cache._ensure_head_results() if hasattr(cache, "_ensure_head_results") else True
    stack = cache.stack_head_results(layer=-1)
    n_heads = pair.model.cfg.n_heads
    result = after_norm(pair.model, cache, 1, "ln1_post", pair.clean_cache["result", 1][:, :, 1])
    assert relative_error(stack[n_heads + 1], result) < 1e-12


def test_neuron_results_sum_to_the_mlp_outputs(pair: Pair) -> None:
    cache, model = pair.clean_cache, pair.model
    stack = cache.stack_neuron_results(layer=-1, pos_slice=-1)
    for layer in range(2):
        neurons = stack[layer * model.cfg.d_mlp : (layer + 1) * model.cfg.d_mlp]
        total = neurons.sum(0) + model.b_out[layer]
        assert relative_error(total, cache["mlp_out", layer][:, -1:].reshape(total.shape)) < 1e-12
    part = cache.get_neuron_results(1, neuron_slice=slice(3, 5))
    expected = cache["post", 1][..., 3:5, None] * model.W_out[1, 3:5]
    assert relative_error(part, after_norm(model, cache, 1, "ln2_post", expected)) < 1e-12


@pytest.mark.parametrize("expand_neurons", [True, False])
@pytest.mark.parametrize("layer, mlp_input", [(None, False), (1, False), (1, True)])
def test_full_decomposition_sums_to_the_residual(
    layer: int | None, mlp_input: bool, expand_neurons: bool, pair: Pair
) -> None:
    cache = pair.clean_cache
    parts = cache.get_full_resid_decomposition(layer=layer, mlp_input=mlp_input, expand_neurons=expand_neurons)
    target = cache["resid_post", 1] if layer is None else cache["resid_mid" if mlp_input else "resid_pre", layer]
    assert relative_error(parts.sum(0), target) < 1e-12


def test_logit_attributions_sum_exactly_to_the_logit_difference(pair: Pair) -> None:
    """The weight of the last norm is folded into `tokens_to_residual_directions`."""
    cache, logits = pair.clean_cache, pair.clean_logits
    for stack in (
        cache.decompose_resid(),
        cache.stack_head_results(incl_remainder=True),
        cache.get_full_resid_decomposition(),
    ):
        attrs = cache.logit_attrs(stack, tokens=GOOD, incorrect_tokens=BAD)
        assert relative_error(attrs.sum(0), logits[..., GOOD] - logits[..., BAD]) < 1e-10
    one = cache.logit_attrs(cache.decompose_resid(pos_slice=-1), tokens=f"w{GOOD}", pos_slice=-1)
    assert relative_error(one.sum(0).flatten(), logits[:, -1, GOOD]) < 1e-10


def test_logit_attributions_of_one_row_without_the_batch_axis(pair: Pair) -> None:
    with torch.no_grad():
        logits, cache = pair.model.run_with_cache(pair.clean[0], remove_batch_dim=True)
    attrs = cache.logit_attrs(cache.decompose_resid(), tokens=GOOD, incorrect_tokens=BAD, has_batch_dim=False)
    assert relative_error(attrs.sum(0), logits[0, :, GOOD] - logits[0, :, BAD]) < 1e-10


def test_ln_applied_to_a_stack_divides_by_the_cached_scale(pair: Pair) -> None:
    cache = pair.clean_cache
    stack = cache.decompose_resid()
    final = cache.apply_ln_to_stack(stack)
    assert relative_error(final, stack / cache["ln_final.hook_scale"]) < 1e-12
    before = cache.apply_ln_to_stack(stack, layer=1)
    assert relative_error(before, stack / cache["blocks.1.ln1.hook_scale"]) < 1e-12
    within = cache.apply_ln_to_stack(stack, layer=1, mlp_input=True)
    assert relative_error(within, stack / cache["blocks.1.ln2.hook_scale"]) < 1e-12


def test_stack_activation_and_rows_of_a_cache(pair: Pair) -> None:
    cache = pair.clean_cache
    stack = cache.stack_activation("mlp_out")
    assert torch.equal(stack, torch.stack([cache["mlp_out", 0], cache["mlp_out", 1]]))
    row = cache.apply_slice_to_batch_dim(1)
    assert torch.equal(row["mlp_out", 1], cache["mlp_out", 1][1])
    moved = cache.apply_slice_to_batch_dim(slice(0, 1))
    assert relative_error(moved.decompose_resid().sum(0), cache["resid_post", 1][:1]) < 1e-12


# --- tools.analysis ----------------------------------------------------------------------------------
def test_logit_lens_of_the_last_layer_is_the_models_logits(pair: Pair) -> None:
    result = analysis.logit_lens(pair.model, pair.clean, positions=None)
    assert relative_error(result.values[-1], pair.clean_logits) < 1e-10
    cached = analysis.logit_lens(pair.clean_cache, positions=-1)
    with torch.no_grad():
        first = pair.model.unembed(pair.model.ln_final(pair.clean_cache["resid_pre", 0][:, -1:]))
    assert relative_error(cached.values[0].reshape(first.shape), first) < 1e-10


@pytest.mark.parametrize("unit", ["component", "head", "layer"])
def test_direct_logit_attribution_is_exact(unit: str, pair: Pair) -> None:
    result = analysis.direct_logit_attribution(pair.model, pair.clean, GOOD, BAD, unit=unit)
    difference = pair.clean_logits[:, -1, GOOD] - pair.clean_logits[:, -1, BAD]
    got = result.attribution[-1] if unit == "layer" else result.attribution.sum(0)
    assert relative_error(got.flatten(), difference) < 1e-10


@pytest.mark.parametrize(
    "size, granularity", [("mha", "node"), ("mha", "edge"), ("qwen2_vl", "edge"), ("qwen3_vl", "node")]
)
def test_attribution_patch_agrees_with_gradients_made_by_hand(
    size: str, granularity: str, pairs: dict[str, Pair]
) -> None:
    pair = pairs[size]
    config = analysis.EdgeAttributionConfig(granularity=granularity)
    result = analysis.attribution_patch(pair.model, pair.clean, pair.corrupted, pair.metric, config)
    expected: dict[tuple[int, str], float] = {}
    for row in range(2):
        kept: dict[str, Tensor] = {}

        def keep(value: Tensor, hook: Any, kept: dict[str, Tensor] = kept) -> None:
            value.retain_grad()
            kept[hook.name] = value

        names = ["hook_embed"] + [f"blocks.{i}.hook_mlp_out" for i in range(2)]
        with pair.model.hooks(fwd_hooks=[(n, keep) for n in names]):
            pair.metric(pair.model(pair.corrupted[row])).backward()
        pair.model.zero_grad()
        for name in names:
            change = pair.clean_cache[name][row] - kept[name].detach()[0]
            expected[name] = expected.get(name, 0.0) + float((change * kept[name].grad[0]).sum()) / 2
    found: dict[str, float] = {}
    for node, score in result.node_scores.items():  # one node a position
        if node.kind != "attn_head_out":
            name = "hook_embed" if node.kind == "embed" else f"blocks.{node.layer}.hook_mlp_out"
            found[name] = found.get(name, 0.0) + score
    assert set(found) == set(expected)
    for name, wanted in expected.items():
        assert abs(found[name] - wanted) < 1e-6 * max(1.0, abs(wanted)), name
    assert max(map(abs, found.values())) > 1e-3


@pytest.mark.parametrize("size", ["mha", "qwen2_vl"])
def test_faithfulness_of_the_whole_graph_is_one(size: str, pairs: dict[str, Pair]) -> None:
    """Its graph has no edge for deep-stack features."""
    pair = pairs[size]
    config = analysis.EdgeAttributionConfig(granularity="edge")
    found = analysis.attribution_patch(pair.model, pair.clean[:1], pair.corrupted[:1], pair.metric, config)
    result = analysis.faithfulness(pair.model, pair.clean[:1], pair.corrupted[:1], pair.metric, list(found.edge_scores))
    assert abs(result.recovered - 1) < 1e-5


def test_interchange_agrees_with_a_hook_made_by_hand(pair: Pair) -> None:
    model, name = pair.model, "blocks.0.hook_resid_post"
    last = torch.full((2,), pair.clean.shape[1] - 1)

    def task(inputs: Any) -> Tensor:
        return model(inputs)[:, -1, [GOOD, BAD]]

    source = analysis.collect_activations(model, name, pair.clean, task, positions=last)
    assert torch.equal(source, pair.clean_cache[name][:, -1])
    basis = analysis.random_basis(model.cfg.d_model, 3, seed=0).double()
    swap = analysis.SubspaceInterchange(basis)
    ours = analysis.intervened_logits(model, name, swap, pair.corrupted, source, task, positions=last, batch_size=1)

    def edit(value: Tensor, hook: Any) -> Tensor:
        new = value.clone()
        new[:, -1] += (source - value[:, -1]) @ basis @ basis.T
        return new

    with torch.no_grad(), model.hooks(fwd_hooks=[(name, edit)]):
        expected = task(pair.corrupted)
    assert relative_error(ours, expected) < 1e-6


def test_das_learns_a_subspace(pairs: dict[str, Pair]) -> None:
    pair = pairs["mha"]
    model, last = pair.model, torch.full((2,), pair.clean.shape[1] - 1)
    before = {n: p.clone() for n, p in model.named_parameters()}
    result = analysis.fit_das(
        model,
        "blocks.0.hook_resid_post",
        pair.corrupted,
        pair.clean,
        torch.tensor([0, 1]),
        lambda inputs: model(inputs)[:, -1, [GOOD, BAD]].float(),
        rank=2,
        base_positions=last,
        source_positions=last,
        epochs=8,
        lr=0.1,
    )
    assert result.losses[-1] < result.losses[0]
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_head_detector_scores_every_head(pairs: dict[str, Pair]) -> None:
    model = pairs["gqa"].model
    scores = head_detector.detect_head(model, "w5 w6 w7 w5 w6 w7", "previous_token_head")
    with torch.no_grad():
        _, cache = model.run_with_cache(model.to_tokens("w5 w6 w7 w5 w6 w7"))
    pattern = torch.stack([cache["pattern", layer][0] for layer in range(2)])
    expected = pattern.diagonal(-1, 2, 3).sum(-1) / pattern.sum((-1, -2))
    assert torch.allclose(scores.double(), expected, atol=1e-3)


@torch.no_grad()
def test_projection_kernel_and_singular_vectors_run(pair: Pair) -> None:
    model = pair.model
    affinity = analysis.attention_head_subspace_affinity(model, target_role="Q")
    vectors = SVDInterpreter(model).get_singular_vectors("OV", layer_index=1, head_index=0, num_vectors=3)
    assert vectors.squeeze(1).shape == (model.cfg.d_vocab, 3)
    o, q = (torch.linalg.qr(m)[0] for m in (model.W_O[0, 1].T, model.W_Q[1, 0]))
    expected = (o.T @ q).pow(2).sum()
    values = next(v for v in vars(affinity).values() if isinstance(v, Tensor) and v.is_floating_point())
    assert (values - expected).abs().min() < 1e-8


# --- weights -----------------------------------------------------------------------------------------
def test_stacked_weights_have_hooked_transformers_shapes(pair: Pair) -> None:
    model, cfg = pair.model, pair.model.cfg
    n, h, d, e, m, v = cfg.n_layers, cfg.n_heads, cfg.d_model, cfg.d_head, cfg.d_mlp, cfg.d_vocab
    shapes = dict(
        W_Q=(n, h, d, e), W_K=(n, h, d, e), W_V=(n, h, d, e), W_O=(n, h, e, d), b_Q=(n, h, e), b_K=(n, h, e),
        b_V=(n, h, e), b_O=(n, d), W_in=(n, d, m), W_gate=(n, d, m), W_out=(n, m, d), b_in=(n, m), b_out=(n, d),
        W_E=(v, d), W_U=(d, v), b_U=(v,),
    )  # fmt: skip
    for name, shape in shapes.items():
        assert tuple(getattr(model, name).shape) == shape, name


def test_weights_compute_what_the_hooks_hold(pair: Pair) -> None:
    """Names and shapes are right when the plain formulas with these weights give the cached values."""
    model, cache = pair.model, pair.clean_cache
    repeat = model.cfg.n_heads // model.cfg.n_key_value_heads
    for layer in range(2):
        x = cache["normalized", layer, "ln1"] * model.blocks[layer].ln1.w
        for letter in "QKV":
            ours = torch.einsum("bpm,hme->bphe", x, getattr(model, f"W_{letter}")[layer])
            ours = ours + getattr(model, f"b_{letter}")[layer]
            theirs = cache[letter.lower(), layer]
            theirs = theirs if letter == "Q" else theirs.repeat_interleave(repeat, 2)
            assert relative_error(ours, theirs) < 1e-12, letter
        out = torch.einsum("bphe,hem->bpm", cache["z", layer], model.W_O[layer]) + model.b_O[layer]
        out = after_norm(model, cache, layer, "ln1_post", out)
        assert relative_error(out, cache["attn_out", layer]) < 1e-12
        x = cache["normalized", layer, "ln2"] * model.blocks[layer].ln2.w
        assert relative_error(x @ model.W_gate[layer], cache["pre", layer]) < 1e-12 or model.cfg.mlp_bias
        assert relative_error(x @ model.W_in[layer] + model.b_in[layer], cache["pre_linear", layer]) < 1e-12
        out = cache["post", layer] @ model.W_out[layer] + model.b_out[layer]
        assert relative_error(after_norm(model, cache, layer, "ln2_post", out), cache["mlp_out", layer]) < 1e-12
    x = cache["ln_final.hook_normalized"] * model.ln_final.w
    assert relative_error(x @ model.W_U + model.b_U, pair.clean_logits) < 1e-12
    bias = model.accumulated_bias(2)
    assert relative_error(bias, model.b_O.sum(0) + model.b_out.sum(0)) < 1e-12 or not bias.any()


@pytest.mark.parametrize("case", [MHA, GQA], ids=str)
def test_writing_through_a_layers_view_edits_the_model(case: Case) -> None:
    from veena_lens import HookedVLM

    hf = build_hf(case)
    model, raw = HookedVLM.from_hf(hf), raw_inputs(case)
    attn, mlp, e = model.blocks[1].attn, model.blocks[1].mlp, model.cfg.d_head
    with torch.no_grad():
        plain = model.forward_hf(**raw)
        before = attn.q.weight.clone()
        attn.W_Q[1, 2] = 3.0
        assert (attn.q.weight[e : 2 * e, 2] == 3).all()
        assert int((attn.q.weight != before).sum()) == e
        attn.W_O[0] *= 0
        assert not attn.o.weight[:, :e].any()
        mlp.W_in[:, 3], mlp.W_out[4], mlp.W_gate[5] = 1.0, 2.0, 0.5
        assert (
            (mlp.up.weight[3] == 1).all()
            and (mlp.down.weight[:, 4] == 2).all()
            and (mlp.gate.weight[:, 5] == 0.5).all()
        )
        model.W_E[7], model.W_U[:, 9] = 0.25, 0.125
        model.blocks[1].ln2.w[0] = 9.0
        after = model.forward_hf(**raw)
        assert relative_error(after, plain) > 1e-2
        assert relative_error(after, hf(**raw).logits) < 1e-9, "the Hugging Face model shares the edited storage"


def test_stacked_weights_are_copies(pair: Pair) -> None:
    before = pair.model.blocks[0].attn.q.weight.clone()
    pair.model.W_Q.data.zero_()
    assert torch.equal(pair.model.blocks[0].attn.q.weight, before)


@torch.no_grad()
def test_factored_circuits_are_the_products(pair: Pair) -> None:
    model = pair.model
    assert isinstance(model.OV, FactoredMatrix) and isinstance(model.QK, FactoredMatrix)
    assert relative_error(model.OV.AB, model.W_V @ model.W_O) < 1e-12
    assert relative_error(model.QK.AB, model.W_Q @ model.W_K.transpose(-1, -2)) < 1e-12
    block = model.blocks[1].attn
    assert relative_error(block.OV.AB, model.OV.AB[1]) < 1e-12
    for mode in "QKV":
        scores = model.all_composition_scores(mode)
        h = model.cfg.n_heads
        assert scores.shape == (2, h, 2, h) and not scores[1].any() and not scores[0, :, 0].any()
        assert (scores[0, :, 1] > 0).all()
    left = model.W_V[0, 1] @ model.W_O[0, 1]
    right = model.W_Q[1, 0] @ model.W_K[1, 0].T
    expected = torch.linalg.norm(left @ right) / torch.linalg.norm(left) / torch.linalg.norm(right)
    assert relative_error(model.all_composition_scores("Q")[0, 1, 1, 0], expected) < 1e-9


def test_flags_of_transformer_lens_report_what_is_always_there(pair: Pair) -> None:
    model = pair.model
    assert model.cfg.use_attn_result and model.cfg.use_split_qkv_input and model.cfg.use_hook_mlp_in
    assert model.cfg.use_attn_in is False and model.cfg.ungroup_grouped_query_attention is False
    for name in ("attn_result", "split_qkv_input", "hook_mlp_in"):
        getattr(model, f"set_use_{name}")(False)
        getattr(model, f"set_use_{name}")(True)
    model.set_use_attn_in(False)
    if model.cfg.n_heads == model.cfg.n_key_value_heads:
        model.set_use_attn_in(True)
        assert model.cfg.use_attn_in is True
        model.set_use_attn_in(False)
    else:
        with pytest.raises(ValueError, match="hook_q_input"):
            model.set_use_attn_in(True)
    assert model.cfg.use_attn_result and model.cfg.use_split_qkv_input and model.cfg.use_hook_mlp_in


# --- tokens and losses -------------------------------------------------------------------------------
def test_text_and_tokens_translate(pairs: dict[str, Pair]) -> None:
    model = pairs["mha"].model
    assert model.to_tokens("w5 w6").tolist() == [[1, 5, 6]]
    assert model.to_tokens("w5 w6", prepend_bos=False).tolist() == [[5, 6]]
    assert model.to_tokens("w5 w6", prepend_bos=True).tolist() == [[1, 5, 6]]
    assert model.to_tokens(["w5", "w5 w6"]).tolist() == [[0, 1, 5], [1, 5, 6]]
    assert model.to_str_tokens("w5 w6") == ["<s>", "w5", "w6"]
    assert model.to_str_tokens(torch.tensor([5, 6])) == ["w5", "w6"]
    assert model.to_string(torch.tensor([5, 6])) == "w5 w6"
    assert model.to_single_token("w9") == 9 and model.to_single_str_token(9) == "w9"
    with pytest.raises(ValueError, match="2 tokens"):
        model.to_single_token("w9 w10")


def test_text_runs_as_its_tokens(pairs: dict[str, Pair]) -> None:
    model = pairs["mha"].model
    with torch.no_grad():
        assert torch.equal(model("w5 w6 w7"), model(torch.tensor([[1, 5, 6, 7]])))
        both = model(["w5", "w5 w6 w7"])
        assert relative_error(both[:1, -2:], model("w5")) < 1e-12, "a padded text equals the text alone"


def test_model_without_tokenizer_refuses_text(model_of) -> None:
    model = model_of(BY_NAME["clip-llama"])
    assert model.tokenizer is None and model.processor is None
    for call in (
        lambda: model("w5"),
        lambda: model.to_tokens("w5"),
        lambda: model.to_single_token("w5"),
        lambda: model.prepare(text="w5"),
        lambda: model.generate("w5"),
    ):
        with pytest.raises(ValueError, match="tokenizer|processor"):
            call()


def test_residual_directions_are_the_unembedding_with_the_norms_weight(pair: Pair) -> None:
    model = pair.model
    expected = model.W_U * model.ln_final.w[:, None]
    assert torch.equal(model.tokens_to_residual_directions(GOOD), expected[:, GOOD])
    assert torch.equal(model.tokens_to_residual_directions(f"w{GOOD}"), expected[:, GOOD])
    many = torch.tensor([[3, 4], [5, 6]])
    assert torch.equal(model.tokens_to_residual_directions(many), expected.T[many])


def test_return_types_are_hooked_transformers(pair: Pair) -> None:
    model, inputs = pair.model, pair.clean
    with torch.no_grad():
        logits = model(inputs)
        loss = model(inputs, return_type="loss")
        both = model(inputs, return_type="both")
        nothing = model(inputs, return_type=None)
        per_token = model(inputs, return_type="loss", loss_per_token=True)
    assert nothing is None and loss.ndim == 0
    assert torch.equal(both[0], logits) and torch.equal(both[1], loss)
    assert per_token.shape == (2, inputs.shape[1] - 1)
    with pytest.raises(ValueError, match="'both'"):
        model(inputs, return_type="logit")


@pytest.mark.parametrize(
    "name", ["clip-llama", "three-images-and-none", "right-padding", "text-mistral", "siglip-qwen2"]
)
def test_loss_counts_text_targets_only(name: str, model_of) -> None:
    """Neither image tokens nor pads are targets; a text token after an image or at a row's start counts once."""
    model = model_of(BY_NAME[name])
    inputs = model.inputs_from_hf(**raw_inputs(BY_NAME[name]))
    with torch.no_grad():
        logits, loss = model(inputs, return_type="both")
    logs = logits.log_softmax(-1)
    terms = []
    for row in range(len(inputs)):
        for at in range(1, inputs.shape[1]):
            real = bool(inputs.attention_mask[row, at]) and bool(inputs.attention_mask[row, at - 1])
            if real and not bool(inputs.image_mask[row, at]):
                terms.append(-logs[row, at - 1, inputs.tokens[row, at]])
    assert abs(float(loss) - float(torch.stack(terms).mean())) < 1e-12
