"""MultimodalInputs: a token tensor's manners, rows that keep their images, answers, and what it prints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.cases import BY_NAME, IMAGE_TOKEN, Case, counted, native_model, raw_inputs, relative_error, tiny_tokenizer
from veena_lens.inputs import MultimodalInputs, text_positions

NAME = "three-images-and-none"
ROWS = st.lists(st.sampled_from(["3", "i", "1", "i i"]), min_size=1, max_size=4).map(
    lambda parts: " ".join([*parts, "2"])
)


def inputs_of(case: Case) -> MultimodalInputs:
    return native_model(BY_NAME["clip-llama"]).inputs_from_hf(**counted(raw_inputs(case)))


@pytest.fixture
def inputs() -> MultimodalInputs:
    return inputs_of(BY_NAME[NAME])


# --- manners of a token tensor -----------------------------------------------------------------------
def test_it_stands_in_for_its_tokens(inputs: MultimodalInputs) -> None:
    tokens = inputs.tokens
    assert inputs.shape == tokens.shape and inputs.ndim == tokens.ndim == inputs.dim() and len(inputs) == len(tokens)
    assert inputs.size() == tokens.size() and inputs.size(1) == tokens.size(1) and inputs.size(-1) == tokens.size(-1)
    assert inputs.device == tokens.device and inputs.dtype == tokens.dtype
    batch, pos = inputs.shape
    assert (batch, pos) == (3, 18)


@given(rows=st.lists(ROWS, min_size=1, max_size=4), padding=st.sampled_from(["left", "right"]))
def test_spans_name_images_query_and_last_of_every_row(rows: list[str], padding: str) -> None:
    inputs = inputs_of(Case(name="drawn", rows=tuple(rows), padding=padding))
    for row, (text, spans) in enumerate(zip(rows, inputs.spans, strict=True)):
        words = text.split()
        assert len(spans.images) == words.count("i") == inputs.n_images[row] == len(inputs.grids[row])
        at = int(inputs.attention_mask[row].nonzero()[0])
        found = iter(spans.images)
        for word in words:
            if word == "i":
                assert next(found) == slice(at, at + 4)
                assert (inputs.tokens[row, at : at + 4] == IMAGE_TOKEN).all()
                at += 4
            else:
                at += int(word)
        assert spans.last == at - 1 and spans.query.stop == at and spans.answer is None
        first = int(inputs.attention_mask[row].nonzero()[0])
        assert spans.query.start == (spans.images[-1].stop if spans.images else first)
        assert inputs.lengths[row] == inputs.attention_mask[row].sum()


@given(rows=st.lists(ROWS, min_size=1, max_size=4), data=st.data())
def test_chosen_rows_keep_their_own_pictures(rows: list[str], data: st.DataObject) -> None:
    inputs = inputs_of(Case(name="drawn", rows=tuple(rows)))
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=5))
    part = inputs[torch.tensor(chosen)]
    owned = {row: [] for row in range(len(rows))}
    for picture, row in enumerate(inputs.crop_rows.tolist() if inputs.crop_rows is not None else []):
        owned[row].append(picture)
    pictures = [p for row in chosen for p in owned[row]]
    assert torch.equal(part.tokens, inputs.tokens[chosen]) and torch.equal(
        part.position_ids, inputs.position_ids[chosen]
    )
    if pictures:
        assert torch.equal(part.pixel_values, inputs.pixel_values[pictures])
        assert part.crop_rows.tolist() == [new for new, row in enumerate(chosen) for _ in owned[row]]
    else:
        assert part.pixel_values is None
    assert [str(s) for s in part.spans] == [str(inputs.spans[row]) for row in chosen]
    assert part.grids == tuple(inputs.grids[row] for row in chosen)


def test_chosen_rows_compute_what_they_did_in_the_batch(inputs: MultimodalInputs) -> None:
    model = native_model(BY_NAME[NAME], casts="none")
    with torch.no_grad():
        whole = model(inputs)
        for index in (0, -1, slice(1, None), [2, 0, 2], torch.tensor([1]), torch.tensor([True, False, True])):
            part = inputs[index]
            expected = whole[[index] if isinstance(index, int) else index]
            assert relative_error(model(part), expected, part.attention_mask) < 1e-12


def test_one_row_is_a_batch_of_one_and_rows_only_are_indexed(inputs: MultimodalInputs) -> None:
    assert inputs[1].shape == (1, 18) and inputs[-1].shape == (1, 18)
    assert len(inputs[0:2]) == 2 and len(inputs[torch.tensor([True, False, False])]) == 1
    with pytest.raises(IndexError):
        inputs[3]
    with pytest.raises(IndexError, match="rows only"):
        inputs[0, 1]


def test_moving_takes_everything_along(inputs: MultimodalInputs) -> None:
    moved = inputs.to("meta")
    for name in ("tokens", "attention_mask", "position_ids", "pixel_values", "crop_rows", "image_rows"):
        assert getattr(moved, name).device.type == "meta"
        assert getattr(inputs, name).device.type == "cpu"
    assert moved.spans == inputs.spans


def test_positions_count_real_tokens_only() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
    assert text_positions(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 1, 1, 1]]


# --- answers -----------------------------------------------------------------------------------------
@given(
    rows=st.lists(ROWS, min_size=1, max_size=3),
    padding=st.sampled_from(["left", "right"]),
    lengths=st.lists(st.integers(0, 4), min_size=3, max_size=3),
)
def test_answer_follows_its_prompt_in_every_row(rows: list[str], padding: str, lengths: list[int]) -> None:
    inputs = inputs_of(Case(name="drawn", rows=tuple(rows), padding=padding))
    answers = [list(range(50, 50 + n)) for n in lengths[: len(rows)]]
    forced = inputs.with_answer(answers)
    for row, answer in enumerate(answers):
        before, after = inputs.attention_mask[row], forced.attention_mask[row]
        assert forced.tokens[row, after].tolist() == inputs.tokens[row, before].tolist() + answer
        n = int(before.sum()) + len(answer)
        assert forced.position_ids[row, after].tolist() == list(range(n))
        spans = forced.spans[row]
        assert forced.tokens[row, spans.answer].tolist() == answer and spans.answer.start == spans.last + 1
        assert forced.tokens[row, spans.last] == inputs.tokens[row, inputs.spans[row].last]
        assert forced.tokens[row, spans.query].tolist() == inputs.tokens[row, inputs.spans[row].query].tolist()
        assert [s.stop - s.start for s in spans.images] == [4] * inputs.n_images[row]
        assert bool(after[-1]), "rows with an answer end at the last position"


def test_second_answer_replaces_the_first(inputs: MultimodalInputs) -> None:
    once = inputs.with_answer([[50, 51, 52], [50], [50, 51]])
    again = once.with_answer([[60], [61, 62], []])
    direct = inputs.with_answer([[60], [61, 62], []])
    for row in range(3):
        keep, other = again.attention_mask[row], direct.attention_mask[row]
        assert again.tokens[row, keep].tolist() == direct.tokens[row, other].tolist()
        assert again.position_ids[row, keep].tolist() == direct.position_ids[row, other].tolist()


def test_answered_prompt_predicts_as_the_prompt_alone(inputs: MultimodalInputs) -> None:
    """Causality: the prompt's logits do not see the answer."""
    model = native_model(BY_NAME[NAME], casts="none")
    forced = inputs.with_answer([[50, 51, 52], [53], [54, 55]])
    with torch.no_grad():
        plain, answered = model(inputs), model(forced)
    for row in range(3):
        ours = answered[row, : forced.spans[row].last + 1][forced.attention_mask[row, : forced.spans[row].last + 1]]
        assert relative_error(ours, plain[row][inputs.attention_mask[row]]) < 1e-12


