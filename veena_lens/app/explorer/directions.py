"""A direction from pairs of faces, with the heads and neurons that push most along it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from veena_lens.app import steps
from veena_lens.app.explorer.state import Explorer, Session
from veena_lens.checkpoints.bundle import Picture, bundled_pairs
from veena_lens.circuits import head_intention, neuron_trace, top_neurons
from veena_lens.zoo.emotions import EMOTIONS

FELT = tuple(e for e in EMOTIONS if e != "neutral")
N_HEADS, N_NEURONS = 10, 30  # as many as the method's defaults take


@dataclass(frozen=True, kw_only=True, eq=False)
class Direction:
    """The mean over pairs of resid_post(emotional) - resid_post(neutral) at the last position, in every layer.

    heads: (layer, head, push) and neurons: (layer, neuron, push) that push most along it; `quieter`: those of the
    neurons that push by being less active, because what they write points the other way."""

    model: str
    emotion: str
    n_pairs: int
    vectors: Float[Tensor, "layer d_model"]
    heads: list[tuple[int, int, float]] = field(default_factory=list)
    neurons: list[tuple[int, int, float]] = field(default_factory=list)
    quieter: frozenset[tuple[int, int]] = frozenset()


def pairs_of(emotion: str, n: int) -> list[tuple[Picture, Picture]]:
    """Development pairs of an emotion. Raises: ValueError for an unknown emotion, or fewer than one pair."""
    if emotion not in FELT:
        raise ValueError(f"No pairs of {emotion!r}; there are: {', '.join(FELT)}.")
    if n < 1:
        raise ValueError(f"A direction needs at least one pair, not {n}.")
    return [pair for pair in bundled_pairs("development") if pair[0].emotion == emotion][:n]


@torch.no_grad()
def extract(explorer: Explorer, session: Session, name: str, emotion: str, n: int) -> Direction:
    """The direction of an emotion, with its heads and neurons; the session keeps it as "direction"."""
    pairs = pairs_of(emotion, int(n))
    with explorer.using(name) as model:
        vectors = steps.steering_vectors(model, pairs)[emotion]
        emotional, neutral = (steps.ask(model, steps.NAME, side) for side in zip(*pairs, strict=True))
        pushes = head_intention(emotional, vectors, kind="projection", baseline=neutral, model=model).mean("pair")
        heads = [(int(r.layer), int(r.head), float(r.value)) for r in pushes.top(N_HEADS).itertuples()]
        trace = neuron_trace(emotional, vectors, baseline=neutral, model=model)
        best = top_neurons(trace, N_NEURONS)
        neurons = [(int(r.layer), int(r.neuron), float(r.value)) for r in best.itertuples()]
        against = [(la, n) for la, n, _ in neurons if float(model.blocks[la].mlp.W_out[n] @ vectors[la]) < 0]
    found = Direction(
        model=name,
        emotion=emotion,
        n_pairs=len(pairs),
        vectors=vectors.cpu(),
        heads=heads,
        neurons=neurons,
        quieter=frozenset(against),
    )
    session.kept["direction"] = found
    return found


DIRECTION = (
    "pairs = [p for p in bundled_pairs('development') if p[0].emotion == {emotion!r}][:{n}]",
    "direction = steering_vectors(model, pairs)[{emotion!r}]  # [layer d_model]",
)


DIRECTION_IMPORTS = (
    "from veena_lens.app.steps import steering_vectors",
    "from veena_lens.checkpoints.bundle import bundled_pairs",
)


def direction_lines(direction: Direction) -> list[str]:
    """The lines that compute a direction again."""
    lines = [line.format(emotion=direction.emotion, n=direction.n_pairs).replace("'", '"') for line in DIRECTION]
    return [f"model = HookedVLM.from_pretrained({direction.model!r})", *lines]
