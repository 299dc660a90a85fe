"""run_with_cache and ActivationCache with images of unequal size, frames of videos and deep-stack features (Qwen)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.cases import BY_NAME, raw_inputs, relative_error
from tests.model.test_run_with_cache import ANY_SIZE
from tests.odd_inputs import QWEN_IMAGE, QWEN_VIDEO
from veena_lens import ActivationCache
from veena_lens.hook_table import hooks_of
from veena_lens.positions import position_mask

OF_IMAGES = ("vision.", "connector.", "hook_image", "deepstack.")
everything = lambda name: True  # noqa: E731


@pytest.fixture(params=list(ANY_SIZE))
def ready(request: pytest.FixtureRequest, model_of) -> tuple[Any, Any]:
    """A model in pure float64 and a batch: an image and a video, two thin images, text alone."""
    case = ANY_SIZE[request.param]
    model = model_of(case, casts="none")
    return model, model.inputs_from_hf(**raw_inputs(case))


@pytest.fixture
def run(ready) -> tuple[Any, Any, ActivationCache]:
    model, inputs = ready
    with torch.no_grad():
        return model, inputs, model.run_with_cache(inputs, names_filter=everything)[1]


def blocks_of(cache: ActivationCache) -> set[int]:
    return {int(name.split(".")[1]) for name in cache if name.startswith("blocks.")}


# --- run_with_cache ----------------------------------------------------------------------------------
def test_filter_caches_exactly_what_it_names(ready) -> None:
    model, inputs = ready
    defaults = {name for name, row in hooks_of(model.cfg).items() if row.by_default}
    names = ["vision.ln_post.hook_normalized", "blocks.1.attn.hook_rot_q"]
    names += ["deepstack.1.hook_out", "blocks.2.attn.k_norm.hook_scale"] if model.cfg.n_deepstack else []
    assert set(model.run_with_cache(inputs, names_filter=names)[1]) == set(names)
    found = set(model.run_with_cache(inputs, names_filter=lambda name: "deepstack" in name)[1])
    assert found == {name for name in defaults if "deepstack" in name} and len(found) == 2 * model.cfg.n_deepstack


@pytest.mark.parametrize(
    "wrong, near",
    [("deepstack.2.hook_out", "deepstack.1.hook_out"), ("blocks.0.hook_deepstack", "blocks.1.hook_deepstack")],
)
def test_deepstack_hook_that_is_not_there_is_refused(wrong: str, near: str, model_of) -> None:
    model = model_of(ANY_SIZE["qwen3_vl-cache"], casts="none")
    with pytest.raises(ValueError, match=f"{wrong}.*{near}"):
        model.run_with_cache(model.inputs_from_hf(**raw_inputs(ANY_SIZE["qwen3_vl-cache"])), names_filter=wrong)


def test_start_at_layer_continues_from_a_residual(run) -> None:
    """The images are seen again exactly where layers to come still add deep-stack features."""
    model, inputs, whole = run
    n = model.cfg.n_layers
    for start in range(n + 1):
        resid = whole["resid_pre", start] if start < n else whole["resid_post", n - 1]
        with torch.no_grad():
            logits, cache = model.run_with_cache(resid, start_at_layer=start, tokens=inputs)
        assert relative_error(logits, whole["unembed.hook_out"], inputs.attention_mask) < 1e-12, start
        assert blocks_of(cache) == set(range(start, n))
        seen = {name for name in cache if name.startswith(OF_IMAGES)}
        assert bool(seen) == (start <= model.cfg.n_deepstack and model.cfg.n_deepstack > 0)
        if start < n:
            with torch.no_grad():
                one = model(resid, start_at_layer=start, stop_at_layer=start + 1, tokens=inputs)
            assert relative_error(one, whole["resid_post", start], inputs.attention_mask) < 1e-12


def test_residuals_of_a_part_add_up(run) -> None:
    """Of a run that stops early, and of every layer: what entered, deep-stack features, attention, MLP."""
    model, inputs, whole = run
    images = inputs.image_mask
    for layer in range(model.cfg.n_layers):
        resid = whole["resid_pre", layer]
        if ("deepstack", layer) in whole:
            added = whole["deepstack", layer] - resid
            assert not added[~images].any()
            assert relative_error(added[images], whole[f"deepstack.{layer - 1}.hook_out"]) < 1e-12
            resid = whole["deepstack", layer]
        assert relative_error(resid + whole["attn_out", layer], whole["resid_mid", layer]) < 1e-12
        assert relative_error(whole["resid_mid", layer] + whole["mlp_out", layer], whole["resid_post", layer]) < 1e-12
        with torch.no_grad():
            stopped, cache = model.run_with_cache(inputs, stop_at_layer=layer)
        parts = cache.decompose_resid(layer=layer)
        assert relative_error(parts.sum(0), stopped) < 1e-12
        heads = whole.stack_head_results(layer=layer + 1, incl_remainder=True)
        assert relative_error(heads.sum(0), whole["resid_post", layer]) < 1e-12
    full = whole.get_full_resid_decomposition()
    assert relative_error(full.sum(0), whole["resid_post", -1]) < 1e-12
    good, bad = 7, 9
    logits = whole["unembed.hook_out"]
    attrs = whole.logit_attrs(whole.decompose_resid(), tokens=good, incorrect_tokens=bad)
    assert relative_error(attrs.sum(0), logits[..., good] - logits[..., bad], inputs.attention_mask) < 1e-10


def test_components_sum_to_what_the_last_norm_reads_where_every_layer_is_followed_by_an_addition(model_of) -> None:
    """The last one comes after the last block."""
    case = BY_NAME["qwen3_vl-deepstack-every-decoder-layer"]
    model = model_of(case, casts="none")
    inputs, n = model.inputs_from_hf(**raw_inputs(case)), model.cfg.n_layers
    assert model.cfg.n_deepstack == n
    for options in ({}, dict(pos_slice=-1)):
        with torch.no_grad():
            logits, cache = model.run_with_cache(inputs)
        attrs = []
        for parts, labels in (
            cache.decompose_resid(return_labels=True, **options),
            cache.get_full_resid_decomposition(return_labels=True, **options),
        ):
            assert labels.count(f"{n}_deepstack") == 1 and labels.count("1_deepstack") == 1
            attrs.append(cache.logit_attrs(parts, tokens=7, **options).sum(0))
        expected = logits[:, -1, 7] if options else logits[..., 7]
        keep = None if options else inputs.attention_mask
        assert all(relative_error(one, expected, keep) < 1e-10 for one in attrs)
    for mlp_input, name in ((False, "resid_pre"), (True, "resid_mid")):
        parts = cache.decompose_resid(layer=n - 1, mlp_input=mlp_input)
        assert relative_error(parts.sum(0), cache[name, n - 1]) < 1e-12


def test_hook_that_writes_in_place_does_not_falsify_the_cache(ready) -> None:
    """`hook_resid_post`, the next `hook_resid_pre` and what a deep-stack merger reads may be one tensor."""
    model, inputs = ready
    with torch.no_grad():
        _, plain = model.run_with_cache(inputs)
        for name in [n for n in hooks_of(model.cfg) if n.endswith(("1.hook_resid_pre", "1.hook_deepstack"))]:
            with model.hooks([(name, lambda value, hook: value.mul_(0))]):
                _, cache = model.run_with_cache(inputs)
            order = [n for n in hooks_of(model.cfg) if n in plain]
            assert (cache[name] == 0).all()
            for earlier in order[: order.index(name)]:
                assert torch.equal(cache[earlier], plain[earlier]), (name, earlier)
            merged = [n for n in plain if n == "deepstack.0.hook_out"]
            assert all(torch.equal(cache[n], plain[n]) for n in merged), "of block 0, before the edit"


# --- positions and grids -----------------------------------------------------------------------------
def test_image_words_pick_image_and_video_tokens(run) -> None:
    _, inputs, cache = run
    filled = (inputs.tokens == QWEN_IMAGE) | (inputs.tokens == QWEN_VIDEO)
    assert torch.equal(inputs.image_mask, filled) and filled.sum(-1).tolist() == [4 + 4, 6, 0]
    value = cache.at("image", "resid_post", 1)
    assert value.mask.sum(-1).tolist() == [8, 6, 0]
    for row in range(3):
        assert torch.equal(value[row][value.mask[row]], cache["resid_post", 1][row, filled[row]])
    for word in ("last", "query", "text"):
        ours = cache.at(word, "rot_q", 1)
        chosen = position_mask(inputs, word)
        for row in range(3):
            assert torch.equal(ours[row].reshape(-1, *ours.shape[-2:])[: int(chosen[row].sum())],
                               cache["rot_q", 1][row, chosen[row]])  # fmt: skip


def test_image_grids_read_images_and_frames_in_raster_order(run) -> None:
    model, inputs, cache = run
    assert inputs.grids == (((2, 2), (1, 2), (1, 2)), ((1, 3), (3, 1)), ())
    assert inputs.n_images == [3, 2, 0], "frames of a video count as images"
    picture, place = 0, 0
    for row, images in enumerate(inputs.grids):
        tokens = inputs.image_mask[row].nonzero().flatten()
        at = 0
        for image, (height, width) in enumerate(images):
            options = dict(row=row, image=image)
            grid = cache.image_grid("resid_post", layer=1, **options)
            looks = cache.image_grid("pattern", layer=1, **options)
            features = cache.image_grid("hook_image_features", **options)
            joined = cache.image_grid("connector.hook_post", **options)
            inner = [cache.image_grid(f"deepstack.{i}.hook_out", **options) for i in range(model.cfg.n_deepstack)]
            tower = cache.image_grid("vision.blocks.1.attn.hook_z", **options)
            assert grid.shape[:2] == looks.shape[1:] == features.shape[:2] == joined.shape[:2] == (height, width)
            assert tower.shape[:2] == (2 * height, 2 * width)
            for i in range(height * width):
                y, x = divmod(i, width)
                token = tokens[at + i]
                assert torch.equal(grid[y, x], cache["resid_post", 1][row, token])
                assert torch.equal(looks[:, y, x], cache["pattern", 1][row, :, inputs.spans[row].last, token])
                assert torch.equal(features[y, x], cache["hook_image_features"][place + i])
                assert torch.equal(joined[y, x], cache["connector.hook_post"][picture, i])
                for number, values in enumerate(inner):
                    assert torch.equal(values[y, x], cache[f"deepstack.{number}.hook_out"][place + i])
                for k in range(4):  # the square of patches that the token reads
                    dy, dx = divmod(k, 2)
                    patch = cache["vision.blocks.1.attn.hook_z"][picture, 4 * i + k]
                    assert torch.equal(tower[2 * y + dy, 2 * x + dx], patch)
            picture, place, at = picture + 1, place + height * width, at + height * width
    with pytest.raises(IndexError, match=r"\[3, 2, 0\]"):
        cache.image_grid("resid_post", layer=1, row=2)


# --- rows and files ----------------------------------------------------------------------------------
@pytest.mark.parametrize("rows", [[1, 0], [2], slice(1, 3), 1], ids=str)
def test_slice_of_rows_takes_their_pictures_along(rows: Any, run) -> None:
    model, inputs, cache = run
    part = cache.apply_slice_to_batch_dim(rows)
    with torch.no_grad():
        _, direct = model.run_with_cache(inputs[rows], names_filter=everything, remove_batch_dim=isinstance(rows, int))
    assert {name for name in part if not len(part[name])} == set(part) - set(direct)
    mine = [rows] if isinstance(rows, int) else torch.arange(3)[rows].tolist()
    for name in direct:
        ours, theirs = part[name], direct[name]
        axes = hooks_of(model.cfg)[name].axis_names
        if axes[0] == "batch":
            # Scores and patterns of pads are not said; rows are padded as they were.
            keep = inputs.attention_mask[mine].squeeze(0) if isinstance(rows, int) else inputs.attention_mask[mine]
            if "query_pos" in axes:
                ours, theirs = (x.transpose(-3, -2) for x in (ours, theirs))
            ours, theirs = (x[keep].clamp(min=-1e9) for x in (ours, theirs))
        elif axes[0] == "crop":
            assert ours.shape == theirs.shape, f"{name}: padded to the longest picture that is left"
            ours, theirs = (x.clamp(min=-1e9) for x in (ours, theirs))
        assert relative_error(ours, theirs) < 1e-10, name
    if not isinstance(rows, int) and part.inputs.n_images[0]:
        assert torch.equal(part.image_grid("resid_post", 1), cache.image_grid("resid_post", 1, row=mine[0]))
        name = "vision.blocks.1.hook_resid_post"
        assert torch.equal(part.image_grid(name), cache.image_grid(name, row=mine[0]))


def test_saved_cache_loads_as_it_was(run, tmp_path) -> None:
    _, inputs, cache = run
    loaded = ActivationCache.load(cache.save(tmp_path / "cache.safetensors"))
    assert set(loaded) == set(cache) and all(torch.equal(loaded[name], cache[name]) for name in cache)
    for name in ("tokens", "attention_mask", "position_ids", "crop_rows", "crop_images", "crop_grids"):
        assert torch.equal(getattr(loaded.inputs, name), getattr(inputs, name)), name
    assert loaded.inputs.position_ids.shape[0] == 3
    assert loaded.inputs.video_token_id == QWEN_VIDEO and loaded.inputs.image_token_id == QWEN_IMAGE
    assert loaded.inputs.grids == inputs.grids and loaded.inputs.spans == inputs.spans
    assert torch.equal(loaded.inputs.image_mask, inputs.image_mask)
    for row, image in ((0, 0), (0, 2), (1, 1)):
        for name in ("blocks.1.hook_resid_post", "connector.hook_out", "vision.ln_post.hook_scale"):
            assert torch.equal(
                loaded.image_grid(name, row=row, image=image), cache.image_grid(name, row=row, image=image)
            )
    again = loaded.apply_slice_to_batch_dim([1])
    assert torch.equal(
        again.image_grid("hook_image_features", image=1), cache.image_grid("hook_image_features", row=1, image=1)
    )
