"""Describe a checkpoint before any weight is read: configuration, hook points, parameters, memory.

Shapes come from the hook table and from a model on the meta device, dtypes and sizes from the files' headers.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veena_lens.checkpoints.files import WeightFile, weight_files
from veena_lens.checkpoints.filling import stored_dtype
from veena_lens.checkpoints.loading import Checkpoint
from veena_lens.checkpoints.quantised import scheme_of
from veena_lens.config import HookedVLMConfig
from veena_lens.hook_table import Hook, hooks_of, layer_of

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
PARTS = (  # part, prefixes of its parameters
    ("vision tower", ("vision.",)),
    ("  of it unused", ("vision.unused.",)),
    ("connector", ("connector.",)),
    ("image newline", ("image_newline",)),
    ("deep stack", ("deepstack.",)),
    ("embedding", ("embed.",)),
    ("decoder blocks", ("blocks.",)),
    ("last norm", ("ln_final.",)),
    ("unembedding", ("unembed.",)),
)


@dataclass(frozen=True, kw_only=True)
class HookLine:
    """Hold one line for hook points that differ only in their layer."""

    name: str
    shape: str
    live: str


@dataclass(frozen=True, kw_only=True)
class Description:
    """Hold what `veena-lens inspect` prints. `parameters`: number per part; `stored`: dtypes and size of the files."""

    path: Path
    architecture: str
    note: str
    cfg: HookedVLMConfig
    stored: str
    parameters: dict[str, int]
    hooks: tuple[HookLine, ...]
    n_hooks: int

    @property
    def n_parameters(self) -> int:
        return sum(n for part, n in self.parameters.items() if not part.startswith(" "))

    def memory(self, dtype: str) -> int:
        """Return the bytes of the weights in a dtype ("float32", "bfloat16", ...)."""
        return self.n_parameters * BYTES[dtype]

    def __str__(self) -> str:
        lines = [f"{self.path}", f"{self.architecture} ({self.note})", f"stored: {self.stored}", "", repr(self.cfg)]
        width = max(map(len, self.parameters))
        lines += ["", "parameters"]
        lines += [f"  {part:<{width}}  {n:>15,}" for part, n in self.parameters.items()]
        lines += [f"  {'total':<{width}}  {self.n_parameters:>15,}", "", "memory of the weights"]
        lines += [f"  {dtype:<9}  {size_text(self.memory(dtype)):>10}" for dtype in BYTES]
        name, shape = (max(len(getattr(h, f)) for h in self.hooks) for f in ("name", "shape"))
        lines += ["", f"hook points ({self.n_hooks})"]
        lines += [f"  {h.name:<{name}}  {h.shape:<{shape}}  {h.live}".rstrip() for h in self.hooks]
        return "\n".join(lines)

    __repr__ = __str__


def describe(checkpoint: Checkpoint, meta_model: nn.Module) -> Description:
    """Describe a checkpoint; `meta_model` is its native model on the meta device."""
    names = {name: p.numel() for name, p in meta_model.named_parameters()}
    parameters = {}
    for part, prefixes in PARTS:
        n = sum(size for name, size in names.items() if name.startswith(prefixes))
        if n:
            parameters[part] = n
    if checkpoint.cfg.tie_word_embeddings:
        parameters["unembedding (tied)"] = 0
    table = hooks_of(checkpoint.cfg)
    return Description(
        path=checkpoint.path,
        architecture=checkpoint.adapter.architecture,
        note=checkpoint.adapter.note or "no note",
        cfg=checkpoint.cfg,
        stored=_stored(checkpoint),
        parameters=parameters,
        hooks=tuple(folded(table, checkpoint.cfg)),
        n_hooks=len(table),
    )


@dataclass(frozen=True, kw_only=True)
class StoredWeights:
    """Hold what the headers of weight files say.

    n_parameters: numbers in all, None without files that have headers, or where they are packed. dtype: the one that
    the model has when it is loaded as stored, None where nothing says it. n_bytes: of the files. is_packed: quantised.
    """

    n_parameters: int | None
    dtype: torch.dtype | None
    n_bytes: int
    is_packed: bool


def stored_weights(checkpoint: Checkpoint) -> StoredWeights:
    """Return number, dtype and size of a checkpoint's weights, from the headers of its files; none is downloaded."""
    try:
        files = weight_files(checkpoint.path)
    except FileNotFoundError:
        files = []
    is_packed = scheme_of(checkpoint.hf_config) is not None
    n_bytes = sum(file.stat().st_size for file in files)
    named = getattr(checkpoint.hf_config, "dtype", None)
    named = named if isinstance(named, torch.dtype) else None
    if is_packed or not files or any(file.suffix != ".safetensors" for file in files):
        return StoredWeights(n_parameters=None, dtype=named, n_bytes=n_bytes, is_packed=is_packed)
    held = [entry for file in files for entry in WeightFile(file).shapes().values()]
    dtype = stored_dtype([kind for _, kind in held], checkpoint.hf_config)
    n = sum(math.prod(shape) for shape, _ in held)
    return StoredWeights(n_parameters=n, dtype=dtype, n_bytes=n_bytes, is_packed=False)


