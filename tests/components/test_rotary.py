"""Scaled rotary positions: the context that a rule reaches, and Hugging Face's numbers past the trained one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.families import Case, build_hf, hf_config, raw_inputs, relative_error
from tests.parity.runs import never_ends
from veena_lens import HookedVLM
from veena_lens.checkpoints import find_adapter
from veena_lens.sweeps import patch_sweep

TRAINED = dict(original_max_position_embeddings=16)
LLAMA3 = dict(low_freq_factor=1.0, high_freq_factor=4.0, **TRAINED)
# (rule, its numbers, max_position_embeddings, the context that it reaches)
RULES: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "plain": ("default", {}, 16, 16),
    "linear": ("linear", dict(factor=4.0), 16, 64),
    "linear, trained length named": ("linear", dict(factor=4.0, **TRAINED), 64, 64),
    "dynamic": ("dynamic", dict(factor=4.0), 16, 64),
    "yarn": ("yarn", dict(factor=4.0), 16, 64),
    "yarn, trained length named": ("yarn", dict(factor=4.0, **TRAINED), 16, 64),
    "yarn, a longer length stated": ("yarn", dict(factor=4.0, **TRAINED), 20, 64),
    "yarn, already stretched": ("yarn", dict(factor=4.0, **TRAINED), 64, 64),
    "llama3": ("llama3", dict(factor=8.0, **LLAMA3), 64, 64),
}


def case_of(name: str, *rows: str, family: str = "text") -> Case:
    kind, numbers, most, _ = RULES[name]
    rope = dict(rope_type=kind, rope_theta=1e4, **numbers)
    return Case(name="rope", family=family, rows=rows, text=dict(max_position_embeddings=most, rope_parameters=rope))


@pytest.mark.parametrize("name", RULES)
def test_context_reaches_as_far_as_the_rule(name: str) -> None:
    config = hf_config(case_of(name))
    assert find_adapter("LlamaForCausalLM").read_config(config).n_ctx == RULES[name][3]


@pytest.mark.parametrize("name", [name for name in RULES if name != "plain"])
@settings(max_examples=4)
@given(lengths=st.tuples(st.integers(1, 16), st.integers(15, 64)))
def test_logits_past_the_trained_context_equal_hugging_face(name: str, lengths: tuple[int, int]) -> None:
    """Bit for bit, whether one row is past it or both are within: the longest row decides, as there."""
    for rows in ((f"{lengths[0]}",), tuple(map(str, lengths)), (f"{lengths[1]}",)):
        case = case_of(name, *rows)
        hf, raw = build_hf(case, gain=2.0), raw_inputs(case)
        with torch.no_grad():
            theirs = hf(**raw).logits
            ours = HookedVLM.from_hf(hf).forward_hf(**raw)
        keep = raw["attention_mask"].bool()
        assert torch.equal(ours[keep], theirs[keep])


@pytest.mark.parametrize("name", ["dynamic", "yarn", "linear"])
def test_answers_that_grow_past_the_trained_context_equal_hugging_face(name: str) -> None:
    case = case_of(name, "3 i 5", "9 i 2", family="llava")
    hf, raw = never_ends(build_hf(case, gain=2.0)), raw_inputs(case)
    model = HookedVLM.from_hf(hf)
    with torch.no_grad():
        theirs = hf.generate(**raw, max_new_tokens=40, do_sample=False)[:, raw["input_ids"].shape[1] :]
    ours = model.generate(model.inputs_from_hf(**raw), max_new_tokens=40, return_type="tokens", eos_token_id=[])
    assert torch.equal(ours, theirs)


def test_suffix_engine_knows_the_length_of_the_whole_row() -> None:
    case = case_of("dynamic", "40", "40")
    model = HookedVLM.from_hf(build_hf(case, gain=2.0), casts="none")
    inputs = model.inputs_from_hf(**raw_inputs(case))
    pair: dict[str, Any] = dict(clean=inputs[0], corrupted=inputs[1], sites="resid", progress=False)
    pair["metric"] = lambda logits: logits[:, 5]
    for positions in ("last", "each"):
        suffix, naive = (
            patch_sweep(model, **pair, positions=positions, engine=engine).values for engine in ("suffix", "naive")
        )
        assert relative_error(suffix, naive) < 1e-10


def test_rule_that_lacks_a_number_is_refused_by_name() -> None:
    read = find_adapter("LlamaForCausalLM").read_config
    config = hf_config(case_of("llama3"))
    config.rope_parameters.pop("low_freq_factor")
    with pytest.raises(ValueError, match="rope_parameters of type 'llama3' lack low_freq_factor"):
        read(config)
    config = hf_config(case_of("linear"))
    config.rope_parameters["factor"] = 0.0
    with pytest.raises(ValueError, match=r"factor=0\.0 must be positive"):
        read(config)
