"""Map native parameters to the keys of a Hugging Face checkpoint: ours on the left, theirs on the right.

Parameters keep Hugging Face's `[out, in]` layout, so a map consists mostly of names. If a tensor needs another shape (a
convolution read as a linear map) or is one of several stored together (fused q, k and v), the map says so, and export
reverses it. An `Adapter` describes one architecture: how to read its configuration, and its map.
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
    """Map native parameter names to checkpoint keys (the names of `state_dict()` in today's transformers).

    names: native name -> checkpoint key.
    reshapes: native name -> the shape of the tensor in the checkpoint, if it differs from the native one; the number of
        elements is the same.
    parts: native name -> (i, n), if it is the i-th of n equal parts of a checkpoint tensor along the first axis.

    Maps are joined with `|` and moved with `under`."""

    names: Mapping[str, str]
    reshapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    parts: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def under(self, ours: str, theirs: str) -> WeightMap:
        """Return the map below two prefixes (without trailing dots; "" leaves names unchanged)."""
        a, b = (f"{p}." if p else "" for p in (ours, theirs))
        return WeightMap(
            {a + name: b + key for name, key in self.names.items()},
            {a + name: shape for name, shape in self.reshapes.items()},
            {a + name: part for name, part in self.parts.items()},
        )

    def for_layers(self, layers: Iterable[int], ours: str = "blocks.{l}", theirs: str = "layers.{l}") -> WeightMap:
        """Return one copy per layer, with `{l}` replaced in both prefixes."""
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
        """Return the native names that read each checkpoint key, parts in order."""
        found: dict[str, list[str]] = {}
        for ours, theirs in self.names.items():
            found.setdefault(theirs, []).append(ours)
        return {key: sorted(ours, key=lambda o: self.parts.get(o, (0, 1))) for key, ours in found.items()}

    def stored_shape(self, ours: str, native: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the checkpoint tensor that holds a native parameter."""
        if ours in self.parts:
            return native[0] * self.parts[ours][1], *native[1:]
        return self.reshapes.get(ours, native)

    def part_of(self, ours: str, stored: Any) -> Any:
        """Return the part of a checkpoint tensor that is a native parameter, as a view."""
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


# Entries of old files that models no longer use (non-persistent buffers today).
HARMLESS_KEYS = (r"\.rotary_emb\.inv_freq$", r"\.position_ids$", r"\.masked_bias$")


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """Describe one Hugging Face architecture: how its configuration and weights become the native model's.

    architecture: Hugging Face's class name.
    read_config: from the Hugging Face config object to the native configuration.
    weight_map: from the native configuration to the map of its weights.
    image_layout: how images become tokens. None: text only.
    renames: (pattern, replacement) pairs, applied in order to a file's keys, which translate every layout that a
        checkpoint was ever written in to today's names.
    harmless: patterns of entries that no forward pass reads.
    hub_ids, note, tested: shown by `veena-lens models`; `tested` says what was compared with Hugging Face."""

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
        """Return today's name of a checkpoint key, whatever the layout of the file."""
        for pattern, replacement in self.renames:
            key = re.sub(pattern, replacement, key)
        return key

    def is_harmless(self, key: str) -> bool:
        """Return True for entries that a checkpoint may have and no forward pass reads."""
        return any(re.search(pattern, key) for pattern in self.harmless)

    def __repr__(self) -> str:
        return f"Adapter({self.architecture}, image_layout={self.image_layout!r}, hub_ids={list(self.hub_ids)})"
