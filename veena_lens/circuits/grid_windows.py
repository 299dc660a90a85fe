"""Windows that slide over an image's token grid, and the maps that runs with each window covered make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from veena_lens.sweeps.engine import bar
from veena_lens.sweeps.measuring import parts, wide


@dataclass(frozen=True)
class Windows:
    """Windows of cells that slide over a grid; the last ones lie flush with the border."""

    size: tuple[int, int]  # height, width
    stride: int

    @property
    def meta(self) -> dict[str, Any]:
        """The windows as results state them."""
        return {"window": list(self.size), "stride": self.stride}

    def on(self, grid: Sequence[int]) -> list[Bool[Tensor, "height width"]]:
        """Return the cells of each window, row by row."""
        steps = []
        for n, side in zip(grid, self.size, strict=True):
            end = max(n - side, 0)
            steps.append(sorted({*range(0, end + 1, self.stride), end}))
        found = []
        for y in steps[0]:
            for x in steps[1]:
                cells = torch.zeros(*grid, dtype=torch.bool)
                cells[y : y + self.size[0], x : x + self.size[1]] = True
                found.append(cells)
        return found


def windows_of(who: str, window: int | tuple[int, int], stride: int) -> Windows:
    """Return the windows of a side, or (height, width). Raises: ValueError for a size or stride below one cell."""
    height, width = (window, window) if isinstance(window, int) else window
    if height < 1 or width < 1 or stride < 1:
        raise ValueError(f"{who}: window={window} and stride={stride} count cells of the grid, at least 1.")
    return Windows((height, width), stride)


def mapped(
    grids: Sequence[Sequence[int]],
    windows: Windows,
    max_rows: int,
    progress: bool,
    run: Callable[[int], tuple[Tensor, Callable[[Sequence[Tensor]], Tensor]]],
) -> tuple[list[Float[Tensor, "_ _"]], Float[Tensor, " pair"]]:
    """Return the map of each pair, and its metric with nothing covered.

    run: gives for a pair that metric [1], and a function from windows [cells] to the metric with each covered."""
    every = [windows.on(grid) for grid in grids]
    show = bar(sum(map(len, every)), progress, "occlusions")
    maps, base = [], []
    for pair, chosen in enumerate(every):
        plain, covered = run(pair)
        found = []
        for some in parts(len(chosen), max_rows):
            found.append(covered([chosen[k] for k in some]))
            if show is not None:
                show.update(len(some))
        base.append(plain)
        maps.append(spread(wide(plain) - wide(torch.cat(found)), torch.stack(chosen)))
    if show is not None:
        show.close()
    return maps, torch.cat(base)


def spread(
    change: Float[Tensor, " window"], windows: Bool[Tensor, "window height width"]
) -> Float[Tensor, "height width"]:
    """Return each cell's mean over the windows that cover it; NaN where none does."""
    inside = windows.to(change.device)
    total = torch.where(inside, change[:, None, None], torch.zeros_like(change[:, None, None])).sum(0)
    return total / inside.sum(0)
