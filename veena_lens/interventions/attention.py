"""Edits of attention from chosen queries to chosen keys: strengthened, cut, or heads turned down by it.

`BoostAttention` multiplies weights or scores. In the mode renorm the row is renormalised, which is the same function
as adding log(factor) to the scores: a bias that the fused kernel takes, so no pattern is made. `KnockOutAttention`
is a bias as well, of minus infinity. The other modes, and `SuppressHeads`, act on the explicit scores or pattern of the
chosen layer alone. A key that the mask forbids, or that an earlier edit took away, stays so whatever its score is
multiplied by.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from veena_lens.components.masks import add_bias, is_cut
from veena_lens.config import HookedVLMConfig
from veena_lens.interventions.base import Intervention, Place, content, require_layer, require_units, show
from veena_lens.interventions.numbers import bare, is_one, log, number, settle_units
from veena_lens.positions import parse

MODES = ("renorm", "logit", "scale", "mul", "abs")


def require_selections(item: Any) -> None:
    """Check the queries, keys, layer and heads of an edit of attention.

    Raises: ValueError or TypeError for a selection that is not understood."""
    parse(item.queries)
    parse(item.keys)
    settle_units(item)


def attention_site(cfg: HookedVLMConfig, item: Any, hook: str, heads: Sequence[int] | None = None) -> str:
    """Return a hook of the attention of an edit's layer.

    Raises: ValueError for a layer or a head that the model does not have."""
    who = type(item).__name__
    layer = require_layer(item.layer, cfg.n_layers, who)
    require_units(heads, cfg.n_heads, who, "head")
    return f"blocks.{layer}.attn.{hook}"


class AttentionEdit(Intervention):
    """An edit of scores or patterns: it acts from its queries to its keys, and edits of equal fields act alike."""

    def edit(
        self,
        activation: Float[Tensor, "batch n_heads query_pos key_pos"],
        at: Bool[Tensor, "batch query_pos"],
        keys: Bool[Tensor, "batch key_pos"] | None = None,
    ) -> Float[Tensor, "batch n_heads query_pos key_pos"]:
        """Return the edited scores or pattern, from the queries `at` to the `keys` (None: every key)."""
        raise NotImplementedError(f"{type(self).__name__} has no edit().")

    def edit_at(
        self, activation: Float[Tensor, "batch n_heads query_pos key_pos"], place: Place
    ) -> Float[Tensor, "batch n_heads query_pos key_pos"]:
        """Return the edit at the keys of the place."""
        return self.edit(activation, place.at, place.keys)

    @property
    def likeness(self) -> str | None:
        """Return the fields of the edit; None where one is a mask or a region."""
        found = content(self)
        return None if found is None else repr(found)


def places(
    heads: Sequence[int] | None,
    at: Bool[Tensor, "batch query_pos"],
    keys: Bool[Tensor, "batch key_pos"] | None,
    n_heads: int,
    n_key: int,
) -> Bool[Tensor, "batch n_heads query_pos key_pos"]:
    """Return True at the chosen heads (None: all), queries and keys (None: all)."""
    chosen = torch.ones(n_heads, dtype=torch.bool, device=at.device)
    if heads is not None:
        chosen = torch.zeros_like(chosen)
        chosen[[int(h) for h in heads]] = True
    keys = at.new_ones(len(at), n_key) if keys is None else keys.to(at.device)
    return at[:, None, :, None] & keys[:, None, None, :] & chosen[None, :, None, None]


@dataclass(frozen=True)
class BoostAttention(AttentionEdit):
    """Strengthen (or weaken) the attention of `heads` in `layer` from `queries` to `keys` by `factor`.

    heads: None for all. keys, queries: words, numbers, a slice, a mask, a Box or a Tile.
    factor: 1 changes nothing in any mode.
    mode: with scores s and weights A = softmax(s),

        renorm, logit   A' = factor A on the keys, the row renormalised; the same as s' = s + log(factor)
        scale           A' = factor A, not renormalised
        mul             s' = factor s (VAF, AdaptVis)
        abs             s' = s + (factor - 1)|s| (PAI)

    Rows without an image are not affected by keys="image".
    Raises: ValueError for an unknown mode, or a factor that is not positive in renorm and logit.
    """

    layer: SupportsIndex
    heads: Any = None
    keys: Any = "image"
    queries: Any = "query+generated"
    factor: Any = 2.0
    mode: str = "renorm"

    def __post_init__(self) -> None:
        require_selections(self)
        if self.mode not in MODES:
            raise ValueError(f"BoostAttention: mode={self.mode!r} must be one of {', '.join(MODES)}.")
        factor = number(self.factor, "BoostAttention", "factor", f"a positive number in mode {self.mode!r}")
        if self.is_bias and bare(factor) <= 0:
            raise ValueError(f"BoostAttention: factor={factor} must be a positive number in mode {self.mode!r}.")
        object.__setattr__(self, "factor", factor)

    @property
    def is_bias(self) -> bool:
        """Return True in the modes renorm and logit."""
        return self.mode in ("renorm", "logit")

    @property
    def positions(self) -> Any:
        """Return the query positions."""
        return self.queries

    def __repr__(self) -> str:
        return show(self)

    def site(self, cfg: HookedVLMConfig) -> str:
        """Return hook_pattern for scale, else hook_attn_scores of the layer (reached as a bias in renorm and logit)."""
        hook = "hook_pattern" if self.mode == "scale" else "hook_attn_scores"
        return attention_site(cfg, self, hook, self.heads)

    def edit(
        self,
        activation: Float[Tensor, "batch n_heads query_pos key_pos"],
        at: Bool[Tensor, "batch query_pos"],
        keys: Bool[Tensor, "batch key_pos"] | None = None,
    ) -> Float[Tensor, "batch n_heads query_pos key_pos"]:
        """Return boosted scores or pattern at the chosen heads, queries and keys (None: every key)."""
        place = places(self.heads, at, keys, activation.shape[1], activation.shape[-1])
        place = place & ~is_cut(activation)  # multiplied, the largest negative number would overflow or change its sign
        if self.mode == "abs":
            boosted = activation + (self.factor - 1) * activation.abs()
        elif self.is_bias:
            boosted = activation + log(self.factor)
        else:
            boosted = activation * self.factor
        return torch.where(place, boosted, activation)

    @property
    def changes_nothing(self) -> bool:
        """Return True for a factor of 1."""
        return is_one(self.factor)

    def bias(
        self,
        at: Bool[Tensor, "batch query_pos"],
        keys: Bool[Tensor, "batch key_pos"],
        n_heads: int,
        dtype: torch.dtype,
    ) -> Float[Tensor, "batch n_heads query_pos key_pos"]:
        """Return log(factor) at the chosen places, 0 elsewhere."""
        return places(self.heads, at, keys, n_heads, keys.shape[-1]).to(dtype) * log(self.factor)


@dataclass(frozen=True)
class KnockOutAttention(AttentionEdit):
    """Cut the attention of `heads` in `layer` from `queries` to `keys`; the other weights are renormalised.

    heads: None for all. keys, queries: words, numbers, a slice, a mask, a Box or a Tile.
    A query that would lose the last key that it reads keeps the attention that it has: earlier interventions of the
    list have acted on it, this one does not. Rows without an image are not affected by keys="image".
    Source: Geva et al. 2023, arXiv 2304.14767 (attention knockout).
    """

    layer: SupportsIndex
    heads: Any = None
    keys: Any = "image"
    queries: Any = "query+generated"

    def __post_init__(self) -> None:
        require_selections(self)

    @property
    def is_bias(self) -> bool:
        """Return True: a bias of minus infinity takes keys away."""
        return True

    @property
    def positions(self) -> Any:
        """Return the query positions."""
        return self.queries

    def __repr__(self) -> str:
        return show(self)

    def site(self, cfg: HookedVLMConfig) -> str:
        """Return hook_attn_scores of the layer, which is reached as a bias."""
        return attention_site(cfg, self, "hook_attn_scores", self.heads)

    def edit(
        self,
        activation: Float[Tensor, "batch n_heads query_pos key_pos"],
        at: Bool[Tensor, "batch query_pos"],
        keys: Bool[Tensor, "batch key_pos"] | None = None,
    ) -> Float[Tensor, "batch n_heads query_pos key_pos"]:
        """Return the scores with the chosen ones lowered so far that their weights are 0."""
        place = places(self.heads, at, keys, activation.shape[1], activation.shape[-1])
        return add_bias(activation, torch.zeros_like(activation).masked_fill(place, -math.inf))

    def bias(
        self,
        at: Bool[Tensor, "batch query_pos"],
        keys: Bool[Tensor, "batch key_pos"],
        n_heads: int,
        dtype: torch.dtype,
    ) -> Float[Tensor, "batch n_heads query_pos key_pos"]:
        """Return minus infinity at the chosen places, 0 elsewhere."""
        place = places(self.heads, at, keys, n_heads, keys.shape[-1])
        return torch.zeros(place.shape, dtype=dtype, device=place.device).masked_fill(place, -math.inf)


def _in_grains(mass: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """Return masses without the last digits, which rounding sets: else it would rank heads that attend alike."""
    grain = torch.finfo(mass.dtype).eps * (1 if mass.dtype in (torch.float16, torch.bfloat16) else 64)
    mantissa, exponent = torch.frexp(mass.double())
    return torch.ldexp((mantissa / grain).round() * grain, exponent)


@dataclass(frozen=True)
class SuppressHeads(AttentionEdit):
    """Scale the output of those heads of `layer` that attend least to `keys`, query by query.

    Which heads these are follows from the pattern of the very pass that is edited; of heads that attend alike, but for
    rounding, the first. A head's output is its row of the
    pattern times the values, so scaling the row scales the output.
    keep: the share of heads, int(keep * n_heads) at each query, that are left unchanged.
    factor: what the outputs of the others are multiplied by. keys, queries: words, numbers, a slice, a mask, a Box or
        a Tile.
    Queries that have none of the keys are not affected (in a row without an image, or before a generated token exists);
    a keep or a factor of 1 changes nothing.
    Raises: ValueError for a keep outside [0, 1], or a factor that is not finite.
    Source: Sarkar et al. 2025, arXiv 2505.16411 (SPIN).
    """

    layer: SupportsIndex
    keep: float | int = 0.95
    factor: Any = 0.0
    keys: Any = "image"
    queries: Any = "last+generated"

    def __post_init__(self) -> None:
        require_selections(self)
        if not 0 <= self.keep <= 1:
            raise ValueError(f"SuppressHeads: keep={self.keep} must be a share of the heads, 0 to 1.")
        object.__setattr__(self, "factor", number(self.factor, "SuppressHeads", "factor"))

    @property
    def positions(self) -> Any:
        """Return the query positions."""
        return self.queries

    def __repr__(self) -> str:
        return show(self)

    def site(self, cfg: HookedVLMConfig) -> str:
        """Return hook_pattern of the layer."""
        return attention_site(cfg, self, "hook_pattern")

    def edit(
        self,
        activation: Float[Tensor, "batch n_heads query_pos key_pos"],
        at: Bool[Tensor, "batch query_pos"],
        keys: Bool[Tensor, "batch key_pos"] | None = None,
        known: Bool[Tensor, "batch query_pos key_pos"] | None = None,
    ) -> Float[Tensor, "batch n_heads query_pos key_pos"]:
        """Return the pattern with the rows of the chosen heads scaled (keys None: every key; known: as of `Place`)."""
        n_heads = activation.shape[1]
        n_quiet = n_heads - int(self.keep * n_heads + 1e-9)  # 0.7 * 10 is a little under 7
        keys = at.new_ones(len(at), activation.shape[-1]) if keys is None else keys.to(at.device)
        mass = _in_grains((activation * keys[:, None, None, :].to(activation)).sum(-1))
        rank = mass.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
        there = keys[:, None] if known is None else keys[:, None] & known
        quiet = (rank < n_quiet) & (at & there.any(-1))[:, None]
        return torch.where(quiet[..., None], activation * self.factor, activation)

    def edit_at(
        self, activation: Float[Tensor, "batch n_heads query_pos key_pos"], place: Place
    ) -> Float[Tensor, "batch n_heads query_pos key_pos"]:
        """Return the edit at the keys of the place."""
        return self.edit(activation, place.at, place.keys, place.known)

    @property
    def changes_nothing(self) -> bool:
        """Return True for a factor of 1."""
        return is_one(self.factor)
