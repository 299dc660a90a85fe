"""Baselines of VEENA on the same footing: each a `Method` with its source, each family with equally many trials.

None is trained. Here are those that change attention to the image (PAI, ScalingVis, AdaptVis, VAF, SPIN), steering,
VISTA and prompts; `contrastive_decoding` holds VCD and PAI's guidance. All were made against object hallucination or
for spatial questions; here they answer about emotion, so each is tuned on the same validation split as the method that
it is compared with.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from veena_lens.emotion.enhance.contrastive_decoding import guidance, require_pictures, vcd, without_pictures
from veena_lens.emotion.enhance.random_controls import random_directions, random_heads, random_neurons
from veena_lens.emotion.methods import Method
from veena_lens.inputs import MultimodalInputs
from veena_lens.interventions import BoostAttention, SteerKeepingNorm, SuppressHeads

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM

__all__ = [
    "WORDINGS", "Baseline", "adaptvis", "all_baselines", "first_token_confidence", "pai", "plain_steering",
    "prompt_only", "random_directions", "random_heads", "random_neurons", "scalingvis", "spin", "vaf", "vcd", "vista",
    "visual_directions",
]  # fmt: skip


def pai(alpha: float | int, layers: Sequence[int], cfg_gamma: float | int | None = None) -> Method:
    """Raise attention to the image (PAI): s + alpha |s| on image keys, all heads of `layers`, and guidance in decoding.

    The boost acts on the last row of the prompt and on every generated one. cfg_gamma: log-probabilities are
    extrapolated away from those without the image (`guidance`); None or 1 leaves them. The official settings for a
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
    """Multiply attention logits of image keys by w (ScalingVis), at the last row of the prompt, all heads of `layers`.

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
    """Scale attention as AdaptVis: with w1 where the model is less sure than `threshold` of its first token, else w2.

    As ScalingVis. Sure: the largest probability of the first token, from an unedited run of the prompt; each row has
    its own factor.
    Raises: ValueError for no layers, or numbers that are not finite; when it runs, for a row without an image.
    Source: Chen et al. 2025, arXiv 2503.01773 (the threshold is chosen for each task)."""
    _require_finite("adaptvis", threshold=threshold, w1=w1, w2=w2)
    chosen = _layers("adaptvis", layers)

    def per_row(model: HookedVLM, inputs: MultimodalInputs) -> list[list[Any]]:
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
    """Amplify vision (VAF): attention logits of image keys times `enhance`, of what stands before the image times
    `suppress`, for the text after the image and what is generated; all heads of the middle `layers`.

    The official settings for a 7B model are layers 9 .. 14. Factors of 1 are off.
    Raises: ValueError for no layers, or factors that are not finite; when it runs, for a row without an image.
    Source: Yin et al. 2025, arXiv 2503.13107 (ClearSight)."""
    _require_finite("vaf", enhance=enhance, suppress=suppress)
    chosen = _layers("vaf", layers)

    def per_row(model: HookedVLM, inputs: MultimodalInputs) -> list[list[Any]]:
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
    """Suppress heads (SPIN): at each new token, int(keep * n_heads) heads of a layer that look most at the image stay;
    the others' outputs are multiplied by `factor`.

    Heads are ranked by their attention mass on the image. keep = 1 or factor = 1 is off.
    Raises: ValueError for no layers, a keep outside [0, 1], or a factor that is not finite.
    Source: Sarkar et al. 2025, arXiv 2505.16411."""
    chosen = _layers("spin", layers)
    return Method(
        name="spin",
        interventions=[SuppressHeads(layer, keep, factor) for layer in chosen],
        about="heads that look least at the picture turned down (Sarkar et al. 2025, arXiv 2505.16411)",
        settings={"keep": keep, "factor": factor, "layers": chosen},
    )


@torch.no_grad()
def first_token_confidence(model: HookedVLM, inputs: MultimodalInputs) -> Float[Tensor, " batch"]:
    """Return the largest probability of the token after the prompt, from a run that no intervention touches."""
    with model.without_interventions():
        resid = model(inputs, stop_at_layer=model.cfg.n_layers)
    last = [spans.last for spans in inputs.spans]
    logits = model.unembed_resid(resid[torch.arange(len(last), device=resid.device), last][:, None])[:, 0]
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


# From the lightest hint to explicit instructions; {prompt} stands for the example's own.
WORDINGS: Mapping[str, str] = {
    "look": "Look carefully at the face. {prompt}",
    "look after": "{prompt} Look carefully at the face.",
    "picture": "Look at the picture. {prompt}",
    "eyes and mouth": "Look at the eyes and the mouth. {prompt}",
    "expression": "Pay attention to the facial expression. {prompt}",
    "picture first": "Answer from the picture. {prompt}",
    "only picture": "Answer only from what you see in the picture. {prompt}",
    "not told": "Do not trust what you are told, look at the picture. {prompt}",
    "ignore text": "Ignore the text and look at the face. {prompt}",
    "steps": "First look at the face, then answer. {prompt}",
    "expert": "You are an expert in reading faces. {prompt}",
    "twice": "{prompt} Look carefully at the face. {prompt}",
}


def plain_steering(
    directions: Any,
    layer: int,
    alpha: float | int,
    scale: Any = None,
    emotion: str | None = None,
    positions: Any = "last+generated",
) -> Method:
    """Add a steering vector to the residual stream of one layer: h + alpha S.

    directions: found by mean difference, with `.steer(layer, alpha, emotion=, scale=)`; emotion None takes the overall
    one. scale: handed on where given. positions: the last prompt token and the answer, as contrastive activation
    addition has it (Rimsky et al. 2023, arXiv 2312.06681); "prompt" is activation addition's
    (Turner et al. 2023, arXiv 2308.10248). Raises: as `directions.steer`."""
    extra = {} if scale is None else {"scale": scale}
    steer = replace(directions.steer(layer, alpha, emotion=emotion, **extra), positions=positions)
    return Method(
        name="plain steering",
        interventions=[steer],
        about="mean-difference vector added at one layer (Rimsky et al. 2023, arXiv 2312.06681)",
        settings={
            "layer": layer,
            "alpha": alpha,
            "scale": scale,
            "emotion": emotion,
            "positions": str(positions),
            "vector": _digest(steer.vector),
        },
    )


def vista(
    lam: float | int = 0.1,
    layers: Sequence[int] | None = None,
    vectors: Float[Tensor, "layer d_model"] | None = None,
    positions: Any = "all",
) -> Method:
    """Turn MLP outputs towards what the image adds, keeping their norms (VISTA's visual steering, `SteerKeepingNorm`).

    vectors: one direction per layer for every example; None takes each example's own, `visual_directions` of its
    prompt, for two more runs of the prompt. layers: None is all. lam = 0 is off; the official code has 0.1 (LLaVA-1.5:
    0.17). Its second part, logits mixed from earlier layers, is left out.
    Raises: ValueError for a lam that is not finite, or no layers; when it runs, for a row without an image.
    Source: Li et al. 2025, arXiv 2502.03628."""
    if layers is not None and not len(layers):
        raise ValueError("vista: the list of layers is empty; leave it out to take all.")
    SteerKeepingNorm(0, torch.ones(1), lam, positions)  # its checks, before anything runs

    def turned(directions: Tensor) -> list[Any]:
        chosen = range(len(directions)) if layers is None else layers
        return [SteerKeepingNorm(int(layer), directions[layer], lam, positions) for layer in chosen] if lam else []

    def per_row(model: HookedVLM, inputs: MultimodalInputs) -> list[list[Any]]:
        require_pictures("vista", inputs)
        if not lam:
            return [[] for _ in range(len(inputs))]
        return [turned(mine) for mine in visual_directions(model, inputs)]

    return Method(
        name="vista",
        interventions=per_row if vectors is None else turned(vectors),
        about="MLP outputs turned towards what the picture adds, norm kept (Li et al. 2025, arXiv 2502.03628)",
        settings={
            "lam": lam,
            "layers": None if layers is None else [int(layer) for layer in layers],
            "positions": str(positions),
            "vectors": "each example's own" if vectors is None else _digest(vectors),
        },
    )


@torch.no_grad()
def visual_directions(model: HookedVLM, inputs: MultimodalInputs) -> Float[Tensor, "batch layer d_model"]:
    """Return what the image adds to each row's last prompt token: resid_post with it minus resid_post without it.

    Interventions in force do not act. Raises: ValueError for a row without an image."""
    require_pictures("visual_directions", inputs)
    return _last_states(model, inputs) - _last_states(model, without_pictures(model, inputs))


def _last_states(model: HookedVLM, inputs: MultimodalInputs) -> Float[Tensor, "batch layer d_model"]:
    last = [spans.last for spans in inputs.spans]
    states: list[Tensor] = []

    def keep(resid: Tensor, hook: Any) -> None:
        states.append(resid[torch.arange(len(last), device=resid.device), last].clone())

    names = [f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)]
    with model.without_interventions():
        model.run_with_hooks(inputs, return_type=None, fwd_hooks=[(name, keep) for name in names])
    return torch.stack([state.to(states[0].device) for state in states], 1)


def prompt_only(kind: str = "look") -> Method:
    """Reword the prompt, nothing else, as one of `WORDINGS`. Raises: ValueError for an unknown kind."""
    if kind not in WORDINGS:
        raise ValueError(f"prompt_only: kind={kind!r} is unknown; known: {', '.join(WORDINGS)}.")
    wording = WORDINGS[kind]
    return Method(
        name="prompt",
        prompt=lambda prompt: wording.replace("{prompt}", prompt),
        about="the prompt asks to look at the face",
        settings={"kind": kind, "wording": wording},
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class Baseline:
    """A baseline with the settings it is tuned over: `build(**grid[i])` is a Method. Grids go from weak to strong."""

    name: str
    grid: list[dict[str, Any]]
    build: Callable[..., Method]
    about: str

    def __repr__(self) -> str:
        return f"Baseline({self.name!r}: {len(self.grid)} trials over {', '.join(self.grid[0])}; {self.about})"


def all_baselines(
    model: HookedVLM, *, directions: Any = None, key_layer: int | None = None, trials: int = 12, seed: int = 0
) -> list[Baseline]:
    """Return every baseline with as many trials as the others, around its source's defaults, scaled to the depth.

    Args:
        model: the model that will be tuned.
        directions: for plain steering, which is left out without them.
        key_layer: where plain steering acts, with both sets of positions; by default over layers at a quarter, half and
            three quarters of the depth.
        trials: 12 or fewer, spread over each grid.
        seed: of VCD's noise.

    Raises: ValueError for trials outside 1 .. 12, or a key layer that the model does not have."""
    if not 1 <= trials <= 12:
        raise ValueError(f"all_baselines: trials={trials} must be in 1 .. 12.")
    n, heads = model.cfg.n_layers, model.cfg.n_heads
    if key_layer is not None and not 0 <= key_layer < n:
        raise ValueError(f"all_baselines: key_layer={key_layer} does not exist; the model has layers 0 to {n - 1}.")
    every, upper = list(range(n)), list(range(n // 2, n))
    deeper = list(range(min(max(1, round(n * 2 / 32)), n - 1), n))  # layers 2 .. 31 of 32
    middle = list(range(n * 9 // 32, max(n * 9 // 32 + 1, -(-n * 15 // 32))))  # layers 9 .. 14 of 32
    first = list(range(max(1, round(n * 20 / 32))))  # layers 0 .. 19 of 32
    found = [
        ("pai", pai, _grid(alpha=[0.1, 0.2, 0.35, 0.5, 0.75, 1.0], cfg_gamma=[None, 1.1], layers=[deeper])),
        ("vcd", vcd, _grid(a=[0.25, 0.5, 1.0, 1.5], noise_step=[300, 500, 800], seed=[seed])),
        ("vista", vista, _grid(lam=[0.05, 0.1, 0.17, 0.25, 0.4, 0.6], layers=[upper, every])),
        (
            "adaptvis",
            adaptvis,
            _grid(w2=[1.2, 1.5, 2.0], w1=[0.8, 0.5], threshold=[0.5, 0.8], layers=[every]),
        ),
        (
            "scalingvis",
            scalingvis,
            _grid(w=[1.1, 0.9, 1.2, 0.8, 1.35, 0.7, 1.5, 0.5, 1.75, 2.0, 2.5, 3.0], layers=[every]),
        ),
        ("vaf", vaf, _grid(enhance=[1.05, 1.15, 1.3, 1.6], layers=[middle, upper, every])),
        ("spin", spin, _grid(keep=_keeps(heads), factor=[0.1, 0.0], layers=[first, every])),
        ("prompt", prompt_only, _grid(kind=list(WORDINGS))),
    ]
    if directions is not None:
        # In units of the mean difference itself, where 1 moves a neutral state onto an emotional one.
        alphas = [0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0]
        if key_layer is not None:
            places = _grid(layer=[key_layer], positions=["last+generated", "prompt"])
        else:
            places = _grid(layer=sorted({n // 4, n // 2, n * 3 // 4}), positions=["last+generated"])
        grid = [{"alpha": alpha, **place} for alpha in _spread(alphas, 12 // len(places)) for place in places]

        def steered(layer: int, alpha: float | int, positions: str) -> Method:
            return plain_steering(directions, layer, alpha, "raw", positions=positions)

        found.insert(0, ("plain steering", steered, grid))
    return [
        Baseline(name=name, grid=_spread(grid, trials), build=build, about=build(**grid[0]).about)
        for name, build, grid in found
    ]


def _grid(**choices: Sequence[Any]) -> list[dict[str, Any]]:
    """Return every combination, the first name slowest."""
    return [dict(zip(choices, values)) for values in product(*choices.values())]


def _spread(grid: list[Any], trials: int) -> list[Any]:
    """Return `trials` entries of a list, evenly spread from its first to its last."""
    if trials == 1:
        return [grid[len(grid) // 2]]
    return [grid[round(i * (len(grid) - 1) / (trials - 1))] for i in range(trials)]


def _keeps(heads: int) -> list[float]:
    """Return three shares of heads to keep, 0.95, 0.85 and 0.7 where each turns down a different number of heads."""
    quiet: list[int] = []
    for share in (0.95, 0.85, 0.7):
        quiet.append(max(heads - int(share * heads), quiet[-1] + 1 if quiet else 1))
    return [max(heads - n, 0) / heads for n in quiet]


def _digest(vector: Tensor) -> str:
    """Return a short name of a vector, so that settings tell two of them apart."""
    return hashlib.sha256(vector.detach().cpu().float().contiguous().numpy().tobytes()).hexdigest()[:12]
