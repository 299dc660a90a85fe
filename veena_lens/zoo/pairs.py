"""Draw any number of counterfactual pairs: `python -m veena_lens.zoo.pairs --out DIR --identities 100`.

Each person appears on one background with every emotion that the style can draw, so that twins differ only in the face.
The embedded models have seen none of these people in training: identities are numbered past the training ones, and
those that happen to look like one of them are skipped. Each image is stored once; contexts are further lines of the
manifest.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from veena_lens.emotion.pairs.loading import MANIFEST, Example, PairSet, load_pairs, write_manifest
from veena_lens.long_runs import counting
from veena_lens.zoo.captions import (
    EMOTION_QUESTIONS,
    EVENTS,
    HELD_OUT_EVENTS,
    STRENGTHS,
    context_sentence,
    padded_context,
)
from veena_lens.zoo.drawing import (
    LAYER_SIZE,
    PICTURE_SIZE,
    draw_identity,
    draw_style_face,
    style_attributes,
    style_identities,
)
from veena_lens.zoo.exam import SHARP, to_image
from veena_lens.zoo.faces import STYLES, Combination, combinations
from veena_lens.zoo.people import BACKGROUNDS, SPLITS, identity
from veena_lens.zoo.pictures import Bank, Face, compose
from veena_lens.zoo.samples import TRAINING_STYLES, save_together

__all__ = ["KINDS", "build_pairs", "conditions", "identity_choice", "main"]

KINDS = ("none", "consistent", "conflict")
# Identity numbers of the main style; the models' own development and test identities come first in each.
NUMBERS = {"development": range(10000, 20000), "test": range(20000, 30000)}
HELD_OUT = "held-out style"
QUESTION = EMOTION_QUESTIONS["sentence"][0]
_MAIN = "avataaars"


@dataclass(frozen=True)
class Drawing:
    """Hold an image to draw and its line of the manifest."""

    example: Example
    number: int
    combination: Combination
    background: str


# --- contexts ------------------------------------------------------------------------------------------------


def conditions(
    pairs: PairSet,
    kinds: Sequence[str] = KINDS,
    strengths: Sequence[str] = STRENGTHS,
    *,
    held_out: bool = False,
    seed: int = 0,
) -> PairSet:
    """Return the same images under every condition: alone, after a consistent context, after a conflicting one.

    A context describes an event that fits an emotion (that of the image, or another one) among everyday sentences; its
    strengths differ in one or two words, the event is the same. Twins get the same prompt. `held_out` uses events that
    no embedded model saw in training.

    Raises: ValueError for an unknown kind or strength, or an emotion without events."""
    for name, given, known in (("kind", kinds, KINDS), ("strength", strengths, STRENGTHS)):
        for label in given:
            if label not in known:
                raise ValueError(f"conditions: unknown {name} {label!r}; known: {', '.join(known)}.")
    lost = sorted({e.emotion for e in pairs.examples} - set(EVENTS)) if set(kinds) - {"none"} else []
    if lost:
        raise ValueError(f"conditions: no events for {', '.join(lost)}; emotions with events: {', '.join(EVENTS)}.")

    def contexts_of(example: Example) -> Iterator[tuple[str, str, str] | None]:
        """Return (sentence, emotion, strength) of each condition; None without a context."""
        for kind in kinds:
            if kind == "none":
                yield None
                continue
            for strength in strengths:
                rng = random.Random(f"condition {seed} {example.file} {kind} {held_out}")
                emotion = example.emotion
                if kind == "conflict":
                    emotion = rng.choice([e for e in EVENTS if e != example.emotion])
                event = rng.choice((HELD_OUT_EVENTS if held_out else EVENTS)[emotion])
                yield padded_context(context_sentence(event, strength), rng), emotion, strength

    def under(item: Any, example: Example) -> list[Any]:
        bare = item.without_context()
        return [bare if words is None else bare.with_context(*words) for words in contexts_of(example)]

    plain = pairs.without_context()
    return replace(
        pairs,
        pairs=tuple(one for pair in plain for one in under(pair, pair.emotional)),
        neutrals=tuple(one for example in plain.neutrals for one in under(example, example)),
        singles=tuple(one for example in plain.singles for one in under(example, example)),
    )


# --- who is drawn --------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _trained_looks() -> frozenset[tuple[Any, ...]]:
    return frozenset(astuple(identity(number))[1:] for number in SPLITS["train"])


def identity_choice(style: str, split: str, count: int) -> list[int]:
    """Return the first `count` identities of a style that a split may use, or all if the style has fewer.

    Raises: ValueError for an unknown style or split, a style outside the split, or too many identities."""
    if style not in STYLES:
        raise ValueError(f"Unknown style {style!r}; known: {', '.join(STYLES)}.")
    if split not in (*NUMBERS, HELD_OUT):
        raise ValueError(f"Unknown split {split!r}; known: {', '.join((*NUMBERS, HELD_OUT))}.")
    if (style in TRAINING_STYLES) == (split == HELD_OUT):
        fitting = [s for s in STYLES if (s in TRAINING_STYLES) != (split == HELD_OUT)]
        raise ValueError(
            f"{style} does not belong to split {split!r}, whose styles are {', '.join(fitting)}: held-out styles are "
            "for evaluation only."
        )
    if style != _MAIN:
        return style_identities(style, "all" if split == HELD_OUT else split)[:count]
    if count > 0.9 * len(NUMBERS[split]):
        raise ValueError(f"{style}: {count} identities; a split has at most {int(0.9 * len(NUMBERS[split]))}.")
    fresh = (number for number in NUMBERS[split] if astuple(identity(number))[1:] not in _trained_looks())
    return list(islice(fresh, count))


# --- what is drawn -------------------------------------------------------------------------------------------


def _planned(style: str, number: int, split: str, per_emotion: int, seed: int) -> list[Drawing]:
    """Return every image of one person: clear and subtle faces in turn, one background, one neutral face."""
    rng = random.Random(f"pair {seed} {style} {number}")
    background = rng.choice(list(BACKGROUNDS))
    table, planned = combinations(STYLES[style]), []
    has_neutral = "neutral" in table
    for place, (emotion, faces) in enumerate(table.items()):
        for turn in range(1 if emotion == "neutral" else per_emotion):
            combination = rng.choice(faces[(number + place + turn) % 2])
            if any(drawing.combination.variants == combination.variants for drawing in planned):
                continue  # the style has no further face
            file = f"{style}-{number}-{emotion}{'' if turn == 0 else f'-{turn + 1}'}.png"
            example = Example(
                picture=file,
                file=file,
                emotion=emotion,
                question=QUESTION,
                identity=f"{style}-{number}",
                pair=f"{style}-{number}" if has_neutral else None,
                style=style,
                split=split,
                attributes={"background": background, "expression": "clear" if combination.clear else "subtle"},
            )
            planned.append(Drawing(example, number, combination, background))
    return planned


def _draw(style: str, planned: Sequence[Drawing], folder: Path) -> None:
    """Draw the images of one person with one palette; each file is written completely or not at all."""
    side, images = SHARP * LAYER_SIZE, []
    number = planned[0].number
    bank = None
    if style == _MAIN:
        below, above = draw_identity(identity(number), side)
        bank = Bank([number], torch.stack([below]), torch.stack([above]))
    for drawing in planned:
        if bank is not None:
            face, layers = bank.draw(random.Random(0), index=0, combination=drawing.combination)
            face = replace(face, background=drawing.background)
        else:
            face = _face(style, drawing)
            layers = (draw_style_face(STYLES[style], number, drawing.combination, side),)
        images.append(to_image(compose([(face, layers)], size=SHARP * PICTURE_SIZE)[0]))
    drafts = [folder / f".draft-{drawing.example.file}" for drawing in planned]
    save_together(images, drafts)
    for draft, drawing in zip(drafts, planned, strict=True):
        draft.replace(folder / drawing.example.file)


def _face(style: str, drawing: Drawing) -> Face:
    return Face(
        style=style,
        identity=drawing.number,
        emotion=drawing.combination.emotion,
        clear=drawing.combination.clear,
        background=drawing.background,
        attributes={},
    )


def _with_attributes(drawing: Drawing) -> Example:
    """Return the line of the manifest with the person's attributes."""
    number, example = drawing.number, drawing.example
    known = identity(number).attributes if example.style == _MAIN else style_attributes(example.style, number)
    return replace(example, attributes={**known, **example.attributes})


