"""Steer and `model.intervene`: equal to hooks written by hand in every way of running, and gone afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.cases import BY_NAME, IMAGE_TOKEN, PAD, build_hf, counted, native_model, raw_inputs, relative_error
from veena_lens.interventions import Steer
from veena_lens.positions import position_mask

D = 48


def vector(seed: int = 0, n: int = D) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def ready(model_of):
    def get(name: str = "three-images-and-none", **kw: Any) -> tuple[Any, Any]:
        model = model_of(BY_NAME[name], **kw)
        return model, model.inputs_from_hf(**counted(raw_inputs(BY_NAME[name])))

    return get


def adds(mask: Tensor, amount: Tensor) -> Any:
    """A hook by hand."""
    return lambda value, hook: value + mask[..., None] * amount


POSITIONS = ["last", "query", "image", "text", "all", "last+image", "prompt", 9, [3, -1], slice(8, 12)]


@pytest.mark.parametrize("positions", POSITIONS, ids=str)
@pytest.mark.parametrize("layer", [0, 1, -1])
def test_steering_equals_a_hook_written_by_hand(layer: int, positions: Any, ready) -> None:
    model, inputs = ready()
    mask = position_mask(inputs, positions)
    hook = (f"blocks.{layer % 2}.hook_resid_post", adds(mask, 3.0 * vector()))
    with torch.no_grad():
        expected = model.run_with_hooks(inputs, fwd_hooks=[hook])
        with model.intervene([Steer(layer, vector(), alpha=3.0, positions=positions)]):
            ours = model(inputs)
            cached, cache = model.run_with_cache(inputs)
            hooked = model.run_with_hooks(inputs, fwd_hooks=[])
        plain, before = model.run_with_cache(inputs)
    assert torch.equal(ours, expected) and torch.equal(cached, ours) and torch.equal(hooked, ours)
    assert relative_error(ours, plain, inputs.attention_mask) > 1e-3
    change = cache["resid_post", layer] - before["resid_post", layer]
    assert relative_error(change, mask[..., None] * 3.0 * vector()) < 1e-9


def test_steering_leaves_other_positions_of_its_layer_alone(ready) -> None:
    model, inputs = ready()
    with torch.no_grad():
        _, before = model.run_with_cache(inputs)
        with model.intervene([Steer(0, vector(), positions="last")]):
            _, after = model.run_with_cache(inputs)
    mask = position_mask(inputs, "last")
    assert torch.equal(after["resid_post", 0][~mask], before["resid_post", 0][~mask])
    assert torch.equal(after["resid_post", 1][~mask], before["resid_post", 1][~mask])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_alpha_zero_leaves_every_bit(dtype: torch.dtype, ready) -> None:
    model = ready(dtype=dtype)[0]
    inputs = model.inputs_from_hf(**raw_inputs(BY_NAME["three-images-and-none"], dtype))
    with torch.no_grad():
        plain = model(inputs)
        with model.intervene([Steer(0, vector(), alpha=0.0, positions="all")]):
            assert torch.equal(model(inputs), plain)


def test_empty_list_changes_nothing(ready) -> None:
    model, inputs = ready()
    with torch.no_grad():
        plain = model(inputs)
        with model.intervene([]):
            assert torch.equal(model(inputs), plain)
        with model.intervene(per_row=[[], [], []]):
            assert torch.equal(model(inputs), plain)


def test_two_steers_add_up_in_any_order(ready) -> None:
    model, inputs = ready()
    one, other = Steer(0, vector(1), positions="query"), Steer(0, vector(2), alpha=-2.0, positions="query")
    both = Steer(0, vector(1) - 2 * vector(2), positions="query")
    results = []
    for interventions in ([one, other], [other, one], [both]):
        with torch.no_grad(), model.intervene(interventions):
            results.append(model(inputs))
    assert relative_error(results[0], results[1]) < 1e-6 and relative_error(results[0], results[2]) < 1e-6


def test_nested_blocks_act_together_and_end_one_by_one(ready) -> None:
    model, inputs = ready()
    one, other = Steer(0, vector(1), positions="query"), Steer(1, vector(2), positions="last")
    with torch.no_grad():
        with model.intervene([one, other]):
            expected = model(inputs)
        with model.intervene([one]):
            outer = model(inputs)
            with model.intervene([other]):
                assert torch.equal(model(inputs), expected)
            assert torch.equal(model(inputs), outer)
        assert not torch.equal(model(inputs), outer)


def test_opposite_steer_undoes_itself(ready) -> None:
    model, inputs = ready(casts="none")
    with torch.no_grad():
        plain = model(inputs)
        with model.intervene([Steer(0, vector(), positions="all"), Steer(0, -vector(), positions="all")]):
            assert relative_error(model(inputs), plain, inputs.attention_mask) < 1e-12


# --- rows --------------------------------------------------------------------------------------------
def test_per_row_equals_row_by_row(ready) -> None:
    model, inputs = ready(casts="none")
    lists = [
        [Steer(0, vector(1), alpha=2.0, positions="image"), Steer(1, vector(2), positions="last")],
        [Steer(0, vector(3), positions="query")],
        [],
    ]
    with torch.no_grad():
        with model.intervene(per_row=lists):
            together = model(inputs)
        for row, mine in enumerate(lists):
            with model.intervene(mine):
                alone = model(inputs[row])
            keep = inputs.attention_mask[row : row + 1]
            assert relative_error(together[row : row + 1], alone, keep) < 1e-12


@given(
    rows=st.lists(
        st.lists(
            st.tuples(
                st.integers(0, 1),
                st.floats(-3, 3),
                st.sampled_from(["last", "query", "text", "all"]),
                st.integers(0, 3),
            ),
            max_size=2,
        ),
        min_size=3,
        max_size=3,
    )
)
def test_any_per_row_lists_equal_hooks_written_by_hand(rows: list[list[tuple[int, float, str, int]]]) -> None:
    case = BY_NAME["three-images-and-none"]
    model = native_model(case, casts="none")
    inputs = model.inputs_from_hf(**counted(raw_inputs(case)))
    hooks, lists = [], []
    for row, mine in enumerate(rows):
        lists.append([Steer(layer, vector(seed), alpha, positions) for layer, alpha, positions, seed in mine])
        for layer, alpha, positions, seed in mine:
            mask = position_mask(inputs, positions)
            mask[torch.arange(3) != row] = False
            hooks.append((f"blocks.{layer}.hook_resid_post", adds(mask, alpha * vector(seed))))
    with torch.no_grad():
        expected = model.run_with_hooks(inputs, fwd_hooks=hooks)
        with model.intervene(per_row=lists):
            assert relative_error(model(inputs), expected, inputs.attention_mask) < 1e-12


def test_per_row_of_another_batch_size_raises(ready) -> None:
    model, inputs = ready()
    with model.intervene(per_row=[[], [Steer(0, vector())]]):
        with pytest.raises(ValueError, match="2 lists.*3 rows"):
            model(inputs)
    with pytest.raises(ValueError, match="per_row"):
        model.intervene([], per_row=[[]])
    with pytest.raises(ValueError, match="per_row"):
        model.intervene()


# --- generation --------------------------------------------------------------------------------------
@pytest.mark.parametrize("positions", ["last+generated", "generated", "last", "query+generated", "image", "all"])
@pytest.mark.parametrize("name", ["clip-llama", "three-images-and-none", "window-qwen2"])
def test_generation_is_steered_the_same_with_and_without_cache(name: str, positions: str) -> None:
    from transformers import SuppressTokensLogitsProcessor

    from veena_lens import HookedVLM

    model = HookedVLM.from_hf(build_hf(BY_NAME[name], gain=5.0))
    inputs = model.inputs_from_hf(**counted(raw_inputs(BY_NAME[name])))
    options = dict(max_new_tokens=12, do_sample=False, return_type="tokens", eos_token_id=[])
    options["logits_processor"] = [SuppressTokensLogitsProcessor([PAD, IMAGE_TOKEN])]
    alpha = 30.0 if positions == "image" else 5.0  # what is far away says little
    rows = [[Steer(0, vector(), alpha, positions)]] * len(inputs)
    if positions == "image":
        rows = [mine if spans.images else [] for mine, spans in zip(rows, inputs.spans, strict=True)]
    plain = model.generate(inputs, **options)
    with model.intervene(per_row=rows):
        cached = model.generate(inputs, **options)
        uncached = model.generate(inputs, use_past_kv_cache=False, **options)
    assert torch.equal(cached, uncached)
    if (name, positions) != ("window-qwen2", "image"):  # whose windows hardly reach the image
        assert not torch.equal(cached, plain), "the steering changed no token, so the test shows nothing"
    assert torch.equal(cached, by_recomputing(model, inputs, positions, alpha, rows))
    assert torch.equal(model.generate(inputs, **options), plain)


def by_recomputing(model: Any, inputs: Any, positions: str, alpha: float, rows: Any) -> Tensor:
    """Greedy tokens from whole forwards, steered by a hook written by hand; "last" stays with the prompt."""
    new = torch.zeros(len(inputs), 0, dtype=torch.long)
    for _ in range(12):
        whole = inputs.with_answer(new.tolist()) if new.shape[1] else inputs
        mask = position_mask(whole, positions)
        for row, mine in enumerate(rows):
            mask[row] &= bool(mine)
        with torch.no_grad():
            hook = ("blocks.0.hook_resid_post", adds(mask, alpha * vector()))
            logits = model.run_with_hooks(whole, fwd_hooks=[hook])[:, -1].float()
        logits[:, [PAD, IMAGE_TOKEN]] = -torch.inf
        new = torch.cat([new, logits.argmax(-1)[:, None]], 1)
    return new


def test_steering_of_an_answer_equals_steering_while_generating(ready) -> None:
    """ "generated" means the answer's tokens in a teacher-forced run."""
    model, inputs = ready("clip-llama", casts="none")
    steer = Steer(0, vector(), alpha=5.0, positions="generated")
    with torch.no_grad(), model.intervene([steer]):
        answer = model.generate(inputs, max_new_tokens=8, return_type="tokens", eos_token_id=[])
        forced = inputs.with_answer(answer.tolist())
        logits = model(forced)
    n = answer.shape[1]
    said = logits[:, -n - 1 : -1].float().argmax(-1)
    assert torch.equal(said, answer)


