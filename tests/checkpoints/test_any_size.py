"""Images of any size (Qwen): positions of answers, boxes, grids in raster order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.cases import BY_NAME, QWEN, build_hf, relative_error
from tests.checkpoints import tiny, tiny_processors
from tests.checkpoints.test_processing import FEEL, message
from tests.checkpoints.tiny import picture
from veena_lens import HookedVLM

A, B, C = picture(40, 30, 1), picture(28, 64, 2), picture(9, 90, 3)


@pytest.fixture(scope="module", params=QWEN)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, HookedVLM, Any]:
    """(Hugging Face's model, ours from the same folder, Hugging Face's processor)."""
    case = BY_NAME[f"{request.param}-plain"]
    hf, folder = tiny.save(case, tmp_path_factory.mktemp(request.param), torch.float64)
    return hf, HookedVLM.from_pretrained(folder), tiny_processors.CLASSES[case.family].from_pretrained(folder)


def prompt(processor: Any, text: str, n_images: int) -> str:
    return processor.apply_chat_template(message(text, n_images), add_generation_prompt=True)


def theirs(processor: Any, texts: list[str], images: list[list[Image.Image]]) -> Any:
    """The processor's own batch, padded on the left."""
    prompts = [prompt(processor, t, len(i)) for t, i in zip(texts, images, strict=True)]
    flat = [i for row in images for i in row]
    return processor(text=prompts, images=flat or None, padding=True, padding_side="left", return_tensors="pt")


def test_folder_gives_the_model_and_its_processor(loaded: Any) -> None:
    _, model, processor = loaded
    assert type(model.processor) is type(processor) and model.tokenizer is model.processor.tokenizer
    assert model.processor.image_processor.to_dict() == processor.image_processor.to_dict()
    assert model.processor.image_processor.size["longest_edge"] == 30 * 64, "the file's limits are read"


@pytest.mark.parametrize("kind", QWEN)
def test_videos_of_the_processor_are_read_as_hugging_face_reads_them(kind: str, tmp_path: Path) -> None:
    """Its frames between images, with the seconds (Qwen2.5-VL) or the texts (Qwen3-VL) that tell their times."""
    pytest.importorskip("torchvision")
    case = BY_NAME[f"{kind}-plain"]
    folder = tiny.write_processor(case, tmp_path)
    settings = dict(patch_size=4, merge_size=2, temporal_patch_size=2, size=dict(shortest_edge=128, longest_edge=5120))
    settings |= dict(do_sample_frames=False, video_processor_type=tiny_processors.video_class(kind))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(settings))
    processor, hf = tiny_processors.CLASSES[kind].from_pretrained(folder), build_hf(case)
    frames = np.random.default_rng(0).integers(0, 256, (6, 24, 32, 3), dtype=np.uint8)
    about = dict(fps=2.0, total_num_frames=6, frames_indices=list(range(6)), duration=3.0)
    wrapped = {m: f"<|vision_start|><|{m}_pad|><|vision_end|>" for m in ("image", "video")}
    text = f"{wrapped['image']} what {wrapped['video']} who {wrapped['image']} is"
    raw = processor(text=[text], images=[A, B], videos=[frames], video_metadata=[about], return_tensors="pt")
    model = HookedVLM.from_hf(hf)
    inputs = model.inputs_from_hf(**raw)
    assert inputs.n_images == [5] and inputs.grids[0][1:4] == ((3, 4),) * 3
    with torch.no_grad():
        assert relative_error(model(inputs), hf(**raw).logits) < 1e-9


def test_rows_of_a_batch_are_the_processors_rows(loaded: Any) -> None:
    _, model, processor = loaded
    texts, images = [FEEL, "who is sad", "what"], [[A], [B, C], []]
    batch = model.prepare(texts, images)
    for row, (text, mine) in enumerate(zip(texts, images, strict=True)):
        alone = processor(text=[prompt(processor, text, len(mine))], images=mine or None, return_tensors="pt")
        assert torch.equal(batch.tokens[row, batch.attention_mask[row]], alone["input_ids"][0])
        if mine:
            assert torch.equal(batch[row].crop_grids, alone["image_grid_thw"][:, 1:])
        else:
            assert batch[row].pixel_values is None


def test_answer_goes_on_as_hugging_face_reads_the_whole_text(loaded: Any) -> None:
    hf, model, processor = loaded
    whole = model.prepare([FEEL, "what"], [[A], [B, C]], answer=["this person is sad", "happy"])
    texts = [prompt(processor, t, n) + a for t, n, a in [(FEEL, 1, "this person is sad"), ("what", 2, "happy")]]
    expected = processor(text=texts, images=[A, B, C], padding=True, padding_side="left", return_tensors="pt")
    assert torch.equal(whole.tokens, expected["input_ids"])
    assert torch.equal(whole.position_ids, model.inputs_from_hf(**expected).position_ids)
    hf.model.rope_deltas = None
    with torch.no_grad():
        assert relative_error(model(whole), hf(**expected).logits, expected["attention_mask"]) < 1e-9


