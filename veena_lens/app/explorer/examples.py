"""What the tabs show before the first click: results of the embedded model, computed beforehand.

`python -m veena_lens.app.explorer.examples` computes them anew and writes `examples.json`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from veena_lens.scores import Scores

FILE = Path(__file__).with_name("examples.json")
NAME = "tiny-llava-emotion"
FACE = "happy, avataaars-20000"


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """One result per tab. text, patch_text: what they are of. cells, sides: as the page takes them."""

    text: str
    lens: Scores
    patch_text: str
    cells: str
    sides: dict[str, Any]
    neurons: pd.DataFrame
    tokens: pd.DataFrame
    neuron: str
    pairs: pd.DataFrame


@lru_cache(maxsize=1)
def example() -> Example:
    """Read the examples."""
    found = json.loads(FILE.read_text(encoding="utf-8"))
    lens = found["lens"]
    return Example(
        text=found["text"],
        lens=Scores(torch.tensor(lens["values"]), ("layer", "word"), lens["labels"], "probability", meta=lens["meta"]),
        patch_text=found["patch_text"],
        cells=json.dumps(found["cells"]),
        sides=found["sides"],
        **{name: pd.DataFrame(**found[name]) for name in ("neurons", "tokens", "pairs")},
        neuron=found["neuron"],
    )


def compute() -> dict[str, Any]:
    """Compute the examples with the functions of the tabs, as JSON holds them."""
    from veena_lens.app.explorer import directions, lens, look, neurons, pairs, patch, steer
    from veena_lens.app.explorer.pictures import open_sample
    from veena_lens.app.explorer.state import Explorer, Limits
    from veena_lens.app.questions import FEELING, LIST

    explorer, image = Explorer([NAME]), open_sample(FACE)
    session = explorer.session("examples")
    for _ in look.ask(explorer, session, NAME, [image], FEELING, 64):
        pass
    text = session.kept["asked"].text
    scores = lens.look_through(explorer, session, lens.words_in(lens.WORDS))[1]
    clean, corrupted = patch.pair_of(FACE, None, Limits())
    settings = patch.SweepSettings(
        model=NAME, clean=clean, corrupted=corrupted, prompt=LIST, words=("happy", "neutral")
    )
    *_, swept = patch.sweep(explorer, session, settings)
    direction = directions.extract(explorer, session, directions.DirectionSettings(model=NAME, emotion="happy"))
    circuit = steer.circuit_from(direction, 4, 1, 1, 1)
    neutral = open_sample("neutral, avataaars-20000")
    steered = steer.steer(explorer, session, NAME, circuit, neutral, FEELING, "happy")
    layer, neuron, _ = direction.neurons[0]
    tokens = neurons.look_at_neuron(explorer, direction, layer, neuron)[0]
    table = pairs.answered(explorer, session, NAME, "happy")[0]
    explorer.close()
    values = [[round(value, 4) for value in row] for row in scores.values.tolist()]
    sides = {"wanted": "happy", "image": "neutral, avataaars-20000"}
    sides |= {name: getattr(steered, name) for name in ("before", "after", "rate_before", "rate_after")}
    return {
        "text": text,
        "lens": {"values": values, "labels": dict(scores.labels), "meta": scores.meta},
        "patch_text": settings.text,
        "cells": json.loads(patch.shown_cells(swept)),
        "sides": sides,
        **{
            name: frame.to_dict("split", index=False)
            for name, frame in (("neurons", neurons.strongest(direction)), ("tokens", tokens), ("pairs", table))
        },
        "neuron": neurons.neuron_name(layer, neuron),
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps(compute(), ensure_ascii=False) + "\n", encoding="utf-8")
    print(FILE)
