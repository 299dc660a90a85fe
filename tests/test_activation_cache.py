"""ActivationCache: short names, positions, image grids, rows, and files."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.cases import BY_NAME, IMAGE_TOKEN, counted, raw_inputs

NAME = "three-images-and-none"


@pytest.fixture
def ready(model_of):
    def get(name: str = NAME) -> tuple[Any, Any, Any]:
        model = model_of(BY_NAME[name])
        inputs = model.inputs_from_hf(**counted(raw_inputs(BY_NAME[name])))
        with torch.no_grad():
            return model, inputs, model.run_with_cache(inputs)[1]

    return get


# --- names -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "short, full",
    [
        (("resid_post", 1), "blocks.1.hook_resid_post"),
        (("resid_post", -1), "blocks.1.hook_resid_post"),
        (("resid_pre", -2), "blocks.0.hook_resid_pre"),
        (("z", 0), "blocks.0.attn.hook_z"),
        (("pattern", 1), "blocks.1.attn.hook_pattern"),
        (("attn_scores", 1), "blocks.1.attn.hook_attn_scores"),
        (("rot_q", 0), "blocks.0.attn.hook_rot_q"),
        (("result", 1, "attn"), "blocks.1.attn.hook_result"),
        (("post", 0), "blocks.0.mlp.hook_post"),
        (("pre_linear", 0), "blocks.0.mlp.hook_pre_linear"),
        (("scale", 1, "ln1"), "blocks.1.ln1.hook_scale"),
        (("normalized", 0, "ln2"), "blocks.0.ln2.hook_normalized"),
        ("embed", "hook_embed"),
        ("blocks.1.attn.hook_z", "blocks.1.attn.hook_z"),
        ("vision.blocks.1.attn.hook_pattern", "vision.blocks.1.attn.hook_pattern"),
        ("hook_image_features", "hook_image_features"),
        ("connector.hook_pre", "connector.hook_pre"),
        ("ln_final.hook_scale", "ln_final.hook_scale"),
    ],
    ids=str,
)
def test_short_name_gives_the_activation_of_the_full_one(short: Any, full: str, ready) -> None:
    _, _, cache = ready()
    if full.endswith("hook_result"):  # computed when it is asked for
        assert full not in cache.cache_dict and torch.equal(cache[short], cache[full])
    else:
        assert cache[short] is cache.cache_dict[full]
    assert short in cache and full in cache


@pytest.mark.parametrize("key", [("resid_post", 5), ("resid_post", -3), "blocks.1.hook_nothing", ("zz", 0)], ids=str)
def test_missing_activation_raises_a_key_error_that_names_it(key: Any, ready) -> None:
    _, _, cache = ready()
    with pytest.raises(KeyError, match="names_filter|holds"):
        cache[key]
    assert key not in cache


def test_activation_that_was_filtered_out_is_named_in_the_error(model_of) -> None:
    model = model_of(BY_NAME["clip-llama"])
    inputs = model.inputs_from_hf(**raw_inputs(BY_NAME["clip-llama"]))
    _, cache = model.run_with_cache(inputs, names_filter="blocks.1.attn.hook_z")
    with pytest.raises(KeyError, match="blocks.1.attn.hook_q"):
        cache["q", 1]


# --- positions ---------------------------------------------------------------------------------------
def test_at_last_gives_the_last_prompt_token_of_each_row(ready) -> None:
    _, inputs, cache = ready()
    for name in ("resid_post", "z", "result"):
        value = cache.at("last", name, 1)
        expected = torch.stack([cache[name, 1][row, spans.last] for row, spans in enumerate(inputs.spans)])
        assert torch.equal(value, expected)
        assert value.mask.shape == (3,) and bool(value.mask.all())


@pytest.mark.parametrize("positions", ["query", "image", "text", "prompt", "image+last", [2, 9, 17], 5], ids=str)
@pytest.mark.parametrize("name", ["resid_post", "z", "post"])
def test_at_pads_unequal_rows_with_zeros_and_a_mask(positions: Any, name: str, ready) -> None:
    from veena_lens.positions import position_mask

    _, inputs, cache = ready()
    value = cache.at(positions, name, 1)
    chosen = position_mask(inputs, positions)
    longest = int(chosen.sum(-1).max())
    assert value.shape[:2] == (3, longest) and value.mask.shape == (3, longest)
    for row in range(3):
        n = int(chosen[row].sum())
        assert value.mask[row].tolist() == [True] * n + [False] * (longest - n)
        assert torch.equal(value[row, :n], cache[name, 1][row, chosen[row]])
        assert not value[row, n:].any()


def test_at_picks_query_rows_of_a_pattern(ready) -> None:
    _, inputs, cache = ready()
    last = cache.at("last", "pattern", 1)
    for row, spans in enumerate(inputs.spans):
        assert torch.equal(last[row], cache["pattern", 1][row, :, spans.last])
    query = cache.at("query", "pattern", 1)
    for row, spans in enumerate(inputs.spans):
        n = spans.query.stop - spans.query.start
        assert torch.equal(query[row, :, :n], cache["pattern", 1][row, :, spans.query])


def test_at_without_a_layer_takes_a_full_name(ready) -> None:
    _, _, cache = ready()
    assert torch.equal(cache.at("last", "ln_final.hook_normalized"), cache["ln_final.hook_normalized"][:, -1])


def test_at_refuses_activations_of_pictures_and_sliced_caches(ready) -> None:
    model, inputs, cache = ready()
    with pytest.raises(ValueError, match="image_grid"):
        cache.at("last", "vision.blocks.0.hook_resid_post")
    _, sliced = model.run_with_cache(inputs, pos_slice=-1)
    with pytest.raises(ValueError, match="sliced"):
        sliced.at("last", "resid_post", 1)
    with pytest.raises(ValueError, match="unknown word"):
        cache.at("lst", "resid_post", 1)


def test_at_works_without_the_batch_axis(model_of) -> None:
    model = model_of(BY_NAME["one-row-no-padding"])
    inputs = model.inputs_from_hf(**raw_inputs(BY_NAME["one-row-no-padding"]))
    _, batch = model.run_with_cache(inputs)
    _, single = model.run_with_cache(inputs, remove_batch_dim=True)
    for positions in ("last", "image", "query"):
        expected = batch.at(positions, "resid_post", 1)
        assert torch.equal(single.at(positions, "resid_post", 1).reshape(expected.shape), expected)


# --- images ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", [NAME, "image-28-patch-7", "touching-images-first", "right-padding", "siglip-qwen2"])
def test_image_grid_reads_the_image_row_by_row(case: str, ready) -> None:
    model, inputs, cache = ready(case)
    side = model.cfg.vision.grid[0]
    count = 0
    for row, spans in enumerate(inputs.spans):
        for image, span in enumerate(spans.images):
            grid = cache.image_grid("resid_post", layer=1, row=row, image=image)
            assert grid.shape == (side, side, model.cfg.d_model)
            assert (inputs.tokens[row, span] == IMAGE_TOKEN).all() and span.stop - span.start == side * side
            for y in range(side):
                for x in range(side):
                    assert torch.equal(grid[y, x], cache["resid_post", 1][row, span.start + y * side + x])
            features = cache.image_grid("hook_image_features", row=row, image=image)
            assert torch.equal(features.flatten(0, 1), cache["connector.hook_out"][count])
            looks = cache.image_grid("pattern", layer=0, row=row, image=image)
            assert torch.equal(looks.flatten(1), cache["pattern", 0][row, :, spans.last, span])
            tower = cache.image_grid("vision.blocks.1.hook_resid_post", row=row, image=image)
            assert torch.equal(tower.flatten(0, 1), cache["vision.blocks.1.hook_resid_post"][count][-side * side :])
            count += 1


def test_image_grid_of_given_query_position(ready) -> None:
    _, inputs, cache = ready()
    row, span = 2, inputs.spans[2].images[0]
    grid = cache.image_grid("pattern", layer=1, row=row, query=span.stop + 1)
    assert torch.equal(grid.flatten(1), cache["pattern", 1][row, :, span.stop + 1, span])


@pytest.mark.parametrize("row, image", [(1, 0), (0, 3), (3, 0), (2, 1)])
def test_image_grid_of_a_picture_that_is_not_there_raises(row: int, image: int, ready) -> None:
    _, _, cache = ready()
    with pytest.raises(IndexError, match=r"\[3, 0, 1\]"):
        cache.image_grid("resid_post", layer=1, row=row, image=image)


def test_image_grid_of_the_full_strategy_leaves_the_class_token_out(ready) -> None:
    """With "full" the class token is the first of an image's tokens; the grid is the patches after it."""
    model, inputs, cache = ready("feature-minus-three-full")
    side, span = model.cfg.vision.grid[0], inputs.spans[0].images[0]
    assert span.stop - span.start == side * side + 1
    grid = cache.image_grid("resid_post", layer=1)
    assert grid.shape == (side, side, model.cfg.d_model)
    assert torch.equal(grid.flatten(0, 1), cache["resid_post", 1][0, span][1:])


