"""Native against Hugging Face on every case: logits, each layer's hidden state, image features."""

from __future__ import annotations

import pytest
import torch

from tests.cases import BY_NAME, CASES, Case, build_hf, counted, hf_config, hf_model, raw_inputs, relative_error

WITH_PICTURES = [case for case in CASES if case.n_images]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_equal_hugging_face(case: Case, model_of) -> None:
    raw = raw_inputs(case)
    with torch.no_grad():
        theirs = hf_model(case)(**raw).logits
        ours = model_of(case).forward_hf(**raw)
    assert ours.dtype == torch.float64
    assert relative_error(ours, theirs, raw["attention_mask"]) < 1e-9


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_hidden_state_equals_hugging_face(case: Case, model_of) -> None:
    """Hugging Face's last hidden state is after the final norm, the others before the block."""
    raw, model = raw_inputs(case), model_of(case)
    with torch.no_grad():
        theirs = hf_model(case)(**raw, output_hidden_states=True).hidden_states
        names = [f"blocks.{layer}.hook_resid_pre" for layer in range(model.cfg.n_layers)] + ["unembed.hook_in"]
        _, cache = model.run_with_cache(model.inputs_from_hf(**raw), names_filter=names)
    assert len(theirs) == len(names)
    for name, state in zip(names, theirs, strict=True):
        assert relative_error(cache[name], state, raw["attention_mask"]) < 1e-9, name


@pytest.mark.parametrize("case", WITH_PICTURES, ids=str)
def test_picture_features_equal_hugging_face(case: Case, model_of) -> None:
    raw, model, hf = raw_inputs(case), model_of(case), hf_model(case)
    with torch.no_grad():
        theirs = torch.cat(
            hf.model.get_image_features(
                raw["pixel_values"],
                vision_feature_layer=hf.config.vision_feature_layer,
                vision_feature_select_strategy=hf.config.vision_feature_select_strategy,
                return_dict=True,
            ).pooler_output
        )
        _, cache = model.run_with_cache(model.inputs_from_hf(**raw))
    assert relative_error(cache["hook_image_features"], theirs) < 1e-9
    assert relative_error(cache["connector.hook_out"].flatten(0, 1), theirs) < 1e-9


@pytest.mark.parametrize("case", WITH_PICTURES, ids=str)
def test_every_tower_layer_equals_hugging_face(case: Case, model_of) -> None:
    raw, model, hf = raw_inputs(case), model_of(case), hf_model(case)
    with torch.no_grad():
        theirs = hf.model.vision_tower(raw["pixel_values"], output_hidden_states=True).hidden_states
        _, cache = model.run_with_cache(model.inputs_from_hf(**raw))
    wanted = hf.config.vision_feature_layer
    depth = max(i % len(theirs) for i in ([wanted] if isinstance(wanted, int) else wanted))
    assert model.cfg.vision.n_layers == depth
    for layer in range(depth):
        assert relative_error(cache[f"vision.blocks.{layer}.hook_resid_pre"], theirs[layer]) < 1e-9, layer
        assert relative_error(cache[f"vision.blocks.{layer}.hook_resid_post"], theirs[layer + 1]) < 1e-9, layer


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=str)
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
    from veena_lens import HookedVLM

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
    from veena_lens import HookedVLM

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


def test_table_holds_at_least_thirty_different_configurations() -> None:
    seen = {(case.decoder, hf_config(case).to_json_string()) for case in CASES}
    assert len(seen) >= 30
    assert len(BY_NAME) == len(CASES), "two cases share a name"


def test_dynamic_rotary_past_the_original_length_is_refused() -> None:
    """Its base grows once a sequence is longer than the original context: never compute with the old base."""
    from veena_lens import HookedVLM

    case = Case(
        name="rope-dynamic-long",
        tower=None,
        rows=("30",),
        text=dict(max_position_embeddings=16, rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=4.0)),
    )
    model = HookedVLM.from_hf(build_hf(case))
    with pytest.raises(ValueError, match="30.*16|16.*30"):
        model.forward_hf(**raw_inputs(case))


def test_feature_layer_zero_as_a_number_equals_a_list_of_it(model_of) -> None:
    """Hugging Face itself cannot run the number 0 (it takes it for "unset")."""
    from veena_lens import HookedVLM

    case = BY_NAME["feature-zero"]
    hf = build_hf(case)
    hf.config.vision_feature_layer = 0
    raw = raw_inputs(case)
    with torch.no_grad():
        number = HookedVLM.from_hf(hf).forward_hf(**raw)
        assert torch.equal(number, model_of(case).forward_hf(**raw))
