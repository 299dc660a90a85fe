"""The demo's page and figures: what `demo.py` found, told in five sections that a newcomer can follow.

Steering a whole description: a direction read where the words of the two faces part.

The last prompt token knows little of a caption's later words. So both faces of a pair are run under the neutral
face's own caption, and the direction is their difference at the answer's position where they differ most.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from veena_lens import plots
from veena_lens.app import steps
from veena_lens.app.html import Report, Thumbnail, Tone
from veena_lens.interventions import Steer
from veena_lens.zoo.people import EMOTIONS, named_emotion

if TYPE_CHECKING:
    from veena_lens.app.demo import DemoResult, Inside, Steered
    from veena_lens.checkpoints.files import Picture
    from veena_lens.model.model import HookedVLM


ALPHAS = (0.6, 0.7, 0.8)
MAX_TOKENS = 60


@dataclass(frozen=True)
class CaptionSteering:
    """The setting chosen on development images, and shares of whole captions that name the wanted emotion."""

    layer: int
    alpha: float
    development: float
    test: float
    control: float


@torch.no_grad()
def caption_vectors(
    model: HookedVLM, pairs: Sequence[tuple[Picture, Picture]]
) -> dict[str, Float[Tensor, "layer d_model"]]:
    """For each emotion the mean over its pairs of resid_post(emotional) - resid_post(neutral) under one caption,
    at the answer's position where the pair differs most in the last layers."""
    n_layers, vectors = model.cfg.n_layers, {}
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(n_layers)]
    for emotion in EMOTIONS:
        mine = [pair for pair in pairs if pair[0].emotion == emotion]
        if not mine:
            continue
        emotional, neutral = (steps.ask(model, steps.DESCRIBE, side) for side in zip(*mine, strict=True))
        tokens = model.generate(neutral, max_new_tokens=MAX_TOKENS, return_type="tokens")
        caches = [
            model.run_with_cache(side.with_answer(tokens), names_filter=names)[1] for side in (emotional, neutral)
        ]
        first, second = ([c.at("generated", "resid_post", layer) for layer in range(n_layers)] for c in caches)
        difference = torch.stack(first) - torch.stack(second)
        parting = difference[-3].norm(dim=-1).argmax(-1)
        vectors[emotion] = difference[:, torch.arange(len(mine)), parting].mean(1)
    return vectors


def share_as_wanted(
    model: HookedVLM,
    pictures: Sequence[Picture],
    vectors: Mapping[str, Float[Tensor, "layer d_model"]],
    layer: int,
    alpha: float,
    random: torch.Generator | None = None,
) -> float:
    """Share of captions of neutral images that name the wanted emotion first and stay whole: as many sentences as
    the unsteered caption, and within three words as long. `random`: directions of the same norm instead."""
    plain = {p.file: d.text for p, d in zip(pictures, steps.describe(model, pictures), strict=True)}
    rows = [(emotion, picture) for emotion in vectors for picture in pictures]
    good = 0
    for part in steps.chunks(len(rows)):
        chosen = [vectors[e] if random is None else steps.random_like(vectors[e], random) for e, _ in rows[part]]
        steers = [caption_steer(v, layer, alpha) for v in chosen]
        texts = steps.steered(model, steps.DESCRIBE, [p for _, p in rows[part]], steers, MAX_TOKENS)
        good += sum(
            named_emotion(text) == emotion and is_whole(text, plain[picture.file])
            for text, (emotion, picture) in zip(texts, rows[part], strict=True)
        )
    return good / len(rows)


def caption_steer(vector: Float[Tensor, "layer d_model"], layer: int, alpha: float) -> Steer:
    """The push on a caption: at every generated token, not at the prompt."""
    return Steer(layer=layer, vector=vector[layer], alpha=alpha, positions="generated")


def is_whole(text: str, plain: str) -> bool:
    """True when a caption kept its shape."""
    return text.count(".") == plain.count(".") and abs(len(text.split()) - len(plain.split())) <= 3


