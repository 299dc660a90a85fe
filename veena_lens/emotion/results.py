"""A run as numbers: what results.json holds, and the table of the README made from it."""

from __future__ import annotations

import json
import math
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from veena_lens.emotion.pipeline import VeenaRun

FORMAT = "veena_lens.results/1"
OURS = ("VEE", "ENA", "VEENA", "VEENA adaptive")


def results_of(run: VeenaRun) -> dict[str, Any]:
    """Everything that a run measured, as JSON holds it; NaN becomes null."""
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
        "ways": {"table": run.ways.table.to_dict("records"), "winner": list(run.ways.winner)},
        "tuned": {
            name: {"settings": dict(t.method.settings), "worth": t.worth, "trials": t.trials.to_dict("records")}
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
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results_of(run), indent=1) + "\n")
    part.replace(path)
    return path


def main_table(results: dict[str, Any], methods: list[str] | None = None) -> str:
    """The main table as Markdown: a row a method, a column a condition; hit rate in percent with its interval, and
    where the difference to the plain model is significant (p < 0.05, paired, identities' signs flipped) a star."""
    rows = results["test"]["table"]
    conditions = list(dict.fromkeys(row["condition"] for row in rows))
    wanted = list(dict.fromkeys(row["method"] for row in rows)) if methods is None else methods
    false = {row["method"]: row["false"] for row in rows if row["condition"] == "alone"}
    lines = ["| method | " + " | ".join(conditions) + " | false emotion |"]
    lines.append("|---" * (len(conditions) + 2) + "|")
    for method in wanted:
        cells = []
        for condition in conditions:
            row = next(r for r in rows if r["method"] == method and r["condition"] == condition)
            star = "*" if row.get("p") is not None and row["p"] < 0.05 else ""
            cells.append(f"{100 * row['hit']:.1f}{star} [{100 * row['low']:.0f}, {100 * row['high']:.0f}]")
        wrong = "" if false.get(method) is None else f"{100 * false[method]:.1f}"
        lines.append(f"| {method} | " + " | ".join(cells) + f" | {wrong} |")
    return "\n".join(lines)


def part_table(results: dict[str, Any], part: str) -> str:
    """One part of a run as Markdown: "main", "random", "ways", "tuned", "effects", "elsewhere", "layers" or "heads".

    Raises: ValueError for an unknown part."""
    if part == "main":
        return main_table(results)
    if part not in PARTS:
        raise ValueError(f"No part {part!r}; parts: main, {', '.join(PARTS)}.")
    return PARTS[part](results)


def _random(results: dict[str, Any]) -> str:
    rows = [
        [r["method"], r["condition"], _percent(r["plain"]), _percent(r["real"]), _percent(r["random"])]
        + [f"{_percent(r['low'])} to {_percent(r['high'])}", f"{100 * r['percentile']:.0f}"]
        for r in results["random"]["table"]
    ]
    return _markdown(["method", "condition", "plain", "chosen", "random", "95 % of random", "percentile"], rows)


def _ways(results: dict[str, Any]) -> str:
    rows = [
        [r["way"], r["mode"], _percent(r["plain"]), _percent(r["worth"]), _percent(r["harm"]), f"{r['perplexity']:.2f}"]
        for r in results["ways"]["table"]
    ]
    return _markdown(["heads ranked by", "mode", "plain", "worth", "harm", "perplexity"], rows)


def _tuned(results: dict[str, Any]) -> str:
    rows = []
    for name, tuned in results["tuned"].items():
        shown = {k: v for k, v in tuned["settings"].items() if k not in ("layers", "directions", "vectors", "source")}
        settings = ", ".join(f"{k} {v}" for k, v in shown.items())
        allowed = sum(bool(t["allowed"]) for t in tuned["trials"])
        rows.append([name, settings, _percent(tuned["worth"]), f"{allowed} of {len(tuned['trials'])}"])
    return _markdown(["method", "settings", "worth", "trials allowed"], rows)


def _effects(results: dict[str, Any]) -> str:
    names = ["perplexity", "distinct_2", "repetition", "drift", "attributes", "described", "latency"]
    rows = [[e["method"], *["" if e.get(n) is None else f"{e[n]:.3g}" for n in names]] for e in results["side_effects"]]
    return _markdown(["method", *[n.replace("_", "-") for n in names]], rows)


def _elsewhere(results: dict[str, Any]) -> str:
    rows = [
        [r["condition"], r["method"], str(r["n"]), _percent(r["hit"]), f"{_percent(r['low'])} to {_percent(r['high'])}"]
        for r in results["elsewhere"] or []
    ]
    return _markdown(["pictures", "method", "n", "hit rate", "95 %"], rows)


def _layers(results: dict[str, Any]) -> str:
    rows = [
        [str(r["layer"]), f"{r['C']:.2f}", f"{r['low']:.2f} to {r['high']:.2f}", f"{r['control']:.2f}"]
        + ["yes" if r["in_band"] else ""]
        for r in results["key_layers"]["by_layer"]
    ]
    return _markdown(["layer", "C", "95 %", "random direction", "in the band"], rows)


def _heads(results: dict[str, Any]) -> str:
    rows = [
        [f"L{r['layer']}H{r['head']}", f"{r['effect']:.3f}", f"{r['low']:.3f} to {r['high']:.3f}", r["rows"]]
        + [f"{r['intention']:.2f}", _percent(r["from_picture"]), r["label"], r["emotion"]]
        for r in results["key_heads"]["table"]
        if r["key"]
    ]
    return _markdown(["head", "restores", "95 %", "at", "intention", "from picture, %", "kind", "most"], rows)


PARTS: dict[str, Any] = {
    "random": _random,
    "ways": _ways,
    "tuned": _tuned,
    "effects": _effects,
    "elsewhere": _elsewhere,
    "layers": _layers,
    "heads": _heads,
}


def _percent(x: float | None) -> str:
    return "" if x is None else f"{100 * x:.1f}"


def _markdown(columns: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


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
    """What JSON holds: numbers of numpy and tensors as Python's, NaN and infinities as null."""
    if isinstance(value, dict):
        return {str(k): _clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(v) for v in value]
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
