"""MultimodalInputs with images of unequal size, frames of videos and three streams of positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.cases import QWEN, Case, native_model, raw_inputs, relative_error
from tests.model.checks import plain_model
from tests.odd_inputs import QWEN_IMAGE, QWEN_VIDEO
from veena_lens.inputs import MultimodalInputs
from veena_lens.positions import position_mask

ROWS = ("2 i4x4 3 v2x2x4 2", "1 i2x6 2 i6x2 3", "4")
PARTS = st.lists(st.sampled_from(["3", "i2x4", "i4x4", "1", "v2x4x2"]), min_size=1, max_size=4)
DRAWN = PARTS.map(lambda parts: " ".join([*parts, "2"]))


def case_of(kind: str, rows: tuple[str, ...] = ROWS, padding: str = "left") -> Case:
    return Case(name="inputs", family=kind, rows=rows, padding=padding)


BASE = {kind: case_of(kind) for kind in QWEN}


def model_of_kind(kind: str) -> Any:
    return native_model(BASE[kind], casts="none")


def inputs_of(kind: str, rows: tuple[str, ...] = ROWS, padding: str = "left") -> MultimodalInputs:
    return model_of_kind(kind).inputs_from_hf(**raw_inputs(case_of(kind, rows, padding)))


def positions_of(case: Case) -> Tensor:
    """The three streams, counted token by token."""
    return plain_model(BASE[case.family]).positions(raw_inputs(case))


@given(
    rows=st.lists(DRAWN, min_size=1, max_size=3),
    padding=st.sampled_from(["left", "right"]),
    kind=st.sampled_from(QWEN),
)
def test_spans_grids_and_positions_name_what_the_rows_hold(rows: list[str], padding: str, kind: str) -> None:
    """Frames of a video count as images of their own, each with its grid."""
    inputs = inputs_of(kind, tuple(rows), padding)
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
        assert torch.equal(inputs.position_ids, positions_of(case_of(kind, tuple(rows), padding)))
        assert inputs.pixel_values is not None and len(inputs.pixel_values) == picture
    else:
        assert inputs.pixel_values is None and inputs.crop_grids is None


@given(rows=st.lists(DRAWN, min_size=1, max_size=3), data=st.data())
def test_chosen_rows_keep_their_own_pictures(rows: list[str], data: st.DataObject) -> None:
    inputs = inputs_of("qwen2_vl", tuple(rows))
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=4))
    part = inputs[torch.tensor(chosen)]
    assert torch.equal(part.tokens, inputs.tokens[chosen])
    assert torch.equal(part.position_ids, inputs.position_ids[..., chosen, :])
    assert part.grids == tuple(inputs.grids[row] for row in chosen)
    owners = [] if inputs.crop_rows is None else inputs.crop_rows.tolist()
    pictures = [i for row in chosen for i, owner in enumerate(owners) if owner == row]
    if not pictures:
        assert part.pixel_values is None and part.crop_grids is None and part.crop_lengths() is None
        return
    assert torch.equal(part.crop_grids, inputs.crop_grids[pictures])
    lengths = part.crop_grids.prod(-1).tolist()
    assert part.crop_lengths() == lengths and part.crop_lengths(in_tokens=True) == [n // 4 for n in lengths]
    assert part.pixel_values.shape[1] == max(lengths), "padded no further than the longest that is left"
    for mine, theirs, n in zip(part.pixel_values, inputs.pixel_values[pictures], lengths, strict=True):
        assert torch.equal(mine[:n], theirs[:n])


@pytest.mark.parametrize("kind", QWEN)
def test_chosen_rows_compute_what_they_did_in_the_batch(kind: str) -> None:
    model, inputs = model_of_kind(kind), inputs_of(kind)
    with torch.no_grad():
        whole = model(inputs)
        for index in (0, -1, slice(1, None), [2, 0, 2], torch.tensor([1]), torch.tensor([True, False, True])):
            part = inputs[index]
            expected = whole[[index] if isinstance(index, int) else index]
            assert relative_error(model(part), expected, part.attention_mask) < 1e-12


@pytest.mark.parametrize("kind", QWEN)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_trimmed_and_left_padded_rows_are_the_same_rows(padding: str, kind: str) -> None:
    model, inputs = model_of_kind(kind), inputs_of(kind, padding=padding)
    left = inputs.left_padded()
    assert bool(left.attention_mask[:, -1].all()) and (left is inputs) == (padding == "left")
    assert torch.equal(left.position_ids, positions_of(case_of(kind)))
    with torch.no_grad():
        whole, moved = model(inputs), model(left)
        for row in range(3):
            keep, ours = inputs.attention_mask[row], left.attention_mask[row]
            assert relative_error(moved[row, ours], whole[row, keep]) < 1e-12
            alone = inputs[row].without_padding()
            assert alone.shape == (1, int(keep.sum())) and bool(alone.attention_mask.all())
            assert relative_error(model(alone)[0], whole[row, keep]) < 1e-12
            for one in (alone, left[row]):
                for image in range(inputs.n_images[row]):
                    cells, before = one.grid_tokens(0, image), inputs.grid_tokens(row, image)
                    assert torch.equal(one.tokens[0, cells], inputs.tokens[row, before])
                assert torch.equal(one.tokens[0, one.spans[0].query], inputs.tokens[row, inputs.spans[row].query])


@pytest.mark.parametrize("kind", QWEN)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_answered_rows_compute_as_longer_prompts(padding: str, kind: str) -> None:
    model, inputs = model_of_kind(kind), inputs_of(kind, padding=padding)
    answers = [[50, 51, 52], [53], []]
    forced = inputs.with_answer(answers)
    assert torch.equal(forced.position_ids[..., 2, forced.attention_mask[2]], torch.arange(4).expand(3, -1))
    with torch.no_grad():
        plain, answered = model(inputs), model(forced)
    # The same tokens as prompts of their own, positions counted afresh.
    longer = raw_inputs(case_of(kind, padding=padding))
    longer |= dict(input_ids=forced.tokens, attention_mask=forced.attention_mask.long())
    longer["mm_token_type_ids"] = (forced.tokens == QWEN_IMAGE).long() + 2 * (forced.tokens == QWEN_VIDEO).long()
    with torch.no_grad():
        expected = model.forward_hf(**longer)
    assert relative_error(answered, expected, forced.attention_mask) < 1e-12
    for row, answer in enumerate(answers):
        spans, n = forced.spans[row], int(inputs.lengths[row])
        assert forced.tokens[row, spans.answer].tolist() == answer and spans.answer.start == spans.last + 1
        mine = answered[row, forced.attention_mask[row]]
        assert relative_error(mine[:n], plain[row, inputs.attention_mask[row]]) < 1e-12, "the prompt sees no answer"
        for image in range(inputs.n_images[row]):
            after = forced.grid_tokens(row, image) - forced.attention_mask[row].int().argmax()
            before = inputs.grid_tokens(row, image) - inputs.attention_mask[row].int().argmax()
            assert torch.equal(after, before)


@pytest.mark.parametrize("kind", QWEN)
def test_generated_tokens_follow_in_all_streams(kind: str) -> None:
    inputs = inputs_of(kind)
    new = torch.tensor([[50, 51], [52, 53], [54, 55]])
    grown, forced = inputs.with_new_tokens(new), inputs.with_answer(new.tolist())
    assert torch.equal(grown.tokens, forced.tokens) and torch.equal(grown.position_ids, forced.position_ids)
    assert torch.equal(grown.attention_mask, forced.attention_mask) and grown.spans == forced.spans
    assert [s.answer for s in grown.spans] == [slice(inputs.shape[1], inputs.shape[1] + 2)] * 3
    steps = grown.position_ids[..., -2:]
    assert torch.equal(steps[..., 1], steps[..., 0] + 1) and torch.equal(steps, steps[:1].expand_as(steps))
    more = grown.with_new_tokens(new)
    assert torch.equal(more.position_ids[..., -1], grown.position_ids[..., -1] + 2)
    assert torch.equal(more.image_mask[:, : inputs.shape[1]], inputs.image_mask) and not more.image_mask[:, -4:].any()


def test_moving_takes_everything_along() -> None:
    inputs = inputs_of("qwen3_vl")
    moved = inputs.to("meta")
    names = (
        "tokens",
        "attention_mask",
        "position_ids",
        "pixel_values",
        "crop_rows",
        "crop_images",
        "crop_grids",
    )
    assert all(getattr(moved, name).device.type == "meta" for name in names)
    assert all(getattr(inputs, name).device.type == "cpu" for name in names)


def test_it_prints_its_grids_in_a_few_lines() -> None:
    text = repr(inputs_of("qwen2_vl"))
    assert "images [3, 2, 0]" in text and "grids [2x2, 1x2, 1x2]" in text and len(text.splitlines()) <= 10
