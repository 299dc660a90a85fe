"""Figures: the data lie where they should, the labels say what they are, and files come out."""

import numpy as np
import pytest
import torch
from matplotlib.collections import PatchCollection
from PIL import Image

from veena_lens import plots


def picture(width: int = 96, height: int = 64) -> Image.Image:
    return Image.fromarray(np.linspace(0, 255, width * height * 3).reshape(height, width, 3).astype("uint8"))


def test_signed_heatmap_is_symmetric_about_zero_and_unsigned_is_not() -> None:
    signed = plots.heatmap(torch.tensor([[-1.0, 3.0]])).axes[0].images[0]
    assert (signed.norm.vmin, signed.norm.vmax, signed.cmap.name) == (-3, 3, "RdBu_r")
    unsigned = plots.heatmap(torch.tensor([[1.0, 3.0]])).axes[0].images[0]
    assert (unsigned.norm.vmin, unsigned.norm.vmax, unsigned.cmap.name) == (1, 3, "viridis")
    assert plots.heatmap(torch.tensor([[1.0, 3.0]]), center=0).axes[0].images[0].norm.vmin == -3


def test_heatmap_shows_rows_from_the_top_with_labels_and_unit() -> None:
    figure = plots.heatmap(
        torch.rand(2, 3), x=["a", "b", "c"], y=[4, 5], x_name="head", y_name="layer", name="effect", unit="logits"
    )
    axes, bar = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["4", "5"]
    assert axes.yaxis_inverted() and (axes.get_xlabel(), axes.get_ylabel()) == ("head", "layer")
    assert bar.get_ylabel() == "effect (logits)"


def test_cells_have_as_many_decimals_as_the_largest_needs_and_no_negative_zero() -> None:
    def numbers(values: list[float]) -> list[str]:
        return [text.get_text() for text in plots.heatmap(torch.tensor([values])).axes[0].texts]

    assert numbers([0.041, -0.0001]) == ["0.041", "0.000"]
    assert numbers([0.93, 0.004]) == ["0.93", "0.00"]
    assert numbers([1234.5, float("nan")]) == ["1234", ""]


def test_many_labels_are_thinned_and_constant_or_missing_values_are_drawn() -> None:
    axes = plots.heatmap(torch.ones(2, 100)).axes[0]
    assert len(axes.get_xticks()) <= 24
    plots.encode(plots.heatmap(torch.full((2, 2), float("nan"))))


def test_labels_no_font_can_draw_and_dollar_signs_give_no_warning() -> None:
    figure = plots.heatmap(torch.rand(1, 3), x=["\U00013000", "$x$", "a\nb"], title="$5 \u4f60")
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels == ["\u25a1", "$x$", "a\\nb"]
    assert plots.encode(figure).startswith(b"\x89PNG")


def test_overlay_cells_lie_on_their_patches() -> None:
    boxes = torch.tensor([[16.0, 0, 48, 32], [48, 0, 80, 32], [16, 32, 48, 64], [48, 32, 80, 64]])
    values = torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    figure = plots.overlay(picture(), values, patch_boxes=boxes, name="attention", unit="probability")
    panel = figure.axes[1]
    (cells,) = [artist for artist in panel.collections if isinstance(artist, PatchCollection)]
    assert cells.get_array().tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])
    corners = [path.vertices[:4].min(0).tolist() + path.vertices[:4].max(0).tolist() for path in cells.get_paths()]
    assert corners == boxes.tolist()
    assert (panel.get_xlim(), panel.get_ylim()) == ((0, 96), (64, 0))
    assert figure.axes[-1].get_ylabel() == "attention (probability)"


def test_overlay_colours_the_right_pixels() -> None:
    values = torch.zeros(2, 2)
    values[1, 0] = 1.0
    figure = plots.overlay(Image.new("RGB", (64, 64), "white"), values)
    figure.canvas.draw()
    panel = figure.axes[1]
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(float).mean(-1)
    at = {}
    for name, place in {"bright": (16, 48), "dark": (48, 16)}.items():
        x, y = panel.transData.transform(place)
        at[name] = pixels[int(pixels.shape[0] - y), int(x)]
    assert at["bright"] > at["dark"] + 50


def test_overlay_without_boxes_fills_the_box() -> None:
    figure = plots.overlay(picture(), torch.rand(2, 2), box=(16, 0, 80, 64))
    assert figure.axes[1].images[1].get_extent() == [16, 80, 64, 0]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_pictures_of_every_mode_and_size_are_drawn(mode: str) -> None:
    figure = plots.overlay(Image.new(mode, (3000, 20)), torch.rand(2, 2))
    assert figure.axes[0].images[0].get_array().shape[1] <= 768
    assert figure.axes[0].get_xlim() == (0, 3000)
    plots.encode(figure)


