"""The look that all figures share, and how they become files.

Colours are safe for colour-blind readers (Okabe and Ito's lines, RdBu for signed and viridis for unsigned
cells). Labels are shown as they are: `$` starts no formula, and a character that no font here can draw
becomes a box instead of a warning.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Real
from matplotlib import font_manager, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

LINE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C")
SIGNED, UNSIGNED, ON_PICTURE = "RdBu_r", "viridis", "inferno"
MISSING = "#d9d9d9"
FALLBACK_FONTS = ("Noto Sans CJK SC", "Source Han Sans SC", "WenQuanYi Micro Hei", "Noto Emoji")
MOST_TICKS = 24

Format = Literal["png", "svg", "pdf"]
FORMATS: dict[str, Format] = {"png": "png", "svg": "svg", "pdf": "pdf"}


@cache
def font_families() -> tuple[str, ...]:
    """DejaVu Sans, which matplotlib brings along, then the fonts for other scripts that this machine has."""
    installed = set(font_manager.fontManager.get_font_names())
    return ("DejaVu Sans", *(name for name in FALLBACK_FONTS if name in installed))


@cache
def _drawable(character: str) -> bool:
    paths = (font_manager.findfont(family) for family in font_families())
    return any(font_manager.get_font(path).get_char_index(ord(character)) for path in paths)


def printable(label: object) -> str:
    """`label` as a single line that the fonts can draw."""
    text = str(label).replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")
    return "".join(c if _drawable(c) else "\u25a1" for c in text)


@contextmanager
def themed() -> Iterator[None]:
    """Within it, new artists have the project's look; matplotlib's settings are as before afterwards."""
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
    """A figure that a notebook shows as an image, although pyplot does not know of it."""

    def _repr_png_(self) -> bytes:
        return encode(self, "png")


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of `width` x `height` inches that belongs to no window."""
    figure = ShownFigure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def encode(figure: Figure, format: Format = "png") -> bytes:
    """The figure as the bytes of a PNG, SVG or PDF file; the same figure gives the same bytes every time."""
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
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(figure, FORMATS[ending]))
    return path


def to_numpy(values: Real[Tensor, "..."] | np.ndarray | Sequence) -> np.ndarray:
    """`values` in float64 on the CPU, as matplotlib wants them."""
    if isinstance(values, Tensor):
        return values.detach().double().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


def with_unit(name: str, unit: str) -> str:
    """ "name (unit)", or the one that is there."""
    return f"{name} ({unit})" if name and unit else name or unit


def check_labels(labels: Sequence | None, count: int, axis: str) -> Sequence:
    """`labels`, or 0..count-1 where there are none. Raises where their number is not `count`."""
    if labels is None:
        return range(count)
    if len(labels) != count:
        raise ValueError(f"{len(labels)} labels for {count} entries along {axis}; give one label an entry, or none.")
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
