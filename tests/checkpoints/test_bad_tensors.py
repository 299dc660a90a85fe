"""Tensors of a processor that do not fit: refused before any computing with what was expected, or read as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import BY_NAME, IMAGE_TOKEN, QWEN, hf_config, native_model, raw_inputs
from tests.checkpoints import tiny
from tests.checkpoints.setups import NAMES, config_of
from tests.checkpoints.test_processing import CFG as SQUARE_CFG
from tests.checkpoints.test_processing import TEXT_CFG
from tests.odd_inputs import QWEN_END as END
from tests.odd_inputs import QWEN_IMAGE as IMAGE
from tests.odd_inputs import QWEN_START as START
from tests.odd_inputs import QWEN_VIDEO as VIDEO
from veena_lens.checkpoints import find_adapter, inputs_from_hf

CFG = {family: config_of(f"{family}-plain") for family in QWEN}


# --- every family ---------------------------------------------------------------------------------------------
NONE: Callable[[Any], Any] = lambda x: None  # noqa: E731


@pytest.mark.parametrize(
    ("key", "change", "told"),
    [
        ("input_ids", NONE, "input_ids is missing"),
        ("input_ids", lambda x: x[0], r"input_ids must be \[batch pos\]"),
        ("attention_mask", lambda x: x[:, :5], r"attention_mask \[\d, 5\] does not fit"),
        ("attention_mask", lambda x: x * (torch.arange(len(x)) > 0)[:, None], r"Rows \[0\] have no real token"),
        ("position_ids", lambda x: torch.zeros(1, 3), r"position_ids \[1, 3\] do not fit"),
        ("pixel_values", lambda x: x.to(torch.uint8), "must be floats"),
        ("pixel_value", lambda x: torch.ones(1), r"unknown keys \['pixel_value'\]; .* reads input_ids"),
    ],
    ids=["no-ids", "one-row", "short-mask", "no-token", "positions", "bytes", "unknown"],
)
@pytest.mark.parametrize("name", NAMES)
def test_tensors_that_fit_no_family_are_refused(name: str, key: str, change: Any, told: str) -> None:
    given, cfg = raw_inputs(BY_NAME[name], torch.float32), config_of(name)
    inputs_from_hf(cfg, None, **given)
    given = {k: v for k, v in (given | {key: change(given.get(key))}).items() if v is not None}
    with pytest.raises(ValueError, match=told):
        inputs_from_hf(cfg, None, **given)


# --- a square per image ---------------------------------------------------------------------------------------
def square(**changes: Any) -> dict[str, Any]:
    """One row with one image, as a processor would emit it, some values changed."""
    ids = torch.tensor([[1, 5, *[IMAGE_TOKEN] * 16, 6, 7]])
    good = dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=torch.zeros(1, 3, 28, 28))
    return {k: v for k, v in (good | changes).items() if v is not None}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (dict(pixel_values=None), "holds 16 image tokens .*no image was given"),
        (dict(pixel_values=torch.zeros(2, 3, 28, 28)), r"Rows hold \[16\] image tokens; an image .* fills 16, and 2"),
        (dict(input_ids=torch.tensor([[1, 5, *[IMAGE_TOKEN] * 15, 6, 7, 8]])), r"Rows hold \[15\] image tokens"),
        (dict(pixel_values=torch.zeros(1, 3, 28, 42)), r"\[crops 3 28 28\], not torch.float32 \[1, 3, 28, 42\]"),
        (dict(pixel_values=torch.zeros(1, 3, 56, 56)), r"\[1, 3, 56, 56\]"),
        (dict(pixel_values=torch.zeros(3, 28, 28)), r"\[3, 28, 28\]"),
        (dict(image_sizes=torch.tensor([[28, 28]])), r"unknown keys \['image_sizes'\]; .* reads input_ids"),
        (dict(pixel_value=1, image_grid_thw=2), r"unknown keys \['image_grid_thw', 'pixel_value'\]"),
    ],
)
def test_squares_that_do_not_fit_are_refused(change: dict[str, Any], told: str) -> None:
    inputs_from_hf(SQUARE_CFG, None, **square())
    with pytest.raises(ValueError, match=told):
        inputs_from_hf(SQUARE_CFG, None, **square(**change))


@pytest.mark.parametrize("ids", [[[0, 5, 6], [5, 6, 7]], [[5, 6, 7], [5, 6, 0]]])
def test_padding_without_a_mask_is_never_guessed(ids: list[list[int]]) -> None:
    with pytest.raises(ValueError, match=r"Rows \[[01]\] begin or end with the pad token 0 and no attention_mask"):
        inputs_from_hf(TEXT_CFG, tiny.tokenizer(), input_ids=torch.tensor(ids))
    with pytest.raises(ValueError, match="pad token 0"):  # named by the configuration, without a tokenizer
        cfg = find_adapter("LlamaForCausalLM").read_config(hf_config(BY_NAME["text-llama"]))
        inputs_from_hf(type(cfg)(**{**vars(cfg), "pad_token_id": 0}), None, input_ids=torch.tensor(ids))


def test_pictures_for_a_text_model_are_refused() -> None:
    ids = torch.tensor([[1, 5, 6]])
    with pytest.raises(ValueError, match="without a vision tower"):
        inputs_from_hf(TEXT_CFG, None, input_ids=ids, pixel_values=torch.zeros(1, 3, 28, 28))


# --- images of any size ---------------------------------------------------------------------------------------
def image(height: int, width: int) -> list[int]:
    return [START, *[IMAGE] * (height * width // 4), END]


def raw(**changes: Any) -> dict[str, Any]:
    """One row with an image of 4 x 6 patches, as a processor would emit it, some values changed."""
    ids = torch.tensor([[5, *image(4, 6), 6, 7]])
    good = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == IMAGE).long(),
        pixel_values=torch.zeros(24, 96),
        image_grid_thw=torch.tensor([[1, 4, 6]]),
    )
    return {k: v for k, v in (good | changes).items() if v is not None}


def ids(*parts: list[int]) -> dict[str, Tensor | None]:
    """A row of other tokens, its mask and types left to be told by them."""
    return dict(input_ids=torch.tensor([sum(parts, [])]), attention_mask=None, mm_token_type_ids=None)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (dict(pixel_values=None), r"image_grid_thw came without pixel_values"),
        (dict(pixel_values=None, image_grid_thw=None), r"holds 6 image tokens \(id 120, 121\) but no image"),
        (dict(image_grid_thw=None), "pixel_values came without image_grid_thw, the .* of each image"),
        (dict(pixel_values=torch.zeros(24, 95)), r"\[patches 96\] \(3 channels, 2 frames, 4 x 4 pixels\), not .*95"),
        (dict(pixel_values=torch.zeros(24, 48)), r"\[24, 48\]. Processor and checkpoint do not match \(patch_size"),
        (dict(pixel_values=torch.zeros(1, 24, 96)), r"not torch.float32 \[1, 24, 96\]"),
        (dict(pixel_values=torch.zeros(1, 3, 28, 28)), r"not torch.float32 \[1, 3, 28, 28\]"),
        (dict(pixel_values=torch.zeros(24, 96, dtype=torch.uint8)), "must be floats"),
        (dict(pixel_values=torch.zeros(23, 96)), r"\[\[1, 4, 6\]\] asks for 24 patches; pixel_values holds 23"),
        (dict(pixel_values=torch.zeros(25, 96)), "asks for 24 patches; pixel_values holds 25"),
        (dict(image_grid_thw=torch.tensor([[1, 3, 8]])), r"holds \[1, 3, 8\]: .* multiples of merge_size=2"),
        (dict(image_grid_thw=torch.tensor([[0, 4, 6]])), r"holds \[0, 4, 6\]: time must be at least 1"),
        (dict(image_grid_thw=torch.tensor([[1, -4, -6]])), r"holds \[1, -4, -6\]"),
        (dict(image_grid_thw=torch.tensor([[4, 6]])), r"image_grid_thw must be \[images 3\], .* not \[1, 2\]"),
        (dict(image_grid_thw=torch.tensor([1, 4, 6])), r"image_grid_thw must be \[images 3\], .* not \[3\]"),
        (dict(image_grid_thw=torch.tensor([[4, 6], [1, 4], [6, 1]])), r"image_grid_thw must be .* not \[3, 2\]"),
        (ids([5], image(4, 4), [6, 7]), "A run of 4 image tokens meets a grid of 1 x 2 x 3 = 6 tokens"),
        (ids([5], image(4, 8), [6, 7]), "more image tokens than the 1 images given fill: a run of 8 is left over"),
        (ids([5], image(4, 6), image(4, 6)), "holds more image tokens than the 1 images given fill: a run of 6"),
        (ids([5, 6, 7]), "1 of 1 image grids have no tokens in the prompt"),
        (ids([5], [START, *[VIDEO] * 6, END]), "holds more video tokens than the 0 videos given fill"),
        (dict(second_per_grids=torch.ones(1)), r"unknown keys \['second_per_grids'\]; .* reads .*video_grid"),
        (dict(image_sizes=torch.ones(1, 2)), r"unknown keys \['image_sizes'\]"),
        (dict(video_grid_thw=torch.tensor([[1, 4, 6]])), "video_grid_thw came without pixel_values_videos"),
        (dict(pixel_values_videos=torch.zeros(24, 96)), "pixel_values_videos came without video_grid_thw"),
        (dict(pixel_values_videos=torch.zeros(24, 96), video_grid_thw=torch.tensor([[1, 4, 6]])), "1 of 1 video grids"),
        (dict(mm_token_type_ids=torch.zeros(1, 11)), r"mm_token_type_ids differ from input_ids in rows \[0\]"),
        (dict(mm_token_type_ids=torch.zeros(1, 5)), r"mm_token_type_ids \[1, 5\]"),
        (dict(attention_mask=torch.tensor([[1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1]])), "A run of 5 image tokens meets"),
        (dict(position_ids=torch.zeros(2, 1, 11)), r"position_ids \[2, 1, 11\] do not fit"),
        (dict(position_ids=torch.zeros(3, 1, 10)), r"position_ids \[3, 1, 10\] do not fit"),
        (dict(position_ids=torch.zeros(3, 2, 11)), r"position_ids \[3, 2, 11\] do not fit"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("which", QWEN)
def test_images_of_any_size_that_do_not_fit_are_refused(change: dict[str, Any], told: str, which: str) -> None:
    inputs_from_hf(CFG[which], None, **raw())
    with pytest.raises(ValueError, match=told):
        inputs_from_hf(CFG[which], None, **raw(**change))


def video(frames: int, height: int, width: int, which: str) -> list[int]:
    n = height * width // 4
    if which != "qwen3_vl":
        return [START, *[VIDEO] * (frames * n), END]
    return sum(([9, START, *[VIDEO] * n, END] for _ in range(frames)), [])


@pytest.mark.parametrize("which", QWEN)
def test_video_that_does_not_fill_its_tokens_is_refused(which: str) -> None:
    """Three images of 2 x 4 patches are asked for in each case but the first."""
    good = dict(pixel_values_videos=torch.zeros(24, 96), video_grid_thw=torch.tensor([[3, 2, 4]]))
    text = ids([5], video(3, 2, 4, which), [6])
    row = {k: v for k, v in text.items() if v is not None}
    assert inputs_from_hf(CFG[which], None, **row, **good).n_images == [3]
    with pytest.raises(ValueError, match="asks for 24 patches; pixel_values_videos holds 16"):
        inputs_from_hf(CFG[which], None, **row, **good | dict(pixel_values_videos=torch.zeros(16, 96)))
    fewer = dict(pixel_values_videos=torch.zeros(16, 96), video_grid_thw=torch.tensor([[2, 2, 4]]))
    with pytest.raises(ValueError, match="video tokens (meets a grid of 2 x 1 x 2|than the)"):
        inputs_from_hf(CFG[which], None, **row, **fewer)
    more = dict(pixel_values_videos=torch.zeros(32, 96), video_grid_thw=torch.tensor([[4, 2, 4]]))
    with pytest.raises(ValueError, match="meets a grid of 4 x 1 x 2 = 8|1 of 4 video grids have no tokens"):
        inputs_from_hf(CFG[which], None, **row, **more)


SECONDS = dict(pixel_values_videos=torch.zeros(24, 96), video_grid_thw=torch.tensor([[3, 2, 4]]))


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (torch.tensor([1.0, 1.0]), "second_per_grid_ts holds 2 times for 1 videos; give one per video"),
        (torch.tensor([0.0]), r"second_per_grid_ts=\[0.0\] must hold the seconds .* all positive"),
        ([-1.0], r"second_per_grid_ts=\[-1.0\] must hold"),
        ([float("nan")], r"second_per_grid_ts=\[nan\] must hold"),
        (torch.ones(1, 1), r"second_per_grid_ts=\[\[1.0\]\] must hold"),
    ],
    ids=["two", "none", "negative", "unknown", "in-rows"],
)
def test_seconds_of_videos_that_do_not_fit_are_refused(seconds: Any, told: str) -> None:
    row = dict(input_ids=torch.tensor([[5, *video(3, 2, 4, "qwen2_5_vl"), 6]]))
    with pytest.raises(ValueError, match=told):
        inputs_from_hf(CFG["qwen2_5_vl"], None, **row, **SECONDS, second_per_grid_ts=seconds)
    with pytest.raises(ValueError, match=r"unknown keys \['second_per_grid_ts'\]"):
        inputs_from_hf(CFG["qwen2_vl"], None, **row, **SECONDS, second_per_grid_ts=seconds)


@pytest.mark.parametrize(
    ("seconds", "times"),
    [(None, [0, 2, 4]), ([0.7], [0, 1, 2]), (torch.tensor([0.2]), [0, 0, 0]), ([2], [0, 4, 8])],
    ids=["untold", "list", "slow", "whole"],
)
def test_times_of_a_video_count_its_seconds(seconds: Any, times: list[int]) -> None:
    """Two positions a second, rounded down; the text goes on behind rows and columns."""
    row = dict(input_ids=torch.tensor([[5, *video(3, 2, 4, "qwen2_5_vl"), 6]]))
    inputs = inputs_from_hf(CFG["qwen2_5_vl"], None, **row, **SECONDS, second_per_grid_ts=seconds)
    assert inputs.position_ids[0, 0].tolist() == [0, 1, *(2 + t for t in times for _ in range(2)), 4, 5]
    assert inputs.position_ids[2, 0, 2:8].tolist() == [2, 3] * 3


def test_frames_of_a_video_in_one_run_are_read_one_by_one_where_each_has_its_own() -> None:
    """Tokens of frames that touch stand for as many images, each with positions of its own."""
    tokens = torch.tensor([[5, START, *[VIDEO] * 6, END, 6]])
    given = dict(pixel_values_videos=torch.zeros(24, 96), video_grid_thw=torch.tensor([[3, 2, 4]]))
    inputs = inputs_from_hf(CFG["qwen3_vl"], None, input_ids=tokens, **given)
    assert inputs.n_images == [3] and inputs.position_ids[0, 0, 2:8].tolist() == [2, 2, 4, 4, 6, 6]
    still = inputs_from_hf(CFG["qwen2_vl"], None, input_ids=tokens, **given)
    assert still.position_ids[0, 0, 2:8].tolist() == [2, 2, 3, 3, 4, 4]


# --- the model's own border ---------------------------------------------------------------------------------
@pytest.mark.parametrize("which", QWEN)
def test_image_tokens_without_picture_are_refused_wherever_they_come_from(which: str) -> None:
    model = native_model(BY_NAME[f"{which}-plain"])
    for token in (IMAGE, VIDEO):
        tokens = torch.tensor([[5, token, 6]])
        for call in (model, model.run_with_cache, lambda t: model.generate(t, return_type="tokens")):
            with pytest.raises(ValueError, match=r"holds 1 image tokens \(id 120, 121\) but no image was given"):
                call(tokens)


@pytest.mark.parametrize("which", QWEN)
def test_picture_tensors_that_are_none_are_as_good_as_left_out(which: str) -> None:
    case = BY_NAME[f"{which}-no-picture-at-all"]
    model, given = native_model(case), raw_inputs(case)
    nothing = dict.fromkeys(("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"))
    with torch.no_grad():
        assert torch.equal(model.forward_hf(**given, **nothing), model.forward_hf(**given))


def test_positions_in_streams_are_refused_by_a_model_that_has_one() -> None:
    model = native_model(BY_NAME["clip-llama"])
    tokens = torch.tensor([[5, 6, 7]])
    with pytest.raises(ValueError, match=r"position_ids \[3, 1, 3\] have several streams; .* have one"):
        model.forward_hf(input_ids=tokens, position_ids=torch.zeros(3, 1, 3))
    with pytest.raises(ValueError, match="have several streams"):
        model(tokens, position_ids=torch.zeros(4, 1, 3))


@pytest.mark.parametrize("which", QWEN)
def test_inputs_prepared_for_another_family_are_refused(which: str) -> None:
    qwen, llava = native_model(BY_NAME[f"{which}-plain"]), native_model(BY_NAME["clip-llama"])
    theirs = qwen.inputs_from_hf(**raw()), llava.inputs_from_hf(**raw_inputs(BY_NAME["clip-llama"]))
    for model, inputs in ((qwen, theirs[1]), (llava, theirs[0])):
        with pytest.raises(ValueError, match="prepared for another model"):
            model(inputs)
    other = native_model(BY_NAME[f"{which}-patch-2-grey"])
    with pytest.raises(ValueError, match=r"prepared for another model: .* \[1, 24, 96\], .* takes \[crops patches 8\]"):
        other(theirs[0])
