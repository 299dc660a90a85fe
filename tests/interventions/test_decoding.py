"""Positions name the prompt: decoding with and without a cache of keys and values gives the same logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.cases import BY_NAME, build_hf, counted, raw_inputs, relative_error
from veena_lens import HookedVLM
from veena_lens.interventions import (
    Ablate,
    BoostAttention,
    KnockOutAttention,
    Patch,
    ScaleNeurons,
    Steer,
    SteerKeepingNorm,
    SuppressHeads,
    Tile,
)
from veena_lens.positions import position_mask

NAMES = ("three-images-and-none", "right-padding", "qwen3_vl-plain")
SCORES, PATTERN = "blocks.1.attn.hook_attn_scores", "blocks.1.attn.hook_pattern"
POSITIONS: dict[str, Any] = {
    "int": 8, "last int": -1, "ints": [-2, -4], "open slice": slice(-5, None), "slice": slice(4, -2), "mask": "mask",
    "row mask": "row mask", "tile": Tile(0), "image": "image", "text": "text", "last": "last", "query": "query",
    "generated": "generated", "last+generated": "last+generated", "all": "all", "prompt": "prompt",
}  # fmt: skip


def vector() -> Tensor:
    return torch.randn(48, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


KINDS: dict[str, Callable[[Any, Any], list[Any]]] = {
    "steer": lambda at, cache: [Steer(0, vector(), 2.0, positions=at)],
    "turn": lambda at, cache: [SteerKeepingNorm(0, vector(), 2.0, positions=at)],
    "scale neurons": lambda at, cache: [ScaleNeurons(0, list(range(40)), 3.0, positions=at)],
    "patch": lambda at, cache: [Patch("blocks.0.hook_resid_post", cache, positions=at)],
    "patch a pattern": lambda at, cache: [Patch(PATTERN, cache, positions=at, heads=[0, 3])],
    "patch scores": lambda at, cache: [Patch(SCORES, cache, positions=at)],
    "patch a tensor": lambda at, cache: [Patch("blocks.0.attn.hook_z", cache["z", 0], positions=at)],
    "patch a pattern's tensor": lambda at, cache: [Patch(PATTERN, cache["pattern", 1], positions=at)],
    "ablate": lambda at, cache: [Ablate("blocks.0.attn.hook_z", heads=[1, 2], positions=at)],
    "ablate scores": lambda at, cache: [Ablate(SCORES, heads=[1, 2], positions=at)],
    "ablate a pattern": lambda at, cache: [Ablate(PATTERN, heads=[1], positions=at, value=0.01)],
    "ablate to a value": lambda at, cache: [
        Ablate("blocks.0.hook_resid_post", positions=at, value=cache["resid_post", 0])
    ],
    "boost from": lambda at, cache: [BoostAttention(1, queries=at, keys="all", factor=-2.0, mode="mul")],
    "boost to": lambda at, cache: [BoostAttention(1, queries="all", keys=at, factor=5.0)],
    "knock out from": lambda at, cache: [KnockOutAttention(1, queries=at, keys="image")],
    "knock out to": lambda at, cache: [KnockOutAttention(1, queries="all", keys=at)],
    "quiet heads from": lambda at, cache: [SuppressHeads(1, 0.5, queries=at, keys="all")],
    "quiet heads to": lambda at, cache: [SuppressHeads(1, 0.5, queries="all", keys=at)],
    "several": lambda at, cache: [
        KnockOutAttention(1, queries="all", keys=at, heads=[0, 1]),
        BoostAttention(1, queries=at, keys="text", factor=2.0, mode="abs"),
        SuppressHeads(1, 0.5, 0.3, queries="last+generated", keys="generated"),
    ],
}


@pytest.fixture(scope="module", params=NAMES)
def ready(request: Any) -> tuple[Any, Any, Any]:
    case = BY_NAME[request.param]
    model = HookedVLM.from_hf(build_hf(case, gain=5.0), casts="none")
    inputs = model.inputs_from_hf(**counted(raw_inputs(case))).left_padded()
    with torch.no_grad(), model.hooks([("hook_embed", lambda x, hook: x.flip(-1))]):
        return model, inputs, model.run_with_cache(inputs)[1]


def steps(model: Any, inputs: Any, **settings: Any) -> tuple[Tensor, Tensor]:
    """The tokens, and the logits of each step [batch step d_vocab]."""
    seen: list[Tensor] = []

    def keep(ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(scores.clone())
        return scores

    more = dict(max_new_tokens=3, return_type="tokens", eos_token_id=[], logits_processor=[keep])
    tokens = model.generate(inputs, **more, **settings)
    return tokens, torch.stack(seen, 1)


def chosen(at: Any, inputs: Any) -> Any:
    if isinstance(at, str) and at.endswith("mask"):
        mask = torch.zeros(inputs.shape, dtype=torch.bool)
        mask[:, [6, -1]] = True
        return mask[0] if at == "row mask" else mask & (torch.arange(len(inputs))[:, None] != 1)
    return at


@settings(max_examples=18)
@given(st.sampled_from(sorted(KINDS)), st.sampled_from(sorted(POSITIONS)))
@example("quiet heads to", "generated").via("what differed")
@example("ablate scores", "mask").via("what differed")
def test_decoding_is_the_same_with_and_without_a_cache(ready: tuple[Any, Any, Any], kind: str, name: str) -> None:
    model, inputs, cache = ready
    with torch.no_grad(), model.intervene(KINDS[kind](chosen(POSITIONS[name], inputs), cache)):
        tokens, logits = steps(model, inputs)
        again, others = steps(model, inputs, use_past_kv_cache=False)
    assert torch.equal(tokens, again) and relative_error(logits, others) < 1e-5


WORDED = [name for name in KINDS if not name.startswith(("patch", "ablate to"))]


@settings(max_examples=10)
@given(st.sampled_from(WORDED), st.sampled_from(["last", "generated", "all", "text", "image", "prompt+generated"]))
def test_teacher_forcing_edits_as_generation_does(ready: tuple[Any, Any, Any], kind: str, at: str) -> None:
    model, inputs, cache = ready
    with torch.no_grad(), model.intervene(KINDS[kind](at, cache)):
        tokens, logits = steps(model, inputs)
        forced = model(inputs.with_new_tokens(tokens[:, :-1]))[:, -tokens.shape[1] :]
    assert relative_error(logits, forced) < 1e-5


@torch.no_grad()
def test_recorded_rows_are_the_same_with_and_without_a_cache(ready: tuple[Any, Any, Any]) -> None:
    model, inputs, _ = ready
    for queries, keys in (("generated", "text"), ("last+generated", [-1, -3]), (-1, slice(3, None))):
        found = []
        for use in (True, False):
            with model.record_attention(queries, keys) as rows, model.intervene([KnockOutAttention(0, keys="text")]):
                steps(model, inputs, use_past_kv_cache=use)
            found.append(rows.scores())
        assert found[0].values.shape == found[1].values.shape
        assert relative_error(found[0].values, found[1].values) < 1e-5 and found[0].meta == found[1].meta


@torch.no_grad()
def test_value_with_positions_is_that_of_the_prompt(ready: tuple[Any, Any, Any]) -> None:
    model, inputs, cache = ready
    value = cache["resid_post", 0]
    with model.intervene([Ablate("blocks.0.hook_resid_post", value=value)]):
        ours = steps(model, inputs)[1]
    with model.intervene([Ablate("blocks.0.hook_resid_post", value=value, positions="prompt")]):
        assert relative_error(ours, steps(model, inputs)[1]) < 1e-12
    for wrong, words in ((value[:, :-1], "of pos"), (value[:1].expand(7, -1, -1), "of batch 7")):
        with pytest.raises(ValueError, match=f"Ablate: the value is .*{words}"):
            with model.intervene([Ablate("blocks.0.hook_resid_post", value=wrong)]):
                model(inputs)


@torch.no_grad()
def test_patterns_of_prompts_of_other_length_are_refused_before_the_run(ready: tuple[Any, Any, Any]) -> None:
    model, inputs, cache = ready
    longer = inputs.with_answer([[7, 8]] * len(inputs))
    ran: list[str] = []
    short = model.run_with_cache(torch.randint(5, 90, (1, 6)))[1]
    with model.hooks([("hook_embed", lambda x, hook: ran.append("ran"))]):
        with pytest.raises(ValueError, match="keys at other positions"), model.intervene([Patch(PATTERN, short)]):
            model(inputs)
    assert not ran
    at = position_mask(inputs, "last")
    with model.intervene([Patch(PATTERN, cache)]):
        _, found = model.run_with_cache(longer)
    assert torch.equal(
        found["pattern", 1][:, :, : inputs.shape[1], : inputs.shape[1]][:, :, at[0]][0],
        cache["pattern", 1][0, :, at[0]],
    )
