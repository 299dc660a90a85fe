"""Packed weights of a file: which of its entries make one weight, and the module that multiplies by it.

A weight in 4 bits of bitsandbytes is a row of bytes with its statistics beside it, one in 8 bits a matrix of small
integers with a scale a row, one of torchao a tensor of a class of its own that the file's header describes.
Parts of a fused weight (queries, keys, values) are rows of it: 8 bits are cut as they are, 4 bits are dequantised.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from veena_lens.checkpoints.files import WeightFile
from veena_lens.checkpoints.quantised import Scheme
from veena_lens.components.quantised import QuantisedLinear

FOUR_BITS = ".quant_state.bitsandbytes__"


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: where it lies, and what the header says of it."""

    file: WeightFile
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype | str

    def read(self) -> Tensor:
        """The tensor itself."""
        return next(tensor for _, tensor in self.file.tensors([self.key]))


@dataclass(frozen=True)
class PackedEntry:
    """A weight of several entries, under the names that its package gives them. `about`: how torchao describes it."""

    kind: str  # "4 bits", "8 bits" or "torchao"
    shape: tuple[int, ...]
    entries: Mapping[str, Entry]
    about: Mapping[str, Any] = field(default_factory=dict)


def find_packed(scheme: Scheme, entries: Mapping[str, Entry]) -> dict[str, PackedEntry]:
    """Today's name of a weight -> how it is packed, for every packed weight among a checkpoint's entries.

    Only 4 bits need a tensor read, the few bytes that hold a weight's shape."""
    found = dict(_of_torchao(entries)) if scheme.method == "torchao" else {}
    for name in entries if scheme.method == "bitsandbytes" else ():
        stem, _, kind = name.partition(FOUR_BITS)
        if kind:
            parts = {k.removeprefix(f"{stem}."): e for k, e in entries.items() if k.startswith(f"{stem}.")}
            state = json.loads(bytes(entries[name].read().tolist()))
            found[stem] = PackedEntry("4 bits", tuple(state["shape"]), {**parts, "": entries[stem]})
        elif name.endswith(".SCB"):
            stem = name.removesuffix("SCB")
            parts = {part: entries[stem + part] for part in ("SCB", "weight_format") if stem + part in entries}
            weight = entries[f"{stem}weight"]
            found[f"{stem}weight"] = PackedEntry("8 bits", weight.shape, {**parts, "": weight})
    return found


def _of_torchao(entries: Mapping[str, Entry]) -> Iterator[tuple[str, PackedEntry]]:
    """Each file's header describes its tensors under today's names, a weight's parts being `_weight_qdata` and kin."""
    described = {}
    for file in {e.file for e in entries.values()}:
        about = file.about()
        described |= {name: json.loads(about[name]) for name in json.loads(about.get("tensor_names", "[]"))}
    for name, about in described.items():
        parts = about.get("_tensor_data_names")
        if not parts:
            continue
        owner, _, leaf = name.rpartition(".")
        stored = {part: entries[f"{owner}._{leaf}_{part}"] for part in parts if f"{owner}._{leaf}_{part}" in entries}
        if "qdata" not in stored:
            continue
        yield name, PackedEntry("torchao", stored["qdata"].shape, stored, about)


class Packed(ABC):
    """A packed weight in memory, one a package's form."""

    @abstractmethod
    def dense(self) -> Float[Tensor, "out in"]:
        """The weight as numbers."""

    @abstractmethod
    def rows(self, part: tuple[int, int] | None) -> Packed | None:
        """The i-th of n equal parts of its rows (all of them: None), packed; None where this form cannot be cut."""

    @abstractmethod
    def linear(self, bias: Tensor | None, dtype: torch.dtype) -> QuantisedLinear:
        """The module that multiplies by it."""


def open_packed(scheme: Scheme, packed: PackedEntry, device: torch.device, dtype: torch.dtype) -> Packed:
    """Read a weight's entries onto a device."""
    tensors = {part: entry.read().to(device) for part, entry in packed.entries.items()}
    if packed.kind == "torchao":
        from veena_lens.checkpoints.packed_torchao import TorchaoWeight

        return TorchaoWeight.of(tensors, packed.about, dtype)
    from veena_lens.checkpoints.packed_bitsandbytes import EightBits, FourBits

    weight = tensors.pop("")
    if packed.kind == "8 bits":
        return EightBits(weight, tensors["SCB"], float(scheme.settings.get("llm_int8_threshold", 6.0)))
    return FourBits(weight, tensors, packed.shape, _compute_dtype(scheme))


def _compute_dtype(scheme: Scheme) -> torch.dtype:
    """The dtype in which 4 bits are multiplied (bitsandbytes' default is float32)."""
    named = scheme.settings.get("bnb_4bit_compute_dtype") or "float32"
    return named if isinstance(named, torch.dtype) else getattr(torch, str(named).removeprefix("torch."))


def bias_parameter(bias: Tensor | None) -> nn.Parameter | None:
    """A bias as the parameter of a module that is made without one."""
    return None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
