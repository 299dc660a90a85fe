"""Twins of eight people, two emotions each, and directions from them, made once for all tests that locate."""

from __future__ import annotations

from functools import cache
from typing import Any

import pandas as pd
import torch

from tests.emotion.asked import NAMES, bundled
from veena_lens.emotion.locate.answer_slot import LEAD_IN, AnswerPosition, answer_position
from veena_lens.emotion.locate.directions import Directions, extract_directions
from veena_lens.emotion.locate.heads import KeyHeads
from veena_lens.emotion.pairs.loading import Pair, load_pairs
from veena_lens.scores import Scores

EMOTIONS = ("happy", "angry")
LLAVA, QWEN = NAMES
QUESTION = "name the emotions of the person in the picture."


@cache
def twins(people: int = 8) -> tuple[Pair, ...]:
    """Two pairs a person, asked so that the answer begins with the emotion."""
    found = load_pairs().select(split="development", emotion=list(EMOTIONS)).without_context()
    return tuple(found.select(identity=[f"avataaars-{10000 + i}" for i in range(people)]).asked(QUESTION))


@cache
def directions(name: str = LLAVA) -> Directions:
    """Directions of all sixteen pairs at the last token of the lead-in."""
    return extract_directions(
        bundled(name), twins(), tau=-1, require_neutral=False, minimum=8, lead_in=LEAD_IN, progress=False
    )


@cache
def slot(name: str = LLAVA) -> AnswerPosition:
    return answer_position(bundled(name), EMOTIONS)


@cache
def precise() -> Any:
    """The bundled LLaVA in float64."""
    from veena_lens import HookedVLM

    return HookedVLM.from_pretrained(LLAVA, dtype=torch.float64)


def heads_of(heads: list[tuple[int, int]], every: list[tuple[int, int]] | None = None) -> KeyHeads:
    """Key heads as if found, patched at the last token; `every` is what the table lists."""
    none = Scores(torch.zeros(1), ("layer",))
    table = pd.DataFrame([{"layer": a, "head": h, "rows": "last"} for a, h in every or heads])
    rest: dict[str, Any] = dict.fromkeys(("effects", "intention", "push", "routes"), none)
    return KeyHeads(
        table=table,
        heads=heads,
        layer=3,
        n_pairs=4,
        dropped=0,
        emotions=[],
        identities=[],
        meta={"lead_in": LEAD_IN},
        **rest,
    )