def test_hooks_act_at_every_step_of_generation(ready) -> None:
    model, inputs = ready("clip-llama")
    shapes: list[tuple[int, ...]] = []
    with model.hooks([("blocks.1.hook_resid_post", lambda value, hook: shapes.append(tuple(value.shape)))]):
        model.generate(inputs, max_new_tokens=5, return_type="tokens", eos_token_id=[])
    assert shapes == [(2, inputs.shape[1], D)] + [(2, 1, D)] * 4


# --- what cannot act ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: Steer(5, vector()), ValueError, "layer 5.*0 to 1"),
        (lambda: Steer(-3, vector()), ValueError, "layer -3"),
        (lambda: Steer(0, vector(n=47)), ValueError, "47.*48"),
        (lambda: Steer(0, vector().reshape(6, 8)), (ValueError, TypeError), r"6, ?8"),  # type hints are checked too
        (lambda: Steer(0, vector() * float("nan")), ValueError, "not finite"),
        (lambda: Steer(0, vector(), positions="lst"), ValueError, "lst.*last"),
        (lambda: Steer(0, vector(), positions=3.5), TypeError, "float"),
        (lambda: "steer", TypeError, "not an intervention"),
    ],
    ids=[
        "too-deep",
        "too-negative",
        "too-narrow",
        "two-axes",
        "nan",
        "unknown-word",
        "float-position",
        "no-intervention",
    ],
)
def test_intervention_that_does_not_fit_raises_before_any_computing(make: Any, error: Any, message: str, ready) -> None:
    model, inputs = ready()
    fired: list[str] = []
    with model.hooks([("hook_embed", lambda value, hook: fired.append("ran"))]):
        with pytest.raises(error, match=message):
            with model.intervene([make()]):
                model(inputs)
    assert fired == []


