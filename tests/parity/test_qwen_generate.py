"""Generation of Qwen models against Hugging Face: images of unequal sizes, videos and text-only rows in one batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import SuppressTokensLogitsProcessor

from tests.cases import build_hf, raw_inputs
from tests.parity.test_generate import never_ends, theirs
from tests.qwen_cases import IMAGE, KINDS, PAD, QWEN_BY_NAME, VIDEO, QwenCase

NAMES = ["plain", "image-and-video", "many-pictures", "long-video", "merge-3", "tied", "text-rows-between"]
NAMES += ["no-picture-at-all", "videos", "yarn", "thin-pictures"]
CASES = [QWEN_BY_NAME[f"{kind}-{name}"] for kind in KINDS for name in NAMES]
CASES += [QWEN_BY_NAME[f"qwen2_5_vl-{name}"] for name in ("slow-videos", "window-of-one-token")]
CASES += [QWEN_BY_NAME[f"qwen3_vl-deepstack-{name}"] for name in ("none", "every-decoder-layer", "video")]
CASES += [QWEN_BY_NAME[f"qwen2_vl-{name}"] for name in ("window", "one-head", "window-longer-than-rows")]
NEW = 40


@pytest.fixture
def pair_of():
    """A fresh pair whose generation never ends by itself."""
    from veena_lens import HookedVLM

    def get(case: QwenCase) -> tuple[Any, Any]:
        hf = never_ends(build_hf(case, gain=5.0))
        return hf, HookedVLM.from_hf(hf)

    return get


@pytest.mark.parametrize("case", CASES, ids=str)
def test_greedy_tokens_equal_hugging_face(case: QwenCase, pair_of) -> None:
    raw = raw_inputs(case)
    hf, model = pair_of(case)
    ours = model.generate(model.inputs_from_hf(**raw), max_new_tokens=NEW, return_type="tokens")
    assert ours.shape == (len(case.rows), NEW)
    assert ours.tolist() == theirs(hf, raw, max_new_tokens=NEW)
    assert len(set(ours.flatten().tolist())) > 4, "the model says too little for the test to show much"


@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("image-and-video", "long-video", "window")], ids=str)
def test_tokens_without_cache_equal_those_with_cache(case: QwenCase, pair_of) -> None:
    _, model = pair_of(case)
    inputs = model.inputs_from_hf(**raw_inputs(case))
    options = dict(max_new_tokens=16, return_type="tokens")
    options["logits_processor"] = [SuppressTokensLogitsProcessor([IMAGE, VIDEO])]
    cached = model.generate(inputs, **options)
    assert torch.equal(model.generate(inputs, use_past_kv_cache=False, **options), cached)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("token", [IMAGE, VIDEO, PAD], ids=["image-token", "video-token", "pad-token"])
def test_generated_special_token_is_a_token_like_any_other(kind: str, token: int, pair_of) -> None:
    """A model may say a placeholder: no image is looked for, with or without cache, and its text goes on."""
    from transformers import LogitsProcessorList

    from tests.parity.test_generate import Say

    case = QWEN_BY_NAME[f"{kind}-image-and-video"]
    hf, model = pair_of(case)
    raw = raw_inputs(case)
    inputs, length = model.inputs_from_hf(**raw), raw["input_ids"].shape[1]
    options = dict(max_new_tokens=8, logits_processor=LogitsProcessorList([Say(token, length + 2)]))
    expected = theirs(hf, raw, **options)
    assert all(row[2] == token for row in expected)
    for cached in (True, False):
        ours = model.generate(inputs, return_type="tokens", use_past_kv_cache=cached, **options)
        assert ours.tolist() == expected, f"use_past_kv_cache={cached}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["image-and-video", "long-video"])
def test_generated_tokens_make_an_answer_whose_logits_say_them_again(kind: str, name: str, pair_of) -> None:
    """Positions of an answer go on where those of generation do."""
    _, model = pair_of(QWEN_BY_NAME[f"{kind}-{name}"])
    inputs = model.inputs_from_hf(**raw_inputs(QWEN_BY_NAME[f"{kind}-{name}"]))
    options = dict(logits_processor=[SuppressTokensLogitsProcessor([IMAGE, VIDEO, PAD])])
    out = model.generate(inputs, max_new_tokens=20, return_type="tokens", **options)
    forced = inputs.with_answer(out)
    with torch.no_grad():
        logits = model(forced)
    logits[..., [IMAGE, VIDEO, PAD]] = -torch.inf
    for row, tokens in enumerate(out.tolist()):
        span = forced.spans[row].answer
        assert forced.tokens[row, span].tolist() == tokens
        assert logits[row, span.start - 1 : span.stop - 1].argmax(-1).tolist() == tokens


@pytest.mark.parametrize("kind", KINDS)
def test_right_padded_prompt_generates_as_the_left_padded_one(kind: str, pair_of) -> None:
    _, model = pair_of(QWEN_BY_NAME[f"{kind}-videos"])
    left, right = (
        model.inputs_from_hf(**raw_inputs(QWEN_BY_NAME[f"{kind}-{name}"]))
        for name in ("videos", "videos-right-padding")
    )
    options = dict(max_new_tokens=15, return_type="tokens")
    assert torch.equal(model.generate(left, **options), model.generate(right, **options))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["image-and-video", "text-rows-between"])
def test_row_generates_the_same_alone(kind: str, name: str, pair_of) -> None:
    _, model = pair_of(QWEN_BY_NAME[f"{kind}-{name}"])
    inputs = model.inputs_from_hf(**raw_inputs(QWEN_BY_NAME[f"{kind}-{name}"]))
    options = dict(max_new_tokens=15, return_type="tokens")
    together = model.generate(inputs, **options)
    for row in range(len(inputs)):
        assert model.generate(inputs[row].without_padding(), **options).tolist() == together[row : row + 1].tolist()
