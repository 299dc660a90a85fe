"""Stage I: extract directions from pairs of images, and the controls that a direction must beat.

1. Ask the model about both twins of every pair, and keep the pairs that it answers right (`select_pairs`).
2. Read the residual stream of both twins and sum the differences (`directions_from`).
3. Controls, all but the first summed from the same states: random vectors of the same length, pairs whose twins change
   places at random, emotion labels dealt out anew, and the pairs of one person alone. With the same `store` nothing is
   run twice.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from veena_lens.circuits.reading import EPS
from veena_lens.emotion.enhance.random_controls import random_directions
from veena_lens.emotion.locate.direction_set import FEW, Directions
from veena_lens.emotion.locate.pair_states import (
    WHO,
    Batch,
    PairHits,
    PairStates,
    Sums,
    halves_of,
    pair_hits,
    unasked,
)
from veena_lens.emotion.pairs.loading import Pair, PairSet
from veena_lens.emotion.study import Asking, Study, stage
from veena_lens.interventions.made_for import MadeFor

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM

SPLITS = 50
POSITIONS = ("last", "query")

__all__ = [
    "Directions",
    "Selected",
    "TooFewPairs",
    "directions_from",
    "extract_directions",
    "noise_directions",
    "person_directions",
    "select_pairs",
    "shuffled_directions",
    "swapped_directions",
]


class TooFewPairs(ValueError):
    """An error: too few pairs passed the filter; `counts` says how many did, by emotion."""

    def __init__(self, counts: Mapping[str, int], minimum: int, tau: float, total: Mapping[str, int]) -> None:
        self.counts = dict(counts)
        few = [f"{e}: {n} of {total[e]}" for e, n in counts.items() if n < minimum]
        super().__init__(
            f"{WHO}: too few pairs pass the filter with tau={tau}: {'; '.join(few)}; {minimum} are needed of each "
            "emotion. Give more pairs, leave such emotions out (pairs.select(emotion=[...])), or lower tau or minimum."
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Selected:
    """The pairs that passed, and their states: everything that directions and their controls are summed from."""

    model: HookedVLM
    hits: PairHits
    chosen: Sequence[int]
    states: Iterable[Batch]
    settings: Mapping[str, Any]

    @property
    def pairs(self) -> list[Pair]:
        """Return the pairs that passed."""
        return [self.hits.pairs[i] for i in self.chosen]


@stage(
    wheels=None, question=None, batch_size=16, max_new_tokens=24, lead_in=None, store=None, progress=True
)  # fmt: skip
def select_pairs(
    study: Study,
    pairs: PairSet | Sequence[Pair],
    *,
    tau: float | int = 0.5,
    positions: str = "last",
    require_neutral: bool = True,
    minimum: int = 8,
    contexts: bool = False,
) -> Selected:
    """Ask the model about every pair and choose those with H(X+, y) > tau and H(X-, y) <= tau; states come lazily.

    Arguments and errors: those of `extract_directions`."""
    asking = study.asking
    _require(tau, asking, positions, minimum)
    pairs = pairs if isinstance(pairs, PairSet) else PairSet(tuple(pairs))
    if not len(pairs):
        raise ValueError(f"{WHO}: the set holds no pairs; a direction needs emotional images with neutral twins.")
    pairs = pairs if contexts else pairs.without_context()
    pairs = pairs if asking.question is None else pairs.asked(asking.question)
    store = study.store("directions", pairs=pairs, settings=[asking.batch_size, asking.max_new_tokens])
    if tau < 0 and not require_neutral:
        hits = unasked(pairs)
    else:
        study.wheels.require(pairs.emotions)
        hits = pair_hits(study, pairs, store)
    chosen = hits.kept(tau, require_neutral)
    total = Counter(pair.emotion for pair in pairs)
    used = Counter(pairs[i].emotion for i in chosen)
    counts = {emotion: used[emotion] for emotion in pairs.emotions}
    if min(counts.values()) < minimum:
        raise TooFewPairs(counts, minimum, tau, total)
    states = PairStates(study=study, pairs=pairs, chosen=chosen, positions=positions, store=store)
    settings = {
        "tau": tau,
        "require_neutral": require_neutral,
        "positions": positions,
        "lead_in": asking.lead_in,
        "question": pairs[0].emotional.question if len({p.emotional.question for p in pairs}) == 1 else "several",
        "contexts": contexts,
        "max_new_tokens": asking.max_new_tokens,
        "batch_size": asking.batch_size,
        "minimum": minimum,
        "dropped": hits.dropped(tau, require_neutral),
        "asked": dict(total),
    }
    return Selected(model=study.model, hits=hits, chosen=chosen, states=states, settings=settings)


@stage(
    wheels=None, question=None, batch_size=16, max_new_tokens=24, lead_in=None, store=None, seed=0, progress=True
)  # fmt: skip
def extract_directions(
    study: Study,
    pairs: PairSet | Sequence[Pair],
    *,
    tau: float | int = 0.5,
    positions: str = "last",
    require_neutral: bool = True,
    minimum: int = 8,
    contexts: bool = False,
    n_splits: int = SPLITS,
) -> Directions:
    """Extract steering vectors at every layer: S_l^e = mean over U_e of h_l(X+)[N] - h_l(X-)[N], S_l = mean_e S_l^e.

    h_l is `blocks.{l}.hook_resid_post`, N the last prompt token (positions="query": the mean over the question), U_e
    the pairs of emotion e with H(X+, e) > tau and, with `require_neutral`, H(X-, e) <= tau, H the hit rate of the
    greedy answer. The state at N says what comes next, so it holds the emotion where the answer begins with it: ask
    for a list of emotions (`question`), or give a `lead_in` such as "the person feels", of which N is then the last
    token. In units of the residual stream, summed in float64 batch by batch: memory does not depend on the number of
    pairs (the halves of `n_splits` divisions take 8 n_splits E L D bytes, 260 MB for 50, 5 emotions and a 7B model).

    Args:
        study: the model, or a `Study` that holds the settings `wheels` to `progress` below.
        pairs: emotional images with their neutral twins.
        tau: hit rate that a pair's emotional image must exceed, in [0, 1); -1 without `require_neutral` takes every
            pair and asks nothing.
        positions: "last", or "query" for the mean over the question's tokens.
        require_neutral: leave out pairs whose neutral twin is said to show the emotion too.
        minimum: the least number of pairs that each emotion needs.
        contexts: keep the contexts before the question, which are left out otherwise.
        n_splits: random divisions into halves by which reliability is measured.
        wheels: emotion wheels that judge answers; by default the project's own.
        question: asked in place of the pairs' own.
        batch_size, max_new_tokens: of the answers.
        lead_in: begun answer after which states are read.
        store: a folder that keeps answers and states; run again after a stop, the result is the same to the bit.
        seed: of the random halves.
        progress: True shows progress bars.

    Raises: TooFewPairs (a ValueError) where fewer than `minimum` pairs of an emotion pass; ValueError for no pairs,
    settings out of range, an emotion off all wheels, or twins that become different tokens.

    Source: Zhang et al. 2026, arXiv 2605.21980, steering vectors; the neutral condition, the balance over emotions and
    the measures of quality are our own.
    """
    selected = select_pairs(
        study, pairs, tau=tau, positions=positions, require_neutral=require_neutral, minimum=minimum, contexts=contexts
    )
    return directions_from(selected, seed=study.seed, n_splits=n_splits)


def directions_from(
    selected: Selected,
    *,
    labels: Sequence[str] | None = None,
    signs: Sequence[int] | None = None,
    only: Sequence[bool] | None = None,
    seed: int = 0,
    n_splits: int = SPLITS,
    kind: str = "emotional minus neutral",
) -> Directions:
    """Sum directions from the chosen pairs, with other labels, with twins swapped, or of some pairs alone.

    Args:
        selected: the pairs that passed, and their states.
        labels: emotions in place of the pairs' own.
        signs: -1 where the twins of a pair are swapped, else 1; by default none are.
        only: True for the pairs that are used; by default all are.
        seed: of the random halves.
        n_splits: random divisions into halves by which reliability is measured.
        kind: what the directions are called.

    `labels`, `signs` and `only` go along `selected.pairs`; a control changes one of them. Raises: ValueError where no
    pair is left."""
    pairs, cfg = selected.pairs, selected.model.cfg
    n = len(pairs)
    labels = [pair.emotion for pair in pairs] if labels is None else list(labels)
    signs = [1] * n if signs is None else list(signs)
    only = [True] * n if only is None else list(only)
    used = [label for label, wanted in zip(labels, only, strict=True) if wanted]
    emotions = list(dict.fromkeys(used))
    if not emotions:
        raise ValueError(f"{WHO}: no pair is left to sum over.")
    people = [pair.identity for pair in pairs]
    known = {who for who, wanted in zip(people, only, strict=True) if wanted}
    groups = people if len(known) >= 4 else [str(i) for i in range(n)]
    in_half = halves_of(groups, n_splits, seed)
    number = {emotion: i for i, emotion in enumerate(emotions)}
    place = {pair: i for i, pair in enumerate(selected.chosen)}
    sums = Sums(len(emotions), cfg.n_layers, cfg.d_model, n_splits)
    for numbers, emotional, neutral in selected.states:
        rows = [i for i, pair in enumerate(numbers) if only[place[pair]]]
        if not rows:
            continue
        at = [place[numbers[i]] for i in rows]
        plus, minus = emotional[rows], neutral[rows]
        swapped = torch.tensor([signs[i] < 0 for i in at])[:, None, None]
        plus, minus = torch.where(swapped, minus, plus), torch.where(swapped, plus, minus)
        sums.add(torch.tensor([number[labels[i]] for i in at]), plus, minus, in_half[:, at])
    counts = {emotion: int(c) for emotion, c in zip(emotions, sums.count.tolist(), strict=True)}
    few = [f"{e} {c}" for e, c in counts.items() if c < FEW]
    notes = [f"fewer than {FEW} pairs: {', '.join(few)}; read cosines with care"] if few else []
    meta = {
        "kind": kind,
        "model": cfg.model_name,
        "pairs": n,
        "halves_by": "identity" if groups is people else "pair",
        "seed": seed,
        **selected.settings,
        "notes": notes,
    }
    return replace(_directions(sums, emotions, counts, meta), made_for=MadeFor.of(cfg))


def _directions(sums: Sums, emotions: Sequence[str], counts: Mapping[str, int], meta: dict[str, Any]) -> Directions:
    n = sums.count[:, None, None]
    per_emotion = sums.difference / n
    plain = sums.difference.sum(0) / sums.n
    return Directions(
        overall=per_emotion.mean(0),
        per_emotion=per_emotion,
        emotions=tuple(emotions),
        counts=counts,
        norms=sums.norm / (2 * sums.n),
        neutral_mean=(sums.neutral / n).mean(0),
        emotional_mean=(sums.emotional / n).mean(0),
        measured={
            "plain": plain,
            "split_half": _split_half(sums),
            "agreement": _agreement(sums),
            "spread": _spread(sums, per_emotion, plain),
            "size": sums.size / (2 * sums.n),
        },
        meta=meta,
    )


def _split_half(sums: Sums) -> Float[Tensor, "direction layer"]:
    """Return the mean cosine of two halves, stepped up; a division counts where both halves have pairs of each emotion
    in it."""
    first_n, second_n = sums.half_count[..., None, None], (sums.count - sums.half_count)[..., None, None]
    first, second = sums.halves / first_n, (sums.difference - sums.halves) / second_n
    first, second = (torch.cat([half, half.mean(1, keepdim=True)], 1) for half in (first, second))
    cosine = (first * second).sum(-1) / (first.norm(dim=-1) * second.norm(dim=-1) + EPS)
    r = cosine.nanmean(0)
    return 2 * r / (1 + r.abs())


def _agreement(sums: Sums) -> Float[Tensor, "direction layer"]:
    """Return the mean cosine of two different pairs: ||sum of units||^2 = n + n (n - 1) mean."""
    n = torch.cat([sums.count, sums.count.sum(0, keepdim=True)])[:, None]
    units = torch.cat([sums.units, sums.units.sum(0, keepdim=True)])
    return (units.square().sum(-1) - n) / (n * (n - 1))


def _spread(
    sums: Sums, per_emotion: Float[Tensor, "emotion layer d_model"], plain: Float[Tensor, "layer d_model"]
) -> Float[Tensor, "direction layer"]:
    """Return sqrt(mean ||s_i||^2 - ||S||^2) / ||S||."""
    square = torch.cat([sums.square / sums.count[:, None], (sums.square.sum(0) / sums.n)[None]])
    norm = torch.cat([per_emotion, plain[None]]).norm(dim=-1)
    return (square - norm**2).clamp(min=0).sqrt() / (norm + EPS)


def _require(tau: float | int, asking: Asking, positions: str, minimum: int) -> None:
    if not -1 <= tau < 1:
        raise ValueError(
            f"{WHO}: tau={tau} must lie in [0, 1), such as 0.5, the share of wheels that must agree, or be -1 to take "
            "every pair."
        )
    for name in ("batch_size", "max_new_tokens", "minimum"):
        value = getattr(asking, name, minimum)
        if value < 1:
            raise ValueError(f"{WHO}: {name}={value} must be at least 1.")
    if positions not in POSITIONS:
        raise ValueError(f"{WHO}: positions={positions!r} must be one of {', '.join(POSITIONS)}.")
    if asking.lead_in is not None and positions != "last":
        raise ValueError(f"{WHO}: lead_in={asking.lead_in!r} goes with positions='last', not {positions!r}.")


# --- controls --------------------------------------------------------------------------------------


def noise_directions(directions: Directions, seed: int = 0) -> Directions:
    """Draw `random_directions` in place of a whole set: each layer's and emotion's with the norm of the direction that
    it stands for; nothing measured.

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
    """Return directions from pairs of which about a `share`, drawn at random, has its twins in each other's place.

    selected: the pairs that passed. seed: of the draw. With a share of one half nothing but noise is left; with 1 every
    direction is the real one negated.
    Raises: ValueError for a share outside [0, 1]."""
    if not 0 <= share <= 1:
        raise ValueError(f"swapped_directions: share={share} must lie between 0 and 1.")
    rng = random.Random(f"swapped {seed}")
    signs = [-1 if rng.random() < share else 1 for _ in selected.chosen]
    found = directions_from(selected, signs=signs, seed=seed, kind="twins swapped at random")
    return replace(found, meta={**found.meta, "control_seed": seed, "share": share})


def shuffled_directions(selected: Selected, *, seed: int = 0) -> Directions:
    """Return directions whose emotion labels are dealt out anew among the pairs, as many of each as before.

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
    """Return directions from the pairs of one person (or of several) alone, to be tried on everybody else.

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
