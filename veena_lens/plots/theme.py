"""The look that all figures share, and how they become files.

Colours are safe for colour-blind readers (Okabe and Ito's lines, RdBu for signed and viridis for unsigned cells).
Labels are shown literally: `$` starts no formula, and a character that no font here can draw becomes a box instead of
a warning.
"""

from __future__ import annotations

import inspect
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, wraps
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import numpy as np
from jaxtyping import Real
from matplotlib import colormaps, font_manager, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from veena_lens.long_runs import write_file

LINE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C")
SIGNED, UNSIGNED, ON_PICTURE = "RdBu_r", "viridis", "inferno"
MISSING = "#d9d9d9"
FALLBACK_FONTS = ("Noto Sans CJK SC", "Source Han Sans SC", "WenQuanYi Micro Hei", "Noto Emoji")
MOST_TICKS = 24

Center = int | float | None | Literal["auto"]
Limits = Sequence[int | float] | None
P = ParamSpec("P")
Spec = TypeVar("Spec")
Drawn = TypeVar("Drawn")
Format = Literal["png", "svg", "pdf"]
FORMATS: dict[str, Format] = {"png": "png", "svg": "svg", "pdf": "pdf"}


def drawn(specify: Callable[P, Spec], draw: Callable[[Spec], Drawn], kind: str) -> Callable[P, Drawn]:
    """Join a function that specifies a figure and one that draws it; `kind` is what the whole returns."""

    @wraps(specify)
    def figure(*args: P.args, **kwargs: P.kwargs) -> Drawn:
        with themed():
            return draw(specify(*args, **kwargs))

    figure.__dict__["__signature__"] = inspect.signature(specify).replace(return_annotation=kind)
    return figure


@dataclass(frozen=True)
class Scale:
    """From values to colours: `colours` names matplotlib's map from `low` to `high`, `missing` the colour of NaN."""

    low: float
    high: float
    colours: str
    missing: str | None = MISSING

    @classmethod
    def of(cls, values: np.ndarray, center: Center = "auto", limits: Limits = None) -> Scale:
        """Return the scale of `values`, diverging about `center` (with "auto", about 0 if both signs occur) or
        sequential; `limits` (low, high) replace those of the values."""
        known = values[np.isfinite(values)]
        low, high = limits or ((known.min(), known.max()) if known.size else (0.0, 1.0))
        if center == "auto":
            center = 0.0 if low < 0 < high else None
        if center is not None and limits is None:
            reach = max(abs(low - center), abs(high - center)) or 1.0
            low, high = center - reach, center + reach
        return cls(float(low), float(low + 1.0 if low == high else high), UNSIGNED if center is None else SIGNED)

    @classmethod
    def over_image(cls, values: np.ndarray, limits: Limits = None) -> Scale:
        """Return the scale of values laid over an image: about 0 for both signs, else one that shows on grey."""
        scale = cls.of(values, "auto", limits)
        return replace(scale, colours=ON_PICTURE, missing=None) if scale.colours == UNSIGNED else scale

    @property
    def norm(self) -> Normalize:
        return Normalize(self.low, self.high)

    @property
    def colormap(self) -> Colormap:
        colours = colormaps[self.colours]
        return colours if self.missing is None else colours.with_extremes(bad=self.missing)

    def rgb(self, value: float) -> tuple[float, float, float]:
        """Return red, green and blue of a value, each in `[0, 1]`."""
        red, green, blue, _ = self.colormap(self.norm(value))
        return red, green, blue


@cache
def font_families() -> tuple[str, ...]:
    """Return DejaVu Sans, which matplotlib brings along, then the fonts for other scripts that this machine has."""
    installed = set(font_manager.fontManager.get_font_names())
    return ("DejaVu Sans", *(name for name in FALLBACK_FONTS if name in installed))


@cache
def _drawable(character: str) -> bool:
    paths = (font_manager.findfont(family) for family in font_families())
    return any(font_manager.get_font(path).get_char_index(ord(character)) for path in paths)


def printable(label: object) -> str:
    """Return `label` as a single line that the fonts can draw."""
    text = str(label).replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")
    return "".join(c if _drawable(c) else "\u25a1" for c in text)


