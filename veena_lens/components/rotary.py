"""Rotary positions (Su et al. 2021, arXiv 2104.09864) with the scaling rules that released checkpoints use.

Frequencies and angles are float32 whatever the model's dtype, as in Hugging Face; cos and sin are then cast.
Halves rotate: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veena_lens.config import HookedVLMConfig, RopeConfig

RotaryTables: TypeAlias = tuple[Float[Tensor, "#batch pos d_head"], Float[Tensor, "#batch pos d_head"]]


def inverse_frequencies(
    rope: RopeConfig, d_head: int, length: int | None = None
) -> tuple[Float[Tensor, " half"], float]:
    """Return the inverse frequencies of the d_head / 2 planes, float32, and the factor that scales cos and sin.

    rope: the scaling rule.
    d_head: the width of a head.
    length: the largest position of the batch plus one, on which "dynamic" depends past the trained context.
        None: within it."""
    exponents = torch.arange(0, d_head, 2, dtype=torch.int64).to(torch.float32) / d_head
    plain = 1.0 / (rope.theta**exponents)
    p = rope.parameters
    if rope.rope_type == "linear":
        return plain / p["factor"], 1.0
    if rope.rope_type == "llama3":
        return _llama3(plain, p), 1.0
    if rope.rope_type == "yarn":
        return _yarn(rope.theta**exponents, d_head, rope.theta, p)
    if rope.rope_type == "dynamic" and _exceeds_trained(rope, length):
        return _dynamic(exponents, d_head, rope, torch.tensor(length)), 1.0
    return plain, 1.0


def _exceeds_trained(rope: RopeConfig, length: int | None) -> bool:
    """Return whether a sequence is longer than the trained context; None is not."""
    context = rope.parameters.get("original_max_position_embeddings")
    return length is not None and context is not None and length > context


def _dynamic(
    exponents: Float[Tensor, " half"], d_head: int, rope: RopeConfig, length: Int[Tensor, ""]
) -> Float[Tensor, " half"]:
    """Grow the base with the length; its arithmetic is that of a tensor of integers, in float32 (NTK scaling)."""
    factor, context = rope.parameters["factor"], rope.parameters["original_max_position_embeddings"]
    base = rope.theta * ((factor * length / context) - (factor - 1)) ** (d_head / (d_head - 2))
    return 1.0 / (base**exponents)


def _llama3(plain: Float[Tensor, " half"], p: dict[str, float]) -> Float[Tensor, " half"]:
    """Divide long wavelengths by the factor, keep short ones, with a ramp in between (Llama 3.1)."""
    context, low, high = p["original_max_position_embeddings"], p["low_freq_factor"], p["high_freq_factor"]
    wavelength = 2 * math.pi / plain
    scaled = torch.where(wavelength > context / low, plain / p["factor"], plain)
    smooth = (context / wavelength - low) / (high - low)
    ramp = (1 - smooth) * scaled / p["factor"] + smooth * scaled
    medium = ~(wavelength < context / high) & ~(wavelength > context / low)
    return torch.where(medium, ramp, scaled)


def _yarn(
    base_powers: Float[Tensor, " half"], d_head: int, theta: float, p: dict[str, float]
) -> tuple[Float[Tensor, " half"], float]:
    """Interpolate slow planes, keep fast ones (Peng et al. 2023, arXiv 2309.00071)."""
    factor, context = p["factor"], p["original_max_position_embeddings"]

    def temperature(scale: float | int, m: float | int = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * m * math.log(scale) + 1.0

    attention = p.get("attention_factor")
    if attention is None:
        m, m_all = p.get("mscale"), p.get("mscale_all_dim")
        attention = temperature(factor, m) / temperature(factor, m_all) if m and m_all else temperature(factor)

    def plane(rotations: float | int) -> float:
        return d_head * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = plane(p.get("beta_fast") or 32), plane(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d_head - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(d_head // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    keep = 1 - ramp
    return (1.0 / (factor * base_powers)) * (1 - keep) + (1.0 / base_powers) * keep, float(attention)


class LayerRotary:
    """Tables of every layer: those of one rule, and of another where layers slide."""

    def __init__(self, cfg: HookedVLMConfig) -> None:
        self.full = Rotary(cfg.rope, cfg.d_head, cfg.casts)
        self.sliding = None if cfg.sliding_rope is None else Rotary(cfg.sliding_rope, cfg.d_head, cfg.casts)
        self.window = cfg.window

    def tables(self, positions: Int[Tensor, "*streams batch pos"], dtype: torch.dtype) -> Callable[[int], RotaryTables]:
        """Return a function from a layer to its (cos, sin); each rule's are made once."""
        made: dict[bool, RotaryTables] = {}

        def of(layer: int) -> RotaryTables:
            rule = self.full if self.sliding is None or self.window(layer) is None else self.sliding
            slides = rule is self.sliding
            if slides not in made:
                made[slides] = rule.tables(positions, dtype)
            return made[slides]

        return of


