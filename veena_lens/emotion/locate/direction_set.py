"""Stage I: the directions from neutral to emotional in the residual stream, one per layer and emotion.

S_l^e is the mean over pairs of h_l(X+) - h_l(X-) at the last prompt token, over those pairs whose emotion the model
names on the emotional image and not on its neutral twin; S_l is the mean of S_l^e over emotions. How far they can be
trusted is measured with them: number of pairs, spread, split-half cosine, cosines between emotions.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veena_lens.circuits.reading import EPS
from veena_lens.interventions import Steer
from veena_lens.interventions.base import require_layer
from veena_lens.interventions.made_for import SCHEMA as MADE_FOR
from veena_lens.interventions.made_for import MadeFor, same_name
from veena_lens.long_runs import save_tensors
from veena_lens.own_files import opened, require_words, tensors_of, words_of
from veena_lens.scores import Scores

if TYPE_CHECKING:
    import pandas as pd

    from veena_lens.model.model import HookedVLM

FORMAT = "veena_lens.Directions/1"
SCHEMA = {"emotions": [str], "counts": {str: int}, "meta": dict, "made_for?": (None, dict)}
SCALES = ("relative", "raw", "unit")
OVERALL = "overall"
MASSIVE = 0.001  # share of coordinates with the largest mean |h|
FEW = 30


@dataclass(frozen=True, eq=False, kw_only=True)
class Directions:
    """Steering vectors: `overall` S_l and `per_emotion` S_l^e, in units of the residual stream.

    `counts`: pairs used of each emotion. `norms`: mean ||h_l|| over both runs. `neutral_mean`, `emotional_mean`: mean
    states, emotions weighing the same, so that overall = emotional_mean - neutral_mean. `measured`: quality by name
    (empty for random directions); read it through `split_half()`, `spread()`, `agreement()`, `cosines()`. `meta`: how
    they were found.
    """

    overall: Float[Tensor, "layer d_model"]
    per_emotion: Float[Tensor, "emotion layer d_model"]
    emotions: Sequence[str]
    counts: Mapping[str, int]
    norms: Float[Tensor, " layer"]
    neutral_mean: Float[Tensor, "layer d_model"]
    emotional_mean: Float[Tensor, "layer d_model"]
    measured: Mapping[str, Tensor] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    made_for: MadeFor | None = None  # the model that they are from

    def __post_init__(self) -> None:
        n, layers = len(self.emotions), self.overall.shape[0]
        if len(self.per_emotion) != n or len(self.norms) != layers or self.per_emotion.shape[1:] != self.overall.shape:
            raise ValueError(
                f"Directions: overall {list(self.overall.shape)}, per_emotion {list(self.per_emotion.shape)} and norms "
                f"{list(self.norms.shape)} do not fit {n} emotions."
            )
        if any(mean.shape != self.overall.shape for mean in (self.neutral_mean, self.emotional_mean)):
            raise ValueError(f"Directions: the means of states must be {list(self.overall.shape)}, as overall is.")
        if lost := [emotion for emotion in self.emotions if emotion not in self.counts]:
            raise ValueError(f"Directions: counts lacks {', '.join(map(repr, lost))}.")
        if not all(bool(v.isfinite().all()) for v in (self.overall, self.per_emotion, self.norms)):
            raise ValueError("Directions: some vectors are not finite.")

    @property
    def n_layers(self) -> int:
        return self.overall.shape[0]

    @property
    def d_model(self) -> int:
        return self.overall.shape[1]

    # --- vectors --------------------------------------------------------------------------------------

    def of(self, emotion: str | None = None) -> Float[Tensor, "layer d_model"]:
        """Return S_l^e of an emotion, or the overall S_l. Raises: ValueError for an emotion without direction."""
        return self.overall if emotion is None else self.per_emotion[self._number(emotion)]

    def at(self, layer: int, emotion: str | None = None) -> Float[Tensor, " d_model"]:
        """Return one layer's vector, of an emotion or overall. Raises: ValueError for an unknown layer or emotion."""
        return self.of(emotion)[require_layer(layer, self.n_layers, "Directions.at")]

    def contrast(self, emotion: str) -> Float[Tensor, "layer d_model"]:
        """Return D_l^e = S_l^e - mean over emotions of S_l^e': which emotion, not that there is one.

        Raises: ValueError for an emotion without direction, or where there is only one."""
        if len(self.emotions) < 2:
            raise ValueError("contrast: the directions hold one emotion; a contrast needs two or more.")
        return self.of(emotion) - self.per_emotion.mean(0)

    def unit(self, emotion: str | None = None) -> Float[Tensor, "layer d_model"]:
        """Return S_l / (||S_l|| + 1e-12), of an emotion or overall."""
        vectors = self.of(emotion)
        return vectors / (vectors.norm(dim=-1, keepdim=True) + EPS)

    def vectors(self, scale: str = "relative", emotion: str | None = None) -> Float[Tensor, "layer d_model"]:
        """Return what alpha = 1 adds at each layer: "relative" mean ||h_l|| times the unit vector, "raw" S_l, "unit".

        "raw" moves the mean neutral state onto the mean emotional one; only "relative" is comparable over layers.
        Raises: ValueError for another scale."""
        if scale not in SCALES:
            raise ValueError(f"scale={scale!r} must be one of {', '.join(SCALES)}.")
        if scale == "raw":
            return self.of(emotion)
        return self.unit(emotion) * (self.norms[:, None] if scale == "relative" else 1.0)

    def steer(
        self,
        layer: int,
        alpha: float | int,
        emotion: str | None = None,
        scale: str = "relative",
        positions: Any = "last+generated",
    ) -> Steer:
        """Return the intervention that adds alpha times `vectors(scale, emotion)[layer]`.

        `alpha` 0.1 with "relative" is a tenth of the mean norm of the states there. Raises: ValueError for an unknown
        layer, emotion or scale."""
        layer = require_layer(layer, self.n_layers, "Directions.steer")
        return Steer(layer, self.vectors(scale, emotion)[layer], alpha, positions)

    def _number(self, emotion: str) -> int:
        if emotion not in self.emotions:
            raise ValueError(f"No direction for {emotion!r}; there are {', '.join(self.emotions)}, and None overall.")
        return list(self.emotions).index(emotion)

    # --- quality --------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """Return the names of the directions in the order of the measurements: the emotions, then "overall"."""
        return [*self.emotions, OVERALL]

    def strength(self) -> Scores:
        """Return ||S_l|| / mean ||h_l||, axes (direction, layer)."""
        every = torch.cat([self.per_emotion, self.overall[None]])
        return self._scores(every.norm(dim=-1) / (self.norms + EPS), "strength", "share of the mean norm")

    def split_half(self) -> Scores:
        """Return the reliability of the directions, measured between two halves.

        The cosine of the directions of two random halves of the people, mean of the divisions, stepped up to the whole
        by 2 r / (1 + |r|) (Spearman-Brown); axes (direction, layer), NaN where no division is possible.

        Source: Spearman 1910; Brown 1910, British Journal of Psychology 3."""
        return self._scores(self._measure("split_half"), "split-half cosine", "cosine")

    def agreement(self) -> Scores:
        """Return the mean cosine between the differences of two pairs, axes (direction, layer)."""
        return self._scores(self._measure("agreement"), "agreement", "cosine")

    def spread(self) -> Scores:
        """Return the spread of the pairs' differences, relative to the direction's length.

        The root mean square distance from their mean over ||S_l||, axes (direction, layer).

        For "overall" both are of all pairs alike, whatever their emotion."""
        return self._scores(self._measure("spread"), "spread", "multiple of the direction's norm")

    def cosines(self, trimmed: bool = False) -> Scores:
        """Return the cosine between the directions of two emotions, axes (layer, emotion, other).

        trimmed: without the 0.1 % of coordinates (at least one) where mean |h_l| is largest, which rule cosines in
        raw residual streams."""
        vectors = self.per_emotion
        if trimmed:
            gone = self.massive()
            vectors = vectors.clone()
            for layer in range(self.n_layers):
                vectors[:, layer, gone[layer]] = 0
        unit = (vectors / (vectors.norm(dim=-1, keepdim=True) + EPS)).transpose(0, 1)
        labels = {"emotion": list(self.emotions), "other": list(self.emotions)}
        name = "cosine of directions" + (", massive coordinates left out" if trimmed else "")
        return Scores(unit @ unit.transpose(1, 2), ("layer", "emotion", "other"), labels, name, "cosine")

    def massive(self) -> Int[Tensor, "layer k"]:
        """Return the coordinates of each layer where mean |h_l| is largest: 0.1 % of them, at least one."""
        return self._measure("size").topk(max(1, math.ceil(MASSIVE * self.d_model)), dim=-1).indices

    def _measure(self, name: str) -> Tensor:
        if name not in self.measured:
            raise ValueError(f"These directions ({self.meta.get('kind', 'of unknown origin')}) have no {name!r}.")
        return self.measured[name]

    def _scores(self, values: Float[Tensor, "direction layer"], name: str, unit: str) -> Scores:
        mask = None if bool(values.isfinite().all()) else values.isfinite()
        return Scores(values, ("direction", "layer"), {"direction": self.names}, name, unit, mask)

    def summary(self) -> pd.DataFrame:
        """Return a table with one row per direction and layer.

        Columns: pairs used, norm, strength, and what was measured of its quality."""
        frame = self.strength().to_frame().rename(columns={"value": "strength"})
        norms = torch.cat([self.per_emotion, self.overall[None]]).norm(dim=-1)
        frame.insert(2, "norm", norms.flatten().tolist())
        frame.insert(2, "pairs", [n for name in self.names for n in [self._used(name)] * self.n_layers])
        for name in ("split_half", "agreement", "spread"):
            if name in self.measured:
                frame[name] = self.measured[name].flatten().tolist()
        return frame

    def _used(self, name: str) -> int:
        return sum(self.counts.values()) if name == OVERALL else self.counts[name]

    def plot(self) -> Any:
        """Plot strength by layer, one line per direction (a matplotlib figure)."""
        from veena_lens import plots

        strength = self.strength()
        return plots.curves(
            strength.values.float(),
            x=list(range(self.n_layers)),
            lines=self.names,
            x_name="layer",
            title="Length of the directions",
            name="||S|| / mean ||h||",
        )

    @cached_property
    def fingerprint(self) -> str:
        """Return a hash of the vectors and their emotions, by which a run that uses these directions knows them."""
        digest = hashlib.sha256(json.dumps([list(self.emotions), list(self.overall.shape)]).encode())
        for tensor in (self.overall, self.per_emotion, self.norms):
            digest.update(tensor.detach().cpu().double().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    # --- files and models -----------------------------------------------------------------------------

    def check(self, model: HookedVLM, allow_other_model: bool = False) -> None:
        """Check that the directions fit the model.

        allow_other_model: True takes directions of a model of another name and the same sizes.

        Raises: ValueError where they are not of this model, or not of a model of this size."""
        found, wanted = (self.n_layers, self.d_model), (model.cfg.n_layers, model.cfg.d_model)
        if found != wanted:
            raise ValueError(
                f"The directions have {found[0]} layers of width {found[1]} (from {self.meta.get('model')!r}); "
                f"{model.cfg.model_name or 'this model'} has {wanted[0]} of {wanted[1]}. Extract them from this model."
            )
        if self.made_for is not None:
            self.made_for.require(model.cfg, "The set of directions", allow_other_model)
        elif not (allow_other_model or same_name(str(self.meta.get("model") or ""), model.cfg.model_name)):
            raise ValueError(
                f"The directions are from {self.meta['model']!r}; this is {model.cfg.model_name!r}, whose states have "
                "other directions. Extract them from this model, or pass allow_other_model=True."
            )

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file with the words as JSON, in one step; return its path."""
        path = Path(path)
        names = ("overall", "per_emotion", "norms", "neutral_mean", "emotional_mean")
        tensors = {name: getattr(self, name) for name in names}
        tensors |= {f"measured.{name}": value for name, value in self.measured.items()}
        words = {"emotions": list(self.emotions), "counts": dict(self.counts), "meta": self.meta}
        if self.made_for is not None:
            words["made_for"] = self.made_for.record()
        save_tensors(path, tensors, {"format": FORMAT, "directions": json.dumps(words)})
        return path

    @classmethod
    def load(cls, path: str | Path) -> Directions:
        """Return what `save` wrote. Raises: FileNotFoundError; ValueError for a file cut short, or of another kind."""
        with opened(path, "directions") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise ValueError(f"{path} holds no Directions: its format is {header.get('format')!r}, not {FORMAT!r}.")
            words, tensors = words_of(file, "directions", SCHEMA, path), tensors_of(file)
            measured = {n.removeprefix("measured."): tensors.pop(n) for n in list(tensors) if n.startswith("measured.")}
            made_for = None
            if words.get("made_for") is not None:
                require_words(words["made_for"], MADE_FOR, f"{path}, made_for")
                made_for = MadeFor(**{name: words["made_for"][name] for name in MADE_FOR})
            found = {name: words[name] for name in ("emotions", "counts", "meta")}
            return cls(**tensors, measured=measured, made_for=made_for, **found)

    def __repr__(self) -> str:
        kind = self.meta.get("kind", "directions")
        lines = [f"Directions ({kind}): {self.n_layers} layers of width {self.d_model}, {self._used(OVERALL)} pairs"]
        lines.append("  pairs used: " + ", ".join(f"{e} {self.counts[e]}" for e in self.emotions))
        strength = self.strength().values
        best = int(strength[-1].argmax())
        lines.append(f"  overall strength up to {strength[-1, best]:.3f} of the mean norm, at layer {best}")
        if "split_half" in self.measured:
            last = self.measured["split_half"][-1]
            lines.append(f"  overall split-half cosine {last.min():.3f} to {last.max():.3f} over layers")
        lines += [f"  note: {note}" for note in self.meta.get("notes", [])]
        return "\n".join(lines[:10])
