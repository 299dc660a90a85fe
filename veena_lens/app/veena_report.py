"""The report of a run: report.html, one self-contained page that tells what was found and what it is worth."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from veena_lens import plots
from veena_lens.app.html import Report, Thumbnail, Tone
from veena_lens.circuits import direct_attribution_map
from veena_lens.emotion.locate.tracing import show_run
from veena_lens.emotion.methods import ROWS, prepared
from veena_lens.emotion.pipeline import VeenaRun
from veena_lens.images.files import open_image

TONES: dict[str, Tone] = {"hit": "good", "miss": "bad", "key": "good"}
SHOWN_HEADS = 8


def write_veena_report(run: VeenaRun, model: Any, path: str | Path, command: Sequence[str] = ()) -> Path:
    """Write the page; `model` is asked where its best heads read. `command` is shown as what makes the page again."""
    report = Report(
        f"Emotion circuit of {run.model}",
        lead=_lead(run),
    )
    _main_table(report, run)
    _answers(report, run)
    _layers(report, run)
    _heads(report, run, model)
    _neurons(report, run)
    _choices(report, run)
    _controls(report, run)
    _how(report, run, command)
    return report.save(path)


def _percent(x: float | None, digits: int = 1) -> str:
    return "" if x is None or x != x else f"{100 * x:.{digits}f}"


def _shown(method: str) -> str:
    """A method's name on the page, where "plain" is also a strength of contexts."""
    return "plain model" if method == "plain" else method


def _lead(run: VeenaRun) -> str:
    table = run.test.table()
    conflict = [c for c in run.test.hits if c.startswith("conflict")] or list(run.test.hits)

    def mean(method: str) -> float:
        rows = table[(table["method"] == method) & table["condition"].isin(conflict)]
        return float(rows["hit"].mean())

    parts = [f"{name} {_percent(mean(name))} %" for name in ("VEE", "ENA", "VEENA") if name in run.test.methods]
    return (
        f"Of held-out pictures whose context says another emotion, the untouched model names the picture's in "
        f"{_percent(mean('plain'))} % of answers; {', '.join(parts)}. The direction takes hold at layer "
        f"{run.layers.best} of {len(run.layers.by_layer.labels['layer'])}."
    )


def _main_table(report: Report, run: VeenaRun) -> None:
    table = run.test.table()
    conditions = list(run.test.hits)
    rows = []
    for method in run.test.methods:
        cells: list[Any] = [_shown(method)]
        for condition in conditions:
            row = table[(table["method"] == method) & (table["condition"] == condition)].iloc[0]
            star = "*" if row.get("p") is not None and row["p"] < 0.05 else ""
            cells.append(f"{_percent(row['hit'])}{star} [{_percent(row['low'], 0)}, {_percent(row['high'], 0)}]")
        alone = table[(table["method"] == method) & (table["condition"] == conditions[0])].iloc[0]
        rows.append([*cells, _percent(alone["false"])])
    n = len(next(iter(run.test.examples.values())))
    report.section(
        "What each method is worth",
        f"Hit rate in percent on {n} pictures of identities that no choice has seen, with 95 % intervals over "
        "identities: the share of answers that name the emotion the picture shows. Columns: the picture alone; after "
        "a sentence that agrees with it (consistent); after one that says another emotion (conflict), told weakly, "
        "plainly or strongly. A star marks a paired difference to the plain model with p < 0.05. The last column is "
        "the share of neutral pictures, without context, that are given an emotion.",
        "VEE strengthens the attention of key heads to the picture, ENA amplifies key neurons, VEENA does both; the "
        "adaptive variant sets its strength for each picture. Other rows are rivals, tuned with as many trials.",
    )
    report.table(["method", *conditions, "false emotion, %"], rows)
    values = run.test.scores().select(bound="mean").values.T
    figure = plots.heatmap(
        100 * values, x=conditions, y=[_shown(m) for m in run.test.methods], unit="percent",
        title="Hit rate on held-out pictures", name="hit rate", limits=(0, 100),
    )  # fmt: skip
    report.figure(figure, alt="heat map of hit rates by method and condition", caption="The table as a picture.")


