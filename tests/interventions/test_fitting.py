"""What does not fit a model, its rows, its positions or its images is refused before the first block runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.cases import BY_NAME, build_hf, counted, native_model, raw_inputs
from veena_lens import HookedVLM
from veena_lens.interventions import (
    Ablate,
    BoostAttention,
    Circuit,
    KnockOutAttention,
    Patch,
    ScaleNeurons,
    Steer,
    Tile,
)
from veena_lens.interventions.base import plain


@pytest.fixture(scope="module")
def runs() -> dict[str, Any]:
    """A model with two rows of one and two images, a cache of them, and one of another architecture."""
    model = native_model(BY_NAME["clip-llama"], casts="none")
    inputs = model.inputs_from_hf(**counted(raw_inputs(BY_NAME["clip-llama"])))
    qwen = native_model(BY_NAME["qwen2_vl-plain"], casts="none")
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
        _, other = qwen.run_with_cache(qwen.inputs_from_hf(**raw_inputs(BY_NAME["qwen2_vl-plain"])))
        _, swapped = model.run_with_cache(inputs[[1, 0]])
    return {"model": model, "inputs": inputs, "cache": cache, "other": other, "swapped": swapped}


OUT, Z, TOWER = "blocks.1.hook_mlp_out", "blocks.0.attn.hook_z", "vision.blocks.0.hook_mlp_out"
REFUSED: dict[str, tuple[Any, str]] = {
    "patch-other-model": (lambda r: Patch(Z, r["other"]), "made by another model.*Qwen2VL.*source=cache"),
    "mean-of-other-model": (lambda r: Ablate(Z, value="mean", reference=r["other"]), "made by another model"),
    "patch-other-width": (lambda r: Patch("blocks.1.mlp.hook_post", torch.zeros(2, 17, 7)), "d_mlp 7.*d_mlp 96"),
    "patch-other-axes": (lambda r: Patch(OUT, torch.zeros(2, 17, 6, 8)), "axes batch pos d_model"),
    "patch-other-heads": (lambda r: Patch(Z, torch.zeros(2, 17, 4, 8)), "n_heads 4.*n_heads 6"),
    "patch-other-length": (lambda r: Patch(OUT, torch.zeros(2, 5, 48)), "of pos 5; this run has pos 17"),
    "patch-other-rows": (lambda r: Patch(OUT, torch.zeros(3, 17, 48)), "3 rows, the run 2"),
    "patch-too-few-positions": (lambda r: Patch(OUT, r["swapped"], positions="image"), r"\[4, 8\].*\[8, 4\]"),
    "patch-fewer-pictures": (lambda r: Patch(TOWER, r["swapped"][TOWER][:2], positions="all"), "crop 2.*crop 3"),
    "patch-fewer-features": (
        lambda r: Patch("hook_image_features", torch.zeros(8, 48), positions="image"),
        "n_image_tokens 8.*n_image_tokens 12",
    ),
    "ablate-other-width": (lambda r: Ablate(OUT, value=torch.zeros(7)), "d_model 48"),
    "ablate-more-axes": (lambda r: Ablate(OUT, value=torch.zeros(1, 1, 1, 48)), "only the axes"),
    "layer": (lambda r: Steer(2, torch.zeros(48)), "layer 2 .*layers 0 to 1"),
    "steer-width": (lambda r: Steer(0, torch.zeros(50)), "50 entries.*48"),
    "alpha": (lambda r: Steer(0, torch.zeros(48), alpha=float("nan")), "alpha=nan"),
    "head": (lambda r: Ablate(Z, heads=[6]), "head 6"),
    "key-value-head": (lambda r: Ablate("blocks.0.attn.hook_k", heads=[2]), "head 2"),
    "boosted-head": (lambda r: BoostAttention(0, heads=[-7]), "head -7"),
    "cut-head": (lambda r: KnockOutAttention(0, heads=[9]), "head 9"),
    "neuron": (lambda r: ScaleNeurons(1, [96]), "neuron 96"),
    "position": (lambda r: Ablate(OUT, positions=99), "position 99"),
    "positions": (lambda r: Ablate(OUT, positions=[0, -30]), "position -30"),
    "mask": (lambda r: Ablate(OUT, positions=torch.ones(2, 3).bool()), r"\[2, 3\]"),
    "tile": (lambda r: Ablate(OUT, positions=Tile(4)), "Tile.tile=4.*selects no position"),
    "position-of-a-picture": (lambda r: Ablate(TOWER, positions=5), "position 5 is outside images of 5"),
    "site": (lambda r: Ablate("blocks.0.attn.hook_zz"), "hook_zz"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_before_anything_runs(name: str, runs: dict[str, Any]) -> None:
    model, inputs = runs["model"], runs["inputs"]
    make, telling = REFUSED[name]
    started: list[str] = []

    def start(tensor: Any, hook: Any) -> None:
        started.append(hook.name)

    for run in (model, lambda x: model.generate(x, max_new_tokens=1, return_type="tokens")):
        with model.hooks([("vision.hook_embed", start), ("hook_embed", start)]):
            with pytest.raises((ValueError, IndexError), match=f"(?s){telling}"), model.intervene([make(runs)]):
                run(inputs)
    assert started == []


def test_a_cache_of_the_same_weights_elsewhere_fits(runs: dict[str, Any]) -> None:
    """A model that was loaded twice, also at another precision, is one model; other weights are another."""
    case = BY_NAME["clip-llama"]
    again = HookedVLM.from_hf(build_hf(case), casts="none")
    with again.intervene([Patch(Z, runs["cache"])]):
        again(runs["inputs"])
    with again.to(torch.bfloat16).intervene([Patch(Z, runs["cache"])]):  # type: ignore[attr-defined]
        again(runs["inputs"])
    with torch.no_grad():
        again.blocks[1].mlp.W_out.mul_(2)
    with pytest.raises(ValueError, match="another model"):
        again.intervene([Patch(Z, runs["cache"])])
    with again.intervene([Patch(Z, runs["cache"][Z])]):  # on purpose
        again(runs["inputs"])


def test_lists_for_other_rows_are_refused_even_when_empty(runs: dict[str, Any]) -> None:
    model, inputs = runs["model"], runs["inputs"]
    steer = Steer(0, torch.ones(48))
    for lists in ([[], [], []], [[steer]], [[]]):
        with model.intervene(per_row=lists), pytest.raises(ValueError, match=f"{len(lists)} lists for a batch of 2"):
            model(inputs)
    with model.intervene(per_row=[[], [steer]]), model.intervene(per_row=[[steer]]):
        with pytest.raises(ValueError, match="1 lists for a batch of 2"):
            model(inputs)
    with model.intervene(per_row=[[], [steer]]), model.intervene(per_row=[[steer], []]):
        nested = model(inputs)
    with model.intervene(per_row=[steer, steer]):  # a bare intervention is a list of one
        torch.testing.assert_close(model(inputs), nested, rtol=1e-12, atol=1e-12)
    model(inputs[:1])
    with pytest.raises(TypeError, match="'x' is not an intervention"):
        model.intervene(per_row=[["x"], []])


@pytest.mark.parametrize("site", [Z, "blocks.1.attn.hook_pattern", "blocks.0.hook_resid_post"])
@pytest.mark.parametrize("positions", ["query", "last", "all", "last+generated"])
def test_a_bare_source_acts_alike_with_and_without_kept_keys(site: str, positions: str, runs: dict[str, Any]) -> None:
    """Without a cache of keys and values the prompt runs again and again, each time longer than the source."""
    model, row = runs["model"], runs["inputs"][:1].without_padding()
    with torch.no_grad():
        value = model.run_with_cache(row, names_filter=site)[1][site]
    source = value.flip(1) if "pattern" in site else 3 * value  # heads in another order keep the rows' sums
    kw: dict[str, Any] = dict(max_new_tokens=5, return_type="tokens", eos_token_id=[])
    with model.intervene([Patch(site, source, positions=positions)]):
        kept, again = (model.generate(row, use_past_kv_cache=use, **kw) for use in (True, False))
    assert torch.equal(kept, again)


def test_numbers_of_numpy_and_masks_travel_and_print(tmp_path: Any, runs: dict[str, Any]) -> None:
    """Heads that a table of results names are numpy's numbers; a mask prints its size, not its entries."""
    model, inputs = runs["model"], runs["inputs"]
    mask = torch.zeros(inputs.shape, dtype=torch.bool)
    mask[:, -2:] = True
    items = [
        Ablate("blocks.0.attn.hook_z", heads=range(1, 3), positions=[np.int64(-1)]),
        Ablate("blocks.1.attn.hook_z", heads=(3,), positions=mask),
        Steer(1, torch.ones(48), 2.0, positions=mask),
        ScaleNeurons(1, range(20), 3.0, positions=mask),
        BoostAttention(1, heads=[0], keys=mask.roll(-2, 1), queries=mask),
    ]
    circuit = Circuit(items, meta={"effect": np.float32(0.5), "heads": np.arange(2)})
    loaded = Circuit.load(circuit.save(tmp_path / "circuit.safetensors"))
    assert loaded.meta == {"effect": 0.5, "heads": [0, 1]}
    with torch.no_grad():
        with model.intervene(circuit):
            first = model(inputs)
        with model.intervene(loaded):
            assert torch.equal(model(inputs), first)
    assert plain([np.int64(3), torch.tensor(2), np.array([1])]) == [3, 2, [1]]
    for item in (*circuit, *loaded):
        assert len(repr(item).splitlines()) == 1 and len(repr(item)) < 200, item
    assert "<mask [2, 17], 4 chosen>" in repr(items[2]) and "neurons=[0, 1, 2, 3, ... 19 (20)]" in repr(items[3])
