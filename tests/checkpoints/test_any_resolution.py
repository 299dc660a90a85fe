"""Images of any resolution (OneVision): boxes, frames of videos, what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.cases import BY_NAME, build_hf, native_model, raw_inputs, relative_error
from tests.checkpoints import tiny, tiny_processors
from tests.checkpoints.test_processing import FEEL
from tests.checkpoints.tiny import picture
from veena_lens import HookedVLM
from veena_lens.checkpoints.image_only import ImageOnlyLlavaOnevisionProcessor
from veena_lens.images.layout import pack_features

CASE = BY_NAME["onevision-resampled"]  # grids of more than two tiles are resampled
A, B, C = picture(75, 50, 1), picture(90, 110, 2), picture(20, 31, 3)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, HookedVLM]:
    """(Hugging Face's model, ours from the same folder)."""
    hf, folder = tiny.save(CASE, tmp_path_factory.mktemp("onevision"), torch.float64)
    return hf, HookedVLM.from_pretrained(folder)


def test_boxes_tile_the_picture_whether_it_is_cut_or_padded(loaded: Any) -> None:
    _, model = loaded
    inputs = model.prepare([FEEL, FEEL], [[B], [A, C]])
    layouts: Any = [image for row in inputs.layouts for image in row]
    assert layouts[0].kept == (16, 14) and inputs.grids == (((6, 5),), ((4, 4), (4, 4))), "the first is resampled"
    for row, image, (width, height) in [(0, 0, B.size), (1, 0, A.size), (1, 1, C.size)]:
        boxes, cells = inputs.patch_boxes[row][image], inputs.grids[row][image]
        assert len(boxes) == inputs.count_image_tokens(row, inputs.spans[row].images[image])
        grid = boxes[list(inputs.grid_places[row][image])].view(*cells, 4)
        assert grid[..., :2].min() == 0 and grid[..., 2].max() == width and grid[..., 3].max() == height
        assert torch.allclose(grid[:, :-1, 2], grid[:, 1:, 0]) and torch.allclose(grid[:-1, :, 3], grid[1:, :, 1])
        areas = (grid[..., 2] - grid[..., 0]) * (grid[..., 3] - grid[..., 1])
        assert float(areas.sum()) == pytest.approx(width * height, rel=1e-5)
    newlines = [int(b.isnan().any(-1).sum()) for row in inputs.patch_boxes for b in row]
    assert newlines == [6, 1, 1]


def test_a_mark_in_the_picture_lights_the_token_whose_box_holds_it(loaded: Any) -> None:
    """Brightness of patches, packed as features are, is brightest in the box of the mark."""
    _, model = loaded
    for x, y, beside in ((12, 20, []), (80, 95, []), (45, 60, []), (45, 60, [C])):
        plain = Image.new("RGB", (90, 110))
        marked = plain.copy()
        marked.paste("white", (x - 5, y - 5, x + 5, y + 5))
        inputs, before = (model.prepare(FEEL, [image, *beside]) for image in (marked, plain))
        light = (inputs.pixel_values - before.pixel_values).mean(1, keepdim=True)
        patches = torch.nn.functional.avg_pool2d(light, 7).flatten(1)[..., None]
        packed = pack_features(model.cfg, patches, inputs, torch.zeros(1))
        cells = list(inputs.grid_places[0][0])
        brightest = int(packed[cells].argmax())
        left, top, right, bottom = inputs.patch_boxes[0][0][cells][brightest]
        assert left - 1 <= x <= right + 1 and top - 1 <= y <= bottom + 1


def test_lists_of_frames_are_read_without_torchvision(tmp_path: Path) -> None:
    """The pixels of frames of the tower's own size equal those of Hugging Face's video processor."""
    processor: Any = ImageOnlyLlavaOnevisionProcessor.from_pretrained(tiny.write_processor(CASE, tmp_path))
    clips = [[picture(28, 28, seed) for seed in range(3)], [picture(28, 28, seed) for seed in range(3, 6)]]
    texts = ["what <video> who <video> is"]
    raw = processor(text=texts, images=None, videos=clips, return_tensors="pt")
    assert raw["pixel_values_videos"].shape == (2, 3, 3, 28, 28)
    if tiny_processors.CLASSES["onevision"] is not ImageOnlyLlavaOnevisionProcessor:
        whole = tiny_processors.CLASSES["onevision"].from_pretrained(tmp_path)(
            text=texts, videos=clips, return_tensors="pt"
        )
        assert torch.equal(whole["input_ids"], raw["input_ids"])
        torch.testing.assert_close(whole["pixel_values_videos"], raw["pixel_values_videos"], rtol=0, atol=1e-6)
    hf, model = build_hf(CASE), HookedVLM.from_hf(build_hf(CASE))
    inputs = model.inputs_from_hf(**raw)
    assert inputs.n_images == [6] and set(inputs.grids[0]) == {(2, 2)}
    assert [s.stop - s.start for s in inputs.spans[0].images] == [4, 4, 5, 4, 4, 5], "a newline ends a video"
    with torch.no_grad():
        assert relative_error(model(inputs), hf(**raw).logits) < 1e-9
    wide = processor(text=["<video>"], videos=[[picture(90, 40)]], return_tensors="pt")
    assert wide["pixel_values_videos"].shape == (1, 1, 3, 28, 28), "squeezed"
    with pytest.raises(ValueError, match=r"the same number of frames, not \[1, 2\]"):
        processor(text=["<video> <video>"], videos=[clips[0][:1], clips[0][:2]], return_tensors="pt")


def test_pictures_that_do_not_fit_are_refused() -> None:
    model = native_model(BY_NAME["onevision-image-and-video"])
    raw = raw_inputs(BY_NAME["onevision-image-and-video"])

    def refused(told: str, **change: Any) -> None:
        given = {k: v for k, v in (raw | change).items() if v is not None}
        with pytest.raises(ValueError, match=told):
            model.inputs_from_hf(**given)

    refused(r"batch_num_images \[2, 2\] must add up to the 3 images", batch_num_images=torch.tensor([2, 2]))
    refused("needs 7 tiles; pixel_values hold 3.*or batch_num_images was left out", batch_num_images=None)
    tiled = raw_inputs(BY_NAME["onevision-all-in-tiles"]) | {"pixel_values_videos": None}
    refused("and pass on its batch_num_images", **tiled | {"batch_num_images": torch.tensor([1, 2])})
    refused("pixel_values_videos must be .videos frames channel", pixel_values_videos=raw["pixel_values_videos"][0])
    refused(r"video tokens; the 0 videos given fill \[\]", pixel_values_videos=None)
    frames = raw["pixel_values_videos"]
    refused(r"the 2 videos given fill \[4, 4\]", pixel_values_videos=frames[:, [0, 1, 0]])
    refused("image_sizes", image_sizes=None)
    refused("unknown keys .'image_grid_thw'", image_grid_thw=torch.tensor([[1, 2, 2]]))
