"""Fill an empty model: check every key and shape, then read the tensors one by one.

The model is created on the meta device. On a CPU, tensors that need no conversion stay in their files, mapped; others
take memory one by one, or go to their device. All mismatches are listed at once: key, expected shape, shape found.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from veena_lens.checkpoints.files import Folder, WeightFile, fetch_weights, weight_files
from veena_lens.checkpoints.finite import FLOATS, dtype_of, require_finite
from veena_lens.checkpoints.lora import Change, Lora, changes_of
from veena_lens.checkpoints.mapped import MappedFile
from veena_lens.checkpoints.quantised import (
    Entry,
    PackedEntry,
    Scheme,
    find_packed,
    open_packed,
    require_usable,
    scheme_of,
)
from veena_lens.config import HookedVLMConfig
from veena_lens.memory import free_memory, in_words
from veena_lens.weight_map import Adapter, WeightMap

Shape = tuple[int, ...]
HEAD = "lm_head.weight"


def parameter_shapes(module: nn.Module) -> dict[str, Shape]:
    """Return native name -> shape; a shared (tied) parameter appears once."""
    return {name: tuple(p.shape) for name, p in module.named_parameters()}


def require_fit(
    module: nn.Module,
    found: Mapping[str, Shape],
    adapter: Adapter,
    weights: WeightMap,
    where: str,
    further: Sequence[str] = (),
) -> None:
    """Check that keys and shapes of a checkpoint fit the model.

    Raises: ValueError that lists every missing, spare and misshapen key, and the lines of `further`."""
    wanted = parameter_shapes(module)
    unmapped = sorted(wanted.keys() - weights.names.keys())
    unknown = sorted(weights.names.keys() - wanted.keys())
    if unmapped or unknown:
        raise ValueError(
            f"The weight map of {adapter.architecture} lacks {unmapped} and has the unknown names {unknown}."
        )
    problems = list(further)
    for theirs, (ours, *_) in weights.owners.items():
        shape = weights.stored_shape(ours, wanted[ours])
        if theirs not in found:
            problems.append(f"missing   {theirs}: wanted {list(shape)}")
        elif found[theirs] != shape and not (ours in weights.reshapes and found[theirs] == wanted[ours]):
            problems.append(f"misshapen {theirs}: wanted {list(shape)}, found {list(found[theirs])}")
    known = set(weights.names.values())
    for theirs, shape in found.items():
        if theirs not in known and not adapter.is_harmless(theirs) and not _is_tied_head(theirs, known):
            problems.append(f"spare     {theirs}: found {list(shape)}, not in {adapter.architecture}")
    if problems:
        raise ValueError(f"The weights of {where} do not fit ({len(problems)} keys):\n  " + "\n  ".join(problems))


def _is_tied_head(key: str, known: set[str]) -> bool:
    """Return whether a key is a stored copy of a tied unembedding; its values are compared when they are read."""
    return key == HEAD and key not in known


SPARE_LAYERS = 64  # quickly built, whatever the weights hold


def require_layers(checkpoint: Any) -> None:
    """Refuse a configuration with many more layers than its weights hold, before a model of so many is built.

    checkpoint: as `open_checkpoint` returns it; weights that are not there yet, or pickled, are not read.

    Raises: ValueError with both numbers."""
    tower = checkpoint.cfg.vision
    wanted = {"decoder": checkpoint.cfg.n_layers, "vision tower": 0 if tower is None else tower.n_layers}
    if max(wanted.values()) <= SPARE_LAYERS:
        return
    files = [path for path in weight_files(checkpoint.path) if path.suffix == ".safetensors"]
    keys = {key for path in files for key in WeightFile(path).shapes()}
    found = 1 + max((int(number) for key in keys for number in re.findall(r"\.(\d{1,9})\.", key)), default=-1)
    for part, n in wanted.items():
        if keys and n > max(SPARE_LAYERS, 2 * found):
            raise ValueError(
                f"{checkpoint.path / 'config.json'} has {n:,} layers in the {part}; the weights beside it have at most "
                f"{found:,}. One of the two is of another model."
            )


def set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter by a tensor."""
    owner, _, leaf = name.rpartition(".")
    part = module.get_submodule(owner)
    old = getattr(part, leaf)
    part._parameters[leaf] = nn.Parameter(value.reshape(old.shape), requires_grad=value.is_floating_point())


