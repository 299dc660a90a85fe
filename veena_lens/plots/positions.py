"""Numbers over positions as specifications: those of image tokens as maps where their cells lie, those of text as a
strip, all on one colour scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from veena_lens.plots import theme
from veena_lens.plots.charts import Heatmap
from veena_lens.plots.image_overlay import ImageMaps, map_panel
from veena_lens.plots.theme import Limits, Scale

CELL = 16  # pixels of a cell where the image is not known


@dataclass(frozen=True, eq=False, kw_only=True)
class PositionMaps:
    """One map per row and image, and the text's positions as a heat map (None: there are none)."""

    maps: ImageMaps
    strip: Heatmap | None


def position_maps(
    values: Float[Tensor, "row pos"] | np.ndarray,
    *,
    positions: Sequence[int],
    grids: Sequence[Mapping[str, Any]],
    texts: Sequence[str] | None = None,
    rows: Sequence | None = None,
    row_name: str = "",
    image: Image.Image | Sequence[Image.Image] | None = None,
    title: str = "",
    name: str = "",
    unit: str = "",
    limits: Limits = None,
    columns: int = 4,
) -> PositionMaps:
    """Draw numbers over positions where the positions lie: on the image, and in the text.

    Args:
        values: [row pos], one map per row (layer); NaN is an entry that does not exist.
        positions: of the second axis, in the sequence.
        grids: per image its "positions" [height width] in the sequence, and "boxes": left, top, right, bottom of each
            cell in pixels of the image (None: cells divide it evenly).
        texts: of every position of the sequence (default: numbers).
        rows: labels of the rows (default: 0, 1, ...); row_name: what they count.
        image: the image, or one per grid (default: bare cells).
        title: above all. name, unit: of the values, at the colour bar.
        limits: (low, high) of the colour scale (default: those of the values).
        columns: how many maps stand side by side.

    Raises: ValueError where values, positions, rows, images and grids disagree in number, or no grid is among the
    positions.
    """
    table = np.atleast_2d(theme.to_numpy(values))
    if table.ndim != 2 or table.shape[1] != len(positions):
        raise ValueError(
            f"position_maps: values of shape {list(table.shape)} do not fit {len(positions)} positions; give [row pos]."
        )
    labels = theme.check_labels(rows, len(table), "rows")
    images = [image] * len(grids) if image is None or isinstance(image, Image.Image) else list(image)
    if len(images) != len(grids):
        raise ValueError(f"position_maps: {len(images)} images for {len(grids)} grids; give one image per grid.")
    place = {int(position): i for i, position in enumerate(positions)}
    panels, covered = [], set()
    for number, (grid, picture) in enumerate(zip(grids, images, strict=True)):
        cells = np.asarray(grid["positions"])
        found = [place.get(int(cell)) for cell in cells.flatten()]
        if all(i is None for i in found):
            continue
        covered |= {int(cell) for cell in cells.flatten()}
        boxes = None if picture is None or grid.get("boxes") is None else np.asarray(grid["boxes"])
        shown = picture or Image.new("RGB", (CELL * cells.shape[1], CELL * cells.shape[0]), "#d9d9d9")
        for row, label in zip(table, labels, strict=True):
            here = np.array([np.nan if i is None else row[i] for i in found]).reshape(cells.shape)
            about = " ".join(str(part) for part in (row_name, label) if str(part))
            about += f", image {number + 1}" if len(grids) > 1 else ""
            panels.append(map_panel(shown, here, None, boxes, title=about))
    if not panels:
        raise ValueError("position_maps: none of the positions lies in an image; draw a heat map of them.")
    scale = Scale.over_image(table, limits)
    # Tokens between an image's rows belong to no cell and are no words; they stand in the strip by their numbers.
    kept = [i for i, position in enumerate(positions) if int(position) not in covered]
    strip = None
    if kept:
        words = [str(positions[i]) if texts is None else texts[int(positions[i])] for i in kept]
        strip = Heatmap(
            table=table[:, kept],
            x=words,
            y=labels,
            x_name="token of the text",
            y_name=row_name,
            title="",
            name=name,
            unit=unit,
            scale=scale,
            text=None,
            numbers=None,
        )
    label = theme.with_unit(name, unit)
    drawn = ImageMaps(panels=panels, scale=scale, label=label, unit=unit, title=title, columns=columns)
    return PositionMaps(maps=drawn, strip=strip)
