"""Patch, Ablate, ScaleNeurons, BoostAttention and Circuit against hooks written by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import BY_NAME, IMAGE_TOKEN, PAD, build_hf, counted, raw_inputs, relative_error
from veena_lens.interventions import Ablate, BoostAttention, Circuit, Patch, ScaleNeurons, Steer
from veena_lens.positions import position_mask

NAME = "three-images-and-none"
TOWERS = ["vision.blocks.1.attn.hook_z", "vision.blocks.0.mlp.hook_post", "connector.hook_out"]


@pytest.fixture(scope="module")
def model() -> Any:
    from veena_lens import HookedVLM

    return HookedVLM.from_hf(build_hf(BY_NAME[NAME], gain=5.0), casts="none")


@pytest.fixture(scope="module")
def inputs(model: Any) -> Any:
    return model.inputs_from_hf(**counted(raw_inputs(BY_NAME[NAME])))


@pytest.fixture(scope="module")
def source(model: Any) -> Any:
    """Inputs of the same shape with other images and other text, and their cache."""
    raw = raw_inputs(BY_NAME[NAME])
    raw["pixel_values"] = raw["pixel_values"].flip(0)
    text = raw["attention_mask"].bool() & (raw["input_ids"] != IMAGE_TOKEN)
    raw["input_ids"] = torch.where(text, raw["input_ids"] % 90 + 5, raw["input_ids"])
    with torch.no_grad():
        return model.run_with_cache(model.inputs_from_hf(**counted(raw)))[1]


@pytest.fixture(autouse=True)
def clean(model: Any) -> Any:
    yield
    assert not [n for n, h in model.hook_dict.items() if h._forward_hooks]


def agrees(model: Any, inputs: Any, interventions: Any, hooks: list[tuple[str, Callable[..., Any]]]) -> None:
    """The interventions equal the hooks and change the logits; outside the block all is as it was."""
    with torch.no_grad():
        plain, expected = model(inputs), model.run_with_hooks(inputs, fwd_hooks=hooks)
        with model.intervene(interventions):
            ours, (cached, _) = model(inputs), model.run_with_cache(inputs)
        after = model(inputs)
    keep = inputs.attention_mask
    assert relative_error(ours, expected, keep) < 1e-10
    assert relative_error(cached, ours, keep) < 1e-10
    assert relative_error(ours, plain, keep) > 1e-6, "nothing changed, so the test shows nothing"
    assert torch.equal(after, plain)


def where(mask: Tensor, new: Any) -> Callable[..., Tensor]:
    return lambda value, hook: torch.where(mask, new(value) if callable(new) else new, value)


def generates_alike(model: Any, inputs: Any, interventions: Any) -> None:
    """With and without key/value cache, and unlike the model alone."""
    from transformers import SuppressTokensLogitsProcessor

    options = dict(max_new_tokens=10, return_type="tokens", eos_token_id=[])
    options["logits_processor"] = [SuppressTokensLogitsProcessor([PAD, IMAGE_TOKEN])]
    plain = model.generate(inputs, **options)
    with model.intervene(interventions):
        cached = model.generate(inputs, **options)
        assert torch.equal(model.generate(inputs, use_past_kv_cache=False, **options), cached)
    assert not torch.equal(cached, plain), "nothing changed, so the test shows nothing"


# --- Patch -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("positions", ["last", "query", "image", "all", [-1, 9]], ids=str)
@pytest.mark.parametrize("site, heads", [
    ("blocks.0.hook_resid_pre", None), ("blocks.1.attn.hook_z", [3]), ("blocks.1.attn.hook_z", [0, -1]),
    ("blocks.0.attn.hook_v", [1]), ("blocks.0.hook_mlp_out", None), ("blocks.1.attn.hook_result", [2]),
])  # fmt: skip
def test_patch_puts_the_other_runs_value_in_place(
    site: str, heads: list[int] | None, positions: Any, model: Any, inputs: Any, source: Any
) -> None:
    mask = position_mask(inputs, positions)
    value = source[site]
    mask = mask.view(*mask.shape, *[1] * (value.ndim - 2)).expand_as(value).clone()
    if heads is not None:
        others = [h for h in range(value.shape[2]) if h not in [i % value.shape[2] for i in heads]]
        mask[:, :, others] = False
    patch = Patch(name=site, source=source, heads=heads, positions=positions)
    agrees(model, inputs, [patch], [(site, where(mask, value))])
    agrees(
        model, inputs, [Patch(name=site, source=value, heads=heads, positions=positions)], [(site, where(mask, value))]
    )


def test_patch_of_query_rows_of_a_pattern(model: Any, inputs: Any, source: Any) -> None:
    site = "blocks.1.attn.hook_pattern"
    mask = torch.zeros_like(source[site], dtype=torch.bool)
    for row, spans in enumerate(inputs.spans):
        mask[row, 4, spans.query] = True
    agrees(model, inputs, [Patch(site, source, heads=[4], positions="query")], [(site, where(mask, source[site]))])


def test_patch_of_neurons(model: Any, inputs: Any, source: Any) -> None:
    site = "blocks.0.mlp.hook_post"
    mask = position_mask(inputs, "query")[..., None] & torch.isin(torch.arange(96), torch.tensor([3, 50]))
    agrees(
        model, inputs, [Patch(site, source, neurons=[3, 50], positions="query")], [(site, where(mask, source[site]))]
    )


def test_patch_moves_words_between_runs_of_other_lengths(model: Any, inputs: Any) -> None:
    """The k-th query position of the source goes to the k-th one here."""
    raw = raw_inputs(BY_NAME["clip-llama"])
    with torch.no_grad():
        _, cache = model.run_with_cache(model.inputs_from_hf(**counted(raw))[1])
    site, row = "blocks.0.hook_resid_post", inputs[2]
    there, here = cache.inputs.spans[0].query, row.spans[0].query
    n = here.stop - here.start
    assert there.stop - there.start > n and cache.inputs.shape != row.shape

    def edit(value: Tensor, hook: Any) -> Tensor:
        new = value.clone()
        new[0, here] = cache[site][0, there.start : there.start + n]
        return new

    agrees(model, row, [Patch(site, cache, positions="query")], [(site, edit)])


def test_patch_of_one_row_serves_every_row(model: Any, inputs: Any, source: Any) -> None:
    one = source.apply_slice_to_batch_dim(slice(2, 3))
    site = "blocks.0.hook_resid_post"
    mask = position_mask(inputs, "last")[..., None]
    value = source[site][2:3, -1:].expand_as(source[site])
    agrees(model, inputs, [Patch(site, one, positions="last")], [(site, where(mask, value))])


@pytest.mark.parametrize("site", TOWERS)
def test_patch_reaches_the_pictures(site: str, model: Any, inputs: Any, source: Any) -> None:
    agrees(model, inputs, [Patch(site, source, positions="all")], [(site, lambda value, hook: source[site].clone())])


def test_patch_acts_while_generating(model: Any, inputs: Any, source: Any) -> None:
    generates_alike(model, inputs, [Patch("blocks.0.hook_resid_post", source, positions="last")])


def test_patch_of_what_does_not_fit_is_refused(model: Any, inputs: Any, source: Any) -> None:
    with pytest.raises(KeyError, match="hook_q_input"):
        Patch("blocks.0.hook_q_input", source)
    with pytest.raises(TypeError, match="ActivationCache or a tensor"):
        Patch("hook_embed", source="clean")
    for patch, message in (
        (Patch("blocks.0.attn.hook_z", source, heads=[6]), "head 6.*6"),
        (Patch("blocks.0.attn.hook_z", source, heads=[]), "empty"),
        (Patch("blocks.0.hook_resid_post", source, heads=[1]), "heads can be chosen"),
        (Patch("blocks.0.attn.hook_z", source, neurons=[1]), "neurons can be chosen"),
        (Patch("blocks.9.attn.hook_z", torch.zeros(3, 18, 6, 8)), "blocks.9.attn.hook_z"),
    ):
        with pytest.raises(ValueError, match=message), model.intervene([patch]):
            model(inputs)
    with (
        pytest.raises(ValueError, match=r"\[1, 2, 48\], of pos 2; this run has pos 18"),
        model.intervene([Patch("hook_embed", torch.zeros(1, 2, 48))]),
    ):
        model(inputs)


# --- Ablate ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", ["zero", "mean", "tensor"])
@pytest.mark.parametrize("site, heads, neurons", [
    ("blocks.1.attn.hook_z", [1, 4], None), ("blocks.0.mlp.hook_post", None, [7]),
    ("blocks.0.hook_mlp_out", None, None),
])  # fmt: skip
def test_ablation_takes_a_components_value_away(
    site: str, heads: Any, neurons: Any, value: str, model: Any, inputs: Any, source: Any
) -> None:
    shape = source[site].shape
    at = position_mask(inputs, "query")
    mask = at.view(*at.shape, *[1] * (len(shape) - 2)).expand(shape).clone()
    if heads or neurons:
        mask[:, :, [i for i in range(shape[2]) if i not in (heads or neurons)]] = False
    fill: Any = torch.zeros((), dtype=torch.float64)
    options: dict[str, Any] = dict(value="zero")
    if value == "mean":  # over the rows and chosen positions of the reference runs
        fill = torch.cat([source[site][row, spans.query] for row, spans in enumerate(source.inputs.spans)]).mean(0)
        options = dict(value="mean", reference=source)
    elif value == "tensor":
        fill = torch.full(shape[2:], 0.7, dtype=torch.float64)
        options = dict(value=fill)
    ablate = Ablate(name=site, heads=heads, neurons=neurons, positions="query", **options)
    agrees(model, inputs, [ablate], [(site, where(mask, fill))])


def test_ablation_of_every_head_is_ablation_of_attention(model: Any, inputs: Any) -> None:
    with torch.no_grad():
        with model.intervene(
            [Ablate("blocks.0.attn.hook_z", heads=[0, 1, 2]), Ablate("blocks.0.attn.hook_z", heads=[3, 4, 5])]
        ):
            heads = model(inputs)
        with model.intervene([Ablate("blocks.0.hook_attn_out")]):  # this decoder's attention has no output bias
            assert relative_error(model(inputs), heads, inputs.attention_mask) < 1e-12


def test_ablation_acts_while_generating(model: Any, inputs: Any) -> None:
    generates_alike(model, inputs, [Ablate("blocks.0.hook_mlp_out", positions="last+generated")])


def test_ablation_of_what_does_not_fit_is_refused(source: Any) -> None:
    with pytest.raises(ValueError, match="needs reference"):
        Ablate("blocks.0.hook_mlp_out", value="mean")
    with pytest.raises(ValueError, match="'zero', 'mean' or a tensor"):
        Ablate("blocks.0.hook_mlp_out", value="median", reference=source)


# --- ScaleNeurons ------------------------------------------------------------------------------------
def test_scaled_neurons_equal_scaled_rows_of_w_out(model: Any, inputs: Any) -> None:
    """m' = m + (factor - 1) sum_n a_n W_out[n], at the chosen positions only."""
    neurons = [4, 40, 90]
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
    added = 2.5 * cache["post", 0][..., neurons] @ model.W_out[0, neurons].detach()
    mask = position_mask(inputs, "last+query")[..., None]
    hook = ("blocks.0.hook_mlp_out", lambda value, hook: value + mask * added)
    agrees(model, inputs, [ScaleNeurons(layer=0, neurons=neurons, factor=3.5, positions="last+query")], [hook])


