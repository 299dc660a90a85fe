"""What the demo finds: plain records, the summary that is printed, and the numbers that are written as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veena_lens.scores import Scores
from veena_lens.zoo.people import named_emotion

if TYPE_CHECKING:
    from veena_lens.checkpoints.files import Picture


@dataclass(frozen=True)
class Description:
    """What the model says of one image, and whether the first emotion it names is the drawn one."""

    picture: Picture
    text: str

    @property
    def named(self) -> str:
        return named_emotion(self.text) or "none"

    @property
    def is_hit(self) -> bool:
        return self.named == self.picture.emotion


@dataclass(frozen=True, kw_only=True, eq=False)
class Inside:
    """One image, its neutral twin, and what the model does between them.

    attention: mean over heads of the last prompt token's attention, axes (layer, height, width). patch_boxes: the
    cells' boxes in pixels. lens: probability of each emotion's word, axes (layer, emotion); likeliest: each layer's
    likeliest tokens. patching: effect of each head's output from the emotional image, axes (layer, head), with the
    logit differences of both runs as meta["emotional"] and meta["neutral"]. cells: change of that difference in logits
    when one image token before layer 0 is patched, from the emotional image and from a neutral stranger, axes (source,
    height, width). view: the interactive page of the pair.
    """

    emotional: Picture
    neutral: Picture
    attention: Scores
    patch_boxes: Any
    lens: Scores
    likeliest: list[list[tuple[str, float]]]
    patching: Scores
    cells: Scores
    view: str = ""

    @property
    def best_cell(self) -> float:
        """Return the largest change in logits that one image token brings about."""
        return float(self.cells.values[0].max())

    @property
    def best_control(self) -> float:
        """Return the largest change, of either sign, under the control."""
        return float(self.cells.values[1].abs().max())


@dataclass(frozen=True)
class Flips:
    """How often an answer about a neutral face was turned to the emotion it was steered to and still read well, and
    how often it named any emotion."""

    wanted: Mapping[str, float]
    any: float

    @property
    def mean(self) -> float:
        return sum(self.wanted.values()) / len(self.wanted)


@dataclass(frozen=True)
class CaptionSteering:
    """The setting chosen on development faces, and shares of whole captions that name the wanted emotion."""

    layer: int
    alpha: float
    development: float
    test: float
    control: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Steered:
    """The effect of the directions: rates on development faces by setting, then the chosen setting on test faces.

    `said` holds one image's answers under every direction: direction, sentence, long description."""

    n_pairs: int
    development: Scores  # axes (setting, layer)
    layer: int
    alpha: float
    n_pictures: int
    test: Flips
    control: Flips
    picture: Picture
    said: list[tuple[str, str, str]]
    captioned: CaptionSteering
    seed: int = 0


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class DemoResult:
    """What `run_demo` found and where it wrote it."""

    model: str
    out: Path
    descriptions: Sequence[Description]
    named_right: int
    named_of: int
    inside: Inside
    steered: Steered
    seconds: float

    @property
    def page(self) -> Path:
        return self.out / "index.html"

    @property
    def name(self) -> str:
        """Return the model's name without the folders above it."""
        return Path(self.model).name

    @property
    def strongest_head(self) -> tuple[int, int, float]:
        """Return (layer, head, share of the effect) of the head whose patch brings back most."""
        layer, head, share = self.inside.patching.top(1).values.tolist()[0]
        return int(layer), int(head), share

    @property
    def numbers(self) -> dict[str, Any]:
        """Return the numbers behind the page: the content of `numbers.json`."""
        inside, steered = self.inside, self.steered
        rates = steered.development
        return {
            "model": self.model,
            "seconds": round(self.seconds, 1),
            "descriptions": [
                {
                    "picture": d.picture.path.name,
                    "truth": d.picture.emotion,
                    "named": d.named,
                    "hit": d.is_hit,
                    "text": d.text,
                }
                for d in self.descriptions
            ],
            "named": {"right": self.named_right, "of": self.named_of},
            "pair": {"emotional": inside.emotional.file, "neutral": inside.neutral.file},
            "attention": {"axes": inside.attention.axes, "values": inside.attention.values.tolist()},
            "logit_lens": {"emotions": inside.lens.labels["emotion"], "probability": inside.lens.values.tolist()},
            "patching": {**inside.patching.meta, "share_by_layer_and_head": inside.patching.values.tolist()},
            "cells": {"axes": inside.cells.axes, "logits": inside.cells.values.tolist()},
            "steering": {
                "pairs": steered.n_pairs,
                "descriptions": asdict(steered.captioned),
                "layer": steered.layer,
                "alpha": steered.alpha,
                "seed": steered.seed,
                "development": dict(zip(rates.labels["setting"], rates.values.tolist(), strict=True)),
                "test_pictures": steered.n_pictures,
                "test": dict(steered.test.wanted),
                "test_any_emotion": steered.test.any,
                "random": dict(steered.control.wanted),
                "random_any_emotion": steered.control.any,
                "said": [{"direction": d, "sentence": s, "description": text} for d, s, text in steered.said],
            },
        }

    def __repr__(self) -> str:
        inside, steered, captioned = self.inside, self.steered, self.steered.captioned
        hits = sum(d.is_hit for d in self.descriptions)
        emotion = inside.emotional.emotion
        layer, head, share = self.strongest_head
        final = inside.lens.select(layer=-1, emotion=emotion).values.item()
        first = next((layer for layer, words in enumerate(inside.likeliest) if words[0][0] == emotion), None)
        since = "at no layer" if first is None else f"from layer {first}"
        looks = inside.attention.values.sum((1, 2))
        rows = [
            ("described", f"{hits} of {len(self.descriptions)} held-out images correctly, in several drawing styles"),
            ("named", f"{self.named_right} of {self.named_of} test images"),
            ("attention", f"the last token gives {looks.max():.0%} to the image in layer {int(looks.argmax())}"),
            ("logit lens", f"{emotion!r} is the top token {since}, final probability {final:.2f}"),
            ("patching", f"one image token moves the answer by {inside.best_cell:.1f} logits, a stranger's by "
                         f"{inside.best_control:.1f}; layer {layer} head {head} restores {share:.0%}"),
            ("steering", f"{steered.test.mean:.0%} of answers about neutral faces become the wanted emotion, fluently "
                         f"(layer {steered.layer}, alpha {steered.alpha:g}); random {steered.control.mean:.0%}"),
            ("captions", f"{captioned.test:.0%} of whole descriptions name it too (layer {captioned.layer}); "
                         f"random {captioned.control:.0%}"),
        ]  # fmt: skip
        first = f"{self.model}, {self.seconds:.0f} s"
        return "\n".join([first, *(f"  {name:<11}{text}" for name, text in rows), f"page: {self.page}"])


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """The demo's results on several models, and the folder of the page that compares them."""

    results: Sequence[DemoResult]
    out: Path

    @property
    def page(self) -> Path:
        return self.out / "index.html"

    def __repr__(self) -> str:
        return "\n".join([*map(repr, self.results), f"both side by side: {self.page}"])