@contextmanager
def themed() -> Iterator[None]:
    """Give new artists the project's look; matplotlib's settings are as before afterwards."""
    settings: dict[Any, Any] = {
        "font.family": list(font_families()),
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.unicode_minus": False,
        "figure.facecolor": "white",
        "figure.dpi": 144,
        "savefig.dpi": 144,
        "grid.color": "#e5e5e5",
        "legend.frameon": False,
        "legend.fontsize": 9,
        "text.parse_math": False,
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
        "svg.hashsalt": "veena_lens",
    }
    with rc_context(settings):
        yield


class ShownFigure(Figure):
    """A figure that a notebook shows where it is the last line of a cell, and that a script saves.

    pyplot does not know of it: no loop has to close its figures, and `plt.show` and `plt.savefig` concern others.
    """

    def save(self, path: str | Path) -> ShownFigure:
        """Write the figure as the path's ending says (.png, .svg or .pdf), and return the figure itself, so that a
        notebook shows what it saved.

        Raises: ValueError for another ending; OSError that says how to go on, where the disk is full."""
        save(self, path)
        return self

    def show(self, warn: bool = True) -> None:
        """Show the figure below the cell of a notebook; in a script, in the system's viewer of images.

        warn: as for matplotlib's own figures; nothing here warns."""
        ipython = sys.modules.get("IPython")
        if ipython is not None and ipython.get_ipython() is not None:
            from IPython.display import display

            display(self)
        else:
            Image.open(io.BytesIO(encode(self))).show()

    def _repr_png_(self) -> bytes:
        return encode(self, "png")


def new_figure(width: float, height: float) -> ShownFigure:
    """Make an empty figure of `width` x `height` inches that belongs to no window."""
    figure = ShownFigure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def encode(figure: Figure, format: Format = "png") -> bytes:
    """Encode the figure as the bytes of a PNG, SVG or PDF file; the same figure gives the same bytes every time."""
    if format not in ("png", "svg", "pdf"):
        raise ValueError(f"Unknown figure format {format!r}; expected 'png', 'svg' or 'pdf'.")
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    buffer = io.BytesIO()
    with themed():
        figure.savefig(buffer, format=format, metadata=undated.get(format))
    return buffer.getvalue()


def save(figure: Figure, path: str | Path) -> Path:
    """Write the figure to `path`, as its ending says (.png, .svg or .pdf), and return the path."""
    path = Path(path)
    ending = path.suffix.lower().lstrip(".")
    if ending not in FORMATS:
        raise ValueError(f"Cannot save a figure as {path.name!r}; the name must end in .png or .svg, or in .pdf.")
    write_file(path, encode(figure, FORMATS[ending]))
    return path


def to_numpy(values: Real[Tensor, ...] | np.ndarray | Sequence) -> np.ndarray:
    """Return `values` in float64 on the CPU, as matplotlib wants them."""
    if isinstance(values, Tensor):
        return values.detach().double().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


def with_unit(name: str, unit: str) -> str:
    """Return "name (unit)", or the one that is there."""
    return f"{name} ({unit})" if name and unit else name or unit


def check_labels(labels: Sequence | None, count: int, axis: str) -> Sequence:
    """Return `labels`, or 0..count-1 for none. Raises: ValueError where their number is not `count`."""
    if labels is None:
        return range(count)
    if len(labels) != count:
        raise ValueError(f"{len(labels)} labels for {count} entries along {axis}; give one label per entry, or none.")
    return labels


def set_ticks(axes: Axes, axis: Literal["x", "y"], labels: Sequence) -> None:
    """Label entries 0..n-1, every k-th only where there are too many to read; long x labels are turned."""
    step = -(-len(labels) // MOST_TICKS) if labels else 1
    places = list(range(0, len(labels), step))
    texts = [printable(labels[place]) for place in places]
    if axis == "y":
        axes.set_yticks(places, texts)
    elif max((len(text) for text in texts), default=0) > 4:
        axes.set_xticks(places, texts, rotation=45, ha="right", rotation_mode="anchor")
    else:
        axes.set_xticks(places, texts)