def fill_from_files(
    module: nn.Module,
    checkpoint: Any,
    *,
    dtype: torch.dtype | str | None,
    device: Any,
    device_map: Any = None,
    lora: Lora | None = None,
) -> None:
    """Read a checkpoint's tensors into a model on the meta device; `module.device_map` records the placement.

    module: the empty model.
    checkpoint: as `open_checkpoint` returns it.
    dtype: of the weights, or its name. None: as stored; if the file mixes dtypes, the one that config.json names,
        else the most common one.
    device: where all weights go. None: cpu.
    device_map: "auto", or module name -> device, to spread the blocks.
    lora: an adapter that is merged into the weights it tunes; packed ones among them are dequantised.

    Raises: FileNotFoundError without weight files; ValueError for weights that do not fit; MemoryError where they would
        not fit in memory, before they are read."""
    adapter, folder, scheme = checkpoint.adapter, checkpoint.path, scheme_of(checkpoint.hf_config)
    if scheme is not None:
        require_usable(scheme, (), str(folder))
    files = [WeightFile(p) for p in fetch_weights(Folder(folder, checkpoint.hub_id, checkpoint.revision))]
    weights = adapter.weight_map(checkpoint.cfg)
    entries, doubled = _entries(files, adapter)
    packed = {} if scheme is None else find_packed(scheme, entries)
    parts = {entry for p in packed.values() for entry in p.entries.values()}
    plain = {name: entry for name, entry in entries.items() if entry not in parts}
    shapes = {name: entry.shape for name, entry in plain.items()} | {name: p.shape for name, p in packed.items()}
    require_fit(module, shapes, adapter, weights, str(folder), [*doubled, *_quantised(weights, plain)])
    changes = {} if lora is None else changes_of(lora, adapter, weights, shapes)
    owners = weights.owners
    target = dtype_of(dtype) or stored_dtype(
        [plain[theirs].dtype for theirs in owners if theirs in plain], checkpoint.hf_config
    )
    devices = device_of_each(module, device, device_map, target)
    if scheme is not None:
        require_usable(scheme, {devices(ours) for theirs in packed for ours in owners.get(theirs, ())}, str(folder))
    require_room(module, {ours for name in plain for ours in owners.get(name, ())}, devices, target, str(folder))
    head: Tensor | None = None
    mapped = []
    for file in files:
        mine = {e.key: name for name, e in plain.items() if e.file is file and (name in owners or name == HEAD)}
        record, stays = MappedFile.of(file.path), {}
        for key, tensor in file.tensors(list(mine)):
            if mine[key] not in owners:
                head = tensor
                continue
            if mine[key] in changes:
                tensor = changes[mine[key]].of(tensor, target)
            for ours in owners[mine[key]]:
                part = weights.part_of(ours, tensor)
                placed = part.to(device=devices(ours), dtype=target)
                shares = placed.data_ptr() == part.data_ptr() and mine[key] not in changes
                if shares and record.is_small:
                    placed, shares = placed.clone(), False
                if shares and file.is_mapped:
                    record.places[ours] = placed.data_ptr()
                    stays[key] = tensor.dtype
                else:
                    require_finite(placed, key, str(file.path))
                set_parameter(module, ours, placed)
        if stays:
            record.require_finite(stays)
            mapped.append(record)
    for theirs in packed.keys() & owners.keys():
        assert scheme is not None
        _place_packed(module, weights, theirs, scheme, packed[theirs], devices, target, changes.get(theirs))
    if head is not None:
        _require_tied(module, head, str(folder))
    cast(Any, module).device_map, cast(Any, module).mapped_files = devices.map, tuple(mapped)


