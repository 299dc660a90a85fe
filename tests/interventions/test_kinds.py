"""Patch, Ablate, ScaleNeurons, BoostAttention and Circuit: equal to hooks by hand, cached or not, row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import BY_NAME, counted, raw_inputs, relative_error
from veena_lens.interventions import (
    Ablate,
    BoostAttention,
    Circuit,
    Patch,
    ScaleNeurons,
    Steer,
    SteerKeepingNorm,
    SuppressHeads,
)
from veena_lens.positions import position_mask

NAME = "three-images-and-none"


@pytest.fixture
def ready(model_of):
    model = model_of(BY_NAME[NAME], casts="none")
    inputs = model.inputs_from_hf(**counted(raw_inputs(BY_NAME[NAME])))
    with torch.no_grad():
        logits, cache = model.run_with_cache(inputs)
    return model, inputs, logits, cache


def other_pictures(model: Any) -> Any:
    raw = counted(raw_inputs(BY_NAME[NAME]))
    raw["pixel_values"] = torch.randn(raw["pixel_values"].shape, dtype=torch.float64)
    return model.inputs_from_hf(**raw)


KINDS = {
    "ablate a head": lambda cache: Ablate("blocks.1.attn.hook_z", heads=[1]),
    "ablate a pattern": lambda cache: Ablate("blocks.1.attn.hook_pattern", heads=[-1], positions="query"),
    "ablate neurons to the mean": lambda cache: Ablate(
        "blocks.0.mlp.hook_post", neurons=[0, 5], value="mean", reference=cache
    ),
    "ablate the tower's neurons": lambda cache: Ablate("vision.blocks.1.mlp.hook_post", neurons=[3, 4, 5]),
    "ablate image features": lambda cache: Ablate("hook_image_features"),
    "scale neurons": lambda cache: ScaleNeurons(1, list(range(20)), 5.0, positions="query+generated"),
    "boost renorm": lambda cache: BoostAttention(1, [0, 3], factor=4.0),
    "boost scale": lambda cache: BoostAttention(1, [0, 3], factor=4.0, mode="scale"),
    "boost mul": lambda cache: BoostAttention(0, factor=4.0, mode="mul"),
    "boost abs": lambda cache: BoostAttention(0, factor=4.0, mode="abs"),
    "turn": lambda cache: SteerKeepingNorm(1, torch.arange(48, dtype=torch.float64) - 20, 0.8),
    "quiet heads": lambda cache: SuppressHeads(1, keep=0.5, factor=0.1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_intervention_acts_alike_in_every_way_of_running(kind: str, ready) -> None:
    model, inputs, plain, cache = ready
    item = KINDS[kind](cache)
    options = dict(max_new_tokens=8, return_type="tokens", eos_token_id=[])
    with torch.no_grad():
        with model.intervene([item]):
            ours = model(inputs)
            cached, _ = model.run_with_cache(inputs)
            steps = model.generate(inputs, **options)
            whole = model.generate(inputs, use_past_kv_cache=False, **options)
        left = model(inputs)
    assert relative_error(ours, plain, inputs.attention_mask) > 1e-4, "it does nothing"
    assert relative_error(cached, ours, inputs.attention_mask) < 1e-12
    assert torch.equal(steps, whole)
    assert torch.equal(left, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_one_row_is_edited_and_the_others_are_not(kind: str, ready) -> None:
    model, inputs, plain, cache = ready
    item = KINDS[kind](cache)
    row = next(i for i, s in enumerate(inputs.spans) if s.images)
    lists: list[list[Any]] = [[] for _ in range(len(inputs))]
    lists[row] = [item]
    with torch.no_grad():
        with model.intervene([item]):
            every = model(inputs)
        with model.intervene(per_row=lists):
            one = model(inputs)
    for i in range(len(inputs)):
        expected = every if i == row else plain
        keep = inputs.attention_mask[i]
        assert relative_error(one[i][keep], expected[i][keep]) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_a_circuit_comes_back_from_its_file_as_it_was(kind: str, ready, tmp_path) -> None:
    model, inputs, _, cache = ready
    circuit = Circuit([KINDS[kind](cache), Steer(0, torch.ones(48, dtype=torch.float64))], "test", {"seed": 1})
    back = Circuit.load(circuit.save(tmp_path / "circuit.safetensors"))
    assert back.name == "test" and back.meta == {"seed": 1} and len(back) == 2
    assert repr(back[0]).split(",")[0] == repr(circuit[0]).split(",")[0]
    with torch.no_grad():
        with model.intervene(circuit):
            first = model(inputs)
        with model.intervene(back):
            assert torch.equal(model(inputs), first)


@pytest.mark.parametrize("positions", ["last", "query", "image", "all", slice(2, 5)], ids=str)
@pytest.mark.parametrize("part", ["hook_resid_pre", "attn.hook_z", "attn.hook_k", "attn.hook_pattern", "mlp.hook_post"])
def test_a_patch_equals_a_hook_written_by_hand(part: str, positions: Any, ready) -> None:
    model, inputs, _plain, _ = ready
    source = other_pictures(model)
    name = f"blocks.1.{part}"
    with torch.no_grad():
        _, donor = model.run_with_cache(source)
        mask = position_mask(inputs, positions)

        def by_hand(value: Tensor, hook: Any) -> Tensor:
            out = value.clone()
            if part == "attn.hook_pattern":
                out.transpose(1, 2)[mask] = donor[name].transpose(1, 2)[mask]
            else:
                out[mask] = donor[name][mask]
            return out

        expected = model.run_with_hooks(inputs, fwd_hooks=[(name, by_hand)])
        with model.intervene([Patch(name, donor, positions=positions)]):
            ours = model(inputs)
    assert relative_error(ours, expected, inputs.attention_mask) < 1e-12


def test_a_patch_between_runs_of_unequal_length_goes_position_by_position(ready) -> None:
    model, inputs, _, _ = ready
    short, long = inputs[0], inputs.with_answer([[7, 8, 9]] * len(inputs))[0]
    with torch.no_grad():
        _, donor = model.run_with_cache(long)
        with model.intervene([Patch("blocks.0.hook_resid_post", donor, positions="query")]):
            _, cache = model.run_with_cache(short)
    here, there = cache.at("query", "resid_post", 0), donor.at("query", "resid_post", 0)
    assert relative_error(here, there) < 1e-12


def test_patching_a_run_with_itself_changes_nothing(ready) -> None:
    model, inputs, plain, cache = ready
    with torch.no_grad(), model.intervene([Patch("blocks.0.attn.hook_z", cache, heads=[0, 2], positions="all")]):
        assert relative_error(model(inputs), plain, inputs.attention_mask) < 1e-12


def test_renorm_multiplies_the_weights_and_renormalises_the_row(ready) -> None:
    """A' = factor A on the keys, divided by the new sum: the bias of the fused kernel is that same function."""
    model, inputs, _, _ = ready
    queries, keys = position_mask(inputs, "query"), inputs.image_mask

    def by_hand(pattern: Tensor, hook: Any) -> Tensor:
        weight = torch.ones_like(pattern)
        weight[:, [0, 3]] = torch.where(queries[:, None, :, None] & keys[:, None, None], 4.0, 1.0).double()
        new = pattern * weight
        return new / new.sum(-1, keepdim=True).clamp(min=1e-300)

    with torch.no_grad():
        expected = model.run_with_hooks(inputs, fwd_hooks=[("blocks.1.attn.hook_pattern", by_hand)])
        with model.intervene([BoostAttention(1, [0, 3], factor=4.0)]):
            ours = model(inputs)
            mass = model.attention(inputs, "query", "image", layers=[1]).values
        before = model.attention(inputs, "query", "image", layers=[1]).values
    assert relative_error(ours, expected, inputs.attention_mask) < 1e-12
    m = before[:, 0, 0].sum(-1)
    assert relative_error(mass[:, 0, 0].sum(-1), 4 * m / (1 + 3 * m)) < 1e-12


