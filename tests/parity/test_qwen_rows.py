"""A row of a padded batch equals the row alone, in every family of models.

Without Hugging Face's roundings to float32 the two agree to the last digits of float64. With them a difference of
1e-16 that meets a rounding boundary becomes 6e-8.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.cases import BY_NAME, counted, native_model, raw_inputs, relative_error
from tests.parity.test_llava_next import batch, build
from tests.qwen_cases import KINDS, QWEN_BY_NAME
from veena_lens import HookedVLM

QWEN = ["image-and-video", "many-pictures", "right-padding", "text-rows-between", "long-video", "no-picture-at-all"]
NAMES = [f"{kind}-{name}" for kind in KINDS for name in QWEN]
NAMES += ["clip-llama", "siglip-qwen2", "three-images-and-none", "window-mistral", "text-qwen2"]


def pair(name: str, casts: str) -> tuple[HookedVLM, Any]:
    """A model and a batch of unequal rows."""
    if name == "llava-next":
        hf, _ = build("llama")
        model = HookedVLM.from_hf(hf, casts=casts)
        raw = batch(model, [[(40, 75)], [(90, 30), (28, 28)], []])
        return model, model.inputs_from_hf(**counted(raw))
    case: Any = QWEN_BY_NAME.get(name) or BY_NAME[name]
    model, raw = native_model(case, casts=casts), raw_inputs(case)
    has_own_positions = "image_grid_thw" in raw or "video_grid_thw" in raw
    return model, model.inputs_from_hf(**(raw if has_own_positions else counted(raw)))


@pytest.mark.parametrize("casts, bound", [("none", 1e-12), ("hf", 1e-7)])
@pytest.mark.parametrize("name", [*NAMES, "llava-next"])
def test_row_of_a_padded_batch_equals_the_row_alone(name: str, casts: str, bound: float) -> None:
    model, inputs = pair(name, casts)
    assert not bool(inputs.attention_mask.all()), "no row is padded, so the test shows nothing"
    with torch.no_grad():
        whole = model(inputs)
        for i in range(len(inputs)):
            alone = model(inputs[i].without_padding())
            assert relative_error(whole[i][inputs.attention_mask[i]], alone[0]) < bound


@pytest.mark.parametrize("name", [n for n in [*NAMES, "llava-next"] if n != "text-qwen2" and "no-picture" not in n])
def test_tower_of_a_padded_batch_equals_that_of_the_row_alone(name: str) -> None:
    """Pictures are padded too: neither their pads nor their neighbours are seen."""
    model, inputs = pair(name, "none")
    with torch.no_grad():
        whole = model.image_features(inputs)
        owners = inputs.image_mask.nonzero()[:, 0]
        for i in range(len(inputs)):
            alone = model.image_features(inputs[i])
            assert (alone is None) == (not bool((owners == i).any()))
            if alone is not None:
                assert relative_error(whole[owners == i], alone) < 1e-12
