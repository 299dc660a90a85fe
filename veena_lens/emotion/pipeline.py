"""The whole method in order: directions, key layers, heads, neurons; model selection; evaluation on the test part.

Identities are parted into directions, mechanism, validation and test, and never cross. Every stage keeps its results
in the output folder as they come, so that a run stopped at any moment goes on with the same result.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veena_lens.emotion.enhance.veena import Adaptive, fit_adaptive
from veena_lens.emotion.estimates import estimate
from veena_lens.emotion.judge import held_out
from veena_lens.emotion.judge.evaluation import NEUTRAL, Evaluation, evaluate
from veena_lens.emotion.judge.model_selection import (
    HeadRankings,
    compare_head_rankings,
    conditions_of,
    dose_response,
    final_circuit,
    tune_baselines,
)
from veena_lens.emotion.judge.tuning import Tuned
from veena_lens.emotion.locate.answer_slot import LEAD_IN, AnswerPosition, answer_position
from veena_lens.emotion.locate.directions import Directions, extract_directions
from veena_lens.emotion.locate.heads import KeyHeads, execution_heads, key_heads
from veena_lens.emotion.locate.layers import KeyLayers, key_layers
from veena_lens.emotion.locate.neurons import KeyNeurons, key_neurons
from veena_lens.emotion.locate.tracing import Stages, find_stages, trace_back
from veena_lens.emotion.pairs.loading import load_pairs
from veena_lens.emotion.pairs.parts import elsewhere, part_identities, some_pairs, spread_over
from veena_lens.emotion.settings import Settings, preset
from veena_lens.emotion.study import Study
from veena_lens.fingerprints import fingerprint
from veena_lens.interventions import Circuit
from veena_lens.long_runs import write_file

if TYPE_CHECKING:
    from veena_lens.emotion.pairs.pair_set import PairSet
    from veena_lens.emotion.words.wheels import EmotionWheels
    from veena_lens.model.model import HookedVLM

TRACING_DRAWS = 1000  # of the intervals of edges
STAGES = (
    "directions",
    "key layers",
    "key heads",
    "stages",
    "key neurons",
    "choosing",
    "tuning",
    "test",
    "side effects",
)


@dataclass(frozen=True, eq=False, kw_only=True)
class VeenaRun:
    """The findings of a run; `results()` is what results.json holds."""

    model: str
    settings: Settings
    splits: Mapping[str, Sequence[str]]
    directions: Directions
    layers: KeyLayers
    heads: KeyHeads
    edges: Any
    execution: Any
    stages: Stages
    neurons: KeyNeurons
    slot: AnswerPosition
    head_rankings: HeadRankings
    tuned: Mapping[str, Tuned]
    adaptive: Adaptive
    circuit: Circuit
    test: Evaluation
    random: held_out.RandomControls
    elsewhere: Evaluation | None
    doses: Any
    effects: Sequence[Any]
    seconds: Mapping[str, float] = field(default_factory=dict)
    out: Path | None = None

    def __repr__(self) -> str:
        lines = [f"VeenaRun of {self.model} ({self.settings.preset})"]
        lines += [f"  {part!r}" for part in (self.layers, self.heads, self.neurons, self.stages)]
        lines.append(f"  chosen: {self.head_rankings.winner}")
        lines += ["  " + line for line in repr(self.test).splitlines()]
        if self.out is not None:
            lines.append(f"  written to {self.out}")
        return "\n".join(lines)


def run_veena(
    model: HookedVLM,
    pairs: PairSet | None = None,
    out: str | Path = "out/veena",
    settings: Settings | str = "quick",
    *,
    wheels: EmotionWheels | None = None,
    progress: bool = True,
) -> VeenaRun:
    """Locate, enhance and judge on one model and one set of pairs.

    1. Part the identities into directions, mechanism, validation and test.
    2. Extract directions; find key layers, heads, the edges between them, stages and neurons on the mechanism's.
    3. Choose the ranking of heads, and tune every family on the validation's.
    4. Evaluate on the test's: the main table, random controls, other images, side effects.

    Args:
        model: the model that is studied.
        pairs: emotional images with neutral twins; by default the embedded ones.
        out: the folder for work/ (everything as it comes), circuit.safetensors and directions.safetensors; the same
            call resumes there.
        settings: a preset's name, or settings.
        wheels: emotion wheels that judge answers; by default the project's own.
        progress: True prints an estimate and a line per stage, and shows progress bars on a terminal.

    Raises: ImportError without scikit-learn; ValueError where `out` holds another run, identities are too few to be
    parted, or as the stages.
    """
    settings = preset(settings) if isinstance(settings, str) else settings
    if importlib.util.find_spec("sklearn") is None:
        raise ImportError("run_veena fits linear probes with scikit-learn; install it: pip install 'veena-lens[demo]'.")
    pairs = load_pairs() if pairs is None else pairs
    out = Path(out)
    _claim(out, {"model": fingerprint(model), "pairs": pairs.fingerprint, "settings": settings.as_json()})
    study = Study.of(
        model, wheels=wheels, **settings.for_study(), seed=settings.seed, out=out / "work", progress=progress
    )
    judging = study.but(seed=0)  # intervals of different runs are drawn alike
    clock = _Clock(progress)
    parts = part_identities(pairs, settings)
    if progress:
        print(estimate(model, parts, settings), flush=True)

    clock.start("directions")
    directions = extract_directions(
        study.but(out=out / "work" / "directions"), some_pairs(parts["directions"], settings.direction_pairs),
        tau=settings.tau, minimum=settings.minimum,
    )  # fmt: skip
    directions.save(out / "directions.safetensors")
    slot = answer_position(model, [*directions.emotions, NEUTRAL], study.wheels, settings.lead_in or LEAD_IN)
    mechanism = [p for p in parts["mechanism"] if p.emotion in directions.emotions]

    clock.start("key layers")
    layers = key_layers(
        study, some_pairs(mechanism, settings.layer_pairs), directions, alphas=settings.alphas, scale=settings.scale,
        slot=slot, max_rows=settings.max_rows,
    )  # fmt: skip

    clock.start("key heads")
    traced = some_pairs(mechanism, settings.mechanism_pairs)
    heads = key_heads(study, traced, directions, layers.best, k=settings.k_heads)
    edges = trace_back(study.but(draws=TRACING_DRAWS), traced, heads, directions, depth=settings.depth)
    few = spread_over(list(traced), 24)
    execution = execution_heads(judging, few, slot, layers.best, k=settings.k_heads)

    clock.start("stages")
    stages = find_stages(study, mechanism, layers, heads)

    clock.start("key neurons")
    neurons = key_neurons(study, traced, directions, layers.best, heads=heads, k=settings.k_neurons)

    clock.start("choosing")
    located = conditions_of(parts["mechanism"], settings, settings.mechanism_pairs, held_out=False)
    validation = conditions_of(parts["validation"], settings, settings.validation_pictures, held_out=False)
    ranked = compare_head_rankings(judging, located, validation, slot, heads, settings)

    clock.start("tuning")
    asking = study.asking
    adaptive = fit_adaptive(
        model, validation["alone"], directions, layers.best, lead_in=asking.lead_in, batch_size=asking.batch_size
    )
    tuned = tune_baselines(judging, validation, ranked, neurons, adaptive, directions, layers.best, settings)
    circuit = final_circuit(tuned, model.cfg.model_name, settings)
    circuit.save(out / "circuit.safetensors", model)
    doses = dose_response(judging, validation, ranked, neurons, settings)

    clock.start("test")
    conditions = conditions_of(parts["test"], settings, settings.test_pictures, held_out=True)
    test = evaluate(judging, conditions, [t.method for t in tuned.values()])
    controls = held_out.random_controls(judging, conditions, tuned, test, ranked, neurons, settings)
    other = elsewhere(parts["elsewhere"], settings)
    chosen = [tuned[name].method for name in ("VEE", "ENA", "VEENA") if name in tuned]
    away = evaluate(judging, other, chosen) if other else None

    clock.start("side effects")
    effects = held_out.side_effects(judging, conditions, test, tuned, settings)
    clock.stop()
    return VeenaRun(
        model=model.cfg.model_name, settings=settings,
        splits={name: sorted({e.identity for e in part.examples}) for name, part in parts.items()},
        directions=directions, layers=layers, heads=heads, edges=edges, execution=execution, stages=stages,
        neurons=neurons, slot=slot, head_rankings=ranked, tuned=tuned, adaptive=adaptive, circuit=circuit, test=test,
        random=controls, elsewhere=away, doses=doses, effects=effects, seconds=clock.seconds, out=out,
    )  # fmt: skip


def _claim(out: Path, about: dict[str, Any]) -> None:
    """Mark the folder as this run's. Raises: ValueError where it is another's."""
    text = json.dumps(about, sort_keys=True, default=str, indent=1)
    mark = out / "run.json"
    if mark.exists():
        try:
            before = json.loads(mark.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            before = error
        if not isinstance(before, dict):
            raise ValueError(
                f"{mark} does not say which run {out} holds: {str(before)[:100] or 'it is empty'}. Remove the file "
                "where you know that the folder is this run's, or choose another folder."
            )
        differ = [k for k in {**about, **before} if before.get(k) != json.loads(text).get(k)]
        if differ:
            raise ValueError(
                f"{out} holds another run (other {', '.join(differ)}); choose another folder, or delete it."
            )
        return
    write_file(mark, text)


class _Clock:
    """A clock that names the stages as they begin, one line each with the time since the start, and keeps their
    seconds."""

    def __init__(self, show: bool) -> None:
        self.show, self.seconds, self.now = show, {}, ""
        self.first = self.began = time.perf_counter()

    def start(self, name: str) -> None:
        self.stop()
        self.now, self.began = name, time.perf_counter()
        if self.show:
            since = time.perf_counter() - self.first
            print(f"[{since:5.0f} s] {STAGES.index(name) + 1}/{len(STAGES)} {name}", flush=True)

    def stop(self) -> None:
        if self.now:
            self.seconds[self.now] = time.perf_counter() - self.began
        self.now = ""
