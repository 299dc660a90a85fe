"""What interventions carry: gradients reach it, integers and vectors come as numpy and torch give them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.cases import BY_NAME, counted, raw_inputs
from tests.pairs import ready_of
from veena_lens.interventions import (
    Ablate,
    BoostAttention,
    Circuit,
    KnockOutAttention,
    Patch,
    ScaleNeurons,
    Steer,
    SteerKeepingNorm,
    SuppressHeads,
)
from veena_lens.positions import parse
from veena_lens.sweeps import steer_sweep

NAME = "three-images-and-none"
Z = "blocks.1.attn.hook_z"


@pytest.fixture
def ready(model_of: Any) -> tuple[Any, Any]:
    return ready_of(model_of, BY_NAME[NAME])


def leaf(*shape: int, start: float = 0.5) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + start).requires_grad_()


# name: (the leaf, the interventions made of it)
CARRIED: dict[str, tuple[Callable[[], Tensor], Callable[[Tensor, Any], list[Any]]]] = {
    "steer": (lambda: leaf(48), lambda x, shape: [Steer(0, x, 2.0)]),
    "steer's alpha": (lambda: leaf(), lambda x, shape: [Steer(0, torch.ones(48), x)]),
    "turn": (lambda: leaf(48), lambda x, shape: [SteerKeepingNorm(0, x, 0.5)]),
    "turn's strength": (lambda: leaf(), lambda x, shape: [SteerKeepingNorm(0, torch.ones(48), x)]),
    "ablate": (lambda: leaf(8), lambda x, shape: [Ablate(Z, heads=[1], value=x)]),
    "ablate image features": (lambda: leaf(48), lambda x, shape: [Ablate("hook_image_features", value=x)]),
    "patch": (lambda: leaf(3, 18, 6, 8), lambda x, shape: [Patch(Z, x, heads=[2], positions="query")]),
    "patch of one row": (lambda: leaf(1, 18, 6, 8), lambda x, shape: [Patch(Z, x, positions="last")]),
    "scale neurons": (lambda: leaf(), lambda x, shape: [ScaleNeurons(0, [3, 4], x)]),
    "suppress heads": (lambda: leaf(), lambda x, shape: [SuppressHeads(1, 0.5, x)]),
    **{
        f"boost {mode}": (lambda: leaf(), lambda x, shape, mode=mode: [BoostAttention(1, factor=x, mode=mode)])
        for mode in ("renorm", "scale", "mul", "abs")
    },
    "boost of one": (
        lambda: torch.ones((), dtype=torch.float64, requires_grad=True),
        lambda x, shape: [BoostAttention(1, factor=x)],
    ),
}


@pytest.mark.parametrize("kind", CARRIED)
def test_gradient_reaches_what_an_intervention_carries(kind: str, ready: tuple[Any, Any]) -> None:
    model, inputs = ready
    make, edits = CARRIED[kind]
    x = make()

    def loss(x: Tensor) -> Tensor:
        with model.intervene(edits(x, inputs.shape)):
            return model(inputs)[:, -1].square().mean()

    loss(x).backward()
    assert x.grad is not None and float(x.grad.abs().max()) > 0
    step = 1e-5 * torch.sign(x.grad)
    with torch.no_grad():
        slope = (loss(x + step) - loss(x - step)) / 2e-5
    assert float(slope) == pytest.approx(float(x.grad.abs().sum()), rel=1e-4)


def test_gradient_reaches_a_cache_that_is_a_source(ready: tuple[Any, Any]) -> None:
    from veena_lens import ActivationCache

    model, inputs = ready
    _, cache = model.run_with_cache(inputs, names_filter=Z)
    value = cache[Z].clone().requires_grad_()
    again = ActivationCache({Z: value}, model, inputs=inputs)
    for edit in (Patch(Z, again, positions="query"), Ablate(Z, value="mean", reference=again, positions="query")):
        value.grad = None
        with model.intervene([edit]):
            model(inputs, return_type="loss").backward()
        assert value.grad is not None and float(value.grad.abs().max()) > 0


def test_what_was_made_in_inference_mode_serves_where_gradients_are(ready: tuple[Any, Any]) -> None:
    model, _ = ready
    with torch.inference_mode():
        inputs = model.inputs_from_hf(**counted({k: v.clone() for k, v in raw_inputs(BY_NAME[NAME]).items()}))
        _, cache = model.run_with_cache(inputs)
        tokens, vector = inputs[1].tokens[:, -5:].clone(), torch.rand(48)
    assert vector.is_inference() and tokens.is_inference() and not inputs.tokens.is_inference()
    edits = [
        Steer(0, vector),
        SteerKeepingNorm(0, vector),
        Patch(Z, cache),
        Ablate("blocks.0.hook_mlp_out", value=vector),
    ]
    with model.intervene(edits):
        model(inputs, return_type="loss").backward()
    model(tokens, return_type="loss").backward()
    assert model.blocks[0].mlp.up.weight.grad is not None
    model.zero_grad()


@torch.no_grad()
@pytest.mark.parametrize("vector", [
    np.linspace(0, 1, 48), np.linspace(0, 1, 48, dtype=np.float32), np.linspace(0, 1, 48).tolist(),
    torch.linspace(0, 1, 48), np.arange(48), list(range(48)), torch.arange(48),
], ids=["array", "float32", "list", "tensor", "integers", "list of integers", "tensor of integers"])  # fmt: skip
def test_vectors_come_as_arrays_and_lists(vector: Any, ready: tuple[Any, Any]) -> None:
    model, inputs = ready
    wanted = torch.as_tensor(vector).double()
    for kind in (Steer, SteerKeepingNorm):
        with model.intervene([kind(0, wanted, 2.0)]):
            first = model(inputs)
        with model.intervene([kind(0, vector, np.float32(2.0))]):
            torch.testing.assert_close(model(inputs), first, rtol=1e-5, atol=1e-5)
    with model.intervene([Ablate("blocks.0.hook_mlp_out", value=vector)]):
        assert model(inputs).isfinite().all()


NO_VECTORS: dict[str, tuple[Callable[[], Any], Any, str]] = {
    "word": (lambda: Steer(0, "happy"), TypeError, "vector must be a tensor, an array or a list"),
    "none": (lambda: Steer(0, None), TypeError, "not None"),
    "two axes": (lambda: Steer(0, [[1.0]]), ValueError, r"\[d_model\], not \[1, 1\]"),
    "nan": (lambda: Steer(0, [1.0, float("nan")]), ValueError, "not finite"),
    "words": (lambda: Steer(0, ["a"]), TypeError, "numbers"),
    "truths": (lambda: Steer(0, [True, False]), TypeError, "real numbers"),
    "infinite alpha": (lambda: Steer(0, np.ones(5), np.inf), ValueError, "alpha"),
    "nan value": (lambda: Ablate(Z, value=[float("nan")]), ValueError, "NaN"),
    "word value": (lambda: Ablate(Z, value=[["a"]]), TypeError, "value"),
    "no value": (lambda: Ablate(Z, value=None), ValueError, "zero"),
}


@pytest.mark.parametrize("make, error, words", NO_VECTORS.values(), ids=NO_VECTORS)
def test_what_is_no_vector_is_refused_in_a_sentence(make: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize(
    "wrong", [0.7, 1.0, True, np.float64(2.0), np.True_, torch.tensor(1.5), torch.tensor(True), "1"]
)
def test_what_is_not_an_integer_is_refused_everywhere(wrong: Any, ready: tuple[Any, Any]) -> None:
    model, inputs = ready
    vector, tokens = torch.ones(48), inputs.tokens
    makers: list[Callable[[], Any]] = [
        lambda: Steer(wrong, vector), lambda: KnockOutAttention(0, heads=[wrong]), lambda: BoostAttention(wrong),
        lambda: SuppressHeads(wrong), lambda: ScaleNeurons(0, [1, wrong]), lambda: Ablate(Z, heads=[wrong]),
        lambda: Patch(Z, torch.zeros(1, 18, 6, 8), heads=(wrong,)), lambda: Steer(0, vector, positions=[1, wrong]),
        lambda: KnockOutAttention(0, keys=[wrong]), lambda: model.attention(inputs, layers=[wrong]),
        lambda: model.attention(inputs, heads=[wrong]), lambda: model(tokens, stop_at_layer=wrong),
        lambda: Steer(0, vector, positions=slice(wrong, None)),
        lambda: steer_sweep(model, inputs, vector, lambda x: x[:, 0], layers=[wrong], progress=False),
        *([] if isinstance(wrong, str) else [lambda: Steer(0, vector, positions=wrong)]),
    ]  # fmt: skip
    for make in makers:
        with pytest.raises(TypeError, match="integer|Type-check"):
            make()


@torch.no_grad()
@pytest.mark.parametrize("kind", [np.int64, np.uint8, torch.tensor, int], ids=["int64", "uint8", "tensor", "int"])
def test_integers_of_numpy_and_torch_are_integers(kind: Any, ready: tuple[Any, Any], tmp_path: Any) -> None:
    model, inputs = ready
    one, many = kind(1), [kind(1), kind(3)]
    arrays = many if kind is int else torch.stack(many) if kind is torch.tensor else np.array(many)
    for units in (many, arrays):
        edits = [
            Steer(one, torch.ones(48), positions=units), KnockOutAttention(one, heads=units, keys=units, queries=-1),
            ScaleNeurons(one, units), Ablate(Z, heads=units, positions=one), BoostAttention(one, units, units, "last"),
        ]  # fmt: skip
        plain = [
            Steer(1, torch.ones(48), positions=[1, 3]), KnockOutAttention(1, heads=[1, 3], keys=[1, 3], queries=-1),
            ScaleNeurons(1, [1, 3]), Ablate(Z, heads=[1, 3], positions=1), BoostAttention(1, [1, 3], [1, 3], "last"),
        ]  # fmt: skip
        with model.intervene(edits):
            ours = model(inputs)
        with model.intervene(plain):
            assert torch.equal(model(inputs), ours)
        with model.intervene(Circuit.load(Circuit(edits).save(tmp_path / "all.safetensors"))):
            assert torch.equal(model(inputs), ours)
    assert parse(arrays) == [1, 3] and parse(one) == 1
    assert model.attention(inputs, -1, layers=[one], heads=units).values.shape[1:3] == (1, 2)
