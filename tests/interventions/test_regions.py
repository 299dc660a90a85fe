"""Boxes of pixels and tiles as positions, attention knockout, and edits of image features by region."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image

from tests.parity.test_llava_next import batch, build
from veena_lens import HookedVLM
from veena_lens.checkpoints.files import bundled_pictures
from veena_lens.interventions import Ablate, Box, Circuit, KnockOutAttention, Steer, Tile
from veena_lens.positions import position_mask


@pytest.fixture(scope="module")
def model() -> HookedVLM:
    return HookedVLM.from_pretrained("tiny-llava-emotion", dtype=torch.float64, casts="none")


@pytest.fixture(scope="module")
def inputs(model: HookedVLM):
    faces = [picture.open() for picture in bundled_pictures("test")[:2]]
    return model.prepare(text=["who is it?", "what is the hair colour of the person?"], images=[[faces[0]], [faces[1]]])


def test_a_box_chooses_the_patches_that_it_overlaps(inputs) -> None:
    # 192 x 192 pixels in 8 x 8 patches of 24: columns 1 and 2 of rows 0 and 1.
    chosen = position_mask(inputs, Box(30, 0, 72, 48))
    for row in range(2):
        expected = inputs.grid_tokens(row)[:2, 1:3].flatten().tolist()
        assert chosen[row].nonzero().flatten().tolist() == expected
    assert int(position_mask(inputs, Box(0, 0, 192, 192)).sum()) == 128
    assert not position_mask(inputs, Box(0, 0, 5, 5, image=1)).any()


def test_a_box_without_area_and_unknown_places_are_refused(model, inputs) -> None:
    with pytest.raises(ValueError, match="no area"):
        Box(5, 0, 5, 9)
    from dataclasses import replace

    with pytest.raises(ValueError, match="original image are unknown"):
        position_mask(replace(inputs, patch_boxes=None), Box(0, 0, 5, 5))
    in_the_tower = Ablate("vision.blocks.0.hook_resid_pre", positions=Box(0, 0, 9, 9))
    with pytest.raises(ValueError, match="hook_image_features"), model.intervene([in_the_tower]):
        model(inputs)


def test_tiles_part_the_tokens_of_a_tiled_picture() -> None:
    _, tiled = build("llama")
    inputs = tiled.inputs_from_hf(**batch(tiled, [[(40, 75)], [(90, 30), (28, 28)]]))
    whole = position_mask(inputs, Tile(0))
    assert whole.sum(-1).tolist() == [4, 4]  # a view of 2 x 2 tokens
    parts = torch.stack([position_mask(inputs, Tile(tile, image=0)) for tile in range(5)])
    assert int(parts.sum(0).max()) == 1, "a token lies in two tiles"
    for row, image in ((0, 0), (1, 0)):
        cells = inputs.grid_tokens(row, image).flatten()
        assert bool(parts[1:, row].any(0)[cells].all()), "a cell of the grid lies in no tile"
    second = position_mask(inputs, Tile(0, image=1))
    assert not second[0].any() and int(second[1].sum()) == 4 and not (second & whole).any()


def test_zeroing_a_region_of_the_image_features_equals_zeroing_those_tokens(model, inputs) -> None:
    box = Box(30, 0, 72, 48)
    with torch.no_grad(), model.intervene([Ablate("hook_image_features", positions=box)]):
        by_box = model(inputs)
    chosen = position_mask(inputs, box)

    def zero(embed, hook):
        return torch.where(chosen[..., None], torch.zeros_like(embed), embed)

    with torch.no_grad():
        by_hand = model.run_with_hooks(inputs, fwd_hooks=[("hook_embed", zero)])
        plain = model(inputs)
    torch.testing.assert_close(by_box, by_hand, rtol=0, atol=1e-12)
    assert (by_box - plain).abs().max() > 1e-3


def test_knockout_cuts_keys_off_and_keeps_the_row_a_distribution(model, inputs) -> None:
    with torch.no_grad(), model.intervene([KnockOutAttention(2, keys="image", queries="last", heads=[0, 3])]):
        fused = model(inputs)
        logits, cache = model.run_with_cache(inputs, names_filter="blocks.2.attn.hook_pattern")
    torch.testing.assert_close(fused, logits, rtol=0, atol=1e-12)
    row = cache["blocks.2.attn.hook_pattern"][:, :, -1]
    to_image = row.masked_fill(~inputs.image_mask[:, None], 0).sum(-1)
    assert to_image[:, [0, 3]].abs().max() == 0 and to_image[:, [1, 2]].min() > 0
    torch.testing.assert_close(row.sum(-1), torch.ones_like(row.sum(-1)))

    def by_hand(scores, hook):
        out = scores.clone()
        for head in (0, 3):
            out[:, head, -1] = out[:, head, -1].masked_fill(inputs.image_mask, -math.inf)
        return out

    with torch.no_grad():
        expected = model.run_with_hooks(inputs, fwd_hooks=[("blocks.2.attn.hook_attn_scores", by_hand)])
    torch.testing.assert_close(fused, expected, rtol=0, atol=1e-10)


def test_knockout_of_everything_a_query_may_read_stays_finite(model, inputs) -> None:
    with torch.no_grad(), model.intervene([KnockOutAttention(2, keys="all", queries="all")]):
        assert bool(torch.isfinite(model(inputs)[inputs.attention_mask]).all())


def test_knockout_acts_alike_with_and_without_a_cache_while_generating(model, inputs) -> None:
    with model.intervene([KnockOutAttention(layer, queries="query+generated") for layer in range(model.cfg.n_layers)]):
        cached = model.generate(inputs, max_new_tokens=8, return_type="tokens")
        plain = model.generate(inputs, max_new_tokens=8, return_type="tokens", use_past_kv_cache=False)
    assert torch.equal(cached, plain)
    assert not torch.equal(cached, model.generate(inputs, max_new_tokens=8, return_type="tokens"))


def test_regions_travel_in_a_circuit(tmp_path, model) -> None:
    steer = Steer(1, torch.ones(model.cfg.d_model), positions=Box(1.5, 2, 30, 40))
    knock = KnockOutAttention(2, keys=Tile(3, image=1))
    again = Circuit.load(Circuit([steer, knock], "regions").save(tmp_path / "c.safetensors"))
    assert again[0].positions == Box(1.5, 2, 30, 40) and again[1] == knock
    assert "Box(left=1.5" in repr(again)


def test_boxes_of_a_cropped_picture_are_in_its_own_pixels(model) -> None:
    wide = model.prepare(text="who?", images=Image.new("RGB", (400, 100), "red"))
    left = position_mask(wide, Box(0, 0, 100, 100))
    cells = wide.grid_tokens(0)
    assert set(left[0].nonzero().flatten().tolist()) == set(cells[:, :2].flatten().tolist())
