"""What a sweep returns: raw metrics over named axes, the two reference runs, and effects between them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from veena_lens.scores import Scores, opened

FORMAT = "veena_lens.SweepResult/1"


@dataclass(frozen=True, eq=False)
class SweepResult:
    """`values`: the raw metric over `axes`; `clean`, `corrupted`: the metric of the two runs, one a pair.

    `scores` is the effect: (patched - corrupted) / (clean - corrupted) when denoising, and
    (clean - patched) / (clean - corrupted) when noising; NaN where the two runs do not differ.
    """

    values: Float[Tensor, ...]
    axes: tuple[str, ...]
    labels: Mapping[str, Sequence[Any]]
    clean: Float[Tensor, " pair"]
    corrupted: Float[Tensor, " pair"]
    direction: str = "denoising"
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def scores(self) -> Float[Tensor, ...]:
        """Effect of each patch, 0 where it changes nothing and 1 where it restores (or breaks) everything."""
        by_pair = "pair" in self.axes
        shape = [-1 if a == "pair" else 1 for a in self.axes] if by_pair else [1] * self.values.ndim
        clean, corrupted = (x.reshape(shape) if by_pair else x for x in (self.clean, self.corrupted))
        gap = torch.where(clean == corrupted, torch.nan, clean - corrupted)
        return (self.values - corrupted) / gap if self.direction == "denoising" else (clean - self.values) / gap

    def as_scores(self, raw: bool = False) -> Scores:
        """The effects (or raw values) as Scores."""
        name = "metric" if raw else f"{self.direction} effect"
        return Scores(self.values if raw else self.scores, self.axes, self.labels, name=name, meta=self.meta)

    def to_frame(self) -> Any:
        """A tidy table: a column an axis, the effect as "value" and the raw metric as "metric"."""
        frame = self.as_scores().to_frame()
        frame["metric"] = self.values.flatten().tolist()
        return frame

    def top(self, k: int = 10, **options: Any) -> Any:
        """The largest effects."""
        return self.as_scores().top(k, **options)

    def plot(self, **options: Any) -> Any:
        """A figure of the effects, averaged over pairs and a position axis where there are any."""
        scores = self.as_scores()
        for axis in ("pair", "pos"):
            if axis in scores.axes and len(scores.axes) > 2:
                scores = scores.mean(axis)
        return scores.plot(**options)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file; returns its path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {
            "format": FORMAT,
            "axes": self.axes,
            "labels": {k: list(v) for k, v in self.labels.items()},
            "direction": self.direction,
            "meta": self.meta,
        }
        tensors = {"values": self.values, "clean": self.clean, "corrupted": self.corrupted}
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        save_file(tensors, str(path), metadata={"veena_lens": json.dumps(about)})
        return path

    @classmethod
    def load(cls, path: str | Path) -> SweepResult:
        """Read what `save` wrote. Raises: FileNotFoundError; ValueError for a file cut short, or that is no sweep."""
        with opened(path, "a sweep") as f:
            about = json.loads((f.metadata() or {}).get("veena_lens", "{}"))
            if about.get("format") != FORMAT:
                raise ValueError(f"{path} is a safetensors file, but no sweep of veena_lens.")
            read = {name: f.get_tensor(name) for name in ("values", "clean", "corrupted")}
        return cls(
            **read, axes=tuple(about["axes"]), labels=about["labels"], direction=about["direction"], meta=about["meta"]
        )

    def __repr__(self) -> str:
        sizes = ", ".join(f"{a} {n}" for a, n in zip(self.axes, self.values.shape, strict=True))
        known = self.scores[~self.scores.isnan()]
        best = f"largest effect {float(known.max()):.3f}" if len(known) else "the two runs do not differ"
        return f"SweepResult({self.direction}: {sizes}; {best})"
