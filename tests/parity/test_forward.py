"""Native against Hugging Face on every case: logits, each layer's hidden state, image features, the tower's layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.cases import (
    BY_NAME,
    CASES,
    QWEN,
    Case,
    build_hf,
    counted,
    hf_model,
    native_model,
    raw_inputs,
    relative_error,
)
from tests.parity.drawing import EXAMPLES, check_drawn
from tests.parity.runs import Both, run, run_both, split
from veena_lens import HookedVLM

TOWERS = [case for case in CASES if case.has_images and (case.has("any size") or case.family in ("llava", "gemma3"))]
SELECTION = ("vision_feature_layer", "vision_feature_select_strategy")
PRECISE = [case for case in CASES if case.family in ("text", "llava")]
PRECISE += [BY_NAME[f"gemma3-{name}"] for name in ("plain", "large-epsilons", "text-untied")]
PRECISE += [BY_NAME[name] for name in ("llava-next-llama", "onevision-image-and-video", "idefics3-plain")]
FEW = ("plain", "image-and-video", "merge-3", "right-padding", "tied", "text-rows-between")
PRECISE += [BY_NAME[f"{family}-{name}"] for family in QWEN for name in FEW]


def assert_equals_hugging_face(both: Both) -> None:
    """Logits, every hidden state and the features, at every real place.

    Hugging Face's last hidden state is after the final norm, the others before the block (and before the features of
    inner tower layers join). The features are what fills the image tokens of the first."""
    states = both.theirs.hidden_states
    assert both.logits.dtype == torch.float64
    assert relative_error(both.logits, both.theirs.logits, both.keep) < 1e-9
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(len(states) - 1)] + ["unembed.hook_in"]
    for name, state in zip(names, states, strict=True):
        assert relative_error(both.cache[name], state, both.keep) < 1e-9, name
    if both.inputs.pixel_values is not None:
        assert relative_error(both.cache["hook_image_features"], states[0][both.inputs.image_mask]) < 1e-9


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_hidden_states_and_features_equal_hugging_face(case: Case) -> None:
    both, config = run(case), case.config()
    assert_equals_hugging_face(both)
    assert (both.inputs.pixel_values is not None) == case.has_images
    marks = [getattr(config, f"{kind}_token_id", None) for kind in ("image", "video")]
    filled = torch.isin(both.raw["input_ids"], torch.tensor([-1 if mark is None else mark for mark in marks]))
    assert torch.equal(both.inputs.image_mask, filled & both.keep.bool())


@pytest.mark.parametrize("case", TOWERS, ids=str)
def test_every_tower_layer_equals_hugging_face(case: Case) -> None:
    """Images that are smaller than others are padded: their own patches are compared."""
    both, config = run(case), case.config()
    wanted = getattr(config, "vision_feature_layer", -1)
    depth = max(i % len(both.tower) for i in ([wanted] if isinstance(wanted, int) else wanted))
    assert native_model(case).cfg.vision.n_layers == depth
    for layer in range(depth):
        for name, theirs in (("resid_pre", both.tower[layer]), ("resid_post", both.tower[layer + 1])):
            ours = both.cache[f"vision.blocks.{layer}.hook_{name}"]
            assert ours.shape[1] == max(map(len, theirs))
            for image, patches in zip(ours, theirs, strict=True):
                assert relative_error(image[: len(patches)], patches) < 1e-9, (name, layer)


@pytest.mark.parametrize("case", TOWERS, ids=str)
def test_connector_gives_the_features_of_every_image(case: Case) -> None:
    """As Hugging Face's own function returns them."""
    both, hf = run(case), hf_model(case)
    if case.has("any size"):
        outs = [out for out in (both.theirs.image_outputs, both.theirs.video_outputs) if out is not None]
        merge = case.config().vision_config.spatial_merge_size
        theirs = split(case, both.raw, [x for out in outs for x in out.pooler_output], merge)
    else:
        options = {key: getattr(hf.config, key) for key in SELECTION if hasattr(hf.config, key)}
        with torch.no_grad():
            found = hf.model.get_image_features(both.raw["pixel_values"], return_dict=True, **options)
        theirs = list(found.pooler_output)
    assert relative_error(both.cache["hook_image_features"], torch.cat(theirs)) < 1e-9
    for image, features in zip(both.cache["connector.hook_out"], theirs, strict=True):
        assert relative_error(image[: len(features)], features) < 1e-9


