"""Tracing back: a head's push by hand, edges against the plain loop, the order of targets, fair choice of pairs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.emotion.asked import bundled
from tests.emotion.twins import LLAVA, directions, heads_of, twins
from tests.interrupting import stop_at
from veena_lens.emotion.locate import tracing as module
from veena_lens.emotion.locate.answer_slot import LEAD_IN
from veena_lens.emotion.locate.tracing import COLUMNS, head_push, projection_of, spread_over, trace_back
from veena_lens.emotion.methods import ROWS, prepared
from veena_lens.interventions import Patch


def test_push_of_a_head_by_hand() -> None:
    z = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]]])
    push = head_push(4, 1, torch.tensor([1.0, -2.0]))
    assert push(z).tolist() == [((3 - 8) + (7 - 16)) / 2]
    assert push.site == "blocks.4.attn.hook_z"


def test_push_is_the_projection_of_what_the_head_writes() -> None:
    model, unit = bundled(LLAVA), directions().unit("happy")[2]
    _, cache = model.run_with_cache(prepared(model, [twins()[0].emotional], lead_in=LEAD_IN))
    z = cache["blocks.2.attn.hook_z"]
    written = z[0, -1, 3] @ model.blocks[2].attn.W_O[3].detach()
    push = projection_of(model, (2, 3), unit)
    assert push(z[:, -1:]).item() == pytest.approx(float(written.double() @ unit.double()), abs=1e-5)


def test_pairs_are_taken_from_all_identities_and_emotions_alike() -> None:
    pairs = [SimpleNamespace(identity=i, emotion=e, key=(i, e)) for i in range(6) for e in "abcd"]
    some = spread_over(list(pairs), 12)
    assert set(Counter(p.identity for p in some).values()) == {2}
    assert min(Counter(p.emotion for p in some).values()) >= 2
    assert len({p.key for p in some}) == 12
    assert spread_over(pairs[:5], 5) == pairs[:5]
    uneven = [SimpleNamespace(identity=0)] + [SimpleNamespace(identity=1) for _ in range(9)]
    assert Counter(p.identity for p in spread_over(uneven, 6)) == {0: 1, 1: 5}


def test_edges_equal_one_patch_at_a_time_and_are_kept_where_both_speak_for_them() -> None:
    model, d, pairs, head = bundled(LLAVA), directions(), list(twins()[:4]), (1, 2)
    edges = trace_back(model, pairs, heads_of([head]), d, depth=1, top=3, draws=50, progress=False)
    assert list(edges.columns) == list(COLUMNS) and 1 <= len(edges) <= 3
    assert set(edges["receiver"]) == {"L1H2"} and set(edges["level"]) == {1} and set(edges["rows"]) == {"last"}
    assert edges["effect"].is_monotonic_decreasing and bool((edges["effect"] > 0).all())
    assert edges["kept"].tolist() == ((edges["low"] > 0) & (edges["path"] > 0)).tolist()
    line, shares = edges.iloc[0], []
    for pair in pairs:
        clean, corrupted = (prepared(model, [x], lead_in=LEAD_IN) for x in (pair.emotional, pair.neutral))
        _, source = model.run_with_cache(clean)
        push, values = projection_of(model, head, d.unit(pair.emotion)[1]), []
        name, mine = "blocks.0.hook_mlp_out", None
        if line["sender"] != "0_mlp_out":
            name, mine = "blocks.0.attn.hook_z", [int(line["sender"].split("H")[1])]
        patch = Patch(name, source, mine, positions=ROWS["last"])
        for inputs, edits in ((clean, []), (corrupted, []), (corrupted, [patch])):
            with model.intervene(edits):
                _, cache = model.run_with_cache(inputs, names_filter=[push.site])
            values.append(float(push(cache[push.site][:, -1:])))
        shares.append((values[2] - values[1]) / (values[0] - values[1]))
    assert line["effect"] == pytest.approx(sum(shares) / 4, rel=1e-2, abs=1e-3)


def test_stopped_tracing_goes_on_with_the_targets_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, d, pairs, heads = bundled(LLAVA), directions(), list(twins()[:4]), heads_of([(1, 2), (1, 4)])
    calls = stop_at(monkeypatch, module, "_senders", 2)
    call: dict[str, Any] = dict(depth=1, top=2, draws=50, progress=False)
    with pytest.raises(KeyboardInterrupt):
        trace_back(model, pairs, heads, d, out=tmp_path, **call)
    again = trace_back(model, pairs, heads, d, out=tmp_path, **call)
    assert [given[3] for given in calls] == [(1, 2), (1, 4), (1, 4)]
    whole = trace_back(model, pairs, heads, d, **call)
    assert again.to_dict() == whole.to_dict() and len(whole) > 0
    n = len(calls)
    more: dict[str, Any] = call | {"top": 1}
    trace_back(model, pairs, heads, d, out=tmp_path, **more)
    assert [given[3] for given in calls[n:]] == [(1, 2), (1, 4)], "another size is another search"


def test_targets_are_not_spent_on_the_first_layer_which_nothing_feeds(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(module, "_senders", lambda m, p, d, head, *rest: seen.append(head) or [])
    every = [(a, h) for a in range(3) for h in range(6)]
    heads = heads_of([(0, 1), (2, 0), (0, 2), (1, 1), (2, 2)], every)
    trace_back(None, [SimpleNamespace(identity=0)], heads, None, targets=2, progress=False)
    assert seen == [(2, 0), (1, 1)]


def test_no_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="trace_back: there are no pairs"):
        trace_back(None, [], heads_of([(1, 0)]), None, progress=False)


def senders(table: dict[str, list[tuple[str, bool]]]) -> Any:
    def run(model: Any, pairs: Any, directions: Any, head: Any, *rest: Any) -> list[dict[str, Any]]:
        receiver = f"L{head[0]}H{head[1]}"
        return [{"sender": s, "receiver": receiver, "kept": kept} for s, kept in table.get(receiver, [])]

    return run


def test_kept_heads_become_targets_once_and_no_deeper_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {
        "L3H0": [("L2H1", True), ("2_mlp_out", True), ("L1H1", False)],
        "L2H5": [("L2H1", True), ("L1H0", True)],
        "L2H1": [("L1H0", True), ("L0H3", True)],
        "L1H0": [("L0H0", True)],
    }
    monkeypatch.setattr(module, "_senders", senders(table))
    every = [(a, h) for a in range(4) for h in range(6)]
    heads = heads_of([(3, 0), (2, 5), (0, 1)], every)

    def edges(**more: Any) -> list[tuple[int, str, str]]:
        frame = trace_back(None, [SimpleNamespace(identity=0)], heads, None, progress=False, **more)
        return list(zip(frame["level"], frame["sender"], frame["receiver"], strict=True))

    first = [(1, s, r) for r in ("L3H0", "L2H5") for s, _ in table[r]]
    assert edges(depth=1) == first
    assert edges(depth=1, targets=1) == first[:3]
    second = [(2, "L1H0", "L2H1"), (2, "L0H3", "L2H1"), (2, "L0H0", "L1H0")]
    assert edges(depth=2) == first + second
    assert edges(depth=3) == first + second


def test_no_key_heads_and_those_of_the_first_layer_have_no_edges() -> None:
    for heads in (heads_of([], [(0, 0)]), heads_of([(0, 4)])):
        edges = trace_back(bundled(LLAVA), list(twins()[:4]), heads, directions(), progress=False)
        assert len(edges) == 0 and list(edges.columns) == list(COLUMNS)


@pytest.mark.parametrize("name", ["depth", "top", "targets"])
def test_sizes_below_one_are_named(name: str) -> None:
    sizes: dict[str, Any] = {name: 0}
    with pytest.raises(ValueError, match=f"{name}=0.*must be at least 1"):
        trace_back(None, [], heads_of([(1, 0)]), None, **sizes)