def _stored(checkpoint: Checkpoint) -> str:
    """Return dtypes, number of files and size of the weights, from the headers."""
    try:
        files = weight_files(checkpoint.path)
    except FileNotFoundError:
        files = []
    if not files:
        return "weights are downloaded when the model is loaded" if checkpoint.hub_id else "no weights in this folder"
    kinds: Counter[str] = Counter()
    if all(f.suffix == ".safetensors" for f in files):  # a pickle has no header to read
        for file in files:
            kinds.update(str(dtype).removeprefix("torch.") for _, dtype in WeightFile(file).shapes().values())
    held = ", ".join(f"{n} tensors of {kind}" for kind, n in kinds.most_common()) or "pickled tensors"
    size = sum(f.stat().st_size for f in files)
    return f"{held} in {len(files)} file{'s' * (len(files) != 1)}, {size_text(size)}"


def size_text(n_bytes: int) -> str:
    """Format a number of bytes in the largest fitting unit."""
    value, unit = float(n_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"


def folded(table: dict[str, Hook], cfg: HookedVLMConfig) -> list[HookLine]:
    """Return one line for all layers of a hook point: blocks.{0..31}.hook_resid_pre."""
    lines, seen = [], set()
    for name, hook in table.items():
        if hook.name in seen:
            continue
        seen.add(hook.name)
        is_image_side = name.startswith(("vision.", "connector.", "deepstack.", "hook_image"))
        shown = re.sub(r"\{l\}", _range([n for n, h in table.items() if h.name == hook.name]), hook.name)
        live = "" if hook.live == "always" else hook.live
        lines.append(HookLine(name=shown, shape=_shape(hook, cfg, is_image_side), live=live))
    return lines


def _range(names: Sequence[str]) -> str:
    """Return the layers of hook points: {0..31}, or the number of the only one."""
    numbers = [n for name in names if (n := layer_of(name)) is not None]
    if not numbers:
        return ""
    return f"{{{min(numbers)}..{max(numbers)}}}" if len(numbers) > 1 else str(numbers[0])


def _shape(hook: Hook, cfg: HookedVLMConfig, is_image_side: bool) -> str:
    """Return the axes with their sizes: [batch pos n_heads=32 d_head=128]."""
    part: Any = cfg.vision if hook.name.startswith("vision.") else cfg
    sizes = {a: getattr(part, a, None) for a in ("d_model", "n_heads", "n_key_value_heads", "d_head", "d_mlp")}
    sizes["d_vocab"] = cfg.d_vocab
    if is_image_side and cfg.vision is not None and cfg.connector is not None:
        if not cfg.vision.takes_any_size:
            n = cfg.vision.n_positions if hook.name.startswith("vision.") else cfg.vision.n_features
            sizes |= dict.fromkeys(("pos", "query_pos", "key_pos"), n)
        sizes |= {"d_in": cfg.connector.d_in, "d_hidden": cfg.connector.d_hidden}
    return "[" + " ".join(f"{a}={sizes[a]}" if sizes.get(a) else a for a in hook.axis_names) + "]"