def test_overlays_share_one_scale() -> None:
    figure = plots.overlays(picture(), torch.stack([torch.zeros(2, 2), torch.ones(2, 2)]), titles=["a", "b"])
    norms = {(axes.images[1].norm.vmin, axes.images[1].norm.vmax) for axes in figure.axes[:2]}
    assert norms == {(0.0, 1.0)}


def test_curves_name_their_lines() -> None:
    figure = plots.curves(torch.randn(2, 3), x=[0, 4, 8], lines=["happy", "sad"], x_name="layer", unit="logits")
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["happy", "sad"]
    assert axes.lines[0].get_xdata().tolist() == [0, 4, 8] and axes.get_ylabel() == "logits"
    assert [label.get_text() for label in plots.curves(torch.rand(2), x=["a", "b"]).axes[0].get_xticklabels()] == [
        "a",
        "b",
    ]


@pytest.mark.parametrize(
    ("draw", "telling"),
    [
        (lambda: plots.heatmap(np.zeros((2, 2)), x=["a"]), "1 labels for 2 entries along x"),
        (lambda: plots.heatmap(np.zeros((0, 2))), "at least one cell"),
        (lambda: plots.overlay(picture(), np.zeros((2, 2)), patch_boxes=np.zeros((3, 4))), r"needs \[4, 4\]"),
        (lambda: plots.overlays(picture(), []), "at least one map"),
        (lambda: plots.curves(np.zeros((2, 2)), lines=["a"]), "1 labels for 2 entries along lines"),
        (lambda: plots.save(plots.curves(np.zeros(2)), "figure.bmp"), "must end in .png or .svg"),
    ],
)
def test_bad_input_is_named(draw, telling: str) -> None:
    with pytest.raises(ValueError, match=telling):
        draw()


def test_files_are_written_and_svg_is_reproducible(tmp_path) -> None:
    figure = plots.heatmap(torch.eye(3))
    assert plots.save(figure, tmp_path / "new" / "figure.png").read_bytes().startswith(b"\x89PNG")
    svg = plots.save(figure, tmp_path / "figure.svg").read_text()
    assert "<svg" in svg and svg == plots.encode(figure, "svg").decode()


def test_pyplot_and_its_settings_stay_untouched() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots.encode(plots.heatmap(torch.eye(3)))
    assert dict(matplotlib.rcParams) == before


def test_notebook_shows_a_figure_as_a_picture() -> None:
    from IPython.core.formatters import DisplayFormatter

    shown, _ = DisplayFormatter().format(plots.heatmap(torch.eye(2)))
    assert shown["image/png"].startswith(b"\x89PNG")


def test_save_writes_the_figure_and_returns_it(tmp_path) -> None:
    figure = plots.curves(torch.rand(3))
    assert figure.save(tmp_path / "new" / "curve.png") is figure and isinstance(figure, plots.ShownFigure)
    with Image.open(tmp_path / "new" / "curve.png") as picture:
        assert picture.convert("L").getextrema()[0] < 100  # not blank
    with pytest.raises(ValueError, match="must end in .png or .svg"):
        figure.save("curve.bmp")


def test_show_opens_the_figure_outside_of_notebooks_and_pyplot_knows_of_none(monkeypatch) -> None:
    import matplotlib.pyplot as plt

    opened: list[tuple[int, int]] = []
    monkeypatch.setattr(Image.Image, "show", lambda image: opened.append(image.size))
    figures = [plots.heatmap(torch.eye(2)) for _ in range(25)]
    figures[0].show()
    assert len(opened) == 1 and min(opened[0]) > 100 and not plt.get_fignums()


def test_show_displays_the_figure_in_a_notebook(monkeypatch) -> None:
    import IPython

    shown: list[object] = []
    monkeypatch.setattr(IPython, "get_ipython", lambda: object())
    monkeypatch.setattr("IPython.display.display", shown.append)
    figure = plots.heatmap(torch.eye(2))
    figure.show()
    assert shown == [figure]


def test_an_original_stands_before_several_maps() -> None:
    figure = plots.overlays(picture(), torch.rand(2, 2, 2), titles=["a", "b"], original=picture())
    assert [axes.get_title(loc="left") for axes in figure.axes[:3]] == ["image", "a", "b"]
