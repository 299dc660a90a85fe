"""What cannot be right raises at the border, before anything is computed, and says what to do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.cases import BY_NAME, IMAGE_TOKEN, PAD, Case, build_hf, raw_inputs


@pytest.fixture(scope="module")
def model() -> Any:
    """A LLaVA whose configuration names its pad token, context 32."""
    from veena_lens import HookedVLM

    case = Case(name="small-context", text=dict(pad_token_id=PAD, max_position_embeddings=32))
    return HookedVLM.from_hf(build_hf(case))


@pytest.fixture(scope="module")
def text_model() -> Any:
    from veena_lens import HookedVLM

    return HookedVLM.from_hf(build_hf(Case(name="small-text", family="text", text=dict(pad_token_id=PAD))))


@pytest.fixture
def raw() -> dict[str, Any]:
    return raw_inputs(BY_NAME["clip-llama"])


@pytest.fixture
def refuses(model: Any) -> Any:
    """`refuses(call, message)`: ValueError, and no hook point was reached."""

    def check(call: Any, message: str, on: Any = model) -> None:
        reached: list[str] = []
        with on.hooks([(lambda name: True, lambda value, hook: reached.append(hook.name))]):
            with pytest.raises(ValueError, match=message):
                call()
        assert reached == [], "something was computed first"

    return check


@pytest.mark.parametrize("side", ["left", "right"])
def test_pads_of_bare_tokens_are_masked_and_a_processors_refused(
    side: str, model: Any, text_model: Any, refuses: Any
) -> None:
    row = [PAD, 5, 6] if side == "left" else [5, 6, PAD]
    tokens = torch.tensor([[7, 8, 9], row])
    for one in (model, text_model):
        refuses(lambda one=one: one.forward_hf(input_ids=tokens), r"\[1\].*pad token 0.*attention_mask", one)
        masked = one(tokens, attention_mask=tokens != PAD)
        assert masked.shape == (2, 3, 128) and torch.equal(one(tokens), masked)
        assert torch.equal(one.run_with_cache(tokens)[0], masked)
        alone = one.generate(torch.tensor([[5, 6]]), return_type="tokens", max_new_tokens=4)
        assert torch.equal(one.generate(tokens, return_type="tokens", max_new_tokens=4)[1:], alone)
    assert text_model(torch.tensor([[7, PAD, 9]])).shape == (1, 3, 128), "a pad inside a row is a token"


def test_image_tokens_without_a_picture_are_refused(model: Any, raw: dict[str, Any], refuses: Any) -> None:
    del raw["pixel_values"]
    refuses(lambda: model.forward_hf(**raw), "12 image tokens.*no image")
    refuses(lambda: model(torch.tensor([[5, IMAGE_TOKEN, IMAGE_TOKEN, 6]])), "2 image tokens.*no image")
    refuses(lambda: model.generate(torch.tensor([[5, IMAGE_TOKEN]]), return_type="tokens"), "no image")


@pytest.mark.parametrize("n", [1, 2, 4])
def test_wrong_number_of_pictures_is_refused(n: int, model: Any, raw: dict[str, Any], refuses: Any) -> None:
    raw["pixel_values"] = raw["pixel_values"][:1].expand(n, -1, -1, -1)
    refuses(lambda: model.forward_hf(**raw), rf"\[4, 8\] image tokens.*4.*{n} images")


def test_image_tokens_that_are_no_whole_pictures_are_refused(model: Any, raw: dict[str, Any], refuses: Any) -> None:
    raw["input_ids"][0, -1] = IMAGE_TOKEN
    raw["input_ids"][1, 2] = 5  # the sum is right, the rows are not
    refuses(lambda: model.forward_hf(**raw), r"\[5, 7\] image tokens")


def test_pictures_without_image_tokens_are_refused(model: Any, raw: dict[str, Any], refuses: Any) -> None:
    raw["input_ids"][raw["input_ids"] == IMAGE_TOKEN] = 5
    refuses(lambda: model.forward_hf(**raw), "3 images")


@pytest.mark.parametrize(
    "shape", [(3, 3, 14, 14), (3, 1, 28, 28), (3, 28, 28), (3, 2, 3, 28, 28), (3, 3, 28, 42)], ids=str
)
def test_pixels_of_another_size_are_refused(shape: Any, model: Any, raw: dict[str, Any], refuses: Any) -> None:
    raw["pixel_values"] = torch.zeros(shape, dtype=torch.float64)
    refuses(lambda: model.forward_hf(**raw), "pixel_values must be floats.*3 28 28")


def test_whole_number_pixels_are_refused(model: Any, raw: dict[str, Any], refuses: Any) -> None:
    raw["pixel_values"] = torch.zeros(3, 3, 28, 28, dtype=torch.uint8)
    refuses(lambda: model.forward_hf(**raw), "uint8")


def test_pixels_of_another_dtype_are_taken(model: Any, raw: dict[str, Any]) -> None:
    raw["pixel_values"] = raw["pixel_values"].float()
    assert model.forward_hf(**raw).dtype == torch.float64


def test_pictures_for_a_text_model_are_refused(text_model: Any, raw: dict[str, Any], refuses: Any) -> None:
    raw["input_ids"][raw["input_ids"] == IMAGE_TOKEN] = 5
    refuses(lambda: text_model.forward_hf(**raw), "vision tower", text_model)


def test_context_longer_than_the_models_is_refused(model: Any, refuses: Any) -> None:
    tokens = torch.full((1, 33), 5)
    assert model(tokens[:, :32]).shape[1] == 32
    refuses(lambda: model(tokens), "33.*32")
    refuses(lambda: model.run_with_cache(tokens), "33.*32")
    refuses(lambda: model.generate(tokens, return_type="tokens"), "33.*32")
    padded = torch.cat([torch.zeros(1, 10, dtype=torch.long), tokens[:, :30]], 1)
    assert model(padded, attention_mask=padded != PAD).shape == (1, 40, 128), "pads do not count"


def test_generation_ends_with_the_context(model: Any, refuses: Any) -> None:
    tokens = torch.full((1, 30), 5)
    out = model.generate(tokens, max_new_tokens=10, return_type="tokens", eos_token_id=[])
    assert 1 <= out.shape[1] <= 3
    refuses(lambda: model.generate(torch.full((1, 32), 5), return_type="tokens"), "32.*32")
    refuses(lambda: model.generate(tokens, max_new_tokens=0, return_type="tokens"), "max_new_tokens=0")


@pytest.mark.parametrize("token", [128, 100_000, -1])
def test_token_outside_the_vocabulary_is_refused(token: int, model: Any, refuses: Any) -> None:
    refuses(lambda: model(torch.tensor([[5, token, 6]])), f"{token} is outside the vocabulary of 128")


@pytest.mark.parametrize("tokens", [
    torch.zeros(1, 3), torch.zeros(0, 3, dtype=torch.long), torch.zeros(1, 0, dtype=torch.long),
    torch.zeros(1, 2, 3, dtype=torch.long),
], ids=["floats", "no-row", "no-token", "three-axes"])  # fmt: skip
def test_what_is_no_batch_of_tokens_is_refused(tokens: Any, model: Any, refuses: Any) -> None:
    refuses(lambda: model(tokens), r"integers \[batch pos\]|at least one token")


def test_one_row_of_tokens_is_a_batch_of_one(model: Any) -> None:
    assert torch.equal(model(torch.tensor([5, 6, 7])), model(torch.tensor([[5, 6, 7]])))


def test_mask_that_does_not_fit_is_refused(model: Any, refuses: Any) -> None:
    tokens = torch.tensor([[5, 6, 7], [8, 9, 10]])
    refuses(lambda: model(tokens, attention_mask=torch.ones(2, 4)), r"\[2, 4\].*\[2, 3\]")
    refuses(lambda: model(tokens, attention_mask=torch.tensor([[1, 1, 1], [0, 0, 0]])), r"\[1\].*no real token")


def test_mask_beside_prepared_inputs_is_refused(model: Any, raw: dict[str, Any], refuses: Any) -> None:
    inputs = model.inputs_from_hf(**raw)
    refuses(lambda: model(inputs, attention_mask=raw["attention_mask"]), "carry their own mask")


def test_unknown_and_missing_keys_are_refused(model: Any, raw: dict[str, Any], refuses: Any) -> None:
    refuses(lambda: model.forward_hf(**raw, pixel_value=1), "pixel_value.*pixel_values")
    refuses(lambda: model.forward_hf(**raw, image_sizes=torch.tensor([[3, 4]])), "image_sizes")
    refuses(lambda: model.forward_hf(pixel_values=raw["pixel_values"]), "input_ids is missing")
    refuses(lambda: model.forward_hf(**raw, position_ids=torch.zeros(2, 3, dtype=torch.long)), r"position_ids \[2, 3\]")


def test_unknown_return_types_are_refused(model: Any, raw: dict[str, Any], refuses: Any) -> None:
    inputs = model.inputs_from_hf(**raw)
    refuses(lambda: model(inputs, return_type="probabilities"), "'logits', 'loss', 'both'")
    refuses(lambda: model.generate(inputs, return_type="text"), "'str' or 'tokens'")
    refuses(lambda: model.generate(inputs), "tokenizer")


def test_tokens_of_another_kind_are_refused_by_name(model: Any, refuses: Any) -> None:
    for wrong in (None, 3.5, {"input_ids": torch.tensor([[5]])}, object()):
        with pytest.raises((ValueError, TypeError)):
            model(wrong)


def test_residual_of_another_width_is_refused(model: Any, refuses: Any) -> None:
    refuses(lambda: model(torch.zeros(1, 3, 47, dtype=torch.float64), start_at_layer=1), r"\[batch pos 48\].*47")
    refuses(lambda: model(torch.tensor([[5, 6]]), start_at_layer=1), r"\[batch pos 48\]")


def test_inputs_edited_by_hand_are_checked_again(model: Any, raw: dict[str, Any], refuses: Any) -> None:
    inputs = model.inputs_from_hf(**raw)
    refuses(lambda: model(replace(inputs, pixel_values=None)), "no image")
    more = inputs.tokens.clone()
    more[0, -1] = IMAGE_TOKEN
    with pytest.raises(ValueError, match="13 image tokens"):
        model(replace(inputs, tokens=more))
    fewer = replace(inputs, pixel_values=inputs.pixel_values[:2])
    with pytest.raises(ValueError, match="8 features"):
        model(fewer)


def test_model_is_in_evaluation_mode(model: Any) -> None:
    assert not any(m.training for m in model.modules())


def test_attention_to_a_missing_vocabulary_row_never_reads_it(raw: dict[str, Any]) -> None:
    """An image token outside the vocabulary: very old checkpoints have it."""
    from veena_lens import HookedVLM

    hf = build_hf(BY_NAME["clip-llama"])
    hf.config.image_token_index = hf.config.image_token_id = 500
    model = HookedVLM.from_hf(hf)
    other = dict(raw, input_ids=torch.where(raw["input_ids"] == IMAGE_TOKEN, 500, raw["input_ids"]))
    plain = HookedVLM.from_hf(build_hf(BY_NAME["clip-llama"]))
    assert torch.equal(model.forward_hf(**other), plain.forward_hf(**raw))
