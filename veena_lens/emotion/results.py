"""A run as numbers: what results.json holds, and its tables as Markdown."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from veena_lens.emotion import tables
from veena_lens.emotion.pipeline import VeenaRun
from veena_lens.long_runs import write_file

FORMAT = "veena_lens.results/1"


def results_of(run: VeenaRun) -> dict[str, Any]:
    """Return everything that a run measured, as JSON holds it; NaN becomes null."""
    layers, heads = run.layers, run.heads
    found = {
        "format": FORMAT,
        "model": run.model,
        "settings": run.settings.as_json(),
        "identities": {name: list(names) for name, names in run.splits.items()},
        "versions": {name: version(name) for name in ("torch", "transformers", "transformer_lens")}
        | {"python": platform.python_version()},
        "seconds": dict(run.seconds),
        "directions": {
            "counts": _counts(run.directions.counts),
            "summary": _records(run.directions.summary()),
        },
        "key_layers": {
            "best": layers.best,
            "band": layers.band,
            "emotional": layers.emotional,
            "neutral": layers.neutral,
            "pairs": layers.n_pairs,
            "agreement_of_soft_and_generated": layers.agreement,
            "by_layer": layers.summary().to_dict("records"),
            "by_dose": {
                "layers": list(layers.restored.labels["layer"]),
                "alphas": list(layers.restored.labels["alpha"]),
                "C": layers.restored.values[..., 1].tolist(),
                "control": layers.control.values[..., 1].tolist(),
                "perplexity": layers.fluency.values.tolist(),
            },
            "crossed_at_best": {
                "emotions": list(layers.crossed.labels["named"]),
                "shares": layers.crossed.select(layer=layers.best).values.tolist(),
            },
        },
        "stages": {"layers": run.stages.spans(), "decodable": run.stages.decodable.values.tolist()},
        "key_heads": {
            "heads": [list(h) for h in heads.heads],
            "pairs": heads.n_pairs,
            "dropped": heads.dropped,
            "table": heads.table.head(32).to_dict("records"),
            "edges": run.edges.to_dict("records"),
            "execution": run.execution.to_dict("records"),
        },
        "key_neurons": run.neurons.table.to_dict("records"),
        "ways": {"table": run.head_rankings.table.to_dict("records"), "winner": list(run.head_rankings.winner)},
        "tuned": {
            name: {"settings": dict(t.method.settings), "worth": t.score, "trials": t.trials.to_dict("records")}
            for name, t in run.tuned.items()
        },
        "test": {"table": run.test.table().to_dict("records"), "by_emotion": run.test.per_emotion().to_dict("records")},
        "random": {"draws": run.random.draws, "table": run.random.table.to_dict("records")},
        "elsewhere": None if run.elsewhere is None else run.elsewhere.table().to_dict("records"),
        "doses": run.doses.to_dict("records"),
        "side_effects": [e.to_dict() for e in run.effects],
    }
    return _clean(found)


def save_results(run: VeenaRun, path: str | Path) -> Path:
    """Write results.json, replacing it in one step."""
    path = Path(path)
    write_file(path, json.dumps(results_of(run), indent=1) + "\n")
    return path


def main_table(results: dict[str, Any], methods: list[str] | None = None) -> str:
    """Return the main table as Markdown: a row per method, a column per condition, hit rates in percent.

    Each cell holds the hit rate with its interval, and a star where the difference to the plain model is significant
    (p < 0.05, paired, identities' signs flipped).

    Args:
        results: what results.json holds.
        methods: the rows; by default all.
    """
    return tables.main(results, methods).markdown()


def part_table(results: dict[str, Any], part: str) -> str:
    """Return one part of a run as Markdown.

    Args:
        results: what results.json holds.
        part: "main", "summary" (the method beside its controls and its price), "random", "ways" (rankings of
            heads), "tuned", "effects", "elsewhere", "layers" or "heads".

    Raises: ValueError for an unknown part."""
    if part == "main":
        return main_table(results)
    if part not in PARTS:
        raise ValueError(f"No part {part!r}; parts: main, {', '.join(PARTS)}.")
    return PARTS[part](results).markdown()


def _key_heads(results: dict[str, Any]) -> tables.Table:
    found = tables.heads(results)
    return replace(found, records=[r for r in found.records if r["key"]])


PARTS: dict[str, Callable[[dict[str, Any]], tables.Table]] = {
    "summary": tables.summary,
    "random": tables.random,
    "ways": tables.head_rankings,
    "tuned": tables.tuned,
    "effects": tables.effects,
    "elsewhere": tables.elsewhere,
    "layers": tables.layers,
    "heads": _key_heads,
}


def _counts(counts: Any) -> Any:
    return counts if isinstance(counts, (dict, list)) else _records(counts)


def _records(table: Any) -> Any:
    table = (
        table.to_frame()
        if hasattr(table, "to_frame") and hasattr(table, "axes") and hasattr(table, "exists")
        else table
    )
    return table.to_dict("records") if hasattr(table, "to_dict") else table


def _clean(value: Any) -> Any:
    """Return what JSON holds: numbers of numpy and tensors as Python's, NaN and infinities as null."""
    if isinstance(value, dict):
        return {str(k): _clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(v) for v in value]
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