def test_image_grid_of_a_strategy_that_drops_a_patch_raises(ready) -> None:
    """ "default" drops position 0, which in a tower without a class token is a patch."""
    _, _, cache = ready("siglip-default-strategy")
    with pytest.raises((IndexError, ValueError), match="grid"):
        cache.image_grid("resid_post", layer=1)


# --- rows --------------------------------------------------------------------------------------------
def test_slice_of_rows_takes_their_pictures_along(ready) -> None:
    model, inputs, cache = ready()
    part = cache.apply_slice_to_batch_dim([2, 0])
    _, direct = model.run_with_cache(inputs[[2, 0]])
    assert set(part.keys()) == set(direct.keys())
    assert part["vision.blocks.0.hook_resid_pre"].shape[0] == 4
    for name in part:
        torch.testing.assert_close(part[name], direct[name], rtol=1e-6, atol=1e-7)
    assert torch.equal(part.at("last", "resid_post", 1), cache.at("last", "resid_post", 1)[[2, 0]])


def test_slice_of_rows_without_pictures_has_no_pictures(ready) -> None:
    _, _, cache = ready()
    part = cache.apply_slice_to_batch_dim(slice(1, 2))
    assert len(part["vision.hook_embed"]) == 0 and len(part["hook_image_features"]) == 0
    assert part["resid_post", 0].shape[0] == 1


