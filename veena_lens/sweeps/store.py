"""Results of a sweep kept in a folder as they come, so that the same sweep resumes there in another process.

What makes a sweep the same is told by content: weights, inputs, settings and metrics (a function by its code and what
it closes over), never by an address in memory.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from veena_lens.inputs import MultimodalInputs

SAMPLED = 256  # numbers of each weight that tell one model from another


def fingerprint(value: Any) -> Any:
    """A value as JSON, equal for equal contents: tensors by a hash, data classes and functions by their parts."""
    if isinstance(value, Tensor):
        held = value.detach().cpu().contiguous()
        numbers = held.double().numpy() if held.is_floating_point() else held.numpy()
        return [str(value.dtype), list(value.shape), hashlib.sha256(numbers.tobytes()).hexdigest()]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, Mapping):
        return {str(key): fingerprint(part) for key, part in value.items()}
    if isinstance(value, (list, tuple, set, frozenset, range)):
        parts = [fingerprint(part) for part in value]
        return sorted(parts, key=str) if isinstance(value, (set, frozenset)) else parts
    if isinstance(value, functools.partial):
        return ["partial", fingerprint(value.func), fingerprint(value.args), fingerprint(value.keywords)]
    if isinstance(value, MethodType):
        return [fingerprint(value.__func__), fingerprint(value.__self__)]
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        names = [value.__globals__.get(name) for name in value.__code__.co_names]
        read = [part for part in names if isinstance(part, (Tensor, str, int, float, bool, list, tuple))]
        rest = [fingerprint(part) for part in (value.__defaults__, value.__kwdefaults__, cells, read)]
        return [value.__module__, value.__qualname__, _code(value.__code__), *rest]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: fingerprint(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return [type(value).__qualname__, parts]
    if hasattr(value, "__dict__") and callable(value) and not isinstance(value, type):
        return [type(value).__qualname__, fingerprint(vars(value))]
    return repr(value)


def _code(code: CodeType) -> str:
    """A hash of a function's instructions and constants, those of functions inside it too."""
    constants = [_code(part) if isinstance(part, CodeType) else repr(part) for part in code.co_consts]
    text = json.dumps([code.co_code.hex(), constants, list(code.co_names)])
    return hashlib.sha256(text.encode()).hexdigest()


def experiment_of(model: Any, runs: Sequence[MultimodalInputs], *settings: Any) -> dict[str, Any]:
    """What makes a sweep the same sweep: weights (by some numbers of each), inputs, settings and metrics."""
    sampled = [
        p.detach().flatten()[:: max(1, p.numel() // SAMPLED)][:SAMPLED].cpu().double() for p in model.parameters()
    ]
    return {
        "model": [model.cfg.model_name, str(model.cfg.dtype), fingerprint(torch.cat(sampled))],
        "tokens": [run.tokens.tolist() for run in runs],
        "pixels": [fingerprint(run.pixel_values) for run in runs],
        "settings": [fingerprint(setting) for setting in settings],
    }


class Store:
    """Results of a sweep's chunks in a folder: written under a temporary name, then renamed; read on resuming."""

    def __init__(self, folder: Path, experiment: dict[str, Any]) -> None:
        text = json.dumps(experiment, sort_keys=True, default=str)
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "experiment.json").write_text(text)

    def under(self, name: str) -> Store:
        """A part of the same store."""
        part = object.__new__(Store)
        part.folder = self.folder / name
        part.folder.mkdir(exist_ok=True)
        return part

    def read(self, number: int) -> dict[str, Tensor] | None:
        """What was kept of a chunk, None where it has not run."""
        path = self.folder / f"{number:06d}.safetensors"
        if not path.is_file():
            return None
        return {name.removeprefix("metric "): value for name, value in load_file(str(path)).items()}

    def write(self, number: int, values: Mapping[str, Tensor]) -> None:
        """Keep a chunk's metrics."""
        path = self.folder / f"{number:06d}.safetensors"
        part = path.with_suffix(".part")
        save_file({f"metric {name}": value.detach().cpu().contiguous() for name, value in values.items()}, str(part))
        part.rename(path)
