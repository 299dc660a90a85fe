"""What `prepare` makes of prompts and images, in every family: the processor's own tensors, Hugging Face's logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from tests.cases import BY_NAME, QWEN, relative_error
from tests.checkpoints import tiny
from tests.checkpoints.test_processing import FEEL, message
from tests.checkpoints.tiny import picture
from tests.parity.runs import never_ends
from veena_lens import HookedVLM

# (case, settings of its processor); the names of Idefics3's tiles are one token each, or several.
SETUPS = {name: {} for name in ("image-28-patch-7", "llava-next-llama", "onevision-resampled", "gemma3-many-tokens")}
SETUPS |= {f"{family}-plain": {} for family in QWEN}
SETUPS |= {f"{family}-plain": dict(has_names=True) for family in ("idefics3", "smolvlm")}
SETUPS |= {f"{family}-tied": dict(has_names=False) for family in ("idefics3", "smolvlm")}
A, B, C = picture(40, 30, 1), picture(28, 64, 2), picture(90, 110, 3)


@pytest.fixture(scope="module", params=list(SETUPS))
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """(its case, Hugging Face's model, ours from the same folder)."""
    case, settings = BY_NAME[request.param], SETUPS[request.param]
    folder = tmp_path_factory.mktemp("folder")
    hf, _ = tiny.save(case, folder, torch.float64, gain=2.0, settings=settings)
    return case, never_ends(hf), HookedVLM.from_pretrained(folder)


def expected_of(case: Any, processor: Any, texts: list[str], images: list[list[Image.Image]]) -> Any:
    """The processor's own batch, padded on the left."""
    rows = [
        processor.apply_chat_template(message(text, len(mine)), add_generation_prompt=True)
        for text, mine in zip(texts, images, strict=True)
    ]
    options = dict(add_special_tokens=False) if case.family in ("gemma3", "idefics3", "smolvlm") else {}
    return batch_of(case, processor, rows, images, **options)


def batch_of(case: Any, processor: Any, rows: list[str], images: list[list[Image.Image]], **options: Any) -> Any:
    """What the processor itself makes of prompts that hold their placeholders."""
    processor.tokenizer.padding_side = "left"
    is_flat = case.family in ("llava", "llava-next", *QWEN)
    given: Any = [image for mine in images for image in mine] if is_flat else images
    return processor(text=rows, images=given if any(images) else None, padding=True, return_tensors="pt", **options)


@pytest.mark.parametrize(
    ("texts", "images"),
    [
        ([FEEL], [[A]]),
        ([FEEL], [[A, B, A]]),
        ([FEEL], [[]]),
        ([FEEL, "is the second happy"], [[A], [B, C]]),
        ([FEEL, "who is sad", "what"], [[A], [B, C], []]),
        ([FEEL, "is the second happy", "what"], [[], [C], [B]]),
        ([FEEL, "what"], [[], []]),
    ],
    ids=["one", "three", "none", "batch", "unequal", "each alone", "text alone"],
)
def test_tokens_pixels_logits_and_answers_equal_the_processor_and_hugging_face(
    texts: list[str], images: list[list[Image.Image]], loaded: Any
) -> None:
    case, hf, model = loaded
    expected = expected_of(case, model.processor, texts, images)
    inputs = model.prepare(texts if len(texts) > 1 else texts[0], images if len(texts) > 1 else images[0])
    again = model.inputs_from_hf(**expected)
    keep = expected["attention_mask"]
    assert torch.equal(inputs.tokens, expected["input_ids"]) and torch.equal(inputs.attention_mask, keep.bool())
    assert inputs.n_images == again.n_images == [len(mine) for mine in images]
    assert inputs.grids == again.grids and inputs.spans == again.spans
    assert inputs.grid_places == again.grid_places and inputs.token_tiles == again.token_tiles
    if any(images):
        assert torch.equal(inputs.pixel_values, again.pixel_values)
        if case.has("any size"):
            assert_patches_are_the_processors(inputs, expected)
            assert torch.equal(again.position_ids, inputs.position_ids)
        if case.has("tiles"):
            tiles = [1 + (h * w > 4) * (h * w // 4) for row in inputs.grids for h, w in row]
            assert len(inputs.pixel_values) == sum(tiles) and inputs.patch_mask is None
        if case.family == "llava":
            assert torch.equal(inputs.pixel_values, expected["pixel_values"])
    else:
        assert inputs.pixel_values is None
    if case.has("streams"):
        hf.model.rope_deltas = None
        assert torch.equal(inputs.image_mask, expected["mm_token_type_ids"].bool())
    positions = {} if case.has("streams") and any(images) else dict(position_ids=inputs.position_ids)
    with torch.no_grad():
        logits = hf(**expected, **positions).logits
        assert relative_error(model(inputs), logits, keep) < 1e-9
        assert relative_error(model.forward_hf(**expected, **positions), logits, keep) < 1e-9
        if not case.has("streams"):
            assert relative_error(model(again), hf(**expected).logits, keep) < 1e-9
        else:
            hf.model.rope_deltas = None
        said = hf.generate(**expected, max_new_tokens=12, do_sample=False)[:, inputs.shape[1] :]
    ours = model.generate(inputs, max_new_tokens=12, eos_token_id=[], return_type="tokens")
    assert torch.equal(ours, said)
    if len(texts) == 3:
        words = model.tokenizer.batch_decode(said, skip_special_tokens=True)
        assert model.generate(inputs, max_new_tokens=12, eos_token_id=[]) == words


def assert_patches_are_the_processors(inputs: Any, expected: Any) -> None:
    """Image by image, with nothing at the pads."""
    grids = expected["image_grid_thw"]
    assert torch.equal(inputs.crop_grids, grids[:, 1:])
    patches = expected["pixel_values"].split(grids.prod(-1).tolist())
    for mine, own in zip(inputs.pixel_values, patches, strict=True):
        assert torch.equal(mine[: len(own)], own) and not mine[len(own) :].any()


def parts(content: Any) -> list[Any]:
    """A content as a list of parts."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def test_conversation_equals_the_processor_and_takes_images_inside_or_beside(loaded: Any) -> None:
    case, _, model = loaded
    turns = [
        {"role": "system", "content": "this is a"},
        *message(FEEL, 1),
        {"role": "assistant", "content": "happy"},
        *message("is the second", 2),
    ]
    # OneVision's template leaves a turn empty whose content is plain text, so theirs is given parts.
    shown = [t | {"content": parts(t["content"])} for t in turns] if case.family == "onevision" else turns
    text = model.processor.apply_chat_template(shown, add_generation_prompt=True)
    assert "this is a" in text and "happy" in text
    options = dict(add_special_tokens=False) if case.family in ("gemma3", "idefics3", "smolvlm") else {}
    expected = batch_of(case, model.processor, [text], [[A, B, C]], **options)
    again = model.inputs_from_hf(**expected)
    first = {"role": "user", "content": [{"type": "image", "image": A}, *turns[1]["content"][1:]]}
    inside = [turns[0], first, *turns[2:]]
    for messages, images in ((turns, [A, B, C]), (inside, [B, C])):
        inputs = model.prepare(messages=messages, images=images)
        assert torch.equal(inputs.tokens, expected["input_ids"]) and inputs.grids == again.grids
        assert torch.equal(inputs.pixel_values, again.pixel_values)
    two = model.prepare(messages=[inside, message("what", 0)], images=[[B, C], None])
    assert two.n_images == [3, 0]
    assert torch.equal(two.tokens[:1, -expected["input_ids"].shape[1] :], expected["input_ids"])
    bare, listed = (model.prepare(messages=message("who", 1), images=given) for given in (A, [A]))
    assert torch.equal(bare.tokens, listed.tokens) and torch.equal(bare.pixel_values, listed.pixel_values)


def test_raw_prompt_holds_its_placeholders_itself(loaded: Any) -> None:
    """Also two that touch: each image keeps its own tokens and positions."""
    case, _, model = loaded
    mark = "<start_of_image>" if case.family == "gemma3" else "<|image_pad|>" if case.has("any size") else "<image>"
    raw = f"{mark} what is this ? {mark}{mark} is the second"
    inputs = model.prepare(raw, [A, B, C], chat=False)
    expected = batch_of(case, model.processor, [raw], [[A, B, C]])
    assert torch.equal(inputs.tokens, expected["input_ids"]) and inputs.n_images == [3]
    with torch.no_grad():
        assert model(inputs).isfinite().all()


def test_spans_and_answers_lie_where_the_tokens_do(loaded: Any) -> None:
    case, _, model = loaded
    inputs = model.prepare(["what", FEEL], [[B, A], [C]], answer="this person is sad")
    filled = inputs.tokens == case.config().image_token_id
    assert torch.equal(inputs.image_mask, filled) and inputs.n_images == [2, 1]
    for row, spans in enumerate(inputs.spans):
        real = inputs.attention_mask[row]
        inside = torch.zeros_like(real)
        for image, span in enumerate(spans.images):
            assert bool(filled[row, span.start]) and bool(filled[row, span.stop - 1])
            assert bool(filled[row, span].all()) or case.has("tiles")
            assert bool(filled[row, inputs.grid_tokens(row, image).flatten()].all())
            inside[span] = True
        assert not bool((filled[row] & ~inside).any())
        assert spans.query.start == spans.images[-1].stop and spans.query.stop == spans.last + 1
        assert spans.answer is not None and spans.answer.start == spans.query.stop
        assert model.tokenizer.decode(inputs.tokens[row, spans.answer]) == "this person is sad"
        if not case.has("streams"):
            assert inputs.position_ids[row, real].tolist() == list(range(int(real.sum())))
