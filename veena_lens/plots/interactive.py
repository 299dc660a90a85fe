"""Figures drawn by plotly, to hover over in a notebook or a page: the same specifications as the static ones.

Optional: `pip install 'veena-lens[interactive]'`. A page that `save` writes holds plotly's script itself, so that it
opens from disk without a network. Each function takes what the function of that name in `veena_lens.plots` takes.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from veena_lens.long_runs import write_file
from veena_lens.plots import charts, heads, image_overlay, positions, theme
from veena_lens.plots.charts import Curves, Heatmap
from veena_lens.plots.image_overlay import ImageMaps, MapPanel
from veena_lens.plots.positions import PositionMaps
from veena_lens.plots.theme import Scale

COLOURS = {theme.SIGNED: "RdBu_r", theme.UNSIGNED: "Viridis", theme.ON_PICTURE: "Inferno"}
DASHES = ("solid", "dash", "dashdot", "dot")
OPACITY = 0.6


def _plotly() -> Any:
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise ImportError(
            "Interactive figures need plotly: pip install 'veena-lens[interactive]' (or leave interactive=False)."
        ) from error
    return go


def draw_heatmap(spec: Heatmap) -> Any:
    """Draw a heat map."""
    go = _plotly()
    names = spec.x_name or "x", spec.y_name or "y", spec.name or "value"
    shown = f"{names[1]} %{{y}}".join((f"{names[0]} %{{x}}<br>", f"<br>{names[2]} %{{z:.4g}} {spec.unit}"))
    trace = go.Heatmap(
        z=spec.table,
        x=_apart(spec.x),
        y=_apart(spec.y),
        zmin=spec.scale.low,
        zmax=spec.scale.high,
        colorscale=COLOURS[spec.scale.colours],
        colorbar={"title": theme.with_unit(spec.name, spec.unit)},
        text=spec.text,
        hovertemplate=shown + ("<br>%{text}" if spec.text is not None else "") + "<extra></extra>",
        xgap=1,
        ygap=1,
    )
    figure = go.Figure(trace)
    figure.update_yaxes(autorange="reversed", title=spec.y_name, type="category")
    figure.update_xaxes(title=spec.x_name, type="category")
    return _styled(figure, spec.title)


def draw_curves(spec: Curves) -> Any:
    """Draw curves with their bands."""
    figure, places = _plotly().Figure(), list(spec.x)
    for i, row in enumerate(spec.table):
        colour = theme.LINE_COLOURS[i % len(theme.LINE_COLOURS)]
        dash = DASHES[i // len(theme.LINE_COLOURS) % len(DASHES)]
        if spec.band is not None:
            edge = np.concatenate([spec.band[1][i], spec.band[0][i][::-1]])
            figure.add_scatter(
                x=[*places, *places[::-1]],
                y=edge,
                fill="toself",
                fillcolor=colour,
                opacity=0.18,
                line={"width": 0},
                hoverinfo="skip",
                showlegend=False,
            )
        figure.add_scatter(
            x=places,
            y=row,
            mode="lines+markers",
            name="" if spec.lines is None else str(spec.lines[i]),
            line={"color": colour, "dash": dash},
            marker={"size": 5},
            showlegend=spec.lines is not None,
        )
    figure.update_xaxes(title=spec.x_name)
    figure.update_yaxes(title=spec.label)
    return _styled(figure, spec.title)


def draw_maps(spec: ImageMaps) -> Any:
    """Draw one subplot per map; the original comes first where there are several. The pointer reads a cell's place
    and value, and the shares of its head."""
    go = _plotly()
    from plotly.subplots import make_subplots

    panels: list[MapPanel | Image.Image] = list(spec.panels)
    alone = not spec.part_colours and len(panels) == 1
    if spec.original is not None and not alone:
        panels.insert(0, spec.original)
    columns = max(1, min(spec.columns, len(panels)))
    rows = -(-len(panels) // columns)
    names = None if alone else ["image" if isinstance(p, Image.Image) else p.title for p in panels]
    gap = min(0.15, 0.9 / max(1, rows - 1))
    figure = make_subplots(rows, columns, subplot_titles=names, horizontal_spacing=0.02, vertical_spacing=gap)
    first = next(place for place, panel in enumerate(panels) if isinstance(panel, MapPanel))
    for place, panel in enumerate(panels):
        y, x = divmod(place, columns)
        name = "" if place == 0 else str(place + 1)
        axes = {"xref": f"x{name}", "yref": f"y{name}"}
        image = panel if isinstance(panel, Image.Image) else panel.image.convert("L").convert("RGB")
        figure.add_layout_image(
            source=_data_uri(image),
            x=0,
            y=0,
            sizex=image.width,
            sizey=image.height,
            sizing="stretch",
            layer="below",
            **axes,
        )
        below = ""
        if isinstance(panel, MapPanel):
            _lay(figure, panel, spec.scale, axes)
            figure.add_trace(_points(go, panel, spec, has_bar=place == first), row=y + 1, col=x + 1)
            below = panel.hover.replace(", other", ",<br>other")
        else:
            figure.add_scatter(x=[], y=[], showlegend=False, row=y + 1, col=x + 1)
        bare = {"showticklabels": False, "showgrid": False, "zeroline": False, "ticks": "", "constrain": "domain"}
        under = {"text": below, "standoff": 4, "font": {"size": 11}}
        figure.update_xaxes(range=[0, image.width], title=under, **bare, row=y + 1, col=x + 1)
        figure.update_yaxes(range=[image.height, 0], visible=False, scaleanchor=f"x{name}", row=y + 1, col=x + 1)
    if alone:
        return _styled(figure, spec.panels[0].title)
    figure.update_annotations(font_size=12)
    figure.update_layout(width=230 * columns + 120, height=260 * rows + 90)
    return _styled(figure, spec.title, top=90)


def draw_positions(spec: PositionMaps) -> Any:
    """Draw the maps over the image, below them the text as a strip; the pointer reads cell or word, and value."""
    go = _plotly()
    from plotly.subplots import make_subplots

    maps, strip, scale = spec.maps, spec.strip, spec.maps.scale
    columns = max(1, min(maps.columns, len(maps.panels)))
    rows = -(-len(maps.panels) // columns)
    kinds: list[list[Any]] = [
        [{} if y * columns + x < len(maps.panels) else None for x in range(columns)] for y in range(rows)
    ]
    if strip is not None:
        kinds.append([{"colspan": columns}, *[None] * (columns - 1)])
    names = [panel.title for panel in maps.panels]
    gap = min(0.1, 0.9 / max(1, len(kinds) - 1))
    figure = make_subplots(len(kinds), columns, specs=kinds, subplot_titles=names, vertical_spacing=gap)
    for place, panel in enumerate(maps.panels):
        y, x = divmod(place, columns)
        name, image = "" if place == 0 else str(place + 1), panel.image
        axes = {"xref": f"x{name}", "yref": f"y{name}"}
        size = {"x": 0, "y": 0, "sizex": image.width, "sizey": image.height, "sizing": "stretch", "layer": "below"}
        figure.add_layout_image(source=_data_uri(image.convert("L").convert("RGB")), **size, **axes)
        _lay(figure, panel, scale, axes)
        figure.add_trace(_points(go, panel, maps, has_bar=place == 0), row=y + 1, col=x + 1)
        bare = {"showticklabels": False, "showgrid": False, "zeroline": False, "ticks": "", "constrain": "domain"}
        figure.update_xaxes(range=[0, image.width], **bare, row=y + 1, col=x + 1)
        figure.update_yaxes(range=[image.height, 0], visible=False, scaleanchor=f"x{name}", row=y + 1, col=x + 1)
    if strip is not None:
        trace = go.Heatmap(
            z=strip.table,
            x=_apart(strip.x),
            y=_apart(strip.y),
            zmin=scale.low,
            zmax=scale.high,
            colorscale=COLOURS[scale.colours],
            showscale=False,
            hovertemplate=f"{strip.y_name} %{{y}}<br>%{{x}}<br>%{{z:.4g}} {strip.unit}<extra></extra>",
        )
        figure.add_trace(trace, row=len(kinds), col=1)
        figure.update_xaxes(title=strip.x_name, type="category", row=len(kinds), col=1)
        figure.update_yaxes(title=strip.y_name, type="category", autorange="reversed", row=len(kinds), col=1)
    figure.update_annotations(font_size=12)
    figure.update_layout(width=230 * columns + 120, height=250 * len(kinds) + 90)
    return _styled(figure, maps.title, top=90)


def _lay(figure: Any, panel: MapPanel, scale: Scale, axes: dict[str, str]) -> None:
    """Lay a half-transparent rectangle per cell, where its patch lies; cells that do not exist are left open."""
    for (left, top, right, bottom), value in zip(panel.boxes, panel.grid.flatten(), strict=True):
        if not np.isfinite(value) or not np.isfinite([left, top, right, bottom]).all():
            continue
        red, green, blue = (round(255 * part) for part in scale.rgb(value))
        colour = f"rgba({red},{green},{blue},{OPACITY})"
        figure.add_shape(type="rect", x0=left, x1=right, y0=top, y1=bottom, line={"width": 0}, fillcolor=colour, **axes)


def _points(go: Any, panel: MapPanel, spec: ImageMaps, has_bar: bool) -> Any:
    """Draw invisible points in the middle of the cells: what the pointer reads, and the colour bar."""
    values, (height, width) = panel.grid.flatten(), panel.grid.shape
    more = f"<br>{panel.title.partition(' (')[0]}: {panel.hover}" if panel.hover else ""
    return go.Scatter(
        x=(panel.boxes[:, 0] + panel.boxes[:, 2]) / 2,
        y=(panel.boxes[:, 1] + panel.boxes[:, 3]) / 2,
        mode="markers",
        marker={
            "size": 12,
            "opacity": 0,
            "color": values,
            "cmin": spec.scale.low,
            "cmax": spec.scale.high,
            "colorscale": COLOURS[spec.scale.colours],
            "showscale": has_bar,
            "colorbar": {"title": spec.label},
        },
        customdata=[(y, x) for y in range(height) for x in range(width)],
        text=[f"{value:.4g} {spec.unit}" if np.isfinite(value) else "left out" for value in values],
        hovertemplate="row %{customdata[0]}, column %{customdata[1]}<br>%{text}" + more + "<extra></extra>",
        showlegend=False,
    )


def _apart(labels: Sequence) -> list[str]:
    """Return labels as text; with their place where two are alike, which plotly would draw as one."""
    texts = [str(label) for label in labels]
    return texts if len(set(texts)) == len(texts) else [f"{i} {text}" for i, text in enumerate(texts)]


def _data_uri(image: Image.Image) -> str:
    small, buffer = image.copy(), io.BytesIO()
    small.thumbnail((768, 768))
    small.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _styled(figure: Any, title: str, top: int = 50) -> Any:
    figure.update_layout(title=title, template="plotly_white", margin={"l": 60, "r": 20, "t": top, "b": 50})
    return figure


def save(figure: Any, path: str | Path) -> Path:
    """Write a figure as one HTML file that needs nothing else. Raises: ValueError for another ending."""
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(
            f"{path.name}: interactive figures are saved as .html; for .png, .pdf or .svg draw with plots."
        )
    write_file(path, figure.to_html(include_plotlyjs=True, full_html=True))
    return path


heatmap = theme.drawn(charts.heatmap, draw_heatmap, "Any")
curves = theme.drawn(charts.curves, draw_curves, "Any")
overlay = theme.drawn(image_overlay.overlay, draw_maps, "Any")
overlays = theme.drawn(image_overlay.overlays, draw_maps, "Any")
position_maps = theme.drawn(positions.position_maps, draw_positions, "Any")
head_view = theme.drawn(heads.head_view, draw_maps, "Any")
