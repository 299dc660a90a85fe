"""VEE, ENA and VEENA: what was located, as circuits that act in any `generate` without training.

VEE strengthens the attention of key heads to the image, ENA amplifies key neurons, VEENA does both. A circuit is a
list of interventions with a name and a record of how it was made, so it saves, loads and applies like any other.

`Adaptive` sets a strength that follows the model itself: how emotional the image looks to it, and how sure it is which
emotion.

From the untouched prefill at the key layer: presence g = sigmoid((<h, S^> - theta) / width), and confidence kappa =
1 - entropy(q) / log E with q = softmax(<h - mean neutral h, D_e^> / T). "need" strengthens where emotion is there but
unsure, beta = 1 + (beta_max - 1) g (1 - kappa); "trust" strengthens what is sure, with kappa instead. No label is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from veena_lens.emotion.methods import Method, batches, prepared
from veena_lens.interventions import BoostAttention, Circuit, ScaleNeurons, Steer
from veena_lens.interventions.made_for import MadeFor

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM

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
    """Strengthen the attention of (layer, head) in `heads` to the image by `beta` (visual emotion enhancement).

    Args:
        heads: (layer, head) of the key heads.
        beta: the factor of strengthening; 1 changes nothing.
        mode: as `BoostAttention` (renorm, scale, ...).
        phase: "both" strengthens the query's rows and every generated token's, in all heads. "paper": heads up to
            `key_layer` at the query's rows, later ones at generated tokens. "prefill" or "decode": all heads at the one
            or the other.
        key_layer: the last layer whose heads act at the query; only for phase="paper".
        keys: the tokens to which attention is strengthened.

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
    model: HookedVLM | None = None,
    activations: Any = None,
    weights: Any = None,
) -> Circuit:
    """Multiply activations of (layer, neuron) in `neurons` by `gamma` at `positions` (emotion neuron amplification).

    neurons: (layer, neuron) of the key neurons. variant: "factor", "add" or "positive".

    variant="add" adds (gamma - 1) times each neuron's mean activation on emotional images instead, which works where
    activations are near 0; it needs `model` and `activations`, one number per neuron, and becomes a `Steer` of the
    layer's residual by sum_n (gamma - 1) a_n W_out[n], the same edit. variant="positive" amplifies only where a_n w_n >
    0, `weights` holding w_n = <W_out[n], S^> for each neuron (`KeyNeurons.weights`): a factor strengthens whatever sign
    an activation has, also one that acts against the direction. A gamma of 1 changes nothing.
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
    return Circuit(parts, name, about, MadeFor.of(model.cfg))


def veena(
    heads: Sequence[Unit],
    neurons: Sequence[Unit],
    beta: float | int = 2.0,
    gamma: float | int = 2.0,
    **settings: Any,
) -> Circuit:
    """Apply VEE and ENA together; `settings` are those of `vee` (mode, phase, key_layer, keys) and of `ena` (positions,
    variant and what it needs).

    heads, beta, neurons, gamma: as in `vee` and `ena`; a list may be empty where the other is not. Raises: as `vee` and
    `ena`."""
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
    made_for = None if second is None else second.made_for
    return Circuit(parts, f"VEENA beta {beta:g}, gamma {gamma:g}", about, made_for)


def _by_layer(units: Iterable[Unit]) -> list[tuple[int, list[int]]]:
    """Return (layer, units) in the order of layers, each unit once."""
    found: dict[int, list[int]] = {}
    for layer, unit in units:
        mine = found.setdefault(int(layer), [])
        if int(unit) not in mine:
            mine.append(int(unit))
    return [(layer, sorted(found[layer])) for layer in sorted(found)]


KINDS = ("need", "trust")


@dataclass(frozen=True, eq=False, kw_only=True)
class Adaptive:
    """A reader of presence and confidence from one layer's residual at the last prompt token."""

    layer: int
    unit: Float[Tensor, " d_model"]
    neutral_mean: Float[Tensor, " d_model"]
    contrasts: Float[Tensor, "emotion d_model"]
    theta: float
    width: float
    temperature: float
    emotions: tuple[str, ...]
    lead_in: str | None = None

    def read(self, states: Float[Tensor, "row d_model"]) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
        """Return (presence g, confidence kappa) of each row, in [0, 1]."""
        states = states.double().cpu()
        presence = torch.sigmoid((states @ self.unit.double() - self.theta) / self.width)
        logits = (states - self.neutral_mean.double()) @ self.contrasts.double().T / self.temperature
        q = logits.softmax(-1)
        entropy = -(q * q.clamp_min(1e-12).log()).sum(-1)
        return presence, 1 - entropy / math.log(len(self.emotions))

    def strengths(
        self, states: Float[Tensor, "row d_model"], largest: float | int, kind: str = "need"
    ) -> Float[Tensor, " row"]:
        """Return 1 + (largest - 1) g (1 - kappa) for kind="need", 1 + (largest - 1) g kappa for "trust"."""
        if kind not in KINDS:
            raise ValueError(f"Adaptive: kind={kind!r} must be one of {', '.join(KINDS)}.")
        presence, confidence = self.read(states)
        return 1 + (largest - 1) * presence * (1 - confidence if kind == "need" else confidence)

    def method(
        self,
        heads: Sequence[tuple[int, int]],
        neurons: Sequence[tuple[int, int]],
        beta: float | int,
        gamma: float | int,
        kind: str = "need",
        **settings: Any,
    ) -> Method:
        """Return VEENA whose strength is set for each row once, before it answers, and held while it does.

        Costs one partial prefill, up to the key layer. `settings`: those of `veena`."""

        def per_row(model: HookedVLM, inputs: Any) -> list[list[Any]]:
            states = states_at(model, inputs, self.layer, self.lead_in)
            betas, gammas = self.strengths(states, beta, kind), self.strengths(states, gamma, kind)
            return [list(veena(heads, neurons, b, g, **settings)) for b, g in zip(betas.tolist(), gammas.tolist())]

        chosen = {"beta_max": float(beta), "gamma_max": float(gamma), "kind": kind}
        return Method(
            name=f"VEENA, adaptive ({kind})", interventions=per_row, about="strength by presence and confidence",
            settings=chosen,
        )  # fmt: skip

    def __repr__(self) -> str:
        return (
            f"Adaptive(layer {self.layer}: theta {self.theta:.3g}, width {self.width:.3g}, temperature "
            f"{self.temperature:.3g}, {len(self.emotions)} emotions)"
        )


