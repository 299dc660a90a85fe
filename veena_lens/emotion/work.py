"""Units of work in a folder: each result is written under a temporary name, then renamed; to resume is to do the rest.

A unit is named by what it is about (a pair, a condition and method); the folder belongs to one experiment, described
as JSON, so that results of another model, data or setting are never taken for these.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

Result = dict[str, Any]


class Work:
    """Results of one experiment by name, in `folder/<hash of experiment>`; with folder=None they are kept nowhere."""

    def __init__(self, folder: str | Path | None, experiment: Mapping[str, Any]) -> None:
        text = json.dumps(experiment, sort_keys=True, default=str)
        self.id = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.folder = None if folder is None else Path(folder) / self.id
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "experiment.json").write_text(text + "\n")

    def do(self, name: str, compute: Callable[[], Result]) -> Result:
        """The result kept under `name`, else what `compute` gives, kept. A result is a dictionary of tensors and of
        anything JSON holds.

        Raises: OSError that says how to go on, where the disk is full."""
        if self.folder is None:
            return compute()
        path = self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:20]}.safetensors"
        kept = _read(path)
        if kept is not None:
            return kept
        result = compute()
        try:
            _write(path, name, result)
        except OSError as error:
            if error.errno == errno.ENOSPC or "os error 28" in str(error):
                raise OSError(
                    errno.ENOSPC,
                    f"The disk of {self.folder} is full; results so far are kept. Free some space and run again.",
                ) from error
            raise
        return result

    def __repr__(self) -> str:
        if self.folder is None:
            return "Work(not kept)"
        return f"Work({self.folder}, {len(list(self.folder.glob('*.safetensors')))} units done)"


def _read(path: Path) -> Result | None:
    """What was kept, or None; a file cut short by a crash of the machine counts as not done."""
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            result: Result = json.loads(file.metadata()["json"])
            names = [name for name in file.keys() if name != "_"]  # noqa: SIM118 (safe_open is no dictionary)
            return result | {name: file.get_tensor(name) for name in names}
    except Exception:  # safetensors' own error type is not exported
        path.unlink()
        return None


def _write(path: Path, name: str, result: Result) -> None:
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in result.items() if isinstance(v, Tensor)}
    rest = {k: v for k, v in result.items() if not isinstance(v, Tensor)}
    part = path.with_suffix(".part")
    about = {"json": json.dumps(rest), "name": name}
    save_file(tensors or {"_": torch.zeros(1)}, str(part), metadata=about)
    part.replace(path)


def model_key(model: Any) -> list[Any]:
    """What tells one model from another: its name, size, type, and a sum over some weights."""
    weights = [model.embed.weight, model.blocks[-1].mlp.W_out]
    sums = [float(w.detach().double().sum()) for w in weights]
    return [model.cfg.model_name, model.cfg.n_layers, model.cfg.d_model, str(model.cfg.dtype), *sums]


def directions_key(directions: Any) -> list[Any]:
    """What tells one set of directions from another."""
    parts = (directions.overall, directions.per_emotion)
    return [list(directions.emotions), *[float(x.double().abs().sum()) for x in parts]]
