"""Flags of a configuration may be set and act; every other field stays, and says so."""

from __future__ import annotations

import copy
import pickle
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest
import torch

from tests.cases import BY_NAME, Case, build_hf, tiny_tokenizer
from veena_lens.flags import SETTABLE
from veena_lens.hook_table import hooks_of

MHA = Case(name="flags-mha", family="text", text=dict(num_key_value_heads=6))
LARGE = dict(
    use_attn_result=("attn.hook_result",),
    use_split_qkv_input=("hook_q_input", "hook_k_input", "hook_v_input"),
    use_hook_mlp_in=("hook_mlp_in",),
    use_attn_in=("hook_attn_in",),
)


@pytest.fixture
def model() -> Any:
    from veena_lens import HookedVLM

    return HookedVLM.from_hf(build_hf(MHA))


@pytest.fixture
def grouped() -> Any:
    from veena_lens import HookedVLM

    return HookedVLM.from_hf(build_hf(BY_NAME["text-llama"]))


@torch.no_grad()
@pytest.mark.parametrize("flag", LARGE)
@pytest.mark.parametrize("by_setter", [True, False])
def test_a_flag_puts_its_copies_into_the_default_cache(flag: str, by_setter: bool, model: Any) -> None:
    tokens = torch.tensor([[5, 6, 7]])

    def put(value: bool) -> None:
        getattr(model, f"set_{flag}")(value) if by_setter else setattr(model.cfg, flag, value)

    def cached() -> set[str]:
        return set(model.run_with_cache(tokens)[1])

    plain, own = cached(), {f"blocks.{layer}.{name}" for layer in range(2) for name in LARGE[flag]}
    assert not plain & own
    put(True)
    assert getattr(model.cfg, flag) is True and cached() == plain | own
    assert model.to(torch.float32).cfg is not None and cached() == plain | own, "a cast keeps it"
    put(False)
    assert getattr(model.cfg, flag) is False and cached() == plain
    assert set(model.run_with_cache(tokens, names_filter=list(own))[1]) == own, "named, it is cached all the same"


@torch.no_grad()
def test_outputs_of_heads_are_computed_where_they_are_asked_for(model: Any) -> None:
    tokens, name = torch.tensor([[5, 6, 7], [8, 9, 10]]), "blocks.1.attn.hook_result"
    _, cache = model.run_with_cache(tokens)
    _, named = model.run_with_cache(tokens, names_filter=name)
    assert name not in set(cache) and name in cache and torch.equal(cache["result", 1], named[name])
    assert torch.equal(cache.at("last", "result", 1), named[name][:, -1])
    _, sliced = model.run_with_cache(tokens, pos_slice=-1)
    torch.testing.assert_close(sliced[name].reshape(2, -1), named[name][:, -1].reshape(2, -1))
    torch.testing.assert_close(
        cache.stack_head_results(2).sum(0), cache.decompose_resid(2, mode="attn", incl_embeds=False).sum(0)
    )
    _, other = model.run_with_cache(tokens, names_filter="blocks.1.hook_resid_post")
    with pytest.raises(KeyError, match="hook_result"):
        _ = other[name]
    with model.hooks([(name, lambda value, hook: value * 2)]):
        _, edited = model.run_with_cache(tokens)
    torch.testing.assert_close(edited[name], 2 * named[name])


def test_flags_are_a_models_own() -> None:
    from veena_lens import HookedVLM

    cfg = HookedVLM.from_hf(build_hf(MHA)).cfg
    one, other = HookedVLM(cfg), HookedVLM(cfg)
    one.cfg.use_attn_result = True
    assert other.cfg.flags.use_attn_result is None and cfg.flags.use_attn_result is None
    twin = copy.deepcopy(one)
    twin.cfg.use_attn_result = False
    assert one.cfg.use_attn_result is True
    assert pickle.loads(pickle.dumps(one.cfg)).flags == one.cfg.flags
    assert one.cfg == other.cfg and hash(one.cfg) == hash(other.cfg) and "flags" not in one.cfg.to_dict()


def test_other_fields_stay(model: Any) -> None:
    for name in (f.name for f in fields(model.cfg) if f.name not in SETTABLE):
        with pytest.raises(FrozenInstanceError, match=rf"cfg\.{name} cannot be set.*replace"):
            setattr(model.cfg, name, 1)
    with pytest.raises(AttributeError, match="Did you mean use_attn_result"):
        model.cfg.use_atn_result = True
    with pytest.raises(TypeError, match="True or False, not 1"):
        model.cfg.use_attn_result = 1


