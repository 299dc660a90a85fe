"""Baselines that change how tokens are chosen: a second stream of logits beside the model's own, contrasted with it.

VCD's second stream sees a noised image, PAI's guidance none. Each stream keeps its own keys and values, so a step
costs one further token, and runs untouched by the interventions of the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veena_lens.components.kv_cache import KVCache
from veena_lens.emotion.methods import Method
from veena_lens.inputs import MultimodalInputs, find_spans, text_positions
from veena_lens.model.generation import as_prompt, next_logits

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM

Combine = Callable[[Tensor, Tensor], Tensor]
N_NOISE_STEPS = 1000


def vcd(a: float | int = 1.0, b: float | int = 0.1, noise_step: int = 500, seed: int = 0) -> Method:
    """Contrast decoding (VCD): (1 + a) l - a l', where l' are the logits with a noised image in its place.

    Args:
        a: how much the noised image's logits count.
        b: cutoff on the probability of tokens, in (0, 1].
        noise_step: of the diffusion, 0 .. 999.
        seed: of the noise.

    Only tokens with l >= max l + log b compete. The noise is that of step `noise_step` of a diffusion of 1,000 steps,
    the same for every example, drawn from `seed`. a = 0 is off.
    Raises: ValueError for a < 0, b outside (0, 1], or a step outside 0 .. 999; while decoding, for a row without a
    image. Source: Leng et al. 2024, arXiv 2311.16922.
    """
    _require("vcd", "a", a, a >= 0 and math.isfinite(a), "a number of at least 0")
    _require("vcd", "b", b, 0 < b <= 1, "a share above 0, at most 1")
    _require("vcd", "noise_step", noise_step, 0 <= noise_step < N_NOISE_STEPS, f"in 0 .. {N_NOISE_STEPS - 1}")

    def decoding(model: HookedVLM, inputs: MultimodalInputs) -> Sequence[Any]:
        require_pictures("vcd", inputs)
        if a == 0:
            return ()
        noised = with_noise(model, inputs, noise_step, seed)
        return (SecondStream(model, inputs, noised, lambda own, other: contrasted(own, other, a, b)),)

    return Method(
        name="vcd",
        decoding=decoding,
        about="logits contrasted with those for a noised picture (Leng et al. 2024, arXiv 2311.16922)",
        settings={"a": a, "b": b, "noise_step": noise_step, "seed": seed},
    )


def guidance(gamma: float | int, cutoff: float | int = 0.1) -> Callable[[Any, MultimodalInputs], Sequence[Any]]:
    """Extrapolate log-probabilities away from those without the image, as PAI decodes; a gamma of 1 is off.

    Args:
        gamma: how far; 1 is off.
        cutoff: share of the largest probability below which tokens are ruled out, in (0, 1].

    Raises: ValueError for a gamma that is not finite, or a cutoff outside (0, 1]; while decoding, for a row without a
    image. Source: Liu et al. 2024, arXiv 2407.21771, section 3.3."""
    _require("pai", "cfg_gamma", gamma, math.isfinite(gamma), "a finite number")
    _require("pai", "cutoff", cutoff, 0 < cutoff <= 1, "a share above 0, at most 1")

    def decoding(model: HookedVLM, inputs: MultimodalInputs) -> Sequence[Any]:
        require_pictures("pai", inputs)
        if gamma == 1:
            return ()
        blind = without_pictures(model, inputs)
        return (SecondStream(model, inputs, blind, lambda own, other: guided(own, other, gamma, cutoff)),)

    return decoding


def contrasted(
    own: Float[Tensor, "batch d_vocab"], other: Float[Tensor, "batch d_vocab"], a: float | int, b: float | int
) -> Float[Tensor, "batch d_vocab"]:
    """Return (1 + a) own - a other where own >= max own + log b, else -inf."""
    implausible = own < own.amax(-1, keepdim=True) + math.log(b)
    return ((1 + a) * own - a * other).masked_fill(implausible, -math.inf)


def guided(
    own: Float[Tensor, "batch d_vocab"],
    other: Float[Tensor, "batch d_vocab"],
    gamma: float | int,
    cutoff: float | int = 0.1,
) -> Float[Tensor, "batch d_vocab"]:
    """Return gamma (lp - lp') + lp' of the log-probabilities where lp >= max lp + log cutoff, else -inf."""
    lp, blind = own.log_softmax(-1), other.log_softmax(-1)
    implausible = lp < lp.amax(-1, keepdim=True) + math.log(cutoff)
    return (gamma * (lp - blind) + blind).masked_fill(implausible, -math.inf)


class SecondStream:
    """A logits processor that runs the same continuation behind other inputs and combines the two streams' logits.

    It follows one batch from its first step on, one token per step, with its keys and values kept apart; a call without
    new tokens starts afresh. Rows that have ended go along and are ignored by `generate`, as in the first stream.
    """

    def __init__(self, model: HookedVLM, inputs: MultimodalInputs, other: MultimodalInputs, combine: Combine) -> None:
        self.model, self.combine = model, combine
        self.n_prompt = inputs.shape[1]
        self.prompt = as_prompt(model, other)
        self.cache: KVCache | None = None
        self.n_seen = 0

    @torch.no_grad()
    def __call__(
        self, input_ids: Int[Tensor, "batch pos"], scores: Float[Tensor, "batch d_vocab"]
    ) -> Float[Tensor, "batch d_vocab"]:
        new = input_ids[:, self.n_prompt :].to(self.prompt.device)
        if len(new) != len(self.prompt) or (new.shape[1] and new.shape[1] != self.n_seen + 1):
            raise ValueError(
                f"A decoding rule follows the batch it was made for token by token: it was made for "
                f"{len(self.prompt)} rows and has seen {self.n_seen} tokens, and was given {len(new)} rows of "
                f"{new.shape[1]}. Make it anew for each batch (`method.decoding(model, inputs)`)."
            )
        if not new.shape[1]:
            self.cache = KVCache(self.model.cfg.n_layers)
        self.n_seen = new.shape[1]
        with self.model.without_interventions():
            other = next_logits(self.model, self.prompt, new, self.cache)
        return self.combine(scores, other.to(scores))


def with_noise(model: HookedVLM, inputs: MultimodalInputs, step: int, seed: int = 0) -> MultimodalInputs:
    """Return the inputs with every image as a diffusion has it after `step` steps: sqrt(A) x + sqrt(1 - A) noise.

    A is the product of 1 - beta over the steps 0 .. step, beta rising from 1e-5 to 5e-3 as a sigmoid. Each row draws
    its own noise from `seed` anew, so that a batch equals its rows alone; the frames that one token reads share it.
    """
    assert inputs.pixel_values is not None and inputs.crop_rows is not None
    beta = torch.linspace(-6, 6, N_NOISE_STEPS, dtype=torch.float64).sigmoid() * (5e-3 - 1e-5) + 1e-5
    kept = float((1 - beta)[: step + 1].prod())
    generators = [torch.Generator().manual_seed(seed) for _ in range(len(inputs))]
    pixels = inputs.pixel_values.clone()
    sizes = inputs.crop_lengths()
    for picture, row in enumerate(inputs.crop_rows.tolist()):
        if sizes is None:
            noise = torch.randn(pixels.shape[1:], generator=generators[row], dtype=torch.float64)
            place: Any = (picture,)
        else:
            noise = _patch_noise(model.cfg.vision, sizes[picture], generators[row])
            place = (picture, slice(sizes[picture]))
        pixels[place] = math.sqrt(kept) * pixels[place] + math.sqrt(1 - kept) * noise.to(pixels)
    return replace(inputs, pixel_values=pixels)


def _patch_noise(vision: Any, n: int, generator: torch.Generator) -> Float[Tensor, "patch width"]:
    """Return noise for `n` patches of channels x frames x height x width."""
    frames = vision.temporal_patch_size
    noise = torch.randn(n, vision.n_channels, 1, vision.patch_size**2, generator=generator, dtype=torch.float64)
    return noise.expand(-1, -1, frames, -1).reshape(n, -1)


def without_pictures(model: HookedVLM, inputs: MultimodalInputs) -> MultimodalInputs:
    """Return the same rows with their image tokens taken out, padded on the left; positions count what is left.

    A pair of added tokens right around an image (Qwen's vision start and end) goes with it."""
    keep = inputs.attention_mask & ~inputs.image_mask
    added = set(getattr(model.tokenizer, "added_tokens_decoder", None) or ())
    for row, spans in enumerate(inputs.spans):
        for image in spans.images:
            around = [at for at in (image.start - 1, image.stop) if 0 <= at < inputs.shape[1]]
            if len(around) == 2 and all(int(inputs.tokens[row, at]) in added for at in around):
                keep[row, around] = False
    rows = [inputs.tokens[row, keep[row]] for row in range(len(inputs))]
    length = max(len(ids) for ids in rows)
    tokens = torch.full((len(rows), length), inputs.pad_token_id, dtype=inputs.tokens.dtype, device=inputs.device)
    mask = torch.zeros(tokens.shape, dtype=torch.bool, device=inputs.device)
    for row, ids in enumerate(rows):
        tokens[row, length - len(ids) :] = ids
        mask[row, length - len(ids) :] = True
    answers = [s.answer for s in inputs.spans]
    answered = None if None in answers else [a.stop - a.start for a in answers if a is not None]
    positions = text_positions(mask)
    return replace(
        inputs,
        tokens=tokens,
        attention_mask=mask,
        position_ids=positions.expand(*inputs.position_ids.shape[:-2], *positions.shape),
        pixel_values=None,
        patch_mask=None,
        layouts=((),) * len(rows),
        spans=find_spans(tokens, mask, None, (), answered),
        patch_boxes=None,
    )


def require_pictures(who: str, inputs: MultimodalInputs) -> None:
    """Require an image in every row. Raises: ValueError for rows without an image, naming them."""
    bare = [row for row, n in enumerate(inputs.n_images) if n == 0]
    if bare:
        raise ValueError(f"{who} needs an image in every row; rows {bare[:8]} of {len(inputs)} have none.")


def _require(who: str, what: str, value: float | int, ok: bool, wanted: str) -> None:
    if not ok:
        raise ValueError(f"{who}: {what}={value} must be {wanted}.")
