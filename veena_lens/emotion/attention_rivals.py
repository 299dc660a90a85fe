"""Rivals that change attention to the picture: PAI, ScalingVis, AdaptVis, VAF and SPIN, as interventions of ours.

All were made against object hallucination or for spatial questions; here they answer about emotion, so each is tuned
on the same validation split as the method that it is held against.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from veena_lens.emotion.decoding import guidance, require_pictures
from veena_lens.emotion.methods import Method
from veena_lens.inputs import MultimodalInputs
from veena_lens.interventions import BoostAttention, QuietHeads


def pai(alpha: float | int, layers: Sequence[int], cfg_gamma: float | int | None = None) -> Method:
    """Paying attention to the image: s + alpha |s| on image keys, all heads of `layers`, and guidance while decoding.

    The boost acts on the last row of the prompt and on every generated one. cfg_gamma: log-probabilities are
    extrapolated away from those without the picture (`guidance`); None or 1 leaves them. The official settings for a
    7B model are alpha 0.2, layers 2 .. 31, gamma 1.1.
    Raises: ValueError for no layers or numbers that are not finite. Source: Liu et al. 2024, arXiv 2407.21771.
    """
    _require_finite("pai", alpha=alpha)
    chosen = _layers("pai", layers)
    return Method(
        name="pai",
        interventions=[
            BoostAttention(layer, None, keys="image", queries="last+generated", factor=1 + alpha, mode="abs")
            for layer in (chosen if alpha else [])
        ],
        decoding=None if cfg_gamma is None else guidance(cfg_gamma),
        about="attention logits of image keys raised, guidance against no picture (Liu et al. 2024, arXiv 2407.21771)",
        settings={"alpha": alpha, "layers": chosen, "cfg_gamma": cfg_gamma},
    )


def scalingvis(w: float | int, layers: Sequence[int]) -> Method:
    """ScalingVis: attention logits of image keys times w, at the last row of the prompt, all heads of `layers`.

    w > 1 sharpens where the last token looks, w < 1 smooths it; 1 is off. The official code takes all layers.
    Raises: ValueError for no layers or a w that is not finite. Source: Chen et al. 2025, arXiv 2503.01773."""
    _require_finite("scalingvis", w=w)
    chosen = _layers("scalingvis", layers)
    return Method(
        name="scalingvis",
        interventions=_scaled(w, chosen),
        about="attention logits of image keys scaled at the last prompt token (Chen et al. 2025, arXiv 2503.01773)",
        settings={"w": w, "layers": chosen},
    )


def adaptvis(threshold: float | int, layers: Sequence[int], w1: float | int = 0.5, w2: float | int = 1.2) -> Method:
    """AdaptVis: ScalingVis with w1 where the model is less sure than `threshold` of its first token, else with w2.

    Sure: the largest probability of the first token, from an unedited run of the prompt; each row has its own factor.
    Raises: ValueError for no layers, or numbers that are not finite; when it runs, for a row without a picture.
    Source: Chen et al. 2025, arXiv 2503.01773 (the threshold is chosen for each task)."""
    _require_finite("adaptvis", threshold=threshold, w1=w1, w2=w2)
    chosen = _layers("adaptvis", layers)

    def per_row(model: Any, inputs: MultimodalInputs) -> list[list[Any]]:
        require_pictures("adaptvis", inputs)
        sure = first_token_confidence(model, inputs).tolist()
        return [_scaled(w1 if confidence < threshold else w2, chosen) for confidence in sure]

    return Method(
        name="adaptvis",
        interventions=per_row,
        about="attention to image keys smoothed or sharpened by confidence (Chen et al. 2025, arXiv 2503.01773)",
        settings={"threshold": threshold, "w1": w1, "w2": w2, "layers": chosen},
    )


def vaf(layers: Sequence[int], enhance: float | int = 1.15, suppress: float | int = 0.95) -> Method:
    """Visual amplification: attention logits of image keys times `enhance`, of what stands before the picture times
    `suppress`, for the text after the picture and what is generated; all heads of the middle `layers`.

    The official settings for a 7B model are layers 9 .. 14. Factors of 1 are off.
    Raises: ValueError for no layers, or factors that are not finite; when it runs, for a row without a picture.
    Source: Yin et al. 2025, arXiv 2503.13107 (ClearSight)."""
    _require_finite("vaf", enhance=enhance, suppress=suppress)
    chosen = _layers("vaf", layers)

    def per_row(model: Any, inputs: MultimodalInputs) -> list[list[Any]]:
        require_pictures("vaf", inputs)
        rows = []
        for row, spans in enumerate(inputs.spans):
            first = spans.images[0].start
            parts: list[tuple[Any, float | int]] = [("image", enhance)]
            if bool(inputs.attention_mask[row, :first].any()):
                parts.append((slice(0, first), suppress))
            rows.append(
                [
                    BoostAttention(layer, None, keys=keys, queries="query+generated", factor=factor, mode="mul")
                    for layer in chosen
                    for keys, factor in parts
                    if factor != 1
                ]
            )
        return rows

    return Method(
        name="vaf",
        interventions=per_row,
        about="image keys enhanced and system keys damped in middle layers (Yin et al. 2025, arXiv 2503.13107)",
        settings={"enhance": enhance, "suppress": suppress, "layers": chosen},
    )


def spin(layers: Sequence[int], keep: float | int = 0.95, factor: float | int = 0.0) -> Method:
    """SPIN: at each new token, of each layer int(keep * n_heads) heads that look most at the picture stay; the others'
    outputs are multiplied by `factor`.

    Heads are ranked by their attention mass on the picture. keep = 1 or factor = 1 is off.
    Raises: ValueError for no layers, a keep outside [0, 1], or a factor that is not finite.
    Source: Sarkar et al. 2025, arXiv 2505.16411."""
    chosen = _layers("spin", layers)
    return Method(
        name="spin",
        interventions=[QuietHeads(layer, keep, factor) for layer in chosen],
        about="heads that look least at the picture turned down (Sarkar et al. 2025, arXiv 2505.16411)",
        settings={"keep": keep, "factor": factor, "layers": chosen},
    )


@torch.no_grad()
def first_token_confidence(model: Any, inputs: MultimodalInputs) -> Float[Tensor, " batch"]:
    """The largest probability of the token after the prompt, from a run that no intervention touches."""
    with model.untouched():
        resid = model(inputs, stop_at_layer=model.cfg.n_layers)
    last = [spans.last for spans in inputs.spans]
    logits = model._unembed(resid[torch.arange(len(last), device=resid.device), last][:, None])[:, 0]
    return logits.float().softmax(-1).amax(-1).cpu()


def _scaled(w: float | int, layers: Sequence[int]) -> list[Any]:
    if w == 1:
        return []
    return [BoostAttention(layer, None, keys="image", queries="last", factor=w, mode="mul") for layer in layers]


def _layers(who: str, layers: Sequence[int]) -> list[int]:
    chosen = [int(layer) for layer in layers]
    if not chosen:
        raise ValueError(f"{who}: the list of layers is empty; give at least one.")
    return chosen


def _require_finite(who: str, **numbers: float | int) -> None:
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise ValueError(f"{who}: {name}={value} must be finite.")
