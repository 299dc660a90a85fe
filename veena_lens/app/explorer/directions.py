"""A direction from pairs of images, with the heads and neurons that push most along it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from veena_lens.app.explorer.own_pairs import OwnPairs
from veena_lens.app.explorer.state import Explorer, Session
from veena_lens.app.questions import LIST
from veena_lens.circuits import head_intention, top_neurons
from veena_lens.emotion import PairSet, TooFewPairs, directions_from, load_pairs, neuron_projections, select_pairs
from veena_lens.emotion.methods import ROWS, batches, prepared
from veena_lens.residual_parts import neuron_rows
from veena_lens.scores import Scores, counted
from veena_lens.zoo.people import EMOTIONS

FELT = tuple(e for e in EMOTIONS if e != "neutral")
N_HEADS, N_NEURONS = 10, 30  # as many as the method's defaults take
BATCH = 16
ANSWER_TOKENS = 16
LEAD_IN = "the person feels"
# Where the state is read: where the next word is the emotion's, after an answer was begun or a list was asked for.
BEGUN, LISTED = f"after “{LEAD_IN}”", "asked for a list of emotions"


@dataclass(frozen=True, kw_only=True)
class DirectionAsked:
    """Which direction: the first `n` pairs of an emotion, the reading, and whether the model must tell them apart.

    own: the fingerprint of the visitor's own pairs, "" for the sample faces."""

    model: str
    emotion: str
    n: int = 8
    reading: str = BEGUN
    told_apart: bool = True
    own: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Direction:
    """The mean over pairs of resid_post(emotional) - resid_post(neutral) where the emotion is said next, every layer.

    n_pairs: those of `n_given` that the model tells apart. heads: (layer, head, push) and neurons: (layer, neuron,
    push) that push most along it; `quieter`: those of the neurons that push by being less active, because what they
    write points the other way."""

    asked: DirectionAsked
    n_pairs: int
    n_given: int
    vectors: Float[Tensor, "layer d_model"]
    source: str = ""  # the lines that load the pairs
    heads: list[tuple[int, int, float]] = field(default_factory=list)
    neurons: list[tuple[int, int, float]] = field(default_factory=list)
    quieter: frozenset[tuple[int, int]] = frozenset()

    @property
    def model(self) -> str:
        return self.asked.model

    @property
    def emotion(self) -> str:
        return self.asked.emotion


@lru_cache(maxsize=1)
def sample_pairs() -> PairSet:
    """Development pairs of the embedded images."""
    return load_pairs().select(split="development", condition="none")


def pairs_of(session: Session, asked: DirectionAsked) -> tuple[PairSet, str]:
    """The pairs, and the expression that loads them.

    Raises: ValueError for an emotion without pairs, fewer than one pair, or own pairs that were replaced."""
    if asked.n < 1:
        raise ValueError(f"A direction needs at least one pair, not {asked.n}.")
    own: OwnPairs | None = session.kept.get("own_pairs")
    if asked.own and (own is None or own.pairs.fingerprint != asked.own):
        raise ValueError("Your pairs were replaced or taken away; give them again.")
    pairs, source = sample_pairs(), 'load_pairs().select(split="development", condition="none")'
    if asked.own and own is not None:
        pairs, source = own.pairs, own.code
    known = pairs.emotions if asked.own else FELT
    if asked.emotion not in known:
        raise ValueError(f"No pairs of {asked.emotion!r}; there are: {', '.join(known)}.")
    chosen = pairs.select(emotion=asked.emotion)[: asked.n]
    return (chosen.asked(LIST) if asked.reading == LISTED else chosen), source


def settings(asked: DirectionAsked) -> dict[str, Any]:
    """The settings of `select_pairs` that this direction stands for."""
    filtering = {"max_new_tokens": ANSWER_TOKENS} if asked.told_apart else {"tau": -1, "require_neutral": False}
    reading = {"lead_in": LEAD_IN} if asked.reading == BEGUN else {}
    return {**reading, **filtering, "minimum": 1}


@torch.no_grad()
def extract(explorer: Explorer, session: Session, asked: DirectionAsked) -> Direction:
    """The direction with its heads and neurons; the session keeps it as "direction".

    Raises: as `pairs_of`; ValueError where the model tells no pair apart, or twins become different tokens."""
    pairs, source = pairs_of(session, asked)
    emotion, lead_in = asked.emotion, settings(asked).get("lead_in")
    with explorer.using(asked.model) as model:
        try:
            chosen = select_pairs(model, pairs, progress=False, **settings(asked))
        except TooFewPairs:
            raise ValueError(
                f"The model tells none of {counted(len(pairs), 'pair')} apart: its answer must name {emotion} for the "
                "first image and not for its twin. Give other pairs, or take all of them whatever it says."
            ) from None
        found = directions_from(chosen)
        vectors = found.of(emotion)
        parts = []
        for some in batches(chosen.pairs, BATCH):
            shown, twin = (
                prepared(model, [getattr(p, side) for p in some], lead_in=lead_in) for side in ("emotional", "neutral")
            )
            push = head_intention(
                shown, found.unit(emotion), ROWS["last"], kind="projection", baseline=twin, model=model
            )
            parts.append(push.values.cpu())
        pushes = Scores(torch.cat(parts), ("pair", "layer", "head")).mean("pair")
        trace, _ = neuron_projections(model, chosen.pairs, found, lead_in=lead_in, batch_size=BATCH)
        strongest: Any = top_neurons(trace, N_NEURONS)
        neurons = [(int(r.layer), int(r.neuron), float(r.value)) for r in strongest.itertuples()]
        written = [(la, n, neuron_rows(model.blocks[la])[n].cpu().double()) for la, n, _ in neurons]
        quieter = [(la, n) for la, n, row in written if float(row @ vectors[la]) < 0]
    best: Any = pushes.top(N_HEADS)
    direction = Direction(
        asked=asked,
        n_pairs=len(chosen.pairs),
        n_given=len(pairs),
        vectors=vectors.float().cpu(),
        source=source,
        heads=[(int(r.layer), int(r.head), float(r.value)) for r in best.itertuples()],
        neurons=neurons,
        quieter=frozenset(quieter),
    )
    session.kept["direction"] = direction
    return direction


def direction_imports(direction: Direction, extract: str = "extract_directions") -> list[str]:
    """The imports of `direction_lines`."""
    names = sorted([direction.source.partition("(")[0], *extract.split(", ")])
    return ["from veena_lens import HookedVLM", f"from veena_lens.emotion import {', '.join(names)}"]


def direction_lines(direction: Direction, keeps_pairs: bool = False) -> list[str]:
    """The lines that compute a direction again; with `keeps_pairs` also `chosen`, the pairs that passed the filter."""
    asked = direction.asked
    given = settings(asked) | {"progress": False}
    spelled = [f"{name}={json.dumps(v) if isinstance(v, str) else v}" for name, v in given.items()]
    read = ", ".join(spelled)
    pairs = f"pairs = {direction.source}.select(emotion={json.dumps(asked.emotion)})[:{asked.n}]"
    lines = [
        f"model = HookedVLM.from_pretrained({json.dumps(asked.model)})",
        pairs + (f".asked({json.dumps(LIST)})" if asked.reading == LISTED else ""),
    ]
    if keeps_pairs:
        lines += [f"chosen = select_pairs(model, pairs, {read})", "directions = directions_from(chosen)"]
    else:
        lines += [f"directions = extract_directions(model, pairs, {read})"]
    return [*lines, f"direction = directions.of({json.dumps(asked.emotion)})  # [layer d_model]"]
