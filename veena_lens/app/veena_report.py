"""The report of a run: report.html, one self-contained page that says what was found and how well it works.

The findings stand on top; what they rest on is folded below, and printed in full.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veena_lens import plots
from veena_lens.app.html import Report, Thumbnail, Tone
from veena_lens.app.veena_findings import best_doses, findings, layer_finding
from veena_lens.circuits import direct_attribution_map
from veena_lens.emotion import tables
from veena_lens.emotion.locate.tracing import show_run
from veena_lens.emotion.methods import ROWS, prepared
from veena_lens.emotion.pipeline import VeenaRun
from veena_lens.emotion.results import results_of
from veena_lens.emotion.settings import Settings
from veena_lens.emotion.tables import display_name, percent
from veena_lens.images.files import open_image

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM

TONES: dict[str, Tone] = {"hit": "good", "miss": "bad", "key": "good"}
SHOWN_HEADS = 8
SETTINGS = {
    "preset": "preset",
    "direction_pairs": "pairs for directions, at most",
    "mechanism_pairs": "pairs for heads and neurons, at most",
    "layer_pairs": "pairs for layers, at most",
    "validation_pictures": "validation images, at most",
    "test_pictures": "test images, at most",
    "alphas": "doses of a direction",
    "k_heads": "key heads, at most",
    "k_neurons": "key neurons, at most",
    "betas": "factors on attention (beta)",
    "gammas": "factors on neurons (gamma)",
    "trials": "trials per method",
    "ways": "rankings of heads",
    "modes": "attention modes",
    "strengths": "strengths of a conflicting context",
    "random_draws": "random sets",
    "draws": "draws of an interval",
    "max_new_tokens": "longest answer, tokens",
    "seed": "seed",
}


def write_veena_report(run: VeenaRun, model: HookedVLM, path: str | Path, command: Sequence[str] = ()) -> Path:
    """Write the page, and return its path.

    Args:
        run: what `run_veena` returned.
        model: the model of the run, which is asked where its best heads read.
        path: the file.
        command: a command line that is shown as what makes the page again.
    """
    report = Report(f"Emotion circuit of {run.model}", lead=_lead(run))
    results = results_of(run)
    _found(report, run, results)
    _main_table(report, run, results)
    _answers(report, run)
    _layers(report, run)
    _heads(report, run, model, results)
    _neurons(report, run, results)
    _choices(report, run, results)
    _controls(report, run, results)
    _how(report, run, command)
    return report.save(path)


def _table(report: Report, table: tables.Table, caption: str = "") -> None:
    columns, rows = table.page()
    report.table(columns, rows, caption=caption, tones=TONES)


def _lead(run: VeenaRun) -> str:
    table = run.test.table()
    conflict = [c for c in run.test.hits if c.startswith("conflict")] or list(run.test.hits)

    def mean(method: str) -> float:
        rows = table[(table["method"] == method) & table["condition"].isin(conflict)]
        return float(rows["hit"].mean())

    parts = [f"{name} {percent(mean(name))} %" for name in ("VEE", "ENA", "VEENA") if name in run.test.methods]
    return (
        f"Of held-out images whose context says another emotion, the plain model names the image's in "
        f"{percent(mean('plain'))} % of answers; {', '.join(parts)}."
    )


def _found(report: Report, run: VeenaRun, results: dict[str, Any]) -> None:
    """Say in a few lines what was found, and whether the run was large enough to show it."""
    report.section("What was found")
    if run.settings.preset != "full":
        n = len(next(iter(run.test.examples.values())))
        report.text(
            f"This run used the preset {run.settings.preset}: {n} test images, {run.settings.trials} trials per method "
            f"and {run.random.draws} random draws. It shows that every step works"
            + (". It is too small for findings" if run.settings.preset == "tiny" else "")
            + "; the numbers in the README and the documentation come from the preset full."
        )
    report.points(*findings(run, results))
    _table(report, tables.summary(results), caption="Hit rate under a plain conflict, its controls, and its price.")


def _main_table(report: Report, run: VeenaRun, results: dict[str, Any]) -> None:
    conditions = list(run.test.hits)
    n = len(next(iter(run.test.examples.values())))
    with report.folded(
        "Hit rate of each method",
        f"Hit rate in percent on {n} images of identities that no choice has seen, with 95 % intervals over "
        "identities: the share of answers that name the emotion the image shows. Columns: the image alone; after "
        "a sentence that agrees with it (consistent); after one that says another emotion (conflict), stated weakly, "
        "plainly or strongly. A star marks a paired difference to the plain model with p < 0.05. The last column is "
        "the share of neutral images, without context, that are given an emotion.",
        "VEE strengthens the attention of key heads to the image, ENA amplifies key neurons, VEENA does both; the "
        "adaptive variant sets its strength for each image. Other rows are baselines, tuned with as many trials.",
        is_open=True,
    ):
        _table(report, tables.main(results))
        values = run.test.scores().select(bound="mean").values.T
        figure = plots.heatmap(
            100 * values, x=conditions, y=[display_name(m) for m in run.test.methods], unit="percent",
            title="Hit rate on held-out images", name="hit rate", limits=(0, 100),
        )  # fmt: skip
        report.figure(figure, alt="heat map of hit rates by method and condition", caption="The table as a figure.")


def _answers(report: Report, run: VeenaRun, most: int = 12) -> None:
    """Show images under conflict with the answers before and after, changed ones first, both kinds of change."""
    names = [n for n in ("plain", "VEE", "VEENA") if n in run.test.methods]
    found: list[tuple[int, Any, str]] = []
    for condition in run.test.hits:
        if not condition.startswith("conflict"):
            continue
        hits = run.test.hits[condition]
        for i, example in enumerate(run.test.examples[condition]):
            change = int(hits[names[-1]][i] - hits["plain"][i])
            found.append((change, (example, condition, i), condition))
    better = [x for x in found if x[0] > 0]
    worse = [x for x in found if x[0] < 0]
    same = [x for x in found if x[0] == 0]
    shown = [*_every(better, most // 2), *_every(worse, most // 4)]
    shown += _every(same, most - len(shown))
    rows = []
    for _, (example, condition, i), _ in shown:
        said = [str(run.test.texts[condition][n][i]).strip() for n in names]
        marks = ["hit" if float(run.test.hits[condition][n][i]) else "miss" for n in names]
        picture = Thumbnail(open_image(example.picture), f"picture of {example.emotion}")
        told = f"{example.context} ({example.context_emotion}, {example.context_strength})"
        rows.append([picture, example.emotion, told, *[x for pair in zip(said, marks, strict=True) for x in pair]])
    columns = ["image", "shows", "context", *[x for n in names for x in (display_name(n), "")]]
    with report.folded(
        "Before and after",
        f"Of {len(found)} answers under a conflicting context {len(better)} became right with {names[-1]} and "
        f"{len(worse)} became wrong; examples of each, and of answers that stayed right or wrong. After each context "
        "stand its emotion and strength.",
    ):
        report.table(columns, rows, tones=TONES)


def _every(items: list[Any], n: int) -> list[Any]:
    """Return `n` of the items, evenly spaced."""
    if n <= 0:
        return []
    return items if len(items) <= n else [items[int(i * len(items) / n)] for i in range(n)]


def _layers(report: Report, run: VeenaRun) -> None:
    layers = run.layers
    at = list(layers.restored.labels["layer"])
    doses = best_doses(layers)
    both = [
        _stack([part.values[i, dose] for i, dose in enumerate(doses)]) for part in (layers.restored, layers.control)
    ]
    curve = plots.curves(
        _stack([b[:, 1] for b in both]), x=at, lines=["direction", "random direction"], x_name="layer", name="C",
        spread=_stack([(b[:, 2] - b[:, 0]) / 2 for b in both]),
        title="At each layer's best fluent dose",
    )  # fmt: skip
    alphas = list(layers.restored.labels["alpha"])
    by_dose = plots.curves(
        layers.restored.values[..., 1].T, x=at, lines=[f"dose {a:g}" for a in alphas], x_name="layer", name="C",
        title="The same by dose",
    )  # fmt: skip
    names = list(layers.crossed.labels["named"])
    crossed = plots.heatmap(
        layers.crossed.select(layer=layers.best).values, x=names, y=names, x_name="named", y_name="injected",
        title=f"Injected and named, layer {layers.best}", name="share", limits=(0, 1),
    )  # fmt: skip
    spans = run.stages.spans()
    stages = ", ".join(f"{name}: {show_run(x)}" for name, x in spans.items())
    table = run.stages.decodable
    kinds = list(table.labels["statistic"])
    chosen = [kinds.index("accuracy"), kinds.index("control")]
    probes = plots.curves(
        table.values[:, chosen].T, x=list(range(len(table.values))), lines=["at the query", "labels shuffled"],
        x_name="layer", name="accuracy", title="How well a linear probe reads the emotion from the query",
    )  # fmt: skip
    with report.folded(
        "Key layers",
        f"Emotional images hit {percent(layers.emotional)} %, neutral ones {percent(layers.neutral)} % "
        f"({layers.n_pairs} pairs). C is how far the direction, put into runs on neutral images, takes the hit rate to "
        "that of emotional ones (0 not at all, 1 all the way). Each layer is shown at the dose that restores most "
        "while the answers stay fluent; a mean over doses would count those that do nothing anywhere. A layer at 0 has "
        f"no dose that acts and leaves the answers fluent. {layer_finding(run)}",
        f"Soft and generated changes agree with a rank correlation of {layers.agreement:.2f}. Stages by the curves: "
        f"{stages}.",
    ):
        with report.side_by_side():
            report.figure(
                curve, alt="curve of C over layers with a random direction as control", caption="Bands: 95 %."
            )
            report.figure(by_dose, alt="curves of C over layers for every dose")
            report.figure(crossed, alt="heat map of injected against named emotions")
            report.figure(probes, alt="accuracy of linear probes over layers")


def _stack(rows: Sequence[Any]) -> Any:
    import torch

    return torch.stack(list(rows))


def _heads(report: Report, run: VeenaRun, model: HookedVLM, results: dict[str, Any]) -> None:
    heads = run.heads
    with report.folded(
        "Key heads",
        f"{len(heads.heads)} heads restore the direction at layer {heads.layer} when their output on the emotional "
        f"image is put into the neutral run ({heads.n_pairs} pairs): interval above 0, change along the direction, "
        "and significant among all heads.",
    ):
        figure = heads.plot(title="Restored by one head", center=0)
        report.figure(
            figure, alt="heat map of what each head restores", caption="At the query or the last token, the better."
        )
        table = replace(tables.heads(results), records=results["key_heads"]["table"][:16])
        unsure = all(r["tau"] is None for r in results["key_heads"]["table"])
        _table(report, table.without("tau", "cross-fitted", "kind", "most") if unsure else table)
        report.text(
            "Each head's own emotion is left open: there are too few pairs of each."
            if unsure
            else "tau: how much more a head serves one emotion than the others, from 0 (general) to 1 (one emotion "
            "alone); cross-fitted: the emotion chosen and judged on different pairs."
        )
        pair = _example_pair(run)
        if heads.heads and pair is not None:
            lead_in = heads.meta.get("lead_in")
            clean, corrupted = (prepared(model, [x], lead_in=lead_in) for x in (pair.emotional, pair.neutral))
            direction = run.directions.unit(pair.emotion)
            shown = heads.heads[:SHOWN_HEADS]
            found = direct_attribution_map(model, clean, direction, ROWS["last"], baseline=corrupted)
            maps = [found.select(layer=a, head=h).values.reshape(found.shape[-2:]) for a, h in shown]
            boxes = None if clean.patch_boxes is None else clean.patch_boxes[0][0]
            figure = plots.overlays(
                open_image(pair.emotional.picture), _stack(maps), titles=[f"L{a}H{h}" for a, h in shown],
                patch_boxes=boxes, title=f"Where the push towards {pair.emotion} comes from", name="push",
            )  # fmt: skip
            report.figure(
                figure, alt=f"maps of the direct attribution of {len(shown)} heads over the image of a person"
            )
        if len(run.edges):
            edges = tables.edges(results)
            n, all_ = len(edges.records), len(run.edges)
            report.text(
                f"Traced back: {n} of {all_} candidate edges are confirmed by the direct path alone, with intervals "
                "that do not touch 0."
            )
            _table(report, edges)
        if len(run.execution):
            report.text("After the key layer: what single heads restore of the lead of the emotion's words.")
            _table(report, tables.execution(results))


def _example_pair(run: VeenaRun) -> Any:
    """Return an emotional test image with a neutral one of the same identity."""
    from types import SimpleNamespace

    examples = next(iter(run.test.examples.values()))
    neutral = {(e.identity, e.style): e for e in examples if e.emotion == "neutral"}
    for example in examples:
        twin = neutral.get((example.identity, example.style))
        if twin is not None and example.emotion in run.directions.emotions:
            return SimpleNamespace(emotional=example, neutral=twin, emotion=example.emotion)
    return None


def _neurons(report: Report, run: VeenaRun, results: dict[str, Any]) -> None:
    counts = run.neurons.table["kind"].value_counts().to_dict()
    with report.folded(
        "Key neurons",
        f"Neurons with the largest direct attribution on emotional images ({run.neurons.n_pairs} pairs): "
        + ", ".join(f"{n} {kind}" for kind, n in counts.items())
        + ". Kinds follow a fixed rule on what the output weights promote and where the push was read.",
    ):
        table = tables.neurons(results)
        _table(report, replace(table, records=table.records[:40]))


def _choices(report: Report, run: VeenaRun, results: dict[str, Any]) -> None:
    with report.folded(
        "What was chosen, and how",
        "Heads are ranked on the mechanism's identities and compared on the validation's at one strength. score: mean "
        "hit rate under conflict; harm: largest loss elsewhere; perplexity: growth without emotion words. Chosen: "
        f"{run.head_rankings.winner[0]}, mode {run.head_rankings.winner[1]}.",
    ):
        _table(report, tables.head_rankings(results))
        plain = percent(float(next(iter(run.tuned.values())).trials["plain"].iloc[0]))
        _table(report, tables.tuned(results), caption=f"The plain model's score is {plain} %.")
        with report.side_by_side():
            for kind in dict.fromkeys(run.doses["method"]):
                part = run.doses[run.doses["method"] == kind]
                conditions = list(dict.fromkeys(part["condition"]))
                lines = [part[part["condition"] == c].sort_values("dose") for c in conditions]
                figure = plots.curves(
                    _stack([_tensor(x["hit"]) for x in lines]), x=[float(d) for d in lines[0]["dose"]],
                    lines=conditions, x_name="dose", name="hit rate", title=f"{kind}: dose and hit rate on validation",
                )  # fmt: skip
                report.figure(figure, alt=f"hit rate over doses of {kind} by condition")


def _tensor(column: Any) -> Any:
    import torch

    return torch.tensor([float(x) for x in column], dtype=torch.float64)


def _controls(report: Report, run: VeenaRun, results: dict[str, Any]) -> None:
    with report.folded(
        "Controls and side effects",
        f"{run.random.draws} random sets of as many heads or neurons from the same layers, at the tuned strength. The "
        "percentile is that of the chosen set among them.",
    ):
        _table(report, tables.random(results))
        if run.elsewhere is not None:
            _table(report, tables.elsewhere(results), caption="Other images, no context.")
        _table(report, tables.effects(results), caption="On test images without context.")


def _how(report: Report, run: VeenaRun, command: Sequence[str]) -> None:
    parts = ", ".join(f"{name} {len(names)}" for name, names in run.splits.items())
    seconds = ", ".join(f"{name} {s:.0f} s" for name, s in run.seconds.items())
    with report.folded(
        "How this was made",
        f"Identities by part, none in two: {parts}. Nothing was chosen on test images. Seeds fix every draw "
        f"(seed {run.settings.seed}).",
        f"Time: {seconds}.",
    ):
        settings = [(name, _setting(run.settings, key)) for key, name in SETTINGS.items()]
        report.table(["setting", "value"], settings, caption="Sizes of the run; results.json holds every setting.")
        if command:
            report.code(shlex.join(command))


def _setting(settings: Settings, key: str) -> str:
    """Return a setting in words."""
    value = getattr(settings, key)
    if value is None:
        return "all"
    parts = value if isinstance(value, tuple) else (value,)
    return ", ".join(f"{part:g}" if isinstance(part, float) else str(part) for part in parts)
