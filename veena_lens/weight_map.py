"""Where each native parameter lies in a Hugging Face checkpoint: ours on the left, theirs on the right.

Parameters keep Hugging Face's `[out, in]` layout, so a map is mostly names; where a tensor needs another
shape (a convolution read as a linear map) or is one of several stored together (fused q, k and v), that is stated
beside the name and undone on export.
An `Adapter` is one architecture's value: how to read its configuration, and its map.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veena_lens.config import HookedVLMConfig


@dataclass(frozen=True)
class WeightMap:
    """Native parameter name -> checkpoint key (in the names of `state_dict()` of today's transformers).

    `reshapes` gives, for a native name, the shape of the tensor in the checkpoint where it differs from the
    native one; the number of elements is the same. `parts` gives (i, n) for a native name that is the i-th of n
    equal parts, along the first axis, of a checkpoint tensor. Maps are joined with `|` and moved with `under`.
    """

    names: Mapping[str, str]
    reshapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    parts: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def under(self, ours: str, theirs: str) -> WeightMap:
        """The same map below two prefixes (without trailing dots; "" leaves names as they are)."""
        a, b = (f"{p}." if p else "" for p in (ours, theirs))
        return WeightMap(
            {a + name: b + key for name, key in self.names.items()},
            {a + name: shape for name, shape in self.reshapes.items()},
            {a + name: part for name, part in self.parts.items()},
        )

    def for_layers(self, layers: Iterable[int], ours: str = "blocks.{l}", theirs: str = "layers.{l}") -> WeightMap:
        """One copy a layer, `{l}` replaced in both prefixes."""
        joined = WeightMap({})
        for layer in layers:
            joined |= self.under(ours.format(l=layer), theirs.format(l=layer))
        return joined

    def __or__(self, other: WeightMap) -> WeightMap:
        both = self.names.keys() & other.names.keys()
        if both:
            raise ValueError(f"Two weight maps name the same parameter: {', '.join(sorted(both)[:5])}.")
        return WeightMap(
            {**self.names, **other.names}, {**self.reshapes, **other.reshapes}, {**self.parts, **other.parts}
        )

    @property
    def owners(self) -> dict[str, list[str]]:
        """Checkpoint key -> the native names that read it, parts in their order."""
        found: dict[str, list[str]] = {}
        for ours, theirs in self.names.items():
            found.setdefault(theirs, []).append(ours)
        return {key: sorted(ours, key=lambda o: self.parts.get(o, (0, 1))) for key, ours in found.items()}

    def stored_shape(self, ours: str, native: tuple[int, ...]) -> tuple[int, ...]:
        """Shape in the checkpoint of the tensor that holds a native parameter."""
        if ours in self.parts:
            return native[0] * self.parts[ours][1], *native[1:]
        return self.reshapes.get(ours, native)

    def part_of(self, ours: str, stored: Any) -> Any:
        """The native parameter's own part of the checkpoint tensor, a view."""
        if ours not in self.parts:
            return stored
        i, n = self.parts[ours]
        size = stored.shape[0] // n
        return stored[i * size : (i + 1) * size]

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self.names.items())

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        first = ", ".join(f"{a!r}: {b!r}" for a, b in list(self.names.items())[:3])
        return f"WeightMap({len(self)} names: {first}, ...)"


# Entries of old files that no model computes with any more (non-persistent buffers today).
HARMLESS_KEYS = (r"\.rotary_emb\.inv_freq$", r"\.position_ids$", r"\.masked_bias$")


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One Hugging Face architecture: how its configuration and weights become the native model's.

    `read_config` takes the Hugging Face config object; `weight_map` the native configuration; `renames` are
    (pattern, replacement) pairs applied in order to a file's keys, so that every layout a checkpoint was
    ever written in arrives at today's in-memory names. `hub_ids`, `note` and `tested` (what was compared with Hugging
    Face) are shown by `veena-lens models`.
    """

    architecture: str
    read_config: Callable[[Any], HookedVLMConfig]
    weight_map: Callable[[HookedVLMConfig], WeightMap]
    image_layout: str | None = None  # None: text only
    renames: tuple[tuple[str, str], ...] = ()
    harmless: tuple[str, ...] = HARMLESS_KEYS
    hub_ids: tuple[str, ...] = ()
    note: str = ""
    tested: str = ""

    def normalize(self, key: str) -> str:
        """Today's in-memory name of a checkpoint key, whatever layout the file has."""
        for pattern, replacement in self.renames:
            key = re.sub(pattern, replacement, key)
        return key

    def is_harmless(self, key: str) -> bool:
        """True for entries that a checkpoint may hold and no forward pass reads."""
        return any(re.search(pattern, key) for pattern in self.harmless)

    def __repr__(self) -> str:
        return f"Adapter({self.architecture}, image_layout={self.image_layout!r}, hub_ids={list(self.hub_ids)})"
