"""Units of work in a folder: each result is written under a temporary name, then renamed; to resume is to do the rest.

A unit is named by what it is about (images by their content, prompts, what a method does); the folder belongs to one
experiment, described as JSON, so that results of another model, data or setting are never taken for these.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from veena_lens.emotion.pairs.pair_set import picture_hash
from veena_lens.interventions.base import content
from veena_lens.sweeps.engine import bar

Result = dict[str, Any]
T = TypeVar("T")


class ResumableStore:
    """Results of one experiment by name, in `folder/<hash of experiment>`.

    With folder=None they are kept nowhere, and an experiment given as a function is not asked for."""

    def __init__(
        self, folder: str | Path | None, experiment: Mapping[str, Any] | Callable[[], Mapping[str, Any]]
    ) -> None:
        self.folder: Path | None = None
        if folder is not None:
            about = experiment() if callable(experiment) else experiment
            text = json.dumps(about, sort_keys=True, default=str)
            self.folder = Path(folder) / hashlib.sha256(text.encode()).hexdigest()[:16]
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "experiment.json").write_text(text + "\n")

    def do(self, name: str | Callable[[], str], compute: Callable[[], Result]) -> Result:
        """The result kept under `name` (text, or a function that gives it where results are kept), else what `compute`
        gives, kept. A result is a dictionary of tensors and of anything JSON holds.

        Raises: OSError that says how to go on, where the disk is full."""
        if self.folder is None:
            return compute()
        name = name() if callable(name) else name
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

    def each(
        self,
        items: Sequence[T],
        name: Callable[[T], str],
        compute: Callable[[T], Result],
        progress: bool = False,
        what: str = "",
    ) -> list[Result]:
        """`do` for every item, in order, under a progress bar. Raises: as `do`."""
        show = bar(len(items), progress, what)
        found = []
        for item in items:
            found.append(self.do(lambda item=item: name(item), lambda item=item: compute(item)))
            if show is not None:
                show.update(1)
        if show is not None:
            show.close()
        return found

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
    """What tells one model from another: its name, size, type, and a hash of a few rows of every weight."""
    seen = hashlib.sha256()
    for name, weight in model.named_parameters():
        rows = weight.detach().reshape(weight.shape[0] if weight.ndim else 1, -1)
        seen.update(name.encode() + str(tuple(weight.shape)).encode() + _bytes(rows[:: max(1, len(rows) // 8)]))
    return [model.cfg.model_name, model.cfg.n_layers, model.cfg.d_model, str(model.cfg.dtype), seen.hexdigest()[:24]]


def directions_key(directions: Any) -> list[Any]:
    """What tells one set of directions from another."""
    parts = (directions.overall, directions.per_emotion)
    return [list(directions.emotions), *[digest([list(x.shape), _bytes(x).hex()]) for x in parts]]


def example_key(example: Any) -> str:
    """What tells a question about an image from any other: the image's content, wherever it lies, and the prompt."""
    return f"{picture_hash(example.picture)[:24]} {example.prompt}"


def pair_key(pair: Any) -> str:
    """What tells a pair from any other: its emotion and both twins."""
    return f"{pair.emotion} {example_key(pair.emotional)} {example_key(pair.neutral)}"


def batch_key(examples: Iterable[Any]) -> str:
    """The examples of a batch, in order."""
    return " | ".join(example_key(e) for e in examples)


def slot_key(slot: Any) -> list[Any] | None:
    """What tells one answer slot from another: its lead-in and every emotion's token ids."""
    return None if slot is None else [slot.lead_in, {e: list(ids) for e, ids in slot.tokens.items()}]


def method_key(method: Any) -> list[Any]:
    """What tells one method's answers from another's: what its interventions hold, tensors by content, never its name.

    What only code says (a reworded prompt, a rule of decoding, interventions that follow from the batch) is told by
    the method's name and settings."""
    if method.prompt is None and method.decoding is None and not callable(method.interventions):
        found = [content(x, _tensor_key) for x in method.interventions]
        if None not in found:
            return found
    return [method.name, dict(method.settings)]


def _tensor_key(tensor: Tensor) -> str:
    return digest([list(tensor.shape), str(tensor.dtype), _bytes(tensor).hex()])


def digest(value: Any) -> str:
    """A short hash of anything JSON holds."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
