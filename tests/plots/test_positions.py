"""Numbers over positions lie on the image's cells and on the text's words, each once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from veena_lens import plots
from veena_lens.plots.positions import position_maps
from veena_lens.scores import Scores


@given(height=st.integers(1, 4), width=st.integers(1, 4), before=st.integers(0, 3), after=st.integers(1, 4))
def test_every_position_is_drawn_once_where_it_lies(height: int, width: int, before: int, after: int) -> None:
    n = before + height * width + after
    values = torch.arange(2.0 * n).view(2, n)
    cells = (torch.arange(height * width) + before).view(height, width).tolist()
    texts = [f"t{i}" for i in range(n)]
    drawn = position_maps(values, positions=range(n), grids=[{"positions": cells, "boxes": None}], texts=texts)
    assert len(drawn.maps.panels) == 2 and drawn.strip is not None
    for row, panel in zip(values, drawn.maps.panels, strict=True):
        np.testing.assert_array_equal(panel.grid, row.numpy()[np.array(cells)])
    outside = [*range(before), *range(before + height * width, n)]
    assert list(drawn.strip.x) == [texts[i] for i in outside]
    np.testing.assert_array_equal(drawn.strip.table, values[:, outside].numpy())
    assert (drawn.strip.scale.low, drawn.strip.scale.high) == (0.0, 2.0 * n - 1)


def swept(**meta: Any) -> Scores:
    """Effects over two layers and six positions, the middle four an image."""
    grids = [{"positions": [[1, 2], [3, 4]], "boxes": [[0, 0, 4, 4], [4, 0, 8, 4], [0, 4, 4, 8], [4, 4, 8, 8]]}]
    about = {"image_grids": grids, "token_texts": ["<s>", "", "", "", "", "feel"], **meta}
    values = torch.tensor([[0.0, 0.1, 0.2, 0.3, 0.4, 0.5], [0.0, -0.1, 0.2, 0.3, 0.4, 1.0]])
    return Scores(values, ("layer", "pos"), {"layer": [3, 7]}, name="effect", meta=about)


@pytest.mark.parametrize("image", [None, Image.new("RGB", (8, 8), "orange")], ids=["bare", "image"])
def test_scores_over_positions_are_drawn_on_the_image(image: Any) -> None:
    figure = swept().plot(image=image)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert [title for title in titles if title] == ["layer 3", "layer 7"] and figure.get_suptitle() == "effect"
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["<s>", "feel"]
    plots.encode(figure)
    one = swept().select(layer=7).plot(image=image)
    assert len([axes for axes in one.axes if axes.get_title(loc="left")]) == 0
    pytest.importorskip("plotly")
    drawn = swept().plot(interactive=True, image=image)
    assert list(drawn.data[-1].x) == ["<s>", "feel"] and len(drawn.layout.images) == 2


def test_scores_without_cells_or_of_text_alone_stay_a_heat_map() -> None:
    assert len(swept(image_grids=[]).plot().axes) == 2  # with its colour bar
    assert [label.get_text() for label in swept().select(pos=[0, 5]).plot().axes[0].get_xticklabels()] == [
        "<s>",
        "feel",
    ]
    assert swept().plot(x_name="mine").axes[0].get_xlabel() == "mine"  # settings of a heat map


@pytest.mark.parametrize(
    ("settings", "telling"),
    [
        ({"positions": [0]}, r"values of shape \[2, 6\] do not fit 1 positions"),
        ({"image": [Image.new("RGB", (4, 4))] * 2}, "2 images for 1 grids"),
        ({"grids": [{"positions": [[70]]}]}, "none of the positions lies in an image"),
        ({"rows": ["a"]}, "1 labels for 2 entries along rows"),
    ],
)
def test_what_does_not_fit_is_named(settings: dict[str, Any], telling: str) -> None:
    asked = {"positions": range(6), "grids": [{"positions": [[1, 2], [3, 4]]}], **settings}
    with pytest.raises(ValueError, match=telling):
        plots.position_maps(torch.rand(2, 6), **asked)