@pytest.mark.parametrize("mode", ["renorm", "logit", "scale", "mul", "abs"])
def test_a_factor_of_one_changes_no_bit_worth_of_a_logit(mode: str, ready) -> None:
    model, inputs, plain, _ = ready
    with torch.no_grad(), model.intervene([BoostAttention(1, factor=1.0, mode=mode), ScaleNeurons(0, [1, 2], 1.0)]):
        assert relative_error(model(inputs), plain, inputs.attention_mask) < 1e-13


def test_scaling_neurons_equals_scaling_rows_of_w_out(ready) -> None:
    model, inputs, _, _ = ready
    with torch.no_grad():
        with model.intervene([ScaleNeurons(1, [4, 9], 3.0, positions="all")]):
            ours = model(inputs)
        kept = model.blocks[1].mlp.W_out[[4, 9]].clone()
        model.blocks[1].mlp.W_out[[4, 9]] *= 3.0
        expected = model(inputs)
        model.blocks[1].mlp.W_out[[4, 9]] = kept
    assert relative_error(ours, expected, inputs.attention_mask) < 1e-12


@pytest.mark.parametrize(
    ("make", "telling"),
    [
        (lambda: Ablate("blocks.9.attn.hook_z"), "blocks.9"),
        (lambda: Ablate("blocks.0.attn.hook_z", heads=[17]), "head 17"),
        (lambda: Ablate("blocks.0.hook_resid_pre", heads=[0]), "axes"),
        (lambda: Ablate("blocks.0.mlp.hook_post", neurons=[]), "empty"),
        (lambda: Ablate("blocks.0.attn.hook_z", value="mean"), "reference"),
        (lambda: Ablate("blocks.0.attn.hook_z", positions="lats"), "lats"),
        (lambda: ScaleNeurons(5, [0]), "layer 5"),
        (lambda: ScaleNeurons(0, [10_000]), "10000"),
        (lambda: BoostAttention(0, factor=-1.0), "positive"),
        (lambda: BoostAttention(0, mode="louder"), "louder"),
        (lambda: Ablate("vision.blocks.0.hook_resid_pre", positions="query"), "text"),
    ],
)
def test_what_cannot_act_is_refused_before_anything_runs(make: Any, telling: str, ready) -> None:
    model, inputs, _, _ = ready
    with pytest.raises(ValueError, match=telling), model.intervene([make()]):
        model(inputs)


