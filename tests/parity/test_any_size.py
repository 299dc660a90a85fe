"""What only models with images of any size have: deep-stack features, and positions in streams."""

from __future__ import annotations

import pytest
import torch

from tests.cases import BY_NAME, CASES, QWEN, Case, hf_model, native_model, raw_inputs, relative_error
from tests.parity.runs import run, split

WITH_IMAGES = [case for case in CASES if case.has("any size") and case.has_images]
WITH_DEEPSTACK = [case for case in WITH_IMAGES if getattr(case.config().vision_config, "deepstack_visual_indexes", ())]


@pytest.mark.parametrize("case", WITH_DEEPSTACK, ids=str)
def test_deepstack_features_equal_hugging_face_and_join_at_the_image_tokens(case: Case) -> None:
    both, config = run(case), case.config()
    outs = [out for out in (both.theirs.image_outputs, both.theirs.video_outputs) if out is not None]
    n_layers, n_added = config.text_config.num_hidden_layers, len(config.vision_config.deepstack_visual_indexes)
    assert {len(out.deepstack_features) for out in outs} == {n_added}
    assert len(native_model(case).deepstack) == n_added
    for i in range(min(n_added, n_layers)):  # further ones reach nothing
        theirs = [x for out in outs for x in out.deepstack_features[i]]
        features = torch.cat(split(case, both.raw, theirs, config.vision_config.spatial_merge_size))
        assert relative_error(both.cache[f"deepstack.{i}.hook_out"], features) < 1e-9, i
        if i + 1 < n_layers:
            added = torch.zeros_like(both.theirs.hidden_states[i + 1])
            added[both.inputs.image_mask] = features
            joined = both.theirs.hidden_states[i + 1] + added
            ours = both.cache[f"blocks.{i + 1}.hook_deepstack"]
            assert relative_error(ours, joined, both.raw["attention_mask"]) < 1e-9, i


@pytest.mark.parametrize("case", WITH_IMAGES, ids=str)
def test_positions_equal_hugging_face(case: Case) -> None:
    both = run(case)
    theirs, _ = hf_model(case).model.get_rope_index(**both.raw)
    assert torch.equal(both.inputs.position_ids, theirs)


@pytest.mark.parametrize("case", [case for case in WITH_IMAGES if case.padding == "left"], ids=str)
def test_positions_of_an_answer_equal_those_of_the_longer_text(case: Case) -> None:
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


@pytest.mark.parametrize("name", ["plain", "image-and-video", "no-picture-at-all", "right-padding"])
@pytest.mark.parametrize("family", QWEN)
@pytest.mark.parametrize("streams", ["b s", "1 s", "3 b s", "4 b s"])
def test_given_position_ids_are_used_as_hugging_face_uses_them(name: str, family: str, streams: str, model_of) -> None:
    case = BY_NAME[f"{family}-{name}"]
    raw, model = raw_inputs(case), model_of(case)
    shape = raw["input_ids"].shape
    drawn = torch.randint(0, 60, (4, *shape), generator=torch.Generator().manual_seed(5))
    given = {"b s": drawn[0], "1 s": drawn[0, :1], "3 b s": drawn[:3], "4 b s": drawn}[streams]
    with torch.no_grad():
        theirs = hf_model(case)(**raw, position_ids=given.expand(shape) if streams == "1 s" else given).logits
        ours = model.forward_hf(**raw, position_ids=given)
        assert relative_error(ours, theirs, raw["attention_mask"]) < 1e-9
        assert relative_error(ours, model.forward_hf(**raw), raw["attention_mask"]) > 1e-4
        if not case.has_images:
            bare = model(raw["input_ids"], attention_mask=raw["attention_mask"], position_ids=given)
            assert relative_error(bare, theirs, raw["attention_mask"]) < 1e-9


@pytest.mark.parametrize("family", QWEN)
def test_type_ids_of_tokens_may_be_left_out(family: str, model_of) -> None:
    """They say what the tokens say themselves."""
    case = BY_NAME[f"{family}-image-and-video"]
    raw = raw_inputs(case)
    raw.pop("mm_token_type_ids")
    with torch.no_grad():
        assert torch.equal(model_of(case).forward_hf(**raw), run(case).logits)
