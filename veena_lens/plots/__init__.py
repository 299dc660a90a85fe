"""Figures from tensors and labels.

matplotlib rather than plotly: a PNG then needs no browser and no further download, a page holds the image
itself rather than megabytes of script, and the same call serves a notebook, a report and a paper.
Every function returns a `matplotlib.figure.Figure` of its own; pyplot's global state is never touched.
"""

from veena_lens.plots.charts import curves, heatmap
from veena_lens.plots.heads import head_view
from veena_lens.plots.image_overlay import overlay, overlays
from veena_lens.plots.theme import encode, save

__all__ = ["curves", "encode", "head_view", "heatmap", "overlay", "overlays", "save"]
