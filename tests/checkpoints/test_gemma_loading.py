"""Gemma-3 from files and back: every layout, sharded and single, the processor, and the certificate."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.cases import raw_inputs, relative_error
from tests.checkpoints import tiny_gemma
from tests.checkpoints.test_qwen_loading import assert_same_model
from tests.checkpoints.tiny import picture
from tests.gemma_cases import END, GEMMA_BY_NAME, IMAGE, START
from veena_lens import HookedVLM, cli
from veena_lens.checkpoints import open_checkpoint, save_pretrained
from veena_lens.checkpoints.files import weight_files
from veena_lens.hook_table import hooks_of
from veena_lens.positions import Box, position_mask
from veena_lens.verify import verify

NAMES = ["gemma3-plain", "gemma3-untied", "gemma3-many-tokens"]
A, B, C = picture(40, 30), picture(16, 90, 1), picture(31, 31, 2)
FEEL = "how does this person feel ?"


def _old(key: str) -> str:
    """A key as files of 2025 have it."""
    for pattern, new in (
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.language_model\.", "language_model.model."),
        (r"^language_model\.(?!model\.|lm_head\.)", "language_model.model."),
        (r"^(?:model\.)?vision_tower\.(?!vision_model)", "vision_tower.vision_model."),
        (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
    ):
        if (found := re.sub(pattern, new, key)) != key:
            return found
    return key


@pytest.mark.parametrize("form", ["single", "sharded", "of 2025"])
@pytest.mark.parametrize("name", NAMES)
def test_saved_folder_gives_the_weights_bit_for_bit(name: str, form: str, tmp_path: Path) -> None:
    options: dict[str, Any] = dict(max_shard_size="40KB") if form == "sharded" else {}
    theirs, folder = tiny_gemma.save(GEMMA_BY_NAME[name], tmp_path, with_processor=False, **options)
    assert (len(weight_files(folder)) > 2) == (form == "sharded")
    if form == "of 2025":
        state = {_old(key): value for key, value in load_file(folder / "model.safetensors").items()}
        assert "language_model.model.layers.0.pre_feedforward_layernorm.weight" in state
        assert "vision_tower.vision_model.post_layernorm.bias" in state
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert_same_model(folder, theirs)


def test_text_model_loads_and_goes_back(tmp_path: Path) -> None:
    theirs, folder = tiny_gemma.save(GEMMA_BY_NAME["gemma3-text-untied"], tmp_path / "first")
    model: Any = HookedVLM.from_pretrained(folder)
    assert_same_model(folder, theirs)
    out = save_pretrained(model, tmp_path / "second", open_checkpoint(folder).hf_config)
    assert_same_model(out, theirs)
    assert model.to_str_tokens(model.prepare("what"))[-3:] == ["<end_of_turn>", "<start_of_turn>", "model"]


def test_saved_folder_loads_in_hugging_face_with_the_edited_weights(tmp_path: Path) -> None:
    case = GEMMA_BY_NAME["gemma3-plain"]
    _, folder = tiny_gemma.save(case, tmp_path / "first")
    model: Any = HookedVLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        for weight in (model.blocks[1].ln2_post.weight, model.connector.weight, model.embed.weight):
            weight.mul_(1.5)
    out = save_pretrained(model, tmp_path / "second", open_checkpoint(folder).hf_config)
    loader: Any = transformers.AutoModelForImageTextToText
    theirs, told = loader.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and theirs.dtype == torch.float64
    again, raw = HookedVLM.from_pretrained(out), raw_inputs(case)
    with torch.no_grad():
        logits = model.forward_hf(**raw)
        assert relative_error(logits, theirs(**raw).logits, raw["attention_mask"]) < 1e-9
        assert torch.equal(again.forward_hf(**raw), logits)
    assert again.prepare("what", A).n_images == [1]


@pytest.mark.parametrize(
    ("name", "dtype", "with_processor", "every_hook"),
    [
        ("gemma3-plain", torch.float64, True, False),
        ("gemma3-untied", torch.bfloat16, True, False),
        ("gemma3-one-token", torch.float32, False, True),
        ("gemma3-text-plain", torch.float64, True, False),
    ],
)
def test_certificate_passes_on_a_true_checkpoint(
    name: str, dtype: torch.dtype, with_processor: bool, every_hook: bool, tmp_path: Path, monkeypatch: Any
) -> None:
    if not every_hook:
        monkeypatch.setattr("veena_lens.verify.dead_hooks", lambda *_: ())
    _, folder = tiny_gemma.save(GEMMA_BY_NAME[name], tmp_path, dtype, with_processor=with_processor)
    model = HookedVLM.from_pretrained(folder)
    certificate = verify(model, str(folder), progress=False)
    assert certificate.passed, str(certificate)
    assert certificate.n_hooks == len(hooks_of(model.cfg)) and len(certificate.checks) == 5
    assert not [n for n, h in model.hook_dict.items() if h._forward_hooks], "hooks are left"


@pytest.mark.parametrize("part", ["connector.norm.weight", "blocks.1.ln1_post.weight"])
def test_certificate_fails_on_weights_that_differ(part: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("veena_lens.verify.dead_hooks", lambda *_: ())
    _, folder = tiny_gemma.save(GEMMA_BY_NAME["gemma3-plain"], tmp_path, torch.float64)
    model = HookedVLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_parameter(part).flatten()[5] += 1e-2
    certificate = verify(model, str(folder), progress=False)
    assert not certificate.passed and not certificate.checks[0].passed


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """(the Hugging Face model, ours from its folder)."""
    case = GEMMA_BY_NAME["gemma3-many-tokens"]
    hf, folder = tiny_gemma.save(case, tmp_path_factory.mktemp("gemma"), torch.float64)
    hf.set_input_embeddings(hf.get_input_embeddings().to(torch.float64))
    hf.get_input_embeddings().embed_scale.fill_(48**0.5)  # as a model has it that is loaded in float64
    return hf, HookedVLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("texts", "images"),
    [
        ([FEEL], [[A]]),
        ([FEEL], [[B, C, A]]),
        ([FEEL, "who is sad", "what"], [[A], [B, C], []]),
        (["what", "who"], [[], []]),
    ],
    ids=["one", "three", "unequal", "text alone"],
)
def test_prepared_inputs_equal_the_processors_and_logits_hugging_faces(
    texts: list[str], images: list[list[Any]], loaded: Any
) -> None:
    hf, model = loaded
    rows = []
    for text, mine in zip(texts, images, strict=True):
        content = [*({"type": "image"} for _ in mine), {"type": "text", "text": text}]
        messages = [{"role": "user", "content": content}]
        rows.append(model.processor.apply_chat_template(messages, add_generation_prompt=True))
    model.processor.tokenizer.padding_side = "left"
    expected = model.processor(
        text=rows, images=images if any(images) else None, padding=True, return_tensors="pt", add_special_tokens=False
    )
    inputs = model.prepare(texts if len(texts) > 1 else texts[0], images if len(texts) > 1 else images[0])
    assert torch.equal(inputs.tokens, expected["input_ids"]) and inputs.n_images == [len(mine) for mine in images]
    again = model.inputs_from_hf(**expected)
    if inputs.pixel_values is not None:
        assert torch.equal(again.pixel_values, inputs.pixel_values)
    with torch.no_grad():
        given = dict(expected, position_ids=inputs.position_ids)
        assert relative_error(model(inputs), hf(**given).logits, expected["attention_mask"]) < 1e-9
        assert relative_error(model(again), hf(**expected).logits, expected["attention_mask"]) < 1e-9
    new = model.generate(inputs, max_new_tokens=6, eos_token_id=[], return_type="tokens")
    hf.generation_config.eos_token_id = None
    theirs = hf.generate(**expected, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert new.tolist() == theirs[:, inputs.shape[1] :].tolist()


def test_grids_spans_boxes_and_answers_lie_where_the_pictures_do(loaded: Any) -> None:
    _, model = loaded
    inputs = model.prepare([FEEL, "what"], [[B, A], [C]], answer="this person is sad")
    assert inputs.grids == (((3, 3), (3, 3)), ((3, 3),))
    for row, spans in enumerate(inputs.spans):
        for span in spans.images:
            assert inputs.tokens[row, span].tolist() == [IMAGE] * 9
            assert inputs.tokens[row, [span.start - 1, span.stop]].tolist() == [START, END]
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
    with pytest.raises(ValueError, match="chat template places it for each image"):
        model.prepare("<start_of_image> what", A)
    with pytest.raises(ValueError, match="1 image placeholders .* and 2 images"):
        model.prepare("<start_of_image> what", [A, B], chat=False)
    with pytest.raises(ValueError, match="1 image tokens .*but no image"):
        model.prepare("<image_soft_token> what", chat=False)
    other = tiny_gemma.processor(GEMMA_BY_NAME["gemma3-many-tokens"])
    other.tokenizer.image_token_id = 100
    with pytest.raises(ValueError, match="has id 100, but the model's is 127"):
        before, model.processor = model.processor, other
        try:
            model.prepare(FEEL, A)
        finally:
            model.processor = before


def test_inspect_and_models_describe_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = tiny_gemma.save(GEMMA_BY_NAME["gemma3-plain"], tmp_path, torch.bfloat16)
    assert cli.main(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    parts = ["Gemma3ForConditionalGeneration", "bidirectional_images=True", "blocks.{0..2}.ln1_post.hook_scale"]
    for part in (*parts, "connector.norm.hook_normalized", "vision.ln_post.hook_normalized", "averages_patches=True"):
        assert part in shown, part
    assert "connector.hook_pre" not in shown and "unembedding (tied)" in shown
    assert cli.main(["models"]) == 0
    shown = capsys.readouterr().out
    assert "google/gemma-3-4b-it" in shown and "google/gemma-3-1b-it" in shown