# --- the command ---------------------------------------------------------------------------------------------


def build_pairs(
    out: str | Path,
    split: str = "development",
    identities: int = 20,
    styles: Sequence[str] | None = None,
    *,
    per_emotion: int = 1,
    contexts: Sequence[str] = ("none",),
    strengths: Sequence[str] = STRENGTHS,
    held_out_events: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> PairSet:
    """Draw up to `identities` people of each style into `out`, write its manifest, and load it.

    The same arguments give the same images. A stopped run resumes; the manifest is written last. Contexts are lines of
    the manifest only: a further call with others draws nothing. `styles` defaults to the main one, or to the held-out
    ones for their split.

    Raises: ValueError for unknown choices; FileExistsError for a folder with images of other settings."""
    folder = Path(out).expanduser()
    if styles is None:
        styles = [s for s in STYLES if s not in TRAINING_STYLES] if split == HELD_OUT else [_MAIN]
    if identities < 1 or per_emotion < 1:
        raise ValueError(f"build_pairs: identities={identities} and per_emotion={per_emotion} must be at least 1.")
    people = [(style, number) for style in styles for number in identity_choice(style, split, identities)]
    _claim(folder, {"split": split, "per_emotion": per_emotion, "seed": seed})
    with counting(len(people), "identities", progress) as advance:
        drawings: list[Drawing] = []
        for style, number in people:
            planned = _planned(style, number, split, per_emotion, seed)
            if not all((folder / drawing.example.file).is_file() for drawing in planned):
                _draw(style, planned, folder)
            drawings += planned
            advance(1)
    examples = [replace(_with_attributes(d), picture=folder / d.example.file) for d in drawings]
    write_manifest(examples, folder / MANIFEST)
    pairs = load_pairs(folder)
    if tuple(contexts) != ("none",):
        pairs = conditions(pairs, contexts, strengths, held_out=held_out_events, seed=seed)
        write_manifest(pairs.examples, folder / MANIFEST)
        pairs = load_pairs(folder)
    return pairs


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Store the settings in the folder. Raises: FileExistsError if it has images of other settings."""
    mark = folder / "build.json"
    text = json.dumps({"drawn by": "veena_lens.zoo.pairs", **settings}, indent=1) + "\n"
    if mark.is_file() and mark.read_text(encoding="utf-8") != text:
        raise FileExistsError(
            f"{folder} has images drawn with other settings ({json.dumps(json.loads(mark.read_text()))}); pass another "
            "folder, or the same split, per_emotion and seed to resume."
        )
    if not mark.is_file() and (folder / MANIFEST).exists():
        raise FileExistsError(f"{folder} has a {MANIFEST} that this command did not write; pass another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(text, encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m veena_lens.zoo.pairs", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for images and manifest.jsonl")
    parser.add_argument("--split", default="development", choices=[*NUMBERS, HELD_OUT])
    parser.add_argument("--identities", type=int, default=20, help="people per style")
    parser.add_argument("--styles", nargs="+", choices=list(STYLES), help="default: avataaars, or the held-out ones")
    parser.add_argument("--per-emotion", type=int, default=1, help="faces per emotion and person")
    parser.add_argument("--contexts", default="none", help=f"comma-separated list of {', '.join(KINDS)}")
    parser.add_argument(
        "--strengths", default=",".join(STRENGTHS), help="comma-separated list of strengths of the contexts"
    )
    parser.add_argument(
        "--held-out-events", action="store_true", help="use contexts that no embedded model was trained on"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    pairs = build_pairs(
        options.out,
        options.split,
        options.identities,
        options.styles,
        per_emotion=options.per_emotion,
        contexts=options.contexts.split(","),
        strengths=options.strengths.split(","),
        held_out_events=options.held_out_events,
        seed=options.seed,
    )
    for style in options.styles or []:
        found = len(pairs.select(style=style).identities)
        if found < options.identities:
            print(f"{style}: {found} identities, all that it has in {options.split!r}.")
    print(pairs)


if __name__ == "__main__":
    main()
