"""One reader of images: what each form of an image shows, and that a processor meets it as Hugging Face's does."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.image_transforms import convert_to_rgb

from tests.cases import BY_NAME
from tests.checkpoints import tiny, tiny_processors
from tests.checkpoints.test_prepared import expected_of
from tests.checkpoints.test_processing import FEEL, message
from veena_lens.checkpoints import find_adapter, inputs_from_hf, prepare
from veena_lens.images.files import open_image, read_image, to_rgb

PLAIN = tiny.picture(40, 30, 1)


def see_through(seed: int = 5) -> Image.Image:
    """Noise in four channels, a quarter of it see-through: colours lie under it that nobody should see."""
    noise = np.random.default_rng(seed).integers(0, 256, (30, 40, 4), dtype=np.uint8)
    noise[:15, :20, 3] = 0
    return Image.fromarray(noise)


def with_transparent_colour(mode: str) -> Image.Image:
    """A palette, or an image with one colour that is transparent, as PNG and GIF have it."""
    image = PLAIN.quantize(16) if mode == "P" else PLAIN.convert(mode)
    first = image.getpixel((0, 0))
    file = io.BytesIO()
    image.save(file, "PNG", transparency=first)
    return Image.open(io.BytesIO(file.getvalue()))


MODES: dict[str, Image.Image] = {mode: PLAIN.convert(mode) for mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV")}
MODES |= {"RGBA": see_through(), "LA": see_through().convert("LA"), "PA": see_through().convert("PA")}
MODES |= {f"{mode} with a transparent colour": with_transparent_colour(mode) for mode in ("P", "L", "RGB")}
FAMILIES = ("image-28-patch-7", "llava-next-llama", "onevision-resampled", "gemma3-many-tokens", "smolvlm-plain")
FAMILIES += ("idefics3-plain", "qwen2_vl-plain", "qwen3_vl-plain")


def processor_of(name: str, folder: Path, **settings: Any) -> tuple[Any, Any, Any]:
    """(the case, the configuration, Hugging Face's processor) of a tiny checkpoint."""
    case = BY_NAME[name]
    cfg = find_adapter(case.model_class.__name__).read_config(case.config())
    if case.family == "llava":
        return case, cfg, tiny.llava_processor(case, **settings)
    if case.family == "llava-next":
        return case, cfg, tiny.next_processor(case)
    if case.family == "gemma3":
        return case, cfg, tiny_processors.gemma_processor(case, **settings)
    if case.family == "idefics3":
        from transformers import AutoProcessor

        return case, cfg, AutoProcessor.from_pretrained(tiny_processors.write_tiles(case, folder, **settings))
    return case, cfg, tiny_processors.processor(case, folder, **settings)


@pytest.mark.parametrize("name", FAMILIES)
def test_pixels_equal_the_processors_own_whatever_the_mode(name: str, tmp_path: Path) -> None:
    case, cfg, processor = processor_of(name, tmp_path)
    assert processor.image_processor.do_convert_rgb
    for mode, image in MODES.items():
        expected = expected_of(case, processor, [FEEL], [[image]])["pixel_values"]
        inputs = prepare(processor, cfg, FEEL, image)
        ours = inputs.pixel_values
        assert ours is not None
        again = ours.flatten(0, 1) if case.has("any size") else ours
        theirs = expected.flatten(0, expected.ndim - 4) if expected.ndim > 4 else expected
        if case.has("tiles"):  # the whole view stands last there
            theirs = torch.cat([theirs[-1:], theirs[:-1]])
        assert torch.equal(again, theirs), mode
        shown = prepare(processor, cfg, FEEL, open_image(image)).pixel_values
        assert shown is not None and torch.equal(shown, ours), mode


def test_processor_without_a_conversion_gets_rgb(tmp_path: Path) -> None:
    _, cfg, processor = processor_of("gemma3-many-tokens", tmp_path, do_convert_rgb=None)
    _, _, converting = processor_of("gemma3-many-tokens", tmp_path)
    ours, theirs = (prepare(p, cfg, FEEL, see_through()).pixel_values for p in (processor, converting))
    assert ours is not None and theirs is not None and torch.equal(ours, theirs)


def test_conversion_is_hugging_faces() -> None:
    for mode, image in MODES.items():
        theirs: Any = convert_to_rgb(image, return_numpy=True)
        assert np.array_equal(np.asarray(to_rgb(image)), theirs), mode
        assert open_image(image).mode == "RGB"
    assert open_image(see_through()).getpixel((3, 3)) == (255, 255, 255)


@pytest.mark.parametrize("name", FAMILIES)
def test_output_of_a_processor_without_tensors_is_read_too(name: str, tmp_path: Path) -> None:
    case, cfg, processor = processor_of(name, tmp_path)
    texts = [processor.apply_chat_template(message(text, 1), add_generation_prompt=True) for text in (FEEL, "what")]
    images = [PLAIN, PLAIN] if case.has("any size") or case.family in ("llava", "llava-next") else [[PLAIN], [PLAIN]]
    processor.tokenizer.padding_side = "left"
    lists, tensors = (processor(text=texts, images=images, padding=True, **o) for o in ({}, {"return_tensors": "pt"}))
    assert isinstance(lists["input_ids"], list)
    ours, theirs = (inputs_from_hf(cfg, processor.tokenizer, **given) for given in (lists, tensors))
    assert torch.equal(ours.tokens, theirs.tokens) and ours.grids == theirs.grids
    assert torch.equal(ours.pixel_values, theirs.pixel_values)  # type: ignore[arg-type]
    assert torch.equal(ours.position_ids, theirs.position_ids)
    split = dict(tensors, input_ids=list(tensors["input_ids"]), pixel_values=list(tensors["pixel_values"]))
    again = inputs_from_hf(cfg, processor.tokenizer, **split)
    assert torch.equal(again.pixel_values, theirs.pixel_values)  # type: ignore[arg-type]
    ragged = processor(text=texts, images=images)
    with pytest.raises(ValueError, match="input_ids cannot be made a tensor .*return_tensors='pt', and padding=True"):
        inputs_from_hf(cfg, processor.tokenizer, **ragged)


# --- grey levels of more than 8 bits ------------------------------------------------------------------------
@given(st.lists(st.integers(0, 65_535), min_size=4, max_size=4))
def test_grey_levels_of_16_bits_are_scaled(levels: list[int]) -> None:
    array = np.array([levels], dtype=np.uint16)
    expected = np.rint(array.astype(np.float64) / 257)
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    for source in (Image.fromarray(array), Image.fromarray(array.astype(">u2")), file.getvalue()):
        read = read_image(source)
        assert read.mode == "L" and np.abs(np.asarray(read) - expected).max() <= 0.5
    if max(levels) > 255:
        for source in (array, Image.fromarray(array.astype(np.int32))):
            assert np.array_equal(np.asarray(read_image(source)), np.asarray(read))


def test_grey_levels_in_wide_numbers_are_scaled_or_refused() -> None:
    levels = np.asarray(PLAIN.convert("L"))
    for mode in ("I", "F"):
        assert np.array_equal(np.asarray(read_image(PLAIN.convert("L").convert(mode))), levels)
    assert np.array_equal(np.asarray(read_image(Image.fromarray(levels.astype(np.float32) / 255))), levels)
    for worse in (levels.astype(np.int32) - 300, levels.astype(np.float32) * 300, levels.astype(np.float32) * np.nan):
        with pytest.raises(ValueError, match=r"\(mode [IF]\) holds numbers (from|that are not finite)"):
            read_image(Image.fromarray(worse))


def test_transparent_level_of_16_bits_stays_transparent() -> None:
    file = io.BytesIO()
    Image.fromarray(np.array([[300, 65_535, 0]], dtype=np.uint16)).save(file, "PNG", transparency=300)
    assert np.asarray(open_image(file.getvalue()))[0, :, 0].tolist() == [255, 255, 0]


# --- photographs that were taken on their side --------------------------------------------------------------
def photograph(orientation: int = 6) -> bytes:
    tag, file = Image.Exif(), io.BytesIO()
    tag[0x0112] = orientation
    PLAIN.save(file, "PNG", exif=tag)
    return file.getvalue()


def test_orientation_tag_is_applied_to_files_and_bytes_and_never_to_pixels_in_memory(tmp_path: Path) -> None:
    data, turned = photograph(), PLAIN.transpose(Image.Transpose.ROTATE_270)
    (tmp_path / "a.png").write_bytes(data)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    forms = (data, bytearray(data), uri, {"bytes": data, "path": None}, {"bytes": data, "path": "gone.png"})
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), {"path": str(tmp_path / "a.png")}, *forms):
        assert read_image(source).tobytes() == turned.tobytes()
    assert read_image(Image.open(io.BytesIO(data))).tobytes() == PLAIN.tobytes()  # as Hugging Face's processors


