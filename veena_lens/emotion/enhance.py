"""VEE, ENA and VEENA: what was located, as circuits that act in any `generate` without training.

VEE strengthens the attention of key heads to the picture, ENA amplifies key neurons, VEENA does both. A circuit is a
list of interventions with a name and a record of how it was made, so it saves, loads and applies like any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from veena_lens.interventions import BoostAttention, Circuit, ScaleNeurons, Steer

PHASES = ("both", "paper", "prefill", "decode")
VARIANTS = ("factor", "add", "positive")
Unit = tuple[int, int]


def vee(
    heads: Sequence[Unit],
    beta: float | int = 2.0,
    *,
    mode: str = "renorm",
    phase: str = "both",
    key_layer: int | None = None,
    keys: Any = "image",
) -> Circuit:
    """Visual emotion enhancement: attention of (layer, head) in `heads` to the picture, strengthened by `beta`.

    phase: "both" strengthens the query's rows and every generated token's, in all heads. "paper": heads up to
    `key_layer` at the query's rows, later ones at generated tokens. "prefill" or "decode": all heads at the one or the
    other. mode: as `BoostAttention` (renorm, scale, ...). A beta of 1 changes nothing.
    Raises: ValueError for no heads, an unknown phase, or phase="paper" without key_layer.
    Source: Zhang et al. 2026, arXiv 2605.21980; phases are our reading of it.
    """
    if not heads:
        raise ValueError("vee: the list of heads is empty; nothing would be strengthened.")
    if phase not in PHASES:
        raise ValueError(f"vee: phase={phase!r} must be one of {', '.join(PHASES)}.")
    if phase == "paper" and key_layer is None:
        raise ValueError("vee: phase='paper' parts the heads at the key layer; give key_layer=.")
    parts = []
    for layer, numbers in _by_layer(heads):
        if phase == "paper":
            assert key_layer is not None
            queries = "query" if layer <= key_layer else "generated"
        else:
            queries = {"both": "query+generated", "prefill": "query", "decode": "generated"}[phase]
        parts.append(
            BoostAttention(layer=layer, heads=numbers, keys=keys, queries=queries, factor=float(beta), mode=mode)
        )
    about = {"method": "VEE", "beta": float(beta), "mode": mode, "phase": phase, "heads": [list(h) for h in heads]}
    return Circuit(parts, f"VEE beta {beta:g}, {mode}, {len(heads)} heads", about)


def ena(
    neurons: Sequence[Unit],
    gamma: float | int = 2.0,
    *,
    positions: str = "last+generated",
    variant: str = "factor",
    model: Any = None,
    activations: Any = None,
    weights: Any = None,
) -> Circuit:
    """Emotion neuron amplification: activations of (layer, neuron) in `neurons` times `gamma` at `positions`.

    variant="add" adds (gamma - 1) times each neuron's mean activation on emotional pictures instead, which works where
    activations are near 0; it needs `model` and `activations`, a number for each neuron, and becomes a `Steer` of the
    layer's residual by sum_n (gamma - 1) a_n W_out[n], the same edit. variant="positive" amplifies only where a_n w_n >
    0, `weights` holding w_n = <W_out[n], S^> for each neuron (`KeyNeurons.weights`): a factor strengthens whatever sign
    an activation has, also one that pushes against the direction. A gamma of 1 changes nothing.
    Raises: ValueError for no neurons, an unknown variant, "add" or "positive" without what it needs, or "add" where a
    norm follows the MLP.
    Source: Zhang et al. 2026, arXiv 2605.21980; the other variants are ours.
    """
    if not neurons:
        raise ValueError("ena: the list of neurons is empty; nothing would be amplified.")
    if variant not in VARIANTS:
        raise ValueError(f"ena: variant={variant!r} must be one of {', '.join(VARIANTS)}.")
    about = {"method": "ENA", "gamma": float(gamma), "variant": variant, "neurons": [list(n) for n in neurons]}
    name = f"ENA gamma {gamma:g}, {variant}, {len(neurons)} neurons"
    if variant == "positive" and (weights is None or len(weights) != len(neurons)):
        raise ValueError("ena: variant='positive' needs weights=, one number for each neuron.")
    if variant in ("factor", "positive"):
        sign = {tuple(n): float(w) for n, w in zip(neurons, weights if variant == "positive" else ())}
        parts: list[Any] = [
            ScaleNeurons(
                layer=layer, neurons=numbers, factor=float(gamma), positions=positions,
                signs=[sign[layer, n] for n in numbers] if sign else None,
            )
            for layer, numbers in _by_layer(neurons)
        ]  # fmt: skip
        return Circuit(parts, name, about)
    if model is None or activations is None or len(activations) != len(neurons):
        raise ValueError("ena: variant='add' needs model= and activations=, one number for each neuron.")
    if model.cfg.post_norms:
        raise ValueError(
            "ena: variant='add' adds what neurons would; this model norms what its MLP gives before it is added, and "
            "the norm of a sum is no sum of norms. Take variant='factor'."
        )
    mean = dict(zip([tuple(n) for n in neurons], [float(a) for a in activations], strict=True))
    parts = []
    for layer, numbers in _by_layer(neurons):
        W_out = model.blocks[layer].mlp.W_out.detach()
        weights = torch.tensor([mean[layer, n] for n in numbers], dtype=W_out.dtype, device=W_out.device)
        parts.append(Steer(layer, weights @ W_out[numbers], float(gamma) - 1, positions))
    return Circuit(parts, name, about)


def veena(
    heads: Sequence[Unit],
    neurons: Sequence[Unit],
    beta: float | int = 2.0,
    gamma: float | int = 2.0,
    **settings: Any,
) -> Circuit:
    """VEE and ENA together; `settings` are those of `vee` (mode, phase, key_layer, keys) and of `ena` (positions,
    variant and what it needs).

    A list may be empty where the other is not. Raises: as `vee` and `ena`."""
    mine = {k: v for k, v in settings.items() if k in ("mode", "phase", "key_layer", "keys")}
    theirs = {k: v for k, v in settings.items() if k in ("positions", "variant", "model", "activations", "weights")}
    unknown = set(settings) - set(mine) - set(theirs)
    if unknown:
        raise TypeError(f"veena: unknown settings {sorted(unknown)}.")
    if not heads and not neurons:
        raise ValueError("veena: there are neither heads nor neurons.")
    first = vee(heads, beta, **mine) if heads else None
    second = ena(neurons, gamma, **theirs) if neurons else None
    parts = [*(first or ()), *(second or ())]
    about = {"method": "VEENA", **(first.meta if first else {}), **(second.meta if second else {})}
    about["method"] = "VEENA"
    return Circuit(parts, f"VEENA beta {beta:g}, gamma {gamma:g}", about)


def _by_layer(units: Iterable[Unit]) -> list[tuple[int, list[int]]]:
    """(layer, units) in the order of layers, each unit once."""
    found: dict[int, list[int]] = {}
    for layer, unit in units:
        mine = found.setdefault(int(layer), [])
        if int(unit) not in mine:
            mine.append(int(unit))
    return [(layer, sorted(found[layer])) for layer in sorted(found)]
