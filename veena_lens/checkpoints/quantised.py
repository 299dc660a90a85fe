"""Load checkpoints whose weights are stored in 4 or 8 bits, by bitsandbytes or torchao.

1. `scheme_of` reads from config.json how the weights are quantised; `require_usable` checks that the package is there.
2. `find_packed` finds the entries of the files that make one weight: in 4 bits of bitsandbytes a row of bytes with its
   statistics, in 8 bits a matrix of small integers with one scale per row, in torchao a tensor that the file's header
   describes.
3. `open_packed` reads a weight; `Packed.linear` returns the module that multiplies by it with the package's kernel.

Weights stay packed in memory. Parts of a fused weight (queries, keys, values) are rows of it: 8-bit and torchao weights
are split, 4-bit ones are dequantised. Both packages are optional and imported where they are used.
"""

from __future__ import annotations

import copy
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from reprlib import repr as short_repr
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from veena_lens.checkpoints.files import WeightFile
from veena_lens.checkpoints.finite import dtype_of, require_finite
from veena_lens.components.quantised import QuantisedLinear
from veena_lens.regular_files import json_object, parse_json

METHODS = ("bitsandbytes", "torchao")


@dataclass(frozen=True)
class Scheme:
    """Describe how a checkpoint is quantised: the package and its settings in config.json."""

    method: str
    settings: Mapping[str, Any]

    @property
    def summary(self) -> str:
        """Return the method with its most important setting."""
        for name in ("load_in_4bit", "load_in_8bit"):
            if self.settings.get(name):
                return f"{self.method} ({name}=True)"
        kind = self.settings.get("quant_type")
        kind = kind.get("default", kind) if isinstance(kind, Mapping) else kind
        kind = kind.get("_type", kind) if isinstance(kind, Mapping) else kind
        return f"{self.method} (quant_type={kind!r})"


def scheme_of(hf_config: Any) -> Scheme | None:
    """Return the scheme in `quantization_config` of a Hugging Face configuration; None without one.

    Raises: ValueError for a method other than bitsandbytes and torchao."""
    settings = getattr(hf_config, "quantization_config", None)
    if settings is None:
        return None
    if not isinstance(settings, Mapping) and not hasattr(settings, "to_dict"):
        raise ValueError(f"quantization_config is {settings!r}; expected an object with quant_method.")
    settings = dict(settings if isinstance(settings, Mapping) else settings.to_dict())
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"  # files of 2023 leave the name out
    method = getattr(method, "value", method)
    if method not in METHODS:
        raise ValueError(
            f"The weights are quantised by {method!r} (quantization_config={settings!r}); only "
            f"weights of {' and '.join(METHODS)} can be loaded. Use such a checkpoint, or one with float weights."
        )
    return Scheme(method, settings)


def as_if_float(hf_config: Any) -> Any:
    """Return the configuration of the same model with float weights, as adapters read it."""
    if getattr(hf_config, "quantization_config", None) is None:
        return hf_config
    plain = copy.deepcopy(hf_config)
    del plain.quantization_config
    return plain


def require_usable(scheme: Scheme, devices: Collection[torch.device], where: str) -> None:
    """Check that the package is installed and runs on the devices of the weights. Raises: ValueError otherwise."""
    problem = f"The weights of {where} are quantised by {scheme.summary}"
    if find_spec(scheme.method) is None:
        raise ValueError(
            f"{problem}, but {scheme.method} is not installed: run `pip install {scheme.method}`, or use a checkpoint "
            "with float weights."
        )
    if scheme.method == "bitsandbytes":
        bitsandbytes = import_module("bitsandbytes")
        runs_on = getattr(bitsandbytes, "supported_torch_devices", {"cuda"})
        other = sorted({d.type for d in devices} - set(runs_on) - {"meta"})
        if other:
            raise ValueError(
                f"{problem}; bitsandbytes {bitsandbytes.__version__} runs on {', '.join(sorted(runs_on))}, not on "
                f"{', '.join(other)}: pass another device, install a newer bitsandbytes, or use a checkpoint with "
                "float weights."
            )


FOUR_BITS = ".quant_state.bitsandbytes__"


@dataclass(frozen=True)
class Entry:
    """Describe a tensor of a file, from the file's header."""

    file: WeightFile
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype | str

    def read(self) -> Tensor:
        """Read the tensor."""
        return next(tensor for _, tensor in self.file.tensors([self.key]))


