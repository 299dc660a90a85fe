"""Checkpoints whose weights are stored in few bits: what config.json says of it, and what running them takes.

Two packages' forms are read, bitsandbytes' (4 and 8 bits) and torchao's; weights stay packed in memory and the
package's own kernel multiplies them. Everything is checked before any weight is read.

Packed weights of a file: which of its entries make one weight, and the module that multiplies by it.

A weight in 4 bits of bitsandbytes is a row of bytes with its statistics beside it, one in 8 bits a matrix of small
integers with a scale a row, one of torchao a tensor of a class of its own that the file's header describes.
Parts of a fused weight (queries, keys, values) are rows of it: 8 bits are cut as they are, 4 bits are dequantised.
"""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from veena_lens.checkpoints.files import WeightFile
from veena_lens.components.quantised import QuantisedLinear

METHODS = ("bitsandbytes", "torchao")


@dataclass(frozen=True)
class Scheme:
    """How a checkpoint is quantised: a package's name and its settings in config.json."""

    method: str
    settings: Mapping[str, Any]

    @property
    def told(self) -> str:
        """The method with the setting that says most of it."""
        for name in ("load_in_4bit", "load_in_8bit"):
            if self.settings.get(name):
                return f"{self.method} ({name}=True)"
        kind = self.settings.get("quant_type")
        kind = kind.get("default", kind) if isinstance(kind, Mapping) else kind
        kind = kind.get("_type", kind) if isinstance(kind, Mapping) else kind
        return f"{self.method} (quant_type={kind!r})"


def scheme_of(hf_config: Any) -> Scheme | None:
    """What `quantization_config` of a Hugging Face configuration asks for; None without one.

    Raises: ValueError for a method that is not read, with what to do."""
    settings = getattr(hf_config, "quantization_config", None)
    if settings is None:
        return None
    settings = dict(settings if isinstance(settings, Mapping) else settings.to_dict())
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"  # files of 2023 leave the name out
    method = getattr(method, "value", method)
    if method not in METHODS:
        raise ValueError(
            f"The weights are quantised by {method!r} (quantization_config={settings!r}); weights of "
            f"{' and '.join(METHODS)} are read. Give such a checkpoint, or one of float weights."
        )
    return Scheme(method, settings)


def as_if_float(hf_config: Any) -> Any:
    """The configuration of the same model in float weights: what the model computes is not the packing's matter."""
    if getattr(hf_config, "quantization_config", None) is None:
        return hf_config
    plain = copy.deepcopy(hf_config)
    del plain.quantization_config
    return plain


def require_usable(scheme: Scheme, devices: Collection[torch.device], where: str) -> None:
    """Raises: ValueError where the package is missing, or does not run on a device that weights go to."""
    told = f"The weights of {where} are quantised by {scheme.told}"
    if find_spec(scheme.method) is None:
        raise ValueError(
            f"{told}, and {scheme.method} is not installed: `pip install {scheme.method}`, or give a checkpoint of "
            "float weights."
        )
    if scheme.method == "bitsandbytes":
        import bitsandbytes  # type: ignore[import-not-found]

        runs_on = getattr(bitsandbytes, "supported_torch_devices", {"cuda"})
        other = sorted({d.type for d in devices} - set(runs_on) - {"meta"})
        if other:
            raise ValueError(
                f"{told}; bitsandbytes {bitsandbytes.__version__} runs on {', '.join(sorted(runs_on))}, not on "
                f"{', '.join(other)}: pass another device, install a newer bitsandbytes, or give a checkpoint of float "
                "weights."
            )


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
