"""Qwen-VL models against Hugging Face in float64: logits, hidden states, features, tower, positions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.vision_utils import get_vision_window_index

from tests.cases import hf_model, native_model, raw_inputs, relative_error
from tests.qwen_cases import KINDS, QWEN_BY_NAME, QWEN_CASES, QwenCase
from veena_lens import ActivationCache
from veena_lens.inputs import MultimodalInputs

WITH_PICTURES = [case for case in QWEN_CASES if not case.text_only()]
WITH_DEEPSTACK = [
    case for case in WITH_PICTURES if getattr(case.config().vision_config, "deepstack_visual_indexes", ())
]
KEPT = ("resid_pre", "resid_post", "hook_out", "hook_deepstack", "hook_image_features", "unembed.hook_in")
FEW = ["plain", "image-and-video", "merge-3", "right-padding", "tied", "text-rows-between"]


def fresh(hf: Any) -> Any:
    """The model without the positions that an earlier batch left on it."""
    hf.model.rope_deltas = None
    return hf


@dataclass(frozen=True, eq=False)
class Both:
    """One batch through both models: Hugging Face's output and what its tower said, our logits and cache."""

    raw: dict[str, Tensor]
    theirs: Any
    tower: list[list[Tensor]]  # layer -> each image's patches, in reading order
    features: list[Tensor]  # each image's tokens
    deepstack: list[list[Tensor]]
    logits: Tensor
    cache: ActivationCache
    inputs: MultimodalInputs


@cache
def run(case: QwenCase) -> Both:
    raw, hf, model = raw_inputs(case), fresh(hf_model(case)), native_model(case)
    said: list[list[Tensor]] = [[] for _ in hf.model.visual.blocks]
    handles = [
        block.register_forward_hook(lambda module, args, out, kept=kept: kept.append(out))
        for block, kept in zip(hf.model.visual.blocks, said, strict=True)
    ]
    with torch.no_grad():
        theirs = hf(**raw, output_hidden_states=True)
        for handle in handles:
            handle.remove()
        inputs = model.inputs_from_hf(**raw)
        logits, cache = model.run_with_cache(inputs, names_filter=lambda name: name.endswith(KEPT))
    if case.kind == "qwen2_5_vl":
        said = [natural_order(case, raw, parts) for parts in said]
    outs = [out for out in (theirs.image_outputs, theirs.video_outputs) if out is not None]
    patches = [h * w for t, h, w in grids(raw) for _ in range(t)]
    tokens = [n // case.config().vision_config.spatial_merge_size ** 2 for n in patches]
    order = reading_order(case)

    def split(parts: list[Tensor], sizes: list[int]) -> list[Tensor]:
        pieces = torch.cat(parts).split(sizes) if parts else ()
        return [pieces[i] for i in order]

    return Both(
        raw,
        theirs,
        [split(parts, patches) for parts in said],
        split([x for out in outs for x in out.pooler_output], tokens),
        [
            split([x for out in outs for x in out.deepstack_features[i]], tokens)
            for i in range(len(getattr(model, "deepstack", ())))
        ],
        logits,
        cache,
        inputs,
    )


def natural_order(case: QwenCase, raw: dict[str, Tensor], parts: list[Tensor]) -> list[Tensor]:
    """Hugging Face's tower holds its squares window by window: back to the order of the image."""
    vision = case.config().vision_config
    sizes = dict(spatial_merge_size=vision.spatial_merge_size, window_size=vision.window_size)
    out = []
    for part, key in zip(parts, [key for key in ("image_grid_thw", "video_grid_thw") if key in raw], strict=True):
        index, _ = get_vision_window_index(raw[key], patch_size=vision.patch_size, **sizes)
        out.append(part.unflatten(0, (len(index), -1))[index.argsort()].flatten(0, 1))
    return out


def grids(raw: dict[str, Tensor]) -> list[list[int]]:
    """(time, height, width) of all images, then of all videos."""
    return [g for key in ("image_grid_thw", "video_grid_thw") if key in raw for g in raw[key].tolist()]


def reading_order(case: QwenCase) -> list[int]:
    """Pictures in reading order, as numbers among all images followed by all frames of videos."""
    words = [word for row in case.rows for word in row.split() if "x" in word]
    n_images, images, frames, order = sum(w[0] == "i" for w in words), 0, 0, []
    for word in words:
        if word[0] == "i":
            order.append(images)
            images += 1
        else:
            t = int(word[1:].split("x")[0])
            order += range(n_images + frames, n_images + frames + t)
            frames += t
    return order


@pytest.mark.parametrize("case", QWEN_CASES, ids=str)
def test_logits_equal_hugging_face(case: QwenCase) -> None:
    both = run(case)
    assert both.logits.dtype == torch.float64
    assert relative_error(both.logits, both.theirs.logits, both.raw["attention_mask"]) < 1e-9


@pytest.mark.parametrize("case", QWEN_CASES, ids=str)
def test_every_hidden_state_equals_hugging_face(case: QwenCase) -> None:
    """Hugging Face's last hidden state is after the final norm, the others before the block and before the features
    of inner tower layers join."""
    both = run(case)
    n = case.config().text_config.num_hidden_layers
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(n)] + ["unembed.hook_in"]
    assert len(both.theirs.hidden_states) == len(names)
    for name, state in zip(names, both.theirs.hidden_states, strict=True):
        assert relative_error(both.cache[name], state, both.raw["attention_mask"]) < 1e-9, name


@pytest.mark.parametrize("case", WITH_PICTURES, ids=str)
def test_picture_features_equal_hugging_face(case: QwenCase) -> None:
    both = run(case)
    assert relative_error(both.cache["hook_image_features"], torch.cat(both.features)) < 1e-9
    for picture, features in zip(both.cache["connector.hook_out"], both.features, strict=True):
        assert relative_error(picture[: len(features)], features) < 1e-9


