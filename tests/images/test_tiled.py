"""Which tiles belong together is read from the tokens alone, and tensors that do not fit are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.cases import BY_NAME, IMAGE_TOKEN, Case, native_model, raw_inputs
from tests.odd_inputs import FAKE, WHOLE, tile_tokens, tiled_image
from veena_lens.images.tiles import TilesLayout, tile_grids

SIZE = 4
CUT = st.tuples(st.integers(1, 4), st.integers(1, 4)).filter(lambda x: x != (1, 1)) | st.just((0, 0))


@given(
    pictures=st.lists(CUT, max_size=4),
    texts=st.lists(st.integers(0, 3), min_size=5, max_size=5),
    n_name=st.integers(1, 9),
)
def test_tiles_of_any_pictures_are_told_apart(pictures: list[tuple[int, int]], texts: list[int], n_name: int) -> None:
    """Pictures that touch and images among text, names of one token and of several."""
    case = Case(name="", family="idefics3", n_name=n_name)
    tokens: list[int] = []
    for cut, before in zip(pictures, texts, strict=False):
        tokens += [9] * before + tiled_image(case.config(), *cut, n_name=n_name)
    assert tile_tokens(case.config()) == SIZE
    assert tile_grids([*tokens, *[9] * texts[-1]], IMAGE_TOKEN, SIZE) == pictures


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        ([IMAGE_TOKEN] * 8, 2),
        ([5, *[IMAGE_TOKEN] * 4, 6, 7, *[IMAGE_TOKEN] * 4], 2),
        ([5, *[IMAGE_TOKEN] * 4, 5, 7, *[IMAGE_TOKEN] * 4, 5], 2),
        (
            [FAKE, 6, *[IMAGE_TOKEN] * 4, FAKE, 7, *[IMAGE_TOKEN] * 4, FAKE],
            2,
        ),  # one tile and a whole view with no line break
        ([FAKE, *[IMAGE_TOKEN] * 4, FAKE, 8, 8, *[IMAGE_TOKEN] * 4, FAKE], 2),
        ([1, 2, 3], 0),
    ],
)
def test_runs_that_no_processor_writes_are_pictures_of_their_own(tokens: list[int], found: int) -> None:
    assert tile_grids(tokens, IMAGE_TOKEN, SIZE) == [(0, 0)] * found


def test_tiles_that_make_no_rectangle_are_pictures_of_their_own() -> None:
    case = Case(name="", family="idefics3")
    tokens = tiled_image(case.config(), 2, 2)
    missing = tokens[:6] + tokens[12:]  # of the first row only one tile is left
    assert tile_grids(missing, IMAGE_TOKEN, SIZE) == [(0, 0)] * 4
    assert tile_grids([*missing, *tiled_image(case.config(), 1, 2)], IMAGE_TOKEN, SIZE) == [(0, 0)] * 4 + [(1, 2)]


NONE = lambda x: None  # noqa: E731


def spoiled(raw: dict[str, Any], **changes: Callable[[Any], Any]) -> dict[str, Any]:
    return {key: changes[key](value) if key in changes else value for key, value in raw.items()}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (dict(pixel_values=lambda x: x[:, :, 0]), "pixel_values must be floats \\[rows tiles 3 16 16\\], not"),
        (dict(pixel_values=lambda x: x[..., :8]), "3, 16, 8\\]; the checkpoint's own processor.*max_image_size"),
        (dict(pixel_values=lambda x: x.long()), "pixel_values must be floats"),
        (dict(pixel_values=lambda x: x[:, :2], pixel_attention_mask=NONE), "stand for 5 tiles, and 4 were given"),
        (dict(pixel_values=torch.ones_like, pixel_attention_mask=NONE), "stand for 5 tiles, and 9 were given"),
        (dict(pixel_values=lambda x: x * 0), "stand for 5 tiles, and 0 were given"),
        (dict(pixel_values=NONE), "holds 20 image tokens.*no image was given"),
        (dict(pixel_attention_mask=lambda x: x[:, :2]), "pixel_attention_mask .* does not fit pixel_values"),
        (dict(pixel_attention_mask=lambda x: x.flip(-1, -2)), "no image at the top left of tiles \\[4\\]"),
        (dict(pixel_attention_mask=lambda x: x * 0), "at the top left of tiles \\[0, 1, 2, 3, 4\\]"),
        (
            dict(input_ids=lambda x: torch.where(x == WHOLE, IMAGE_TOKEN, x)),
            "A run of 5 image tokens is not a whole number",
        ),
        (dict(input_ids=lambda x: torch.where(x == FAKE, IMAGE_TOKEN, x)), "each fills 4 in this model"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_tensors_that_do_not_fit_are_refused(changes: dict[str, Any], told: str) -> None:
    case = BY_NAME["idefics3-plain"]
    raw = raw_inputs(case)
    with pytest.raises(ValueError, match=told):
        native_model(case).inputs_from_hf(**spoiled(raw, **changes))


def test_padding_alone_is_no_picture() -> None:
    case = BY_NAME["smolvlm-no-picture-at-all"]
    inputs = native_model(case).inputs_from_hf(**raw_inputs(case), pixel_values=torch.zeros(2, 1, 3, 16, 16))
    assert inputs.n_images == [0, 0] and inputs.pixel_values is None


def test_inputs_of_another_layout_are_refused_by_the_model() -> None:
    tiles, fixed = native_model(BY_NAME["idefics3-plain"]), native_model(BY_NAME["siglip-llama"])
    ours = tiles.inputs_from_hf(**raw_inputs(BY_NAME["idefics3-plain"]))
    theirs = fixed.inputs_from_hf(**raw_inputs(BY_NAME["siglip-llama"]))
    for model, inputs in ((fixed, ours), (tiles, theirs), (native_model(BY_NAME["idefics3-scale-3"]), ours)):
        with pytest.raises(ValueError, match="prepared for another model"):
            model(inputs)


@pytest.mark.parametrize("name", ["idefics3-smaller-pictures", "smolvlm-unequal-pictures", "idefics3-no-markers"])
def test_tensors_of_inputs_are_the_processors_again(name: str) -> None:
    raw = raw_inputs(BY_NAME[name])
    inputs = native_model(BY_NAME[name]).inputs_from_hf(**raw)
    assert inputs.pixel_values is not None
    again = TilesLayout(native_model(BY_NAME[name]).cfg).as_hf(inputs, inputs.pixel_values)
    assert torch.equal(again["pixel_values"], raw["pixel_values"])
    patches = again.get("pixel_attention_mask")
    assert (patches is None) == (inputs.patch_mask is None) == ("smaller" not in name)
    back = native_model(BY_NAME[name]).inputs_from_hf(**{**raw, **again})
    assert patches is None or torch.equal(back.patch_mask, inputs.patch_mask)
