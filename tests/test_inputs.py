"""MultimodalInputs: a token tensor's manners, rows that keep their images, answers, and what it prints."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.cases import (
    BY_NAME,
    IMAGE_TOKEN,
    QWEN,
    Case,
    counted,
    counted_inputs,
    native_model,
    raw_inputs,
    relative_error,
    tiny_tokenizer,
)
from tests.model.checks import plain_model
from tests.odd_inputs import QWEN_IMAGE, QWEN_VIDEO
from veena_lens.inputs import MultimodalInputs, text_positions
from veena_lens.positions import position_mask

NAME = "three-images-and-none"
ROWS = st.lists(st.sampled_from(["3", "i", "1", "i i"]), min_size=1, max_size=4).map(
    lambda parts: " ".join([*parts, "2"])
)
# Images of any size and frames of videos, whose tokens have three streams of positions.
PARTS = st.lists(st.sampled_from(["3", "i2x4", "i4x4", "1", "v2x4x2"]), min_size=1, max_size=4)
SIZED = PARTS.map(lambda parts: " ".join([*parts, "2"]))
STREAMS = ("2 i4x4 3 v2x2x4 2", "1 i2x6 2 i6x2 3", "4")
BASE = {family: Case(name="inputs", family=family, rows=STREAMS) for family in QWEN}
BASE["llava"] = BY_NAME[NAME]
FAMILIES = list(BASE)


def inputs_of(case: Case) -> MultimodalInputs:
    """The inputs of any rows, for the model of the case that its family has in `BASE`."""
    return native_model(BASE[case.family], casts="none").inputs_from_hf(**counted_inputs(case))


def of_family(family: str, **changes: Any) -> MultimodalInputs:
    return inputs_of(replace(BASE[family], **changes))


def positions_of(case: Case) -> Tensor:
    """The positions, counted token by token."""
    if not case.has("streams"):
        return counted(raw_inputs(case))["position_ids"]
    return plain_model(BASE[case.family]).positions(raw_inputs(case))


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
    inputs = of_family("llava", rows=tuple(rows), padding=padding)
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


@given(
    rows=st.lists(SIZED, min_size=1, max_size=3),
    padding=st.sampled_from(["left", "right"]),
    family=st.sampled_from(QWEN),
)
def test_spans_grids_and_streams_name_what_the_rows_hold(rows: list[str], padding: str, family: str) -> None:
    """Frames of a video count as images of their own, each with its grid."""
    case = replace(BASE[family], rows=tuple(rows), padding=padding)
    inputs = inputs_of(case)
    picture = 0
    for row, (text, spans) in enumerate(zip(rows, inputs.spans, strict=True)):
        grids = []
        for word in text.split():
            sizes = [int(n) for n in word[1:].split("x")] if "x" in word else []
            if sizes:
                grids += [(sizes[-2], sizes[-1])] * (sizes[0] if word[0] == "v" else 1)
        assert inputs.grids[row] == tuple((h // 2, w // 2) for h, w in grids)
        assert len(spans.images) == inputs.n_images[row] == len(grids)
        real = inputs.attention_mask[row].nonzero().flatten()
        assert spans.last == real[-1] and spans.query.stop == spans.last + 1
        assert spans.query.start == (spans.images[-1].stop if grids else real[0])
        filled = torch.zeros_like(inputs.attention_mask[row])
        for image, (height, width) in enumerate(grids):
            tokens = inputs.grid_tokens(row, image)
            assert tokens.shape == (height // 2, width // 2)
            assert tokens.flatten().tolist() == list(range(spans.images[image].start, spans.images[image].stop))
            filled[tokens.flatten()] = True
            assert torch.equal(position_mask(inputs, "image", image)[row].nonzero().flatten(), tokens.flatten())
            assert inputs.crop_grids is not None and inputs.crop_grids[picture].tolist() == [height, width]
            assert inputs.crop_rows is not None and inputs.crop_rows[picture] == row
            assert inputs.crop_images is not None and inputs.crop_images[picture] == image
            picture += 1
        assert torch.equal(inputs.image_mask[row], filled)
        assert torch.equal(filled, (inputs.tokens[row] == QWEN_IMAGE) | (inputs.tokens[row] == QWEN_VIDEO))
    if picture:
        assert torch.equal(inputs.position_ids, positions_of(case))
        assert inputs.pixel_values is not None and len(inputs.pixel_values) == picture
    else:
        assert inputs.pixel_values is None and inputs.crop_grids is None


@settings(max_examples=20)
@given(rows=st.lists(ROWS, min_size=1, max_size=4) | st.lists(SIZED, min_size=1, max_size=3).map(tuple), data=st.data())
def test_chosen_rows_keep_their_own_images(rows: Any, data: st.DataObject) -> None:
    inputs = of_family("qwen2_vl" if isinstance(rows, tuple) else "llava", rows=tuple(rows))
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=5))
    part = inputs[torch.tensor(chosen)]
    assert torch.equal(part.tokens, inputs.tokens[chosen])
    assert torch.equal(part.position_ids, inputs.position_ids[..., chosen, :])
    assert [str(s) for s in part.spans] == [str(inputs.spans[row]) for row in chosen]
    assert part.grids == tuple(inputs.grids[row] for row in chosen)
    owners = [] if inputs.crop_rows is None else inputs.crop_rows.tolist()
    images = [i for row in chosen for i, owner in enumerate(owners) if owner == row]
    if not images:
        assert part.pixel_values is None and part.crop_grids is None and part.crop_lengths() is None
        return
    assert part.crop_rows.tolist() == [new for new, row in enumerate(chosen) for owner in owners if owner == row]
    if inputs.crop_grids is None:
        assert torch.equal(part.pixel_values, inputs.pixel_values[images])
        return
    assert torch.equal(part.crop_grids, inputs.crop_grids[images])
    lengths = part.crop_grids.prod(-1).tolist()
    assert part.crop_lengths() == lengths and part.crop_lengths(in_tokens=True) == [n // 4 for n in lengths]
    assert part.pixel_values.shape[1] == max(lengths), "padded no further than the longest that is left"
    for mine, theirs, n in zip(part.pixel_values, inputs.pixel_values[images], lengths, strict=True):
        assert torch.equal(mine[:n], theirs[:n])


@pytest.mark.parametrize("family", FAMILIES)
def test_chosen_rows_compute_what_they_did_in_the_batch(family: str) -> None:
    model, inputs = native_model(BASE[family], casts="none"), of_family(family)
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


@pytest.mark.parametrize(
    ("family", "more"),
    [("llava", ["image_rows"]), ("qwen3_vl", ["crop_images", "crop_grids"])],
    ids=["llava", "qwen3_vl"],
)
def test_moving_takes_everything_along(family: str, more: list[str]) -> None:
    inputs = of_family(family)
    moved = inputs.to("meta")
    for name in ("tokens", "attention_mask", "position_ids", "pixel_values", "crop_rows", *more):
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
    inputs = of_family("llava", rows=tuple(rows), padding=padding)
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


ANSWERS = [[50, 51, 52], [53], []]


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_answered_rows_compute_as_longer_prompts(family: str, padding: str) -> None:
    model, inputs = native_model(BASE[family], casts="none"), of_family(family, padding=padding)
    forced = inputs.with_answer(ANSWERS)
    n = int(inputs.lengths[2])
    assert torch.equal(forced.position_ids[..., 2, forced.attention_mask[2]].view(-1, n)[0], torch.arange(n))
    with torch.no_grad():
        plain, answered = model(inputs), model(forced)
    # The same tokens as prompts of their own, positions counted afresh.
    longer = raw_inputs(replace(BASE[family], padding=padding))
    longer |= dict(input_ids=forced.tokens, attention_mask=forced.attention_mask.long())
    if "mm_token_type_ids" in longer:
        longer["mm_token_type_ids"] = (forced.tokens == QWEN_IMAGE).long() + 2 * (forced.tokens == QWEN_VIDEO).long()
    else:
        longer = counted(longer)
    with torch.no_grad():
        expected = model.forward_hf(**longer)
    assert relative_error(answered, expected, forced.attention_mask) < 1e-12
    for row, answer in enumerate(ANSWERS):
        spans, n = forced.spans[row], int(inputs.lengths[row])
        assert forced.tokens[row, spans.answer].tolist() == answer and spans.answer.start == spans.last + 1
        mine = answered[row, forced.attention_mask[row]]
        assert relative_error(mine[:n], plain[row, inputs.attention_mask[row]]) < 1e-12, "the prompt sees no answer"
        for image in range(inputs.n_images[row]):
            after = forced.grid_tokens(row, image) - forced.attention_mask[row].int().argmax()
            before = inputs.grid_tokens(row, image) - inputs.attention_mask[row].int().argmax()
            assert torch.equal(after, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_generated_tokens_follow_in_all_streams(family: str) -> None:
    inputs = of_family(family)
    new = torch.tensor([[50, 51], [52, 53], [54, 55]])
    grown, forced = inputs.with_new_tokens(new), inputs.with_answer(new.tolist())
    assert torch.equal(grown.tokens, forced.tokens) and torch.equal(grown.position_ids, forced.position_ids)
    assert torch.equal(grown.attention_mask, forced.attention_mask) and grown.spans == forced.spans
    assert [s.answer for s in grown.spans] == [slice(inputs.shape[1], inputs.shape[1] + 2)] * 3
    steps = grown.position_ids[..., -2:]
    assert torch.equal(steps[..., 1], steps[..., 0] + 1)
    assert steps.ndim == 2 or torch.equal(steps, steps[:1].expand_as(steps)), "streams differ after the prompt"
    more = grown.with_new_tokens(new)
    assert torch.equal(more.position_ids[..., -1], grown.position_ids[..., -1] + 2)
    assert torch.equal(more.image_mask[:, : inputs.shape[1]], inputs.image_mask) and not more.image_mask[:, -4:].any()


def test_answer_as_text_goes_through_the_tokenizer_without_special_tokens(inputs: MultimodalInputs) -> None:
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


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_trimmed_and_left_padded_rows_are_the_same_rows(family: str, padding: str) -> None:
    model, inputs = native_model(BASE[family], casts="none"), of_family(family, padding=padding)
    left = inputs.left_padded()
    assert bool(left.attention_mask[:, -1].all()) and (left is inputs) == (padding == "left")
    counted_there = torch.ones_like(left.attention_mask) if family in QWEN else left.attention_mask
    assert torch.equal(left.position_ids[..., counted_there], positions_of(BASE[family])[..., counted_there])
    with torch.no_grad():
        whole, moved = model(inputs), model(left)
        for row in range(3):
            keep, ours = inputs.attention_mask[row], left.attention_mask[row]
            assert relative_error(moved[row, ours], whole[row, keep]) < 1e-12
            alone = inputs[row].without_padding()
            assert alone.shape == (1, int(keep.sum())) and bool(alone.attention_mask.all())
            assert relative_error(model(alone)[0], whole[row, keep]) < 1e-12
            assert left.spans[row].last == left.shape[1] - 1
            for one in (alone, left[row]):
                for image in range(inputs.n_images[row]):
                    cells, before = one.grid_tokens(0, image), inputs.grid_tokens(row, image)
                    assert torch.equal(one.tokens[0, cells], inputs.tokens[row, before])
                assert torch.equal(one.tokens[0, one.spans[0].query], inputs.tokens[row, inputs.spans[row].query])


def test_it_prints_its_rows_in_a_few_lines(inputs: MultimodalInputs) -> None:
    text = repr(inputs)
    assert "3 rows" in text and "18 positions" in text and "images=[" in text and "last=17" in text
    assert len(text.splitlines()) <= 10
    many: Any = of_family("llava", rows=("2 i 1",) * 9)
    assert len(repr(many).splitlines()) <= 10 and "6 more" in repr(many)
    text = repr(of_family("qwen2_vl"))
    assert "images [3, 2, 0]" in text and "grids [2x2, 1x2, 1x2]" in text and len(text.splitlines()) <= 10
