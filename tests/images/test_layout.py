"""The table of image layouts: a new kind is a class and a row, and the rest of the package asks the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.cases import BY_NAME, IMAGE_TOKEN, native_model
from tests.checkpoints import tiny
from veena_lens import HookedVLM, HookedVLMConfig, MultimodalInputs
from veena_lens.circuits import image_attribution
from veena_lens.images.base import ArrangedBatch, Size, cell_boxes
from veena_lens.images.layout import LAYOUTS, layout_of
from veena_lens.verify import probe

CFG = native_model(BY_NAME["clip-llama"]).cfg
SIDE = 2  # of the tower's grid


@dataclass(frozen=True)
class HalvedImage:
    """An image whose upper and lower half are a crop each; a newline ends every row of tokens."""

    n_crops: int = 2
    n_tokens: int = 2 * SIDE * (SIDE + 1)
    grid: Size = (2 * SIDE, SIDE)
    patch_grid: None = None

    def grid_places(self) -> list[int]:
        return [row * (SIDE + 1) + column for row in range(2 * SIDE) for column in range(SIDE)]

    def token_crops(self) -> list[int]:
        return [crop for row in range(2 * SIDE) for crop in [row // SIDE] * SIDE + [-1]]

    def crop_starts(self) -> list[int]:
        return [0, SIDE * (SIDE + 1)]

    def patch_cells(self) -> Tensor:
        return torch.arange(2 * SIDE * SIDE).view(2, -1)

    def boxes(self, size: Size, image_processor: Any) -> Tensor:
        out = torch.full((self.n_tokens, 4), float("nan"))
        out[self.grid_places()] = cell_boxes((size[1], size[0]), self.grid)
        return out


@dataclass(frozen=True, eq=False)
class HalvesLayout:
    """What the package asks of a layout, answered for halves."""

    cfg: HookedVLMConfig

    has_newline = True
    reads_token_types = False
    keys = ()
    image_keys = ()

    def ask(self, images: list[Any]) -> list[Any]:
        return images

    def require_processor(self, processor: Any) -> None:
        if processor.image_processor.n_halves != 2:
            raise ValueError("The processor makes quarters.")

    def arrange(self, tokens: Tensor, mask: Tensor, pixel_values: Any, extras: Mapping[str, Any]) -> ArrangedBatch:
        numbers = ((tokens == IMAGE_TOKEN) & mask).sum(-1) // HalvedImage().n_tokens
        return ArrangedBatch(
            pixels=pixel_values.flatten(0, 1), images=tuple((HalvedImage(),) * n for n in numbers.tolist())
        )

    def pack(self, features: Tensor, images: Sequence[HalvedImage], newline: Tensor | None) -> Tensor:
        assert newline is not None
        rows = features.unflatten(1, (SIDE, SIDE))
        return torch.cat([rows, newline.expand(*rows.shape[:2], 1, -1)], 2).flatten(0, 2)

    def expects(self) -> str:
        return "[crops 3 28 28], two per image"

    def fits(self, inputs: MultimodalInputs) -> bool:
        return all(isinstance(image, HalvedImage) for row in inputs.layouts for image in row)

    def as_hf(self, inputs: MultimodalInputs, pixels: Tensor) -> dict[str, Tensor]:
        return {"pixel_values": pixels.unflatten(0, (-1, 2))}

    def draw(self, counts: Sequence[int], generator: torch.Generator) -> tuple[dict[str, Tensor], list[int]]:
        n = sum(counts)
        return {"pixel_values": torch.randn(n, 2, 3, 28, 28, generator=generator)}, [HalvedImage().n_tokens] * n


class HalvesProcessor:
    """A processor as Hugging Face's are: it cuts images into halves and writes their tokens."""

    image_token = "<image>"

    def __init__(self) -> None:
        self.tokenizer, self.image_processor = tiny.tokenizer(), SimpleNamespace(n_halves=2)

    def __call__(self, text: list[str], images: Any, return_tensors: str, add_special_tokens: bool) -> dict[str, Any]:
        written = text[0].replace("<image>", "<image> " * HalvedImage().n_tokens)
        out = dict(self.tokenizer([written], return_tensors="pt", add_special_tokens=add_special_tokens))
        if images:
            squares = [torch.tensor(list(image.resize((28, 56)).tobytes())).view(2, 28, 28, 3) for image in images]
            out["pixel_values"] = torch.stack(squares).permute(0, 1, 4, 2, 3) / 255
        return out


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> HookedVLM:
    """A random model of halves; only the table knows of them."""
    monkeypatch.setitem(LAYOUTS, "halves", HalvesLayout)
    processor = HalvesProcessor()
    made = HookedVLM(replace(CFG, image_layout="halves"), tokenizer=processor.tokenizer, processor=processor).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.2)
    return made


