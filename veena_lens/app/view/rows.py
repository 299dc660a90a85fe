"""Where a view's attention comes from: a model that runs again, or a cache that holds patterns or queries and keys.

Each source passes attention rows on layer by layer and keeps none of them, so that 2,880 image tokens under 32 x 32
heads never exist as more than one layer's rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from veena_lens.activation_cache import ActivationCache, MissingActivation
from veena_lens.circuits.attention_maps import FEWEST_KEYS
from veena_lens.circuits.streamed_attention import stream_attention
from veena_lens.images.layout import runs_of_images
from veena_lens.inputs import MultimodalInputs

if TYPE_CHECKING:
    from veena_lens.model.model import HookedVLM

Consume = Callable[[int, slice, Float[Tensor, "head n key_pos"]], None]
PATTERN, QUERIES, KEYS = "attn.hook_pattern", "attn.hook_rot_q", "attn.hook_rot_k"
RULE = ("windows", "scale", "image_blocks")  # what else defines a model's attention
MOST_QUERIES = 256  # of a long prompt, that are asked for sinks


@runtime_checkable
class Rows(Protocol):
    """Attention rows of one row of a batch."""

    @property
    def n_layers(self) -> int: ...

    @property
    def n_heads(self) -> int: ...

    def stream(self, queries: Sequence[int], consume: Consume) -> None:
        """Give `consume(layer, which of the queries, weights [head n key_pos])`, layers in order."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelRows:
    """Rows that the model computes when asked, under the interventions that the view was made with."""

    model: HookedVLM
    inputs: MultimodalInputs
    interventions: Sequence[Any] = ()

    @property
    def n_layers(self) -> int:
        return self.model.cfg.n_layers

    @property
    def n_heads(self) -> int:
        return self.model.cfg.n_heads

    def stream(self, queries: Sequence[int], consume: Consume) -> None:
        """Run one forward pass; layers stay fused."""
        layers, heads = list(range(self.n_layers)), list(range(self.n_heads))

        def one(layer: int, at: slice, weights: Float[Tensor, "batch head n key_pos"]) -> None:
            consume(layer, at, weights[0])

        with self.model.intervene(list(self.interventions)):
            stream_attention(self.model, self.inputs, list(queries), layers, heads, one)


def rule_of(cfg: Any) -> dict[str, Any]:
    """Return what a cache of queries and keys does not say of a model's attention: the fields of `CachedRows`."""
    return {
        "windows": list(cfg.sliding_windows) or None,
        "scale": float(cfg.score_scale),
        "image_blocks": bool(cfg.bidirectional_images),
    }