class Rotary:
    """Tables for given positions; frequencies are kept per device (they are not weights, and never on meta)."""

    def __init__(self, rope: RopeConfig, d_head: int, casts: str = "hf") -> None:
        self.rope, self.d_head, self.casts = rope, d_head, casts
        self._on: dict[torch.device, tuple[Tensor, float]] = {}

    def tables(self, positions: Int[Tensor, "*streams batch pos"], dtype: torch.dtype) -> RotaryTables:
        """Return (cos, sin), each [batch pos d_head] in `dtype`; three streams are interleaved by section."""
        frequencies, factor = self._frequencies(positions)
        exact = self.casts == "none" and dtype == torch.float64
        angles = positions[..., None].to(torch.float64 if exact else torch.float32) * frequencies
        if positions.ndim == 3:
            angles = self._merge_streams(angles)
        angles = torch.cat([angles, angles], -1)
        return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)

    def _frequencies(self, positions: Int[Tensor, "*streams batch pos"]) -> tuple[Float[Tensor, " half"], float]:
        """Return the frequencies on the device of the positions.

        Past the trained context those of "dynamic" follow the longest row of the batch, as in Hugging Face."""
        device = positions.device
        if self.rope.rope_type == "dynamic" and _exceeds_trained(self.rope, length := int(positions.max()) + 1):
            frequencies, factor = inverse_frequencies(self.rope, self.d_head, length)
            return frequencies.to(device), factor
        if device not in self._on:
            frequencies, factor = inverse_frequencies(self.rope, self.d_head)
            self._on[device] = frequencies.to(device), factor
        return self._on[device]

    def _merge_streams(self, angles: Float[Tensor, "streams batch pos half"]) -> Float[Tensor, "batch pos half"]:
        """Give each frequency the angle of its section's stream (time, height, width)."""
        sections = self.rope.sections
        if sections is None:
            raise ValueError("Positions have three streams but the configuration has no rotary sections.")
        if not self.rope.interleaved:
            return torch.cat([part[i % 3] for i, part in enumerate(angles.split(list(sections), -1))], -1)
        merged = angles[0].clone()
        for stream in (1, 2):
            merged[..., stream : 3 * sections[stream] : 3] = angles[stream][..., stream : 3 * sections[stream] : 3]
        return merged


def rotate(x: Float[Tensor, "batch pos heads d_head"], tables: RotaryTables) -> Float[Tensor, "batch pos heads d_head"]:
    """Rotate queries or keys by their positions, in the dtype of the tables, and back to that of `x`.

    Towers keep their tables in float32, so there float64 queries are rounded, as in Hugging Face."""
    cos, sin = (t[:, :, None] for t in tables)
    wide = x.to(cos.dtype)
    first, second = wide.chunk(2, -1)
    return (wide * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)