@pytest.mark.parametrize("family", EXAMPLES)
def test_drawn_configuration_equals_hugging_face(family: str) -> None:
    def check(case: Case) -> None:
        hf = build_hf(case, gain=2.0)
        assert_equals_hugging_face(run_both(case, hf, HookedVLM.from_hf(hf)))

    check_drawn(family, EXAMPLES[family], check)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", PRECISE, ids=str)
def test_lower_precision_equals_hugging_face(case: Case, dtype: torch.dtype, bound: float, model_of) -> None:
    raw = raw_inputs(case, dtype)
    with torch.no_grad():
        theirs = hf_model(case, dtype)(**raw).logits
        ours = model_of(case, dtype).forward_hf(**raw)
    assert ours.dtype == dtype
    assert relative_error(ours, theirs, raw["attention_mask"]) < bound


@pytest.mark.parametrize("name", ["clip-llama", "window-mistral", "siglip-qwen2", "text-llama", "rope-dynamic"])
def test_given_position_ids_are_used(name: str, model_of) -> None:
    raw = counted(raw_inputs(BY_NAME[name]))
    with torch.no_grad():
        theirs = hf_model(BY_NAME[name])(**raw).logits
        ours = model_of(BY_NAME[name]).forward_hf(**raw)
        arange = model_of(BY_NAME[name]).forward_hf(**raw_inputs(BY_NAME[name]))
    keep = raw["attention_mask"]
    assert relative_error(ours, theirs, keep) < 1e-9
    assert relative_error(arange, ours, keep) > 0, "the rotary tables are float32: other positions round otherwise"


def test_positions_shifted_by_a_large_number_equal_hugging_face(model_of) -> None:
    """Rotary positions are relative, so only unequal gaps show: stretch them."""
    case = BY_NAME["clip-mistral"]
    raw = counted(raw_inputs(case))
    raw["position_ids"] = raw["position_ids"] ** 2 // 2
    with torch.no_grad():
        theirs, plain = hf_model(case)(**raw).logits, hf_model(case)(**raw_inputs(case)).logits
        ours = model_of(case).forward_hf(**raw)
    assert relative_error(ours, theirs, raw["attention_mask"]) < 1e-9
    assert relative_error(plain, theirs, raw["attention_mask"]) > 1e-3


def test_missing_attention_mask_means_all_real(model_of) -> None:
    case = BY_NAME["equal-rows"]
    raw = raw_inputs(case)
    with torch.no_grad():
        with_mask = model_of(case).forward_hf(**raw)
        without = model_of(case).forward_hf(input_ids=raw["input_ids"], pixel_values=raw["pixel_values"])
    assert torch.equal(with_mask, without)


@pytest.mark.parametrize("name", ["clip-llama", "both-biases-tied", "siglip-qwen2", "text-llama-tied-llama3"])
def test_from_hf_shares_storage(name: str) -> None:
    hf = build_hf(BY_NAME[name])
    model = HookedVLM.from_hf(hf)
    theirs = {p.data_ptr() for p in hf.parameters()}
    assert all(p.data_ptr() in theirs for p in model.parameters())
    raw = raw_inputs(BY_NAME[name])
    with torch.no_grad():
        before = model.forward_hf(**raw)
        next(p for n, p in hf.named_parameters() if n.endswith("layers.1.mlp.down_proj.weight")).mul_(1.5)
        after, theirs_after = model.forward_hf(**raw), hf(**raw).logits
    assert relative_error(after, before, raw["attention_mask"]) > 1e-3
    assert relative_error(after, theirs_after, raw["attention_mask"]) < 1e-9


