"""LLaVA-OneVision against Hugging Face in float64: tiles, resampled grids, several images, frames, generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import build_hf, hf_model, native_model, raw_inputs, relative_error
from tests.onevision_cases import ONEVISION_BY_NAME, ONEVISION_CASES, OnevisionCase
from tests.parity.test_generate import never_ends, theirs
from veena_lens import HookedVLM

NEW = 40
SPOKEN = ["plain", "resampled", "image-and-video", "tied", "many-pictures", "window"]


def features_of(hf: Any, raw: dict[str, Tensor]) -> dict[str, Tensor]:
    """What Hugging Face makes of the images, and of the videos."""
    out = {}
    if "pixel_values" in raw:
        kw = {"batch_num_images": raw["batch_num_images"]} if "batch_num_images" in raw else {}
        found = hf.model.get_image_features(raw["pixel_values"], raw["image_sizes"], return_dict=True, **kw)
        out["image"] = torch.cat(list(found.pooler_output))
    if "pixel_values_videos" in raw:
        found = hf.model.get_video_features(raw["pixel_values_videos"], return_dict=True)
        out["video"] = found.pooler_output.flatten(0, 1)
    return out


@pytest.mark.parametrize("case", ONEVISION_CASES, ids=str)
def test_logits_hidden_states_and_features_equal_hugging_face(case: OnevisionCase) -> None:
    raw, hf, model = raw_inputs(case), hf_model(case), native_model(case)
    with torch.no_grad():
        expected = hf(**raw, output_hidden_states=True)
        inputs = model.inputs_from_hf(**raw)
        logits, cache = model.run_with_cache(inputs)
        features = features_of(hf, raw)
    keep = raw["attention_mask"].bool()
    assert relative_error(logits, expected.logits, keep) < 1e-9
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(model.cfg.n_layers)] + ["unembed.hook_in"]
    for name, state in zip(names, expected.hidden_states, strict=True):
        assert relative_error(cache[name], state, keep) < 1e-9, name
    kinds = dict(image=model.cfg.image_token_id, video=model.cfg.video_token_id)
    filled = inputs.tokens[inputs.image_mask]
    for kind, expected_features in features.items():
        mine = cache["hook_image_features"][filled == kinds[kind]]
        assert relative_error(mine, expected_features) < 1e-9, kind


@pytest.mark.parametrize("name", SPOKEN)
def test_greedy_tokens_equal_hugging_face(name: str) -> None:
    case = ONEVISION_BY_NAME[f"onevision-{name}"]
    raw, hf = raw_inputs(case), never_ends(build_hf(case, gain=5.0))
    model = HookedVLM.from_hf(hf)
    ours = model.generate(model.inputs_from_hf(**raw), max_new_tokens=NEW, return_type="tokens")
    assert ours.tolist() == theirs(hf, raw, max_new_tokens=NEW)
    assert len(set(ours.flatten().tolist())) > 4, "the model says too little for the test to show much"