def test_copies_for_all_three_need_as_many_heads(grouped: Any) -> None:
    assert not any(name.endswith("hook_attn_in") for name in hooks_of(grouped.cfg))
    with pytest.raises(ValueError, match=r"keys and values \(2\) than for queries \(6\); use hook_q_input"):
        grouped.cfg.use_attn_in = True


@torch.no_grad()
def test_an_edit_of_the_common_copies_is_that_of_all_three(model: Any) -> None:
    tokens = torch.tensor([[5, 6, 7, 8]])

    def edit(value: Any, hook: Any) -> Any:
        value[:, 1:3, 2, :20] += 3
        return value

    at_once = model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_attn_in", edit)])
    one_by_one = [(f"blocks.1.hook_{letter}_input", edit) for letter in "qkv"]
    torch.testing.assert_close(at_once, model.run_with_hooks(tokens, fwd_hooks=one_by_one))
    assert (at_once - model(tokens)).abs().max() > 1e-3


@torch.no_grad()
def test_ungrouped_keys_and_values_have_one_copy_per_query_head(grouped: Any) -> None:
    tokens = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    names = [f"blocks.1.{name}" for name in ("attn.hook_k", "attn.hook_v", "attn.hook_rot_k", "hook_k_input")]
    logits, before = grouped.run_with_cache(tokens, names_filter=names)
    rows = grouped.attention(tokens, keys="all").values
    said = grouped.generate(tokens, 4, return_type="tokens")
    grouped.set_ungroup_grouped_query_attention(True)
    assert grouped.cfg.ungroup_grouped_query_attention
    wide, after = grouped.run_with_cache(tokens, names_filter=names)
    torch.testing.assert_close(wide, logits)
    for name in names:
        assert after[name].shape[2] == 6
        torch.testing.assert_close(after[name], before[name].repeat_interleave(3, 2))
    torch.testing.assert_close(grouped.attention(tokens, keys="all").values, rows)
    assert torch.equal(grouped.generate(tokens, 4, return_type="tokens"), said)

    # An edit of one copy reaches its own query head alone.
    def edit(value: Any, hook: Any) -> Any:
        value[:, :, 4] = 0
        return value

    for name, own in (("attn.hook_v", True), ("hook_v_input", False)):
        with grouped.hooks([(f"blocks.1.{name}", edit)]):
            _, edited = grouped.run_with_cache(tokens, names_filter="blocks.1.attn.hook_z")
        _, plain = grouped.run_with_cache(tokens, names_filter="blocks.1.attn.hook_z")
        changed = (edited["z", 1] - plain["z", 1]).abs().amax((0, 1, 3)) > 1e-9
        assert changed.tolist() == [False] * 4 + [True, False], name
        assert not own or not edited["z", 1][:, :, 4].any()
    grouped.cfg.ungroup_grouped_query_attention = False
    assert torch.equal(grouped(tokens), logits)


@torch.no_grad()
def test_the_context_may_be_shortened_and_set_back() -> None:
    from veena_lens import HookedVLM

    model = HookedVLM.from_hf(build_hf(MHA), tiny_tokenizer())
    whole, text = model.cfg.n_ctx, "w5 w6 w7 w8 w9"
    before = model(text)
    model.cfg.n_ctx = 4
    assert model.to_tokens(text).shape == (1, 4) and model.to_tokens(text, truncate=False).shape == (1, 6)
    with pytest.raises(ValueError, match="the model's context is 4"):
        model(text)
    names = list(hooks_of(model.cfg))
    for wrong in (0, whole + 1, True, 3.0):
        with pytest.raises(ValueError, match=f"an integer from 1 to {whole}, which the weights reach"):
            model.cfg.n_ctx = wrong
    model.to(torch.float64).cfg.n_ctx = whole
    assert torch.equal(model(text), before) and list(hooks_of(model.cfg)) == names


def test_printed_configuration_shows_neither_flags_nor_an_address(model: Any) -> None:
    model.cfg.use_attn_result = True
    assert "flags" not in repr(model.cfg) and " at 0x" not in repr(model.cfg)
