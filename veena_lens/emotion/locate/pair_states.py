"""Answers and residual states of pairs, batch by batch: what directions are summed from.

Nothing grows with the number of pairs but their answers: states are added to running sums in float64 and let go, or
kept in a folder from which an interrupted run goes on. The sums are built from the kept numbers either way, so that a
resumed run ends in the same bits.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from veena_lens.circuits.reading import exact, read
from veena_lens.emotion.methods import prepared
from veena_lens.emotion.pairs.loading import Pair
from veena_lens.emotion.pairs.parts import distinct
from veena_lens.emotion.study import Study
from veena_lens.inputs import MultimodalInputs
from veena_lens.long_runs import Store, progress

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM

WHO = "extract_directions"
# Numbers of some pairs, and the states of their emotional and neutral images.
Batch: TypeAlias = tuple[list[int], Float[Tensor, "_ layer d_model"], Float[Tensor, "_ layer d_model"]]


@dataclass(frozen=True, eq=False, kw_only=True)
class PairHits:
    """A model's answers to each pair, and how far each answer names the pair's emotion, H in [0, 1]."""

    pairs: Sequence[Pair]
    emotional: Float[Tensor, " pair"]
    neutral: Float[Tensor, " pair"]
    said: Sequence[tuple[str, str]]

    def kept(self, tau: float | int, require_neutral: bool = True) -> list[int]:
        """Return the numbers of the pairs with H(X+, y) > tau, and H(X-, y) <= tau where the neutral twin is asked for
        too."""
        quiet = self.neutral <= tau if require_neutral else torch.ones_like(self.neutral, dtype=torch.bool)
        return ((self.emotional > tau) & quiet).nonzero().flatten().tolist()

    def dropped(self, tau: float | int, require_neutral: bool = True) -> dict[str, dict[str, int]]:
        """Return for each emotion how many pairs were left out, and why."""
        found: dict[str, dict[str, int]] = {}
        kept = set(self.kept(tau, require_neutral))
        for i, pair in enumerate(self.pairs):
            reasons = found.setdefault(pair.emotion, {"not named on the emotional picture": 0, "named on its twin": 0})
            if i not in kept:
                named = bool(self.emotional[i] > tau)
                reasons["named on its twin" if named else "not named on the emotional picture"] += 1
        return found


def chunks(n: int, size: int) -> list[list[int]]:
    """Return 0 .. n - 1 in runs of at most `size`."""
    return [list(range(start, min(start + size, n))) for start in range(0, n, size)]


def pair_hits(study: Study, pairs: Sequence[Pair], store: Store) -> PairHits:
    """Ask the model about both twins of every pair (greedy), and score each answer against the pair's emotion.

    Args:
        study: the model, and how it is asked.
        pairs: emotional images with their neutral twins.
        store: keeps the answers, so that they are not asked for again.

    Raises: ValueError for an emotion off all wheels."""
    said: list[tuple[str, str]] = []
    batches = chunks(len(pairs), study.asking.batch_size)
    for number, members in enumerate(progress(batches, "answers", study.progress, size=len)):
        examples, index = distinct([pairs[i] for i in members])
        texts = store.do(f"answers {number}", lambda examples=examples: {"texts": study.answers(examples)})["texts"]
        said += [(texts[a], texts[b]) for a, b in index.tolist()]
    sides = [study.hits([two[i] for two in said], [pair.emotional for pair in pairs]) for i in (0, 1)]
    return PairHits(pairs=pairs, emotional=sides[0], neutral=sides[1], said=said)


def last_token(inputs: MultimodalInputs) -> Bool[Tensor, "batch pos"]:
    """Return True at the last real token of each row, which is that of the lead-in where there is one."""
    real = inputs.attention_mask.bool()
    counted = real.long().cumsum(-1)
    return real & (counted == counted[:, -1:])


def unasked(pairs: Sequence[Pair]) -> PairHits:
    """Return every pair taken for a hit, for models that cannot answer."""
    ones = torch.ones(len(pairs), dtype=torch.float64)
    return PairHits(pairs=pairs, emotional=ones, neutral=0 * ones, said=[("", "")] * len(pairs))


def states_of(
    model: HookedVLM, examples: Sequence[Any], positions: str, batch_size: int, lead_in: str | None = None
) -> tuple[Float[Tensor, "example layer d_model"], list[tuple[int, ...]]]:
    """Return resid_post of every layer, averaged over the positions ("last" is one), and each prompt's tokens.

    Args:
        model: the model.
        examples: images with prompts.
        positions: "last" or "query": the positions that are averaged over.
        batch_size: examples in a batch.
        lead_in: begun answer; with it, "last" is its last token."""
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)]
    found, tokens = [], []
    for members in chunks(len(examples), batch_size):
        inputs = prepared(model, [examples[i] for i in members], lead_in=lead_in)
        at = last_token(inputs) if positions == "last" else positions
        reading = read(inputs, names, at, model, WHO)
        weight = reading.mask.double() / reading.mask.sum(-1, keepdim=True)
        per_layer = []
        for name in names:
            value = reading[name]
            value = value.to(exact(value.dtype))
            mean = einsum(value, weight.to(value), "example n d_model, example n -> example d_model")
            per_layer.append(mean.cpu())
        found.append(torch.stack(per_layer, 1))
        tokens += [
            tuple(row[real].tolist()) for row, real in zip(inputs.tokens, inputs.attention_mask.bool(), strict=True)
        ]
    return torch.cat(found), tokens


@dataclass(frozen=True, eq=False, kw_only=True)
class PairStates:
    """The states of the chosen pairs, computed when they are asked for: iterating gives (numbers, emotional, neutral),
    batch by batch.

    `chosen`: numbers of the pairs to run, in order. The batches are those of all pairs, so that another choice of
    pairs reuses what is kept of the batches that it shares."""

    study: Study
    pairs: Sequence[Pair]
    chosen: Sequence[int]
    positions: str = "last"
    store: Store

    def __iter__(self) -> Iterator[Batch]:
        wanted, asking = set(self.chosen), self.study.asking
        batches = [[i for i in members if i in wanted] for members in chunks(len(self.pairs), asking.batch_size)]
        for number, mine in enumerate(progress(batches, "states", self.study.progress, size=len)):
            if mine:
                name = f"states {number}: {mine} {self.positions} {asking.lead_in}"
                kept = self.store.do(name, lambda mine=mine: self._run(mine))
                index = kept["index"]
                yield mine, kept["states"][index[:, 0]], kept["states"][index[:, 1]]

    def _run(self, mine: Sequence[int]) -> dict[str, Any]:
        """Compute the states of these pairs."""
        pairs, asking = [self.pairs[i] for i in mine], self.study.asking
        examples, index = distinct(pairs)
        states, tokens = states_of(self.study.model, examples, self.positions, asking.batch_size, asking.lead_in)
        for pair, (a, b) in zip(pairs, index.tolist(), strict=True):
            if tokens[a] != tokens[b]:
                raise ValueError(
                    f"{WHO}: the twins of pair {pair.emotional.pair!r} become {len(tokens[a])} and "
                    f"{len(tokens[b])} tokens that are not the same; give both images the same size."
                )
        if not bool(states.isfinite().all()):
            raise ValueError(f"{WHO}: states of {[p.emotional.pair for p in pairs]} are not finite; check the dtype.")
        return {"states": states, "index": index}


class Sums:
    """Running sums over pairs in float64, by emotion: all that directions and their spread are made of.

    `halves` sums one half of the pairs under each of many random divisions, for the split-half cosine."""

    def __init__(self, n_emotions: int, n_layers: int, d_model: int, n_splits: int) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64)

        shape = (n_emotions, n_layers, d_model)
        self.count = zeros(n_emotions)
        self.difference, self.emotional, self.neutral, self.units = (zeros(*shape) for _ in range(4))
        self.square = zeros(n_emotions, n_layers)
        self.halves, self.half_count = zeros(n_splits, *shape), zeros(n_splits, n_emotions)
        self.norm, self.size = zeros(n_layers), zeros(n_layers, d_model)

    def add(
        self,
        emotion: Int[Tensor, " pair"],
        emotional: Float[Tensor, "pair layer d_model"],
        neutral: Float[Tensor, "pair layer d_model"],
        in_half: Bool[Tensor, "split pair"],
    ) -> None:
        """Take in a batch of pairs."""
        plus, minus = emotional.double(), neutral.double()
        s = plus - minus
        norm = s.norm(dim=-1)
        self.count.index_add_(0, emotion, torch.ones(len(emotion), dtype=torch.float64))
        for total, value in (
            (self.difference, s),
            (self.emotional, plus),
            (self.neutral, minus),
            (self.units, s / (norm[..., None] + 1e-12)),
            (self.square, norm**2),
        ):
            total.index_add_(0, emotion, value)
        self.norm += plus.norm(dim=-1).sum(0) + minus.norm(dim=-1).sum(0)
        self.size += plus.abs().sum(0) + minus.abs().sum(0)
        for e in emotion.unique().tolist():
            mine = emotion == e
            chosen = in_half[:, mine].double()
            self.half_count[:, e] += chosen.sum(1)
            self.halves[:, e] += einsum(chosen, s[mine], "split pair, pair layer d_model -> split layer d_model")

    @cached_property
    def n(self) -> float:
        return float(self.count.sum())


def halves_of(groups: Sequence[str], n_splits: int, seed: int) -> Bool[Tensor, "split pair"]:
    """Return for each of many random divisions which pairs are in the first half; a group is never divided."""
    names = sorted(set(groups))
    rows = []
    for split in range(n_splits):
        rng = random.Random(f"halves {seed} {split}")
        first = set(rng.sample(names, (len(names) + 1) // 2))
        rows.append([group in first for group in groups])
    return torch.tensor(rows, dtype=torch.bool).view(n_splits, len(groups))
