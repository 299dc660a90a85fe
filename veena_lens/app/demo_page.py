"""The demo's pages and figures: one model's findings in five sections, and several models side by side."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from veena_lens import plots
from veena_lens.app.demo_results import Comparison, DemoResult, Inside, Steered
from veena_lens.app.html import Report, Thumbnail, Tone
from veena_lens.app.questions import DESCRIBE, FEELING, LIST

if TYPE_CHECKING:
    from veena_lens.checkpoints.files import Picture

TONES: dict[str, Tone] = {"hit": "good", "miss": "bad"}


def write_page(result: DemoResult) -> Path:
    """Write `index.html` and one PNG per figure beside it."""
    figures = draw(result)
    for name, figure in figures.items():
        plots.save(figure, result.out / f"{name}.png")
    report = Report(
        "What a small vision-language model sees in a face",
        lead=f"{result.model}: described, inspected, patched and steered in {result.seconds:.0f} seconds.",
    )
    _descriptions(report, result)
    _look_inside(report, result, figures)
    _steering(report, result.steered, figures)
    report.section("How this page was made").code(
        f"veena-lens demo --out {result.out.as_posix()}\n"
        + "".join(f"{name} {version(name)}\n" for name in ("torch", "transformers", "transformer_lens"))
        + f"Python {platform.python_version()}, {result.seconds:.1f} s; all numbers in numbers.json"
    )
    return report.save(result.page)


def draw(result: DemoResult) -> dict[str, Figure]:
    """Draw every figure of the page, by its file's name."""
    inside, rates = result.inside, result.steered.development
    over: dict[str, Any] = {"patch_boxes": inside.patch_boxes, "name": "attention", "unit": "probability"}
    return {
        "attention": _attention(inside, "attention, mean over layers"),
        "attention_by_layer": plots.overlays(
            inside.emotional.open(),
            inside.attention.values,
            titles=[f"layer {layer}" for layer in inside.attention.labels["layer"]],
            title="From the last token to the image, mean over heads",
            **over,
        ),
        "logit_lens": inside.lens.plot(title="Prediction of the next token from each layer", limits=(0, 1)),
        "patching": inside.patching.plot(
            title=f"Output of one head from the {inside.emotional.emotion} image", center=0
        ),
        "steering": plots.curves(
            rates.values,
            x=rates.labels["layer"],
            lines=rates.labels["setting"],
            x_name="layer that is steered",
            name=rates.name,
            unit=rates.unit,
            title="Neutral development images under steering",
        ),
    }


def _attention(inside: Inside, title: str) -> Figure:
    """Draw the map of attention, mean over layers, over the emotional image."""
    return plots.overlay(
        inside.emotional.open(),
        inside.attention.mean("layer").values,
        patch_boxes=inside.patch_boxes,
        title=title,
        name="attention",
        unit="probability",
    )


def thumbnail(picture: Picture, caption: str = "") -> Thumbnail:
    """Return a drawn face with its alt text."""
    article = "an" if picture.emotion[0] in "aeiou" else "a"
    return Thumbnail(picture.open(), f"drawn face of {article} {picture.emotion} person", caption)


def _descriptions(report: Report, result: DemoResult) -> None:
    shown = result.descriptions
    hits, strange = sum(d.is_hit for d in shown), sum(d.picture.split != "test" for d in shown)
    report.section(
        "What the model says",
        f"{hits} of these {len(shown)} images are described correctly: the first emotion word of the description is "
        f"the drawn emotion. The first {len(shown) - strange} are test images, one per emotion, of people who do not "
        f"occur in the training data; the last {strange} are drawn in styles that do not. Asked for the emotion alone, "
        f"the model is right on {result.named_right} of {result.named_of} test images.",
        f"The question was: {DESCRIBE}",
    )
    rows = [
        (thumbnail(d.picture), d.picture.style, d.picture.emotion, d.text, d.named, "hit" if d.is_hit else "miss")
        for d in shown
    ]
    report.table(["image", "style", "truth", "description", "named", "result"], rows, tones=TONES)


