"""Images of one square each between marks (Gemma-3): grids, boxes, answers, pan and scan, what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cases import BY_NAME, relative_error
from tests.checkpoints import tiny
from tests.checkpoints.test_processing import FEEL
from tests.checkpoints.tiny import picture
from tests.checkpoints.tiny_processors import gemma_processor
from tests.odd_inputs import GEMMA_END, GEMMA_START, IMAGE_TOKEN
from veena_lens import HookedVLM
from veena_lens.positions import Box, position_mask

A, B, C = picture(40, 30), picture(16, 90, 1), picture(31, 31, 2)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """(the Hugging Face model, ours from its folder)."""
    case = BY_NAME["gemma3-many-tokens"]
    hf, folder = tiny.save(case, tmp_path_factory.mktemp("gemma"), torch.float64)
    return hf, HookedVLM.from_pretrained(folder)


def test_grids_spans_boxes_and_answers_lie_where_the_pictures_do(loaded: Any) -> None:
    _, model = loaded
    inputs = model.prepare([FEEL, "what"], [[B, A], [C]], answer="this person is sad")
    assert inputs.grids == (((3, 3), (3, 3)), ((3, 3),))
    for row, spans in enumerate(inputs.spans):
        for span in spans.images:
            assert inputs.tokens[row, span].tolist() == [IMAGE_TOKEN] * 9
            assert inputs.tokens[row, [span.start - 1, span.stop]].tolist() == [GEMMA_START, GEMMA_END]
        assert model.processor.tokenizer.decode(inputs.tokens[row, spans.answer]) == "this person is sad"
    # 19 pixels a side hold 6 patches of 3, and a token reads a square of 2 x 2: the 19th pixel is no part of any.
    boxes = inputs.patch_boxes[0][1]
    torch.testing.assert_close(boxes[0], torch.tensor([0, 0, 40 * 6 / 19, 30 * 6 / 19]))
    torch.testing.assert_close(boxes[8], torch.tensor([40 * 12 / 19, 30 * 12 / 19, 40 * 18 / 19, 30 * 18 / 19]))
    corner = position_mask(inputs, Box(30, 20, 39, 29, image=1))
    assert corner[0].nonzero().flatten().tolist() == [int(inputs.grid_tokens(0, 1)[2, 2])]
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
    assert cache.image_grid("vision.blocks.0.hook_resid_post", row=0, image=1).shape == (6, 6, 24)
    assert cache.image_grid("connector.hook_out", row=0, image=1).shape == (3, 3, 48)
    grid = cache.image_grid("resid_post", 1, row=0, image=1)
    assert torch.equal(grid, cache["resid_post", 1][0][inputs.grid_tokens(0, 1)])


def test_pan_and_scan_is_refused_by_prepare_and_taken_as_pictures_from_tensors(loaded: Any) -> None:
    hf, model = loaded
    pictures = model.processor.image_processor
    wide = picture(90, 30)
    settings = dict(do_pan_and_scan=True, pan_and_scan_min_crop_size=8, pan_and_scan_max_num_crops=4)
    settings |= dict(pan_and_scan_min_ratio_to_activate=1.2)
    raw = model.processor(text=["<start_of_image> what"], images=[[wide]], return_tensors="pt", **settings)
    inputs = model.inputs_from_hf(**raw)
    assert inputs.n_images == [4], "the picture and three crops"
    with torch.no_grad():
        assert relative_error(model(inputs), hf(**raw).logits) < 1e-9
    try:
        pictures.do_pan_and_scan = True
        with pytest.raises(ValueError, match="do_pan_and_scan = False.*inputs_from_hf"):
            model.prepare(FEEL, wide)
    finally:
        pictures.do_pan_and_scan = None


def test_processor_or_prompt_that_does_not_fit_is_refused(loaded: Any) -> None:
    _, model = loaded
    with pytest.raises(ValueError, match="1 image tokens .*but no image"):
        model.prepare("<image_soft_token> what", chat=False)
    other = gemma_processor(BY_NAME["gemma3-many-tokens"])
    other.tokenizer.image_token_id = 100
    with pytest.raises(ValueError, match="has id 100, but the model's is 127"):
        before, model.processor = model.processor, other
        try:
            model.prepare(FEEL, A)
        finally:
            model.processor = before


def test_turns_of_a_text_model_are_those_of_its_template(tmp_path: Path) -> None:
    _, folder = tiny.save(BY_NAME["gemma3-text-untied"], tmp_path)
    model: Any = HookedVLM.from_pretrained(folder)
    assert model.to_str_tokens(model.prepare("what"))[-3:] == ["<end_of_turn>", "<start_of_turn>", "model"]
