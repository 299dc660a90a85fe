"""Inputs: token ids and pixels equal the Hugging Face processor's, spans and boxes lie where they should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.cases import BY_NAME, hf_config
from tests.checkpoints import tiny
from veena_lens.checkpoints import find_adapter, inputs_from_hf, prepare
from veena_lens.images.fixed import patch_boxes

CASE = BY_NAME["image-28-patch-7"]  # 16 image tokens
CFG = find_adapter("LlavaForConditionalGeneration").read_config(hf_config(CASE))
TEXT_CFG = find_adapter("LlamaForCausalLM").read_config(hf_config(BY_NAME["text-llama"]))
FEEL = "how does this person feel ?"
A, B = tiny.picture(40, 30, 1), tiny.picture(28, 64, 2)


@pytest.fixture(scope="module")
def processor() -> Any:
    return tiny.llava_processor(CASE)


def message(text: str, n_images: int) -> list[dict[str, Any]]:
    content = [*({"type": "image"} for _ in range(n_images)), {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def test_grid_of_an_image_is_its_tokens_in_reading_order(processor: Any) -> None:
    inputs = prepare(processor, CFG, ["what", FEEL], [[B, A], [A]])
    assert all(span.stop - span.start == 16 for spans in inputs.spans for span in spans.images)
    assert inputs.grids == (((4, 4), (4, 4)), ((4, 4),))
    assert torch.equal(inputs.grid_tokens(1).flatten(), torch.arange(16) + inputs.spans[1].images[0].start)


def test_flat_list_of_pictures_for_prompts_means_one_each(processor: Any) -> None:
    flat, nested = (prepare(processor, CFG, [FEEL, "what"], i) for i in ([A, B], [[A], [B]]))
    assert torch.equal(flat.tokens, nested.tokens) and flat.n_images == [1, 1]
    some = prepare(processor, CFG, [FEEL, "what"], [None, B])
    assert some.n_images == [0, 1]


def test_paths_and_strings_are_read_as_pictures(processor: Any, tmp_path: Path) -> None:
    A.save(tmp_path / "a.png")
    expected = prepare(processor, CFG, FEEL, A)
    for source in (tmp_path / "a.png", str(tmp_path / "a.png")):
        given = prepare(processor, CFG, FEEL, source).pixel_values
        assert given is not None and torch.equal(given, expected.pixel_values)


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "LA", "1", "CMYK"])
def test_pictures_of_every_mode_become_rgb(mode: str, processor: Any) -> None:
    assert prepare(processor, CFG, FEEL, A.convert(mode)).n_images == [1]


def test_orientation_tag_of_a_photograph_is_applied(processor: Any, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    A.save(tmp_path / "turned.png", exif=exif)
    upright = A.transpose(Image.Transpose.ROTATE_270)
    given, expected = (prepare(processor, CFG, FEEL, i) for i in (tmp_path / "turned.png", upright))
    assert torch.equal(given.pixel_values, expected.pixel_values)  # type: ignore[arg-type]


def test_template_that_begins_with_bos_does_not_double_it() -> None:
    tokenizer = tiny.tokenizer(tiny.TEXT_TEMPLATE)
    inputs = prepare(tokenizer, TEXT_CFG, [FEEL, "what"])
    expected = tokenizer.apply_chat_template([{"role": "user", "content": FEEL}], add_generation_prompt=True)
    assert inputs.tokens[0].tolist() == expected["input_ids"]
    assert int((inputs.tokens == tokenizer.bos_token_id).sum()) == 2
    raw = prepare(tokenizer, TEXT_CFG, FEEL, chat=False)
    assert raw.tokens[0].tolist() == tokenizer(FEEL)["input_ids"] and raw.spans[0].query == slice(0, raw.shape[1])


def test_padding_is_left_whatever_the_tokenizer_says_and_leaves_it_as_it_was() -> None:
    mine = tiny.llava_processor(CASE)
    mine.tokenizer.padding_side = "right"
    inputs = prepare(mine, CFG, [FEEL, "what"], [[A], []])
    assert bool(inputs.attention_mask[:, -1].all()) and not bool(inputs.attention_mask[1, 0])
    assert mine.tokenizer.padding_side == "right"


def test_row_of_a_batch_is_the_row_alone(processor: Any) -> None:
    batch = prepare(processor, CFG, [FEEL, "what"], [[A], [B]])
    alone = prepare(processor, CFG, "what", B)
    keep = batch.attention_mask[1]
    assert torch.equal(batch.tokens[1, keep], alone.tokens[0])
    assert torch.equal(batch.position_ids[1, keep], alone.position_ids[0])
    assert torch.equal(batch[1].pixel_values, alone.pixel_values)  # type: ignore[arg-type]


# --- pixel boxes ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [(40, 30), (28, 64), (28, 28), (91, 28), (7, 100)])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(size={"height": 28, "width": 28}, do_center_crop=False),
        dict(size={"shortest_edge": 32}),
        dict(do_resize=False),
    ],
    ids=["shortest edge", "squeezed", "larger than the crop", "crop alone"],
)
def test_boxes_name_the_pixels_that_a_patch_shows(size: tuple[int, int], settings: dict[str, Any]) -> None:
    """A ramp along each axis: the mean of a patch is the ramp at the middle of its box."""
    width, height = size
    ours = tiny.image_processor(28, **settings)
    boxes = patch_boxes(size, ours, 7, (4, 4))
    for axis, length in ((0, width), (1, height)):
        ramp = np.linspace(0, 255, length)
        pixels = np.tile(ramp, (height, 1)) if axis == 0 else np.tile(ramp[:, None], (1, width))
        picture = Image.fromarray(np.repeat(pixels.astype(np.uint8)[..., None], 3, -1))
        shown = ours(picture, return_tensors="pt", do_normalize=False)["pixel_values"][0, 0] * 255
        for i, (left, top, right, bottom) in enumerate(boxes.tolist()):
            row, col = divmod(i, 4)
            patch = shown[row * 7 : row * 7 + 7, col * 7 : col * 7 + 7]
            middle = (left + right) / 2 if axis == 0 else (top + bottom) / 2
            if right - left > 0 and bottom - top > 0 and bool((patch > 0).all()):
                assert abs(float(patch.mean()) - 255 * (middle - 0.5) / (length - 1)) < 255 * 2.0 / length + 3


def test_boxes_of_a_wide_picture_leave_out_what_the_crop_loses(processor: Any) -> None:
    inputs = prepare(processor, CFG, FEEL, tiny.picture(56, 28))
    assert inputs.patch_boxes is not None
    boxes = inputs.patch_boxes[0][0]
    assert boxes.shape == (16, 4)
    assert boxes[:, 0].min() == 14 and boxes[:, 2].max() == 42 and boxes[:, 3].max() == 28


@pytest.mark.parametrize("name", ["feature-minus-three-full", "siglip-default-strategy"])
def test_every_image_token_has_a_box(name: str) -> None:
    case = BY_NAME[name]
    cfg = find_adapter("LlavaForConditionalGeneration").read_config(hf_config(case))
    inputs = prepare(tiny.llava_processor(case), cfg, FEEL, A)
    assert inputs.patch_boxes is not None
    assert len(inputs.patch_boxes[0][0]) == inputs.count_image_tokens(0, inputs.spans[0].images[0])
    assert cfg.vision is not None
    if cfg.vision.kind == "clip":  # the class token looks at the whole image
        assert inputs.patch_boxes[0][0][0].tolist() == [0, 0, 40, 30]
        assert len(inputs.grid_tokens(0).flatten()) == 4
    else:
        with pytest.raises(IndexError, match="no whole grid"):
            inputs.grid_tokens(0)


# --- a processor's own tensors ------------------------------------------------------------------------------
def test_processor_output_keeps_its_padding_side_and_its_positions(processor: Any) -> None:
    prompts = [processor.apply_chat_template(message(t, 1), add_generation_prompt=True) for t in (FEEL, "what")]
    raw = processor(text=prompts, images=[A, B], padding=True, padding_side="right", return_tensors="pt")
    inputs = inputs_from_hf(CFG, processor.tokenizer, **raw)
    assert torch.equal(inputs.tokens, raw["input_ids"]) and not bool(inputs.attention_mask[1, -1])
    assert inputs.position_ids[1].tolist() == list(range(inputs.shape[1]))  # as Hugging Face's forward sets them
    assert inputs.spans[1].last == int(inputs.attention_mask[1].sum()) - 1
    given = torch.arange(inputs.shape[1]).flip(0).expand(inputs.shape)
    assert torch.equal(inputs_from_hf(CFG, None, **raw, position_ids=given).position_ids, given)


def test_tokens_without_a_mask_are_all_real_where_no_row_ends_in_pads() -> None:
    inputs = inputs_from_hf(TEXT_CFG, tiny.tokenizer(), input_ids=torch.tensor([[5, 6, 7], [5, 0, 7]]))
    assert bool(inputs.attention_mask.all())
