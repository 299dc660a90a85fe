"""Key heads: effects by hand and against the plain loop, exchanged twins, labels, stops and restarts."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.emotion.asked import bundled
from tests.emotion.twins import LLAVA, QWEN, directions, precise, slot, twins
from tests.interrupting import stop_at
from veena_lens.emotion.locate import heads as module
from veena_lens.emotion.locate.answer_slot import LEAD_IN
from veena_lens.emotion.locate.heads import (
    KeyHeads,
    best_rows,
    execution_heads,
    head_effects,
    head_readings,
    key_heads,
    relative_effects,
    specificity,
)
from veena_lens.emotion.methods import prepared
from veena_lens.emotion.pairs.loading import Pair
from veena_lens.interventions import Patch
from veena_lens.scores import Scores

ROWS = ("query", "last")

# --- by hand ----------------------------------------------------------------------------------------------


def test_relative_effects_by_hand() -> None:
    values = torch.tensor([[[[1.0, 3.0]], [[2.0, 0.0]]], [[[2.0, 0.0]], [[4.0, -2.0]]]], dtype=torch.float64)
    ends = torch.tensor([[3.0, 1.0], [-2.0, 2.0]], dtype=torch.float64)
    found = relative_effects(values, ends, ROWS, [4])
    assert found.values[0, :, 0].tolist() == [[0.0, 1.0], [0.5, -0.5]]
    assert found.values[1, :, 0].tolist() == [[0.0, 0.5], [-0.5, 1.0]]
    assert found.meta["gap"] == [2.0, -4.0] and found.mask is None
    assert found.labels["layer"] == [4] and found.labels["rows"] == list(ROWS)


def test_ends_themselves_restore_all_and_nothing() -> None:
    ends = torch.randn(5, 2, dtype=torch.float64)
    shape = torch.ones(5, 2, 3, 2, dtype=torch.float64)
    for side, wanted in ((0, 1.0), (1, 0.0)):
        values = relative_effects(shape * ends[:, side, None, None, None], ends, ROWS, range(3)).values
        torch.testing.assert_close(values, torch.full_like(values, wanted))


def test_pairs_whose_runs_hardly_differ_are_dropped_and_counted_out() -> None:
    ends = torch.tensor([[3.0, 1.0], [1.0, 1.001], [0.0, 2.0]], dtype=torch.float64)
    values = torch.ones(3, 2, 1, 2, dtype=torch.float64)
    found = relative_effects(values, ends, ROWS, [0])
    assert found.mask is not None and found.mask[:, 0, 0, 0].tolist() == [True, False, True]
    assert bool(found.values[1].isnan().all())
    assert found.mean("pair").values[0, 0].tolist() == [0.25, 0.25]  # of 0 and 0.5


def test_better_rows_are_chosen_once_by_the_mean() -> None:
    query = torch.tensor([[[0.9, 0.0]], [[0.1, 0.2]]])
    last = torch.tensor([[[0.2, 0.3]], [[0.2, torch.nan]]])
    labels = {"rows": list(ROWS), "layer": [3]}
    mask = ~torch.stack([query, last], 1).isnan()
    effects = Scores(torch.stack([query, last], 1), ("pair", "rows", "layer", "head"), labels, mask=mask)
    found = best_rows(effects)
    assert found.axes == ("pair", "layer", "head")
    assert found.values[:, 0, 0].tolist() == pytest.approx([0.9, 0.1])  # the query, though pair 1 says otherwise
    assert found.values[0, 0, 1].item() == pytest.approx(0.3) and bool(found.values[1, 0, 1].isnan())


def test_labels_of_specific_and_general_heads() -> None:
    emotions = ["happy", "sad"] * 10
    happy = torch.tensor([e == "happy" for e in emotions])
    noise = 0.05 * torch.randn(20, 1, 4, dtype=torch.float64)
    push = noise.clone()
    push[:, 0, 0] += torch.where(happy, 1.0, 0.0)  # happy alone
    push[:, 0, 1] += 1  # both alike
    push[:, 0, 2] -= 1  # against both
    push[:, 0, 3] += torch.where(happy, 0.6, 1.0)  # between
    people = [f"p{i // 2}" for i in range(20)]
    found = specificity(Scores(push, ("pair", "layer", "head"), {"layer": [3]}, "push"), emotions, people)
    assert found["label"] == [["specific", "general", "", ""]]
    assert found["emotion"][0][0] == "happy" and found["emotion"][0][2:] == ["", "sad"]
    tau = found["tau"][0]
    assert tau[0] == pytest.approx(1, abs=0.1) and tau[3] == pytest.approx(0.4, abs=0.1)
    means = [push[happy, 0, 1].mean(), push[~happy, 0, 1].mean()]
    assert tau[1] == pytest.approx(1 - float(min(means) / max(means)))
    assert found["p_specific"][0][0] < 0.01 < found["p_specific"][0][1]


def test_a_large_index_without_significance_is_no_label() -> None:
    push = torch.randn(16, 1, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = specificity(
        Scores(push, ("pair", "layer", "head"), {"layer": [0]}), ["happy", "sad"] * 8, list("abcdefgh") * 2
    )
    large = [t >= 0.5 for t in found["tau"][0]]
    assert sum(large) > 10
    assert sum(label == "specific" for label in found["label"][0]) < 6


def test_one_emotion_or_too_few_pairs_tell_nothing() -> None:
    push = Scores(torch.rand(6, 1, 2).double(), ("pair", "layer", "head"), {"layer": [0]}, "push")
    for emotions in (["happy"] * 6, ["happy"] * 3 + ["sad"] * 3):
        found = specificity(push, emotions, list("abcdef"))
        assert found["label"] == [["", ""]] and found["tau"][0][0] != found["tau"][0][0]


# --- on a model -------------------------------------------------------------------------------------------


def test_effects_equal_one_patch_at_a_time() -> None:
    model, d, layer = precise(), directions(), 2
    pairs = [twins()[0], twins()[3]]
    found = head_effects(model, pairs, d, layer, lead_in=LEAD_IN, layers=[0, 2], progress=False)
    assert found.axes == ("pair", "rows", "layer", "head") and found.shape == (2, 2, 2, 8)
    places = {"query": "query+answer", "last": -1}
    for i, pair in enumerate(pairs):
        clean, corrupted = (prepared(model, [x], lead_in=LEAD_IN) for x in (pair.emotional, pair.neutral))
        unit = d.unit(pair.emotion)[layer]
        _, source = model.run_with_cache(clean)

        def m(inputs: Any, *edits: Any, unit: torch.Tensor = unit) -> float:
            with model.intervene(list(edits)):
                return float(model(inputs, stop_at_layer=layer + 1)[0, -1].detach() @ unit)

        high, low = m(clean), m(corrupted)
        assert found.meta["gap"][i] == pytest.approx(high - low, rel=1e-8)
        for j, rows in enumerate(ROWS):
            for at, head in ((0, 7), (2, 1)):
                patch = Patch(f"blocks.{at}.attn.hook_z", source, [head], positions=places[rows])
                wanted = (m(corrupted, patch) - low) / (high - low)
                assert found.values[i, j, [0, 2].index(at), head].item() == pytest.approx(wanted, abs=1e-8)


def test_patching_everything_restores_all_of_it() -> None:
    model, d, pair = precise(), directions(), twins()[0]
    clean, corrupted = (prepared(model, [x], lead_in=LEAD_IN) for x in (pair.emotional, pair.neutral))
    names = [f"blocks.{at}.{name}" for at in range(3) for name in ("attn.hook_z", "hook_mlp_out")]
    _, source = model.run_with_cache(clean)
    unit, found = d.unit(pair.emotion)[2], []
    edits = [Patch(name, source, positions="all") for name in ("hook_embed", *names)]
    for inputs, mine in ((clean, []), (corrupted, []), (corrupted, edits), (clean, edits)):
        with model.intervene(mine):
            found.append(model(inputs, stop_at_layer=3)[0, -1].double() @ unit)
    values, ends = torch.stack(found[2:]), torch.stack(found[:2])
    effects = relative_effects(values[None, None, None], ends[None], ["all"], [2]).values.flatten()
    assert effects.tolist() == pytest.approx([1, 1], abs=1e-9)


def test_readings_equal_those_from_each_runs_own_cache() -> None:
    model, d, pairs = bundled(LLAVA), directions(), twins()[:3]
    intention, push, routes = head_readings(model, pairs, d, 2, batch_size=2, lead_in=LEAD_IN)
    assert intention.shape == push.shape == (3, 3, 8) and routes.axes == ("layer", "head", "source")
    layer, head = 2, 1
    W_O = model.blocks[layer].attn.W_O.detach()[head]
    for i, pair in enumerate(pairs):
        z = []
        for side in (pair.emotional, pair.neutral):
            _, cache = model.run_with_cache(prepared(model, [side], lead_in=LEAD_IN))
            z.append(cache[f"blocks.{layer}.attn.hook_z"][0, -1, head])
        change = ((z[0] - z[1]) @ W_O).double()
        unit = d.unit(pair.emotion)[layer].double()
        assert push.values[i, layer, head].item() == pytest.approx(float(change @ unit), abs=1e-4)
        assert intention.values[i, layer, head].item() == pytest.approx(float(change @ unit / change.norm()), abs=1e-4)
    torch.testing.assert_close(routes.values.sum(-1), push.values.mean(0), rtol=1e-3, atol=1e-4)


def eight() -> list[Pair]:
    """One pair a person, emotions in turn."""
    return [twins()[2 * i + i % 2] for i in range(8)]


@cache
def located() -> KeyHeads:
    return key_heads(bundled(LLAVA), eight(), directions(), 1, k=4, lead_in=LEAD_IN, draws=200, progress=False)


def test_key_heads_are_those_that_pass_every_test_in_the_order_of_their_effects() -> None:
    found = located()
    table = found.table
    assert len(table) == 2 * 8 and table["effect"].is_monotonic_decreasing
    passing = table[(table["low"] > 0) & (table["change"] > 0) & (table["intention"] > 0) & (table["q"] <= 0.05)]
    assert found.heads == [(int(a), int(h)) for a, h in zip(passing["layer"], passing["head"], strict=True)][:4]
    assert len(found.heads) == 4 and table["key"].sum() == 4
    assert found.by_layer() == sorted(found.heads)
    assert (found.n_pairs, found.dropped) == (8, 0)
    best = table.iloc[0]
    i = ROWS.index(best["rows"])
    mean = found.effects.mean("pair").values[:, int(best["layer"]), int(best["head"])]
    assert best["effect"] == pytest.approx(float(mean[i])) and float(mean[i]) == float(mean.max())
    assert "4 of 16 heads" in repr(found)
    assert set(found.table["label"]) <= {"specific", "general", ""}


@pytest.mark.parametrize("kind", ["half", "all"])
def test_exchanged_twins_have_no_key_heads(kind: str) -> None:
    people = {f"avataaars-{10000 + i}" for i in range(0, 8, 2 if kind == "half" else 1)}
    pairs = [pair.swapped() if pair.identity in people else pair for pair in eight()]
    found = key_heads(bundled(LLAVA), pairs, directions(), 1, lead_in=LEAD_IN, draws=200, progress=False)
    assert found.heads == []
    assert float(found.table["effect"].max()) > 0.05  # what differs is still carried: only the sign tells
    assert "0 of 16 heads" in repr(found)


def test_equal_twins_are_dropped_and_give_no_head() -> None:
    pairs = [Pair(replace(p.neutral, emotion=p.emotion), p.neutral) for p in twins()[:4]]
    found = key_heads(bundled(LLAVA), pairs, directions(), 1, lead_in=LEAD_IN, draws=50, progress=False)
    assert (found.dropped, found.heads) == (4, [])


def test_stopped_patching_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = bundled(LLAVA), twins()[:3]
    call: dict[str, Any] = dict(lead_in=LEAD_IN, layers=[2], progress=False)
    whole = head_effects(model, pairs, directions(), 2, **call)
    stop_at(monkeypatch, module, "patch_sweep", 4)  # in the middle of the second pair
    with pytest.raises(KeyboardInterrupt):
        head_effects(model, pairs, directions(), 2, out=tmp_path, **call)
    again = head_effects(model, pairs, directions(), 2, out=tmp_path, **call)
    assert torch.equal(again.values, whole.values) and again.meta == whole.meta
    monkeypatch.delattr(module, "patch_sweep")
    assert torch.equal(head_effects(model, pairs, directions(), 2, out=tmp_path, **call).values, whole.values)
    other = [Pair(replace(p.emotional, emotion="angry"), p.neutral) for p in pairs if p.emotion == "happy"]
    for more in ({"pairs": other}, {"layer": 3}, {"rows": ["last"]}, {"lead_in": None}):
        settings: dict[str, Any] = {"pairs": pairs, "layer": 2, **call, **more}
        with pytest.raises(NameError, match="patch_sweep"):  # nothing kept is taken for another question's answer
            head_effects(model, directions=directions(), out=tmp_path, **settings)


def test_heads_after_the_key_layer_restore_the_answer() -> None:
    model = precise()
    found = execution_heads(model, twins()[:3], slot(), 6, k=20, draws=50, progress=False)
    assert list(found.columns) == ["layer", "head", "effect", "low", "high"]
    assert set(found["layer"]) == {7} and len(found) == 8
    assert found["effect"].is_monotonic_decreasing and bool((found["low"] <= found["effect"]).all())
    best, total = found.iloc[0], []
    for pair in twins()[:3]:
        clean, corrupted = (prepared(model, [x], lead_in=LEAD_IN) for x in (pair.emotional, pair.neutral))
        _, source = model.run_with_cache(clean)
        patch = Patch(f"blocks.{int(best['layer'])}.attn.hook_z", source, [int(best["head"])], positions=-1)
        values = []
        for inputs, edits in ((clean, []), (corrupted, []), (corrupted, [patch])):
            with model.intervene(edits):
                values.append(float(slot().metric(pair.emotion)(model(inputs)[:, -1].detach())))
        total.append((values[2] - values[1]) / (values[0] - values[1]))
    assert best["effect"] == pytest.approx(sum(total) / 3, abs=1e-6)


def test_stopped_execution_heads_go_on_to_the_same_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = bundled(LLAVA), twins()[1:3]
    call: dict[str, Any] = dict(k=20, draws=50, progress=False)

    calls = stop_at(monkeypatch, module, "patch_sweep", 2)
    with pytest.raises(KeyboardInterrupt):
        execution_heads(model, pairs, slot(), 6, out=tmp_path, **call)
    again = execution_heads(model, pairs, slot(), 6, out=tmp_path, **call)
    assert len(calls) == 3, "the first pair is not patched again"
    assert again.to_dict() == execution_heads(model, pairs, slot(), 6, **call).to_dict()
    monkeypatch.delattr(module, "patch_sweep")
    assert again.to_dict() == execution_heads(model, pairs, slot(), 6, out=tmp_path, **call).to_dict()
    other = replace(slot(), tokens={e: ids[1:] for e, ids in slot().tokens.items()})
    with pytest.raises(NameError, match="patch_sweep"):  # other tokens are another slot
        execution_heads(model, pairs, other, 6, out=tmp_path, **call)


def test_no_heads_follow_the_last_layer() -> None:
    found = execution_heads(bundled(LLAVA), twins()[:4], slot(), 7, progress=False)
    assert len(found) == 0 and "effect" in found.columns


def test_bad_input_is_named_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(module, "patch_sweep")
    model, d = bundled(LLAVA), directions()
    with pytest.raises(ValueError, match="there are no pairs"):
        head_effects(model, [], d, 2)
    with pytest.raises(ValueError, match="there are no pairs"):
        execution_heads(model, [], slot(), 2)
    with pytest.raises(ValueError, match="execution_heads: layer 8 does not exist"):
        execution_heads(model, twins(), slot(), 8)
    with pytest.raises(ValueError, match="no tokens for 'proud'; known: happy, angry"):
        proud = [Pair(replace(p.emotional, emotion="proud"), p.neutral) for p in twins()[:2]]
        execution_heads(model, proud, slot(), 2)
    with pytest.raises(ValueError, match="layer 8 does not exist; the model has layers 0 to 7"):
        head_effects(model, twins(), d, 8)
    with pytest.raises(ValueError, match="layer 8 does not exist"):
        key_heads(model, twins(), d, 8)
    with pytest.raises(ValueError, match="all pairs are of 'avataaars-10000'"):
        key_heads(model, twins()[:2], d, 2)


def test_shapes_of_the_other_layout() -> None:
    found = key_heads(bundled(QWEN), twins()[:4], directions(QWEN), 1, lead_in=LEAD_IN, draws=50, progress=False)
    assert found.effects.shape == (4, 2, 2, 8) and found.push.shape == (4, 2, 8)
    assert len(found.table) == 16
