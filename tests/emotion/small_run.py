"""One small run of the whole method on the bundled model, stopped once and resumed; whoever needs it shares it."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from tests.emotion.asked import bundled
from veena_lens.emotion import methods, pipeline
from veena_lens.emotion.judge import evaluation
from veena_lens.emotion.locate import layers
from veena_lens.emotion.pairs.loading import load_pairs
from veena_lens.emotion.pipeline import VeenaRun, run_veena
from veena_lens.emotion.settings import Settings, preset

EMOTIONS = ["happy", "sad", "angry", "neutral"]
MODEL = "tiny-llava-emotion"
_folders: list[Any] = []  # kept while the tests run, removed at the end
answered: Counter[str] = Counter()  # answers that the small run generated, by stage


@cache
def small_pairs() -> Any:
    """Three emotions of eight people to learn from, two to test on, and an emoji."""
    pairs = load_pairs().without_context()
    names = sorted(pairs.select(split="development").identities)[:8]
    names += sorted(pairs.select(split="test").identities)[:2] + sorted(pairs.select(split="emoji").identities)[:1]
    return pairs.select(identity=names, emotion=EMOTIONS)


def small_settings() -> Settings:
    return replace(
        preset("tiny"), minimum=1, alphas=(1.6,), direction_pairs=12, mechanism_pairs=6, layer_pairs=3, k_heads=3,
        k_neurons=5, conflict_examples=4, trials=1, betas=(5.0,), gammas=(3.0,), max_new_tokens=6, draws=50,
    )  # fmt: skip


class Stopped(Exception):
    """What a test raises in the middle of a run."""


def stopped_in(name: str) -> Any:
    """Inside the block the pipeline stops where it would call `name`."""
    return mock.patch(f"veena_lens.emotion.{name}", side_effect=Stopped)


def new_folder() -> Path:
    _folders.append(tempfile.TemporaryDirectory(prefix="veena-"))
    return Path(_folders[-1].name)


@cache
def small_run() -> tuple[VeenaRun, list[tuple[str, int]]]:
    """(the run, files that were there when it was stopped after the key layers, with the times of their writing)."""
    folder = new_folder()
    call: Any = (bundled(MODEL), small_pairs(), folder, small_settings())
    with counting_answers():
        try:
            with stopped_in("pipeline.key_heads"):
                run_veena(*call, progress=False)
        except Stopped:
            pass
        files = sorted(folder.glob("work/*/*.safetensors"))
        before = [(str(p.relative_to(folder)), p.stat().st_mtime_ns) for p in files]
        return run_veena(*call, progress=False), before


@contextmanager
def counting_answers() -> Iterator[None]:
    """Count the answers that are generated inside the block, by stage; those under injection as "injections"."""
    stage = [""]
    begin, answer, inject = pipeline._Clock.start, methods.answers_to, layers.generation_sweep

    def start(clock: Any, name: str) -> None:
        stage[0] = name
        begin(clock, name)

    def answers_to(*args: Any) -> list[str]:
        said = answer(*args)
        answered[stage[0]] += len(said)
        return said

    def sweep(model: Any, inputs: Any, entries: Any, **kw: Any) -> Any:
        answered["injections"] += len(entries) * len(inputs)
        return inject(model, inputs, entries, **kw)

    with (
        mock.patch.object(pipeline._Clock, "start", start),
        mock.patch.object(methods, "answers_to", answers_to),
        mock.patch.object(evaluation, "answers_to", answers_to),
        mock.patch.object(layers, "generation_sweep", sweep),
    ):
        yield