def test_answer_as_text_goes_through_the_tokenizer_without_special_tokens(inputs: MultimodalInputs) -> None:
    from dataclasses import replace

    tokenizer = tiny_tokenizer()
    known = replace(inputs, tokenize=lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
    one_for_all = known.with_answer("w50 w51")
    each = known.with_answer(["w50", "w51 w52", "w53"])
    assert [one_for_all.tokens[i, s.answer].tolist() for i, s in enumerate(one_for_all.spans)] == [[50, 51]] * 3
    assert [each.tokens[i, s.answer].tolist() for i, s in enumerate(each.spans)] == [[50], [51, 52], [53]]
    with pytest.raises(ValueError, match="no tokenizer"):
        inputs.with_answer("w50")
    with pytest.raises(ValueError, match="2 answers for 3 rows"):
        inputs.with_answer([[50], [51]])


def test_left_padded_rows_are_the_same_rows(inputs: MultimodalInputs) -> None:
    model = native_model(BY_NAME["right-padding"], casts="none")
    right = model.inputs_from_hf(**counted(raw_inputs(BY_NAME["right-padding"])))
    left = right.left_padded()
    assert bool(left.attention_mask[:, -1].all()) and inputs.left_padded() is inputs
    with torch.no_grad():
        ours, theirs = model(left), model(right)
    for row in range(len(right)):
        assert relative_error(ours[row][left.attention_mask[row]], theirs[row][right.attention_mask[row]]) < 1e-12
        for a, b in zip(left.spans[row].images, right.spans[row].images, strict=True):
            assert left.tokens[row, a].tolist() == right.tokens[row, b].tolist()
        assert left.tokens[row, left.spans[row].query].tolist() == right.tokens[row, right.spans[row].query].tolist()
        assert left.spans[row].last == left.shape[1] - 1


def test_it_prints_its_rows_in_a_few_lines(inputs: MultimodalInputs) -> None:
    text = repr(inputs)
    assert "3 rows" in text and "18 positions" in text and "images=[" in text and "last=17" in text
    assert len(text.splitlines()) <= 10
    many: Any = inputs_of(Case(name="many", rows=("2 i 1",) * 9))
    assert len(repr(many).splitlines()) <= 10 and "6 more" in repr(many)
