"""The whole method in order: directions, key layers, heads, neurons; choosing on validation; the judgement on test.

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
from typing import Any

from veena_lens.emotion.enhance.veena import Adaptive, fit_adaptive
from veena_lens.emotion.judge import choosing, held_out
from veena_lens.emotion.judge.evaluation import NEUTRAL, Evaluation, evaluate
from veena_lens.emotion.judge.tuning import Tuned
from veena_lens.emotion.locate.answer_slot import LEAD_IN, AnswerPosition, answer_position
from veena_lens.emotion.locate.directions import Directions, extract_directions
from veena_lens.emotion.locate.heads import KeyHeads, execution_heads, key_heads
from veena_lens.emotion.locate.layers import KeyLayers, key_layers
from veena_lens.emotion.locate.neurons import KeyNeurons, key_neurons
from veena_lens.emotion.locate.tracing import Stages, find_stages, spread_over, trace_back
from veena_lens.emotion.settings import Settings, preset
from veena_lens.interventions import Circuit
from veena_lens.long_runs import fingerprint

N_RIVALS = 8  # about; for the estimate alone
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
    """All that a run found; `results()` is what results.json holds."""

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
    ways: choosing.HeadRankings
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
        lines.append(f"  chosen: {self.ways.winner}")
        lines += ["  " + line for line in repr(self.test).splitlines()]
        if self.out is not None:
            lines.append(f"  written to {self.out}")
        return "\n".join(lines)


def run_veena(
    model: Any,
    pairs: Any = None,
    out: str | Path = "out/veena",
    settings: Settings | str = "quick",
    *,
    wheels: Any = None,
    progress: bool = True,
) -> VeenaRun:
    """Locate, enhance and judge on one model and one set of pairs (default: the embedded images).

    Writes under `out`: work/ (everything as it comes), circuit.safetensors, directions.safetensors. The same call
    resumes. Raises: ValueError where `out` holds another run, identities are too few to be parted, or as the stages.
    """
    from veena_lens.emotion.pairs.loading import load_pairs
    from veena_lens.emotion.words.wheels import EmotionWheels

    settings = preset(settings) if isinstance(settings, str) else settings
    if importlib.util.find_spec("sklearn") is None:
        raise ImportError("run_veena fits linear probes with scikit-learn; install it: pip install 'veena-lens[demo]'.")
    wheels = EmotionWheels.default() if wheels is None else wheels
    pairs = load_pairs() if pairs is None else pairs
    out = Path(out)
    work = out / "work"
    _claim(out, {"model": fingerprint(model), "pairs": pairs.fingerprint, "settings": settings.as_json()})
    clock = _Clock(progress)
    parts = part_identities(pairs, settings)
    if progress:
        print(estimate(model, parts, settings))
    bs, tokens = settings.batch_size, settings.max_new_tokens

    clock.start("directions")
    directions = extract_directions(
        model, _some(parts["directions"], settings.direction_pairs), tau=settings.tau, wheels=wheels, batch_size=bs,
        max_new_tokens=tokens, minimum=settings.minimum, lead_in=settings.lead_in, store=work / "directions",
        seed=settings.seed, progress=progress,
    )  # fmt: skip
    directions.save(out / "directions.safetensors")
    slot = answer_position(model, [*directions.emotions, NEUTRAL], wheels, settings.lead_in or LEAD_IN)
    mechanism = [p for p in parts["mechanism"] if p.emotion in directions.emotions]

    clock.start("key layers")
    layers = key_layers(
        model, _some(mechanism, settings.layer_pairs), directions, alphas=settings.alphas, scale=settings.scale,
        slot=slot, wheels=wheels, max_new_tokens=tokens, max_rows=settings.max_rows, draws=settings.draws,
        seed=settings.seed, out=work, progress=progress,
    )  # fmt: skip

    clock.start("key heads")
    traced = _some(mechanism, settings.mechanism_pairs)
    heads = key_heads(
        model, traced, directions, layers.best, k=settings.k_heads, lead_in=settings.lead_in, batch_size=bs,
        draws=settings.draws, seed=settings.seed, out=work, progress=progress,
    )  # fmt: skip
    edges = trace_back(
        model, traced, heads, directions, depth=settings.depth, seed=settings.seed, out=work, progress=progress
    )
    few = spread_over(list(traced), 24)
    execution = execution_heads(
        model, few, slot, layers.best, k=settings.k_heads, draws=settings.draws, out=work, progress=progress
    )

    clock.start("stages")
    stages = find_stages(model, mechanism, layers, heads, batch_size=bs, seed=settings.seed, progress=progress)

    clock.start("key neurons")
    neurons = key_neurons(
        model, traced, directions, layers.best, heads=heads, lead_in=settings.lead_in, k=settings.k_neurons,
        wheels=wheels, batch_size=bs,
        progress=progress,
    )  # fmt: skip

    clock.start("choosing")
    located = choosing.conditions_of(parts["mechanism"], settings, settings.mechanism_pairs, held_out=False)
    validation = choosing.conditions_of(parts["validation"], settings, settings.validation_pictures, held_out=False)
    call: dict[str, Any] = {"wheels": wheels, "out": work, "progress": progress}
    ways = choosing.compare_head_rankings(model, located, validation, slot, heads, settings, **call)

    clock.start("tuning")
    adaptive = fit_adaptive(
        model, validation["alone"], directions, layers.best, lead_in=settings.lead_in, batch_size=bs
    )
    tuned = choosing.tune_baselines(
        model, validation, ways, neurons, adaptive, directions, layers.best, settings, **call
    )
    circuit = choosing.final_circuit(tuned, model.cfg.model_name, settings)
    circuit.save(out / "circuit.safetensors")
    doses = choosing.dose_response(model, validation, ways, neurons, settings, **call)

    clock.start("test")
    conditions = choosing.conditions_of(parts["test"], settings, settings.test_pictures, held_out=True)
    sizes = {"batch_size": bs, "max_new_tokens": tokens, "draws": settings.draws}
    test = evaluate(model, conditions, [t.method for t in tuned.values()], **sizes, **call)
    controls = held_out.random_controls(model, conditions, tuned, test, ways, neurons, settings, **call)
    other = held_out.elsewhere(parts["elsewhere"], settings)
    chosen = [tuned[name].method for name in ("VEE", "ENA", "VEENA") if name in tuned]
    away = evaluate(model, other, chosen, **sizes, **call) if other else None

    clock.start("side effects")
    effects = held_out.side_effects(model, conditions, test, tuned, settings, out=work, progress=progress)
    clock.stop()
    return VeenaRun(
        model=model.cfg.model_name, settings=settings,
        splits={name: sorted({e.identity for e in part.examples}) for name, part in parts.items()},
        directions=directions, layers=layers, heads=heads, edges=edges, execution=execution, stages=stages,
        neurons=neurons, slot=slot, ways=ways, tuned=tuned, adaptive=adaptive, circuit=circuit, test=test,
        random=controls, elsewhere=away, doses=doses, effects=effects, seconds=clock.seconds, out=out,
    )  # fmt: skip


def part_identities(pairs: Any, settings: Settings) -> dict[str, Any]:
    """The parts of a run by name: directions, mechanism and validation (2 : 1 : 1 of the development identities), test,
    and elsewhere (other styles, and images without twins).

    Where the set names no split "test", a quarter of the identities is set aside for it.
    Raises: ValueError for fewer than four identities."""
    pairs = pairs.without_context() if settings.question is None else pairs.without_context().asked(settings.question)
    splits = {e.split for e in pairs.examples}
    if "test" in splits:
        test = pairs.select(split="test")
        rest = (
            pairs.select(split="development")
            if "development" in splits
            else pairs.select(split=sorted(s for s in splits if s not in ("test", "held-out style", "emoji")))
        )
        others = sorted(s for s in splits if s not in ("test", "development"))
        elsewhere = pairs.select(split=others) if others and "development" in splits else pairs.of([])
    else:
        rest, test = pairs.split((3, 1), settings.seed)
        elsewhere = pairs.of([])
    found = sorted({p.identity for p in rest})
    if len(found) < 3 or not len(test):
        raise ValueError(
            f"run: {len(found)} identities for directions, mechanism and validation and {len(test)} test pairs; at "
            "least three identities and a test part are needed, so that none is on two sides."
        )
    directions, mechanism, validation = rest.split((2, 1, 1), settings.seed)
    return {
        "directions": directions, "mechanism": mechanism, "validation": validation, "test": test,
        "elsewhere": elsewhere,
    }  # fmt: skip


def estimate(model: Any, parts: Mapping[str, Any], settings: Settings) -> str:
    """How many answers and forward passes a run will take, and how long: eight answers are timed for it."""
    from veena_lens.emotion.methods import generate_answers

    some = [p.emotional for p in list(parts["validation"])[:8]]
    generate_answers(model, some[:2], max_new_tokens=2)
    began = time.perf_counter()
    generate_answers(model, some, batch_size=8, max_new_tokens=settings.max_new_tokens)
    each = (time.perf_counter() - began) / max(1, len(some))
    n_conditions = 2 + len(settings.strengths)

    def bounded(n: int, most: int | None) -> int:
        return n if most is None else min(n, most)

    n_families = 4 + (N_RIVALS if settings.rivals else 0)
    counts = {
        "directions": 2 * bounded(len(parts["directions"]), settings.direction_pairs),
        "key layers": bounded(len(parts["mechanism"]), settings.layer_pairs)
        * 2 * model.cfg.n_layers * len(settings.alphas) // 4,
        "choosing": bounded(8 * len(parts["validation"]) // 7, settings.validation_pictures)
        * n_conditions * len(settings.ways) * len(settings.modes),
        "tuning": bounded(8 * len(parts["validation"]) // 7, settings.validation_pictures)
        * n_conditions * (n_families * settings.trials + 1),
        "test": bounded(8 * len(parts["test"]) // 7, settings.test_pictures)
        * (n_conditions * (n_families + 1) + settings.random_draws * 2 * len(settings.strengths)),
    }  # fmt: skip
    total = sum(counts.values())
    detail = ", ".join(f"{name} {n}" for name, n in counts.items())
    return (
        f"About {total} answers ({detail}) at {each:.3f} s each: {total * each / 60:.1f} minutes and about half as "
        "long again for patching. Stopped at any moment, the same command goes on."
    )


def _some(pairs: Any, most: int | None) -> Any:
    """At most so many pairs, emotions and identities in turn."""
    if most is None or len(pairs) <= most:
        return pairs
    return pairs.sample(most) if hasattr(pairs, "sample") else spread_over(list(pairs), most)


def _claim(out: Path, about: dict[str, Any]) -> None:
    """Mark the folder as this run's. Raises: ValueError where it is another's."""
    text = json.dumps(about, sort_keys=True, default=str, indent=1)
    mark = out / "run.json"
    if mark.is_file() and mark.read_text() != text:
        before = json.loads(mark.read_text())
        differ = [k for k in about if before.get(k) != json.loads(text).get(k)]
        raise ValueError(
            f"{out} holds another run (other {', '.join(differ) or 'settings'}); choose another folder, or delete it."
        )
    out.mkdir(parents=True, exist_ok=True)
    mark.write_text(text)


class _Clock:
    """Names the stages as they begin, and keeps their seconds."""

    def __init__(self, show: bool) -> None:
        self.show, self.seconds, self.now, self.began = show, {}, "", 0.0

    def start(self, name: str) -> None:
        self.stop()
        self.now, self.began = name, time.perf_counter()
        if self.show:
            print(f"[{STAGES.index(name) + 1}/{len(STAGES)}] {name}", flush=True)

    def stop(self) -> None:
        if self.now:
            self.seconds[self.now] = time.perf_counter() - self.began
            if self.show:
                print(f"      {self.seconds[self.now]:.1f} s", flush=True)
        self.now = ""
