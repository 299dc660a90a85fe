"""A circuit: a named list of interventions, saved as safetensors with JSON metadata and loaded without code.

It is a sequence, so `model.intervene(circuit)` applies it like any list.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from veena_lens.config import HookedVLMConfig
from veena_lens.interventions.attention import BoostAttention, KnockOutAttention, SuppressHeads
from veena_lens.interventions.base import plain, require_intervention
from veena_lens.interventions.made_for import SCHEMA as MADE_FOR
from veena_lens.interventions.made_for import MadeFor
from veena_lens.interventions.neurons import ScaleNeurons
from veena_lens.interventions.patch import Ablate, Patch
from veena_lens.interventions.steer import Steer, SteerKeepingNorm
from veena_lens.long_runs import save_tensors
from veena_lens.own_files import opened, require_words, tensors_of, words_of
from veena_lens.positions import Box, Tile

_KINDS = (Steer, Patch, Ablate, ScaleNeurons, BoostAttention, KnockOutAttention, SteerKeepingNorm, SuppressHeads)
KINDS: dict[str, Any] = {kind.__name__: kind for kind in _KINDS}
RENAMED = {"Turn": "SteerKeepingNorm", "QuietHeads": "SuppressHeads", "KnockOut": "KnockOutAttention"}  # older files
REGIONS: dict[str, Any] = {"Box": Box, "Tile": Tile}
FORMAT = "veena_lens.Circuit/1"
SCHEMA = {"name": str, "meta": dict, "interventions": [dict], "made_for?": (None, dict)}


@dataclass(frozen=True, eq=False)
class Circuit(Sequence[Any]):
    """Interventions that belong together; `meta` is a JSON-able dictionary (model, data, how they were found).

    made_for: the model that they were made for; `intervene` refuses them on another. None: not known, until the circuit
        is first applied, or saved with `model`.
    allow_other_model: True takes a model of another name; the sizes must agree in any case.

    Interventions of other packages may be in it; such a circuit acts like any other, but cannot be saved, since a
    file is loaded without code.
    Raises: TypeError for what is not an intervention.
    """

    interventions: Sequence[Any]
    name: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    made_for: MadeFor | None = None
    allow_other_model: bool = False

    def __post_init__(self) -> None:
        for item in self.interventions:
            require_intervention(item, "Circuit")
        object.__setattr__(self, "interventions", tuple(self.interventions))

    def __len__(self) -> int:
        return len(self.interventions)

    def __getitem__(self, i: Any) -> Any:
        return replace(self, interventions=self.interventions[i]) if isinstance(i, slice) else self.interventions[i]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.interventions)

    def require_model(self, cfg: HookedVLMConfig, allow_other_model: bool = False) -> None:
        """Check that a model is the one that the circuit was made for; an unknown one is then taken for it.

        cfg: of the model that the circuit is applied to.
        allow_other_model: as the field; either is enough.

        Raises: ValueError for another name, or other sizes."""
        if self.made_for is None:
            object.__setattr__(self, "_first", self._first or MadeFor.of(cfg))
        else:
            allowed = allow_other_model or self.allow_other_model
            self.made_for.require(cfg, f"The circuit {self.name!r}", allowed)

    _first: ClassVar[MadeFor | None] = None  # of an instance: the model that it was first applied to

    def save(self, path: str | Path, model: Any = None) -> Path:
        """Write one safetensors file; returns its path.

        model: the model that the circuit is for, whose name and sizes the file keeps. None: `made_for`, or the model
            that the circuit was first applied to.

        Raises: TypeError for an intervention of another package."""
        for item in self.interventions:
            if not isinstance(item, _KINDS):
                raise TypeError(
                    f"Circuit.save: {item!r} is none of {', '.join(KINDS)}; only these can be loaded without code."
                )
        path = Path(path)
        tensors: dict[str, Tensor] = {}
        items = [_pack(item, str(i), tensors) for i, item in enumerate(self.interventions)]
        about = {"format": FORMAT, "name": self.name, "meta": self.meta, "interventions": items}
        made_for = self.made_for or self._first if model is None else MadeFor.of(model.cfg)
        if made_for is not None:
            about["made_for"] = made_for.record()
        save_tensors(path, tensors or {"empty": torch.zeros(1)}, {"veena_lens": json.dumps(about, default=plain)})
        return path

    @classmethod
    def load(cls, path: str | Path, *, allow_other_model: bool = False) -> Circuit:
        """Read what `save` wrote.

        allow_other_model: True lets the circuit act on a model of another name than the file's.

        Raises: FileNotFoundError; ValueError for a file cut short, one without a circuit, or an unknown kind in it."""
        with opened(path, "a circuit") as f:
            about = words_of(f, "veena_lens", {"format?": str}, path)
            if about.get("format") != FORMAT:
                raise ValueError(f"{path} is a safetensors file, but not a circuit of veena_lens.")
            require_words(about, SCHEMA, str(path))
            tensors = tensors_of(f)
            if wrong := [name for name, t in tensors.items() if t.is_floating_point() and bool(t.isnan().any())]:
                raise ValueError(f"{path}: the tensor {wrong[0]} holds NaN.")
            made_for = None
            if about.get("made_for") is not None:
                require_words(about["made_for"], MADE_FOR, f"{path}, made_for")
                made_for = MadeFor(**{name: about["made_for"][name] for name in MADE_FOR})
            items = [_unpack(item, tensors) for item in about["interventions"]]
            return cls(items, about["name"], about["meta"], made_for, allow_other_model)

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
    name = str(packed.pop("kind", ""))
    kind = KINDS.get(RENAMED.get(name, name))
    if kind is None:
        raise ValueError(f"The circuit holds an unknown intervention; known: {', '.join(KINDS)}.")
    read = {}
    for name, value in packed.items():
        if isinstance(value, dict) and "tensor" in value:
            if value["tensor"] not in tensors:
                raise ValueError(f"the tensor {value['tensor']!r} of {kind.__name__} is missing")
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