def test_copy_shares_nothing() -> None:
    hf = build_hf(BY_NAME["clip-llama"])
    model = HookedVLM.from_hf(hf, copy=True)
    theirs = {p.data_ptr() for p in hf.parameters()}
    assert not any(p.data_ptr() in theirs for p in model.parameters())
    raw = raw_inputs(BY_NAME["clip-llama"])
    with torch.no_grad():
        before = model.forward_hf(**raw)
        for p in hf.parameters():
            p.zero_()
        assert torch.equal(model.forward_hf(**raw), before)


def test_no_hugging_face_module_inside(model_of) -> None:
    for name in ("clip-llama", "siglip-qwen2", "text-mistral"):
        homes = {type(m).__module__.split(".")[0] for m in model_of(BY_NAME[name]).modules()}
        assert "transformers" not in homes


def test_no_two_cases_are_the_same() -> None:
    assert len(BY_NAME) == len(CASES), "two cases share a name"
    seen: dict[str, set[str]] = {}
    for case in CASES:
        about = (case.config().to_json_string(), case.rows, case.padding, case.seconds, case.says_numbers, case.n_name)
        seen.setdefault(case.family, set()).add(repr((*about, case.has_mask, case.model_class)))
    assert sum(map(len, seen.values())) == len(CASES)
    for family in QWEN:
        configs = {case.config().to_json_string() for case in CASES if case.family == family}
        assert len(seen[family]) >= 30 and len(configs) >= 20, family
    assert len({repr(case.config()) for case in CASES if case.family in ("text", "llava")}) >= 30


def test_dynamic_rotary_past_the_original_length_grows_its_base() -> None:
    """A sequence longer than the original context is never computed with the old base, nor one past the stretched."""
    case = Case(
        name="rope-dynamic-long",
        family="text",
        rows=("30",),
        text=dict(max_position_embeddings=16, rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=4.0)),
    )
    hf = build_hf(case)
    model = HookedVLM.from_hf(hf)
    with torch.no_grad():
        assert relative_error(model.forward_hf(**raw_inputs(case)), hf(**raw_inputs(case)).logits) < 1e-9
    with pytest.raises(ValueError, match="70.*64|64.*70"):
        model.forward_hf(**raw_inputs(replace(case, rows=("70",))))


def test_feature_layer_zero_as_a_number_equals_a_list_of_it(model_of) -> None:
    """Hugging Face itself cannot run the number 0 (it takes it for "unset")."""
    case = BY_NAME["feature-zero"]
    hf = build_hf(case)
    hf.config.vision_feature_layer = 0
    raw = raw_inputs(case)
    with torch.no_grad():
        number = HookedVLM.from_hf(hf).forward_hf(**raw)
        assert torch.equal(number, model_of(case).forward_hf(**raw))


def test_hole_in_the_mask_equals_hugging_face() -> None:
    """A token in the middle that nobody may read."""
    case = Case(name="hole", rows=("3 i 6", "9"))
    hf, raw = build_hf(case, gain=2.0), raw_inputs(case)
    raw["attention_mask"][0, 9] = raw["attention_mask"][1, -3] = 0
    with torch.no_grad():
        theirs = hf(**raw).logits
        assert relative_error(HookedVLM.from_hf(hf).forward_hf(**raw), theirs, raw["attention_mask"]) < 1e-9


def test_mask_of_any_number_type_is_read() -> None:
    case = Case(name="types", rows=("3 i 6", "4"))
    model, raw = HookedVLM.from_hf(build_hf(case)), raw_inputs(case)
    with torch.no_grad():
        plain = model.forward_hf(**raw)
        for dtype in (torch.bool, torch.int32, torch.float32, torch.uint8):
            assert torch.equal(model.forward_hf(**dict(raw, attention_mask=raw["attention_mask"].to(dtype))), plain)
        assert torch.equal(model.forward_hf(**dict(raw, input_ids=raw["input_ids"].int())), plain)