def test_scaled_neurons_act_while_generating(model: Any, inputs: Any) -> None:
    generates_alike(model, inputs, [ScaleNeurons(layer=0, neurons=list(range(0, 96, 2)), factor=6.0)])


@pytest.mark.parametrize("make, message", [
    (lambda: ScaleNeurons(0, [96]), "neuron 96.*96"), (lambda: ScaleNeurons(0, []), "empty"),
    (lambda: ScaleNeurons(5, [1]), "layer 5"), (lambda: ScaleNeurons(0, [1], factor=math.inf), "finite"),
], ids=["too-large", "none", "too-deep", "infinite"])  # fmt: skip
def test_neurons_that_are_not_there_are_refused(make: Any, message: str, model: Any) -> None:
    with pytest.raises(ValueError, match=message), model.intervene([make()]):
        pass


# --- BoostAttention ----------------------------------------------------------------------------------
FACTOR, HEADS = 3.0, [0, 4]


def boosted(mode: str, place: Tensor) -> tuple[str, Callable[..., Tensor]]:
    """The formula of each mode as a hook on scores or pattern of layer 1."""
    formulas: dict[str, Callable[[Tensor], Tensor]] = {
        "renorm": lambda a: torch.where(place, FACTOR * a, a),
        "logit": lambda s: torch.where(place, s + math.log(FACTOR), s),
        "scale": lambda a: torch.where(place, FACTOR * a, a),
        "mul": lambda s: torch.where(place, FACTOR * s, s),
        "abs": lambda s: torch.where(place, s + (FACTOR - 1) * s.abs(), s),
    }

    def edit(value: Tensor, hook: Any) -> Tensor:
        new = formulas[mode](value)
        return new / new.sum(-1, keepdim=True).clamp(min=1e-300) if mode == "renorm" else new

    return f"blocks.1.attn.hook_{'pattern' if mode in ('renorm', 'scale') else 'attn_scores'}", edit