@torch.no_grad()
def states_at(model: HookedVLM, inputs: Any, layer: int, lead_in: str | None = None) -> Float[Tensor, "row d_model"]:
    """Return resid_post of a layer at each row's last token (of `lead_in`, put after the prompt), in float64 on the
    CPU; the run goes no further."""
    inputs = inputs.left_padded() if lead_in is None else inputs.with_answer(f" {lead_in}")
    name = f"blocks.{layer}.hook_resid_post"
    kept: list[Tensor] = []

    def keep(tensor: Tensor, hook: Any) -> None:
        kept.append(tensor[:, -1])

    with model.hooks([(name, keep)]):
        model(inputs, stop_at_layer=layer + 1 if layer + 1 < model.cfg.n_layers else None, return_type=None)
    return kept[0].double().cpu()


def fit_adaptive(
    model: HookedVLM,
    examples: Sequence[Any],
    directions: Any,
    layer: int,
    *,
    lead_in: str | None = None,
    batch_size: int = 16,
) -> Adaptive:
    """Fit presence's threshold and width, and the temperature by likelihood, from labelled examples of a validation
    split.

    theta lies midway between the neutral and the emotional examples' means of <h, S^>, width is their pooled standard
    deviation; T maximises the likelihood of the emotional examples' labels over a grid of powers.

    Args:
        model: the model.
        examples: labelled validation examples, neutral and emotional.
        directions: directions of this model.
        layer: the key layer, where states are read.
        lead_in: begun answer of which the last token is read.
        batch_size: examples in a batch.

    Raises: ValueError without neutral, or without emotional, examples.
    """
    read = [states_at(model, prepared(model, some), layer, lead_in) for some in batches(examples, batch_size)]
    states = torch.cat(read)
    names = [example.emotion for example in examples]
    emotions = list(directions.emotions)
    is_emotional = torch.tensor([name in emotions for name in names])
    if not bool(is_emotional.any()) or bool(is_emotional.all()):
        raise ValueError(
            f"fit_adaptive needs examples with one of {', '.join(emotions)} and examples without, to tell them apart; "
            f"there are {int(is_emotional.sum())} and {int((~is_emotional).sum())}."
        )
    unit = directions.unit(None)[layer].double().cpu()
    along = states @ unit
    above, below = along[is_emotional], along[~is_emotional]
    spread = torch.cat([above - above.mean(), below - below.mean()]).std().clamp_min(1e-6)
    neutral = states[~is_emotional].mean(0)
    contrasts = torch.stack([directions.contrast(e)[layer].double().cpu() for e in emotions])
    contrasts = contrasts / (contrasts.norm(dim=-1, keepdim=True) + 1e-12)
    logits = (states[is_emotional] - neutral) @ contrasts.T
    truth = torch.tensor([emotions.index(name) for name in names if name in emotions])
    scale = float(logits.std().clamp_min(1e-6))
    grid = [scale * 2.0**power for power in range(-6, 5)]
    losses = [float(torch.nn.functional.cross_entropy(logits / t, truth)) for t in grid]
    return Adaptive(
        layer=layer,
        unit=unit,
        neutral_mean=neutral,
        contrasts=contrasts,
        theta=float((above.mean() + below.mean()) / 2),
        width=float(spread),
        temperature=grid[losses.index(min(losses))],
        emotions=tuple(emotions),
        lead_in=lead_in,
    )
