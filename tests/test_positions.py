"""Words, numbers and masks of positions mean the same in every row, whatever its padding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from veena_lens.inputs import MultimodalInputs, find_spans, text_positions
from veena_lens.positions import WORDS, parse, position_mask
from veena_lens.spans import StoredImage

IMAGE, PAD = 99, 0
row_parts = st.lists(st.sampled_from(["t", "i"]), min_size=1, max_size=6)


def make(rows: list[list[str]], side: str, n_answer: int = 0, per_image: int = 3) -> MultimodalInputs:
    """Inputs whose text tokens count 1, 2, 3, ... in each row; a text part is two tokens."""
    ids, lengths = [], []
    for parts in rows:
        row: list[int] = []
        for part in [*parts, "t"]:
            row += [IMAGE] * per_image if part == "i" else [7, 8]
        ids.append(row + [5] * n_answer)
        lengths.append([per_image] * parts.count("i"))
    longest = max(map(len, ids))
    tokens = torch.full((len(ids), longest), PAD)
    for i, row in enumerate(ids):
        tokens[i, longest - len(row) :] = torch.tensor(row) if side == "left" else tokens[i, longest - len(row) :]
        if side == "right":
            tokens[i, : len(row)] = torch.tensor(row)
    mask = tokens != PAD
    answers = [n_answer] * len(ids) if n_answer else None
    return MultimodalInputs(
        tokens=tokens,
        attention_mask=mask,
        position_ids=text_positions(mask),
        image_token_id=IMAGE,
        spans=find_spans(tokens, mask, IMAGE, lengths, answers),
        layouts=tuple(tuple(StoredImage(grid=(1, per_image)) for _ in row) for row in lengths),
    )


@given(
    rows=st.lists(row_parts, min_size=1, max_size=4), side=st.sampled_from(["left", "right"]), answer=st.integers(0, 3)
)
def test_words_name_their_parts_of_every_row(rows: list[list[str]], side: str, answer: int) -> None:
    inputs = make(rows, side, answer)
    mask = inputs.attention_mask
    masks = {word: position_mask(inputs, word) for word in WORDS}
    assert torch.equal(masks["all"], mask)
    assert torch.equal(masks["image"], inputs.tokens == IMAGE)
    assert torch.equal(masks["text"], mask & (inputs.tokens != IMAGE))
    assert torch.equal(masks["answer"], inputs.tokens == 5) and torch.equal(masks["generated"], masks["answer"])
    assert torch.equal(masks["prompt"], mask & (inputs.tokens != 5))
    assert (masks["last"].sum(-1) == 1).all()
    for row in range(len(rows)):
        prompt = masks["prompt"][row].nonzero().flatten()
        assert int(masks["last"][row].nonzero()) == int(prompt[-1])
        images = masks["image"][row].nonzero().flatten()
        after = prompt[prompt > images[-1]] if len(images) else prompt
        assert masks["query"][row].nonzero().flatten().tolist() == after.tolist()


@given(rows=st.lists(row_parts, min_size=1, max_size=3), words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=3))
def test_words_joined_with_plus_are_a_union(rows: list[list[str]], words: list[str]) -> None:
    inputs = make(rows, "left", 2)
    expected = torch.stack([position_mask(inputs, word) for word in words]).any(0)
    assert torch.equal(position_mask(inputs, "+".join(words)), expected)
    assert torch.equal(position_mask(inputs, " + ".join(words)), expected)


@given(rows=st.lists(row_parts, min_size=1, max_size=3), positions=st.lists(st.integers(-8, 7), max_size=4))
def test_numbers_count_over_the_padded_sequence_and_never_mark_pads(
    rows: list[list[str]], positions: list[int]
) -> None:
    inputs = make(rows, "left")
    length = inputs.shape[1]
    if any(not -length <= p < length for p in positions):
        with pytest.raises(IndexError, match="outside a sequence"):
            position_mask(inputs, positions)
        return
    expected = torch.zeros(inputs.shape, dtype=torch.bool)
    expected[:, positions] = True
    for form in (positions, tuple(positions), torch.tensor(positions, dtype=torch.long)):
        assert torch.equal(position_mask(inputs, form), expected & inputs.attention_mask)


@given(rows=st.lists(row_parts, min_size=2, max_size=3), start=st.integers(-6, 6), stop=st.integers(-6, 9))
def test_slices_select_as_indexing_does(rows: list[list[str]], start: int, stop: int) -> None:
    inputs = make(rows, "right")
    expected = torch.zeros(inputs.shape, dtype=torch.bool)
    expected[:, start:stop] = True
    assert torch.equal(position_mask(inputs, slice(start, stop)), expected & inputs.attention_mask)


def test_word_image_is_narrowed_to_one_image_of_each_row() -> None:
    inputs = make([["i", "t", "i"], ["t"], ["i"]], "left")
    first, second = (position_mask(inputs, "image", image=i) for i in (0, 1))
    assert first.sum(-1).tolist() == [3, 0, 3] and second.sum(-1).tolist() == [3, 0, 0]
    assert torch.equal(first | second, position_mask(inputs, "image"))


def test_masks_of_one_row_or_all_rows_are_taken() -> None:
    inputs = make([["i"], ["t", "t"]], "left")
    each = torch.zeros(inputs.shape, dtype=torch.bool)
    each[0, -1] = each[1, 0] = True
    assert torch.equal(position_mask(inputs, each), each & inputs.attention_mask)
    shared = torch.zeros(inputs.shape[1], dtype=torch.bool)
    shared[-2:] = True
    assert position_mask(inputs, shared).sum(-1).tolist() == [2, 2]
    with pytest.raises(ValueError, match="mask of positions"):
        position_mask(inputs, torch.ones(3, dtype=torch.bool))


def test_image_token_at_a_pad_is_no_image() -> None:
    inputs = make([["i"]], "left")
    padded = replace(inputs, attention_mask=inputs.attention_mask & (torch.arange(inputs.shape[1]) > 0))
    assert not position_mask(padded, "image")[0, 0] and position_mask(padded, "image").sum() == 2


@pytest.mark.parametrize("wrong, error", [
    ("lastt", ValueError), ("last+", ValueError), ("", ValueError),
    (None, TypeError), (2.5, TypeError), ({}, TypeError),
])  # fmt: skip
def test_what_selects_nothing_raises(wrong: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="positions"):
        parse(wrong)


def test_unknown_word_is_named_beside_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'imge'.*image.*joined with"):
        parse("query+imge")
