"""Named sites head by head and neuron by neuron, labels of positions, and what sweeps refuse before they run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.cases import BY_NAME, native_model
from tests.pairs import pair_of
from tests.sweeps.engines import KW, agree
from veena_lens import HookedVLM
from veena_lens.checkpoints.files import bundled_pairs
from veena_lens.circuits import attention_knockout
from veena_lens.interventions import Ablate, Steer
from veena_lens.sweeps import generation_sweep, patch_sweep, steer_sweep
from veena_lens.sweeps.metrics import kl, log_prob, logit_diff, project, soft_hit

OFF: dict[str, Any] = {"progress": False}


@pytest.fixture(scope="module")
def runs() -> tuple[Any, Any, Any]:
    return pair_of(native_model, BY_NAME["clip-llama"], has_other_words=False)


@pytest.mark.parametrize(
    ("sites", "units", "axis"),
    [
        (["blocks.0.attn.hook_q", "blocks.1.attn.hook_pattern", "blocks.1.attn.hook_result"], [0, 5], "head"),
        (["blocks.1.attn.hook_k", "blocks.1.attn.hook_v", "blocks.1.attn.hook_rot_k"], [1, 0], "head"),
        (["blocks.0.mlp.hook_pre", "blocks.1.mlp.hook_post"], [3, 90], "neuron"),
        (["vision.blocks.0.attn.hook_z", "vision.blocks.1.attn.hook_pattern"], [2], "head"),
        (["vision.blocks.1.mlp.hook_post"], [0, 63], "neuron"),
    ],
    ids=str,
)
def test_named_sites_unit_by_unit_equal_whole_forwards(sites: list[str], units: list[int], axis: str, runs) -> None:
    model, clean, corrupted = runs
    positions = "all" if sites[0].startswith("vision.") else "query"
    fast = agree(model, clean, corrupted, 1e-9, sites=sites, positions=positions, units=units)
    assert fast.axes == ("site", "pair", axis) and fast.labels[axis] == units
    whole = patch_sweep(model, clean, corrupted, sites, positions, **KW)
    assert whole.axes == ("site", "pair") and not torch.allclose(fast.values[..., 0], whole.values)


def _told(value: Any) -> str:
    """A test's name: what is wrong, by its option; functions and long tensors have no name that stays the same."""
    return "-".join(value) if isinstance(value, dict) else value


@pytest.mark.parametrize(
    ("kw", "telling"),
    [
        (dict(sites=["blocks.0.attn.hook_z"], units=[6]), "head 6 does not exist; there are 6"),
        (dict(sites=["blocks.0.attn.hook_k"], units=[2]), "head 2 does not exist; there are 2"),
        (dict(sites=["blocks.0.hook_mlp_out"], units=[0]), "neither heads nor neurons"),
        (dict(sites="resid", units=[0]), "neither heads nor neurons"),
        (dict(sites=["blocks.0.attn.hook_z", "blocks.0.mlp.hook_post"], units=[0]), "sweep them apart"),
        (dict(sites=["blocks.0.attn.hook_z"], layers=[0]), "named sites name their layer"),
        (dict(layers=[2]), "layer 2"),
        (dict(units=[-7]), "head -7"),
        (dict(max_bytes=10), "max_bytes=10 holds no single row"),
        (dict(max_rows=-1), "max_rows=-1"),
        (dict(positions=99), "99"),
        (dict(metric=logit_diff(5, 128)), "token id 128 does not exist; the vocabulary has 128"),
        (dict(metric=log_prob(-1)), "token id -1"),
        (dict(metric=soft_hit([5], [[500]])), "token id 500"),
        (dict(metric=kl(torch.zeros(7))), r"\[128\], not \[7\]"),
        (dict(metric=project("blocks.1.hook_resid_post", torch.ones(3))), r"\[48\].*\[3\]"),
        (dict(metric=project("blocks.9.hook_resid_post", torch.ones(48))), "blocks.9.hook_resid_post"),
        (dict(metric=lambda logits: logits.mean()), r"one number per row, \[1\], not \[\]"),
        (dict(metric=lambda logits: 3.0), "one number per row.*float"),
        (
            dict(metric={"a": logit_diff(5, 6), "b": lambda x: x[:, 0] / 0 * 0}),
            "metric 'b' is not finite .* {0: nan}",
        ),
    ],
    ids=_told,
)
def test_bad_sweeps_are_refused_before_a_row_runs(kw: dict[str, Any], telling: str, runs, monkeypatch) -> None:
    from veena_lens.sweeps import engine

    model, clean, corrupted = runs
    ran: list[int] = []
    monkeypatch.setattr(engine, "run_staircase", lambda *args: ran.append(1))
    options = {"clean": clean[0], "corrupted": corrupted[0], **KW} | kw
    with pytest.raises((ValueError, IndexError, TypeError), match=telling):
        patch_sweep(model, **options)
    assert not ran