@dataclass(frozen=True)
class PackedEntry:
    """Hold the entries of one weight under the names that its package gives them; `about` is torchao's description."""

    kind: str  # "4 bits", "8 bits" or "torchao"
    shape: tuple[int, ...]
    entries: Mapping[str, Entry]
    about: Mapping[str, Any] = field(default_factory=dict)


def find_packed(scheme: Scheme, entries: Mapping[str, Entry]) -> dict[str, PackedEntry]:
    """Return every packed weight among a checkpoint's entries, by its name in today's transformers.

    The only tensors read are the few bytes that hold the shape of a 4-bit weight."""
    found = dict(_of_torchao(entries)) if scheme.method == "torchao" else {}
    for name in entries if scheme.method == "bitsandbytes" else ():
        stem, _, kind = name.partition(FOUR_BITS)
        if kind:
            parts = {k.removeprefix(f"{stem}."): e for k, e in entries.items() if k.startswith(f"{stem}.")}
            found[stem] = _four_bits(name, {**parts, "": _entry(entries, stem, name)})
        elif name.endswith(".SCB"):
            stem = name.removesuffix("SCB")
            parts = {part: entries[stem + part] for part in ("SCB", "weight_format") if stem + part in entries}
            weight = _entry(entries, f"{stem}weight", name)
            if len(weight.shape) != 2 or entries[name].shape != weight.shape[:1] or weight.dtype != torch.int8:
                raise _unfit(name, f"one scale per row of {list(weight.shape)} in 8 bits", list(entries[name].shape))
            found[f"{stem}weight"] = PackedEntry("8 bits", weight.shape, {**parts, "": weight})
    return found


def _entry(entries: Mapping[str, Entry], name: str, needed_by: str) -> Entry:
    if name not in entries:
        raise ValueError(f"The packed weights lack {name}, which {needed_by} describes; download them again.")
    return entries[name]


def _unfit(name: str, wanted: str, found: Any) -> ValueError:
    return ValueError(f"The packed weights do not fit: {name} should hold {wanted}, and holds {found}.")