def place_of(inputs: Any, queries: str, keys: str) -> Tensor:
    q, k = position_mask(inputs, queries), position_mask(inputs, keys)
    length = inputs.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    place = q[:, None, :, None] & k[:, None, None, :] & causal
    place = place.expand(-1, 6, -1, -1).clone()
    place[:, [h for h in range(6) if h not in HEADS]] = False
    return place


@pytest.mark.parametrize("queries, keys", [("query", "image"), ("last", "text"), ("all", "image")])
@pytest.mark.parametrize("mode", ["renorm", "logit", "scale", "mul", "abs"])
def test_boosted_attention_follows_its_formula(mode: str, queries: str, keys: str, model: Any, inputs: Any) -> None:
    boost = BoostAttention(layer=1, heads=HEADS, keys=keys, queries=queries, factor=FACTOR, mode=mode)
    agrees(model, inputs, [boost], [boosted(mode, place_of(inputs, queries, keys))])


def test_renorm_and_logit_are_one_function(model: Any, inputs: Any) -> None:
    results = []
    for mode in ("renorm", "logit"):
        with (
            torch.no_grad(),
            model.intervene([BoostAttention(0, factor=2.0, mode=mode), BoostAttention(1, factor=0.3, mode=mode)]),
        ):
            results.append(model(inputs))
    assert relative_error(results[0], results[1], inputs.attention_mask) < 1e-12


