"""The suffix engine where an image's tokens read each other in both directions: an image is one position."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.cases import BY_NAME, counted, native_model, raw_inputs
from tests.sweeps.test_engines import agree, both
from veena_lens.hook_table import hooks_of
from veena_lens.images.layout import reached_from
from veena_lens.interventions import Ablate, BoostAttention, KnockOutAttention, Patch, Steer
from veena_lens.sweeps import generation_sweep, patch_sweep, steer_sweep
from veena_lens.sweeps.metrics import logit_diff, project

NAMES = ["narrow-window", "touching-pictures"]


def runs(name: str) -> tuple[Any, Any, Any]:
    """A model in pure float64, and two batches that differ in images and one token."""
    case = BY_NAME[f"gemma3-{name}"]
    model, raw = native_model(case, casts="none"), counted(raw_inputs(case))
    other = {key: -value if key == "pixel_values" else value for key, value in raw.items()}
    ids = raw["input_ids"].clone()
    first = raw["attention_mask"].argmax(-1)
    rows = [row for row in range(len(ids)) if ids[row, first[row]] < 100]
    ids[rows, first[rows]] = (ids[rows, first[rows]] + 3) % 90 + 3
    return model, model.inputs_from_hf(**raw), model.inputs_from_hf(**{**other, "input_ids": ids})


@pytest.mark.parametrize("name", NAMES)
def test_every_site_of_the_decoder_equals_whole_forwards(name: str) -> None:
    model, clean, corrupted = runs(name)
    clean, corrupted = clean[0].without_padding(), corrupted[0].without_padding()
    sites = [n for n in hooks_of(model.cfg) if n.startswith(("blocks.0.", "blocks.1."))]
    metrics: Any = {"logits": logit_diff(5, 6), "stream": project("blocks.2.hook_resid_post", torch.ones(48).double())}
    inside = clean.spans[0].images[0].stop - 2 if clean.spans[0].images else 4
    kw: dict[str, Any] = dict(sites=sites, positions=[inside, inside + 1], metric=metrics, progress=False)
    fast, plain = (patch_sweep(model, clean, corrupted, engine=engine, **kw) for engine in ("suffix", "naive"))
    for key in metrics:
        assert float(plain[key].values.std()) > 1e-6, "no patch did anything"
        agree(fast[key], plain[key])


@pytest.mark.parametrize("name", ["unequal-rows", "touching-pictures"])
def test_positions_of_a_part_of_a_picture_equal_whole_forwards(name: str) -> None:
    """An edit of an image's last token reaches its first one."""
    model, clean, corrupted = runs(name)
    for row in (0,) if name == "unequal-rows" else (1,):
        a, b = clean[row].without_padding(), corrupted[row].without_padding()
        span = a.spans[0].images[-1]
        for positions in ([span.stop - 1], [span.start + 1, span.stop], slice(span.start + 2, span.stop + 1), "image"):
            for direction in ("denoising", "noising"):
                agree(*both(model, a, b, sites="resid", positions=positions, direction=direction))
        vectors = torch.randn(model.cfg.n_layers, 48, dtype=torch.float64)
        steered = [
            steer_sweep(
                model,
                a,
                vectors,
                logit_diff(5, 6),
                alphas=[0.5, 2],
                positions=[span.stop - 1],
                engine=e,
                progress=False,
            )
            for e in ("suffix", "naive")
        ]
        torch.testing.assert_close(steered[0].values, steered[1].values, rtol=1e-10, atol=1e-12)


def test_every_site_on_pictures_equals_whole_forwards() -> None:
    model, clean, corrupted = runs("touching-pictures")
    clean, corrupted = clean[0].without_padding(), corrupted[0].without_padding()
    named = [n for n in hooks_of(model.cfg) if n.startswith(("vision.", "connector."))]
    for sites, positions in ((named, [1, -1]), (["hook_image_features"], "each")):
        agree(*both(model, clean, corrupted, sites=sites, positions=positions))
    agree(*both(model, clean, corrupted, sites=["vision.blocks.1.attn.hook_z"], positions=[3], units=[0, 3]))


def test_an_edit_in_a_picture_reaches_it_from_its_first_token() -> None:
    model, clean, _ = runs("touching-pictures")
    first, second = (reached_from(model.cfg, clean[row].without_padding()).tolist() for row in (0, 1))
    assert first == [0] * 8 + [8, 9, 10], "pictures that touch are one"
    assert second == [0, 1, 1, 1, 1, 5, 6, 6, 6, 6, 10, 11, 11, 11, 11, 15, 16]
    plan = patch_sweep(model, clean[1], clean[1], sites="resid", positions=[8], layers=[0], plan_only=True)
    assert plan.token_layers == (17 - 6) * 3


def test_generation_sweep_equals_whole_prompts() -> None:
    model, clean, corrupted = runs("unequal-rows")
    clean, corrupted = clean[[0, 2, 3]], corrupted[[0, 2, 3]]
    vector = 3 * torch.randn(48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        _, cache = model.run_with_cache(corrupted[0].without_padding(), names_filter=["blocks.1.attn.hook_z"])
    span = clean[0].without_padding().spans[0].images[0]
    entries = [
        [],
        Steer(1, vector, positions=[span.stop - 1]),
        Steer(0, vector, positions="image"),
        Steer(2, vector, positions="last+generated"),
        BoostAttention(1, keys="image", queries="query+generated", factor=5.0),
        BoostAttention(0, keys="image", queries="image", factor=3.0, mode="mul"),
        KnockOutAttention(1, keys="image", queries="image"),
        Ablate("blocks.0.hook_attn_out", positions="image"),
        [Ablate("vision.blocks.0.hook_mlp_out", positions="all"), Steer(1, vector)],
    ]
    one = [*entries, Patch("blocks.1.attn.hook_z", cache, positions="image")]
    for rows, given in ((clean, entries), (clean[0], one)):
        kw: dict[str, Any] = dict(max_new_tokens=6, progress=False, eos_token_id=[], max_rows=4)
        fast, plain = (generation_sweep(model, rows, given, engine=engine, **kw) for engine in ("suffix", "naive"))
        assert fast.tokens == plain.tokens
        assert len({tuple(ids) for ids in fast.tokens[0]}) > 3, "the entries say the same"
