"""The same figures as plotly's, to hover over in a notebook or a page: same data, same colours.

Optional: `pip install 'veena-lens[interactive]'`. A page that `save` writes holds plotly's script itself, so that it
opens from disk without a network.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Real
from matplotlib.colors import Colormap, Normalize
from PIL import Image
from torch import Tensor

from veena_lens.inputs import MultimodalInputs
from veena_lens.plots import theme
from veena_lens.plots.charts import band_of, colour_scale
from veena_lens.plots.heads import head_maps
from veena_lens.plots.image_overlay import cell_boxes, picture_scale

SCALES = {theme.SIGNED: "RdBu_r", theme.UNSIGNED: "Viridis", theme.ON_PICTURE: "Inferno"}
DASHES = ("solid", "dash", "dashdot", "dot")


def _plotly() -> Any:
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise ImportError(
            "Interactive figures need plotly: pip install 'veena-lens[interactive]' (or leave interactive=False)."
        ) from error
    return go


def heatmap(
    values: Float[Tensor, "y x"] | np.ndarray,
    *,
    x: Sequence | None = None,
    y: Sequence | None = None,
    x_name: str = "",
    y_name: str = "",
    title: str = "",
    name: str = "",
    unit: str = "",
    center: int | float | None | Literal["auto"] = "auto",
    limits: Sequence[int | float] | None = None,
    text: Sequence[Sequence[str]] | None = None,
) -> Any:
    """As `plots.heatmap`: a coloured cell an entry, its labels and value under the pointer.

    Raises: ValueError as `plots.heatmap`; ImportError without plotly."""
    go, table = _plotly(), theme.to_numpy(values)
    if table.ndim != 2 or not table.size:
        raise ValueError(f"heatmap wants values [y x], found shape {list(table.shape)}; select or reduce first.")
    rows, columns = table.shape
    xs, ys = (theme.check_labels(given, n, axis) for given, n, axis in ((x, columns, "x"), (y, rows, "y")))
    low, high, colours = _scale(table, center, limits)
    shown = f"{x_name or 'x'} %{{x}}<br>{y_name or 'y'} %{{y}}<br>{name or 'value'} %{{z:.4g}} {unit}"
    trace = go.Heatmap(
        z=table,
        x=_apart(xs),
        y=_apart(ys),
        zmin=low,
        zmax=high,
        colorscale=colours,
        colorbar={"title": theme.with_unit(name, unit)},
        text=text,
        hovertemplate=shown + ("<br>%{text}" if text is not None else "") + "<extra></extra>",
        xgap=1,
        ygap=1,
    )
    figure = go.Figure(trace)
    figure.update_yaxes(autorange="reversed", title=y_name, type="category")
    figure.update_xaxes(title=x_name, type="category")
    return _styled(figure, title)


def curves(
    values: Float[Tensor, "line x"] | Float[Tensor, " x"] | np.ndarray,
    *,
    x: Sequence | None = None,
    lines: Sequence | None = None,
    x_name: str = "",
    title: str = "",
    name: str = "",
    unit: str = "",
    spread: Float[Tensor, "line x"] | Float[Tensor, " x"] | np.ndarray | None = None,
    interval: tuple[Any, Any] | None = None,
) -> Any:
    """As `plots.curves`: a line a row, with a band of +- `spread` or of `interval` (low, high).

    Raises: ValueError as `plots.curves`; ImportError without plotly."""
    go, table = _plotly(), np.atleast_2d(theme.to_numpy(values))
    if table.ndim != 2 or not table.size:
        raise ValueError(f"curves wants values [x] or [line x], found shape {list(table.shape)}; select or reduce.")
    band = band_of(table, spread, interval)
    places = list(theme.check_labels(x, table.shape[1], "x"))
    names = None if lines is None else theme.check_labels(lines, table.shape[0], "lines")
    figure = go.Figure()
    for i, row in enumerate(table):
        colour = theme.LINE_COLOURS[i % len(theme.LINE_COLOURS)]
        dash = DASHES[i // len(theme.LINE_COLOURS) % len(DASHES)]
        label = "" if names is None else str(names[i])
        if band is not None:
            edge = np.concatenate([band[1][i], band[0][i][::-1]])
            figure.add_scatter(
                x=[*places, *places[::-1]], y=edge, fill="toself", fillcolor=colour, opacity=0.18, line={"width": 0},
                hoverinfo="skip", showlegend=False,
            )  # fmt: skip
        figure.add_scatter(
            x=places, y=row, mode="lines+markers", name=label, line={"color": colour, "dash": dash}, marker={"size": 5},
            showlegend=names is not None,
        )  # fmt: skip
    figure.update_xaxes(title=x_name)
    figure.update_yaxes(title=theme.with_unit(name, unit))
    return _styled(figure, title)


def overlay(
    image: Image.Image,
    values: Float[Tensor, "height width"] | np.ndarray,
    *,
    box: Sequence[int | float] | None = None,
    patch_boxes: Real[Tensor, "n 4"] | np.ndarray | None = None,
    title: str = "",
    name: str = "",
    unit: str = "",
    limits: Sequence[int | float] | None = None,
) -> Any:
    """As `plots.overlay`: the image under the map; a cell's row, column and value under the pointer.

    Raises: ValueError as `plots.overlay`; ImportError without plotly."""
    go, grid = _plotly(), theme.to_numpy(values)
    if grid.ndim != 2:
        raise ValueError(f"overlay wants values [height width], found shape {list(grid.shape)}.")
    boxes = cell_boxes(image, grid, box, patch_boxes)
    norm, colours = picture_scale(grid, limits)
    figure = go.Figure()
    grey = image.convert("L").convert("RGB")
    figure.add_layout_image(
        source=_data_uri(grey), xref="x", yref="y", x=0, y=0, sizex=image.width, sizey=image.height,
        sizing="stretch", layer="below",
    )  # fmt: skip
    _lay(figure, grid, boxes, norm, colours, {})
    figure.add_trace(_points(go, grid, boxes, norm, colours, theme.with_unit(name, unit), unit))
    figure.update_xaxes(range=[0, image.width], visible=False, constrain="domain")
    figure.update_yaxes(range=[image.height, 0], visible=False, scaleanchor="x")
    return _styled(figure, title)


def head_view(
    picture: Image.Image,
    attention: Any,
    inputs: MultimodalInputs | None = None,
    *,
    patch_boxes: Real[Tensor, "n 4"] | np.ndarray | None = None,
    limits: Sequence[int | float] | None = None,
    scale: str = "shared",
    title: str | None = None,
    columns: int = 4,
    **chosen: Any,
) -> Any:
    """As `plots.head_view`: a map a head; a cell's place and weight, and the head's shares, under the pointer.

    Raises: ValueError as `plots.head_view`; ImportError without plotly."""
    go, data = _plotly(), head_maps(attention, inputs, **chosen)
    from plotly.subplots import make_subplots

    data = data.scaled(scale)
    norm, colours = picture_scale(data.maps, limits)
    boxes = data.boxes if patch_boxes is None else patch_boxes
    n = 1 + len(data.heads)
    columns = max(1, min(columns, n))
    rows = -(-n // columns)
    names = ["picture", *(f"head {head}{data.largest(i)}" for i, head in enumerate(data.heads))]
    gap = min(0.15, 0.9 / max(1, rows - 1))
    figure = make_subplots(rows, columns, subplot_titles=names, horizontal_spacing=0.02, vertical_spacing=gap)
    sheets = [_data_uri(picture), _data_uri(picture.convert("L").convert("RGB"))]
    for place in range(n):
        axis = "" if place == 0 else str(place + 1)
        at = {"xref": f"x{axis}", "yref": f"y{axis}"}
        figure.add_layout_image(
            source=sheets[place > 0], x=0, y=0, sizex=picture.width, sizey=picture.height, sizing="stretch",
            layer="below", **at,
        )  # fmt: skip
        y, x = divmod(place, columns)
        values = np.full((1, 1), np.nan) if place == 0 else data.maps[place - 1]
        mine = cell_boxes(picture, values, None, None if place == 0 else boxes)
        hover = "" if place == 0 else f"<br>head {data.heads[place - 1]}: {data.words(place - 1)}"
        _lay(figure, values, mine, norm, colours, at)
        figure.add_trace(
            _points(go, values, mine, norm, colours, f"attention ({data.unit})", data.unit, hover, is_first=place == 1),
            row=y + 1,
            col=x + 1,
        )
        bare = {"showticklabels": False, "showgrid": False, "zeroline": False, "ticks": "", "constrain": "domain"}
        below = "" if place == 0 else data.words(place - 1).replace(", other", ",<br>other")
        under = {"text": below, "standoff": 4, "font": {"size": 11}}
        figure.update_xaxes(range=[0, picture.width], title=under, row=y + 1, col=x + 1, **bare)
        figure.update_yaxes(
            range=[picture.height, 0], visible=False, scaleanchor=f"x{axis}", row=y + 1, col=x + 1
        )  # fmt: skip
    figure.update_annotations(font_size=12)
    figure.update_layout(width=230 * columns + 120, height=260 * rows + 90)
    return _styled(figure, data.title if title is None else title, top=90)


def save(figure: Any, path: str | Path) -> Path:
    """Write a figure as one HTML file that needs nothing else. Raises: ValueError for another ending."""
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(
            f"{path.name}: interactive figures are saved as .html; for .png, .pdf or .svg draw with plots."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.write_html(path, include_plotlyjs=True, full_html=True)
    return path


def _lay(
    figure: Any, grid: np.ndarray, boxes: np.ndarray, norm: Normalize, colours: Colormap, at: dict[str, str]
) -> None:
    """A half-transparent rectangle a cell, where its patch lies; cells that do not exist are left open."""
    low, high = _edges(norm)
    for (left, top, right, bottom), value in zip(boxes, grid.flatten(), strict=True):
        if not np.isfinite(value) or not np.isfinite([left, top, right, bottom]).all():
            continue
        share = 0.5 if high == low else (value - low) / (high - low)
        red, green, blue = (round(255 * part) for part in colours(float(np.clip(share, 0, 1)))[:3])
        figure.add_shape(
            type="rect", x0=left, x1=right, y0=top, y1=bottom, line={"width": 0},
            fillcolor=f"rgba({red},{green},{blue},0.6)", **at,
        )  # fmt: skip


def _points(
    go: Any,
    grid: np.ndarray,
    boxes: np.ndarray,
    norm: Normalize,
    colours: Colormap,
    label: str,
    unit: str,
    more: str = "",
    is_first: bool = True,
) -> Any:
    """Invisible points in the middle of the cells: what the pointer reads, and the colour bar."""
    low, high = _edges(norm)
    middle = np.asarray(boxes, dtype=float)
    return go.Scatter(
        x=(middle[:, 0] + middle[:, 2]) / 2,
        y=(middle[:, 1] + middle[:, 3]) / 2,
        mode="markers",
        marker={
            "size": 12, "opacity": 0, "color": grid.flatten(), "cmin": low, "cmax": high,
            "colorscale": SCALES[colours.name], "showscale": is_first, "colorbar": {"title": label},
        },
        customdata=[(y, x) for y in range(grid.shape[0]) for x in range(grid.shape[1])],
        text=[f"{value:.4g} {unit}" if np.isfinite(value) else "left out" for value in grid.flatten()],
        hovertemplate="row %{customdata[0]}, column %{customdata[1]}<br>%{text}" + more + "<extra></extra>",
        showlegend=False,
    )  # fmt: skip


def _apart(labels: Sequence) -> list[str]:
    """Labels as text; with their place where two are alike, which plotly would draw as one."""
    texts = [str(label) for label in labels]
    return texts if len(set(texts)) == len(texts) else [f"{i} {text}" for i, text in enumerate(texts)]


def _scale(
    table: np.ndarray, center: int | float | None | Literal["auto"], limits: Sequence[int | float] | None
) -> tuple[float, float, str]:
    """(low, high, colours): the scale of the static figures."""
    norm, colours = colour_scale(table, center, limits)
    return *_edges(norm), SCALES[colours.name]


def _edges(norm: Normalize) -> tuple[float, float]:
    low, high = (float(edge) if edge is not None else 0.0 for edge in (norm.vmin, norm.vmax))
    return low, high


def _data_uri(image: Image.Image) -> str:
    small, buffer = image.copy(), io.BytesIO()
    small.thumbnail((768, 768))
    small.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _styled(figure: Any, title: str, top: int = 50) -> Any:
    figure.update_layout(title=title, template="plotly_white", margin={"l": 60, "r": 20, "t": top, "b": 50})
    return figure