@pytest.mark.parametrize("mode", ["renorm", "logit", "scale", "mul", "abs"])
def test_factor_of_one_leaves_everything_as_it_was(mode: str, model: Any, inputs: Any) -> None:
    with torch.no_grad():
        plain = model(inputs)
        with model.intervene([BoostAttention(0, factor=1.0, mode=mode)]):
            assert relative_error(model(inputs), plain, inputs.attention_mask) < 1e-12
        with model.intervene([ScaleNeurons(0, [1, 2], factor=1.0, positions="all")]):
            assert torch.equal(model(inputs), plain)


def test_row_without_a_picture_is_left_alone(model: Any, inputs: Any) -> None:
    with torch.no_grad():
        plain = model(inputs)
        with model.intervene([BoostAttention(1, factor=5.0)]):
            ours = model(inputs)
    assert relative_error(ours[1:2], plain[1:2], inputs.attention_mask[1:2]) < 1e-12
    assert relative_error(ours[[0, 2]], plain[[0, 2]], inputs.attention_mask[[0, 2]]) > 1e-4


@pytest.mark.parametrize("mode", ["renorm", "scale", "mul"])
def test_boost_acts_while_generating_and_in_attention_rows(mode: str, model: Any, inputs: Any) -> None:
    boost = BoostAttention(1, factor=8.0, mode=mode)
    generates_alike(model, inputs, [boost, BoostAttention(0, factor=8.0, mode=mode)])
    with torch.no_grad(), model.intervene([boost]):
        rows = model.attention(inputs, queries="last", keys="image")
        _, cache = model.run_with_cache(inputs)
    for row in (0, 2):
        keys = inputs.image_mask[row].nonzero().flatten()
        expected = cache["pattern", 1][row, :, inputs.spans[row].last][:, keys]
        assert relative_error(rows.values[row, 1, :, 0, : len(keys)], expected) < 1e-9