def test_damaged_orientation_tag_says_nothing() -> None:
    file = io.BytesIO()
    PLAIN.save(file, "PNG", exif=b"Exif\0\0" + b"II*\0\xff\xff\xff\x7f")
    assert read_image(file.getvalue()).tobytes() == PLAIN.tobytes()


# --- arrays -------------------------------------------------------------------------------------------------
BYTES = np.asarray(PLAIN)


@pytest.mark.parametrize(
    "array",
    [
        BYTES,
        BYTES.astype(np.int64),
        BYTES.astype(np.float32),
        BYTES.astype(np.float64) / 255,
        (BYTES.astype(np.float32) / 255).astype(np.float32),
        BYTES.astype(np.uint16) * 257,
        BYTES.transpose(2, 0, 1),
        BYTES[None],
        BYTES.transpose(2, 0, 1)[None] / 255,
    ],
    ids=["bytes", "int64", "float 255", "float64 1", "float32 1", "uint16", "channels first", "batch of 1", "all"],
)
def test_arrays_are_the_image_that_they_hold(array: np.ndarray) -> None:
    assert np.array_equal(np.asarray(read_image(array)), BYTES)


def test_grey_boolean_and_transparent_arrays_are_read() -> None:
    assert read_image(BYTES[..., 0]).tobytes() == read_image(BYTES[..., :1]).tobytes() == BYTES[..., 0].tobytes()
    assert np.asarray(read_image(BYTES[..., 0] > 99)).max() == 255
    clear = np.asarray(see_through())
    assert open_image(clear).tobytes() == to_rgb(see_through()).tobytes()


