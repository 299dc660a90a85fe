"""Answers and residual states of pairs, a batch at a time: what steering vectors are summed from.

Nothing grows with the number of pairs but their answers: states are added to running sums in float64 and let go, or
kept in a folder from which an interrupted run goes on. The sums are built from the kept numbers either way, so that a
resumed run ends in the same bits.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from veena_lens import long_runs
from veena_lens.circuits.reading import exact, read
from veena_lens.emotion.methods import generate_answers, prepared
from veena_lens.emotion.pairs.loading import Pair
from veena_lens.inputs import MultimodalInputs
from veena_lens.long_runs import Store

WHO = "extract_directions"
# Numbers of some pairs, and the states of their emotional and neutral images.
Batch: TypeAlias = tuple[list[int], Float[Tensor, "_ layer d_model"], Float[Tensor, "_ layer d_model"]]


@dataclass(frozen=True, eq=False, kw_only=True)
class PairHits:
    """What a model says of each pair, and how far each answer names the pair's emotion, H in [0, 1]."""

    pairs: Sequence[Pair]
    emotional: Float[Tensor, " pair"]
    neutral: Float[Tensor, " pair"]
    said: Sequence[tuple[str, str]]

    def kept(self, tau: float | int, require_neutral: bool = True) -> list[int]:
        """Numbers of the pairs with H(X+, y) > tau, and H(X-, y) <= tau where the neutral twin is asked for too."""
        quiet = self.neutral <= tau if require_neutral else torch.ones_like(self.neutral, dtype=torch.bool)
        return ((self.emotional > tau) & quiet).nonzero().flatten().tolist()

    def dropped(self, tau: float | int, require_neutral: bool = True) -> dict[str, dict[str, int]]:
        """For each emotion how many pairs were left out, and why."""
        found: dict[str, dict[str, int]] = {}
        kept = set(self.kept(tau, require_neutral))
        for i, pair in enumerate(self.pairs):
            reasons = found.setdefault(pair.emotion, {"not named on the emotional picture": 0, "named on its twin": 0})
            if i not in kept:
                named = bool(self.emotional[i] > tau)
                reasons["named on its twin" if named else "not named on the emotional picture"] += 1
        return found


def distinct(pairs: Sequence[Pair]) -> tuple[list[Any], Int[Tensor, "pair 2"]]:
    """The different examples of these pairs, and which two make up each pair: a neutral image runs once."""
    numbers: dict[Any, int] = {}
    examples, index = [], []
    for pair in pairs:
        row = []
        for example in (pair.emotional, pair.neutral):
            picture = example.picture
            key = (id(picture) if hasattr(picture, "size") else str(picture), example.prompt)
            if key not in numbers:
                numbers[key] = len(examples)
                examples.append(example)
            row.append(numbers[key])
        index.append(row)
    return examples, torch.tensor(index)


def chunks(n: int, size: int) -> list[list[int]]:
    """0 .. n - 1 in runs of at most `size`."""
    return [list(range(start, min(start + size, n))) for start in range(0, n, size)]


def pair_hits(
    model: Any,
    pairs: Sequence[Pair],
    *,
    wheels: Any = None,
    batch_size: int = 16,
    max_new_tokens: int = 24,
    store: Store | None = None,
    progress: bool = False,
) -> PairHits:
    """Ask the model about both twins of every pair (greedy), and score each answer against the pair's emotion.

    `store` keeps the answers, so that they are not asked for again.
    Raises: ValueError for an emotion off all wheels."""
    from veena_lens.emotion.words.scores import sample_hit

    store = Store(None, {}) if store is None else store
    said: list[tuple[str, str]] = []
    for number, members in enumerate(long_runs.progress(chunks(len(pairs), batch_size), "answers", progress, size=len)):
        examples, index = distinct([pairs[i] for i in members])

        def ask(examples: list[Any] = examples) -> dict[str, Any]:
            return {"texts": generate_answers(model, examples, batch_size=batch_size, max_new_tokens=max_new_tokens)}

        texts = store.do(f"answers {number}", ask)["texts"]
        said += [(texts[a], texts[b]) for a, b in index.tolist()]
    hits = [[sample_hit(text, pair.emotion, wheels) for text in two] for two, pair in zip(said, pairs, strict=True)]
    table = torch.tensor(hits, dtype=torch.float64).view(-1, 2)
    return PairHits(pairs=pairs, emotional=table[:, 0], neutral=table[:, 1], said=said)