def _answers(report: Report, run: VeenaRun, most: int = 12) -> None:
    """Pictures under conflict with what is said before and after, changed ones first, both kinds of change."""
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
    columns = ["picture", "shows", "context", *[x for n in names for x in (_shown(n), "")]]
    report.section(
        "Before and after",
        f"Of {len(found)} answers under a conflicting context {len(better)} became right with {names[-1]} and "
        f"{len(worse)} became wrong; examples of each, and of answers that stayed right or wrong. After each context "
        "stand its emotion and strength.",
    )
    report.table(columns, rows, tones=TONES)


def _every(items: list[Any], n: int) -> list[Any]:
    """`n` of the items, evenly spaced."""
    if n <= 0:
        return []
    return items if len(items) <= n else [items[int(i * len(items) / n)] for i in range(n)]


def _layers(report: Report, run: VeenaRun) -> None:
    layers = run.layers
    at = list(layers.by_layer.labels["layer"])
    both = [layers.by_layer.values, layers.control_by_layer.values]
    values = _stack([b[:, 1] for b in both])
    spread = _stack([(b[:, 2] - b[:, 0]) / 2 for b in both])
    curve = plots.curves(
        values, x=at, lines=["direction", "random direction"], x_name="layer", name="C", spread=spread,
        title="Injected at a layer: share of the way to the emotional run",
    )  # fmt: skip
    alphas = list(layers.restored.labels["alpha"])
    doses = plots.curves(
        layers.restored.values[..., 1].T, x=at, lines=[f"alpha {a:g}" for a in alphas], x_name="layer", name="C",
        title="The same by dose",
    )  # fmt: skip
    names = list(layers.crossed.labels["named"])
    crossed = plots.heatmap(
        layers.crossed.select(layer=layers.best).values, x=names, y=names, x_name="named", y_name="injected",
        title=f"Injected and named, layer {layers.best}", name="share", limits=(0, 1),
    )  # fmt: skip
    band = "no layer is" if layers.band is None else show_run(range(layers.band[0], layers.band[1] + 1))
    if layers.band is not None:
        band += " is" if layers.band[0] == layers.band[1] else " are"
    spans = run.stages.spans()
    stages = ", ".join(f"{name}: {show_run(x)}" for name, x in spans.items())
    report.section(
        "Key layers",
        f"Best layer {layers.best}; {band} above the control. Emotional pictures hit {_percent(layers.emotional)} %, "
        f"neutral ones {_percent(layers.neutral)} % ({layers.n_pairs} pairs). C is how far the direction, put into "
        f"runs on neutral pictures, takes the hit rate to that of emotional ones (0 not at all, 1 all the way). It is "
        f"averaged over doses whose answers "
        f"stay fluent. Soft and generated changes agree with a rank correlation of {layers.agreement:.2f}.",
        f"Stages by the curves: {stages}.",
    )
    report.figure(curve, alt="curve of C over layers with a random direction as control", caption="Bands: 95 %.")
    report.figure(doses, alt="curves of C over layers for every dose")
    report.figure(crossed, alt="heat map of injected against named emotions")
    table = run.stages.decodable
    kinds = list(table.labels["statistic"])
    chosen = [kinds.index("accuracy"), kinds.index("control")]
    figure = plots.curves(
        table.values[:, chosen].T, x=list(range(len(table.values))), lines=["at the query", "labels shuffled"],
        x_name="layer", name="accuracy", title="How well a linear probe reads the emotion from the query",
    )  # fmt: skip
    report.figure(figure, alt="accuracy of linear probes over layers")


def _stack(rows: Sequence[Any]) -> Any:
    import torch

    return torch.stack(list(rows))


