"""What only LLaVA-1.6 has: grids among whole views and newlines, and boxes of images of odd sizes."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import BY_NAME, IMAGE_TOKEN, PAD, build_hf
from tests.checkpoints.tiny import next_processor, word_tokenizer
from tests.families import FAMILIES
from veena_lens import HookedVLM
from veena_lens.images.anyres import image_in_tiles

PINS = FAMILIES["llava-next"].root["image_grid_pinpoints"]
SIZES = [(28, 28), (40, 75), (90, 30), (1, 200), (200, 1), (56, 56), (84, 28), (300, 299), (13, 57), (29, 83)]


def build(decoder: str, **options: Any) -> tuple[Any, HookedVLM]:
    """A tiny model in Hugging Face and here."""
    case = BY_NAME[f"llava-next-{decoder}"]
    hf = build_hf(replace(case, root=options))
    return hf, HookedVLM.from_hf(hf)


def batch(model: HookedVLM, sizes: list[list[tuple[int, int]]], seed: int = 0) -> dict[str, Tensor]:
    """A left-padded batch whose rows hold images of the given (height, width)."""
    rng = random.Random(seed)
    rows, layouts = [], []
    for pictures in sizes:
        row = [rng.randint(2, 100) for _ in range(rng.randint(1, 5))]
        for size in pictures:
            layouts.append(image_in_tiles(model.cfg, size))
            row += [IMAGE_TOKEN] * layouts[-1].n_tokens + [rng.randint(2, 100) for _ in range(rng.randint(1, 6))]
        rows.append(row)
    length = max(map(len, rows))
    ids = torch.tensor([[PAD] * (length - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (length - len(r)) + [1] * len(r) for r in rows])
    out = {"input_ids": ids, "attention_mask": mask}
    if layouts:
        most = max(layout.n_crops for layout in layouts)
        pixels = torch.zeros(len(layouts), most, 3, 28, 28, dtype=torch.float64)
        for i, layout in enumerate(layouts):
            pixels[i, : layout.n_crops] = torch.randn(layout.n_crops, 3, 28, 28, dtype=torch.float64)
        out |= {"pixel_values": pixels, "image_sizes": torch.tensor([layout.size for layout in layouts])}
    return out


def test_an_image_grid_leaves_out_the_whole_view_and_the_newlines() -> None:
    _, model = build("llama")
    raw = batch(model, [[(40, 75)], [(90, 30), (300, 299)]])
    inputs = model.inputs_from_hf(**raw)
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
    for row, image, size in [(0, 0, (40, 75)), (1, 0, (90, 30)), (1, 1, (300, 299))]:
        layout = image_in_tiles(model.cfg, size)
        grid = cache.image_grid("resid_post", 1, row=row, image=image)
        span = inputs.spans[row].images[image]
        assert grid.shape[:2] == (layout.rows, layout.cols) == inputs.grids[row][image]
        assert span.stop - span.start == layout.n_tokens
        mine = cache["resid_post", 1][row, span][layout.base**2 :].view(layout.rows, layout.cols + 1, -1)
        assert torch.equal(grid, mine[:, :-1])
        features = cache.image_grid("hook_image_features", row=row, image=image)
        assert torch.equal(features, cache.image_grid("hook_embed", row=row, image=image))


@pytest.mark.parametrize("size", [*SIZES, (600, 800)], ids=str)
def test_boxes_of_the_grid_tile_the_image(size: tuple[int, int]) -> None:
    _, model = build("llama")
    layout = image_in_tiles(model.cfg, size)
    boxes = layout.boxes()
    height, width = size
    assert boxes.shape == (layout.n_tokens, 4) and int(boxes[:, 0].isnan().sum()) == layout.rows
    grid = boxes[layout.grid_places()].view(layout.rows, layout.cols, 4)
    assert bool((grid >= 0).all()) and bool((grid[..., 2] <= width).all()) and bool((grid[..., 3] <= height).all())
    # Neighbours touch, and a whole view spans the image.
    assert torch.allclose(grid[:, :-1, 2], grid[:, 1:, 0]) and torch.allclose(grid[:-1, :, 3], grid[1:, :, 1])
    whole = boxes[: layout.base**2]
    assert whole[:, :2].min() == 0 and torch.allclose(whole[:, 2:].max(0).values, torch.tensor([width, height]).float())


def test_images_that_do_not_fit_are_refused() -> None:
    _, model = build("llama")
    raw = batch(model, [[(40, 75)]])
    with pytest.raises(ValueError, match="image_sizes"):
        model.inputs_from_hf(**{k: v for k, v in raw.items() if k != "image_sizes"})
    with pytest.raises(ValueError, match="tiles"):
        model.inputs_from_hf(**{**raw, "pixel_values": raw["pixel_values"][:, :2]})
    with pytest.raises(ValueError, match="images"):
        model.inputs_from_hf(**{**raw, "image_sizes": torch.tensor([[28, 28]])})


def test_the_processor_and_the_packing_count_the_same_tokens(tiny_next_processor: Any) -> None:
    from PIL import Image

    _, model = build("llama")
    model.processor, model.tokenizer = tiny_next_processor, tiny_next_processor.tokenizer
    for height, width in [(40, 75), (90, 30), (28, 28), (13, 200)]:
        inputs = model.prepare(text="<image> w5", images=Image.new("RGB", (width, height), "red"), chat=False)
        layout = image_in_tiles(model.cfg, (height, width))
        assert inputs.count_image_tokens(0, inputs.spans[0].images[0]) == layout.n_tokens
        assert torch.equal(inputs.patch_boxes[0][0].nan_to_num(-1), layout.boxes().nan_to_num(-1))
    both = model.prepare(
        text=["<image> w5", "<image><image> w6"],
        images=[[Image.new("RGB", (75, 40))], [Image.new("RGB", (30, 90)), Image.new("RGB", (28, 28))]],
        chat=False,
    )
    with torch.no_grad():
        assert model(both).shape[:2] == both.shape


@pytest.fixture(scope="module")
def tiny_next_processor() -> Any:
    return next_processor(BY_NAME["llava-next-llama"], word_tokenizer())