def _look_inside(report: Report, result: DemoResult, figures: dict[str, Figure]) -> None:
    inside = result.inside
    emotion, looks = inside.emotional.emotion, inside.attention.values.sum((1, 2))
    report.section(
        "Where it looks",
        "The same face twice, emotional and neutral: only mouth, eyes and brows differ. If possible, the pair is one "
        f"whose two emotions the model names correctly. The question was: {LIST}",
    )
    report.images([thumbnail(inside.emotional, emotion), thumbnail(inside.neutral, "its neutral twin")])
    report.figure(
        figures["attention"],
        alt=f"the {emotion} face beside the same face in grey under a map of the attention it receives",
        caption="Attention from the last prompt token, where the first word of the answer is predicted, to each image "
        "token; mean over heads and layers. Each cell lies on its patch of pixels.",
    )
    report.figure(
        figures["attention_by_layer"],
        alt="the grey face under a map of attention, once per layer, on one colour scale",
        caption=f"Layer by layer. The share of the token's attention that goes to the image ranges from "
        f"{looks.min():.0%} (layer {int(looks.argmin())}) to {looks.max():.0%} (layer {int(looks.argmax())}).",
    )
    report.section(
        "What each layer predicts",
        "The logit lens applies the final norm and the unembedding to the residual stream after every layer.",
    )
    report.figure(
        figures["logit_lens"],
        alt=f"heat map of the probability of each emotion's word after each layer; {emotion} wins in the end",
        caption="Probability of each emotion's word as the next token, at the last prompt token.",
    )
    rows = [(layer, ", ".join(f"{word} {p:.2f}" for word, p in words)) for layer, words in enumerate(inside.likeliest)]
    report.table(["layer", "most likely next tokens"], rows)
    best = inside.patching.top(3).values.tolist()
    strongest = "; ".join(f"layer {layer:.0f} head {head:.0f}: {share:.0%}" for layer, head, share in best)
    report.section(
        "Which heads carry the emotion",
        "The neutral twin is run once per head, with the output of that head replaced by its output on the "
        f"{emotion} image. An effect of 0 leaves the prediction unchanged; 1 restores that of the {emotion} image "
        f'(logit of "{emotion}" minus logit of "neutral").',
    )
    report.figure(
        figures["patching"],
        alt="heat map of layers by heads: the share of the effect that each head alone restores",
        caption=f"Activation patching of every head at all positions (patch_sweep). Strongest: {strongest}. The "
        f"effects of all heads sum to {inside.patching.values.sum():.2f}; they need not sum to 1.",
    )


def _steering(report: Report, steered: Steered, figures: dict[str, Figure]) -> None:
    report.section(
        "Steering a neutral face",
        "The direction of an emotion is the mean difference of the residual stream at the last prompt token between "
        f"emotional images of development identities and their neutral twins, {steered.n_pairs} pairs in all. Adding "
        "it changes what the model says about a neutral face; a random direction of the same norm is the control.",
    )
    report.figure(
        figures["steering"],
        alt="curves over layers: share of answers that name the wanted emotion, steered and at random",
        caption=f"Chosen on these development images: layer {steered.layer}, alpha {steered.alpha:g} (alpha 1 adds "
        "the mean difference itself). Random directions have the norm of the larger strength.",
    )
    test, control = steered.test, steered.control
    rows = [(emotion, f"{test.wanted[emotion]:.0%}", f"{control.wanted[emotion]:.0%}") for emotion in test.wanted]
    rows.append(("mean", f"{test.mean:.0%}", f"{control.mean:.0%}"))
    rows.append(("any emotion", f"{test.any:.0%}", f"{control.any:.0%}"))
    report.table(
        ["direction", "answer names it", "under a random direction"],
        rows,
        caption=f"{steered.n_pictures} neutral test images, steered to each emotion in turn",
    )
    report.text("One of these images:")
    report.images([thumbnail(steered.picture, "neutral test image")])
    report.table(["direction", "answer", "description"], steered.said, caption=f"Asked: {FEELING}; then: {DESCRIBE}")
    found = steered.captioned
    report.text(
        "A short answer is steered at the last prompt token and at every generated token. A long description has other "
        "words to say as well, and would break under that. So its direction is read elsewhere: both faces of a pair "
        "run under the caption of the neutral face, and the difference is taken at the position where the two runs "
        f"differ most. Added at the generated tokens (layer {found.layer}, alpha {found.alpha:g}, chosen on "
        f"development images), it turns {found.test:.0%} of the descriptions of neutral test images into complete "
        f"descriptions of the wanted emotion; random directions of the same norm, {found.control:.0%}."
    )


