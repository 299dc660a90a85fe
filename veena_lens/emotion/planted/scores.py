"""How well localisation finds a planted circuit: rankings of heads and neurons against the truth, beside baselines.

A ranking is judged by its average precision (1: all planted ones first; chance: about their share) and by how many of
the n planted ones are among its first n; the pipeline's own choice by precision and recall.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from veena_lens.circuits import copying_strength, head_intention
from veena_lens.emotion.locate.direction_set import Directions
from veena_lens.emotion.locate.heads import KeyHeads, key_heads, specificity
from veena_lens.emotion.locate.neurons import KeyNeurons, key_neurons, neuron_projections
from veena_lens.emotion.methods import batches, generate_answers, prepared
from veena_lens.emotion.planted.circuit import Plant, Unit

if TYPE_CHECKING:
    import pandas as pd


def average_precision(values: Float[Tensor, ...], truth: Bool[Tensor, ...]) -> float:
    """Return the mean over the true entries of the precision at their rank, largest value first, NaN last; in [0, 1].

    Args:
        values: what entries are ranked by.
        truth: True for the entries that are there, same shape as `values`.

    Entries of one value share their places: each counts at the mean precision of a random order among them."""
    flat = values.double().flatten().nan_to_num(-torch.inf)
    true = truth.flatten().double()
    total, before, hits = 0.0, 0, 0.0
    for value in flat.unique(sorted=True).flip(0):
        tied = flat == value
        n, n_true = int(tied.sum()), float(true[tied].sum())
        if n_true:
            for place in range(
                1, n + 1
            ):  # precision where the place-th of the tied ones is a true one, times its chance
                others = 0.0 if n == 1 else (n_true - 1) * (place - 1) / (n - 1)
                total += n_true / n * (hits + 1 + others) / (before + place)
        before, hits = before + n, hits + n_true
    return total / float(true.sum())


def found_among_first(values: Float[Tensor, ...], truth: Bool[Tensor, ...]) -> float:
    """Return the share of the n true entries among the n largest values."""
    n = int(truth.sum())
    order = values.double().flatten().nan_to_num(-torch.inf).argsort(descending=True, stable=True)[:n]
    return float(truth.flatten()[order].double().mean())


def precision_recall(chosen: Collection[Unit], truth: Collection[Unit]) -> tuple[float, float]:
    """Return (precision, recall) of a chosen set; precision is NaN where nothing is chosen."""
    right = len(set(chosen) & set(truth))
    return right / len(chosen) if chosen else float("nan"), right / len(truth)


def swapped_at_random(pairs: Sequence[Any], seed: int = 0) -> list[Any]:
    """Return the pairs with emotional and neutral images exchanged in half of the identities: nothing is left to
    find."""
    names = sorted({pair.identity for pair in pairs})
    turned = set(random.Random(f"swap {seed}").sample(names, len(names) // 2))
    return [pair.swapped() if pair.identity in turned else pair for pair in pairs]


def labels_under_chance(heads: KeyHeads, seed: int = 0) -> int:
    """Return how many heads are called specific when the emotions of the pairs are shuffled."""
    order = list(heads.emotions)
    random.Random(f"labels {seed}").shuffle(order)
    found = specificity(heads.push, order, heads.identities, seed)
    return sum(label == "specific" for row in found["label"] for label in row)


def known_directions(plant: Plant, like: Directions) -> Directions:
    """Return the planted u_e at every layer, in place of estimated ones."""
    n_layers = plant.model.cfg.n_layers
    per_emotion = (plant.gain * plant.directions)[:, None].expand(-1, n_layers, -1).to(like.overall).contiguous()
    return Directions(
        overall=per_emotion.mean(0),
        per_emotion=per_emotion,
        emotions=plant.emotions,
        counts={e: like.counts.get(e, 0) for e in plant.emotions},
        norms=like.norms,
        neutral_mean=like.neutral_mean,
        emotional_mean=like.neutral_mean + per_emotion.mean(0),
        meta={"kind": "planted"},
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class Localised:
    """How well a planted circuit was found. `table`: what (heads, neurons), ranking, average precision, share found
    among the first n, and chance.
    `chosen`: precision and recall of the pipeline's own choice, labels that were right, answers that name the emotion.
    """

    plant: Plant
    table: pd.DataFrame
    chosen: Mapping[str, float]
    heads: KeyHeads
    neurons: KeyNeurons

    def __repr__(self) -> str:
        figures = ", ".join(f"{name} {value:.2f}" for name, value in self.chosen.items())
        return f"Localised: {figures}\n{self.table.round(3).to_string(index=False)}"


def localise(
    plant: Plant,
    pairs: Sequence[Any],
    directions: Directions,
    *,
    k_heads: int = 10,
    k_neurons: int = 30,
    draws: int = 500,
    seed: int = 0,
    batch_size: int = 16,
    wheels: Any = None,
) -> Localised:
    """Find key heads and key neurons as on any model, knowing the key layer alone, and judge them by the plant.

    Args:
        plant: the planted circuit.
        pairs: emotional images with neutral twins, of other people than those that the directions came from.
        directions: directions of this model.
        k_heads, k_neurons: the most heads and neurons that are chosen.
        draws, seed: of the intervals.
        batch_size: pairs in a batch.
        wheels: emotion wheels that judge answers; by default the project's own.
    """
    import pandas as pd

    model, pairs = plant.model, [pair for pair in pairs if pair.emotion in plant.emotions]
    heads = key_heads(
        model, pairs, directions, plant.layer, k=k_heads, draws=draws, seed=seed, batch_size=batch_size, progress=False
    )
    neurons = key_neurons(
        model, pairs, directions, plant.layer, k=k_neurons, wheels=wheels, batch_size=batch_size, progress=False
    )
    truth = torch.zeros(plant.layer + 1, model.cfg.n_heads, dtype=torch.bool)
    for layer, head in plant.heads:
        truth[layer, head] = True
    true_neurons = torch.zeros(model.cfg.n_layers, model.cfg.d_mlp, dtype=torch.bool)
    for layer, neuron in plant.neurons:
        true_neurons[layer, neuron] = True
    rows = _rows("heads", head_rankings(plant, pairs, directions, heads, batch_size), truth)
    rows += _rows("neurons", neuron_rankings(plant, pairs, directions, neurons, batch_size), true_neurons)
    precision, recall = precision_recall(heads.heads, plant.heads)
    n_precision, n_recall = precision_recall(neurons.neurons, plant.neurons)
    said = generate_answers(model, [pair.emotional for pair in pairs], batch_size=batch_size, max_new_tokens=1)
    chosen = {
        "heads: precision": precision,
        "heads: recall": recall,
        "heads: labels right": labels_right(plant, heads),
        "neurons: precision": n_precision,
        "neurons: recall": n_recall,
        "neurons: explicit state": precision_recall(neurons.of_kind("explicit state"), plant.neurons)[1],
        "answers that name it": _named(said, pairs, wheels),
    }
    return Localised(plant=plant, table=pd.DataFrame(rows), chosen=chosen, heads=heads, neurons=neurons)


def _named(said: Sequence[str], pairs: Sequence[Any], wheels: Any) -> float:
    from veena_lens.emotion.words.wheels import sample_hit

    hits = [sample_hit(text, pair.emotion, wheels) > 0.5 for text, pair in zip(said, pairs, strict=True)]
    return sum(hits) / len(hits)


def _rows(what: str, rankings: Mapping[str, Tensor], truth: Bool[Tensor, "layer unit"]) -> list[dict[str, Any]]:
    return [
        {
            "what": what,
            "ranking": name,
            "average precision": average_precision(values, truth),
            "among the first n": found_among_first(values, truth),
        }
        for name, values in rankings.items()
    ] + [
        {
            "what": what,
            "ranking": "chance",
            "average precision": average_precision(torch.zeros(truth.shape), truth),
            "among the first n": float(truth.double().mean()),
        }
    ]


def labels_right(plant: Plant, heads: KeyHeads) -> float:
    """Return the share of planted heads whose label is right: general ones "general", the others "specific" to
    theirs."""
    general = set(plant.general)
    right = []
    for line in heads.table.itertuples():
        served = plant.heads.get((int(line.layer), int(line.head)))
        if served is not None:
            is_general = (int(line.layer), int(line.head)) in general
            right.append(line.label == "general" if is_general else line.label == "specific" and line.emotion in served)
    return sum(right) / len(right)


@torch.no_grad()
def head_rankings(
    plant: Plant, pairs: Sequence[Any], directions: Directions, heads: KeyHeads, batch_size: int = 16
) -> dict[str, Float[Tensor, "layer head"]]:
    """Rank heads up to the key layer in every way: the pipeline's effect, I_delta and direct projection; then baselines
    that see one run, or weights alone."""
    model, layers = plant.model, list(range(plant.layer + 1))
    table = heads.table.set_index(["layer", "head"])["effect"]
    effect = torch.tensor([[table[a, h] for h in range(model.cfg.n_heads)] for a in layers], dtype=torch.float64)
    names = [f"blocks.{a}.attn.hook_z" for a in layers]
    mass, cosine, moved = [], [], []
    for some in batches(pairs, batch_size):
        plus, minus = (prepared(model, [getattr(pair, side) for pair in some]) for side in ("emotional", "neutral"))
        attention = model.attention(plus, queries="last", keys="image", layers=layers).values
        mass.append(attention.double().nan_to_num(0).sum((-1, -2)))
        units = torch.stack([directions.unit(pair.emotion) for pair in some])
        cosine.append(head_intention(plus, units, layers=layers, model=model).values.double())
        caches = [model.run_with_cache(side, names_filter=names)[1] for side in (plus, minus)]
        moved.append(torch.stack([(caches[0][n][:, -1] - caches[1][n][:, -1]).double().norm(dim=-1) for n in names], 1))
    return {
        "patching (pipeline)": effect,
        "push W (pipeline)": heads.push.values.double().mean(0),
        "intention I (pipeline)": heads.intention.values.double().mean(0),
        "cosine of one run": torch.cat(cosine).mean(0),
        "change of the output": torch.cat(moved).mean(0),
        "attention to the picture": torch.cat(mass).mean(0),
        "copying strength": copying_strength(model, directions.overall, layers=layers).values.double(),
        "weight norm": torch.stack([model.blocks[a].attn.W_O.detach().double().norm(dim=(1, 2)) for a in layers]),
    }


@torch.no_grad()
def neuron_rankings(
    plant: Plant, pairs: Sequence[Any], directions: Directions, neurons: KeyNeurons, batch_size: int = 16
) -> dict[str, Float[Tensor, "layer neuron"]]:
    """Rank neurons in every way: the pipeline's direct projection, then baselines."""
    model = plant.model
    _, means = neuron_projections(model, pairs, directions, batch_size=batch_size)
    plus, minus = means.values.double()
    W_out = torch.stack([block.mlp.W_out.detach().double() for block in model.blocks])  # [layer neuron d_model]
    unit = directions.unit(None).double()
    return {
        "push (pipeline)": neurons.trace.values.double(),
        "change of the activation": (plus - minus).abs(),
        "activation": plus.abs(),
        "weights along S": (W_out @ unit[:, :, None])[..., 0] / (W_out.norm(dim=-1) + 1e-12),
        "weight norm": W_out.norm(dim=-1),
    }
