"""Parts of `Scores`: labels of axes, indices, masks, the words of a file, and the two runs that a sweep compares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from veena_lens.own_files import require_words, words_of

FORMAT = "veena_lens.Scores/1"
OLD_SWEEP_FORMAT = "veena_lens.SweepResult/1"  # of sweeps, before they were Scores
Label = str | int | float | bool | None


@dataclass(frozen=True, eq=False)
class ReferenceRuns:
    """The metric of the two runs that a sweep compares, and which of them it patches.

    clean, corrupted: [pair], in the metric's unit. direction: "denoising" (clean activations go into the corrupted
    run) or "noising" (the other way round).
    """

    clean: Float[Tensor, " pair"]
    corrupted: Float[Tensor, " pair"]
    direction: str = "denoising"

    def share(self, moved: Float[Tensor, ...], pair_axis: int | None = 0) -> Float[Tensor, ...]:
        """Return changes of the metric as shares of clean - corrupted, NaN where the two runs do not differ.

        moved: changes towards the clean run (denoising) or away from it (noising), in the metric's unit. pair_axis: the
        axis of `moved` that counts pairs, None where there is one pair."""
        gap = torch.where(self.clean == self.corrupted, torch.nan, self.clean - self.corrupted)
        return moved / _along(gap, moved, pair_axis).to(moved)

    def effects(self, values: Float[Tensor, ...], pair_axis: int | None = 0) -> Float[Tensor, ...]:
        """Return the effects of metrics under patches: (patched - corrupted) / (clean - corrupted) when denoising,
        (clean - patched) / (clean - corrupted) when noising."""
        clean, corrupted = (_along(x, values, pair_axis) for x in (self.clean, self.corrupted))
        return self.share(values - corrupted if self.direction == "denoising" else clean - values, pair_axis)


def _along(per_pair: Tensor, values: Tensor, axis: int | None) -> Tensor:
    """Return numbers of pairs `[pair]`, shaped to broadcast over `values` along the axis that counts pairs."""
    return per_pair.reshape([-1 if i == axis else 1 for i in range(values.ndim)])


def plain_labels(axis: str, labels: Sequence | None, count: int) -> list[Label]:
    """Return one plain label per entry of an axis: numbers of numpy and torch become Python's; by default 0, 1, ...

    Raises: ValueError for another number of labels than `count`, or one that is neither text nor a number."""
    if labels is None:
        return list(range(count))
    plain = [label.item() if hasattr(label, "item") else label for label in labels]
    if len(plain) != count:
        raise ValueError(f"Scores: {len(plain)} labels for axis {axis!r}, which has {count} entries.")
    odd = next((label for label in plain if not isinstance(label, (str, int, float, bool, type(None)))), None)
    if odd is not None:
        raise ValueError(f"Scores: label {odd!r} of axis {axis!r} is a {type(odd).__name__}; use text or numbers.")
    return plain


def find_label(labels: Sequence, wanted: object) -> list[int]:
    """Return the places where a label occurs; a negative integer counts from the end of labels 0, 1, ..."""
    wanted = getattr(wanted, "item", lambda: wanted)()
    # 1 == True and 1 == 1.0 in Python; a boolean label is asked for by a boolean.
    found = [
        i for i, label in enumerate(labels) if label == wanted and isinstance(label, bool) == isinstance(wanted, bool)
    ]
    if found or not isinstance(wanted, int) or isinstance(wanted, bool) or not -len(labels) <= wanted < 0:
        return found
    counts = all(isinstance(label, int) and not isinstance(label, bool) and label >= 0 for label in labels)
    return [len(labels) + wanted] if counts else []


def indexed(axes: Sequence[str], labels: Mapping[str, Sequence], index: Any) -> dict[str, Any]:
    """Return, by axis, the labels that `scores[index]` asks for; axes that are kept whole are left out.

    index: one entry per axis in order, as `Scores.__getitem__` takes them.

    Raises: IndexError for more entries than axes; ValueError for a slice of labels that do not count 0, 1, ..."""
    given = list(index) if isinstance(index, tuple) else [index]
    if sum(entry is Ellipsis for entry in given) > 1:
        raise IndexError("Scores: an index holds '...' once at most.")
    n_given = sum(entry is not Ellipsis for entry in given)
    if n_given > len(axes):
        raise IndexError(f"Scores: {n_given} indices for {len(axes)} axes {tuple(axes)}.")
    at = next((i for i, entry in enumerate(given) if entry is Ellipsis), None)
    if at is not None:
        given[at : at + 1] = [slice(None)] * (len(axes) - n_given)
    chosen: dict[str, Any] = {}
    for axis, entry in zip(axes, given, strict=False):
        if isinstance(entry, slice):
            if entry == slice(None):
                continue
            if list(labels[axis]) != list(range(len(labels[axis]))):
                raise ValueError(
                    f"Scores: {_slice_text(entry)} of axis {axis!r}, whose labels are {few_labels(labels[axis])}: a "
                    f"slice counts entries 0, 1, ... Give a list of labels, select({axis}=[...]), or slice .values."
                )
            chosen[axis] = list(labels[axis])[entry]
        else:
            chosen[axis] = entry.tolist() if hasattr(entry, "tolist") else entry
    return chosen


def is_one_label(wanted: Any) -> bool:
    """Return True for a single label, False for several of them."""
    return isinstance(wanted, str) or getattr(wanted, "ndim", 1) == 0 or not hasattr(wanted, "__iter__")


def _slice_text(entry: slice) -> str:
    bounds = [entry.start, entry.stop, *([] if entry.step is None else [entry.step])]
    return ":".join("" if bound is None else str(bound) for bound in bounds)


def numbers_of(values: Tensor, exists: Tensor | None) -> np.ndarray:
    """Return values for numpy, which has no bfloat16; NaN where an entry does not exist."""
    numbers = values.detach().cpu()
    numbers = numbers.float() if numbers.dtype == torch.bfloat16 else numbers
    if exists is not None:
        numbers = numbers if numbers.is_floating_point() else numbers.double()
        numbers = numbers.masked_fill(~exists.cpu(), torch.nan)
    return numbers.numpy()


def few_labels(labels: Sequence, room: int = 72) -> str:
    """Return the labels on one line of about `room` characters: all of them, or the first ones and the last."""
    texts = [repr(label) for label in labels]
    if len(" ".join(texts)) <= room:
        return " ".join(texts)
    head: list[str] = []
    while len(" ".join([*head, texts[len(head)]])) < room - 16 and len(head) < len(texts) - 1:
        head.append(texts[len(head)])
    return f"{' '.join(head)} ... {texts[-1][:16]} ({len(texts)})"


def require_mask(mask: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError for a mask that is not bool, or does not broadcast to the values' shape."""
    if mask.dtype != torch.bool:
        raise ValueError(f"Scores: mask has dtype {mask.dtype}; expected torch.bool, True where an entry exists.")
    try:
        mask.expand(shape)
    except RuntimeError as error:
        raise ValueError(f"Scores: mask {list(mask.shape)} does not broadcast to values {list(shape)}.") from error


LABEL = (str, int, float, bool, None)
SCHEMA = {"axes": [str], "labels?": {str: [LABEL]}, "name?": str, "unit?": str, "meta?": {str: object}}
SCHEMA |= {"columns?": {str: list}, "direction?": str}


def words_of_scores(file: Any, path: str | Path) -> dict[str, Any]:
    """Return the words of a file's header. Raises: ValueError for a file of another kind."""
    header = file.metadata() or {}
    if header.get("format") == FORMAT:
        words = words_of(file, "scores", SCHEMA, path)
    else:
        words = words_of(file, "veena_lens", {}, path)
        if words.pop("format", None) != OLD_SWEEP_FORMAT:
            raise ValueError(f"{path} holds no Scores: its format is {header.get('format')!r}, expected {FORMAT!r}.")
        require_words(words, SCHEMA, str(path))
        words |= {"name": "metric"}
    if unknown := words.keys() - {name.removesuffix("?") for name in SCHEMA}:
        raise ValueError(
            f"{path} has the unknown fields {', '.join(sorted(unknown))}; it was written by a later version."
        )
    return words
