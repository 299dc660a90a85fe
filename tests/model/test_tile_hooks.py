"""Every hook point of Idefics3 and SmolVLM is live and exact, with images in tiles and smaller than their square.

The logits are those of the plain model of `tests/tile_reference.py` with the same edit.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import hf_model, raw_inputs
from tests.model.checks import assert_edits_act, disagreeing, tokens_of
from tests.tile_cases import TILE_BY_NAME, TileCase
from tests.tile_reference import reference_logits, reference_values
from veena_lens.hook_table import canonical, hooks_of

HOOKS = TileCase(name="hooks", rows=("2 i9x13 1", "1 t1x2 1 i 3", "4"), text=dict(num_hidden_layers=1))
VALUES = [
    HOOKS,
    TileCase(name="hooks-right", kind="smolvlm", rows=("i 3", "t2x1 1"), padding="right", has_mask=False),
    *(TILE_BY_NAME[name] for name in ("idefics3-scale-3", "idefics3-smaller-pictures", "smolvlm-one-token-a-tile")),
    *(TILE_BY_NAME[name] for name in ("smolvlm-tied", "idefics3-side-25", "idefics3-no-markers")),
]
PARTS = ("q", "k", "v", "attn_scores", "pattern", "z", "result")
everything = lambda name: True  # noqa: E731


def plain_of(case: TileCase) -> tuple[Any, Any, dict[str, Tensor]]:
    """What the plain model takes: configuration, weights, a processor's tensors."""
    return hf_model(case).config, hf_model(case).state_dict(), raw_inputs(case)


def test_every_hook_point_fires_once_in_the_order_of_the_table_with_its_shape(model_of) -> None:
    model = model_of(HOOKS, casts="none")
    cfg, inputs = model.cfg, model.inputs_from_hf(**raw_inputs(HOOKS))
    calls: list[tuple[str, tuple[int, ...]]] = []
    with torch.no_grad():
        model.run_with_hooks(
            inputs, fwd_hooks=[(everything, lambda v, hook: calls.append((hook.name, tuple(v.shape))))]
        )
    expected = {}
    for name, row in hooks_of(cfg).items():
        part = cfg.vision if name.startswith("vision.") else cfg
        pos = 16 if part is cfg.vision else 4 if name.startswith("connector.") else inputs.shape[1]
        sizes = dict(batch=3, crop=5, n_image_tokens=20, pos=pos, query_pos=pos, key_pos=pos)
        sizes |= {x: getattr(part, x) for x in ("d_model", "d_mlp", "d_head", "n_heads", "n_key_value_heads")}
        sizes |= dict(d_vocab=cfg.d_vocab, d_in=cfg.connector.d_in)
        expected[name] = tuple(int(axis) if axis.isdigit() else sizes[axis] for axis in row.axis_names)
    assert dict(calls) == expected and len(calls) == len(expected)
    assert [name for name, _ in calls if "_input" not in name] == [n for n in expected if "_input" not in n]
    assert {canonical(name) for name in model.hook_dict} == set(expected)
    assert {f"vision.blocks.1.attn.hook_{part}" for part in PARTS} <= set(expected)
    assert [n for n in expected if n.startswith(("connector.", "vision.ln"))] == [
        "vision.ln_post.hook_scale", "vision.ln_post.hook_normalized", "connector.hook_in", "connector.hook_out",
    ]  # fmt: skip


@pytest.mark.parametrize("case", VALUES, ids=str)
def test_every_value_equals_the_plain_model(case: TileCase, model_of) -> None:
    model, plain = model_of(case, casts="none"), plain_of(case)
    inputs = model.inputs_from_hf(**plain[2])
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, names_filter=everything)
    values = reference_values(*plain)
    assert set(values) == set(hooks_of(model.cfg))
    assert disagreeing(cache, values, values, model, tokens_of(inputs)) == {}


def test_edit_of_every_hook_point_acts_as_the_mathematics_says(model_of) -> None:
    plain = plain_of(HOOKS)
    assert_edits_act(model_of(HOOKS, casts="none"), plain[2], partial(reference_logits, *plain))


@pytest.mark.parametrize("name", ["idefics3-unequal-pictures", "smolvlm-long-names"])
def test_grid_of_an_image_goes_through_its_tiles(name: str, model_of) -> None:
    case = TILE_BY_NAME[name]
    model = model_of(case)
    inputs = model.inputs_from_hf(**raw_inputs(case))
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
    side = model.cfg.vision.token_grid[0]
    asked = [[word for word in row.split() if not word.isdigit()] for row in case.rows]
    assert inputs.n_images == [len(words) for words in asked]
    for row, words in enumerate(asked):
        for image, word in enumerate(words):
            tiles = [int(n) for n in word[1:].split("x")] if word[0] == "t" else [1, 1]
            height, width = (n * side for n in tiles)
            grid = cache.image_grid("resid_post", 1, row=row, image=image)
            assert inputs.grids[row][image] == grid.shape[:2] == (height, width)
            features = cache.image_grid("hook_image_features", row=row, image=image)
            assert torch.equal(features, cache.image_grid("hook_embed", row=row, image=image))
            mine = (inputs.crop_rows == row) & (inputs.crop_images == image)
            pictures = cache["connector.hook_out"][mine]
            assert len(pictures) == (1 if tiles == [1, 1] else 1 + tiles[0] * tiles[1])
            for y in range(height):
                for x in range(width):
                    tile = 0 if len(pictures) == 1 else 1 + y // side * tiles[1] + x // side
                    assert torch.equal(features[y, x], pictures[tile, y % side * side + x % side])
            whole = cache.image_grid("connector.hook_out", row=row, image=image)
            assert torch.equal(whole.flatten(0, 1), pictures[0])


def test_rows_of_a_cache_keep_their_own_pictures(model_of, tmp_path: Any) -> None:
    case = TILE_BY_NAME["idefics3-smaller-pictures"]
    model = model_of(case, casts="none")
    inputs = model.inputs_from_hf(**raw_inputs(case))
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
        _, alone = model.run_with_cache(inputs[1])
    row = cache.apply_slice_to_batch_dim([1])
    assert row.inputs.patch_mask is not None and torch.equal(row.inputs.patch_mask, inputs.patch_mask[2:])
    for name in ("vision.blocks.1.hook_resid_post", "vision.blocks.0.attn.hook_pattern", "hook_image_features"):
        torch.testing.assert_close(row[name], alone[name], rtol=1e-10, atol=1e-12)
    cache.save(tmp_path / "cache.safetensors")
    again = type(cache).load(tmp_path / "cache.safetensors")
    for image in (0, 1):
        grids = (c.image_grid("vision.blocks.1.hook_resid_post", row=0, image=image) for c in (cache, again))
        assert torch.equal(*grids)
