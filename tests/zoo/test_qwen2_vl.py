"""The small Qwen2-VL: its training form equals Hugging Face's, and its folder looks like a real one."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, LlavaForConditionalGeneration, Qwen2VLForConditionalGeneration

from veena_lens.checkpoints.files import bundled_path
from veena_lens.checkpoints.image_only import ImageOnlyQwen2VLProcessor
from veena_lens.zoo.architecture import pack
from veena_lens.zoo.drawing import PICTURE_SIZE
from veena_lens.zoo.llava import LLAVA
from veena_lens.zoo.qwen2_vl import QWEN2_VL, batched_tower, reshape
from veena_lens.zoo.samples import Writer, grid_positions
from veena_lens.zoo.train import distance

SIBLING = bundled_path("tiny-llava-emotion")


@pytest.fixture(scope="module")
def processor() -> ImageOnlyQwen2VLProcessor:
    return QWEN2_VL.build_processor()


@pytest.fixture(scope="module")
def model(processor: ImageOnlyQwen2VLProcessor) -> Qwen2VLForConditionalGeneration:
    return QWEN2_VL.build_model(processor, 0).double().eval()


@pytest.mark.parametrize("size", [(96, 96), (192, 192), (128, 64), (80, 112)])
def test_batched_tower_equals_hugging_face(
    size: tuple[int, int], processor: ImageOnlyQwen2VLProcessor, model: Any
) -> None:
    rng = random.Random(0)
    pictures = [Image.frombytes("RGB", size, rng.randbytes(size[0] * size[1] * 3)) for _ in range(3)]
    inputs = processor.image_processor(images=pictures, return_tensors="pt")
    rows, columns = inputs["image_grid_thw"][0, 1:].tolist()
    with torch.no_grad():
        theirs = model.model.get_image_features(inputs["pixel_values"].double(), inputs["image_grid_thw"])
        patches = inputs["pixel_values"].double().reshape(3, rows // 2, columns // 2, 2, 2, 3, 2, 8, 8)[..., 0, :, :]
        pixels = patches.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(3, 3, rows * 8, columns * 8)
        ours = batched_tower(model.model.visual, pixels)
    torch.testing.assert_close(ours, torch.stack(list(theirs.pooler_output)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("side", [37, 50, 96, 99, 192, 640])
def test_squares_of_any_size_become_the_training_size(side: int, processor: ImageOnlyQwen2VLProcessor) -> None:
    inputs = processor.image_processor(images=[Image.new("RGB", (side, side))], return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, PICTURE_SIZE // 8, PICTURE_SIZE // 8]]


def test_other_shapes_get_other_grids(processor: ImageOnlyQwen2VLProcessor) -> None:
    for size, grid in {(200, 100): (8, 16), (100, 200): (16, 8), (300, 200): (10, 14)}.items():
        inputs = processor.image_processor(images=[Image.new("RGB", size)], return_tensors="pt")
        assert inputs["image_grid_thw"].tolist() == [[1, *grid]]
    shapes = {tuple(reshape(torch.zeros(1, 3, 96, 96), random.Random(seed)).shape[2:]) for seed in range(200)}
    assert shapes == {(96, 96), (80, 112), (112, 80), (64, 128), (128, 64)}


@pytest.mark.parametrize("grid", [(6, 6), (4, 8), (7, 5)])
def test_grid_positions_equal_hugging_face(grid: tuple[int, int], model: Any) -> None:
    image = model.config.image_token_id
    ids = torch.tensor([[0] * 3 + [image] * (grid[0] * grid[1]) + [0] * 2])
    thw = torch.tensor([[1, 2 * grid[0], 2 * grid[1]]])
    theirs, _ = model.model.get_rope_index(ids, (ids == image).int(), thw)
    assert torch.equal(grid_positions(3, *grid, 2), theirs[:, 0])


def test_training_form_equals_hugging_face(processor: ImageOnlyQwen2VLProcessor, model: Any) -> None:
    writer = Writer(processor.tokenizer, QWEN2_VL.chat)  # type: ignore[arg-type]
    row = writer.row((6, 6), [writer.branch([("how does the person feel?", "happy.")])])
    packed = pack([row], 0)
    packed = replace(packed, attention_mask=packed.attention_mask.double())
    pixels = torch.randn(1, 3, 96, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    patches = pixels.reshape(1, 3, 6, 2, 8, 6, 2, 8).permute(0, 2, 5, 3, 6, 1, 4, 7)[..., None, :, :]
    patches = patches.expand(*patches.shape[:6], 2, 8, 8).reshape(144, -1)
    ids = packed.input_ids
    with torch.no_grad():
        ours = QWEN2_VL.run(model, packed, pixels).hidden
        theirs = model.model(
            input_ids=ids,
            pixel_values=patches,
            image_grid_thw=torch.tensor([[1, 12, 12]]),
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
        ).last_hidden_state
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_decoder_starts_from_the_sibling(processor: ImageOnlyQwen2VLProcessor) -> None:
    from safetensors.torch import load_file

    fresh: Any = QWEN2_VL.build_model(processor, 0)
    assert QWEN2_VL.start_from is not None
    QWEN2_VL.start_from(fresh, processor.tokenizer, SIBLING)
    theirs = load_file(SIBLING / "model.safetensors")
    name = next(name for name in theirs if name.endswith("layers.3.self_attn.k_proj.weight"))
    attention = fresh.model.language_model.layers[3].self_attn
    torch.testing.assert_close(attention.k_proj.weight[24:48], (theirs[name][48:72] + theirs[name][72:96]) / 2)
    assert not attention.q_proj.bias.any()
    known = AutoTokenizer.from_pretrained(SIBLING).convert_tokens_to_ids("Ġhappy")
    mine = processor.tokenizer.convert_tokens_to_ids("Ġhappy")  # type: ignore[attr-defined]
    head = next(name for name in theirs if name.endswith("lm_head.weight"))
    assert torch.equal(fresh.lm_head.weight[mine], theirs[head][known])


def test_teacher_gives_what_the_sibling_reads_on_the_twins_grid() -> None:
    sibling: Any = LlavaForConditionalGeneration.from_pretrained(SIBLING).eval()
    pixels = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        whole = sibling.model.multi_modal_projector(LLAVA.tower_features(sibling, pixels))
    assert QWEN2_VL.open_teacher is not None
    found = QWEN2_VL.open_teacher(SIBLING)(pixels)
    assert found.shape == (2, 36, 192) and not found.requires_grad
    torch.testing.assert_close(found.mean(1), whole.mean(1), rtol=0.2, atol=0.2)
    assert distance(found, found) == 0 < distance(found, found.flip(1))
    torch.testing.assert_close(distance(found.mean((0, 1)).expand_as(found), found).item(), 1.0, rtol=0.05, atol=0.05)


def test_folder_has_the_files_and_names_of_a_real_one(processor: ImageOnlyQwen2VLProcessor, tmp_path: Path) -> None:
    QWEN2_VL.save_folder(QWEN2_VL.build_model(processor, 0), processor, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "merges.txt",
    }
    kept = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert kept["processor_class"] == "Qwen2VLProcessor" and kept["image_processor_type"] == "Qwen2VLImageProcessor"
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["processor_class"] == "Qwen2VLProcessor"
    again: Any = ImageOnlyQwen2VLProcessor.from_pretrained(tmp_path)
    assert again.chat_template == processor.chat_template and again.tokenizer.padding_side == "left"
    texts = ["How does the person feel?", "<|im_start|>user\n<|vision_start|> x<|im_end|>\n", "zebra 你好"]
    for tokenizer in (again.tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert tokenizer(texts).input_ids == processor.tokenizer(texts).input_ids  # type: ignore[operator]
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    assert all(again.tokenizer.get_vocab()[token] == row for token, row in vocabulary.items())
    assert Qwen2VLForConditionalGeneration.from_pretrained(tmp_path).generation_config.max_new_tokens == 48
