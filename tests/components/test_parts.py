"""Norms, rotary tables, masks, attention, MLP and key/value cache, each against its formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.cases import BY_NAME, CASES, hf_config, relative_error
from veena_lens.components.context import Context
from veena_lens.components.kv_cache import KVCache
from veena_lens.components.norms import LayerNorm, RMSNorm
from veena_lens.components.rotary import Rotary, inverse_frequencies, rotate
from veena_lens.config import RopeConfig


def shaken(module: Any, dtype: torch.dtype = torch.float64) -> Any:
    generator = torch.Generator().manual_seed(5)
    module = module.to(dtype)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return module


# --- norms -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rms_norm_rounds_as_llama_does(dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    ours, theirs = shaken(RMSNorm(16, 1e-5), dtype), LlamaRMSNorm(16, eps=1e-5).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 5, 16, dtype=torch.float64).to(dtype)
    assert torch.equal(ours(x), theirs(x))


def test_rms_norm_without_casts_is_exact() -> None:
    norm, x = shaken(RMSNorm(16, 1e-5, "none")), torch.randn(3, 5, 16, dtype=torch.float64)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    assert relative_error(norm(x), expected) < 1e-14
    assert relative_error(shaken(RMSNorm(16, 1e-5, "hf"))(x), expected) > 1e-9, "the cast to float32 shows"


def test_layer_norm_equals_torchs_and_has_no_cast() -> None:
    norm, x = shaken(LayerNorm(16, 1e-5)), torch.randn(3, 5, 16, dtype=torch.float64)
    assert torch.equal(norm(x), F.layer_norm(x, (16,), norm.weight, norm.bias, 1e-5))


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_scale_of_a_norm_is_its_denominator(kind: Any) -> None:
    norm, x = shaken(kind(16, 1e-3, "none")), torch.randn(2, 4, 16, dtype=torch.float64)
    seen: dict[str, Tensor] = {}
    for name in ("hook_scale", "hook_normalized"):
        hook = getattr(norm, name)
        hook.name = name
        hook.add_hook(lambda value, hook: seen.__setitem__(hook.name, value.clone()))
    out = norm(x)
    centred = x - x.mean(-1, keepdim=True) if kind is LayerNorm else x
    scale = (centred.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt()
    assert seen["hook_scale"].shape == (2, 4, 1) and relative_error(seen["hook_scale"], scale) < 1e-14
    normalized = centred / scale
    if kind is LayerNorm:  # after weight and bias, as in HookedTransformer
        normalized = normalized * norm.weight + norm.bias
        assert torch.equal(seen["hook_normalized"], out)
    assert relative_error(seen["hook_normalized"], normalized) < 1e-14


# --- rotary ------------------------------------------------------------------------------------------
ROPES = [case for case in CASES if case.family in ("llava", "text") and "rope_parameters" in case.text]


@pytest.mark.parametrize("case", ROPES, ids=str)
def test_frequencies_equal_transformers(case: Any) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = hf_config(case)
    text = getattr(config, "text_config", config)
    numbers = dict(text.rope_parameters)
    kind, theta = numbers.pop("rope_type"), numbers.pop("rope_theta")
    d_head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    ours, factor = inverse_frequencies(RopeConfig(theta=theta, rope_type=kind, scaling=tuple(numbers.items())), d_head)
    if kind == "default":
        theirs, scaling = 1.0 / (theta ** (torch.arange(0, d_head, 2).float() / d_head)), 1.0
    else:
        theirs, scaling = ROPE_INIT_FUNCTIONS[kind](text, torch.device("cpu"))
    assert ours.dtype == torch.float32 and torch.equal(ours, theirs) and factor == scaling


@given(shift=st.integers(0, 500), seed=st.integers(0, 9))
def test_rotated_products_depend_on_distance_only(shift: int, seed: int) -> None:
    rotary = Rotary(RopeConfig(theta=10_000.0), 8, "none")
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(1, 1, 1, 8, generator=generator, dtype=torch.float64) for _ in range(2))

    def product(at_q: int, at_k: int) -> float:
        tables = [rotary.tables(torch.tensor([[p]]), torch.float64) for p in (at_q, at_k)]
        return float((rotate(q, tables[0]) * rotate(k, tables[1])).sum())

    assert math.isclose(product(7 + shift, 3 + shift), product(7, 3), rel_tol=1e-9, abs_tol=1e-9)


def test_rotation_keeps_lengths_and_position_zero_changes_nothing() -> None:
    rotary = Rotary(RopeConfig(), 8, "none")
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    positions = torch.arange(5).expand(2, -1)
    turned = rotate(x, rotary.tables(positions, torch.float64))
    assert relative_error(turned.norm(dim=-1), x.norm(dim=-1)) < 1e-12
    assert torch.equal(turned[:, 0], x[:, 0]) and not torch.equal(turned[:, 1], x[:, 1])


def test_tables_are_rounded_to_float32_only_with_hugging_faces_casts() -> None:
    positions = torch.arange(300)[None]
    cos, _ = Rotary(RopeConfig(), 8, "hf").tables(positions, torch.float64)
    exact, _ = Rotary(RopeConfig(), 8, "none").tables(positions, torch.float64)
    assert torch.equal(cos, cos.float().double()) and not torch.equal(exact, exact.float().double())
    assert relative_error(cos, exact) < 1e-4
    assert Rotary(RopeConfig(), 8, "none").tables(positions, torch.bfloat16)[0].dtype == torch.bfloat16


# --- masks -------------------------------------------------------------------------------------------
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    n_past=st.integers(0, 4),
    n_new=st.integers(1, 5),
    window=st.sampled_from([None, 1, 2, 4, 50]),
)
def test_mask_allows_real_keys_of_the_past_within_the_window(
    lengths: list[int], n_past: int, n_new: int, window: int | None
) -> None:
    total = n_past + n_new
    key_mask = torch.stack([torch.arange(total) >= max(0, total - length - n_new + 1) for length in lengths])
    context = Context(key_mask=key_mask, n_past=n_past, n_new=n_new, windows=lambda layer: window)
    explicit = context.mask(0, torch.device("cpu")).explicit(n_new, total, torch.device("cpu"))
    allowed = torch.ones(n_new, total, dtype=torch.bool) if explicit is None else explicit
    allowed = allowed.expand(len(lengths), 1, n_new, total)
    for row in range(len(lengths)):
        for i in range(n_new):
            for key in range(total):
                at = n_past + i
                wanted = key <= at and bool(key_mask[row, key]) and (window is None or at - key < window)
                assert bool(allowed[row, 0, i, key]) == wanted, (row, at, key)


def test_no_mask_is_made_where_the_kernels_own_rule_serves() -> None:
    plain = Context(key_mask=torch.ones(2, 5, dtype=torch.bool), n_new=5).mask(0, torch.device("cpu"))
    assert plain.allowed is None and plain.is_causal
    step = Context(key_mask=torch.ones(2, 6, dtype=torch.bool), n_past=5, n_new=1).mask(0, torch.device("cpu"))
    assert step.allowed is None and not step.is_causal
    both = Context(key_mask=None, n_new=5, is_causal=False).mask(0, torch.device("cpu"))
    assert both.allowed is None and not both.is_causal


def test_masks_are_made_once_a_window() -> None:
    mask = torch.tensor([[False, True, True, True]])
    context = Context(key_mask=mask, n_new=4, windows=lambda layer: (None, 2, 2)[layer])
    device = torch.device("cpu")
    assert context.mask(1, device) is context.mask(2, device) and context.mask(0, device) is not context.mask(1, device)


# --- key/value cache ---------------------------------------------------------------------------------
def test_cache_returns_all_keys_in_order_and_keeps_rows() -> None:
    cache = KVCache(2)
    chunks = [torch.randn(3, n, 2, 4) for n in (4, 1, 2)]
    for chunk in chunks:
        mask = cache.extend_mask(torch.ones(3, chunk.shape[1], dtype=torch.bool))
        for layer in range(2):
            keys, values = cache.append(layer, chunk, chunk + layer)
    whole = torch.cat(chunks, 1)
    assert torch.equal(keys, whole) and torch.equal(values, whole + 1)
    assert cache.length == 7 and mask.shape == (3, 7)
    cache.keep_rows(torch.tensor([2, 0]))
    cache.extend_mask(torch.ones(2, 1, dtype=torch.bool))
    keys, _ = cache.append(0, torch.zeros(2, 1, 2, 4), torch.zeros(2, 1, 2, 4))
    assert torch.equal(keys[:, :7], whole[[2, 0]]) and cache.length == 8


def test_every_rope_type_of_the_table_is_covered() -> None:
    kinds = {case.text["rope_parameters"]["rope_type"] for case in ROPES}
    assert kinds == {"default", "linear", "dynamic", "llama3", "yarn"}
    assert BY_NAME["rope-yarn"] in ROPES
