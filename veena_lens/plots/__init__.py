"""Figures from tensors and labels.

matplotlib rather than plotly: a PNG then needs no browser and no further download, a page holds the image itself
rather than megabytes of script, and the same call serves a notebook, a report and a paper. What a figure shows is
specified once (`charts`, `image_overlay`, `heads`, `positions`); `static` draws it here, `interactive` to hover over.
Every function returns a new figure of matplotlib: on the last line of a cell a notebook shows it,
`figure.save("name.png")` writes it and returns it, `figure.show()` opens it. pyplot's global state is never touched.
"""

from veena_lens.plots import charts, heads, image_overlay, positions
from veena_lens.plots.static import draw_curves, draw_heatmap, draw_maps, draw_positions
from veena_lens.plots.theme import ShownFigure, drawn, encode, save

heatmap = drawn(charts.heatmap, draw_heatmap, "ShownFigure")
curves = drawn(charts.curves, draw_curves, "ShownFigure")
overlay = drawn(image_overlay.overlay, draw_maps, "ShownFigure")
overlays = drawn(image_overlay.overlays, draw_maps, "ShownFigure")
position_maps = drawn(positions.position_maps, draw_positions, "ShownFigure")
head_view = drawn(heads.head_view, draw_maps, "ShownFigure")

__all__ = ["ShownFigure", "curves", "encode", "head_view", "heatmap", "overlay", "overlays", "position_maps", "save"]
