"""Maps over an image as specifications: one value per patch, shown where the patch lies.

A map lies half-transparent over the image in grey, so that its colours and its colour bar mean the same everywhere.
Cells lie where the processor cut them: pass `patch_boxes` (resized, cropped, tiled images), or `box`, the part of the
image that the grid covers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Real
from PIL import Image
from torch import Tensor

from veena_lens.plots import theme
from veena_lens.plots.theme import Limits, Scale

Box = Sequence[int | float]
Boxes = Real[Tensor, "n 4"] | np.ndarray
Grid = Float[Tensor, "height width"] | np.ndarray


@dataclass(frozen=True, eq=False, kw_only=True)
class MapPanel:
    """One map over an image; NaN is a cell that does not exist.

    boxes: left, top, right, bottom of every cell in pixels, row by row; box: that of an even grid, None for cells of
    their own sizes. shares: how much of the whole belongs to which part, shown below the map; hover: what a pointer
    reads in addition to the cell.
    """

    image: Image.Image
    grid: np.ndarray
    boxes: np.ndarray
    box: Box | None
    title: str = ""
    shares: Mapping[str, float] = field(default_factory=dict)
    crosses: bool = False

    @property
    def hover(self) -> str:
        """Return the shares in words."""
        return ", ".join(f"{part} {share:.2f}" for part, share in self.shares.items())


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageMaps:
    """Maps on one colour scale.

    original: the image in its own colours, shown first. side: a panel's width in inches. part_colours: the colour of
    each part of the panels' shares, where they have some."""

    panels: Sequence[MapPanel]
    scale: Scale
    label: str
    unit: str
    title: str = ""
    columns: int = 4
    side: float = 2.1
    original: Image.Image | None = None
    part_colours: Mapping[str, str] = field(default_factory=dict)


def overlay(
    image: Image.Image,
    values: Grid,
    *,
    box: Box | None = None,
    patch_boxes: Boxes | None = None,
    title: str = "",
    name: str = "",
    unit: str = "",
    limits: Limits = None,
) -> ImageMaps:
    """Draw the image, and the same image under the map `values`.

    Args:
        image: the image as the user gave it.
        values: the map [height width]; values of both signs get a scale about 0.
        box: left, top, right, bottom of the part that the grid divides evenly (default: the whole image).
        patch_boxes: left, top, right, bottom of each cell in the image's pixels, row by row, instead of `box`.
        title: above the map.
        name, unit: of the values, at the colour bar.
        limits: (low, high) of the colour scale (default: those of the values).

    Raises: ValueError where `values` is not a grid, or there is not one box per cell.
    """
    grid = theme.to_numpy(values)
    if grid.ndim != 2:
        raise ValueError(f"overlay: values must be [height width], not of shape {list(grid.shape)}; see `overlays`.")
    return ImageMaps(
        panels=[map_panel(image, grid, box, patch_boxes, title=title)],
        scale=Scale.over_image(grid, limits),
        label=theme.with_unit(name, unit),
        unit=unit,
        side=2.9,
        original=image,
    )


def overlays(
    image: Image.Image | Sequence[Image.Image],
    values: Float[Tensor, "n height width"] | np.ndarray | Sequence,
    *,
    titles: Sequence[str] | None = None,
    box: Box | None = None,
    patch_boxes: Boxes | None = None,
    title: str = "",
    name: str = "",
    unit: str = "",
    limits: Limits = None,
    columns: int = 4,
    original: Image.Image | None = None,
) -> ImageMaps:
    """Draw several maps on one colour scale, each over the image or over its own of as many images.

    Args:
        image, values: one image, or one per map; the maps [n height width], or a list of grids.
        titles: above each map. title: above all.
        columns: how many maps stand side by side.
        original: an image that stands before the maps in its own colours (default: none).
        box, patch_boxes, name, unit, limits: as for `overlay`.

    Raises: ValueError for no maps, as many titles or images as there are not maps, or as `overlay`.
    """
    grids = [theme.to_numpy(grid) for grid in values]
    if not grids or any(grid.ndim != 2 for grid in grids):
        raise ValueError(f"overlays: give at least one map [height width]; got {[list(g.shape) for g in grids]}.")
    images = [image] * len(grids) if isinstance(image, Image.Image) else list(image)
    theme.check_labels(images, len(grids), "images")
    names = [""] * len(grids) if titles is None else theme.check_labels(titles, len(grids), "titles")
    return ImageMaps(
        panels=[
            map_panel(mine, grid, box, patch_boxes, title=str(caption))
            for mine, grid, caption in zip(images, grids, names, strict=True)
        ],
        scale=Scale.over_image(np.concatenate([grid.ravel() for grid in grids]), limits),
        label=theme.with_unit(name, unit),
        unit=unit,
        title=title,
        columns=columns,
        side=2.9 if len(grids) <= 2 else 2.1,
        original=original,
    )


def map_panel(
    image: Image.Image, grid: np.ndarray, box: Box | None, patch_boxes: Boxes | None, **about: Any
) -> MapPanel:
    """Return a panel whose cells lie in `patch_boxes`, else evenly in `box` (None: the whole image).

    Raises: ValueError where there is not one box per cell."""
    if patch_boxes is not None:
        boxes = theme.to_numpy(patch_boxes)
        if boxes.shape != (grid.size, 4):
            raise ValueError(
                f"patch_boxes has shape {list(boxes.shape)}; a grid of {grid.shape[0]} x {grid.shape[1]} cells needs "
                f"[{grid.size}, 4]."
            )
        return MapPanel(image=image, grid=grid, boxes=boxes, box=None, **about)
    left, top, right, bottom = box or (0, 0, image.width, image.height)
    rows, columns = grid.shape
    y, x = (part.ravel() for part in np.mgrid[:rows, :columns])
    width, height = (right - left) / columns, (bottom - top) / rows
    boxes = np.stack([left + x * width, top + y * height, left + (x + 1) * width, top + (y + 1) * height], -1)
    return MapPanel(image=image, grid=grid, boxes=boxes, box=(left, top, right, bottom), **about)