def test_boosting_a_picture_that_is_not_there_is_refused(model_of) -> None:
    model = model_of(BY_NAME[NAME])
    text = torch.tensor([[5, 6, 7]])
    with pytest.raises(ValueError, match="no row"), model.intervene([BoostAttention(0)]):
        model(text)


def test_alike_edits_of_several_rows_act_as_one_and_equal_each_row_alone(ready) -> None:
    model, inputs, plain, _ = ready
    strong = [BoostAttention(1, [0, 2], factor=3.0, mode="scale") for _ in range(3)]
    weak, quiet = BoostAttention(1, [0, 2], factor=0.5, mode="scale"), SuppressHeads(1, keep=0.5)
    lists: list[list[Any]] = [[strong[0], quiet], [strong[1], quiet], [quiet, strong[2]], [weak]]
    lists += [[]] * (len(inputs) - len(lists))
    lists = lists[: len(inputs)]
    with torch.no_grad():
        with model.intervene(per_row=lists):
            # Place 0: the strong boosts of rows 0 and 1, row 2's quieting, row 3's; place 1: quieting, row 2's boost.
            groups = [x.of for x in model._edits.applied]
            assert groups[:2] == [(0, 1), (2,)] and (0, 1) in groups[2:]
            together = model(inputs)
        for row, mine in enumerate(lists):
            with model.intervene(mine):
                alone = model(inputs)
            keep = inputs.attention_mask[row]
            assert relative_error(together[row][keep], (alone if mine else plain)[row][keep]) < 1e-12


def test_empty_selection_of_one_row_among_alike_ones_is_named(ready) -> None:
    model, inputs, _, _ = ready
    boost = BoostAttention(1, queries=slice(0, 1))
    held = [bool(m[0]) for m in inputs.attention_mask]  # a padded row has no token there
    assert any(held) and not all(held), "the case must have padded rows and one without"
    with (
        model.intervene(per_row=[[boost]] * len(inputs)),
        pytest.raises(ValueError, match=f"no position in row {held.index(False)} "),
    ):
        model(inputs)
