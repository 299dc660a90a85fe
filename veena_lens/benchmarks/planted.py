"""Does localisation find what is known to be there? Precision and recall against planted circuits, beside baselines.

`python -m veena_lens.benchmarks.planted` plants circuits in the embedded model with its decoder drawn anew, over seeds
and strengths, and prints what the pipeline finds, and what it finds where nothing is left to find.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veena_lens import long_runs
from veena_lens.emotion.locate.directions import extract_directions
from veena_lens.emotion.locate.heads import key_heads
from veena_lens.emotion.pairs.loading import PairSet, load_pairs
from veena_lens.emotion.planted.circuit import plant_circuit
from veena_lens.emotion.planted.scores import labels_under_chance, localise, swapped_at_random
from veena_lens.zoo.people import WORDS

if TYPE_CHECKING:
    import pandas as pd

EMOTIONS = ("happy", "sad", "angry")


def run(
    model: str = "tiny-llava-emotion",
    pairs: PairSet | None = None,
    emotions: Sequence[str] = EMOTIONS,
    seeds: Sequence[int] = (0, 1),
    strengths: Sequence[float] = (0.5, 1.0, 2.0),
    progress: bool = True,
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Return (rankings, choices, nulls), one row per seed and strength.

    Planting, directions and localisation see a third of the identities each. Nulls: key heads found on pairs whose
    twins are exchanged in half of the identities (directions from such pairs too), and heads called specific under
    shuffled labels; both of all heads up to the key layer.
    """
    import pandas as pd

    from veena_lens import HookedVLM

    vlm: Any = HookedVLM.from_pretrained(model)
    pairs = load_pairs().select(split="development") if pairs is None else pairs
    planting, for_directions, finding = pairs.select(emotion=list(emotions)).without_context().split((1, 1, 1))
    words = {emotion: WORDS[emotion].all for emotion in emotions}
    settings: dict[str, Any] = dict(
        tau=-1, require_neutral=False, max_new_tokens=1, minimum=2, n_splits=0, progress=False
    )
    rankings, choices, nulls = [], [], []
    every = [(seed, strength) for seed in seeds for strength in strengths]
    for seed, strength in long_runs.progress(every, "plants", progress):
        plant = plant_circuit(vlm, planting, words, strength=strength, seed=seed)
        directions = extract_directions(plant.model, for_directions, **settings)
        found = localise(plant, finding, directions, seed=seed)
        about = {"seed": seed, "strength": strength}
        rankings.append(found.table.assign(**about))
        choices.append(about | dict(found.chosen))
        exchanged = extract_directions(plant.model, swapped_at_random(for_directions, seed), **settings)
        swapped = swapped_at_random(finding, seed + 1)
        null = key_heads(plant.model, swapped, exchanged, plant.layer, draws=500, seed=seed, progress=False)
        nulls.append(
            about
            | {"heads": len(null.table), "twins exchanged: key heads": len(null.heads)}
            | {"labels shuffled: specific heads": labels_under_chance(found.heads, seed)}
        )
    return pd.concat(rankings, ignore_index=True), pd.DataFrame(choices), pd.DataFrame(nulls)


def report(rankings: Any, choices: Any, nulls: Any) -> str:
    """Return the tables as text: means over seeds, one column per strength."""
    lines = [f"Planted circuits, mean of {choices['seed'].nunique()} seeds; columns: strength of the plant"]
    for what in ("heads", "neurons"):
        mine = rankings[rankings["what"] == what]
        for column in ("average precision", "among the first n"):
            table = mine.pivot_table(column, "ranking", "strength", sort=False)
            lines += ["", f"Ranking all {what}: {column}", table.to_string(float_format="%.2f")]
    for title, table in (("The pipeline's own choice", choices), ("Where nothing is to be found: numbers", nulls)):
        mean = table.drop(columns="seed").groupby("strength").mean().T
        lines += ["", title, mean.to_string(float_format="%.2f")]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m veena_lens.benchmarks.planted", description=__doc__)
    parser.add_argument("--model", default="tiny-llava-emotion")
    parser.add_argument("--pairs", type=Path, help="a folder of pairs; default: the embedded ones, development split")
    parser.add_argument("--emotions", nargs="+", default=list(EMOTIONS), choices=[e for e in WORDS if e != "neutral"])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.5, 1.0, 2.0])
    options = parser.parse_args(arguments)
    began = time.perf_counter()
    pairs = None if options.pairs is None else load_pairs(options.pairs)
    tables = run(options.model, pairs, options.emotions, range(options.seeds), options.strengths)
    print(report(*tables))
    print(f"\n{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