@dataclass(frozen=True, kw_only=True, eq=False)
class CachedRows:
    """Rows of a cache: its patterns, or softmax(scale q k) of its rotated queries and keys.

    Where rows are computed: `windows`, one sliding window per layer (None: none); `scale`, of the scores (None: the
    head width to the power -1/2); `image_blocks`, that an image's tokens read each other in both directions.
    Raises: MissingActivation where it holds neither for every layer; ValueError without its inputs."""

    cache: ActivationCache
    row: int = 0
    windows: Sequence[int | None] | None = None
    scale: float | None = None
    image_blocks: bool = False

    def __post_init__(self) -> None:
        if self.cache.inputs is None:
            raise ValueError("This cache was sliced or made without its inputs, so its images and tokens are unknown.")
        if self.n_layers == 0 or not (self._holds(PATTERN) or (self._holds(QUERIES) and self._holds(KEYS))):
            raise MissingActivation(
                "The cache holds no attention: cache every layer's attn.hook_pattern, or attn.hook_rot_q and "
                "attn.hook_rot_k (smaller where the prompt is long), with names_filter=lambda name: "
                "name.endswith(('attn.hook_rot_q', 'attn.hook_rot_k', 'hook_resid_post'))."
            )

    @property
    def n_layers(self) -> int:
        return self.cache._n_layers()

    @property
    def n_heads(self) -> int:
        pattern = self._holds(PATTERN)
        value = self._of(0, PATTERN if pattern else QUERIES)
        return value.shape[0] if pattern else value.shape[1]

    def _holds(self, part: str) -> bool:
        return all(f"blocks.{i}.{part}" in self.cache.cache_dict for i in range(self.n_layers))

    def _of(self, layer: int, part: str) -> Tensor:
        value = self.cache.cache_dict[f"blocks.{layer}.{part}"]
        return value[self.row] if self.cache.has_batch_dim else value

    def stream(self, queries: Sequence[int], consume: Consume) -> None:
        """Read layer after layer from the cache."""
        whole, patterns = slice(0, len(queries)), self._holds(PATTERN)
        for layer in range(self.n_layers):
            if patterns:
                consume(layer, whole, self._of(layer, PATTERN)[:, list(queries)])
            else:
                consume(layer, whole, self._computed(layer, list(queries)))

    def _computed(self, layer: int, queries: list[int]) -> Float[Tensor, "head n key_pos"]:
        q, k = self._of(layer, QUERIES)[queries].float(), self._of(layer, KEYS).float()
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = torch.einsum("nhd,khd->hnk", q, k) * (q.shape[-1] ** -0.5 if self.scale is None else self.scale)
        allowed = self._allowed(layer, queries, k.shape[0])[None].to(scores.device)
        # A query that may see nothing is a pad: its row is zeros, as the fused kernel gives.
        return scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0.0)

    def _allowed(self, layer: int, queries: list[int], n_key: int) -> Bool[Tensor, "n key_pos"]:
        assert self.cache.inputs is not None
        at, keys = torch.tensor(queries)[:, None], torch.arange(n_key)
        allowed = keys <= at
        if self.image_blocks:
            block = runs_of_images(self.cache.inputs)[self.row].cpu()
            allowed = allowed | ((block[at] == block) & (block >= 0))
        allowed = allowed & self.cache.inputs.attention_mask[self.row].cpu()
        window = None if self.windows is None else self.windows[layer]
        return allowed if window is None else allowed & (keys > at - window)


def sink_queries(mask: Bool[Tensor, " pos"]) -> list[int]:
    """Choose the queries that find sinks: all of a short prompt, of a long one evenly spaced ones and the last.

    A sink takes from nearly every query, so a sample finds it; all of 2,880 would cost minutes on a CPU."""
    there = mask.nonzero().flatten().tolist()
    step = -(-len(there) // MOST_QUERIES)
    return there if step == 1 else sorted({*there[step - 1 :: step], there[-1]})


def cached_sinks(
    rows: Rows,
    norms: Float[Tensor, "layer pos"],
    mask: Bool[Tensor, " pos"],
    multiple: float | int = 10.0,
    share: float | int = 0.8,
    norm_multiple: float | int = 5.0,
) -> list[list[int]]:
    """Find attention sinks of every layer by the rule of `veena_lens.circuits.attention_sinks`, from a cache alone.

    norms: of the residual that enters each layer."""
    hits, pairs = [torch.zeros(rows.n_layers, len(mask)) for _ in range(2)]
    queries = sink_queries(mask)
    size = max(1, 2**24 // (rows.n_heads * len(mask)))
    for start in range(0, len(queries), size):
        mine = queries[start : start + size]

        def count(layer: int, at: slice, weights: Float[Tensor, "head n key_pos"], mine: list[int] = mine) -> None:
            sees = weights > 0
            usual = torch.where(sees, weights, torch.nan).nanmedian(-1, keepdim=True).values
            later = torch.arange(weights.shape[-1]) < torch.tensor(mine[at])[:, None]
            counts = sees & later.to(sees.device) & (sees.sum(-1, keepdim=True) >= FEWEST_KEYS)
            hits[layer] += (counts & (weights > multiple * usual)).sum((0, 1)).cpu()
            pairs[layer] += counts.sum((0, 1)).cpu()

        rows.stream(mine, count)
    usual = torch.where(mask, norms, torch.nan).nanmedian(-1, keepdim=True).values
    found = (pairs > 0) & (hits >= share * pairs) & (norms > norm_multiple * usual) & mask
    return [layer.nonzero().flatten().tolist() for layer in found]
