"""Overlays: a value a patch of the image, drawn where the patch lies.

The image is shown in grey below a half-transparent map, so that the map's colours and its colour bar mean
the same everywhere, and once in its own colours beside it. Cells lie where the processor cut them: pass
`patch_boxes` (resized, cropped, tiled images), or `box`, the part of the image that the grid covers.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Real
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PatchCollection
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from veena_lens.plots import theme
from veena_lens.plots.charts import colour_scale

Box = Sequence[int | float]
OPACITY = 0.6
DRAWN_SIZE = 768  # pixels


def overlay(
    image: Image.Image,
    values: Float[Tensor, "height width"] | np.ndarray,
    *,
    box: Box | None = None,
    patch_boxes: Real[Tensor, "n 4"] | np.ndarray | None = None,
    title: str = "",
    name: str = "",
    unit: str = "",
    limits: Sequence[int | float] | None = None,
) -> Figure:
    """The image, and beside it the same image under the map `values`.

    `patch_boxes` holds each cell's left, top, right, bottom in the image's pixels, row by row; without them
    the grid divides `box` (default: the whole image) evenly. Signed values get a scale about 0.
    Raises ValueError where `values` is no grid or the boxes are not one a cell.
    """
    grid = theme.to_numpy(values)
    if grid.ndim != 2:
        raise ValueError(f"overlay wants values [height width], found shape {list(grid.shape)}; see `overlays`.")
    figure, panels, norm, colours = _panels(image, grid[None], 2, limits)
    show(panels[0], image)
    lay(panels[1], image, grid, box, patch_boxes, norm, colours)
    with theme.themed():
        panels[0].set_title("picture")
        panels[1].set_title(theme.printable(title))
        colour_bar(figure, panels, norm, colours, theme.with_unit(name, unit))
    return figure


def overlays(
    image: Image.Image | Sequence[Image.Image],
    values: Float[Tensor, "n height width"] | np.ndarray | Sequence,
    *,
    titles: Sequence[str] | None = None,
    box: Box | None = None,
    patch_boxes: Real[Tensor, "n 4"] | np.ndarray | None = None,
    title: str = "",
    name: str = "",
    unit: str = "",
    limits: Sequence[int | float] | None = None,
    columns: int = 4,
) -> Figure:
    """Several maps on one colour scale, each over the image or over its own of as many images."""
    grids = [theme.to_numpy(grid) for grid in values]
    if not grids or any(grid.ndim != 2 for grid in grids):
        raise ValueError(f"overlays wants at least one map [height width], found {[list(g.shape) for g in grids]}.")
    images = [image] * len(grids) if isinstance(image, Image.Image) else list(image)
    theme.check_labels(images, len(grids), "pictures")
    names = [""] * len(grids) if titles is None else theme.check_labels(titles, len(grids), "titles")
    figure, panels, norm, colours = _panels(images[0], grids, len(grids), limits, columns)
    for panel, picture, grid, caption in zip(panels, images, grids, names, strict=True):
        lay(panel, picture, grid, box, patch_boxes, norm, colours)
        with theme.themed():
            panel.set_title(theme.printable(caption), fontsize=9)
    with theme.themed():
        if title:
            figure.suptitle(theme.printable(title), x=0.01, ha="left", fontweight="bold", fontsize=11)
        colour_bar(figure, panels, norm, colours, theme.with_unit(name, unit))
    return figure


def picture_scale(values: np.ndarray, limits: Sequence[int | float] | None) -> tuple[Normalize, Colormap]:
    """The scale of values laid over an image: about 0 for values of both signs, else one that shows on grey."""
    norm, colours = colour_scale(values, "auto", limits)
    return norm, colormaps[theme.ON_PICTURE] if colours.name == theme.UNSIGNED else colours


def _panels(
    image: Image.Image, grids: Sequence[np.ndarray] | np.ndarray, count: int,
    limits: Sequence[int | float] | None, columns: int = 4,
) -> tuple[Figure, list[Axes], Normalize, Colormap]:  # fmt: skip
    """A figure with `count` empty panels in the image's proportions, and the scale that all maps share."""
    flat = np.concatenate([grid.ravel() for grid in grids])
    norm, colours = picture_scale(flat, limits)
    columns = min(columns, count)
    rows = -(-count // columns)
    side = 2.9 if count <= 2 else 2.1
    panel_height = side * min(max(image.height / image.width, 0.4), 2.5)
    with theme.themed():
        figure = theme.new_figure(columns * side + 1.1, rows * (panel_height + 0.35) + 0.35)
        panels = [figure.add_subplot(rows, columns, place + 1) for place in range(count)]
    for panel in panels:
        panel.set_axis_off()
    return figure, panels, norm, colours


def show(panel: Axes, image: Image.Image, as_grey: bool = False) -> None:
    """Draw the image in a panel, in its own colours or in pale grey below a map."""
    # Pixel edges lie on whole numbers, so that a box (0, 0, width, height) is exactly the image; what is drawn is
    # no larger than a figure can show.
    small = image.convert("RGB")
    small.thumbnail((DRAWN_SIZE, DRAWN_SIZE))
    pixels = np.asarray(small)
    if as_grey:
        pixels = np.repeat(
            (80 + 0.68 * np.asarray(small.convert("L"), dtype=np.float64)).astype(np.uint8)[..., None], 3, 2
        )
    panel.imshow(pixels, extent=(0, image.width, image.height, 0), interpolation="bicubic")
    panel.set(xlim=(0, image.width), ylim=(image.height, 0), aspect="equal")


def lay(
    panel: Axes, image: Image.Image, grid: np.ndarray, box: Box | None,
    patch_boxes: Real[Tensor, "n 4"] | np.ndarray | None, norm: Normalize, colours: Colormap,
) -> None:  # fmt: skip
    """Lay a map over the grey image, each cell on its patch; NaN shows the grey of what does not exist."""
    show(panel, image, as_grey=True)
    if patch_boxes is None:
        left, top, right, bottom = box or (0, 0, image.width, image.height)
        extent = (left, right, bottom, top)
        panel.imshow(grid, extent=extent, cmap=colours, norm=norm, alpha=OPACITY, interpolation="nearest")
    else:
        boxes = cell_boxes(image, grid, box, patch_boxes)
        cells = [Rectangle((left, top), right - left, bottom - top) for left, top, right, bottom in boxes]
        look: dict[str, Any] = {"cmap": colours, "norm": norm, "alpha": OPACITY, "linewidth": 0}
        panel.add_collection(PatchCollection(cells, array=grid.ravel(), **look))
    panel.set(xlim=(0, image.width), ylim=(image.height, 0), aspect="equal")


def cell_boxes(
    image: Image.Image, grid: np.ndarray, box: Box | None, patch_boxes: Real[Tensor, "n 4"] | np.ndarray | None
) -> np.ndarray:
    """Left, top, right, bottom of every cell, row by row: the given ones, else `box` (the image) divided evenly.

    Raises: ValueError where the boxes are not one a cell."""
    if patch_boxes is not None:
        boxes = theme.to_numpy(patch_boxes)
        if boxes.shape != (grid.size, 4):
            raise ValueError(f"patch_boxes has shape {list(boxes.shape)}; a grid {grid.shape} wants [{grid.size}, 4].")
        return boxes
    left, top, right, bottom = box or (0, 0, image.width, image.height)
    rows, columns = grid.shape
    y, x = (part.ravel() for part in np.mgrid[:rows, :columns])
    width, height = (right - left) / columns, (bottom - top) / rows
    return np.stack([left + x * width, top + y * height, left + (x + 1) * width, top + (y + 1) * height], -1)


def colour_bar(
    figure: Figure, panels: Sequence[Axes], norm: Normalize, colours: Colormap, label: str, aspect: float | int = 20
) -> None:
    """One bar for all panels, as pale as the maps are."""
    # Opaque white below the half-transparent colours would pale the bar alone; the image's mean grey does not.
    bar = figure.colorbar(
        ScalarMappable(norm, colours), ax=list(panels), fraction=0.04, pad=0.02, alpha=OPACITY, aspect=aspect
    )
    bar.ax.set_facecolor("#bfbfbf")
    bar.outline.set_visible(False)
    bar.set_label(theme.printable(label))