def _heads(report: Report, run: VeenaRun, model: Any) -> None:
    heads = run.heads
    report.section(
        "Key heads",
        f"{len(heads.heads)} heads restore the direction at layer {heads.layer} when their output on the emotional "
        f"picture is put into the neutral run ({heads.n_pairs} pairs): interval above 0, change along the direction, "
        "and significant among all heads.",
    )
    figure = heads.plot(title="Restored by one head", center=0)
    report.figure(
        figure, alt="heat map of what each head restores", caption="At the query or the last token, the better."
    )
    rows = [
        [f"L{r['layer']}H{r['head']}", "key" if r["key"] else "", f"{r['effect']:.3f}"]
        + [f"[{r['low']:.3f}, {r['high']:.3f}]", str(r["rows"]), float(r["intention"]), _percent(r["from_picture"], 0)]
        + [_number(r["tau"]), _number(r["tau_crossed"]), str(r["label"]), str(r["emotion"])]
        for r in heads.table.head(16).to_dict("records")
    ]
    columns = [
        "head",
        "",
        "restores",
        "95 %",
        "at",
        "intention",
        "from picture, %",
        "tau",
        "cross-fitted",
        "kind",
        "most",
    ]
    unsure = all(r["tau"] != r["tau"] for r in heads.table.to_dict("records"))
    if unsure:
        columns, rows = columns[:7], [row[:7] for row in rows]
    report.table(columns, rows, tones=TONES)
    report.text(
        "Each head's own emotion is left open: there are too few pairs of each."
        if unsure
        else "tau: how much more a head serves one emotion than the others, from 0 (general) to 1 (one emotion alone); "
        "cross-fitted: the emotion chosen and judged on different pairs."
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
        report.figure(figure, alt=f"maps of the push of {len(shown)} heads over the picture of a person")
    kept = run.edges[run.edges["kept"]] if len(run.edges) else run.edges
    if len(run.edges):
        rows = [
            [
                int(r["level"]),
                _part(r["sender"]),
                _part(r["receiver"]),
                _interval(r),
                float(r["path"]),
            ]
            for r in kept.to_dict("records")
        ]
        report.text(
            f"Traced back: {len(kept)} of {len(run.edges)} candidate edges are confirmed by the direct path alone."
        )
        report.table(["level", "from", "to", "effect", "direct path"], rows)
    if len(run.execution):
        rows = [[f"L{r['layer']}H{r['head']}", _interval(r)] for r in run.execution.to_dict("records")]
        report.text("After the key layer: what single heads restore of the lead of the emotion's words.")
        report.table(["head", "restores"], rows)


def _part(name: str) -> str:
    """A part of the model as people write it: "3_mlp_out" is the MLP of layer 3."""
    return f"MLP {name.removesuffix('_mlp_out')}" if name.endswith("_mlp_out") else name


def _number(x: Any) -> float | None:
    """A cell of a table; what is not known stays empty."""
    return None if x is None or x != x else float(x)


def _interval(row: dict[str, Any]) -> str:
    return f"{row['effect']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def _example_pair(run: VeenaRun) -> Any:
    """An emotional test image with a neutral one of the same identity."""
    from types import SimpleNamespace

    examples = next(iter(run.test.examples.values()))
    neutral = {(e.identity, e.style): e for e in examples if e.emotion == "neutral"}
    for example in examples:
        twin = neutral.get((example.identity, example.style))
        if twin is not None and example.emotion in run.directions.emotions:
            return SimpleNamespace(emotional=example, neutral=twin, emotion=example.emotion)
    return None


def _neurons(report: Report, run: VeenaRun) -> None:
    rows = [
        [
            f"L{r['layer']}N{r['neuron']}",
            str(r["kind"]),
            str(r["emotion"] or "all"),
            str(r["rows"]),
            float(r["value"]),
            float(r["consistency"]),
        ]
        + [int(r["lexicon_tokens"]), ", ".join(w.strip() for w in r["promotes"] if any(c.isalnum() for c in w))]
        for r in run.neurons.table.head(40).to_dict("records")
    ]
    counts = run.neurons.table["kind"].value_counts().to_dict()
    report.section(
        "Key neurons",
        f"Neurons that push most along the direction on emotional pictures ({run.neurons.n_pairs} pairs): "
        + ", ".join(f"{n} {kind}" for kind, n in counts.items())
        + ". Kinds follow a fixed rule on what the output weights promote and where the push was read.",
    )
    report.table(["neuron", "kind", "pairs", "at", "push", "consistency", "emotion words of 20", "promotes"], rows)


def _choices(report: Report, run: VeenaRun) -> None:
    report.section(
        "What was chosen, and how",
        "Heads are ranked on the mechanism's identities and compared on the validation's at one strength. worth: mean "
        "hit rate under conflict; harm: largest loss elsewhere; perplexity: growth without emotion words. Chosen: "
        f"{run.ways.winner[0]}, mode {run.ways.winner[1]}.",
    )
    rows = [
        [str(r["way"]), str(r["mode"]), _percent(r["worth"]), _percent(r["harm"]), float(r["perplexity"])]
        for r in run.ways.table.to_dict("records")
    ]
    report.table(["ranking", "mode", "worth, %", "harm, %", "perplexity"], rows)
    rows = []
    for name, tuned in run.tuned.items():
        settings = ", ".join(f"{k} {v}" for k, v in tuned.method.settings.items())
        allowed = int(tuned.trials["allowed"].sum())
        rows.append([name, settings, _percent(tuned.worth), f"{allowed} of {len(tuned.trials)}"])
    plain = _percent(float(next(iter(run.tuned.values())).trials["plain"].iloc[0]))
    report.table(
        ["method", "settings", "worth, %", "trials allowed"], rows, caption=f"The plain model's worth is {plain} %."
    )
    for kind in dict.fromkeys(run.doses["method"]):
        part = run.doses[run.doses["method"] == kind]
        conditions = list(dict.fromkeys(part["condition"]))
        lines = [part[part["condition"] == c].sort_values("dose") for c in conditions]
        figure = plots.curves(
            _stack([_tensor(x["hit"]) for x in lines]), x=[float(d) for d in lines[0]["dose"]], lines=conditions,
            x_name="dose", name="hit rate", title=f"{kind}: dose and hit rate on validation",
        )  # fmt: skip
        report.figure(figure, alt=f"hit rate over doses of {kind} by condition")


def _tensor(column: Any) -> Any:
    import torch

    return torch.tensor([float(x) for x in column], dtype=torch.float64)


def _controls(report: Report, run: VeenaRun) -> None:
    table = run.random.table
    report.section(
        "Controls and side effects",
        f"{run.random.draws} random sets of as many heads or neurons from the same layers, at the tuned strength. The "
        "percentile is that of the chosen set among them.",
    )
    rows = [
        [r["method"], r["condition"], _percent(r["plain"]), _percent(r["real"]), _percent(r["random"])]
        + [f"[{_percent(r['low'], 0)}, {_percent(r['high'], 0)}]", _percent(r["percentile"], 0)]
        for r in table.to_dict("records")
    ]
    report.table(
        ["method", "condition", "plain model, %", "chosen, %", "random, %", "95 % of random", "percentile"], rows
    )
    if run.elsewhere is not None:
        other = run.elsewhere.table()
        rows = [
            [
                r["condition"],
                _shown(r["method"]),
                int(r["n"]),
                _percent(r["hit"]),
                f"[{_percent(r['low'], 0)}, {_percent(r['high'], 0)}]",
            ]
            for r in other.to_dict("records")
        ]
        report.table(["pictures", "method", "n", "hit rate, %", "95 %"], rows, caption="Other pictures, no context.")
    names = ("perplexity", "distinct_2", "repetition", "length", "drift", "attributes", "described", "latency")
    rows = []
    for effect in run.effects:
        values = effect.to_dict()
        rows.append([_shown(values["method"]), *[_number(values[n]) for n in names]])
    columns = ["method", "perplexity", "distinct-2", "repetition", "words", "drift on neutral, nats"]
    columns += ["other answers right", "described right", "time ratio"]
    report.table(columns, rows, caption="On test pictures without context.")


def _how(report: Report, run: VeenaRun, command: Sequence[str]) -> None:
    parts = ", ".join(f"{name} {len(names)}" for name, names in run.splits.items())
    seconds = ", ".join(f"{name} {s:.0f} s" for name, s in run.seconds.items())
    report.section(
        "How this was made",
        f"Identities by part, none in two: {parts}. Nothing was chosen on test pictures. Seeds fix every draw "
        f"(seed {run.settings.seed}).",
        f"Time: {seconds}.",
    )
    if command:
        report.code(shlex.join(command))
