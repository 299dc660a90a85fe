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
from veena_lens.app.demo_steering import is_whole
from veena_lens.app.html import Report, Thumbnail, Tone
from veena_lens.app.questions import DESCRIBE, FEELING, LIST
from veena_lens.zoo.people import named_emotion

if TYPE_CHECKING:
    from veena_lens.checkpoints.files import Picture

TONES: dict[str, Tone] = {"hit": "good", "miss": "bad"}
VIEW_HEIGHT = 800  # pixels


def write_page(result: DemoResult) -> Path:
    """Write `index.html` and one PNG per figure beside it."""
    figures = draw(result)
    for name, figure in figures.items():
        plots.save(figure, result.out / f"{name}.png")
    report = Report(
        f"Inside {result.name}: what a small vision-language model sees in a face",
        lead=f"Described, inspected, patched and steered in {result.seconds:.0f} seconds, on people and images that "
        "the training has not seen. Figures lie beside this page as PNG files, all numbers in numbers.json.",
    )
    report.section("What was found").points(*findings(result))
    _view(report, result)
    _cells(report, result.inside, figures)
    _steering(report, result.steered, figures)
    _descriptions(report, result)
    _look_inside(report, result, figures)
    with report.folded("How this page was made"):
        report.code(
            f"veena-lens demo --out {result.out.as_posix()}\n"
            + "".join(f"{name} {version(name)}\n" for name in ("torch", "transformers", "transformer_lens"))
            + f"Python {platform.python_version()}, {result.seconds:.1f} s"
        )
    return report.save(result.page)


def findings(result: DemoResult) -> list[str]:
    """Return what was found, a sentence or two each."""
    inside, steered = result.inside, result.steered
    emotion, captioned = inside.emotional.emotion, steered.captioned
    layer, head, share = result.strongest_head
    gap = inside.patching.meta["emotional"] - inside.patching.meta["neutral"]
    return [
        f"It names the emotion of {result.named_right} of {result.named_of} test images.",
        f"The answer depends on single image tokens: the best one, taken from the {emotion} face into the run on its "
        f"neutral twin, moves the answer by {inside.best_cell:.1f} of the {gap:.1f} logits between the two; a token of "
        f"another neutral person by {inside.best_control:.1f} at most.",
        f"No single head carries it: the strongest (layer {layer}, head {head}) restores {share:.0%} of the "
        "difference.",
        f"Steering turns {steered.test.mean:.0%} of short answers about neutral faces into fluent answers with the "
        f"wanted emotion (layer {steered.layer}, strength {steered.alpha:g}); random directions of the same norm, "
        f"{steered.control.mean:.0%}.",
        f"Of whole descriptions it turns {captioned.test:.0%}; random directions, {captioned.control:.0%}.",
    ]


def _view(report: Report, result: DemoResult) -> None:
    """Add the view of the pair, where there is one."""
    if result.inside.view:
        report.section(
            "Hover over it",
            f"The question was: {FEELING} Hover over a word to see which parts of the image it attends to, or over a "
            "cell to see which words attend to it; a click holds the choice. The grid beside the image chooses layer "
            "and head; the mode Difference compares the face with its neutral twin.",
        ).view(result.inside.view, f"attention of {result.name}, to hover over", height=VIEW_HEIGHT)


def _cells(report: Report, inside: Inside, figures: dict[str, Figure]) -> None:
    emotion = inside.emotional.emotion
    report.section(
        "Which parts of the image decide",
        f"The same person twice, {emotion} and neutral: only mouth, eyes and brows differ. One image token at a time "
        f"is patched into the run on the neutral face, at the input of layer 0. Colour: change of the logit of "
        f'"{emotion}" minus that of "neutral". As a control the tokens come from the neutral face of another person.',
    )
    report.figure(
        figures["cells"],
        alt=f"the {emotion} face, the same face under a map of what each image token changes, and the control",
        caption=f"Largest change: {inside.best_cell:.1f} logits; under the control: {inside.best_control:.1f}.",
    )


