"""A row of a padded batch equals the row alone, in every family of models.

Without Hugging Face's roundings to float32 the two agree to the last digits of float64. With them a difference of
1e-16 that meets a rounding boundary becomes 6e-8.
"""

from __future__ import annotations

import pytest
import torch

from tests.cases import BY_NAME, QWEN, counted_inputs, native_model, relative_error

FEW = ["image-and-video", "many-pictures", "right-padding", "text-rows-between", "long-video", "no-picture-at-all"]
NAMES = [f"{family}-{name}" for family in QWEN for name in FEW]
NAMES += ["clip-llama", "siglip-qwen2", "three-images-and-none", "window-mistral", "text-qwen2", "llava-next-llama"]
NAMES += [f"gemma3-{name}" for name in ("plain", "unequal-rows", "touching-pictures", "ends-with-a-picture")]
NAMES += ["idefics3-unequal-pictures", "smolvlm-plain", "onevision-image-and-video"]
PICTURED = [name for name in NAMES if BY_NAME[name].has_images]


@pytest.mark.parametrize("casts, bound", [("none", 1e-12), ("hf", 1e-7)])
@pytest.mark.parametrize("name", NAMES)
def test_row_of_a_padded_batch_equals_the_row_alone(name: str, casts: str, bound: float) -> None:
    """With its pads and without them, smaller images beside larger ones."""
    case = BY_NAME[name]
    model = native_model(case, casts=casts)
    inputs = model.inputs_from_hf(**counted_inputs(case))
    assert not bool(inputs.attention_mask.all()), "no row is padded, so the test shows nothing"
    with torch.no_grad():
        whole = model(inputs)
        for i in range(len(inputs)):
            expected = whole[i][inputs.attention_mask[i]]
            for alone in (inputs[i], inputs[i].without_padding()):
                assert relative_error(model(alone)[0][alone.attention_mask[0]], expected) < bound


@pytest.mark.parametrize("name", PICTURED)
def test_tower_of_a_padded_batch_equals_that_of_the_row_alone(name: str) -> None:
    """Images are padded too: neither their pads nor their neighbours are seen."""
    model = native_model(BY_NAME[name], casts="none")
    inputs = model.inputs_from_hf(**counted_inputs(BY_NAME[name]))
    with torch.no_grad():
        whole = model.image_features(inputs)
        owners = inputs.image_mask.nonzero()[:, 0]
        for i in range(len(inputs)):
            alone = model.image_features(inputs[i])
            assert (alone is None) == (not bool((owners == i).any()))
            if alone is not None:
                assert relative_error(whole[owners == i], alone) < 1e-12
