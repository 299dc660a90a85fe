"""The main job on the embedded model: describe faces, look inside, patch and steer, with controls.

Directions, layer and strength are chosen on development identities; everything that is shown or counted is on
test identities, which neither the training nor that choice has seen.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from veena_lens.app import steps
from veena_lens.app.demo_page import CaptionSteering, caption_steer, caption_vectors, steer_captions
from veena_lens.app.steps import Description, Flips
from veena_lens.interventions import Steer
from veena_lens.scores import Scores
from veena_lens.zoo.people import EMOTIONS

if TYPE_CHECKING:
    from veena_lens.checkpoints.files import Picture
    from veena_lens.model.model import HookedVLM

ALPHAS = (1.0, 2.0)
SEED = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Inside:
    """One image, its neutral twin, and what the model does between them."""

    emotional: Picture
    neutral: Picture
    attention: Scores
    patch_boxes: Any
    lens: Scores
    likeliest: list[list[tuple[str, float]]]
    patching: Scores


@dataclass(frozen=True, kw_only=True, eq=False)
class Steered:
    """The directions' effect: rates on development images by setting, then the chosen setting on test images.

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
    captioned: CaptionSteering | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class DemoResult:
    """What `run_demo` found and where it wrote it; `numbers` is the JSON file's content."""

    model: str
    out: Path
    descriptions: list[Description]
    named_right: int
    named_of: int
    inside: Inside
    steered: Steered
    seconds: float
    numbers: dict[str, Any] = field(repr=False)

    @property
    def page(self) -> Path:
        return self.out / "index.html"

    def __repr__(self) -> str:
        inside, steered = self.inside, self.steered
        hits = sum(d.is_hit for d in self.descriptions)
        emotion = inside.emotional.emotion
        layer, head, share = inside.patching.top(1).values.tolist()[0]
        final = inside.lens.select(layer=-1, emotion=emotion).values.item()
        first = next((layer for layer, words in enumerate(inside.likeliest) if words[0][0] == emotion), None)
        since = "at no layer" if first is None else f"from layer {first}"
        looks = inside.attention.values.sum((1, 2))
        rows = [
            ("described", f"{hits} of {len(self.descriptions)} held-out pictures as drawn, other styles included"),
            ("named", f"{self.named_right} of {self.named_of} test pictures"),
            ("attention", f"{looks.max():.0%} of the last token's goes to the picture in layer {int(looks.argmax())}"),
            ("logit lens", f"{emotion!r} is likeliest {since}, probability {final:.2f} at the end"),
            ("patching", f"layer {layer:.0f} head {head:.0f} alone brings back {share:.0%}"),
            ("steering", f"{steered.test.mean:.0%} of answers on neutral faces turn as wanted (layer {steered.layer}, "
                         f"alpha {steered.alpha:g}); random directions {steered.control.mean:.0%}"),
            ("captions", "" if steered.captioned is None else f"{steered.captioned.test:.0%} of whole descriptions "
                         f"turn too (layer {steered.captioned.layer}); random {steered.captioned.control:.0%}"),
            ("written", f"{self.page} and {self.out / 'numbers.json'} in {self.seconds:.0f} s"),
        ]  # fmt: skip
        return "\n".join([f"veena_lens demo on {self.model}", *(f"  {name:<11}{text}" for name, text in rows)])


@contextmanager
def few_threads(model: HookedVLM) -> Iterator[None]:
    """One thread for a small model: its matrices gain nothing from a second one, and where other programs share
    the cores, waiting for it makes a forward pass ten times as slow."""
    before = torch.get_num_threads()
    if sum(parameter.numel() for parameter in model.parameters()) < 50_000_000:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_demo(out: str | Path, model: str = "tiny-llava-emotion", progress: bool = True) -> DemoResult:
    """Describe, look inside, patch and steer; writes `index.html`, the figures and `numbers.json` under `out`.

    Raises FileNotFoundError where the checkpoint or its images are missing.
    """
    from veena_lens.model.model import HookedVLM

    began = time.perf_counter()
    say = _narrator(began, progress)
    say("loading the model")
    vlm = HookedVLM.from_pretrained(model)
    with few_threads(vlm):
        return _run(vlm, Path(out), model, began, say)