def require_room(
    module: nn.Module, names: Collection[str], devices: Callable[[str], torch.device], dtype: torch.dtype, where: str
) -> None:
    """Refuse weights that do not fit in the memory that is free, before any is read.

    Mapped weights count as well, since a pass that reads them from the disk each time would take hours.
    names: the parameters that are counted.
    devices: the device of a parameter.

    Raises: MemoryError that says what would fit."""
    counts: Counter[torch.device] = Counter()
    for name, shape in parameter_shapes(module).items():
        if name in names:
            counts[devices(name)] += math.prod(shape)
    for device, n in counts.items():
        free, wanted = free_memory(device), n * dtype.itemsize
        if free is None or wanted <= free:
            continue
        ways = [f"a checkpoint in 4 bits would take about {in_words(n / 2)}"]
        if n * 2 <= free and dtype.itemsize > 2:
            ways.insert(0, f"dtype=torch.bfloat16 would take {in_words(n * 2)}")
        if device.type != "cpu":
            ways.append('device_map="auto" spreads the blocks over the GPUs')
        raise MemoryError(
            f"The weights of {where} take {in_words(wanted)} as {dtype} on {device}, where {in_words(free)} are free: "
            f"{'; '.join(ways)}."
        )


def _entries(files: Sequence[WeightFile], adapter: Adapter) -> tuple[dict[str, Entry], list[str]]:
    """Return the entries of the files by today's names, and a line per name that is stored twice."""
    entries: dict[str, Entry] = {}
    doubled = []
    for file in files:
        for key, (shape, stored) in file.shapes().items():
            name = adapter.normalize(key)
            if name in entries and not adapter.is_harmless(name):
                doubled.append(f"doubled   {name}: stored as {entries[name].key} and as {key}")
            entries[name] = Entry(file, key, shape, stored)
    return entries, doubled


def _place_packed(
    module: nn.Module,
    weights: WeightMap,
    theirs: str,
    scheme: Scheme,
    packed: PackedEntry,
    devices: _Devices,
    dtype: torch.dtype,
    change: Change | None,
) -> None:
    """Replace linear maps by modules of the packed weight; elsewhere, and where LoRA changes it, dequantise it."""
    names = weights.owners[theirs]
    weight = open_packed(scheme, packed, devices(names[0]), dtype)
    numbers = None if change is None else change.of(weight.dense(), dtype)
    for ours in names:
        owner, _, leaf = ours.rpartition(".")
        linear = module.get_submodule(owner)
        is_cut = ours not in weights.reshapes and numbers is None
        rows = weight.rows(weights.parts.get(ours)) if is_cut else None
        if rows is not None and leaf == "weight" and isinstance(linear, nn.Linear):
            module.set_submodule(owner, rows.linear(linear.bias, dtype))
        else:
            dense = weights.part_of(ours, weight.dense() if numbers is None else numbers).to(
                device=devices(ours), dtype=dtype
            )
            set_parameter(module, ours, dense.clone())


def _quantised(weights: WeightMap, plain: Mapping[str, Entry]) -> list[str]:
    """Return a line per tensor of a dtype that the forward pass does not support."""
    found = ((theirs, plain[theirs].dtype) for theirs in weights.owners if theirs in plain)
    return [f"quantised {k}: stored as {d}; use float weights" for k, d in found if d not in FLOATS]


def stored_dtype(dtypes: Sequence[torch.dtype | str], hf_config: Any) -> torch.dtype:
    """Return the one dtype of a model if the user does not choose one; matrix products need a common dtype."""
    kinds = Counter(d for d in dtypes if isinstance(d, torch.dtype))
    named = getattr(hf_config, "dtype", None)
    if len(kinds) > 1 and isinstance(named, torch.dtype) and named in kinds:
        return named
    return kinds.most_common(1)[0][0]