@pytest.mark.parametrize(
    ("kw", "telling"),
    [
        (dict(vectors=torch.ones(47)), r"\[48\].*not \[47\]"),
        (dict(vectors=torch.full((48,), float("nan"))), "must be finite"),
        (dict(alphas=[1.0, float("inf")]), "inf.*finite"),
        (dict(alphas=[]), "alphas"),
        (dict(layers=[-3]), r"layers \[-3\]"),
        (dict(max_rows=0), "max_rows=0"),
        (dict(max_bytes=10), "single row"),
        (dict(positions="lats"), "lats"),
        (dict(engine="quick"), "quick"),
    ],
    ids=_told,
)
def test_bad_steering_sweeps_are_refused(kw: dict[str, Any], telling: str, runs) -> None:
    model, inputs, _ = runs
    with pytest.raises(ValueError, match=telling):
        steer_sweep(model, **({"inputs": inputs, "vectors": torch.ones(48), "alphas": [1.0], **KW} | kw))


def test_what_is_no_batch_is_refused(runs) -> None:
    from veena_lens.sweeps.engine import require_inputs

    _, clean, _ = runs
    with pytest.raises(TypeError, match="clean must be prepared inputs.*'words'"):
        require_inputs("words", "clean")
    with pytest.raises(ValueError, match="corrupted holds no row"):
        require_inputs(clean[:0], "corrupted")


def test_a_metric_of_whole_numbers_is_read_as_numbers(runs) -> None:
    model, clean, corrupted = runs
    result = patch_sweep(model, clean, corrupted, metric=lambda logits: logits.argmax(-1), progress=False)
    assert result.values.is_floating_point()
    same = patch_sweep(model, clean[0], clean[0], **KW)
    assert "do not differ" in repr(same) and bool(same.scores.isnan().all())


def test_positions_of_a_sweep_are_labelled_by_their_tokens() -> None:
    model = HookedVLM.from_pretrained("tiny-llava-emotion")
    clean, corrupted = (model.prepare(text="who is it?", images=p.open()) for p in bundled_pairs("test")[0])
    result = patch_sweep(model, clean, corrupted, "mlp_out", "each", layers=[0, 7], **KW)
    texts = model.to_str_tokens(clean)
    assert result.meta["token_texts"] == texts and result.axes == ("layer", "pos")
    figure = result.effects().plot()
    shown = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert shown and all(text in [str(t).replace("\n", "\\n") for t in texts] for text in shown)


def test_only_entries_that_edit_pictures_encode_them_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = HookedVLM.from_pretrained("tiny-llava-emotion", dtype=torch.float64)
    inputs = model.prepare(text="how does the person feel?", images=bundled_pairs("test")[0][0].open())
    vector = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    entries = [[], Steer(2, vector, 8.0), Ablate("vision.blocks.1.hook_mlp_out"), Steer(5, vector, 8.0)]
    seen: list[int] = []
    real = type(model.vision).forward

    def forward(self: Any, pixels: Any, grids: Any = None) -> Any:
        seen.append(len(pixels))
        return real(self, pixels, grids)

    monkeypatch.setattr(type(model.vision), "forward", forward)
    fast = generation_sweep(model, inputs, entries, max_new_tokens=6, progress=False)
    assert seen == [1, 1, 1], "once for the three that share it, once for the shared prefix of the other, once for it"
    plain = generation_sweep(model, inputs, entries, max_new_tokens=6, progress=False, engine="naive")
    assert fast.tokens == plain.tokens


def test_metrics_say_what_they_measure() -> None:
    assert repr(logit_diff(5, 6)) == "logit_diff(correct=5, wrong=6)"
    metric = project("blocks.0.hook_resid_post", torch.ones(2), "query")
    assert (metric.site, metric.positions) == ("blocks.0.hook_resid_post", "query")
    assert repr(metric).endswith("site='blocks.0.hook_resid_post', positions='query')")
    assert metric(torch.tensor([[[3.0, 4.0], [1.0, 0.0]]])).item() == pytest.approx(4 / 2**0.5)


