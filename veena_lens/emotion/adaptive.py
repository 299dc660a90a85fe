"""Strength that follows the model itself: how emotional the picture looks to it, and how sure it is which emotion.

From the untouched prefill at the key layer: presence g = sigmoid((<h, S^> - theta) / width), and confidence kappa =
1 - entropy(q) / log E with q = softmax(<h - mean neutral h, D_e^> / T). "need" strengthens where emotion is there but
unsure, beta = 1 + (beta_max - 1) g (1 - kappa); "trust" strengthens what is sure, with kappa instead. No label is used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from veena_lens.emotion.enhance import veena
from veena_lens.emotion.methods import Method, batches, prepared

KINDS = ("need", "trust")


@dataclass(frozen=True, eq=False, kw_only=True)
class Adaptive:
    """What reads presence and confidence from one layer's residual at the last prompt token."""

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
        """(presence g, confidence kappa) of each row, in [0, 1]."""
        states = states.double().cpu()
        presence = torch.sigmoid((states @ self.unit.double() - self.theta) / self.width)
        logits = (states - self.neutral_mean.double()) @ self.contrasts.double().T / self.temperature
        q = logits.softmax(-1)
        entropy = -(q * q.clamp_min(1e-12).log()).sum(-1)
        return presence, 1 - entropy / math.log(len(self.emotions))

    def strengths(
        self, states: Float[Tensor, "row d_model"], largest: float | int, kind: str = "need"
    ) -> Float[Tensor, " row"]:
        """1 + (largest - 1) g (1 - kappa) for kind="need", 1 + (largest - 1) g kappa for "trust"."""
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
        """VEENA whose strength is set for each row once, before it answers, and held while it does.

        Costs one partial prefill, up to the key layer. `settings`: those of `veena`."""

        def per_row(model: Any, inputs: Any) -> list[list[Any]]:
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
def states_at(model: Any, inputs: Any, layer: int, lead_in: str | None = None) -> Float[Tensor, "row d_model"]:
    """resid_post of a layer at each row's last token (of `lead_in`, put after the prompt), in float64 on the CPU; the
    run goes no further."""
    inputs = inputs.left_padded() if lead_in is None else inputs.with_answer(f" {lead_in}")
    name = f"blocks.{layer}.hook_resid_post"
    kept: list[Tensor] = []

    def keep(tensor: Tensor, hook: Any) -> None:
        kept.append(tensor[:, -1])

    with model.hooks([(name, keep)]):
        model(inputs, stop_at_layer=layer + 1 if layer + 1 < model.cfg.n_layers else None, return_type=None)
    return kept[0].double().cpu()


def fit_adaptive(
    model: Any,
    examples: Sequence[Any],
    directions: Any,
    layer: int,
    *,
    lead_in: str | None = None,
    batch_size: int = 16,
) -> Adaptive:
    """Presence's threshold and width, and the temperature by likelihood, from labelled examples of a validation split.

    theta lies midway between the neutral and the emotional examples' means of <h, S^>, width is their pooled standard
    deviation; T maximises the likelihood of the emotional examples' labels over a grid of powers.
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