@pytest.mark.parametrize(
    ("array", "told"),
    [
        (BYTES / 127 - 1, "numbers from .*inputs_from_hf"),
        (BYTES.astype(np.float32) * np.nan, "not finite"),
        (BYTES / 150.0, "its range may be 0 .. 255 or 0 .. 1"),
        (np.full((4, 5), 3, np.uint16), "0 .. 65,535"),
        (BYTES.astype(np.int32) * 300, "numbers from 0 to"),
        (np.stack([BYTES] * 2), "give a list, one per image"),
        (np.zeros((3, 9, 3), np.uint8), "both its first and its last axis"),
        (np.zeros((9, 9, 7), np.uint8), "neither its first nor its last axis"),
        (np.zeros((0, 9, 3), np.uint8), "has no pixels"),
        (np.zeros(9, np.uint8), "has no pixels"),
        (np.array([["a"]]), "does not hold numbers"),
    ],
)
def test_arrays_that_leave_a_doubt_are_refused(array: np.ndarray, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        read_image(array)


# --- what is no image ---------------------------------------------------------------------------------------
def closed() -> Image.Image:
    image = Image.open(io.BytesIO(photograph()))
    image.close()
    return image


def verified() -> Image.Image:
    image = Image.open(io.BytesIO(photograph()))
    image.verify()
    return image


@pytest.mark.parametrize(
    ("source", "error", "told"),
    [
        (closed(), ValueError, "The image cannot be read: Operation on closed image"),
        (verified(), ValueError, "verify.. has used it up; open it again"),
        (Image.new("RGB", (0, 5)), ValueError, r"has no pixels \(0 x 5\)"),
        ("https://a.b/c.png", ValueError, "is an address; nothing is downloaded here"),
        ("file:///a/c.png", ValueError, "is an address"),
        ("data:image/png;base64,####", ValueError, "does not hold base64"),
        ("data:image/png;base64,aGVsbG8=", ValueError, "data URI .* cannot be read as an image: it is in no format"),
        ("data:text/plain;base64,aGVsbG8=", ValueError, "must begin with data:image"),
        ("data:image/png,abc", ValueError, "must begin with data:image"),
        (b"hello", ValueError, "The image of 5 bytes cannot be read as an image: it is in no format that Pillow knows"),
        (b"", ValueError, "The image of 0 bytes cannot be read"),
        ({"bytes": None, "path": None}, ValueError, "whose bytes and path are both None"),
        ({"image": 3}, TypeError, "must be a PIL image or a path, not dict"),
        (torch.zeros(3, 4, 4), TypeError, r"not Tensor \[3, 4, 4\]: give raw pixels as an array"),
        (3, TypeError, "must be a PIL image or a path, not int"),
        ("a" * 5000, FileNotFoundError, r"No image at a+\.\.\. \(5,000 characters\)"),
        ("~nobody-of-this-name/a.png", FileNotFoundError, "No image at ~nobody"),
        ("/", FileNotFoundError, "a folder is there"),
        ("nul\0.png", FileNotFoundError, "No image at"),
    ],
    ids=range(19),
)
def test_what_cannot_be_an_image_is_named(source: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        read_image(source)