def _four_bits(name: str, entries: dict[str, Entry]) -> PackedEntry:
    """Return a 4-bit weight whose bytes and scales are as many as its shape needs: the kernels do not count them."""
    stem, mark, kind = name.partition(FOUR_BITS)
    held = entries[mark[1:] + kind]
    if math.prod(held.shape) > 10_000 or held.dtype != torch.uint8:
        raise _unfit(name, "a few bytes", f"{list(held.shape)} of {held.dtype}")
    state = json_object(bytes(held.read().flatten().tolist()), name)
    shape, block = state.get("shape"), state.get("blocksize")
    nested = state.get("nested_blocksize")
    sizes = [block] if nested is None else [block, nested]
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and n > 0 for n in [*shape, *sizes]):
        raise _unfit(name, "a shape of two numbers and a blocksize", short_repr(state))
    n = shape[0] * shape[1]
    blocks = -(-n // sizes[0])
    wanted = {"": -(-n // 2), "absmax": blocks, "quant_map": 16}
    if nested is not None:
        wanted |= {"nested_absmax": -(-blocks // nested), "nested_quant_map": 256}
    for part, size in wanted.items():
        found = math.prod(entries[part].shape) * _itemsize(entries[part]) if part in entries else 0
        size *= _itemsize(entries[part]) if part in entries and part else 1
        if found != size:
            raise _unfit(f"{stem}.{part}".rstrip("."), f"{size:,} bytes", f"{found:,}")
    return PackedEntry("4 bits", tuple(shape), entries)


def _itemsize(entry: Entry) -> int:
    return entry.dtype.itemsize if isinstance(entry.dtype, torch.dtype) else 0


def _of_torchao(entries: Mapping[str, Entry]) -> Iterator[tuple[str, PackedEntry]]:
    """Yield the weights that the headers describe; the parts of a weight are `_weight_qdata` and similar entries."""
    described = {}
    for file in {e.file for e in entries.values()}:
        about = file.about()
        names = parse_json(about.get("tensor_names", "[]"), f"tensor_names of {file.path}")
        if not isinstance(names, list) or not all(isinstance(name, str) and name in about for name in names):
            raise ValueError(f"{file.path}: its header lacks a description of some of its tensors.")
        described |= {name: json_object(about[name], f"{name} of {file.path}") for name in names}
    for name, about in described.items():
        parts = about.get("_tensor_data_names")
        if not isinstance(parts, list) or not parts:
            continue
        owner, _, leaf = name.rpartition(".")
        stored = {part: entries[f"{owner}._{leaf}_{part}"] for part in parts if f"{owner}._{leaf}_{part}" in entries}
        if "qdata" not in stored:
            continue
        yield name, PackedEntry("torchao", stored["qdata"].shape, stored, about)


class Packed(ABC):
    """Interface of a packed weight in memory; each form of each package is one class."""

    @abstractmethod
    def dense(self) -> Float[Tensor, "out in"]:
        """Return the dequantised weight."""

    @abstractmethod
    def rows(self, part: tuple[int, int] | None) -> Packed | None:
        """Return part (i, n), the i-th of n equal parts of the rows (None: all rows); None if it cannot be split."""

    @abstractmethod
    def linear(self, bias: Tensor | None, dtype: torch.dtype) -> QuantisedLinear:
        """Return the module that multiplies by the weight."""


def open_packed(scheme: Scheme, packed: PackedEntry, device: torch.device, dtype: torch.dtype) -> Packed:
    """Read the entries of a weight onto a device."""
    tensors = {part: entry.read().to(device) for part, entry in packed.entries.items()}
    for part, tensor in tensors.items():
        require_finite(tensor, packed.entries[part].key, str(packed.entries[part].file.path))
    if packed.kind == "torchao":
        try:
            return TorchaoWeight.of(tensors, packed.about, dtype)
        except (TypeError, KeyError, AttributeError, IndexError, RuntimeError) as error:
            key = packed.entries["qdata"].key
            raise ValueError(f"torchao cannot read {key}: {type(error).__name__}: {error}") from error
    weight = tensors.pop("")
    if packed.kind == "8 bits":
        threshold = scheme.settings.get("llm_int8_threshold", 6.0)
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not math.isfinite(threshold):
            raise ValueError(f"llm_int8_threshold is {threshold!r}; expected a finite number.")
        return EightBits(weight, tensors["SCB"], float(threshold))
    return FourBits(weight, tensors, packed.shape, _compute_dtype(scheme))


def _compute_dtype(scheme: Scheme) -> torch.dtype:
    """Return the dtype in which 4-bit weights are multiplied (bitsandbytes' default is float32)."""
    named = scheme.settings.get("bnb_4bit_compute_dtype") or "float32"
    found = dtype_of(named if isinstance(named, torch.dtype) else str(named))
    assert found is not None
    return found


def bias_parameter(bias: Tensor | None) -> nn.Parameter | None:
    """Return a bias as a parameter, for a module made without one."""
    return None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)


# --- bitsandbytes (Dettmers et al. 2022, arXiv 2208.07339; 2023, arXiv 2305.14314), by its own modules ---

BLOCK = 64  # numbers per scale


@dataclass(frozen=True, eq=False)
class FourBits(Packed):
    """Hold a 4-bit weight. Blocks of 64 numbers share a scale; parts may begin inside a block, so it is not split."""

    data: Tensor
    statistics: dict[str, Tensor]
    shape: tuple[int, ...]
    compute_dtype: torch.dtype

    def dense(self) -> Float[Tensor, "out in"]:
        bnb = import_module("bitsandbytes")

        state = bnb.functional.QuantState.from_dict(dict(self.statistics), device=self.data.device)
        return _dense_blocks(self.data, state)

    def rows(self, part: tuple[int, int] | None) -> Packed | None:
        # Unless a row is a whole number of blocks, the package's CPU kernel (0.50) applies wrong scales.
        whole = self.shape[1] % BLOCK == 0 or self.data.device.type != "cpu"
        return self if part is None and whole else None

    def linear(self, bias: Tensor | None, dtype: torch.dtype) -> QuantisedLinear:
        bnb = import_module("bitsandbytes")

        out_features, in_features = self.shape
        inner = bnb.nn.Linear4bit(
            in_features, out_features, bias=False, compute_dtype=self.compute_dtype, device="meta"
        )
        inner.weight = bnb.nn.Params4bit.from_prequantized(
            self.data, dict(self.statistics), device=self.data.device, module=inner
        )
        # On some processors the first forward pass would reorder the bytes, and `dense` could not read them.
        inner.support_avx512bf16_for_cpu = False
        inner.bias = bias_parameter(bias)

        def dense(module: Any) -> Tensor:
            return _dense_blocks(module.weight.data, module.weight.quant_state).to(dtype)

        return QuantisedLinear(inner, dense, in_features, out_features)


@dataclass(frozen=True, eq=False)
class EightBits(Packed):
    """Hold an 8-bit weight: rows of integers, and for each row the absolute value that 127 stands for."""

    data: Tensor
    largest: Float[Tensor, " out"]
    threshold: float

    def dense(self) -> Float[Tensor, "out in"]:
        return _dense_rows(self.data, self.largest)

    def rows(self, part: tuple[int, int] | None) -> Packed | None:
        if part is None:
            return self
        size = len(self.data) // part[1]
        at = slice(part[0] * size, (part[0] + 1) * size)
        return EightBits(self.data[at].clone(), self.largest[at].clone(), self.threshold)

    def linear(self, bias: Tensor | None, dtype: torch.dtype) -> QuantisedLinear:
        bnb = import_module("bitsandbytes")

        out_features, in_features = self.data.shape
        inner = bnb.nn.Linear8bitLt(
            in_features, out_features, bias=False, has_fp16_weights=False, threshold=self.threshold, device="meta"
        )
        inner.weight = bnb.nn.Int8Params(
            self.data, requires_grad=False, has_fp16_weights=False, CB=self.data, SCB=self.largest
        )
        inner.bias = bias_parameter(bias)

        def dense(module: Any) -> Tensor:
            largest = module.weight.SCB if module.weight.SCB is not None else module.state.SCB  # moved at first use
            return _dense_rows(module.weight.data, largest).to(dtype)

        return QuantisedLinear(inner, dense, in_features, out_features)


def _dense_blocks(data: Tensor, state: Any) -> Float[Tensor, "out in"]:
    """Dequantise as one row per block, a shape that every kernel of the package handles correctly."""
    bnb = import_module("bitsandbytes")

    shape, flat = tuple(state.shape), copy.copy(state)
    n = shape[0] * shape[1]
    flat.shape = torch.Size([n // state.blocksize, state.blocksize] if n % state.blocksize == 0 else [1, n])
    return bnb.functional.dequantize_4bit(data, flat).reshape(shape)


def _dense_rows(data: Tensor, largest: Tensor) -> Float[Tensor, "out in"]:
    return data.float() * (largest[:, None] / 127)


# --- torchao, by tensors of its own classes ---


@dataclass(frozen=True, eq=False)
class TorchaoWeight(Packed):
    """Hold a weight as one of torchao's tensors."""

    tensor: Any

    @classmethod
    def of(cls, parts: Mapping[str, Tensor], about: Mapping[str, Any], dtype: torch.dtype) -> TorchaoWeight:
        """Return the weight of a file's parts and the description in its header."""
        support = import_module("torchao.prototype.safetensors.safetensors_support")

        header = {"w.weight": json.dumps(about), "tensor_names": json.dumps(["w.weight"])}
        made = support.unflatten_tensor_state_dict({f"w._weight_{part}": t for part, t in parts.items()}, header)
        tensor = (made[0] if isinstance(made, tuple) else made)["w.weight"]
        return cls(tensor.to(dtype) if tensor.dtype != dtype else tensor)

    def dense(self) -> Float[Tensor, "out in"]:
        return self.tensor.dequantize()

    def rows(self, part: tuple[int, int] | None) -> Packed | None:
        if part is None:
            return self
        size = self.tensor.shape[0] // part[1]
        try:
            return TorchaoWeight(self.tensor[part[0] * size : (part[0] + 1) * size])
        except NotImplementedError:  # this class of tensor cannot be sliced
            return None

    def linear(self, bias: Tensor | None, dtype: torch.dtype) -> QuantisedLinear:
        out_features, in_features = self.tensor.shape
        inner: Any = nn.Linear(in_features, out_features, bias=False, device="meta")
        inner.weight = nn.Parameter(self.tensor, requires_grad=False)
        inner.bias = bias_parameter(bias)
        return QuantisedLinear(inner, lambda module: module.weight.dequantize().to(dtype), in_features, out_features)
