"""What a processor would make of an image: counted before it is made, and refused past the limit."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.checkpoints.test_processing import FEEL
from tests.images.test_files import FAMILIES, processor_of
from veena_lens.checkpoints import prepare
from veena_lens.images.files import MAX_PIXELS
from veena_lens.images.resizing import processed_pixels, require_processable

SIDE = st.integers(1, 300)


@pytest.fixture(scope="module", params=FAMILIES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return processor_of(request.param, tmp_path_factory.mktemp("files"))


class Watched:
    """The largest array that an image processor resizes, pads or cuts to."""

    def __init__(self, image_processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.largest = 0
        for name in ("resize", "center_crop", "pad_to_square", "_pad_for_patching"):
            if hasattr(type(image_processor), name):
                monkeypatch.setattr(image_processor, name, self.watched(getattr(image_processor, name)))

    def watched(self, function: Any) -> Any:
        def wrapper(*args: Any, **given: Any) -> Any:
            out = function(*args, **given)
            self.largest = max(self.largest, int(np.prod(out.shape[-2:])))
            return out

        return wrapper


@given(size=st.tuples(SIDE, SIDE), several=st.booleans())
def test_count_is_that_of_the_largest_array(made: Any, size: tuple[int, int], several: bool) -> None:
    """Never less by more than the rounding of a side, and no more than twice what is held."""
    _, cfg, processor = made
    (width, height), image_processor = size, processor.image_processor
    if cfg.image_layout == "dynamic" and max(size) / min(size) > 199:
        return
    counted = processed_pixels(cfg, image_processor, (height, width), is_among_several=several)
    with pytest.MonkeyPatch.context() as patch:
        watched = Watched(image_processor, patch)
        images = [Image.new("RGB", size)] * (2 if several else 1)
        image_processor([images] if several and cfg.image_layout == "anyres" else images, return_tensors="np")
    largest = max(watched.largest, width * height)
    assert counted >= 0.9 * largest - 40 and counted <= 2 * largest + 1000


STRIP = (20_000, 1)


@pytest.mark.parametrize(
    ("name", "settings", "size", "several"),
    [
        ("image-28-patch-7", dict(size={"shortest_edge": 336}), STRIP, False),
        ("image-28-patch-7", dict(size={"shortest_edge": 10**9}), (30, 40), False),
        ("image-28-patch-7", dict(crop_size={"height": 10**9, "width": 10**9}), (30, 40), False),
        ("onevision-resampled", {}, STRIP, True),
        ("gemma3-many-tokens", dict(size={"height": 10**9, "width": 10**9}), (30, 40), False),
        ("qwen2_vl-plain", dict(size={"shortest_edge": 10**9, "longest_edge": 10**10}), (30, 40), False),
    ],
)
def test_small_image_that_would_become_vast_is_refused_before_it_does(
    name: str, settings: dict[str, Any], size: tuple[int, int], several: bool, tmp_path: Path
) -> None:
    _, cfg, processor = processor_of(name, tmp_path)
    for key, value in settings.items():
        setattr(processor.image_processor, key, type(processor.image_processor.size)(**value))
    image = Image.new("RGB", (size[1], size[0]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(
        ValueError, match=f"Row 0: an image of {size[1]} x {size[0]} pixels becomes .* limit is 100,000"
    ):
        prepare(processor, cfg, FEEL, [image, image] if several else image)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200_000 or sys.platform != "linux"  # kilobytes there
    with pytest.raises(ValueError, match=f"mine of {size[1]} x"):
        require_processable(cfg, processor.image_processor, size, is_among_several=several, what="mine")


def test_strip_that_stays_small_is_taken(made: Any) -> None:
    """As by Hugging Face, whose processors of images of any size refuse sides of more than 200 to 1 themselves."""
    _, cfg, processor = made
    if cfg.image_layout == "dynamic":
        with pytest.raises(ValueError, match="1 x 20000 pixels: absolute aspect ratio must be smaller than 200"):
            prepare(processor, cfg, FEEL, Image.new("RGB", (1, 20_000)))
        assert prepare(processor, cfg, FEEL, Image.new("RGB", (1, 199))).n_images == [1]
        return
    assert processed_pixels(cfg, processor.image_processor, (1, 20_000)) < MAX_PIXELS
    for size in ((1, 20_000), (20_000, 1), (1, 1)):
        assert prepare(processor, cfg, FEEL, Image.new("RGB", size)).n_images == [1]


@pytest.mark.parametrize("value", [-1, 0, 2.5, True, "28"])
def test_sizes_that_are_no_sizes_are_refused_by_name(made: Any, value: Any) -> None:
    _, cfg, processor = made
    image_processor = processor.image_processor
    kind = type(image_processor.size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_processor, "size", kind(shortest_edge=value))
        with pytest.raises(ValueError, match=rf"image processor has size\['shortest_edge'\]={value!r}; it must be"):
            prepare(processor, cfg, FEEL, Image.new("RGB", (30, 30)))


@pytest.mark.parametrize(
    ("name", "value"), [("image_grid_pinpoints", []), ("size", None), ("image_mean", [0.5]), ("image_std", [0, 0, 0])]
)
def test_settings_that_a_processor_cannot_run_with_end_in_a_sentence(name: str, value: Any, tmp_path: Path) -> None:
    _, cfg, processor = processor_of("onevision-resampled", tmp_path)
    setattr(processor.image_processor, name, value)
    with (
        np.errstate(all="ignore"),
        pytest.raises(
            ValueError, match=r"processor refuses a prompt with images of 30 x 30|pixel_values are not finite"
        ),
    ):
        prepare(processor, cfg, FEEL, Image.new("RGB", (30, 30), "red"))