# --- several models ---------------------------------------------------------------------------------------------


def write_comparison(comparison: Comparison) -> Path:
    """Write the page that shows all models side by side, so that a difference between them shows at a glance."""
    results = comparison.results
    names = [result.name for result in results]
    report = Report(
        "Small vision-language models, side by side",
        lead=f"{' and '.join(names)}: the same images, the same questions, in {sum(r.seconds for r in results):.0f} "
        "seconds.",
    )
    report.links([(f"{name}: the whole page", f"{name}/index.html") for name in names])
    report.section(
        "In numbers",
        "Each model is inspected on a face whose emotion it names correctly, with and without that emotion. Layer and "
        "strength of steering are chosen on development images; all counts here are on test images.",
    )
    report.table(["", *names], _comparison_rows(results))
    report.section("Where they look", "Attention of the last prompt token, mean over heads and layers.")
    for result in results:
        height, width = result.inside.attention.values.shape[1:]
        report.figure(
            _attention(result.inside, result.name),
            alt=f"{result.name}: the {result.inside.emotional.emotion} face under a map of the attention it receives",
            caption=f"{result.name}: {height} x {width} image tokens.",
        )
    report.section("What they say", "The first emotion word of a description counts.")
    rows = []
    for described in zip(*(result.descriptions for result in results), strict=True):
        picture = described[0].picture
        cells = [cell for d in described for cell in (d.text, "hit" if d.is_hit else "miss")]
        rows.append([thumbnail(picture), picture.style, picture.emotion, *cells])
    columns = [column for name in names for column in (name, "result")]
    report.table(["image", "style", "truth", *columns], rows, tones=TONES)
    return report.save(comparison.page)


def _comparison_rows(results: Sequence[DemoResult]) -> list[list[str]]:
    """Return the table of numbers, one column per model."""

    def of_image(result: DemoResult) -> str:
        looks = result.inside.attention.values.sum((1, 2))
        return f"{looks.min():.0%}, {looks.max():.0%}"

    def best_head(result: DemoResult) -> str:
        layer, head, share = result.strongest_head
        return f"layer {layer} head {head}: {share:.0%}"

    rows = {
        "named correctly": lambda r: f"{r.named_right} of {r.named_of} test images",
        "attention to the image, lowest and highest of a layer": of_image,
        "strongest single head": best_head,
        "all heads together": lambda r: f"{r.inside.patching.values.sum():.2f}",
        "steering: layer, strength": lambda r: f"{r.steered.layer}, {r.steered.alpha:g}",
        "neutral faces called by the wanted emotion": lambda r: f"{r.steered.test.mean:.0%}",
        "the same, random directions": lambda r: f"{r.steered.control.mean:.0%}",
        "whole descriptions of the wanted emotion": lambda r: f"{r.steered.captioned.test:.0%}",
        "descriptions, random directions": lambda r: f"{r.steered.captioned.control:.0%}",
    }
    return [[name, *(value(result) for result in results)] for name, value in rows.items()]