@pytest.mark.parametrize("positions", ["image", slice(0, 0), []], ids=str)
def test_selection_that_is_empty_in_every_row_raises(positions: Any, ready) -> None:
    model, inputs = ready("no-picture-at-all")
    with model.intervene([Steer(0, vector(), positions=positions)]):
        with pytest.raises(ValueError, match="no position"):
            model(inputs)
        with pytest.raises(ValueError, match="no position"):
            model.generate(inputs, max_new_tokens=3, return_type="tokens")


def test_position_outside_the_sequence_raises(ready) -> None:
    model, inputs = ready()
    for wrong in (99, [1, -40]):
        with pytest.raises((ValueError, IndexError), match="99|-40"):
            with model.intervene([Steer(0, vector(), positions=wrong)]):
                model(inputs)


def test_selection_empty_in_some_rows_acts_in_the_others(ready) -> None:
    model, inputs = ready(casts="none")
    with torch.no_grad():
        plain = model(inputs)
        with model.intervene([Steer(0, vector(), positions="image")]):
            steered = model(inputs)
    keep = inputs.attention_mask
    assert torch.equal(steered[1], plain[1]), "the row without a picture"
    assert relative_error(steered[[0, 2]], plain[[0, 2]], keep[[0, 2]]) > 1e-3


