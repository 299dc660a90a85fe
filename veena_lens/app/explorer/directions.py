"""A direction from pairs of images, with the heads and neurons that contribute most to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from veena_lens.app.explorer.contrasts import Contrast, parts_of
from veena_lens.app.explorer.own_pairs import OwnPairs
from veena_lens.app.explorer.pictures import GivenImage, open_upload, require_processable
from veena_lens.app.explorer.programs import Made, make, model_of
from veena_lens.app.explorer.state import Explorer, Session
from veena_lens.app.explorer.words import note_of
from veena_lens.app.questions import LIST
from veena_lens.circuits import head_intention, top_neurons
from veena_lens.emotion import PairSet, TooFewPairs, directions_from, load_pairs, neuron_projections, select_pairs
from veena_lens.emotion.methods import batches, prepared
from veena_lens.residual_parts import neuron_rows
from veena_lens.scores import Scores, counted
from veena_lens.zoo.people import EMOTIONS

if TYPE_CHECKING:
    from veena_lens import HookedVLM
    from veena_lens.emotion import Directions, Pair

FELT = tuple(e for e in EMOTIONS if e != "neutral")
N_HEADS, N_NEURONS = 10, 30  # as many as the method's defaults take
LEAD_IN = "the person feels"
# Where the state is read: where the next word is the emotion's, after an answer was begun or a list was asked for.
BEGUN, LISTED = f"after “{LEAD_IN}”", "asked for a list of emotions"


@dataclass(frozen=True, kw_only=True)
class DirectionSettings:
    """Which direction: the first `n` pairs of an emotion, the reading, and whether wrongly answered pairs are left out.

    own: the fingerprint of the visitor's own pairs, "" for the sample faces. contrast: that of two sets of images or
    two prompts, which then make the direction instead; "" for none."""

    model: str
    emotion: str
    n: int = 8
    reading: str = BEGUN
    told_apart: bool = True
    own: str = ""
    contrast: str = ""

    @property
    def lead_in(self) -> str | None:
        """Return what an answer is begun with."""
        return LEAD_IN if self.reading == BEGUN else None


@dataclass(frozen=True, kw_only=True, eq=False)
class Direction:
    """The mean over pairs of resid_post(emotional) - resid_post(neutral) where the emotion is said next, every layer.

    n_pairs: those of `n_given` that were used. heads: (layer, head, projection) and neurons: (layer, neuron,
    projection) that contribute most; `quieter`: those of the neurons that contribute by being less active, because
    what they write points the other way. made: each of these with the program that makes it. notes: what else to
    know. images: files of a direction from two sets of images; n_pairs and n_given are then the sizes of these."""

    settings: DirectionSettings
    n_pairs: int
    n_given: int
    vectors: Float[Tensor, "layer d_model"]
    heads: list[tuple[int, int, float]] = field(default_factory=list)
    neurons: list[tuple[int, int, float]] = field(default_factory=list)
    quieter: frozenset[tuple[int, int]] = frozenset()
    made: Mapping[str, Made] = field(default_factory=dict)
    notes: str = ""
    images: tuple[str, ...] = ()

    @property
    def model(self) -> str:
        return self.settings.model

    @property
    def emotion(self) -> str:
        return self.settings.emotion


@lru_cache(maxsize=1)
def sample_pairs() -> PairSet:
    """Load the development pairs of the sample images."""
    return load_pairs().select(split="development", condition="none")


def pairs_of(session: Session, settings: DirectionSettings) -> Made:
    """Return the pairs, and the line that loads them.

    Raises: ValueError for an emotion without pairs, fewer than one pair, or own pairs that were replaced."""
    if settings.n < 1:
        raise ValueError(f"A direction needs at least one pair, not {settings.n}.")
    own: OwnPairs | None = session.kept.get("own_pairs")
    if settings.own and (own is None or own.pairs.fingerprint != settings.own):
        raise ValueError("Your pairs were replaced or removed; upload them again.")
    pairs, source, loader = sample_pairs(), 'load_pairs().select(split="development", condition="none")', load_pairs
    if settings.own and own is not None:
        pairs, source, loader = own.pairs, own.code, own.loader
    known = pairs.emotions if settings.own else FELT
    if settings.emotion not in known:
        raise ValueError(f"There are no pairs of {settings.emotion!r}; choose one of {', '.join(known)}.")
    chosen = pairs.select(emotion=settings.emotion)[: settings.n]
    line = f"pairs = {source}.select(emotion={settings.emotion!r})[:{settings.n}]"
    if settings.reading == LISTED:
        chosen, line = chosen.asked(LIST), f"{line}.asked({LIST!r})"
    return Made(chosen, "pairs", (line,), (loader,))


def find_directions(
    model: HookedVLM, pairs: PairSet, lead_in: str | None, told_apart: bool
) -> tuple[list[Pair], Directions]:
    """Extract directions from the pairs that the model answers correctly, or from all; return the pairs used, too."""
    filtering = {"max_new_tokens": 16} if told_apart else {"tau": -1, "require_neutral": False}
    selected = select_pairs(model, pairs, lead_in=lead_in, minimum=1, progress=False, **filtering)
    return selected.pairs, directions_from(selected)


@torch.no_grad()
def strongest_heads(
    model: HookedVLM, pairs: Sequence[Pair], directions: Directions, emotion: str, lead_in: str | None, k: int
) -> list[tuple[int, int, float]]:
    """Rank heads by the projection of what they add on the direction, emotional minus neutral, mean over pairs."""
    found, unit = [], directions.unit(emotion)
    for some in batches(pairs, 16):
        emotional = prepared(model, [pair.emotional for pair in some], lead_in=lead_in)
        neutral = prepared(model, [pair.neutral for pair in some], lead_in=lead_in)
        found.append(head_intention(emotional, unit, -1, kind="projection", baseline=neutral, model=model).values.cpu())
    best = Scores(torch.cat(found), ("pair", "layer", "head")).mean("pair").top(k)
    return list(zip(best["layer"].tolist(), best["head"].tolist(), best["value"].tolist(), strict=True))


def strongest_neurons(
    model: HookedVLM, pairs: Sequence[Pair], directions: Directions, lead_in: str | None, k: int
) -> list[tuple[int, int, float]]:
    """Rank neurons by the projection of what they write on the direction, emotional minus neutral, mean over pairs."""
    trace, _ = neuron_projections(model, pairs, directions, lead_in=lead_in)
    best = top_neurons(trace, k)
    return list(zip(best["layer"].tolist(), best["neuron"].tolist(), best["value"].tolist(), strict=True))


def extract(explorer: Explorer, session: Session, settings: DirectionSettings) -> Direction:
    """Return the direction with its heads and neurons; the session keeps it as "direction".

    Raises: as `pairs_of`; ValueError where no pair is answered correctly, or twins become different tokens."""
    if settings.contrast:
        return extract_contrast(explorer, session, settings)
    pairs = pairs_of(session, settings)
    emotion, lead_in = settings.emotion, settings.lead_in
    with explorer.using(settings.model) as loaded:
        if settings.own:
            for example in (e for pair in pairs.value for e in (pair.emotional, pair.neutral)):
                given = GivenImage(image=example.open(), name=Path(str(example.file)).name, is_sample=False)
                require_processable(loaded, [given], explorer.limits)
        model = model_of(loaded, settings.model)
        try:
            found = make("chosen, directions", find_directions, model, pairs, lead_in, settings.told_apart)
        except TooFewPairs:
            raise ValueError(
                f"The model answers none of {counted(len(pairs.value), 'pair')} correctly: its answer must name "
                f"{emotion} for the first image and not for its twin. Give other pairs, use all of them, or make a "
                "direction from two sets of images or two prompts, which asks for no answer."
            ) from None
        chosen, directions = found.parts()
        vectors = directions.value.of(emotion)
        line = f"direction = directions.of({emotion!r})  # [layer d_model]"
        direction = Made(vectors, "direction", (*directions.lines, line), directions.functions)
        heads = make("heads", strongest_heads, model, chosen, directions, emotion, lead_in, N_HEADS)
        neurons = make("neurons", strongest_neurons, model, chosen, directions, lead_in, N_NEURONS)
        result = Direction(
            settings=settings,
            n_pairs=len(chosen.value),
            n_given=len(pairs.value),
            vectors=vectors.float().cpu(),
            heads=heads.value,
            neurons=neurons.value,
            quieter=quieter_of(loaded, neurons.value, vectors),
            made={"direction": direction, "heads": heads, "neurons": neurons},
            notes=note_of(loaded, emotion),
        )
    session.kept["direction"] = result
    return result


def quieter_of(
    model: HookedVLM, neurons: Sequence[tuple[int, int, float]], vectors: Float[Tensor, "layer d_model"]
) -> frozenset[tuple[int, int]]:
    """Return the neurons whose output weights point against the direction."""
    written = ((la, n, neuron_rows(model.blocks[la])[n].detach().cpu().double()) for la, n, _ in neurons)
    return frozenset((la, n) for la, n, row in written if float(row @ vectors[la].cpu().double()) < 0)


def extract_contrast(explorer: Explorer, session: Session, settings: DirectionSettings) -> Direction:
    """Return the direction from two sets of images or two prompts. Raises: ValueError where these were replaced."""
    contrast: Contrast | None = session.kept.get("contrast")
    if contrast is None or contrast.fingerprint != settings.contrast:
        raise ValueError("Your images or prompts were replaced or removed; give them again.")
    sizes = [len(files) for files in contrast.images()] or [1, 1]
    with explorer.using(settings.model) as loaded:
        for file in (file for files in contrast.images() for file in files):
            require_processable(loaded, [open_upload(file, explorer.limits)], explorer.limits)
        made = parts_of(model_of(loaded, settings.model), contrast, N_HEADS, N_NEURONS)
        result = Direction(
            settings=settings,
            n_pairs=sizes[0],
            n_given=sizes[1],
            vectors=made["direction"].value,
            heads=made["heads"].value,
            neurons=made["neurons"].value,
            quieter=quieter_of(loaded, made["neurons"].value, made["direction"].value),
            made=made,
            images=tuple(file for files in contrast.images() for file in files),
        )
    session.kept["direction"] = result
    return result