def _require_tied(module: Any, head: Tensor, where: str) -> None:
    embed = module.embed.weight
    if head.data_ptr() == embed.data_ptr() and head.shape == embed.shape:
        return
    if head.shape != embed.shape or not torch.equal(head.to(embed), embed.detach()):
        raise ValueError(
            f"{where} ties its unembedding (tie_word_embeddings) but stores an lm_head.weight of other values; "
            "set tie_word_embeddings to false in config.json if the head is separate."
        )


class _Devices:
    """Map a parameter name to its device, by the longest module name of the map that is a prefix."""

    def __init__(self, default: torch.device, placed: dict[str, Any] | None) -> None:
        self.default, self.map = default, placed

    def __call__(self, name: str) -> torch.device:
        best = ""
        for prefix in self.map or {}:
            if _leads_to(prefix, name) and len(prefix) >= len(best):
                best = prefix
        if self.map is None or best not in self.map:
            return self.default
        where = self.map[best]
        return torch.device(f"cuda:{where}" if isinstance(where, int) else where)


def device_of_each(module: nn.Module, device: Any, device_map: Any, dtype: torch.dtype) -> _Devices:
    """Return the device of each parameter.

    Raises: ValueError for both device and map, or a map that offloads to disk or does not fit the model."""
    if device_map is None:
        return _Devices(torch.device(device or "cpu"), None)
    if device is not None:
        raise ValueError(f"Got device={device!r} and device_map={device_map!r}; pass only one of them.")
    if device_map == "auto":
        from accelerate import infer_auto_device_map

        device_map = infer_auto_device_map(module, no_split_module_classes=["Block"], dtype=dtype)
    if not isinstance(device_map, dict):
        raise ValueError(f"device_map={device_map!r} must be 'auto' or a dictionary from module names to devices.")
    if "disk" in device_map.values():
        raise ValueError("device_map puts modules on disk, which is not supported; free memory or use a smaller dtype.")
    names, modules = parameter_shapes(module), dict(module.named_modules())
    unknown = [m for m in device_map if m not in modules and m not in names]
    left = [n for n in names if not any(_leads_to(m, n) for m in device_map)]
    if unknown or left:
        raise ValueError(
            f"device_map does not fit the model: it has unknown modules {unknown} and no device for "
            f"{len(left)} parameters ({', '.join(left[:3])}{', ...' if len(left) > 3 else ''}). "
            'Name a device for each of the modules "embed", "blocks.0", ..., or for "", the whole model.'
        )
    return _Devices(torch.device("cpu"), dict(device_map))


def _leads_to(module: str, parameter: str) -> bool:
    return module == "" or parameter == module or parameter.startswith(module + ".")


def fill_from_state_dict(
    module: nn.Module, state_dict: Mapping[str, Tensor], adapter: Adapter, cfg: HookedVLMConfig, *, copy: bool = False
) -> None:
    """Fill a model from a Hugging Face model in memory.

    module: the empty model.
    state_dict: the Hugging Face model's.
    adapter, cfg: how its keys are named.
    copy: whether to copy the tensors. False: share their storage.

    Raises: ValueError for weights that do not fit."""
    weights = adapter.weight_map(cfg)
    named = {adapter.normalize(key): tensor for key, tensor in state_dict.items()}
    if empty := [key for key, tensor in named.items() if tensor.is_meta]:
        raise ValueError(
            f"{len(empty)} weights of the model are on the meta device and hold no numbers ({empty[0]} first): load "
            "them first, for example with from_pretrained."
        )
    shapes = {key: tuple(t.shape) for key, t in named.items()}
    require_fit(module, shapes, adapter, weights, "the model")
    for ours, theirs in weights:
        tensor = weights.part_of(ours, named[theirs].detach())
        require_finite(tensor, theirs, "the model")
        set_parameter(module, ours, tensor.clone() if copy else tensor)
    if HEAD in named and HEAD not in weights.names.values():
        _require_tied(module, named[HEAD].detach(), "the model")
