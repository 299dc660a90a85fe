"""Directions that should do nothing special: what a direction must beat before it may be called one of emotion.

Random vectors of the same length; pairs whose twins changed places at random; emotion labels dealt out anew; and
directions from one person alone, to be tried on others. All but the first are summed from the same states as the real
directions: with the same `store` nothing is run twice.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import torch

from veena_lens.emotion.enhance.random_controls import random_directions
from veena_lens.emotion.locate.direction_set import Directions
from veena_lens.emotion.locate.directions import Selected, directions_from

__all__ = ["person_directions", "noise_directions", "shuffled_directions", "swapped_directions"]


def noise_directions(directions: Directions, seed: int = 0) -> Directions:
    """`random_directions` in place of a whole set: each layer's and emotion's with the norm of the direction that it
    stands for; nothing measured.

    Axes and units as `directions`."""
    drawn = random_directions(torch.cat([directions.overall[None], directions.per_emotion]), 1, seed)[0]
    return replace(
        directions,
        overall=drawn[0],
        per_emotion=drawn[1:],
        measured={},
        meta={**directions.meta, "kind": "random, norms matched", "control_seed": seed},
    )


def swapped_directions(selected: Selected, *, share: float | int = 0.5, seed: int = 0) -> Directions:
    """Directions from pairs of which about a `share`, drawn at random, has its twins in each other's place.

    With a share of one half nothing but noise is left; with 1 every direction is the real one negated.
    Raises: ValueError for a share outside [0, 1]."""
    if not 0 <= share <= 1:
        raise ValueError(f"swapped_directions: share={share} must lie between 0 and 1.")
    rng = random.Random(f"swapped {seed}")
    signs = [-1 if rng.random() < share else 1 for _ in selected.chosen]
    found = directions_from(selected, signs=signs, seed=seed, kind="twins swapped at random")
    return replace(found, meta={**found.meta, "control_seed": seed, "share": share})


def shuffled_directions(selected: Selected, *, seed: int = 0) -> Directions:
    """Directions whose emotion labels are dealt out anew among the pairs, as many of each as before.

    What is left in a contrast between emotions is noise; the overall direction stays about the same."""
    labels = [pair.emotion for pair in selected.pairs]
    known = list(dict.fromkeys(labels))
    random.Random(f"shuffled {seed}").shuffle(labels)
    found = directions_from(selected, labels=labels, seed=seed, kind="labels shuffled")
    order = [list(found.emotions).index(emotion) for emotion in known]
    rows = [*order, len(order)]
    by_direction = ("split_half", "agreement", "spread")
    return replace(
        found,
        emotions=tuple(known),
        per_emotion=found.per_emotion[order],
        counts={emotion: found.counts[emotion] for emotion in known},
        measured={k: v[rows] if k in by_direction else v for k, v in found.measured.items()},
        meta={**found.meta, "control_seed": seed},
    )


def person_directions(selected: Selected, identity: str | Sequence[str], *, seed: int = 0) -> Directions:
    """Directions from the pairs of one person (or of several) alone, to be tried on everybody else.

    Raises: ValueError for a person of whom no pair passed the filter."""
    wanted = {identity} if isinstance(identity, str) else set(identity)
    known = {pair.identity for pair in selected.pairs}
    if not wanted or wanted - known:
        raise ValueError(
            f"person_directions: no pair of {sorted(wanted - known) or 'nobody'} passed the filter; there are "
            f"{len(known)} people, such as {sorted(known)[:4]}."
        )
    only = [pair.identity in wanted for pair in selected.pairs]
    found = directions_from(selected, only=only, seed=seed, kind=f"from {', '.join(sorted(wanted))} alone")
    return replace(found, meta={**found.meta, "people": sorted(wanted)})