def test_a_new_layout_is_a_row_of_the_table_from_images_to_logits_and_boxes(model: HookedVLM) -> None:
    texts = ["the <image> is happy", "who", "the <image> is <image> sad ?"]
    images = [[tiny.picture(40, 30)], [], [tiny.picture(20, 50, 1), tiny.picture(33, 60, 2)]]
    inputs = model.prepare(texts, images, chat=False)
    assert inputs.n_images == [1, 0, 2] and inputs.grids == (((4, 2),), (), ((4, 2), (4, 2)))
    assert inputs.crop_rows is not None and inputs.crop_rows.tolist() == [0, 0, 2, 2, 2, 2]
    assert inputs.crop_images is not None and inputs.crop_images.tolist() == [0, 0, 0, 0, 1, 1]
    assert inputs.image_rows is not None and inputs.image_rows.tolist() == [0, 2, 2]
    assert inputs.token_tiles[0][0] == (0, 0, -1, 0, 0, -1, 1, 1, -1, 1, 1, -1)
    assert inputs.patch_boxes is not None
    boxes = inputs.patch_boxes[2][1][list(inputs.grid_places[2][1])]
    assert boxes[0].tolist() == [0, 0, 16.5, 15] and boxes[-1].tolist() == [16.5, 45, 33, 60]
    with torch.no_grad():
        logits, cache = model.run_with_cache(inputs)
        alone = model(inputs[[2]].without_padding())
    assert logits.isfinite().all() and torch.allclose(alone[0], logits[2, inputs.attention_mask[2]], atol=1e-6)
    features = cache["hook_image_features"].view(3, 4, SIDE + 1, -1)
    assert torch.equal(features[:, :, :SIDE].reshape(6, SIDE**2, -1), cache["connector.hook_out"])
    assert torch.equal(features[:, :, SIDE], model.image_newline.expand(3, 4, -1))
    assert cache.image_grid("resid_post", 1, row=2, image=1).shape[:2] == (4, 2)


def test_a_new_layout_has_maps_at_the_tower_and_a_probe(model: HookedVLM) -> None:
    clean, corrupted = (
        model.prepare("the <image>", image, chat=False) for image in (tiny.picture(), tiny.picture(9, 9))
    )
    found = image_attribution(model, clean, corrupted, lambda logits: logits[:, 5], site="vision.hook_embed")
    assert found.values[0].shape == (4, 2) and bool((found.values[0] != 0).all())
    model.processor = None
    drawn = probe(model)
    assert drawn.n_images == [1, 2] and model(drawn).isfinite().all()


def test_inputs_and_processors_of_another_layout_are_refused(model: HookedVLM) -> None:
    other = HookedVLM(CFG).double()
    inputs = model.prepare("the <image>", Image.new("RGB", (8, 8)), chat=False)
    with pytest.raises(ValueError, match=r"prepared for another model: .* takes \[crops 3 28 28\]\. Prepare"):
        other(inputs)
    with pytest.raises(ValueError, match="two per image"):
        model(probe(other))
    model.processor.image_processor.n_halves = 4
    with pytest.raises(ValueError, match="makes quarters"):
        model.prepare("the <image>", Image.new("RGB", (8, 8)), chat=False)


def test_unknown_layouts_and_layouts_that_lack_something_are_refused() -> None:
    with pytest.raises(ValueError, match="image_layout='halves' is unknown; known: fixed, anyres, dynamic, tiles"):
        HookedVLM(replace(CFG, image_layout="halves"))
    with pytest.raises(ValueError, match="image_layout='anyres' needs image_pinpoints"):
        layout_of(replace(CFG, image_layout="anyres"))
