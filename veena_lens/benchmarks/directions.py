"""Where a direction must be read to steer: `python -m veena_lens.benchmarks.directions`.

The directions of three emotions are extracted from the development images of an embedded model in three ways, and
added to the neutral test images (other people): how many of the answers then name the emotion?
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, cast

from veena_lens.emotion import (
    Directions,
    extract_directions,
    generate_answers,
    load_pairs,
    noise_directions,
    sample_hit,
)

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM

LIST = "name the emotions of the person in the picture."
WAYS: dict[str, dict[str, str]] = {
    "the question alone": {},
    'lead-in "the person feels"': {"lead_in": "the person feels"},
    "asked for a list": {"question": LIST},
}
EMOTIONS = ["happy", "angry", "afraid"]


def named(
    model: HookedVLM, directions: Directions, examples: list[Any], layer: int, alpha: float | int
) -> tuple[int, int]:
    """Return (answers that name the emotion added, all answers), over emotions."""
    hits = 0
    for emotion in directions.emotions:
        with model.intervene([directions.steer(layer, alpha, emotion, scale="raw")]):
            texts = generate_answers(model, examples, max_new_tokens=12)
        hits += sum(sample_hit(text, emotion) > 0.5 for text in texts)
    return hits, len(directions.emotions) * len(examples)


def main(arguments: list[str] | None = None) -> None:
    """Print the table of a model."""
    parser = argparse.ArgumentParser(prog="python -m veena_lens.benchmarks.directions", description=__doc__)
    parser.add_argument("--model", nargs="+", default=["tiny-llava-emotion", "tiny-qwen2vl-emotion"])
    parser.add_argument("--layer", type=int, default=4)
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.5, 1.0, 1.5])
    options = parser.parse_args(arguments)
    from veena_lens import HookedVLM

    pairs = load_pairs().without_context()
    development, test = pairs.select(split="development", emotion=EMOTIONS), pairs.select(split="test")
    columns = ["model", "read at", "strength", "split-half", *(f"alpha {alpha:g}" for alpha in options.alphas)]
    print(f"| {' | '.join([*columns, 'random, same norm'])} |")
    print(f"|{'---|' * (len(columns) + 1)}")
    for name in options.model:
        model = HookedVLM.from_pretrained(name)
        for way, settings in WAYS.items():
            found = extract_directions(model, development, max_new_tokens=12, progress=False, **cast(Any, settings))
            asked = test if "question" not in settings else test.asked(settings["question"])
            neutral = list(asked.neutrals)
            rows = [named(model, found, neutral, options.layer, alpha) for alpha in options.alphas]
            rows.append(named(model, noise_directions(found), neutral, options.layer, options.alphas[-1]))
            measured = (found.strength(), found.split_half())
            values = [s.select(direction="overall", layer=options.layer).values.item() for s in measured]
            cells = [name, way, *(f"{value:.2f}" for value in values), *(f"{a} of {b}" for a, b in rows)]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
