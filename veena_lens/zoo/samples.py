"""Draws the sample pictures that travel with the package: `python -m veena_lens.zoo.samples`.

Each identity appears with all eight emotions on one background, so every emotional picture has a neutral twin.
Some identities come with a context of another emotion, one for each strength in turn.
"""

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from veena_lens.zoo.captions import EMOTION_QUESTIONS
from veena_lens.zoo.contexts import EVENTS, STRENGTHS, context_sentence
from veena_lens.zoo.emotions import EMOTIONS
from veena_lens.zoo.exam import SHARP, Item, emoji_items, sharp_bank, style_items, to_image
from veena_lens.zoo.faces import AVATAAARS, combinations
from veena_lens.zoo.identities import BACKGROUNDS
from veena_lens.zoo.layers import PICTURE_SIZE
from veena_lens.zoo.pictures import compose

__all__ = ["main", "save_together", "write_samples"]

# Identities without and with a conflicting context, from the start of each split.
COUNTS = {"development": (24, 6), "test": (8, 4)}
_QUESTION = EMOTION_QUESTIONS["sentence"][0]


def _line(item: Item, file: str, split: str, pair: str | None) -> dict[str, Any]:
    face = item.face
    return {
        "file": file,
        "emotion": face.emotion,
        "pair": pair,
        "identity": f"{face.style}-{face.identity}",
        "style": face.style,
        "attributes": face.attributes | {"expression": "clear" if face.clear else "subtle"},
        "split": split,
        "question": _QUESTION,
        "context": None,
        "context_emotion": None,
        "context_strength": None,
    }


def save_together(images: list[Image.Image], paths: list[Path]) -> None:
    """Save pictures with one palette of 256 colours: a third of the size, and equal pixels stay equal."""
    width, height = images[0].size
    sheet = Image.new("RGB", (width * len(images), height))
    for i, image in enumerate(images):
        sheet.paste(image, (i * width, 0))
    palette = sheet.quantize(256, dither=Image.Dither.NONE)
    for image, path in zip(images, paths, strict=True):
        image.quantize(palette=palette, dither=Image.Dither.NONE).save(path, optimize=True)


def _identities(split: str, cache: Path, folder: Path) -> list[dict[str, Any]]:
    plain, conflicting = COUNTS[split]
    bank, lines = sharp_bank(split, cache, plain + conflicting), []
    for index, number in enumerate(bank.numbers):
        rng = random.Random(f"sample {number}")
        background = rng.choice(list(BACKGROUNDS))
        images, paths = [], []
        for turn, emotion in enumerate(EMOTIONS):
            choice = rng.choice(combinations(AVATAAARS)[emotion][(index + turn) % 2])
            face, layers = bank.draw(rng, index=index, combination=choice)
            face = replace(face, background=background, attributes=face.attributes | {"background": background})
            file = f"{split}-{number}-{emotion}.png"
            images.append(to_image(compose([(face, layers)], size=SHARP * PICTURE_SIZE)[0]))
            paths.append(folder / file)
            line = _line(Item(kind=split, face=face, query=None, truth=emotion), file, split, f"{split}-{number}")  # type: ignore[arg-type]
            if index >= plain:
                other, strength = rng.choice([e for e in EMOTIONS if e != emotion]), STRENGTHS[turn % 3]
                line["context"] = context_sentence(rng.choice(EVENTS[other]), strength)
                line["context_emotion"], line["context_strength"] = other, strength
            lines.append(line)
        save_together(images, paths)
    return lines


def write_samples(folder: Path, cache: Path) -> None:
    """Write every sample picture and `manifest.jsonl` into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [line for split in COUNTS for line in _identities(split, cache, folder)]
    for style in ("open-peeps", "micah"):
        for item in style_items(style, "all", limit=4):
            file = f"{style}-{item.face.identity}-{item.truth}.png"
            save_together([item.query.picture], [folder / file])
            pair = f"{style}-{item.face.identity}" if style == "open-peeps" else None
            lines.append(_line(item, file, "held-out style", pair))
    seen = set()
    for item in emoji_items():
        if item.face.identity not in seen:
            seen.add(item.face.identity)
            file = f"emoji-{item.face.identity:x}-{item.truth}.png"
            save_together([item.query.picture], [folder / file])
            lines.append(_line(item, file, "emoji", None))
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m veena_lens.zoo.samples", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "checkpoints" / "bundled" / "pictures")
    parser.add_argument("--cache", type=Path, default=Path(".cache/zoo/drawings"))
    options = parser.parse_args(arguments)
    write_samples(options.out, options.cache)


if __name__ == "__main__":
    main()
