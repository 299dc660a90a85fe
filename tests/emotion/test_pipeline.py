"""The whole run: parts that never share a person, a folder of its own, an estimate, and resuming to the same end."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.emotion.asked import bundled
from tests.emotion.small_run import MODEL, Stopped, answered, small_pairs, small_run, small_settings, stopped_in
from veena_lens.emotion import methods, pipeline
from veena_lens.emotion.estimates import answer_counts, estimate
from veena_lens.emotion.pairs.loading import load_pairs
from veena_lens.emotion.pipeline import _claim, part_identities, run_veena
from veena_lens.emotion.results import results_of
from veena_lens.emotion.settings import preset
from veena_lens.interventions import BoostAttention, Circuit


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_no_identity_is_in_two_parts_and_test_is_the_sets_own(seed: int) -> None:
    pairs = load_pairs()
    parts = part_identities(pairs, replace(preset("quick"), seed=seed))
    names = {name: {e.identity for e in part.examples} for name, part in parts.items()}
    assert list(parts) == ["directions", "mechanism", "validation", "test", "elsewhere"]
    assert sum(map(len, names.values())) == len(set().union(*names.values())) and all(names.values())
    assert {e.split for e in parts["test"].examples} == {"test"}
    assert {e.split for name in ("directions", "mechanism", "validation") for e in parts[name].examples} == {
        "development"
    }
    sizes = [len(names[name]) for name in ("directions", "mechanism", "validation")]
    assert sizes[0] == pytest.approx(2 * sizes[1], abs=2) and sizes[1] == pytest.approx(sizes[2], abs=1)


def test_parts_are_asked_without_context_and_with_ones_own_question() -> None:
    parts = part_identities(load_pairs(), replace(preset("quick"), question="What is felt?"))
    assert {(e.question, e.context) for part in parts.values() for e in part.examples} == {("What is felt?", None)}


def test_a_set_without_splits_sets_a_quarter_of_the_identities_aside() -> None:
    pairs = small_pairs().select(split="development")
    pairs = replace(pairs, pairs=tuple(pairs.pairs))
    parts = part_identities(pairs, preset("tiny"))
    names = [{e.identity for e in part.examples} for part in parts.values()]
    assert [len(x) for x in names] == [3, 1, 2, 2, 0] or sum(len(x) for x in names) == 8
    assert len(names[3]) == 2 and not names[4] and len(set().union(*names)) == 8


@pytest.mark.parametrize("n", [2, 3])
def test_too_few_identities_are_refused(n: int) -> None:
    pairs = small_pairs().select(split="development")
    few = pairs.select(identity=pairs.identities[:n])
    with pytest.raises(ValueError, match="at least three identities|none may be empty"):
        part_identities(few, preset("tiny"))


def test_a_folder_of_another_run_is_refused_and_the_same_run_goes_on(tmp_path: Path) -> None:
    about = {"model": ["m", 8], "pairs": "abc", "settings": {"seed": 0}}
    _claim(tmp_path / "new", about)
    _claim(tmp_path / "new", dict(reversed(about.items())))
    for key, value in (("model", ["m", 9]), ("pairs", "abd"), ("settings", {"seed": 1})):
        with pytest.raises(ValueError, match=rf"holds another run \(other {key}\); choose another folder, or delete"):
            _claim(tmp_path / "new", about | {key: value})
    assert json.loads((tmp_path / "new" / "run.json").read_text()) == about
    for damaged in (b"", b'{"model": ["m"', b"[]", b"null", b"3", b"\xff", b"[" * 100_000):
        (tmp_path / "new" / "run.json").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"run\.json does not say which run .* Remove the file where"):
            _claim(tmp_path / "new", about)


def test_the_estimate_adds_up_and_times_eight_answers(monkeypatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(methods, "generate_answers", lambda model, some, **kw: asked.append(len(some)))
    model: Any = SimpleNamespace(cfg=SimpleNamespace(n_layers=8))
    settings = replace(preset("tiny"), trials=3)
    parts = part_identities(load_pairs(), settings)
    text = estimate(model, parts, settings)
    assert asked == [2, 8]
    counts = {name.strip(): int(n) for name, n in re.findall(r"([a-z ]+) (\d+)[,)]", text.split("(")[1])}
    by_hand = {"key layers": 7 * 2, "injections": 7 * 2 * 8 * 2, "choosing": 8 * 3 * (2 + 1)}
    # VEE, at 3 already: 1 trial of 2 and 5, the other for the doses; ENA: 3 trials, and 2 with all neurons for the
    # doses; VEENA and the adaptive family: 2 and 3 trials.
    by_hand["tuning"] = 8 * 3 * (1 + 1 + 3 + 1 + 2 + 3)
    by_hand["test"] = 16 * (3 * 5 + 3 * 2) + 4 * 48
    by_hand["side effects"] = 5 * 4 * (2 * 2)
    assert {k: v for k, v in counts.items() if k != "directions"} == by_hand
    assert 35 < counts["directions"] < 70, "emotional images, and their neutral twins once per batch"
    assert f", {sum(counts.values())} answers" in text and "goes on where it was when it is started again" in text


# --- one small run, shared ---------------------------------------------------------------------------
def test_a_stopped_run_goes_on_and_keeps_what_was_there() -> None:
    run, before = small_run()
    assert run.out is not None and len(before) >= 3, "a file for each pair of the key layers"
    assert all((run.out / name).stat().st_mtime_ns == written for name, written in before)
    assert list(run.seconds) == list(pipeline.STAGES)


def test_a_run_generates_as_many_answers_as_were_counted_before() -> None:
    small_run()
    settings = small_settings()
    counted = answer_counts(8, part_identities(small_pairs(), settings), settings)
    assert {name: n for name, n in counted.items() if n} == dict(answered)


def test_a_run_parts_identities_and_judges_every_family_on_the_test_ones() -> None:
    run, _ = small_run()
    names = [name for part in run.splits.values() for name in part]
    assert len(names) == len(set(names)) == 11
    assert run.test.methods == ["plain", "VEE", "ENA", "VEENA", "VEENA adaptive"]
    assert list(run.test.hits) == ["alone", "consistent", "conflict, plain"]
    judged = {e.identity for some in run.test.examples.values() for e in some}
    assert judged == set(run.splits["test"]) and {len(x) for x in run.test.examples.values()} == {8}
    assert {e.method for e in run.effects} == set(run.test.methods)
    assert set(run.random.table["method"]) == {"VEE", "ENA", "VEENA"}
    assert ((run.random.table["percentile"] >= 0) & (run.random.table["percentile"] <= 1)).all()
    assert run.elsewhere is not None and list(run.elsewhere.hits) == ["emoji"]


def test_a_run_writes_the_circuit_that_it_judged() -> None:
    run, _ = small_run()
    assert run.out is not None
    found = Circuit.load(run.out / "circuit.safetensors")
    judged: Any = run.tuned["VEENA"].method.interventions
    assert [repr(x) for x in found] == [repr(x) for x in judged]
    assert found.meta["model"] == MODEL and "chosen:" in repr(run)
    boosted = {(x.layer, h) for x in found if isinstance(x, BoostAttention) for h in x.heads or ()}
    assert boosted == set(run.head_rankings.heads)


def masked(run: Any) -> str:
    found = results_of(run) | {"seconds": None}
    return json.dumps([found | {"side_effects": [e | {"latency": None} for e in found["side_effects"]]}])


@pytest.mark.slow
def test_a_run_stopped_in_the_test_stage_ends_as_one_that_was_not(tmp_path: Path) -> None:
    call: Any = (bundled(MODEL), small_pairs(), tmp_path, small_settings())
    with pytest.raises(Stopped), stopped_in("judge.held_out.random_controls"):
        run_veena(*call, progress=False)
    assert masked(run_veena(*call, progress=False)) == masked(small_run()[0])
