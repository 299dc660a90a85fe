"""Bad input: refused before any computing, with the value, what was expected and the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.cases import BY_NAME, IMAGE_TOKEN, hf_config
from tests.checkpoints import tiny
from tests.checkpoints.test_processing import CASE, CFG, FEEL, TEXT_CFG, A, B, message
from veena_lens.checkpoints import find_adapter, inputs_from_hf, prepare


@pytest.fixture(scope="module")
def processor() -> Any:
    return tiny.llava_processor(CASE)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (dict(text="the <image> is happy"), "The text holds the image token '<image>'.*chat=False"),
        (dict(text="the <image> is happy", images=A), "The text holds the image token '<image>'"),
        (dict(text="<image> is happy", chat=False), "Row 0 has 1 image placeholders .*and 0 images: give an image"),
        (dict(text="is happy", images=A, chat=False), "Row 0 has 0 image placeholders .*and 1 images: put one"),
        (dict(text=["what", "<image>"], images=[None, [A, B]], chat=False), "Row 1 has 1 .*and 2 images"),
        (dict(text=["what", "who"], images=[A]), "Got `images` for 1 prompt but `text` has 2"),
        (dict(text=["what", "who"], images=A), "Got `images` for 1 prompt but `text` has 2"),
        (dict(text="what", images=[[A], [B]]), "One prompt takes a flat list of images"),
        (dict(text=None), "give text or messages"),
        (dict(text="what", messages=message("what", 0)), "give text or messages"),
        (dict(messages=[]), "messages must be a conversation"),
        (dict(messages=message("what", 1)), "Row 0 has 1 image placeholders .*0 images"),
        (dict(messages=message("what", 1), images=[A, B]), "Row 0 has 1 image placeholders .*2 images"),
        (dict(messages=message("the <image>", 1), images=A), "Row 0 has 2 image placeholders .*1 images"),
        (dict(messages=[{"role": "user"}]), "dictionary with 'role' and 'content'"),
        (dict(messages=[{"role": "user", "content": [{"type": "video"}]}]), "part of type 'video'"),
        (dict(text="what " * 300), "longest prompt has 30[0-9] tokens; the model's context is 256"),
        (dict(text="what " * 240, answer="who " * 20), "Prompt and answer have 26[0-9] tokens; the context is 256"),
        (dict(text=["what", "who"], answer=["a", "b", "c"]), "3 answers for 2 rows"),
    ],
)
def test_prompts_and_pictures_that_do_not_match_are_refused(given: dict[str, Any], told: str, processor: Any) -> None:
    with pytest.raises(ValueError, match=told):
        prepare(processor, CFG, **given)


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


def test_checkpoint_without_processor_template_or_tower_says_what_to_do(processor: Any) -> None:
    with pytest.raises(ValueError, match="no tokenizer or processor"):
        prepare(None, CFG, FEEL, A)
    with pytest.raises(ValueError, match="no chat template; use chat=False"):
        prepare(tiny.llava_processor(CASE, template=None), CFG, FEEL, A)
    with pytest.raises(ValueError, match="no chat template; use chat=False"):
        prepare(tiny.tokenizer(), TEXT_CFG, FEEL)
    with pytest.raises(ValueError, match="Row 0 has 1 images, and this checkpoint takes none"):
        prepare(tiny.tokenizer(tiny.TEXT_TEMPLATE), TEXT_CFG, FEEL, A)
    with pytest.raises(ValueError, match="takes none: it has no vision tower or no image processor"):
        prepare(processor.tokenizer, CFG, FEEL, A)


def raw(**changes: Any) -> dict[str, Any]:
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
        (dict(pixel_values=torch.zeros(1, 3, 28, 28, dtype=torch.uint8)), "must be floats"),
        (dict(image_sizes=torch.tensor([[28, 28]])), r"unknown keys \['image_sizes'\]; .* reads input_ids"),
        (dict(pixel_value=1, image_grid_thw=2), r"unknown keys \['image_grid_thw', 'pixel_value'\]"),
        (dict(input_ids=None), "input_ids is missing"),
        (dict(input_ids=torch.tensor([1, 2])), r"input_ids must be \[batch pos\]"),
        (dict(attention_mask=torch.ones(1, 5)), r"attention_mask \[1, 5\] does not fit"),
        (dict(attention_mask=torch.zeros(1, 20)), r"Rows \[0\] have no real token"),
        (dict(position_ids=torch.zeros(1, 3)), r"position_ids \[1, 3\] do not fit"),
    ],
)
def test_processor_output_that_does_not_fit_is_refused(change: dict[str, Any], told: str) -> None:
    inputs_from_hf(CFG, None, **raw())
    with pytest.raises(ValueError, match=told):
        inputs_from_hf(CFG, None, **raw(**change))


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