def steer_captions(
    model: HookedVLM,
    vectors: Mapping[str, Float[Tensor, "layer d_model"]],
    development: Sequence[Picture],
    pictures: Sequence[Picture],
    seed: int,
) -> CaptionSteering:
    """Layer and strength chosen on development images, then judged on others against random directions."""
    layers = range(max(0, model.cfg.n_layers - 3), model.cfg.n_layers)
    tried = {(la, a): share_as_wanted(model, development, vectors, la, a) for la, a in product(layers, ALPHAS)}
    (layer, alpha), best = max(tried.items(), key=lambda item: item[1])
    generator = torch.Generator().manual_seed(seed)
    return CaptionSteering(
        layer=layer,
        alpha=alpha,
        development=best,
        test=share_as_wanted(model, pictures, vectors, layer, alpha),
        control=share_as_wanted(model, pictures, vectors, layer, alpha, generator),
    )


TONES: dict[str, Tone] = {"hit": "good", "miss": "bad"}


def write_page(result: DemoResult) -> Path:
    """`index.html` and one PNG a figure beside it."""
    figures = draw(result)
    for name, figure in figures.items():
        plots.save(figure, result.out / f"{name}.png")
    report = Report(
        "What a small vision-language model sees in a face",
        lead=f"{result.model}: described, looked into, patched and steered in {result.seconds:.0f} seconds.",
    )
    _descriptions(report, result)
    _look_inside(report, result.inside, figures)
    _steering(report, result.steered, figures)
    report.section("How this page was made").code(
        f"veena-lens demo --out {result.out.as_posix()}\n"
        + "".join(f"{name} {version(name)}\n" for name in ("torch", "transformers", "transformer_lens"))
        + f"Python {platform.python_version()}, {result.seconds:.1f} s; all numbers in numbers.json"
    )
    return report.save(result.page)


def draw(result: DemoResult) -> dict[str, Figure]:
    """Every figure of the page by its file's name."""
    inside, steered = result.inside, result.steered
    face, emotion = inside.emotional.open(), inside.emotional.emotion
    layers = inside.attention.labels["layer"]
    rates = steered.development
    return {
        "attention": plots.overlay(
            face,
            inside.attention.mean("layer").values,
            patch_boxes=inside.patch_boxes,
            title="attention, mean over layers",
            name="attention",
            unit="probability",
        ),
        "attention_by_layer": plots.overlays(
            face,
            inside.attention.values,
            patch_boxes=inside.patch_boxes,
            titles=[f"layer {layer}" for layer in layers],
            title="From the last token to the picture, mean over heads",
            name="attention",
            unit="probability",
        ),
        "logit_lens": inside.lens.plot(title="Next word if the model stopped after a layer", limits=(0, 1)),
        "patching": inside.patching.plot(title=f"One head's output from the {emotion} picture", center=0),
        "steering": plots.curves(
            rates.values,
            x=rates.labels["layer"],
            lines=rates.labels["setting"],
            x_name="layer that is steered",
            name=rates.name,
            unit=rates.unit,
            title="Neutral development pictures under a direction",
        ),
    }


def picture_of(picture: Picture, caption: str = "") -> Thumbnail:
    article = "an" if picture.emotion[0] in "aeiou" else "a"
    return Thumbnail(picture.open(), f"drawn face of {article} {picture.emotion} person", caption)


def _descriptions(report: Report, result: DemoResult) -> None:
    shown = result.descriptions
    hits, strange = sum(d.is_hit for d in shown), sum(d.picture.split != "test" for d in shown)
    report.section(
        "What the model says",
        f"{hits} of these {len(shown)} pictures are named right: the first emotion word of the description is the "
        f"drawn emotion. The first {len(shown) - strange} show people whom the model has never seen, one an emotion "
        f"from the test pictures; the last {strange} are drawn in styles that it has never seen. Asked to name the "
        f"emotion alone, it is right on {result.named_right} of {result.named_of} test pictures.",
        f"The question was: {steps.DESCRIBE}",
    )
    rows = [
        (picture_of(d.picture), d.picture.style, d.picture.emotion, d.text, d.named, "hit" if d.is_hit else "miss")
        for d in shown
    ]
    report.table(["picture", "style", "truth", "description", "named", "result"], rows, tones=TONES)


