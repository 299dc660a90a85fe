"""Images in tiles (Idefics3, SmolVLM): grids, boxes, frames of a video, processors of every form."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from tokenizers import pre_tokenizers

from tests.cases import BY_NAME, TILED, relative_error
from tests.checkpoints import tiny, tiny_processors
from tests.checkpoints.tiny import picture
from tests.odd_inputs import IMAGE_TOKEN
from veena_lens import HookedVLM
from veena_lens.checkpoints.image_only import ImageOnlySmolVLMProcessor
from veena_lens.interventions import Ablate
from veena_lens.positions import Box, Tile, position_mask

A, B, C = picture(40, 30), picture(16, 90, 1), picture(31, 31, 2)
FEEL = "how does this person feel ?"


@pytest.fixture(scope="module", params=[(kind, names) for kind in TILED for names in (True, False)], ids=str)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """(the Hugging Face model, ours from its folder); names of tiles are one token, or several."""
    kind, has_names = request.param
    hf, folder = tiny.save(
        BY_NAME[f"{kind}-plain"], tmp_path_factory.mktemp(kind), torch.float64, settings=dict(has_names=has_names)
    )
    return hf, HookedVLM.from_pretrained(folder)


def test_grids_spans_and_boxes_lie_where_the_tiles_do(loaded: Any) -> None:
    _, model = loaded
    inputs = model.prepare(["what", FEEL], [[B, A], [C]], answer="this person is sad")
    # Resized to a longest edge of 48 and then to whole tiles of 16 pixels; 2 tokens a side.
    assert inputs.grids == (((6, 2), (6, 6)), ((6, 6),))
    assert [max(tiles) for row in inputs.token_tiles for tiles in row] == [3, 9, 9]
    for row, spans in enumerate(inputs.spans):
        for image, span in enumerate(spans.images):
            places = torch.arange(span.start, span.stop)[inputs.tokens[row, span] == IMAGE_TOKEN]
            tiles = torch.tensor(inputs.token_tiles[row][image])
            assert len(places) == len(tiles) and int(places[0]) == span.start and int(places[-1]) == span.stop - 1
            assert (tiles[-4:] == 0).all() and (tiles[:4] == 1).all() and int(tiles[4]) == 2
            cells = inputs.grid_tokens(row, image)
            boxes = dict(zip(places.tolist(), inputs.patch_boxes[row][image], strict=True))
            width, height = (B, A, C)[row + image + (row == 1)].size
            y, x = cells.shape[0] - 1, cells.shape[1] - 1
            assert boxes[int(cells[0, 0])].tolist()[:2] == [0, 0]
            torch.testing.assert_close(boxes[int(cells[y, x])][2:], torch.tensor([width, height]).float())
        assert model.processor.tokenizer.decode(inputs.tokens[row, spans.answer]) == "this person is sad"


def test_regions_and_tiles_choose_their_own_tokens(loaded: Any) -> None:
    _, model = loaded
    inputs = model.prepare(FEEL, A)
    whole, second = (position_mask(inputs, Tile(i)) for i in (0, 2))
    assert int(whole.sum()) == int(second.sum()) == 4 and not bool((whole & second).any())
    assert int(whole[0].nonzero()[0]) > int(second[0].nonzero()[-1]), "the whole view stands last"
    # The right upper ninth of the image: one tile, and the corner of the whole view.
    box = position_mask(inputs, Box(27, 0, 40, 9.9))
    assert torch.equal(box & ~whole, position_mask(inputs, Tile(3))) and int((box & whole).sum()) == 1
    with torch.no_grad():
        plain = model(inputs)
        with model.intervene([Ablate("hook_embed", positions=Tile(2))]):
            assert relative_error(model(inputs), plain) > 1e-6


@pytest.mark.parametrize("loaded", [("smolvlm", True), ("smolvlm", False)], ids=str, indirect=True)
def test_frames_of_a_video_are_pictures_of_their_own(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As SmolVLM's processor writes them: uncut, a time stamp before each."""
    hf, model = loaded
    processor = model.processor
    assert isinstance(processor, ImageOnlySmolVLMProcessor)
    monkeypatch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", str)
    frames = torch.rand(1, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    about = SimpleNamespace(fps=1.0, timestamps=[0.0, 1.0, 2.0], duration=3.0)
    text = processor.replace_video_token(dict(pixel_values=frames, video_metadata=[about]), 0)
    tokens = processor.tokenizer(f"{text} {FEEL}", return_tensors="pt")
    raw = dict(tokens, pixel_values=frames.double(), pixel_attention_mask=torch.ones(1, 3, 16, 16))
    raw.pop("token_type_ids", None)
    inputs = model.inputs_from_hf(**raw)
    assert inputs.n_images == [3] and inputs.grids == (((2, 2),) * 3,)
    with torch.no_grad():
        assert relative_error(model(inputs), hf(**raw).logits) < 1e-9


def test_uncut_pictures_are_one_tile_each(loaded: Any) -> None:
    _, model = loaded
    pictures, before = model.processor.image_processor, model.processor.image_processor.do_image_splitting
    try:
        pictures.do_image_splitting = False
        inputs = model.prepare(FEEL, [A, B])
    finally:
        pictures.do_image_splitting = before
    assert inputs.grids == (((2, 2), (2, 2)),) and inputs.token_tiles == (((0,) * 4, (0,) * 4),)
    assert inputs.patch_boxes[0][1][-1].tolist() == [8, 45, 16, 90]


@pytest.mark.parametrize("kind", TILED)
def test_processor_that_does_not_fit_is_refused(kind: str, tmp_path: Path) -> None:
    _, folder = tiny.save(BY_NAME[f"{kind}-plain"], tmp_path)
    model = HookedVLM.from_pretrained(folder)
    processor = model.processor
    processor.image_processor.max_image_size = {"longest_edge": 32}
    with pytest.raises(ValueError, match="max_image_size is 32, but the model's vision tower expects 16"):
        model.prepare(FEEL, A)
    processor.image_processor.max_image_size = {"longest_edge": 16}
    processor.image_seq_len = 9
    with pytest.raises(ValueError, match="image_seq_len is 9, but the model's vision tower expects 4"):
        model.prepare(FEEL, A)
    processor.image_seq_len = 4
    blind = tiny_processors.tile_tokenizer()
    blind.pre_tokenizer = pre_tokenizers.Whitespace()  # drops line breaks
    processor.tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=blind, pad_token="<|endoftext|>")
    with pytest.raises(ValueError, match="its tokens stand for 10 images, 1 were given.*line breaks"):
        model.prepare("<image> what", A, chat=False)
