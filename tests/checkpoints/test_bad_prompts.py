"""Prompts and images that do not match are refused before any computing, in every family and in the same words."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.cases import IMAGE_TOKEN, QWEN
from tests.checkpoints import tiny
from tests.checkpoints.setups import NAMES, Setup, processor_of, setup_of
from tests.checkpoints.test_processing import CASE, CFG, FEEL, TEXT_CFG, A, B, message
from tests.odd_inputs import QWEN_IMAGE
from veena_lens.checkpoints import prepare

OF_QWEN = [f"{family}-plain" for family in QWEN]
WITH_VIDEOS = [*OF_QWEN, "onevision-resampled", "smolvlm-plain"]
LLAVA = NAMES[0]


@pytest.fixture(params=NAMES)
def setup(request: pytest.FixtureRequest) -> Setup:
    return setup_of(request.param)


@pytest.fixture(scope="module")
def processor() -> Any:
    return tiny.llava_processor(CASE)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (dict(text="the IMAGE is happy"), "The text holds the image token 'IMAGE'.*chat=False"),
        (dict(text="the IMAGE is happy", images=A), "The text holds the image token 'IMAGE'.*chat template inserts it"),
        (dict(text="IMAGE is happy", chat=False), "Row 0 has 1 image placeholders .*and 0 images: give an image"),
        (dict(text="is happy", images=A, chat=False), "Row 0 has 0 image placeholders .*and 1 images: put one"),
        (dict(text="IMAGE what", images=[A, B], chat=False), "1 image placeholders .* and 2 images"),
        (dict(text=["what", "IMAGE"], images=[None, [A, B]], chat=False), "Row 1 has 1 .*and 2 images"),
        (dict(text=["what", "who"], images=[A]), "Got `images` for 1 prompt but `text` has 2"),
        (dict(text=["what", "who"], images=A), "Got `images` for 1 prompt but `text` has 2"),
        (dict(text="what", images=[[A], [B]]), "One prompt takes a flat list of images"),
        (dict(text=None), "give text or messages"),
        (dict(text="what", messages=message("what", 0)), "give text or messages"),
        (dict(messages=[]), "messages must be a conversation"),
        (dict(messages=message("what", 1)), "Row 0 has 1 image placeholders .*0 images"),
        (dict(messages=message("what", 2), images=A), "Row 0 has 2 image placeholders .*1 images"),
        (dict(messages=message("what", 1), images=[A, B]), "Row 0 has 1 image placeholders .*2 images"),
        (dict(messages=message("the IMAGE", 1), images=A), "Row 0 has 2 image placeholders .*1 images"),
        (dict(messages=[{"role": "user"}]), "dictionary with 'role' and 'content'"),
        (
            dict(messages=[{"role": "user", "content": [{"type": "video"}]}]),
            "part of type .video.; it must be .image. or .text.",
        ),
        (dict(text=["what", "who"], answer=["a", "b", "c"]), "3 answers for 2 rows"),
    ],
)  # fmt: skip
def test_prompts_and_images_that_do_not_match_are_refused(given: dict[str, Any], told: str, setup: Setup) -> None:
    with pytest.raises(ValueError, match=told.replace("IMAGE", re.escape(setup.mark))):
        prepare(setup.processor, setup.cfg, **setup.fill(given))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (dict(text="the VIDEO is happy"), "Row 0 holds the video token '.*': .*frames as images"),
        (dict(text="VIDEO what", chat=False), "Row 0 holds the video token"),
        (dict(text="VIDEO", images=A, chat=False), "Row 0 holds the video token"),
        (dict(messages=message("the VIDEO", 1), images=A), "Row 0 holds the video token"),
    ],
)
@pytest.mark.parametrize("name", WITH_VIDEOS)
def test_videos_in_a_prompt_are_refused(name: str, given: dict[str, Any], told: str) -> None:
    setup = setup_of(name)
    with pytest.raises(ValueError, match=told):
        prepare(setup.processor, setup.cfg, **setup.fill(given))


def test_prompts_longer_than_the_context_are_refused(setup: Setup) -> None:
    n = setup.cfg.n_ctx
    with pytest.raises(ValueError, match=rf"longest prompt has \d+ tokens; the model's context is {n}"):
        prepare(setup.processor, setup.cfg, "what " * (n + 44))
    with pytest.raises(ValueError, match=rf"Prompt and answer have \d+ tokens; the context is {n}"):
        prepare(setup.processor, setup.cfg, "what " * (n - 26), answer="who " * 26)


@pytest.mark.parametrize("name", OF_QWEN)
@pytest.mark.parametrize(
    ("size", "told"), [((201, 1), "40 x 30, 201 x 1 pixels"), ((3, 700), "40 x 30, 3 x 700 pixels")]
)
def test_images_that_the_processor_refuses_are_named_by_their_size(name: str, size: Any, told: str) -> None:
    setup = setup_of(name)
    with pytest.raises(ValueError, match=f"images of {told}: .*aspect ratio"):
        prepare(setup.processor, setup.cfg, FEEL, [A, Image.new("RGB", size)])
    with pytest.raises(ValueError, match=f"images of {told.split(', ')[1]}: .*aspect ratio"):
        prepare(setup.processor, setup.cfg, [FEEL, FEEL], [A, Image.new("RGB", size)])


def test_checkpoint_without_processor_template_or_image_processor_says_what_to_do(setup: Setup) -> None:
    name = str(setup.case)
    with pytest.raises(ValueError, match="no tokenizer or processor"):
        prepare(None, setup.cfg, FEEL, A)
    with pytest.raises(ValueError, match="no chat template; use chat=False"):
        prepare(processor_of(name, None), setup.cfg, FEEL, A)
    with pytest.raises(ValueError, match="Row 0 has 1 images, and this checkpoint takes none"):
        prepare(setup.processor.tokenizer, setup.cfg, FEEL, A, chat=False)


def test_model_of_text_without_a_template_or_with_an_image_says_what_to_do(processor: Any) -> None:
    with pytest.raises(ValueError, match="no chat template; use chat=False"):
        prepare(tiny.tokenizer(), TEXT_CFG, FEEL)
    with pytest.raises(ValueError, match="Row 0 has 1 images, and this checkpoint takes none"):
        prepare(tiny.tokenizer(tiny.TEXT_TEMPLATE), TEXT_CFG, FEEL, A)
    with pytest.raises(ValueError, match="takes none: it has no vision tower or no image processor"):
        prepare(processor.tokenizer, CFG, FEEL, A)


@pytest.mark.parametrize("text", [[], [3], 5, ["what", None]])
def test_text_of_another_type_is_refused(text: Any, processor: Any) -> None:
    with pytest.raises(TypeError, match="text must be a string or a list of strings"):
        prepare(processor, CFG, text)


def test_picture_files_that_cannot_be_used_are_named(processor: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No image at .*nothing.png"):
        prepare(processor, CFG, FEEL, tmp_path / "nothing.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match="text.png cannot be read as an image"):
        prepare(processor, CFG, FEEL, tmp_path / "text.png")
    A.save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:900])
    with pytest.raises(ValueError, match="half.png cannot be read as an image"):
        prepare(processor, CFG, FEEL, tmp_path / "half.png")
    with Image.open(tmp_path / "half.png") as lazy, pytest.raises(ValueError, match="The image cannot be read"):
        prepare(processor, CFG, FEEL, lazy)
    with pytest.raises(TypeError, match="An image must be a PIL image or a path, not Tensor"):
        prepare(processor, CFG, FEEL, torch.zeros(3, 28, 28))


@pytest.mark.parametrize("size", [(20_000, 6_000), (40_000, 10_000)])
def test_enormous_pictures_are_refused_unread(size: tuple[int, int], processor: Any, tmp_path: Path) -> None:
    """The second size is one at which PIL itself speaks of a decompression bomb."""
    Image.new("1", size).save(tmp_path / "vast.png")
    with pytest.raises(
        ValueError, match=r"vast.png (has .* pixels; the limit is 100,000,000|is too large: .*100,000,000)"
    ):
        prepare(processor, CFG, FEEL, tmp_path / "vast.png")
    with pytest.raises(ValueError, match=r"= 120,000,000 pixels; the limit is 100,000,000"):
        prepare(processor, CFG, FEEL, Image.new("1", (20_000, 6_000)))


# --- processors of other checkpoints ------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (dict(patch_size=2), r"\(Qwen2VLImageProcessor\w*\) has patch_size=2, but the model's vision .* 4. Use"),
        (dict(merge_size=1), "has merge_size=1, but the model's vision tower expects 2"),
        (dict(temporal_patch_size=1), "has temporal_patch_size=1, but the model's vision tower expects 2"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", OF_QWEN)
def test_processor_of_another_tower_is_refused(name: str, settings: dict[str, int], told: str) -> None:
    other, cfg = processor_of(name, **settings), setup_of(name).cfg
    with pytest.raises(ValueError, match=told):
        prepare(other, cfg, FEEL, A)
    with pytest.raises(ValueError, match=told):  # before anybody sends an image
        prepare(other, cfg, FEEL)


@pytest.mark.parametrize("name", OF_QWEN)
def test_processor_of_another_family_is_refused(name: str, processor: Any) -> None:
    own, cfg = setup_of(name).processor, setup_of(name).cfg
    with pytest.raises(
        ValueError, match=f"image token '<image>' has id {IMAGE_TOKEN}, but the model's is {QWEN_IMAGE}"
    ):
        prepare(processor, cfg, FEEL, A)
    told = rf"image token '<\|image_pad\|>' has id {QWEN_IMAGE}, but the model's is {IMAGE_TOKEN}"
    with pytest.raises(ValueError, match=told):
        prepare(own, CFG, FEEL, A)
    # Also where the image token is the same.
    with pytest.raises(ValueError, match="has patch_size=None, but the model's vision tower expects 4"):
        prepare(processor, replace(cfg, image_token_id=IMAGE_TOKEN), FEEL, A)
    with pytest.raises(ValueError, match=r"pixel_values must be floats \[crops 3 28 28\], not .* \[80, 96\]"):
        prepare(own, replace(CFG, image_token_id=QWEN_IMAGE), FEEL, A)