def _run(vlm: HookedVLM, out: Path, model: str, began: float, say: Callable[[str], None]) -> DemoResult:
    from veena_lens.app.demo_page import write_page
    from veena_lens.checkpoints.files import bundled_pairs, bundled_pictures

    test = [picture for picture in bundled_pictures("test") if picture.context is None]
    strange = [picture for split in ("held-out style", "emoji") for picture in bundled_pictures(split)]
    shown = choose(test, strange)
    say(f"describing {len(shown)} pictures and naming {len(test)}")
    descriptions = steps.describe(vlm, shown)
    named = dict(zip((picture.file for picture in test), steps.name_emotions(vlm, test), strict=True))
    right = {picture.file for picture in test if named[picture.file] == picture.emotion}
    say("looking inside: attention, logit lens, patching of every head")
    inside = look_inside(vlm, *choose_pair(bundled_pairs("test"), shown, right))
    say("directions from pairs, tried on development pictures")
    neutral = sorted((p for p in test if p.emotion == "neutral"), key=lambda p: (p.file not in right, p not in shown))
    steered = steer(vlm, bundled_pairs("development"), neutral, say)
    say("writing the page")
    seconds = time.perf_counter() - began
    numbers = summary(model, descriptions, (len(right), len(test)), inside, steered, seconds)
    result = DemoResult(
        model=model,
        out=out,
        descriptions=descriptions,
        named_right=len(right),
        named_of=len(test),
        inside=inside,
        steered=steered,
        seconds=seconds,
        numbers=numbers,
    )
    result.out.mkdir(parents=True, exist_ok=True)
    (result.out / "numbers.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    write_page(result)
    return result


def choose(test: Sequence[Picture], strange: Sequence[Picture]) -> list[Picture]:
    """A test image of each emotion, of another person each, then a happy and a sad one of every other style."""
    by_emotion = {emotion: [p for p in test if p.emotion == emotion] for emotion in EMOTIONS}
    faces = [drawn[place % len(drawn)] for place, drawn in enumerate(by_emotion.values()) if drawn]
    first = {(p.style, p.emotion): p for p in reversed(strange) if p.emotion in ("happy", "sad")}
    return faces + sorted(first.values(), key=lambda p: (p.split, p.style, p.emotion))


def choose_pair(
    pairs: Sequence[tuple[Picture, Picture]], shown: Sequence[Picture], right: Collection[str]
) -> tuple[Picture, Picture]:
    """A pair that is named right on both sides: that of an image already shown if possible, surprise first."""
    files = [picture.file for picture in shown]

    def place(pair: tuple[Picture, Picture]) -> tuple[bool, bool, bool]:
        wrong = pair[0].file not in right or pair[1].file not in right
        return wrong, pair[0].file not in files, pair[0].emotion != "surprised"

    return min(pairs, key=place)


def look_inside(model: HookedVLM, emotional: Picture, neutral: Picture) -> Inside:
    """Attention, lens and patching on one image and its neutral twin."""
    shown, twin = (steps.ask(model, steps.NAME, [picture]) for picture in (emotional, neutral))
    lens, likeliest = steps.logit_lens(model, shown)
    return Inside(
        emotional=emotional,
        neutral=neutral,
        attention=steps.attention_to_picture(model, shown),
        patch_boxes=None if shown.patch_boxes is None else shown.patch_boxes[0][0],
        lens=lens,
        likeliest=likeliest,
        patching=steps.head_patching(model, shown, twin, emotional.emotion),
    )


def steer(
    model: HookedVLM,
    pairs: Sequence[tuple[Picture, Picture]],
    pictures: Sequence[Picture],
    say: Callable[[str], None] = lambda _: None,
) -> Steered:
    """Directions from `pairs`, layer and strength chosen on their neutral twins, the effect on other `pictures`.

    The first of `pictures` is the one that is described."""
    vectors = steps.steering_vectors(model, pairs)
    twins = list({pair[1].identity: pair[1] for pair in pairs}.values())[:4]
    development = by_layer(model, twins, vectors, say)
    layer, alpha = best_setting(development)
    say(f"steering {len(pictures)} neutral test pictures to {len(vectors)} emotions: layer {layer}, alpha {alpha:g}")
    generator = torch.Generator().manual_seed(SEED)
    test = steps.flip_rates(model, pictures, vectors, layer, alpha)
    control = steps.flip_rates(model, pictures, vectors, layer, alpha, random=generator)

    calm = pictures[0]
    noise = steps.random_like(next(iter(vectors.values())), generator)
    steers = [None, *(Steer(layer=layer, vector=v[layer], alpha=alpha) for v in (*vectors.values(), noise))]
    sentences = steps.steered(model, steps.SAY, [calm] * len(steers), steers, max_new_tokens=24)
    say("steering whole descriptions")
    long = caption_vectors(model, pairs)
    captioned = steer_captions(model, long, twins, pictures, SEED + 2)
    noise = steps.random_like(next(iter(long.values())), generator)
    pushes = [None, *(caption_steer(v, captioned.layer, captioned.alpha) for v in (*long.values(), noise))]
    captions = steps.steered(model, steps.DESCRIBE, [calm] * len(pushes), pushes, max_new_tokens=60)
    return Steered(
        n_pairs=len(pairs),
        development=development,
        layer=layer,
        alpha=alpha,
        n_pictures=len(pictures),
        test=test,
        control=control,
        picture=calm,
        said=list(zip(["none", *vectors, "random"], sentences, captions, strict=True)),
        captioned=captioned,
    )


def by_layer(
    model: HookedVLM,
    pictures: Sequence[Picture],
    vectors: dict[str, Float[Tensor, "layer d_model"]],
    say: Callable[[str], None],
) -> Scores:
    """Mean rate of naming the wanted emotion, by strength and layer, with random directions at the last strength."""
    layers = range(model.cfg.n_layers)
    generator = torch.Generator().manual_seed(SEED + 1)
    settings = [*((f"alpha {alpha:g}", alpha, None) for alpha in ALPHAS), ("random", ALPHAS[-1], generator)]
    rates = torch.zeros(len(settings), len(layers))
    for (row, (name, alpha, random)), layer in product(enumerate(settings), layers):
        if layer == 0:
            say(f"  steering at every layer, {name}")
        rates[row, layer] = steps.flip_rates(model, pictures, vectors, layer, alpha, random).mean
    return Scores(
        rates, ("setting", "layer"), {"setting": [name for name, *_ in settings]}, "answers as wanted", "share"
    )


def best_setting(development: Scores) -> tuple[int, float]:
    """The layer and strength with the highest rate; the weaker strength, then the earlier layer, where equal."""
    rates = development.values[: len(ALPHAS)]
    row, layer = divmod(int((rates >= rates.max()).flatten().long().argmax()), rates.shape[1])
    return layer, ALPHAS[row]


def summary(
    model: str,
    descriptions: Sequence[Description],
    named: tuple[int, int],
    inside: Inside,
    steered: Steered,
    seconds: float,
) -> dict[str, Any]:
    """The numbers behind the page, for a program to read."""
    return {
        "model": model,
        "seconds": round(seconds, 1),
        "descriptions": [
            {
                "picture": d.picture.path.name,
                "truth": d.picture.emotion,
                "named": d.named,
                "hit": d.is_hit,
                "text": d.text,
            }
            for d in descriptions
        ],
        "named": {"right": named[0], "of": named[1]},
        "pair": {"emotional": inside.emotional.file, "neutral": inside.neutral.file},
        "attention": {"axes": inside.attention.axes, "values": inside.attention.values.tolist()},
        "logit_lens": {"emotions": inside.lens.labels["emotion"], "probability": inside.lens.values.tolist()},
        "patching": {**inside.patching.meta, "share_by_layer_and_head": inside.patching.values.tolist()},
        "steering": {
            "pairs": steered.n_pairs,
            "descriptions": None if steered.captioned is None else asdict(steered.captioned),
            "layer": steered.layer,
            "alpha": steered.alpha,
            "seed": SEED,
            "development": dict(
                zip(steered.development.labels["setting"], steered.development.values.tolist(), strict=True)
            ),
            "test_pictures": steered.n_pictures,
            "test": dict(steered.test.wanted),
            "test_any_emotion": steered.test.any,
            "random": dict(steered.control.wanted),
            "random_any_emotion": steered.control.any,
            "said": [{"direction": d, "sentence": sentence, "description": text} for d, sentence, text in steered.said],
        },
    }


def _narrator(began: float, progress: bool) -> Callable[[str], None]:
    def say(text: str) -> None:
        if progress:
            print(f"[{time.perf_counter() - began:5.1f} s] {text}", flush=True)

    return say
