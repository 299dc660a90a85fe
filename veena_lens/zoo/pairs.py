"""Draws counterfactual pairs, as many as wanted: `python -m veena_lens.zoo.pairs --out DIR --identities 100`.

One person on one ground with every emotion that the style can draw, so that twins differ in the face alone. Nobody
whom the embedded models saw in training is drawn: identities are numbered past theirs, and those that happen to look
like one of theirs are passed over. Each picture is stored once; contexts are further lines of the manifest.
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
from veena_lens.sweeps.engine import bar
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
# Numbers of the main style's identities; the models' own development and test identities come first in each.
NUMBERS = {"development": range(10000, 20000), "test": range(20000, 30000)}
HELD_OUT = "held-out style"
QUESTION = EMOTION_QUESTIONS["sentence"][0]
_MAIN = "avataaars"


@dataclass(frozen=True)
class Drawing:
    """A picture to be drawn, and the line that goes with it."""

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
    """The same pictures under every condition: asked alone, after a consistent context, after a conflicting one.

    A context tells an event that fits an emotion (the picture's own, or another one) among everyday sentences; its
    strengths differ in one word or two, the event stays. `held_out`: events that no embedded model saw in training.
    Twins are asked the same. Raises: ValueError for an unknown kind or strength, or an emotion without events.
    """
    for name, given, known in (("kind", kinds, KINDS), ("strength", strengths, STRENGTHS)):
        for label in given:
            if label not in known:
                raise ValueError(f"conditions: no {name} {label!r}; there are {', '.join(known)}.")
    lost = sorted({e.emotion for e in pairs.examples} - set(EVENTS)) if set(kinds) - {"none"} else []
    if lost:
        raise ValueError(f"conditions: no events for {', '.join(lost)}; there are some for {', '.join(EVENTS)}.")

    def told(example: Example) -> Iterator[tuple[str, str, str] | None]:
        """(sentence, emotion, strength) of each condition; None for none."""
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
        return [bare if words is None else bare.with_context(*words) for words in told(example)]

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
    """The first `count` identities of a style that may be drawn for a split, or all where the style has fewer.

    Raises: ValueError for an unknown style or split, a style that does not belong to it, or more than can be numbered.
    """
    if style not in STYLES:
        raise ValueError(f"No style {style!r}; there are {', '.join(STYLES)}.")
    if split not in (*NUMBERS, HELD_OUT):
        raise ValueError(f"No split {split!r}; there are {', '.join((*NUMBERS, HELD_OUT))}.")
    if (style in TRAINING_STYLES) == (split == HELD_OUT):
        fitting = [s for s in STYLES if (s in TRAINING_STYLES) != (split == HELD_OUT)]
        raise ValueError(
            f"{style} does not belong to split {split!r}, whose styles are {', '.join(fitting)}: held-out styles are "
            "for judging, not for choosing."
        )
    if style != _MAIN:
        return style_identities(style, "all" if split == HELD_OUT else split)[:count]
    if count > 0.9 * len(NUMBERS[split]):
        raise ValueError(f"{style}: {count} identities; at most {int(0.9 * len(NUMBERS[split]))} are numbered a split.")
    fresh = (number for number in NUMBERS[split] if astuple(identity(number))[1:] not in _trained_looks())
    return list(islice(fresh, count))


# --- what is drawn -------------------------------------------------------------------------------------------


def _planned(style: str, number: int, split: str, per_emotion: int, seed: int) -> list[Drawing]:
    """Every picture of one person: clear and subtle faces in turn, one ground, one neutral face."""
    rng = random.Random(f"pair {seed} {style} {number}")
    background = rng.choice(list(BACKGROUNDS))
    table, planned = combinations(STYLES[style]), []
    has_neutral = "neutral" in table
    for place, (emotion, faces) in enumerate(table.items()):
        for turn in range(1 if emotion == "neutral" else per_emotion):
            combination = rng.choice(faces[(number + place + turn) % 2])
            if any(drawing.combination.variants == combination.variants for drawing in planned):
                continue  # a style with few faces has no further one to show
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
    """Draw one person's pictures with one palette; each appears whole or not at all."""
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
    """The line with what may be asked about the person."""
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

    The same arguments give the same pictures. Stopped, it goes on where it was; the manifest comes last. Contexts are
    lines only: calling it again with others draws nothing. `styles`: by default the main one, or those held out.
    Raises: ValueError for unknown choices; FileExistsError for a folder that holds pictures of another build.
    """
    folder = Path(out).expanduser()
    if styles is None:
        styles = [s for s in STYLES if s not in TRAINING_STYLES] if split == HELD_OUT else [_MAIN]
    if identities < 1 or per_emotion < 1:
        raise ValueError(f"build_pairs: identities={identities} and per_emotion={per_emotion} must be at least 1.")
    people = [(style, number) for style in styles for number in identity_choice(style, split, identities)]
    _claim(folder, {"split": split, "per_emotion": per_emotion, "seed": seed})
    show = bar(len(people), progress, "identities")
    drawings: list[Drawing] = []
    for style, number in people:
        planned = _planned(style, number, split, per_emotion, seed)
        if not all((folder / drawing.example.file).is_file() for drawing in planned):
            _draw(style, planned, folder)
        drawings += planned
        if show is not None:
            show.update(1)
    if show is not None:
        show.close()
    examples = [replace(_with_attributes(d), picture=folder / d.example.file) for d in drawings]
    write_manifest(examples, folder / MANIFEST)
    pairs = load_pairs(folder)
    if tuple(contexts) != ("none",):
        pairs = conditions(pairs, contexts, strengths, held_out=held_out_events, seed=seed)
        write_manifest(pairs.examples, folder / MANIFEST)
        pairs = load_pairs(folder)
    return pairs


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Mark the folder as this build's. Raises: FileExistsError where it is another's."""
    mark = folder / "build.json"
    text = json.dumps({"drawn by": "veena_lens.zoo.pairs", **settings}, indent=1) + "\n"
    if mark.is_file() and mark.read_text(encoding="utf-8") != text:
        raise FileExistsError(
            f"{folder} holds pictures drawn with other settings ({json.dumps(json.loads(mark.read_text()))}); give "
            "another folder, or the same split, per_emotion and seed to go on."
        )
    if not mark.is_file() and (folder / MANIFEST).exists():
        raise FileExistsError(f"{folder} holds a {MANIFEST} that this command did not write; give another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(text, encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m veena_lens.zoo.pairs", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for pictures and manifest.jsonl")
    parser.add_argument("--split", default="development", choices=[*NUMBERS, HELD_OUT])
    parser.add_argument("--identities", type=int, default=20, help="people a style")
    parser.add_argument("--styles", nargs="+", choices=list(STYLES), help="default: avataaars, or the held-out ones")
    parser.add_argument("--per-emotion", type=int, default=1, help="faces of each emotion a person")
    parser.add_argument("--contexts", default="none", help=f"comma list of {', '.join(KINDS)}")
    parser.add_argument("--strengths", default=",".join(STRENGTHS), help="comma list, for the contexts")
    parser.add_argument("--held-out-events", action="store_true", help="contexts that no embedded model was trained on")
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
            print(f"{style}: {found} identities, all that it has for {options.split!r}.")
    print(pairs)


if __name__ == "__main__":
    main()
