"""VEE, ENA, VEENA: the formulas by hand, where each phase acts, and that what is saved does the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.cases import relative_error
from tests.circuits.tiny import ready as tiny
from veena_lens.emotion.enhance.veena import ena, vee, veena
from veena_lens.interventions import BoostAttention, Circuit, ScaleNeurons, Steer
from veena_lens.positions import position_mask

HEADS, NEURONS = [(1, 3), (0, 1), (1, 0)], [(1, 7), (0, 3), (1, 90)]
PICTURED = ("clip-llama", "right-padding", "qwen3_vl-plain", "llava-next")


def run(model: Any, inputs: Any, circuit: Any = ()) -> Any:
    with torch.no_grad(), model.intervene(list(circuit)):
        return model(inputs)


def patterns(model: Any, inputs: Any, circuit: Any) -> list[Any]:
    """Attention of every layer under a circuit: what the mixing of values is given."""
    with torch.no_grad(), model.intervene(list(circuit)):
        _, cache = model.run_with_cache(inputs)
    return [cache[f"blocks.{layer}.attn.hook_pattern"] for layer in range(model.cfg.n_layers)]


def pictured(model_of: Any, name: str) -> tuple[Any, Any]:
    model, inputs = tiny(model_of, name)
    return model, inputs[[row for row, n in enumerate(inputs.n_images) if n]]


# --- VEE ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", PICTURED)
@pytest.mark.parametrize("beta", [1.5, 4.0])
def test_renorm_equals_logit_and_scale_is_another_function(name: str, beta: float, model_of) -> None:
    model, inputs = pictured(model_of, name)
    renorm, logit, scale = (run(model, inputs, vee(HEADS, beta, mode=m)) for m in ("renorm", "logit", "scale"))
    assert relative_error(renorm, logit, inputs.attention_mask) < 1e-10
    assert relative_error(scale, logit, inputs.attention_mask) > 1e-6


@pytest.mark.parametrize("beta", [0.5, 1.25, 2.0, 5.0, 50.0])
def test_image_mass_follows_the_dose_in_the_first_edited_layer(beta: float, model_of) -> None:
    model, inputs = pictured(model_of, "clip-llama")
    images, rows = inputs.image_mask, position_mask(inputs, "query")
    before = patterns(model, inputs, [])[0]
    after = patterns(model, inputs, vee(HEADS, beta))[0]
    for row in range(len(images)):
        mass = before[row][..., images[row]].sum(-1)[:, rows[row]]
        now = after[row][..., images[row]].sum(-1)[:, rows[row]]
        torch.testing.assert_close(now[1], beta * mass[1] / (1 + (beta - 1) * mass[1]), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(now[0], mass[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(after[row].sum(-1), before[row].sum(-1), rtol=1e-10, atol=1e-12)


def test_scale_multiplies_the_weights_on_the_picture_and_leaves_the_others(model_of) -> None:
    model, inputs = pictured(model_of, "clip-llama")
    before, after = (patterns(model, inputs, c)[0] for c in ([], vee([(0, 1)], 3.0, mode="scale", phase="prefill")))
    rows, images = position_mask(inputs, "query"), inputs.image_mask
    by_hand = before.clone()
    for row in range(len(images)):
        by_hand[row, 1] = torch.where(rows[row][:, None] & images[row], 3 * before[row, 1], before[row, 1])
    torch.testing.assert_close(after, by_hand, rtol=1e-12, atol=1e-12)


def answered(model_of: Any) -> tuple[Any, Any]:
    """A batch of one question with three answer tokens, which stand for generated ones."""
    model, inputs = pictured(model_of, "clip-llama")
    inputs = inputs[[0]].left_padded()
    return model, inputs.with_answer(torch.tensor([[11, 12, 13]]))


@pytest.mark.parametrize(
    ("phase", "where"), [("both", "query+generated"), ("prefill", "query"), ("decode", "generated")]
)
def test_a_phase_edits_its_rows_and_no_others(phase: str, where: str, model_of) -> None:
    model, inputs = answered(model_of)
    before, after = (patterns(model, inputs, c)[0] for c in ([], vee([(0, 1), (0, 2)], 4.0, phase=phase)))
    changed = ((after - before).abs() > 1e-9).any(-1)[0]
    assert torch.equal(changed[1], position_mask(inputs, where)[0])
    assert torch.equal(changed[1], changed[2]) and not changed[[0, 3, 4, 5]].any()


def test_phase_paper_parts_early_and_late_heads_at_the_key_layer(model_of) -> None:
    model, inputs = answered(model_of)
    circuit = vee([(0, 1), (1, 2)], 4.0, phase="paper", key_layer=0)
    assert [(part.layer, part.queries) for part in circuit] == [(0, "query"), (1, "generated")]
    late_alone = vee([(1, 2)], 4.0, phase="decode")
    both, late = run(model, inputs, circuit), run(model, inputs, late_alone)
    query, said = position_mask(inputs, "query")[0], position_mask(inputs, "generated")[0]
    assert torch.equal(late[0, ~said], run(model, inputs)[0, ~said]), "a late head leaves the prompt alone"
    assert (both - late)[0, query].abs().max() > 1e-9


def test_heads_are_grouped_by_layer_each_once_and_told_in_the_record() -> None:
    circuit = vee([*HEADS, (1, 3)], 2.5, mode="scale", keys="image+text")
    assert [(p.layer, list(p.heads), p.factor, p.mode, p.keys) for p in circuit] == [
        (0, [1], 2.5, "scale", "image+text"),
        (1, [0, 3], 2.5, "scale", "image+text"),
    ]
    assert circuit.meta["beta"] == 2.5 and circuit.meta["heads"][0] == [1, 3]


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: vee([], 2.0), "list of heads is empty"),
        (lambda: vee(HEADS, phase="late"), "phase='late' must be one of both, paper, prefill, decode"),
        (lambda: vee(HEADS, phase="paper"), "give key_layer="),
        (lambda: vee(HEADS, 0.0), "must be a positive number"),
        (lambda: ena([], 2.0), "list of neurons is empty"),
        (lambda: ena(NEURONS, variant="times"), "variant='times' must be one of factor, add, positive"),
        (lambda: ena(NEURONS, variant="positive"), "needs weights=, one number for each neuron"),
        (lambda: ena(NEURONS, variant="positive", weights=[1.0]), "one number for each neuron"),
        (lambda: ena(NEURONS, variant="add"), "needs model= and activations="),
        (lambda: ena(NEURONS, variant="add", model=object(), activations=[1.0]), "one number for each neuron"),
        (lambda: veena([], []), "neither heads nor neurons"),
    ],
)
def test_what_would_do_nothing_or_is_unknown_is_refused(call: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        call()


# --- ENA ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["clip-llama", "mlp-bias", "text-gelu-tanh", "qwen3_vl-plain"])
def test_gamma_everywhere_equals_scaled_rows_of_w_out(name: str, model_of) -> None:
    model, inputs = any_case(model_of, name)
    edited = run(model, inputs, ena(NEURONS, 2.7, positions="all"))
    plain = run(model, inputs)
    weights = {layer: model.blocks[layer].mlp.W_out for layer in (0, 1)}  # views of the parameters
    kept = {layer: w.detach().clone() for layer, w in weights.items()}
    try:
        with torch.no_grad():
            for layer, neuron in NEURONS:
                weights[layer][neuron] *= 2.7
        by_hand = run(model, inputs)
    finally:
        with torch.no_grad():
            for layer, w in weights.items():
                w.copy_(kept[layer])
    assert relative_error(edited, by_hand, inputs.attention_mask) < 1e-11
    assert relative_error(edited, plain, inputs.attention_mask) > 1e-6
    assert torch.equal(run(model, inputs), plain)


def any_case(model_of: Any, name: str) -> tuple[Any, Any]:
    from tests.cases import BY_NAME, counted, raw_inputs

    if name in BY_NAME:
        model = model_of(BY_NAME[name], casts="none")
        return model, model.inputs_from_hf(**counted(raw_inputs(BY_NAME[name])))
    return tiny(model_of, name)


def test_gamma_at_the_last_token_leaves_the_logits_before_it(model_of) -> None:
    model, inputs = answered(model_of)
    plain, edited = run(model, inputs), run(model, inputs, ena(NEURONS, 3.0, positions="last"))
    at = inputs.spans[0].last
    assert torch.equal(edited[0, :at], plain[0, :at]) and not torch.equal(edited[0, at], plain[0, at])


def test_variant_add_is_the_steering_of_its_formula(model_of) -> None:
    model, inputs = pictured(model_of, "clip-llama")
    means = [0.5, -2.0, 3.0]
    circuit = ena(NEURONS, 2.5, variant="add", model=model, activations=means)
    assert [type(part) for part in circuit] == [Steer, Steer] and [part.layer for part in circuit] == [0, 1]
    W = [model.blocks[layer].mlp.W_out.detach() for layer in (0, 1)]
    first, second = 1.5 * -2.0 * W[0][3], 1.5 * (0.5 * W[1][7] + 3.0 * W[1][90])
    by_hand = [Steer(0, first, 1.0, "last+generated"), Steer(1, second, 1.0, "last+generated")]
    assert relative_error(run(model, inputs, circuit), run(model, inputs, by_hand), inputs.attention_mask) < 1e-12
    nothing = ena(NEURONS, 1.0, variant="add", model=model, activations=means)
    assert torch.equal(run(model, inputs, nothing), run(model, inputs))


def test_variant_add_equals_the_factor_where_activations_are_their_means(model_of) -> None:
    model, inputs = pictured(model_of, "clip-llama")
    inputs = inputs[[0]]
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
    last = inputs.spans[0].last
    means = cache["blocks.1.mlp.hook_post"][0, last, [7, 90]].tolist()
    chosen = [(1, 7), (1, 90)]
    added = run(model, inputs, ena(chosen, 4.0, variant="add", model=model, activations=means, positions="last"))
    assert relative_error(added, run(model, inputs, ena(chosen, 4.0, positions="last"))) < 1e-12


# --- VEENA -------------------------------------------------------------------------------------------
def test_variant_positive_amplifies_only_what_pushes_along(model_of) -> None:
    model, inputs = pictured(model_of, "clip-llama")
    chosen, weights, hook = [(1, 90), (1, 7)], torch.tensor([2.0, -0.1], dtype=torch.float64), "blocks.1.mlp.hook_post"
    with torch.no_grad():
        _, plain = model.run_with_cache(inputs, names_filter=[hook])
        with model.intervene(ena(chosen, 3.0, variant="positive", weights=weights.tolist(), positions="all")):
            _, cache = model.run_with_cache(inputs, names_filter=[hook])
    before, after = plain[hook][..., [90, 7]], cache[hook][..., [90, 7]]
    along = (before * weights > 0) & inputs.attention_mask[..., None]
    assert bool(along.any()) and bool((before * weights < 0).any())
    torch.testing.assert_close(after, torch.where(along, 3 * before, before))
    silent = ena(chosen, 3.0, variant="positive", weights=[0.0, 0.0], positions="all")
    assert torch.equal(run(model, inputs, silent), run(model, inputs)), "what writes across the direction stays"
    with pytest.raises(ValueError, match="1 signs for 2 neurons"):
        ScaleNeurons(1, [7, 90], signs=[1.0])


def test_veena_is_vee_and_ena_and_each_alone_where_the_other_is_empty(model_of) -> None:
    model, inputs = pictured(model_of, "clip-llama")
    both = veena(HEADS, NEURONS, 3.0, 2.0, mode="scale", positions="last")
    parts = [*vee(HEADS, 3.0, mode="scale"), *ena(NEURONS, 2.0, positions="last")]
    assert torch.equal(run(model, inputs, both), run(model, inputs, parts))
    assert [type(p) for p in both] == [BoostAttention] * 2 + [ScaleNeurons] * 2
    assert both.meta["method"] == "VEENA" and both.meta["beta"] == 3.0 and both.meta["gamma"] == 2.0
    assert list(veena(HEADS, [], 3.0)) == list(vee(HEADS, 3.0))
    assert list(veena([], NEURONS, gamma=3.0)) == list(ena(NEURONS, 3.0))
    with pytest.raises(TypeError, match=r"unknown settings \['betta'\]"):
        veena(HEADS, NEURONS, betta=2.0)


def test_a_saved_circuit_does_what_it_did(model_of, tmp_path: Path) -> None:
    model, inputs = pictured(model_of, "clip-llama")
    made = veena(HEADS, NEURONS, 2.0, 3.0, variant="add", model=model, activations=[1.0, 2.0, 3.0])
    loaded = Circuit.load(made.save(tmp_path / "circuit.safetensors"))
    assert torch.equal(run(model, inputs, loaded), run(model, inputs, made))
    assert loaded.meta == made.meta and loaded.name == "VEENA beta 2, gamma 3"


@given(
    units=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), min_size=1, max_size=20),
    beta=st.floats(0.1, 10, allow_nan=False),
)
def test_no_head_is_lost_or_boosted_twice(units: list[tuple[int, int]], beta: float) -> None:
    circuit = vee(units, beta)
    found = [(part.layer, head) for part in circuit for head in part.heads]
    assert sorted(found) == sorted(set(units)) and found == sorted(found)
    assert {part.factor for part in circuit} == {beta}
