"""The demo on several models, and one page that shows them side by side.

Each model's own page lies in a folder of its name; what the same images, questions and settings gave is told in
one table, so that a difference between the models shows at a glance.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veena_lens import plots
from veena_lens.app.demo import DemoResult, run_demo
from veena_lens.app.demo_page import TONES, picture_of
from veena_lens.app.html import Report


@dataclass(frozen=True, eq=False)
class Comparison:
    """The demo's results, a model each, and where the page that compares them lies."""

    results: tuple[DemoResult, ...]
    out: Path

    @property
    def page(self) -> Path:
        return self.out / "index.html"

    def __repr__(self) -> str:
        return "\n".join([*map(repr, self.results), f"side by side: {self.page}"])


def run_demos(out: str | Path, models: Sequence[str], progress: bool = True) -> Comparison:
    """The demo on each model, in a folder of its name under `out`, and `index.html` over all of them.

    Raises: ValueError for a model named twice, FileNotFoundError for a checkpoint that is missing."""
    names = [Path(model).name for model in models]
    if len(set(names)) != len(names) or not names:
        raise ValueError(f"demo: models must be named once each, at least one, not {list(models)}.")
    folder = Path(out)
    results = []
    for model, name in zip(models, names, strict=True):
        if progress:
            print(f"{model}:", flush=True)
        results.append(run_demo(folder / name, model=model, progress=progress))
    comparison = Comparison(tuple(results), folder)
    write_comparison(comparison)
    return comparison


def write_comparison(comparison: Comparison) -> Path:
    """`index.html` and `numbers.json` of all models."""
    results, out = comparison.results, comparison.out
    names = [Path(result.model).name for result in results]
    report = Report(
        "Small vision-language models, side by side",
        lead=f"{' and '.join(names)}: the same pictures, the same questions, in {sum(r.seconds for r in results):.0f} "
        "seconds.",
    )
    report.links([(f"{name}: the whole story", f"{name}/index.html") for name in names])
    _figures(report, results, names)
    _maps(report, results, names)
    _pictures(report, results, names)
    numbers: dict[str, Any] = {name: result.numbers for name, result in zip(names, results, strict=True)}
    (out / "numbers.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    return report.save(comparison.page)


def _figures(report: Report, results: Sequence[DemoResult], names: Sequence[str]) -> None:
    rows: list[list[str]] = [["named right", *(f"{r.named_right} of {r.named_of} test pictures" for r in results)]]
    looks = [r.inside.attention.values.sum((1, 2)) for r in results]
    rows.append(
        ["attention to the picture, least and most of a layer", *(f"{x.min():.0%}, {x.max():.0%}" for x in looks)]
    )
    best = [r.inside.patching.top(1).values.tolist()[0] for r in results]
    rows.append(["strongest single head", *(f"layer {la:.0f} head {h:.0f}: {s:.0%}" for la, h, s in best)])
    rows.append(["all heads together", *(f"{r.inside.patching.values.sum():.2f}" for r in results)])
    rows.append(["steering: layer, strength", *(f"{r.steered.layer}, {r.steered.alpha:g}" for r in results)])
    rows.append(["neutral faces turned as wanted", *(f"{r.steered.test.mean:.0%}" for r in results)])
    rows.append(["the same, random directions", *(f"{r.steered.control.mean:.0%}" for r in results)])
    captions = [r.steered.captioned for r in results]
    rows.append(["whole descriptions turned", *("-" if c is None else f"{c.test:.0%}" for c in captions)])
    rows.append(["the same, random directions", *("-" if c is None else f"{c.control:.0%}" for c in captions)])
    report.section(
        "In numbers",
        "Each model is looked into on a face that it names right with and without its emotion; layer and strength of "
        "steering are chosen on development pictures, and everything counted here is on test pictures.",
    )
    report.table(["", *names], rows)


def _maps(report: Report, results: Sequence[DemoResult], names: Sequence[str]) -> None:
    report.section("Where they look", "Attention of the last prompt token, mean over heads and layers.")
    for result, name in zip(results, names, strict=True):
        inside = result.inside
        height, width = inside.attention.values.shape[1:]
        figure = plots.overlay(
            inside.emotional.open(),
            inside.attention.mean("layer").values,
            patch_boxes=inside.patch_boxes,
            title=name,
            name="attention",
            unit="probability",
        )
        report.figure(
            figure,
            alt=f"{name}: the {inside.emotional.emotion} face under a map of the attention it receives",
            caption=f"{name}: {height} x {width} image tokens.",
        )


def _pictures(report: Report, results: Sequence[DemoResult], names: Sequence[str]) -> None:
    report.section("What they say", "The first emotion word of a description counts.")
    rows = []
    for told in zip(*(result.descriptions for result in results), strict=True):
        picture = told[0].picture
        cells = [cell for d in told for cell in (d.text, "hit" if d.is_hit else "miss")]
        rows.append([picture_of(picture), picture.style, picture.emotion, *cells])
    columns = [column for name in names for column in (name, "result")]
    report.table(["picture", "style", "truth", *columns], rows, tones=TONES)
