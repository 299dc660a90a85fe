"""A circuit: a named list of interventions, saved as safetensors with JSON metadata and loaded without code.

It is a sequence, so `model.intervene(circuit)` applies it like any list.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from veena_lens.interventions.attention import BoostAttention, KnockOutAttention, SuppressHeads
from veena_lens.interventions.base import plain, require_intervention
from veena_lens.interventions.neurons import ScaleNeurons
from veena_lens.interventions.patch import Ablate, Patch
from veena_lens.interventions.steer import Steer, SteerKeepingNorm
from veena_lens.positions import Box, Tile
from veena_lens.scores import opened

_KINDS = (Steer, Patch, Ablate, ScaleNeurons, BoostAttention, KnockOutAttention, SteerKeepingNorm, SuppressHeads)
KINDS: dict[str, Any] = {kind.__name__: kind for kind in _KINDS}
RENAMED = {"Turn": "SteerKeepingNorm", "QuietHeads": "SuppressHeads", "KnockOut": "KnockOutAttention"}  # older files
REGIONS: dict[str, Any] = {"Box": Box, "Tile": Tile}
FORMAT = "veena_lens.Circuit/1"


@dataclass(frozen=True, eq=False)
class Circuit(Sequence[Any]):
    """Interventions that belong together; `meta` is a JSON-able dictionary (model, data, how they were found).

    Interventions of other packages may be in it; such a circuit acts like any other, but cannot be saved, since a
    file is loaded without code.
    Raises: TypeError for what is not an intervention.
    """

    interventions: Sequence[Any]
    name: str = ""
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for item in self.interventions:
            require_intervention(item, "Circuit")
        object.__setattr__(self, "interventions", tuple(self.interventions))

    def __len__(self) -> int:
        return len(self.interventions)

    def __getitem__(self, i: Any) -> Any:
        return Circuit(self.interventions[i], self.name, self.meta) if isinstance(i, slice) else self.interventions[i]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.interventions)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file; returns its path.

        Raises: TypeError for an intervention of another package."""
        for item in self.interventions:
            if not isinstance(item, _KINDS):
                raise TypeError(
                    f"Circuit.save: {item!r} is none of {', '.join(KINDS)}; only these can be loaded without code."
                )
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        items = [_pack(item, str(i), tensors) for i, item in enumerate(self.interventions)]
        about = {"format": FORMAT, "name": self.name, "meta": self.meta, "interventions": items}
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()} or {"empty": torch.zeros(1)}
        save_file(tensors, str(path), metadata={"veena_lens": json.dumps(about, default=plain)})
        return path

    @classmethod
    def load(cls, path: str | Path) -> Circuit:
        """Read what `save` wrote.

        Raises: FileNotFoundError; ValueError for a file cut short, one without a circuit, or an unknown kind in it."""
        with opened(path, "a circuit") as f:
            about = json.loads((f.metadata() or {}).get("veena_lens", "{}"))
            if about.get("format") != FORMAT:
                raise ValueError(f"{path} is a safetensors file, but not a circuit of veena_lens.")
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        return cls([_unpack(item, tensors) for item in about["interventions"]], about["name"], about["meta"])

    def __repr__(self) -> str:
        lines = [f"  {item!r}," for item in self.interventions[:7]]
        if len(self) > 7:
            lines.append(f"  ... {len(self) - 7} more")
        return "\n".join([f"Circuit({self.name!r}, {len(self)} interventions:", *lines]) + "\n)"


def _pack(item: Any, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return an intervention as JSON; its tensors go to `tensors` under names that the JSON holds."""
    out: dict[str, Any] = {"kind": type(item).__name__}
    for f in fields(item):
        if not f.init:
            continue
        value = getattr(item, f.name)
        if isinstance(item, Patch) and f.name == "source":
            value = item._values
        elif isinstance(item, Ablate) and f.name == "value" and value == "mean":
            value = item._fill  # the mean itself: the reference runs need not travel
        elif isinstance(item, Ablate) and f.name == "reference":
            continue
        if isinstance(value, Tensor):
            key = f"{prefix}.{f.name}"
            tensors[key] = value
            out[f.name] = {"tensor": key}
        elif isinstance(value, (Box, Tile)):
            out[f.name] = {type(value).__name__: asdict(value)}
        elif isinstance(value, slice):
            out[f.name] = {"slice": [value.start, value.stop, value.step]}
        else:
            out[f.name] = plain(value)
    if isinstance(item, Patch) and item._chosen is not None:
        tensors[f"{prefix}._chosen"] = item._chosen
        out["_chosen"] = {"tensor": f"{prefix}._chosen"}
    return out


def _unpack(packed: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    packed = dict(packed)
    name = str(packed.pop("kind"))
    kind = KINDS.get(RENAMED.get(name, name))
    if kind is None:
        raise ValueError(f"The circuit holds an unknown intervention; known: {', '.join(KINDS)}.")
    read = {}
    for name, value in packed.items():
        if isinstance(value, dict) and "tensor" in value:
            value = tensors[value["tensor"]]
        elif isinstance(value, dict) and "slice" in value:
            value = slice(*value["slice"])
        elif isinstance(value, dict) and len(value) == 1 and next(iter(value)) in REGIONS:
            value = REGIONS[next(iter(value))](**next(iter(value.values())))
        read[name] = value
    chosen = read.pop("_chosen", None)
    item = kind(**read)
    if chosen is not None:
        object.__setattr__(item, "_chosen", chosen)
    return item
