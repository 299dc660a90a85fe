"""LLaVA-OneVision's tiles and frames in edits, interventions, caches and `transformer_lens.patching`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens import patching

from tests.cases import BY_NAME, counted, hf_model, native_model, raw_inputs, relative_error
from veena_lens import ActivationCache
from veena_lens.interventions import Ablate, BoostAttention, Steer, Tile

RESAMPLED, MIXED = "onevision-resampled", "onevision-image-and-video"
# Ours, and where Hugging Face's module gives the same value.
PLACES = {
    "vision.hook_embed": "model.vision_tower.embeddings.patch_embedding",
    "vision.blocks.0.hook_resid_post": "model.vision_tower.encoder.layers.0",
    "vision.blocks.1.hook_mlp_out": "model.vision_tower.encoder.layers.1.mlp",
    "vision.blocks.2.hook_mlp_out": "model.vision_tower.encoder.layers.2.mlp",
    "connector.hook_pre": "model.multi_modal_projector.linear_1",
    "connector.hook_out": "model.multi_modal_projector",
    "blocks.0.hook_attn_out": "model.language_model.layers.0.self_attn",
    "blocks.1.hook_resid_post": "model.language_model.layers.1",
}


def scaled(x: Tensor) -> Tensor:
    """Uneven over every axis, so that a shifted or permuted place shows."""
    return x * (1.0 + 0.3 * torch.sin(torch.arange(x[0].numel(), dtype=x.dtype).view(x.shape[1:])))


def in_theirs(name: str) -> Callable[..., Any]:
    def edit(module: Any, args: Any, out: Any) -> Any:
        if name == "vision.hook_embed":  # a convolution's [image d_model row column]
            return scaled(out.flatten(2).transpose(1, 2)).transpose(1, 2).view(out.shape)
        return (scaled(out[0]), *out[1:]) if isinstance(out, tuple) else scaled(out)

    return edit


@pytest.mark.parametrize("name", PLACES)
def test_edits_equal_the_same_edits_in_hugging_face(name: str) -> None:
    for case in (BY_NAME[RESAMPLED], BY_NAME["onevision-videos"]):
        raw, hf, model = raw_inputs(case), hf_model(case), native_model(case)
        handle = hf.get_submodule(PLACES[name]).register_forward_hook(in_theirs(name))
        with torch.no_grad():
            theirs = hf(**raw).logits
            handle.remove()
            inputs = model.inputs_from_hf(**raw)
            ours = model.run_with_hooks(inputs, fwd_hooks=[(name, lambda x, hook: scaled(x))])
            assert relative_error(ours, theirs, raw["attention_mask"]) < 1e-9
            assert relative_error(model(inputs), theirs, raw["attention_mask"]) > 1e-4, "the edit does nothing"


@pytest.mark.parametrize("name", [RESAMPLED, MIXED])
def test_rows_of_a_batch_are_the_rows_alone_under_interventions(name: str) -> None:
    model = native_model(BY_NAME[name], casts="none")
    inputs = model.inputs_from_hf(**counted(raw_inputs(BY_NAME[name])))
    vector = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    edits = [
        [Steer(0, vector, positions="image"), BoostAttention(1, keys="image", factor=2.0)],
        [Ablate("hook_image_features", positions=Tile(0))],
        [],
    ]
    with torch.no_grad():
        with model.intervene(per_row=edits):
            whole = model(inputs)
        plain = model(inputs)
        for row, mine in enumerate(edits):
            with model.intervene(mine):
                alone = model(inputs[row].without_padding())
            keep = inputs.attention_mask[row]
            assert relative_error(whole[row][keep], alone[0]) < 1e-10
            assert not mine or relative_error(plain[row][keep], alone[0]) > 1e-4


def test_grids_of_features_are_what_the_text_reads_at_their_cells(tmp_path: Path) -> None:
    model = native_model(BY_NAME[MIXED])
    inputs = model.inputs_from_hf(**raw_inputs(BY_NAME[MIXED]))
    assert inputs.grids == (((2, 2), (1, 1), (1, 1), (2, 2)), ((1, 1), (1, 1), (4, 2)), ())
    assert [len(t) for t in inputs.token_tiles[0]] == [5, 1, 2, 5], "newlines end images, and the last frame"
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
    again = ActivationCache.load(cache.save(tmp_path / "cache"))
    layouts = iter([image for row in inputs.layouts for image in row])
    for row, spans in enumerate(inputs.spans):
        for image, span in enumerate(spans.images):
            layout: Any = next(layouts)
            grid = cache.image_grid("resid_post", 1, row=row, image=image)
            features = cache.image_grid("hook_image_features", row=row, image=image)
            assert torch.equal(features, cache.image_grid("hook_embed", row=row, image=image))
            assert torch.equal(grid, again.image_grid("resid_post", 1, row=row, image=image))
            mine = cache["resid_post", 1][row, span][layout.grid_places()]
            assert torch.equal(grid.flatten(0, 1), mine)
            tower = cache.image_grid("vision.blocks.1.hook_resid_post", row=row, image=image)
            assert tower.shape[:2] == (2, 2), "of a tiled picture the whole view"


def test_transformer_lens_patches_tiles_and_frames_unmodified() -> None:
    """Every position's residual of the clean run, images included, against a patch made by hand."""
    for name, row in ((RESAMPLED, 2), (MIXED, 1)):
        model, raw = native_model(BY_NAME[name], casts="none"), raw_inputs(BY_NAME[name])
        other = {k: -x if k.startswith("pixel_values") else x for k, x in counted(raw).items()}
        clean, corrupted = (model.inputs_from_hf(**r)[row].without_padding() for r in (counted(raw), other))
        with torch.no_grad():
            logits, cache = model.run_with_cache(clean)
            plain = model(corrupted)

            def metric(logits: Tensor) -> Tensor:
                return logits[0, -1, 5] - logits[0, -1, 6]

            heads = patching.get_act_patch_attn_head_out_all_pos(model, corrupted, cache, metric)
            stream = patching.get_act_patch_resid_pre(model, corrupted, cache, metric)

            def by_hand(z: Tensor, hook: Any, clean: Tensor = cache["z", 1]) -> Tensor:
                return torch.cat([z[:, :, :3], clean[:, :, 3:4], z[:, :, 4:]], 2)

            one = model.run_with_hooks(corrupted, fwd_hooks=[("blocks.1.attn.hook_z", by_hand)])
            whole = model.run_with_hooks(
                corrupted, fwd_hooks=[("hook_embed", lambda x, hook, c=cache: c["hook_embed"])]
            )
        assert heads.shape == (2, 6) and stream.shape == (2, clean.shape[1])
        assert heads[1, 3].double() == pytest.approx(float(metric(one)), abs=1e-6)
        assert float(metric(whole)) == pytest.approx(float(metric(logits)), abs=1e-10)
        image = clean.image_mask[0].nonzero().flatten()
        assert float((stream[0, image] - metric(plain)).abs().max()) > 1e-4, "patching a picture's tokens acts"