def draw(result: DemoResult) -> dict[str, Figure]:
    """Draw every figure of the page, by its file's name."""
    inside, rates = result.inside, result.steered.development
    over: dict[str, Any] = {"patch_boxes": inside.patch_boxes, "name": "attention", "unit": "probability"}
    return {
        "cells": draw_cells(inside),
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
            title=f"One head's output from the {inside.emotional.emotion} image", center=0
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


def draw_cells(inside: Inside) -> Figure:
    """Draw the emotional image, what each image token changes, and the same under the control."""
    picture = inside.emotional.open()
    titles = [f"from the {inside.emotional.emotion} face", "control: another neutral face"]
    return plots.overlays(
        picture, inside.cells.values, titles=titles, original=picture, patch_boxes=inside.patch_boxes, name="logits"
    )


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
    """Add what the model says about test images and about styles that it has not seen."""
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
    """Add attention, logit lens and patching of heads, folded."""
    inside = result.inside
    emotion, looks = inside.emotional.emotion, inside.attention.values.sum((1, 2))
    with report.folded(
        "Where it looks",
        f"Attention says where the model reads, not what it uses: compare the map of patches above. The question was: "
        f"{LIST}",
    ):
        report.images([thumbnail(inside.emotional, emotion), thumbnail(inside.neutral, "its neutral twin")])
        with report.side_by_side():
            report.figure(
                figures["attention"],
                alt=f"the {emotion} face beside the same face in grey under a map of the attention it receives",
                caption="Attention from the last prompt token, where the first word of the answer is predicted, to "
                "each image token; mean over heads and layers. Each cell lies on its patch of pixels.",
            )
            report.figure(
                figures["attention_by_layer"],
                alt="the grey face under a map of attention, once per layer, on one colour scale",
                caption=f"Layer by layer. The share of the token's attention that goes to the image ranges from "
                f"{looks.min():.0%} (layer {int(looks.argmin())}) to {looks.max():.0%} (layer {int(looks.argmax())}).",
            )
    rows = [(layer, ", ".join(f"{word} {p:.2f}" for word, p in words)) for layer, words in enumerate(inside.likeliest)]
    with (
        report.folded(
            "What each layer predicts",
            "The logit lens applies the final norm and the unembedding to the residual stream after every layer.",
        ),
        report.side_by_side(),
    ):
        report.figure(
            figures["logit_lens"],
            alt=f"heat map of the probability of each emotion's word after each layer; {emotion} wins in the end",
            caption="Probability of each emotion's word as the next token, at the last prompt token.",
        )
        report.table(["after layer", "most likely next tokens, with their probabilities"], rows)
    best = inside.patching.top(3).values.tolist()
    strongest = "; ".join(f"layer {layer:.0f} head {head:.0f}: {share:.0%}" for layer, head, share in best)
    with report.folded(
        "Which heads carry the emotion",
        "The neutral twin is run once per head, with the output of that head replaced by its output on the "
        f"{emotion} image. An effect of 0 leaves the prediction unchanged; 1 restores that of the {emotion} image "
        f'(logit of "{emotion}" minus logit of "neutral").',
    ):
        report.figure(
            figures["patching"],
            alt="heat map of layers by heads: the share of the effect that each head alone restores",
            caption=f"Activation patching of every head at all positions (patch_sweep). Strongest: {strongest}. The "
            f"effects of all heads sum to {inside.patching.values.sum():.2f}; they need not sum to 1.",
        )


def _steering(report: Report, steered: Steered, figures: dict[str, Figure]) -> None:
    """Add what directions do to answers about neutral faces."""
    test, control, found = steered.test, steered.control, steered.captioned
    report.section(
        "Steering a neutral face",
        "The direction of an emotion is the mean difference of the residual stream at the last prompt token between "
        f"emotional images of development identities and their neutral twins, {steered.n_pairs} pairs in all. Adding "
        "it changes what the model says about a neutral face; a random direction of the same norm is the control. An "
        "answer counts as turned only if it names the wanted emotion first and still reads well: as many sentences as "
        "without steering, about as many words, and no word twice in a row. One of the neutral test images:",
    )
    report.images([thumbnail(steered.picture, "neutral test image")])
    plain = steered.said[0]
    rows = [
        (name, sentence, _reads(name, sentence, plain[1]), text, _reads(name, text, plain[2]))
        for name, sentence, text in steered.said
    ]
    report.table(
        ["steered to", f"asked: {FEELING}", "", f"asked: {DESCRIBE}", ""],
        rows,
        tones={"turned": "good", "not turned": "bad", "broken": "bad", "unchanged": "quiet"},
    )
    counts = [(emotion, f"{test.wanted[emotion]:.0%}", f"{control.wanted[emotion]:.0%}") for emotion in test.wanted]
    counts.append(("mean", f"{test.mean:.0%}", f"{control.mean:.0%}"))
    counts.append(("names any emotion", f"{test.any:.0%}", f"{control.any:.0%}"))
    with report.side_by_side():
        report.figure(
            figures["steering"],
            alt="curves over layers: share of fluent answers with the wanted emotion, steered and at random",
            caption=f"Chosen on these development images: layer {steered.layer}, strength alpha {steered.alpha:g} "
            "(alpha 1 adds the mean difference itself). Random directions have the norm of the larger strength. After "
            "the last layer only the unembedding follows: there a direction acts on the logits of words directly.",
        )
        report.table(
            ["steered to", "answers turned", "under a random direction"],
            counts,
            caption=f"Short answers about {steered.n_pictures} neutral test images, steered to each emotion in turn",
        )
    report.text(
        "A short answer is steered at the last prompt token and at every generated token. A long description has other "
        "words to say as well, and would break under that. So its direction is read elsewhere: both faces of a pair "
        "run under the caption of the neutral face, and the difference is taken at the position where the two runs "
        f"differ most. Added at the generated tokens (layer {found.layer}, alpha {found.alpha:g}, chosen on "
        f"development images), it turns {found.test:.0%} of the descriptions of neutral test images into complete "
        f"descriptions of the wanted emotion; random directions of the same norm, {found.control:.0%}."
    )


def _reads(direction: str, text: str, plain: str) -> str:
    """Return in a word what became of a text under a direction."""
    if direction == "none":
        return ""
    if not is_whole(text, plain):
        return "broken"
    named = named_emotion(text)
    if named == direction:
        return "turned"
    return "unchanged" if named == named_emotion(plain) else "not turned"


# --- several models ---------------------------------------------------------------------------------------------


def write_comparison(comparison: Comparison) -> Path:
    """Write the page that shows all models side by side, so that a difference between them shows at a glance."""
    results = comparison.results
    names = [result.name for result in results]
    report = Report(
        "What small vision-language models see in a face",
        lead=f"{' and '.join(names)}: the same images, the same questions, in {sum(r.seconds for r in results):.0f} "
        "seconds. Nobody in the images was part of the training.",
    )
    report.links([(f"{name}: its own page, with every step", f"{name}/index.html") for name in names])
    report.section("What was found")
    with report.side_by_side():
        for result in results:
            report.points(*findings(result), title=result.name)
    _view(report, results[0])
    report.section(
        "Which parts of the image decide",
        "One image token at a time is patched from an emotional face into the run on its neutral twin, at the input of "
        "layer 0. Colour: change of the logit of the emotion minus that of neutral. Control: the tokens of another "
        "person's neutral face.",
    )
    with report.side_by_side():
        for result in results:
            inside = result.inside
            report.figure(
                draw_cells(inside),
                alt=f"{result.name}: the {inside.emotional.emotion} face under a map of what each token changes",
                caption=f"{result.name}: {' x '.join(map(str, inside.cells.shape[1:]))} image tokens; at most "
                f"{inside.best_cell:.1f} logits, under the control {inside.best_control:.1f}.",
            )
    report.section(
        "In numbers",
        "Each model is inspected on a face whose emotion it names correctly, with and without that emotion. Layer and "
        "strength of steering are chosen on development images; all counts here are on test images.",
    )
    report.table(["", *names], _comparison_rows(results))
    with report.folded("Where they look", "Attention of the last prompt token, mean over heads and layers."):
        with report.side_by_side():
            for result in results:
                emotion = result.inside.emotional.emotion
                report.figure(
                    _attention(result.inside, result.name),
                    alt=f"{result.name}: the {emotion} face under a map of the attention it receives",
                    caption=f"{result.name}: the scales differ.",
                )
    rows = []
    for described in zip(*(result.descriptions for result in results), strict=True):
        picture = described[0].picture
        cells = [cell for d in described for cell in (d.text, "hit" if d.is_hit else "miss")]
        rows.append([thumbnail(picture), picture.style, picture.emotion, *cells])
    columns = [column for name in names for column in (name, "result")]
    with report.folded(
        "What they say",
        f"The question was: {DESCRIBE} The first emotion word of a description counts. The last images are drawn in "
        "styles that the training does not contain.",
    ):
        report.table(["image", "style", "truth", *columns], rows, tones=TONES)
    return report.save(comparison.page)


def _comparison_rows(results: Sequence[DemoResult]) -> list[list[str]]:
    """Return the table of numbers, one column per model."""

    def of_image(result: DemoResult) -> str:
        looks = result.inside.attention.values.sum((1, 2))
        return f"{looks.min():.0%} (layer {int(looks.argmin())}), {looks.max():.0%} (layer {int(looks.argmax())})"

    def best_head(result: DemoResult) -> str:
        layer, head, share = result.strongest_head
        return f"{share:.0%} (layer {layer}, head {head})"

    rows = {
        "test images whose emotion is named": lambda r: f"{r.named_right} of {r.named_of}",
        "best image token patched, logits": lambda r: f"{r.inside.best_cell:.1f}",
        "the same from a neutral stranger (control)": lambda r: f"{r.inside.best_control:.1f}",
        "best single head patched, share of the effect": best_head,
        "effects of all single heads, summed": lambda r: f"{r.inside.patching.values.sum():.0%}",
        "attention to the image, least and most of a layer": of_image,
        "steering: chosen layer, strength": lambda r: f"layer {r.steered.layer}, alpha {r.steered.alpha:g}",
        "neutral faces: short answers turned, fluently": lambda r: f"{r.steered.test.mean:.0%}",
        "short answers under random directions (control)": lambda r: f"{r.steered.control.mean:.0%}",
        "neutral faces: whole descriptions turned": lambda r: f"{r.steered.captioned.test:.0%}",
        "descriptions under random directions (control)": lambda r: f"{r.steered.captioned.control:.0%}",
    }
    return [[name, *(value(result) for result in results)] for name, value in rows.items()]