def test_an_unknown_option_of_a_steering_sweep_is_named(runs) -> None:
    model, inputs, _ = runs
    with pytest.raises(TypeError, match="no option is called 'max_row'; there are max_rows, max_bytes"):
        steer_sweep(model, inputs, torch.ones(48), KW["metric"], max_row=2)


@pytest.mark.parametrize(
    ("metric", "telling"),
    [
        (
            lambda logits: logits[:, -1, 5],
            r"IndexError.*\[rows d_vocab\], here \[1, 128\], without an axis of positions",
        ),
        (lambda logits: logits[0, -1, 5], "IndexError"),
        (lambda logits: logits[0, 5], r"one number per row, \[1\], not \[\]"),
        (lambda logits: logits[0, 5][None], r"one number per row, \[2\], not \[1\]"),
        (lambda logits: logits[:, 5].tolist(), "not list"),
        (lambda logits: logits[:, 5].numpy(), "not ndarray"),
        (lambda logits: logits[:, 5].to(torch.complex64), "of torch.complex64"),
        (lambda logits: logits[:, 500], "IndexError: index 500 is out of bounds"),
        (lambda logits: logits @ torch.ones(7, dtype=logits.dtype), "RuntimeError"),
        (lambda logits, token: logits[:, token], "TypeError.*token"),
        (lambda logits: logits.next_token, "AttributeError"),
    ],
)
def test_a_metric_of_another_form_is_shown_the_right_one_before_the_model_runs(
    metric: Any, telling: str, runs, monkeypatch
) -> None:
    model, clean, corrupted = runs

    def run(*args: Any, **kw: Any) -> None:
        raise AssertionError("the model ran")

    monkeypatch.setattr("veena_lens.sweeps.engine.forward", run)
    monkeypatch.setattr(HookedVLM, "run_with_cache", run)
    for sweep, arguments in ((patch_sweep, (clean, corrupted)), (steer_sweep, (clean, torch.ones(48)))):
        for given in (metric, {"first": metric}):
            with pytest.raises(ValueError, match=f"(?s){telling}.*lambda logits: logits\\[:, good\\]"):
                sweep(model, *arguments, metric=given, progress=False)
    with pytest.raises(ValueError, match=telling):
        attention_knockout(model, clean, [("image", "last")], metric, progress=False)


def test_tokens_of_metrics_are_ids_and_their_vectors_any_numbers(runs) -> None:
    model, clean, corrupted = runs
    for wrong in (lambda: logit_diff(" happy", " sad"), lambda: log_prob(1.0), lambda: soft_hit([" a"], [[1]])):
        with pytest.raises(TypeError, match=r"to_single_token\(' |must be an integer"):
            wrong()
    vector = torch.arange(48.0)
    found = [
        patch_sweep(model, clean[0], corrupted[0], metric=project("blocks.1.hook_resid_post", v), layers=[0], **OFF)
        for v in (vector, vector.tolist(), vector.numpy(), vector.long())
    ]
    for one in found[1:]:
        torch.testing.assert_close(one.values, found[0].values)
    assert kl([0.0] * 128)(torch.zeros(2, 128)).tolist() == [0, 0]
    with pytest.raises(TypeError, match="project: the direction"):
        project("blocks.1.hook_resid_post", "happy")


@pytest.mark.parametrize("layers", [slice(None, 2), range(2), (0, -1), torch.tensor([0, 1])], ids=str)
def test_layers_are_named_by_anything_that_holds_integers(layers: Any, runs) -> None:
    model, clean, corrupted = runs
    metric = logit_diff(5, 6)
    found = patch_sweep(model, clean, corrupted, metric=metric, layers=layers, units=layers, **OFF)
    last = 5 if isinstance(layers, tuple) else 1
    assert found.labels["layer"] == [0, 1] and found.labels["head"] == [0, last]
    assert steer_sweep(model, clean, torch.ones(48), metric, layers=layers, progress=False).labels["layer"] == [0, 1]
    assert model.attention(clean, layers=layers).labels["layer"] == [0, 1]


@pytest.mark.parametrize("layers", [1, "all", [0.0], [True], torch.ones(2, 2)], ids=str)
def test_layers_of_another_kind_are_refused_in_a_sentence(layers: Any, runs) -> None:
    model, clean, corrupted = runs
    with pytest.raises(
        TypeError, match=r"(?s)patch_sweep: layers.* must be (an integer|integers: a list such as \[0, 2\])"
    ):
        patch_sweep(model, clean, corrupted, metric=logit_diff(5, 6), layers=layers, **OFF)
