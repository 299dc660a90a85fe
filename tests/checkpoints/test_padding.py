"""Which tokens of bare batches are pads, for every kind of tokenizer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.checkpoints import tiny
from tests.checkpoints.test_processing import TEXT_CFG
from veena_lens.checkpoints import give_pad_token, inputs_from_hf, pad_token_of, padding_mask
from veena_lens.config import HookedVLMConfig

KINDS = ("own pad", "padded with the end", "one token for all", "no tokenizer")


def kind(name: str) -> tuple[HookedVLMConfig, Any]:
    """Return configuration and tokenizer: pad 0, beginning 1, end 2, or the end in the place of the others."""
    cfg = replace(TEXT_CFG, pad_token_id=0 if name == "no tokenizer" else None, flags=replace(TEXT_CFG.flags))
    if name == "no tokenizer":
        return cfg, None
    tokenizer = tiny.tokenizer()
    if name != "own pad":
        tokenizer.pad_token = None
    if name == "one token for all":
        tokenizer.bos_token = tokenizer.eos_token
    cfg.flags.tokenizer_prepends_bos = lambda: name == "one token for all"
    return cfg, tokenizer


@pytest.mark.parametrize("name", KINDS)
@given(
    rows=st.lists(st.lists(st.integers(5, 60), min_size=1, max_size=6), min_size=2, max_size=4),
    side=st.sampled_from(["left", "right"]),
    ends=st.booleans(),
)
def test_pads_at_an_end_are_found(name: str, rows: list[list[int]], side: str, ends: bool) -> None:
    cfg, tokenizer = kind(name)
    pad = pad_token_of(tokenizer, cfg)
    first = [pad] if name == "one token for all" else []
    rows = [first + row + [2] * (ends and pad != 2) for row in rows]
    length = max(map(len, rows))
    missing = [[pad] * (length - len(row)) for row in rows]
    padded = [m + r if side == "left" else r + m for m, r in zip(missing, rows, strict=True)]
    expected = torch.tensor(
        [[0] * len(m) + [1] * len(r) if side == "left" else [1] * len(r) + [0] * len(m) for m, r in zip(missing, rows)]
    )
    assert torch.equal(padding_mask(cfg, tokenizer, torch.tensor(padded)), expected.bool())


def test_an_end_of_text_that_every_row_has_is_text() -> None:
    cfg, tokenizer = kind("padded with the end")
    tokens = torch.tensor([[5, 6, 2, 2], [5, 6, 7, 2]])
    assert padding_mask(cfg, tokenizer, tokens).tolist() == [[True, True, True, False], [True] * 4]
    assert padding_mask(cfg, tokenizer, tokens[1:]).all()


def test_pads_inside_a_row_and_a_row_of_pads_are_text() -> None:
    cfg, tokenizer = kind("own pad")
    assert padding_mask(cfg, tokenizer, torch.tensor([[5, 0, 6], [0, 0, 0]])).all()


def test_without_any_pad_token_nothing_is_masked() -> None:
    assert padding_mask(replace(TEXT_CFG, pad_token_id=None), None, torch.arange(5)[None]).all()


def test_a_processors_pads_without_a_mask_are_refused_where_the_end_of_text_pads() -> None:
    cfg, tokenizer = kind("padded with the end")
    with pytest.raises(ValueError, match=r"Rows \[1\] begin or end with the pad token 2"):
        inputs_from_hf(cfg, tokenizer, input_ids=torch.tensor([[5, 6, 7], [2, 5, 6]]))
    assert inputs_from_hf(cfg, tokenizer, input_ids=torch.tensor([[5, 6, 2]])).attention_mask.all()


def test_a_tokenizer_without_pad_token_names_the_models() -> None:
    for name, pad in (("own pad", 0), ("padded with the end", 2), ("one token for all", 2)):
        cfg, tokenizer = kind(name)
        give_pad_token(tokenizer, cfg)
        assert tokenizer.pad_token_id == pad == pad_token_of(tokenizer, cfg)
    cfg, tokenizer = kind("padded with the end")
    give_pad_token(tokenizer, replace(cfg, pad_token_id=1))
    assert tokenizer.pad_token_id == 1
    cfg, tokenizer = kind("padded with the end")
    give_pad_token(tokenizer, replace(cfg, pad_token_id=7))
    assert tokenizer.pad_token_id is None, "texts would lose an ordinary token"
    give_pad_token(None, cfg)
