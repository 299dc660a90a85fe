"""Bad input to models with images of any size: right, or refused before any computing with what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.cases import BY_NAME, IMAGE_TOKEN, QWEN, hf_config, hf_model, native_model, raw_inputs, relative_error
from tests.checkpoints import tiny, tiny_processors
from tests.checkpoints.test_processing import CASE as LLAVA
from tests.checkpoints.test_processing import FEEL, message
from tests.checkpoints.tiny import picture
from tests.odd_inputs import QWEN_END as END
from tests.odd_inputs import QWEN_IMAGE as IMAGE
from tests.odd_inputs import QWEN_START as START
from tests.odd_inputs import QWEN_VIDEO as VIDEO
from veena_lens.checkpoints import find_adapter, inputs_from_hf, prepare
from veena_lens.config import HookedVLMConfig

A, B = picture(40, 30, 1), picture(28, 64, 2)


def config_of(name: str) -> HookedVLMConfig:
    case = BY_NAME[name]
    return find_adapter(case.model_class.__name__).read_config(case.config())


CFG = {kind: config_of(f"{kind}-plain") for kind in QWEN}
LLAVA_CFG = find_adapter("LlavaForConditionalGeneration").read_config(hf_config(LLAVA))


@pytest.fixture(scope="module", params=QWEN)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def processor(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_processors.processor(BY_NAME[f"{kind}-plain"], tmp_path_factory.mktemp("processor"))


# --- prompts and images ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("given", "told"),
    [
        (dict(text="the <|image_pad|> is happy"), r"The text holds the image token '<\|image_pad\|>'.*chat=False"),
        (dict(text="the <|image_pad|> is happy", images=A), "The text holds the image token"),
        (dict(text="the <|video_pad|> is happy"), "Row 0 holds the video token '.*': .*frames as images"),
        (dict(text="<|video_pad|>", images=A, chat=False), "Row 0 holds the video token"),
        (dict(text="<|image_pad|> is happy", chat=False), "Row 0 has 1 image placeholders .*and 0 images: give a"),
        (dict(text="is happy", images=A, chat=False), "Row 0 has 0 image placeholders .*and 1 images: put one"),
        (dict(text=["what", "<|image_pad|>"], images=[None, [A, B]], chat=False), "Row 1 has 1 .*and 2 images"),
        (dict(text=["what", "who"], images=[A]), "Got `images` for 1 prompt but `text` has 2"),
        (dict(messages=message("what", 1)), "Row 0 has 1 image placeholders .*0 images"),
        (dict(messages=message("what", 2), images=A), "Row 0 has 2 image placeholders .*1 images"),
        (dict(messages=message("what", 1), images=[A, B]), "Row 0 has 1 image placeholders .*2 images"),
        (dict(messages=message("the <|image_pad|>", 1), images=A), "Row 0 has 2 image placeholders .*1 images"),
        (dict(messages=message("the <|video_pad|>", 1), images=A), "Row 0 holds the video token"),
        (
            dict(messages=[{"role": "user", "content": [{"type": "video"}]}]),
            "part of type .video.; it must be .image. or .text.",
        ),
        (dict(text="what " * 600), "longest prompt has 6[0-9]{2} tokens; the model's context is 512"),
        (dict(text=[FEEL, FEEL], images=[A, Image.new("RGB", (201, 1))]), "images of 201 x 1 pixels: .*aspect ratio"),
        (dict(text=FEEL, images=[A, Image.new("RGB", (3, 700))]), "images of 40 x 30, 3 x 700 pixels: .*aspect"),
    ],
)  # fmt: skip
def test_prompts_and_pictures_that_do_not_match_are_refused(
    given: dict[str, Any], told: str, kind: str, processor: Any
) -> None:
    with pytest.raises(ValueError, match=told):
        prepare(processor, CFG[kind], **given)


def test_checkpoint_without_template_says_what_to_do(kind: str, tmp_path: Path) -> None:
    bare = tiny_processors.processor(BY_NAME[f"{kind}-plain"], tmp_path, template=None)
    with pytest.raises(ValueError, match="no chat template; use chat=False"):
        prepare(bare, CFG[kind], FEEL, A)


def test_tokenizer_alone_takes_no_pictures(kind: str, processor: Any) -> None:
    with pytest.raises(ValueError, match="Row 0 has 1 images, and this checkpoint takes none"):
        prepare(processor.tokenizer, CFG[kind], FEEL, A, chat=False)


# --- processors of other checkpoints ------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (dict(patch_size=2), r"\(Qwen2VLImageProcessor\w*\) has patch_size=2, but the model's vision .* 4. Use"),
        (dict(merge_size=1), "has merge_size=1, but the model's vision tower expects 2"),
        (dict(temporal_patch_size=1), "has temporal_patch_size=1, but the model's vision tower expects 2"),
    ],
)  # fmt: skip
def test_processor_of_another_tower_is_refused(settings: dict[str, int], told: str, kind: str, tmp_path: Path) -> None:
    other = tiny_processors.processor(BY_NAME[f"{kind}-plain"], tmp_path, **settings)
    with pytest.raises(ValueError, match=told):
        prepare(other, CFG[kind], FEEL, A)
    with pytest.raises(ValueError, match=told):  # before anybody sends an image
        prepare(other, CFG[kind], FEEL)


def test_processor_of_the_other_family_is_refused(kind: str, processor: Any) -> None:
    llava = tiny.llava_processor(LLAVA)
    with pytest.raises(ValueError, match=f"image token '<image>' has id {IMAGE_TOKEN}, but the model's is {IMAGE}"):
        prepare(llava, CFG[kind], FEEL, A)
    with pytest.raises(
        ValueError, match=rf"image token '<\|image_pad\|>' has id {IMAGE}, but the model's is {IMAGE_TOKEN}"
    ):
        prepare(processor, LLAVA_CFG, FEEL, A)


def test_processor_of_the_other_family_is_refused_though_the_image_token_be_the_same(kind: str, processor: Any) -> None:
    from dataclasses import replace

    llava = tiny.llava_processor(LLAVA)
    with pytest.raises(ValueError, match="has patch_size=None, but the model's vision tower expects 4"):
        prepare(llava, replace(CFG[kind], image_token_id=IMAGE_TOKEN), FEEL, A)
    with pytest.raises(ValueError, match=r"pixel_values must be floats \[crops 3 28 28\], not .* \[80, 96\]"):
        prepare(processor, replace(LLAVA_CFG, image_token_id=IMAGE), FEEL, A)


# --- a processor's own tensors ------------------------------------------------------------------------------
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
def test_processor_output_that_does_not_fit_is_refused(change: dict[str, Any], told: str, which: str) -> None:
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
def test_mixed_and_text_only_batches_are_right(which: str) -> None:
    for name in ("text-rows-between", "no-picture-at-all", "no-picture-right-padding"):
        case = BY_NAME[f"{which}-{name}"]
        model, hf, given = native_model(case), hf_model(case), raw_inputs(case)
        hf.model.rope_deltas = None
        with torch.no_grad():
            theirs = hf(**given).logits
            assert relative_error(model.forward_hf(**given), theirs, given["attention_mask"]) < 1e-9
        assert model.inputs_from_hf(**given).n_images == [row.count("i") for row in case.rows]


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