@pytest.mark.parametrize("case", WITH_PICTURES, ids=str)
def test_every_tower_layer_equals_hugging_face(case: QwenCase) -> None:
    both = run(case)
    for layer, pictures in enumerate(both.tower):
        ours = both.cache[f"vision.blocks.{layer}.hook_resid_post"]
        assert ours.shape[1] == max(map(len, pictures))
        for picture, patches in zip(ours, pictures, strict=True):
            assert relative_error(picture[: len(patches)], patches) < 1e-9, layer


@pytest.mark.parametrize("case", WITH_DEEPSTACK, ids=str)
def test_deepstack_features_equal_hugging_face_and_join_at_the_image_tokens(case: QwenCase) -> None:
    both = run(case)
    assert len(both.deepstack) == len(case.config().vision_config.deepstack_visual_indexes)
    n_layers = case.config().text_config.num_hidden_layers
    for i, pictures in enumerate(both.deepstack[:n_layers]):  # further ones reach nothing
        features = torch.cat(pictures)
        assert relative_error(both.cache[f"deepstack.{i}.hook_out"], features) < 1e-9, i
        if i + 1 < n_layers:
            added = torch.zeros_like(both.theirs.hidden_states[i + 1])
            added[both.inputs.image_mask] = features
            joined = both.theirs.hidden_states[i + 1] + added
            ours = both.cache[f"blocks.{i + 1}.hook_deepstack"]
            assert relative_error(ours, joined, both.raw["attention_mask"]) < 1e-9, i


@pytest.mark.parametrize("case", WITH_PICTURES, ids=str)
def test_positions_equal_hugging_face(case: QwenCase) -> None:
    both = run(case)
    theirs, _ = hf_model(case).model.get_rope_index(**both.raw)
    assert torch.equal(both.inputs.position_ids, theirs)


@pytest.mark.parametrize("case", [case for case in WITH_PICTURES if case.padding == "left"], ids=str)
def test_positions_of_an_answer_equal_those_of_the_longer_text(case: QwenCase) -> None:
    """Also behind a long video, whose frames have larger positions than the text after it."""
    raw, inputs = dict(run(case).raw), run(case).inputs
    new = torch.tensor([[5, 6, 7]]).expand(len(case.rows), 3)
    longer = dict(
        raw,
        input_ids=torch.cat([raw["input_ids"], new], 1),
        attention_mask=torch.cat([raw["attention_mask"], torch.ones_like(new)], 1),
        mm_token_type_ids=torch.cat([raw["mm_token_type_ids"], torch.zeros_like(new)], 1),
    )
    theirs, _ = hf_model(case).model.get_rope_index(**longer)
    assert torch.equal(inputs.with_answer(new).position_ids, theirs)
    assert torch.equal(inputs.with_new_tokens(new).position_ids, theirs)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)], ids=["float32", "bfloat16"])
def test_lower_precision_equals_hugging_face(name: str, kind: str, dtype: torch.dtype, bound: float, model_of) -> None:
    case = QWEN_BY_NAME[f"{kind}-{name}"]
    raw = raw_inputs(case, dtype)
    with torch.no_grad():
        theirs = fresh(hf_model(case, dtype))(**raw).logits
        ours = model_of(case, dtype).forward_hf(**raw)
    assert ours.dtype == dtype
    assert relative_error(ours, theirs, raw["attention_mask"]) < bound


@pytest.mark.parametrize("name", ["plain", "image-and-video", "no-picture-at-all", "right-padding"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("streams", ["b s", "1 s", "3 b s", "4 b s"])
def test_given_position_ids_are_used_as_hugging_face_uses_them(name: str, kind: str, streams: str, model_of) -> None:
    case = QWEN_BY_NAME[f"{kind}-{name}"]
    raw, model = raw_inputs(case), model_of(case)
    shape = raw["input_ids"].shape
    drawn = torch.randint(0, 60, (4, *shape), generator=torch.Generator().manual_seed(5))
    given = {"b s": drawn[0], "1 s": drawn[0, :1], "3 b s": drawn[:3], "4 b s": drawn}[streams]
    with torch.no_grad():
        theirs = fresh(hf_model(case))(**raw, position_ids=given.expand(shape) if streams == "1 s" else given).logits
        ours = model.forward_hf(**raw, position_ids=given)
        assert relative_error(ours, theirs, raw["attention_mask"]) < 1e-9
        assert relative_error(ours, model.forward_hf(**raw), raw["attention_mask"]) > 1e-4
        if case.text_only():
            bare = model(raw["input_ids"], attention_mask=raw["attention_mask"], position_ids=given)
            assert relative_error(bare, theirs, raw["attention_mask"]) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_type_ids_of_tokens_may_be_left_out(kind: str, model_of) -> None:
    """They say what the tokens say themselves."""
    case = QWEN_BY_NAME[f"{kind}-image-and-video"]
    raw = raw_inputs(case)
    raw.pop("mm_token_type_ids")
    with torch.no_grad():
        assert torch.equal(model_of(case).forward_hf(**raw), run(case).logits)


def test_table_holds_at_least_thirty_different_configurations_a_model() -> None:
    assert len(QWEN_BY_NAME) == len(QWEN_CASES), "two cases share a name"
    for kind in KINDS:
        seen = {(c.config().to_json_string(), c.rows, c.padding) for c in QWEN_CASES if c.kind == kind}
        assert len(seen) >= 30 and len({config for config, *_ in seen}) >= 20, kind
