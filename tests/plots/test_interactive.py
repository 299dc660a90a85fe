"""Plotly's figures hold the same numbers, labels and scales as the static ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from veena_lens.plots import interactive
from veena_lens.plots.theme import Scale
from veena_lens.scores import Scores

GENERATOR = torch.Generator().manual_seed(0)


def test_heat_map_shows_every_value_under_its_labels_with_row_0_on_top() -> None:
    values = torch.randn(3, 4, generator=GENERATOR, dtype=torch.float64)
    scores = Scores(values, ("layer", "head"), name="effect", unit="logits")
    figure = scores.plot(interactive=True)
    (trace,) = figure.data
    np.testing.assert_allclose(trace.z, values.numpy())
    assert list(trace.y) == ["0", "1", "2"] and figure.layout.yaxis.autorange == "reversed"
    assert trace.zmin == -trace.zmax == pytest.approx(-float(values.abs().max()))  # symmetric about zero
    assert trace.colorbar.title.text == "effect (logits)" and "layer %{y}" in trace.hovertemplate


def test_curves_have_a_line_a_row_and_a_band_where_a_spread_is_given() -> None:
    values = torch.rand(2, 5, generator=GENERATOR)
    figure = interactive.curves(values, lines=["a", "b"], spread=0.1 * values, x_name="layer")
    lines = [trace for trace in figure.data if trace.mode == "lines+markers"]
    assert [line.name for line in lines] == ["a", "b"] and len(figure.data) == 4
    np.testing.assert_allclose(lines[1].y, values[1].numpy(), rtol=1e-6)
    assert lines[0].line.color != lines[1].line.color


def test_overlay_lays_each_cell_where_its_patch_lies() -> None:
    picture = Image.new("RGB", (40, 20), "red")
    boxes = torch.tensor([[0, 0, 10, 20], [10, 0, 40, 20]])
    figure = interactive.overlay(picture, torch.tensor([[0.25, 0.75]]), patch_boxes=boxes, name="attention")
    shapes = [(s.x0, s.x1, s.y0, s.y1) for s in figure.layout.shapes]
    assert shapes == [(0, 10, 0, 20), (10, 40, 0, 20)]
    assert list(figure.data[0].x) == [5, 25] and list(figure.data[0].marker.color) == [0.25, 0.75]
    even = interactive.overlay(picture, torch.rand(2, 4, generator=GENERATOR))
    assert (even.layout.shapes[5].x0, even.layout.shapes[5].y0) == (10, 10)
    with pytest.raises(ValueError, match="patch_boxes"):
        interactive.overlay(picture, torch.rand(2, 2, generator=GENERATOR), patch_boxes=boxes)


def test_a_saved_page_needs_no_network(tmp_path) -> None:
    figure = Scores(torch.rand(2, 2, generator=GENERATOR), ("layer", "head"), name="x").plot(interactive=True)
    page = interactive.save(figure, tmp_path / "figure.html").read_text(encoding="utf-8")
    assert "Plotly.newPlot" in page and '<script src="http' not in page and "<link" not in page
    with pytest.raises(ValueError, match=".html"):
        interactive.save(figure, tmp_path / "figure.png")


def test_static_figures_are_saved_for_papers_too(tmp_path) -> None:
    from veena_lens import plots

    figure = Scores(torch.rand(2, 2, generator=GENERATOR), ("layer", "head"), name="x").plot()
    assert plots.save(figure, tmp_path / "figure.pdf").read_bytes().startswith(b"%PDF")
    assert plots.encode(figure, "pdf") == plots.encode(figure, "pdf")


@pytest.mark.parametrize("values", [[[0.1, 0.9]], [[-0.5, 0.5]], [[-0.9, -0.1]]])
def test_an_overlay_has_the_static_figures_colours(values: list[list[float]]) -> None:
    scale = Scale.over_image(np.array(values))
    figure = interactive.overlay(Image.new("RGB", (8, 4)), torch.tensor(values, dtype=torch.float64))
    for value, shape in zip(values[0], figure.layout.shapes, strict=True):
        red, green, blue = (round(255 * part) for part in scale.colormap(scale.norm(value))[:3])
        assert shape.fillcolor == f"rgba({red},{green},{blue},0.6)"


def test_both_back_ends_take_the_same_settings_and_name_what_they_return() -> None:
    import inspect

    from veena_lens import plots

    for name in ("heatmap", "curves", "overlay", "overlays", "position_maps", "head_view"):
        static, hovered = (inspect.signature(getattr(module, name)) for module in (plots, interactive))
        assert static.parameters == hovered.parameters
        assert (static.return_annotation, hovered.return_annotation) == ("ShownFigure", "Any")
    maps = torch.rand(2, 2, 2, generator=GENERATOR)
    figure = interactive.overlays(Image.new("RGB", (8, 4)), maps, titles=["a", "b"], title="both")
    assert [note.text for note in figure.layout.annotations] == ["a", "b"] and len(figure.data) == 2
    np.testing.assert_allclose(figure.data[1].marker.color, maps[1].flatten().numpy(), rtol=1e-6)