def test_remove_batch_dim_after_the_run_leaves_pictures_alone(model_of) -> None:
    model = model_of(BY_NAME["one-row-no-padding"])
    inputs = model.inputs_from_hf(**raw_inputs(BY_NAME["one-row-no-padding"]))
    _, cache = model.run_with_cache(inputs)
    _, expected = model.run_with_cache(inputs, remove_batch_dim=True)
    removed = cache.remove_batch_dim()
    assert not removed.has_batch_dim
    for name in expected:
        assert torch.equal(removed[name], expected[name]), name


def test_remove_batch_dim_of_two_rows_raises(ready) -> None:
    _, _, cache = ready()
    with pytest.raises(ValueError, match="3"):
        cache.remove_batch_dim()


# --- files -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [NAME, "text-mistral", "right-padding"])
def test_saved_cache_loads_as_it_was(case: str, dtype: torch.dtype, tmp_path, model_of) -> None:
    from veena_lens import ActivationCache

    model = model_of(BY_NAME[case], dtype)
    inputs = model.inputs_from_hf(**raw_inputs(BY_NAME[case], dtype))
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
    cache.save(tmp_path / "there" / "cache.safetensors")
    loaded = ActivationCache.load(tmp_path / "there" / "cache.safetensors")
    assert set(loaded.keys()) == set(cache.keys()) and loaded.has_batch_dim == cache.has_batch_dim
    for name in cache:
        assert loaded[name].dtype == cache[name].dtype and torch.equal(loaded[name], cache[name])
    for positions in ("last", "query", "image", "text"):
        if positions == "image" and not BY_NAME[case].has_images:
            continue
        ours, theirs = loaded.at(positions, "resid_post", 1), cache.at(positions, "resid_post", 1)
        assert torch.equal(ours, theirs) and torch.equal(ours.mask, theirs.mask)
    if BY_NAME[case].has_images:
        assert torch.equal(loaded.image_grid("resid_post", 1), cache.image_grid("resid_post", 1))
    assert [str(s) for s in loaded.inputs.spans] == [str(s) for s in inputs.spans]
    assert loaded["resid_post", -1] is loaded["blocks.1.hook_resid_post"]


def test_saved_gradients_and_sliced_cache_load_too(model_of, tmp_path) -> None:
    from veena_lens import ActivationCache

    model = model_of(BY_NAME["clip-llama"])
    inputs = model.inputs_from_hf(**raw_inputs(BY_NAME["clip-llama"]))
    _, cache = model.run_with_cache(inputs, return_type="loss", incl_bwd=True, pos_slice=-1)
    model.zero_grad()
    cache.save(tmp_path / "cache.safetensors")
    loaded = ActivationCache.load(tmp_path / "cache.safetensors")
    assert torch.equal(loaded["blocks.1.hook_resid_post_grad"], cache["blocks.1.hook_resid_post_grad"])
    assert loaded.inputs is None


def test_load_of_a_missing_or_foreign_file_raises(tmp_path) -> None:
    from safetensors.torch import save_file

    from veena_lens import ActivationCache

    with pytest.raises(FileNotFoundError, match="nothing.safetensors"):
        ActivationCache.load(tmp_path / "nothing.safetensors")
    save_file({"x": torch.zeros(2)}, str(tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match="no activation cache"):
        ActivationCache.load(tmp_path / "other.safetensors")


def test_repr_tells_what_it_holds(ready) -> None:
    _, _, cache = ready()
    assert f"{len(cache)} activations" in repr(cache) and "3 rows" in repr(cache)
    assert len(repr(cache).splitlines()) <= 10