def test_nothing_is_left_after_an_exception(ready) -> None:
    model, inputs = ready()
    with torch.no_grad():
        plain = model(inputs)
    with pytest.raises(RuntimeError, match="on purpose"):
        with model.intervene([Steer(0, vector())]):
            raise RuntimeError("on purpose")
    with pytest.raises(ValueError, match="layer 9"):
        with model.intervene([Steer(0, vector()), Steer(9, vector())]):
            pass
    assert not [n for n, h in model.hook_dict.items() if h._forward_hooks]
    with torch.no_grad():
        assert torch.equal(model(inputs), plain)


def test_steering_runs_in_lower_precision_without_changing_dtype(ready) -> None:
    model = ready(dtype=torch.bfloat16)[0]
    inputs = model.inputs_from_hf(**raw_inputs(BY_NAME["three-images-and-none"], torch.bfloat16))
    with torch.no_grad(), model.intervene([Steer(0, vector().float())]):
        assert model(inputs).dtype == torch.bfloat16


def test_gradients_flow_through_steering(ready) -> None:
    model, inputs = ready(casts="none")
    direction = vector().requires_grad_()
    with model.intervene([Steer(0, direction, positions="last")]):
        model(inputs)[:, -1, 5].sum().backward()
    model.zero_grad()
    assert direction.grad is not None and direction.grad.abs().sum() > 0
    step = 1e-6 * direction.grad / direction.grad.norm()
    values = []
    for sign in (1, -1):
        with torch.no_grad(), model.intervene([Steer(0, direction.detach() + sign * step, positions="last")]):
            values.append(float(model(inputs)[:, -1, 5].sum()))
    assert abs((values[0] - values[1]) / 2e-6 - float(direction.grad.norm())) < 1e-5


def test_steer_prints_what_it_is() -> None:
    text = repr(Steer(3, vector(), alpha=2.0, positions="query"))
    assert "layer=3" in text and "alpha=2" in text and "query" in text and len(text.splitlines()) <= 10
