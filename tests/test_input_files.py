"""Inputs in files: those of earlier versions load, and a file holds where everything lies, without pixels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.cases import BY_NAME, counted, native_model, raw_inputs
from veena_lens import ActivationCache, MultimodalInputs
from veena_lens.input_files import describe_inputs, input_tensors, restore_inputs

DATA = Path(__file__).parent / "data"
CASES: dict[str, Any] = {
    "fixed": BY_NAME["three-images-and-none"],
    "anyres": BY_NAME["onevision-plain"],
    "tiles": BY_NAME["idefics3-plain"],
    "dynamic": BY_NAME["qwen2_vl-plain"],
}
Rename = Callable[[Path, Path], None]
FIELDS = ("grids", "grid_places", "token_tiles", "n_images")
TENSORS = ("tokens", "attention_mask", "position_ids", "crop_rows", "crop_images", "crop_grids", "image_rows")


def inputs_of(kind: str) -> MultimodalInputs:
    raw = raw_inputs(CASES[kind])
    inputs = native_model(CASES[kind]).inputs_from_hf(**(counted(raw) if kind == "fixed" else raw))
    return inputs.with_answer([[50], [51, 52], [53]]) if kind == "fixed" else inputs


def require_same(found: MultimodalInputs, wanted: MultimodalInputs) -> None:
    """Check that everything but pixels and boxes is equal."""
    assert found.pixel_values is None
    assert [getattr(found, name) for name in FIELDS] == [getattr(wanted, name) for name in FIELDS]
    assert [str(s) for s in found.spans] == [str(s) for s in wanted.spans]
    for name in TENSORS:
        mine, theirs = getattr(found, name), getattr(wanted, name)
        assert (mine is None) == (theirs is None), name
        assert mine is None or theirs is None or torch.equal(mine, theirs), name
    ids = ("image_token_id", "video_token_id", "pad_token_id")
    assert [getattr(found, name) for name in ids] == [getattr(wanted, name) for name in ids]


@pytest.mark.parametrize("kind", CASES)
def test_a_cache_that_an_earlier_version_saved_loads_with_its_inputs(kind: str) -> None:
    """Saved when inputs kept grids, places and owners of crops as fields."""
    cache, wanted = ActivationCache.load(DATA / f"cache_{kind}.safetensors"), inputs_of(kind)
    assert cache.inputs is not None
    require_same(cache.inputs, wanted)
    if kind == "dynamic":
        assert cache.inputs.patch_boxes is None
        assert torch.equal(cache.inputs[1].crop_grids, wanted[1].crop_grids)
    else:
        assert cache.inputs.patch_boxes is not None
        for row, spans in enumerate(wanted.spans):
            for image, span in enumerate(spans.images):
                n = wanted.count_image_tokens(row, span)
                assert torch.equal(cache.inputs.patch_boxes[row][image], torch.arange(4.0 * n).view(-1, 4))
    if kind in ("tiles", "dynamic"):
        part = cache.apply_slice_to_batch_dim(slice(1, 2))
        n, length = (2, 8) if kind == "dynamic" else (2, 4)
        assert part["connector.hook_out"].shape[:2] == (n, length), "the crops of the row alone, as long as they are"
        assert cache.image_grid("connector.hook_out", row=1, image=1).shape[:2] == wanted.grids[1][1]


@pytest.mark.parametrize("kind", CASES)
def test_inputs_come_back_from_a_file_and_go_into_another(kind: str) -> None:
    wanted = inputs_of(kind)
    first = restore_inputs(describe_inputs(wanted), input_tensors(wanted))
    assert first is not None
    require_same(first, wanted)
    second = restore_inputs(describe_inputs(first), input_tensors(first))
    assert second is not None
    require_same(second[[1, 0]], wanted[[1, 0]])
    assert restore_inputs(None, {}) is None


@pytest.mark.parametrize("kind", ["tiles", "dynamic"])
def test_a_file_that_names_crops_pictures_loads(kind: str, tmp_path: Path, rename: Rename) -> None:
    rename(DATA / f"cache_{kind}.safetensors", tmp_path / "older.safetensors")
    inputs = ActivationCache.load(tmp_path / "older.safetensors").inputs
    assert inputs is not None
    require_same(inputs, inputs_of(kind))


@pytest.fixture
def rename() -> Rename:
    """A function that writes a cache again under the names of files before crops were named."""
    from safetensors import safe_open

    def write(source: Path, target: Path) -> None:
        with safe_open(str(source), "pt") as file:
            tensors = {name.replace("inputs.crop_", "inputs.picture_"): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            save_file(tensors, str(target), metadata=file.metadata())

    return write


def test_inputs_of_a_file_know_no_more_than_the_file() -> None:
    from veena_lens.images.layout import arranged_image

    inputs = ActivationCache.load(DATA / "cache_anyres.safetensors").inputs
    assert inputs is not None
    with pytest.raises(ValueError, match="read from a file, without their images; prepare them again"):
        arranged_image(inputs, 0, 0)