def _look_inside(report: Report, inside: Inside, figures: dict[str, Figure]) -> None:
    emotion, looks = inside.emotional.emotion, inside.attention.values.sum((1, 2))
    report.section(
        "Where it looks",
        "The same face twice, emotional and neutral: only mouth, eyes and brows differ. It is taken from the pairs "
        f"that the model names right on both sides, where there are any. The question was: {steps.NAME}",
    )
    report.pictures([picture_of(inside.emotional, emotion), picture_of(inside.neutral, "its neutral twin")])
    report.figure(
        figures["attention"],
        alt=f"the {emotion} face beside the same face in grey under a map of the attention it receives",
        caption="Attention of the last prompt token, from which the answer's first word is read, to each image token, "
        "mean over heads and layers. A cell lies where its patch of pixels lies.",
    )
    report.figure(
        figures["attention_by_layer"],
        alt="the grey face under a map of attention, once for each layer, on one scale",
        caption=f"Layer by layer. Of all its attention the token gives the picture {looks.min():.0%} "
        f"(layer {int(looks.argmin())}) to {looks.max():.0%} (layer {int(looks.argmax())}).",
    )
    report.section(
        "What each layer would say",
        "The logit lens reads the residual stream after every layer as if it were the last one.",
    )
    report.figure(
        figures["logit_lens"],
        alt=f"heat map of the probability of each emotion's word after each layer; {emotion} wins in the end",
        caption="Probability of each emotion's head word as the next token, at the last prompt token.",
    )
    rows = [(layer, ", ".join(f"{word} {p:.2f}" for word, p in words)) for layer, words in enumerate(inside.likeliest)]
    report.table(["layer", "likeliest next tokens"], rows)
    best = inside.patching.top(3)
    named = (f"layer {layer:.0f} head {head:.0f}: {share:.0%}" for layer, head, share in best.values.tolist())
    strongest = "; ".join(named)
    report.section(
        "Which heads carry the emotion",
        "The neutral twin is run again and again; each time the output of one head is replaced by what the same head "
        f"gave for the {emotion} picture. Zero leaves the neutral answer as it was, one makes it fully {emotion} "
        f'(logit of "{emotion}" minus logit of "neutral").',
    )
    report.figure(
        figures["patching"],
        alt="heat map of layers by heads: the share of the effect that each head alone brings back",
        caption=f"Activation patching of every head at all positions, by transformer_lens.patching. Strongest: "
        f"{strongest}. The shares of all heads sum to {inside.patching.values.sum():.2f}; they need not sum to one.",
    )


def _steering(report: Report, steered: Steered, figures: dict[str, Figure]) -> None:
    emotions = list(steered.test.wanted)
    report.section(
        "Steering a neutral face",
        f"A direction an emotion: the mean difference of the residual stream at the last prompt token between "
        f"emotional pictures of development identities and their neutral twins, {steered.n_pairs} pairs in all. Adding "
        "it turns what the model says of a neutral face; a random direction of the same length is the control.",
    )
    report.figure(
        figures["steering"],
        alt="curves over layers: share of answers that name the wanted emotion, steered and at random",
        caption=f"Chosen here, on development pictures: layer {steered.layer}, alpha {steered.alpha:g} (alpha 1 adds "
        "the mean difference itself). Random directions have the length of the larger strength.",
    )
    rows = [(e, f"{steered.test.wanted[e]:.0%}", f"{steered.control.wanted[e]:.0%}") for e in emotions]
    rows.append(("mean", f"{steered.test.mean:.0%}", f"{steered.control.mean:.0%}"))
    rows.append(("any emotion", f"{steered.test.any:.0%}", f"{steered.control.any:.0%}"))
    report.table(
        ["direction", "answer as wanted", "under a random direction"],
        rows,
        caption=f"{steered.n_pictures} neutral test pictures, steered to each emotion in turn",
    )
    report.text("One of these pictures:")
    report.pictures([picture_of(steered.picture, "neutral test picture")])
    report.table(
        ["direction", "what it says", "at more length"],
        steered.said,
        caption=f"Asked: {steps.SAY}; then: {steps.DESCRIBE}",
    )
    if steered.captioned is not None:
        found = steered.captioned
        report.text(
            "A sentence takes the vector at the last prompt token and at every generated one. A long description has "
            "other words to say as well, and that push would break it. So its direction is read where it is needed: "
            "both faces of a pair run under the neutral face's own caption, and their difference is taken at the "
            "position where they part most. Added at the generated tokens (layer "
            f"{found.layer}, alpha {found.alpha:g}, chosen on development pictures), it turns {found.test:.0%} of the "
            f"descriptions of neutral test pictures into whole ones of the wanted emotion; random directions of the "
            f"same length {found.control:.0%}."
        )