@pytest.mark.parametrize("size", [(40, 30), (28, 64), (9, 90), (90, 9), (64, 64), (17, 17), (2, 3), (300, 200)])
def test_boxes_tile_the_picture(size: tuple[int, int], loaded: Any) -> None:
    _, model, _ = loaded
    inputs = model.prepare(FEEL, picture(*size))
    assert inputs.patch_boxes is not None
    boxes, (rows, columns) = inputs.patch_boxes[0][0], inputs.grids[0][0]
    assert boxes.shape == (rows * columns, 4)
    grid = boxes.view(rows, columns, 4)
    width, height = size
    assert torch.equal(grid[:, :-1, 2], grid[:, 1:, 0]) and torch.equal(grid[:-1, :, 3], grid[1:, :, 1])
    assert (grid[:, 0, 0] == 0).all() and torch.allclose(grid[:, -1, 2], torch.tensor(float(width)))
    assert (grid[0, :, 1] == 0).all() and torch.allclose(grid[-1, :, 3], torch.tensor(float(height)))
    areas = (grid[..., 2] - grid[..., 0]) * (grid[..., 3] - grid[..., 1])
    assert torch.allclose(areas, areas[0, 0].expand_as(areas), rtol=1e-3)


@pytest.mark.parametrize("size", [(1, 1), (3, 1), (1, 3), (3, 3), (10, 3), (150, 1)])
def test_pictures_of_few_pixels_keep_their_colours(size: tuple[int, int], loaded: Any) -> None:
    """A side of 1 or 3 pixels must not be taken for the channels."""
    _, model, _ = loaded
    large, small = (model.prepare(FEEL, Image.new("RGB", s, (255, 0, 128))) for s in ((40, 40), size))
    assert large.pixel_values is not None and small.pixel_values is not None
    assert torch.equal(small.pixel_values, large.pixel_values[:1, :1].expand_as(small.pixel_values))
    with torch.no_grad():
        assert model(small).isfinite().all()


def test_boxes_name_the_pixels_that_a_token_shows(loaded: Any) -> None:
    """One bright cell of an image lights the patches of one token."""
    _, model, _ = loaded
    for cell in (0, 7, 11):
        dark = Image.new("RGB", (32, 24), "black")
        inputs = model.prepare(FEEL, dark)
        assert inputs.grids[0][0] == (3, 4) and inputs.patch_boxes is not None
        box = tuple(int(x) for x in inputs.patch_boxes[0][0][cell])
        dark.paste("white", box)
        lit = model.prepare(FEEL, dark).pixel_values[0] - inputs.pixel_values[0]
        tokens = lit.abs().sum(-1).view(-1, 4).sum(-1)
        assert int(tokens.argmax()) == cell and tokens[cell] > 20 * (tokens.sum() - tokens[cell])


def test_image_grids_are_in_raster_order(loaded: Any) -> None:
    """Tokens follow row by row; patches of the tower are unshuffled by hand: squares of 2 x 2."""
    _, model, _ = loaded
    inputs = model.prepare([FEEL, "what", "who"], [[A], [B, C], []])
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
    first = 0
    for row, images in enumerate([[A], [B, C]]):
        for image in range(len(images)):
            height, width = inputs.grids[row][image]
            span = inputs.spans[row].images[image]
            for name, layer in (("resid_post", 1), ("resid_pre", 0), ("hook_embed", None)):
                grid = cache.image_grid(name, layer, row=row, image=image)
                value = cache[name] if layer is None else cache[name, layer]
                assert torch.equal(grid.flatten(0, 1), value[row, span]) and grid.shape[:2] == (height, width)
            features = cache.image_grid("hook_image_features", row=row, image=image)
            assert torch.equal(features, cache.image_grid("hook_embed", row=row, image=image))
            joined = cache.image_grid("connector.hook_out", row=row, image=image)
            assert torch.equal(joined, features)
            tower = cache["vision.blocks.0.hook_resid_post"][first]
            grid = cache.image_grid("vision.blocks.0.hook_resid_post", row=row, image=image)
            assert grid.shape[:2] == (2 * height, 2 * width)
            for y in range(2 * height):
                for x in range(2 * width):
                    place = (y // 2 * width + x // 2) * 4 + y % 2 * 2 + x % 2
                    assert torch.equal(grid[y, x], tower[place])
            first += 1
    pattern = cache.image_grid("pattern", 1, row=1, image=1)
    span = inputs.spans[1].images[1]
    read = cache["pattern", 1][1, :, inputs.spans[1].last, span]
    assert torch.equal(pattern.flatten(1), read)
    with pytest.raises(IndexError, match="No image 2 in row 1"):
        cache.image_grid("resid_post", 1, row=1, image=2)


@pytest.mark.parametrize("name", ["merge-1", "merge-3", "temporal-1", "temporal-3"])
@pytest.mark.parametrize("kind", QWEN)
def test_processors_of_other_merge_and_frame_sizes_fit_their_models(kind: str, name: str, tmp_path: Path) -> None:
    case = BY_NAME[f"{kind}-{name}"]
    hf = build_hf(case)
    model = HookedVLM.from_hf(hf)
    model.processor = tiny_processors.processor(case, tmp_path)
    model.tokenizer = model.processor.tokenizer
    inputs = model.prepare([FEEL, "what"], [[A], [B, C]])
    merge = case.config().vision_config.spatial_merge_size
    assert [(h * merge, w * merge) for row in inputs.grids for h, w in row] == [
        tuple(g) for g in inputs.crop_grids.tolist()
    ]
    expected = theirs(model.processor, [FEEL, "what"], [[A], [B, C]])
    with torch.no_grad():
        assert relative_error(model(inputs), hf(**expected).logits, expected["attention_mask"]) < 1e-9
