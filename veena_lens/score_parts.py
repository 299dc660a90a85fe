"""Parts of `Scores`: labels of axes, masks, and the two runs that a sweep compares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

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
