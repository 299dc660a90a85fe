"""The table of where a direction is read: hits by hand, and a small table of the embedded model."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from veena_lens.benchmarks import directions as module
from veena_lens.emotion import load_pairs


def test_hits_are_counted_over_emotions_each_under_its_own_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    steered: list[Any] = []
    model = SimpleNamespace(intervene=lambda edits: steered.extend(edits) or nullcontext())
    directions: Any = SimpleNamespace(
        emotions=("happy", "angry"), steer=lambda layer, alpha, emotion, scale: (layer, alpha, emotion, scale)
    )
    said = iter([["she is happy", "not happy", "angry"], ["furious", "calm", "angry"]])
    monkeypatch.setattr(module, "generate_answers", lambda *given, **more: next(said))
    plain: Any = getattr(module.named, "__wrapped__", module.named)  # stand-ins instead of a model and directions
    assert plain(model, directions, [0, 1, 2], 4, 1.5) == (3, 6)
    assert steered == [(4, 1.5, "happy", "raw"), (4, 1.5, "angry", "raw")]


@pytest.mark.slow
def test_the_table_has_a_row_a_way_and_directions_beat_noise(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = load_pairs()
    people = [*pairs.select(split="development").identities[:10], *pairs.select(split="test").identities[:4]]
    monkeypatch.setattr(module, "load_pairs", lambda: pairs.select(identity=people))
    monkeypatch.setattr(module, "WAYS", {"list": module.WAYS["asked for a list"]})
    monkeypatch.setattr(module, "EMOTIONS", ["happy", "angry"])
    module.main(["--model", "tiny-llava-emotion", "--alphas", "1.5"])
    head, rule, row = capsys.readouterr().out.splitlines()
    assert head == "| model | read at | strength | split-half | alpha 1.5 | random, same norm |"
    assert rule.count("---") == 6 and row.startswith("| tiny-llava-emotion | list | ")
    steered, noise = (tuple(map(int, cell.split(" of "))) for cell in row.strip("| ").split(" | ")[-2:])
    assert steered[1] == noise[1] == 8 and steered[0] >= 6 > 2 >= noise[0]