def test_boosts_of_one_layer_add_up(model: Any, inputs: Any) -> None:
    results = []
    for boosts in ([BoostAttention(1, factor=6.0)], [BoostAttention(1, factor=2.0), BoostAttention(1, factor=3.0)]):
        with torch.no_grad(), model.intervene(boosts):
            results.append(model(inputs))
    assert relative_error(results[0], results[1], inputs.attention_mask) < 1e-12


@pytest.mark.parametrize("options, message", [
    (dict(mode="add"), "renorm, logit"), (dict(factor=0.0), "positive"), (dict(factor=math.nan), "positive"),
    (dict(heads=[9]), "head 9"), (dict(layer=4), "layer 4"), (dict(keys="imge"), "imge"),
], ids=str)  # fmt: skip
def test_boost_that_does_not_fit_is_refused(options: dict[str, Any], message: str, model: Any) -> None:
    with pytest.raises(ValueError, match=message), model.intervene([BoostAttention(**{"layer": 1, **options})]):
        pass


# --- together ----------------------------------------------------------------------------------------
def everything(source: Any) -> list[Any]:
    vector = torch.randn(48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [
        Steer(0, vector, alpha=0.5, positions="query"),
        Patch("blocks.1.attn.hook_z", source, heads=[2], positions="last"),
        Ablate("blocks.1.mlp.hook_post", neurons=[5, 6], positions="query+generated", value="mean", reference=source),
        Ablate("blocks.0.attn.hook_z", heads=[1], positions=slice(8, 12)),
        ScaleNeurons(1, [9], factor=3.0, positions=[-1, -2]),
        BoostAttention(1, heads=[0], factor=2.0),
        BoostAttention(0, factor=2.0, mode="abs", keys="text", queries="last"),
    ]


def test_saved_circuit_does_what_it_did(tmp_path: Any, model: Any, inputs: Any, source: Any) -> None:
    circuit = Circuit(everything(source), name="all kinds", meta={"found": "by hand"})
    circuit.save(tmp_path / "deep" / "circuit.safetensors")
    loaded = Circuit.load(tmp_path / "deep" / "circuit.safetensors")
    assert len(loaded) == 7 and loaded.name == "all kinds" and loaded.meta == {"found": "by hand"}
    assert [type(i).__name__ for i in loaded] == [type(i).__name__ for i in circuit]
    with torch.no_grad():
        plain = model(inputs)
        with model.intervene(circuit):
            first = model(inputs)
        with model.intervene(loaded):
            assert torch.equal(model(inputs), first)
        with model.intervene(list(circuit)):
            assert torch.equal(model(inputs), first)
    assert relative_error(first, plain, inputs.attention_mask) > 1e-4


def test_per_row_lists_of_every_kind_equal_row_by_row(model: Any, inputs: Any, source: Any) -> None:
    lists = [everything(source)[:1] + everything(source)[3:], everything(source)[4:5], [BoostAttention(1, factor=4.0)]]
    with torch.no_grad():
        with model.intervene(per_row=lists):
            together = model(inputs)
        for row, mine in enumerate(lists):
            with model.intervene(mine):
                alone = model(inputs[row])
            assert relative_error(together[row : row + 1], alone, inputs.attention_mask[row : row + 1]) < 1e-10, row


def test_file_that_is_no_circuit_is_refused(tmp_path: Any) -> None:
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError, match="none.safetensors"):
        Circuit.load(tmp_path / "none.safetensors")
    save_file({"x": torch.zeros(1)}, str(tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match="not a circuit"):
        Circuit.load(tmp_path / "other.safetensors")
    with pytest.raises(TypeError, match="'steer' is not an intervention"):
        Circuit(["steer"])


def test_every_kind_prints_in_a_few_lines(source: Any) -> None:
    circuit = Circuit(everything(source) * 3)
    assert len(repr(circuit).splitlines()) <= 10 and "14 more" in repr(circuit)
    for item in circuit:
        assert repr(item).startswith(type(item).__name__) and len(repr(item)) < 200