def last_token(inputs: MultimodalInputs) -> Bool[Tensor, "batch pos"]:
    """True at the last real token of each row, which is that of the lead-in where there is one."""
    real = inputs.attention_mask.bool()
    counted = real.long().cumsum(-1)
    return real & (counted == counted[:, -1:])


def unasked(pairs: Sequence[Pair]) -> PairHits:
    """Every pair taken for a hit, for models that cannot answer."""
    ones = torch.ones(len(pairs), dtype=torch.float64)
    return PairHits(pairs=pairs, emotional=ones, neutral=0 * ones, said=[("", "")] * len(pairs))


def states_of(
    model: Any, examples: Sequence[Any], positions: str, batch_size: int, lead_in: str | None = None
) -> tuple[Float[Tensor, "example layer d_model"], list[tuple[int, ...]]]:
    """resid_post of every layer, averaged over the positions ("last" is one), and each prompt's tokens.

    With a lead-in, "last" is its last token."""
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
    """States of the chosen pairs as they are asked for: iterating gives (numbers, emotional, neutral), a batch each.

    `chosen`: numbers of the pairs to run, in order. The batches are those of all pairs, so that another choice of
    pairs reuses what is kept of the batches that it shares."""

    model: Any
    pairs: Sequence[Pair]
    chosen: Sequence[int]
    positions: str = "last"
    lead_in: str | None = None
    batch_size: int = 16
    store: Store
    progress: bool = False

    def __iter__(self) -> Iterator[Batch]:
        wanted = set(self.chosen)
        each = [[i for i in members if i in wanted] for members in chunks(len(self.pairs), self.batch_size)]
        for number, mine in enumerate(long_runs.progress(each, "states", self.progress, size=len)):
            if mine:
                kept = self.store.do(f"states {number}: {mine} {self.positions} {self.lead_in}", self._run(mine))
                index = kept["index"]
                yield mine, kept["states"][index[:, 0]], kept["states"][index[:, 1]]

    def _run(self, mine: Sequence[int]) -> Callable[[], dict[str, Any]]:
        """A function that computes the states of these pairs."""

        def run() -> dict[str, Any]:
            pairs = [self.pairs[i] for i in mine]
            examples, index = distinct(pairs)
            states, tokens = states_of(self.model, examples, self.positions, self.batch_size, self.lead_in)
            for pair, (a, b) in zip(pairs, index.tolist(), strict=True):
                if tokens[a] != tokens[b]:
                    raise ValueError(
                        f"{WHO}: the twins of pair {pair.emotional.pair!r} become {len(tokens[a])} and "
                        f"{len(tokens[b])} tokens that are not the same; give both images the same size."
                    )
            if not bool(states.isfinite().all()):
                raise ValueError(
                    f"{WHO}: states of {[p.emotional.pair for p in pairs]} are not finite; check the dtype."
                )
            return {"states": states, "index": index}

        return run


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
    """For each of many random divisions which pairs are in the first half; a group is never divided."""
    names = sorted(set(groups))
    rows = []
    for split in range(n_splits):
        rng = random.Random(f"halves {seed} {split}")
        first = set(rng.sample(names, (len(names) + 1) // 2))
        rows.append([group in first for group in groups])
    return torch.tensor(rows, dtype=torch.bool).view(n_splits, len(groups))
