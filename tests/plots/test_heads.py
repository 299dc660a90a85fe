"""Head views: cells lie on their patches, the shares are those of the pattern, and everything is named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.cases import BY_NAME, counted, native_model, raw_inputs
from tests.parity.test_llava_next import batch, build
from veena_lens import HookedVLM, plots
from veena_lens.circuits import attention_difference, attention_sinks, bootstrap, image_attention, mask_sinks
from veena_lens.images.anyres import image_in_tiles
from veena_lens.plots import interactive
from veena_lens.plots.heads import HeadMaps, head_maps
from veena_lens.scores import Scores

PICTURE = Image.new("RGB", (28, 28), "orange")


def words(data: HeadMaps, place: int) -> str:
    """The shares of a head as they are written under its map."""
    return ", ".join(f"{part} {share:.2f}" for part, share in data.shares_of(place).items())


@pytest.fixture(scope="module")
def seen() -> tuple[Any, Any, Any]:
    """A model, its inputs (the second row with two images), and attention of the last two tokens to all keys."""
    model = native_model(BY_NAME["clip-llama"])
    inputs = model.inputs_from_hf(**counted(raw_inputs(BY_NAME["clip-llama"])))
    return model, inputs, model.attention(inputs, queries=[-2, -1], keys="all")


def test_maps_and_shares_are_those_of_the_pattern(seen) -> None:
    model, inputs, attention = seen
    _, cache = model.run_with_cache(inputs, names_filter="blocks.1.attn.hook_pattern")
    for row in range(2):
        last = inputs.spans[row].last
        pattern = cache["blocks.1.attn.hook_pattern"][row, :, last]
        image = inputs.n_images[row] - 1
        data = head_maps(attention, inputs, layer=1, query=last, row=row, image_index=image)
        cells = inputs.grid_tokens(row, image)
        np.testing.assert_allclose(data.maps, pattern[:, cells].detach().numpy(), atol=1e-9)
        span = inputs.spans[row].images[image]
        np.testing.assert_allclose(data.shares["image"], pattern[:, span].sum(-1).detach().numpy(), atol=1e-9)
        query = pattern[:, inputs.spans[row].query].sum(-1).detach().numpy()
        np.testing.assert_allclose(data.shares["query"], query, atol=1e-9)
        np.testing.assert_allclose(np.sum(list(data.shares.values()), 0), 1.0, atol=1e-9)
        assert "sinks" not in data.shares


def test_sinks_leave_the_map_and_their_part_and_all_still_sums_to_one(seen) -> None:
    _, inputs, attention = seen
    cell, text = int(inputs.grid_tokens(0)[0, 1]), int(inputs.spans[0].query.start)
    found = torch.zeros(2, 2, inputs.shape[1], dtype=torch.bool)
    found[0, 1, [cell, text]] = True
    sinks = Scores(found, ("batch", "layer", "pos"), name="attention sink")
    data = head_maps(attention, inputs, layer=1, query=inputs.spans[0].last, sinks=sinks)
    assert np.isnan(data.maps[:, 0, 1]).all() and np.isnan(data.maps).sum() == len(data.heads)
    plain = head_maps(attention, inputs, layer=1, query=inputs.spans[0].last)
    moved = np.array(plain.shares["image"]) - plain.maps[:, 0, 1]
    np.testing.assert_allclose(data.shares["image"], moved, atol=1e-12)
    np.testing.assert_allclose(np.sum(list(data.shares.values()), 0), 1.0, atol=1e-9)
    assert min(data.shares["sinks"]) > 0


def test_the_view_names_the_token_and_writes_the_shares_under_each_head(seen, tmp_path) -> None:
    _, inputs, attention = seen
    last = inputs.spans[0].last
    tokens = [f"word{i}" for i in range(inputs.shape[1])]
    figure = plots.head_view(PICTURE, attention, inputs, layer=1, heads=[4, 0], query=last, tokens=tokens)
    assert f"layer 1, attention of 'word{last}' at position {last}" in figure.get_suptitle()
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert [t for t in titles if t] == ["image", "L1H4", "L1H0"]
    data = head_maps(attention, inputs, layer=1, heads=[4, 0], query=last)
    written = " ".join(text.get_text().replace("\n", ", ") for axes in figure.axes for text in axes.texts)
    assert all(words(data, i) in written for i in range(2)) and "image 0." in written and "query 0." in written
    assert plots.save(figure, tmp_path / "view.pdf").read_bytes().startswith(b"%PDF")
    assert plots.save(figure, tmp_path / "view.png").read_bytes().startswith(b"\x89PNG")
    again = attention.plot(
        image=PICTURE, inputs=inputs, layer=1, heads=[4, 0], query=last, tokens=tokens
    )  # the same, from the Scores
    assert plots.encode(again) == plots.encode(figure)


def test_the_interactive_view_holds_the_same_numbers_and_colours(seen) -> None:
    _, inputs, attention = seen
    chosen: dict[str, Any] = dict(layer=0, query=inputs.spans[0].last)
    figure = attention.plot(image=PICTURE, inputs=inputs, interactive=True, **chosen)
    data = head_maps(attention, inputs, **chosen)
    traces = figure.data[1:]
    assert len(traces) == len(data.heads)
    for i, trace in enumerate(traces):
        np.testing.assert_allclose(trace.marker.color, data.maps[i].flatten())
        assert words(data, i) in trace.hovertemplate
        assert (trace.marker.cmin, trace.marker.cmax) == (traces[0].marker.cmin, traces[0].marker.cmax)
    assert [t.marker.showscale for t in traces] == [True] + [False] * (len(traces) - 1)
    below = figure.layout.xaxis2.title.text.replace("<br>", " ")
    assert below == words(data, 0), "the shares stand under the map"
    cells = data.maps[0].size
    assert [s.xref for s in figure.layout.shapes] == [f"x{i + 2}" for i in range(len(traces)) for _ in range(cells)]
    assert len(figure.layout.images) == 1 + len(traces) and figure.layout.title.text == data.title


def test_maps_of_the_picture_know_the_picture_and_the_rest(seen) -> None:
    model, inputs, attention = seen
    last = inputs.spans[0].last
    view = image_attention(model, inputs[:1], layers=[1])
    data, whole = head_maps(view, inputs[:1]), head_maps(attention, inputs, layer=1, query=last)
    np.testing.assert_allclose(data.maps, whole.maps, atol=1e-9)
    np.testing.assert_allclose(data.shares["image"], whole.shares["image"], atol=1e-9)
    np.testing.assert_allclose(np.add(data.shares["image"], data.shares["elsewhere"]), 1.0, atol=1e-9)
    assert str(int(inputs[:1].tokens[0, -1])) in data.title
    assert head_maps(view, token="happy").title == "layer 1, attention of happy"
    plots.encode(plots.head_view(PICTURE, mask_sinks(model, inputs[:1], layers=[1])))
    signed = attention_difference(view, image_attention(model, inputs[1:], layers=[1]))
    assert list(head_maps(signed).shares) == ["image"]


def test_every_map_can_have_a_scale_of_its_own(seen) -> None:
    _, inputs, attention = seen
    chosen: dict[str, Any] = dict(layer=1, query=inputs.spans[0].last)
    data = head_maps(attention, inputs, **chosen)
    each = data.scaled("each")
    np.testing.assert_allclose(each.maps.reshape(len(each.heads), -1).max(1), 1.0)
    np.testing.assert_allclose(each.maps * np.array(each.tops)[:, None, None], data.maps)
    figure = plots.head_view(PICTURE, attention, inputs, scale="each", **chosen)
    assert any(axes.get_title(loc="left").startswith("L1H0 (up to 0.") for axes in figure.axes)


def test_tiles_are_shown_where_they_lie_and_the_whole_view_apart() -> None:
    model = HookedVLM.from_hf(build("llama")[0])
    inputs = model.inputs_from_hf(**batch(model, [[(40, 75)]]))
    inputs = replace(inputs, patch_boxes=((image_in_tiles(model.cfg, (40, 75)).boxes(),),))
    attention = model.attention(inputs, keys="all", layers=[0])
    grid, whole = (head_maps(attention, inputs, grid=view) for view in ("grid", "whole"))
    assert grid.maps.shape[1:] == inputs.grids[0][0] and whole.maps.shape[1:] == (2, 2)
    assert grid.shares == whole.shares, "all tokens of the picture count, whichever are shown"
    assert grid.boxes is not None and whole.boxes is not None
    assert float(whole.boxes[-1, 2]) == pytest.approx(75) and float(grid.boxes[:, 2].max()) == pytest.approx(75)
    plots.encode(plots.head_view(Image.new("RGB", (75, 40)), attention, inputs))


def test_an_image_token_is_named_by_its_patch(seen) -> None:
    model, inputs, _ = seen
    place = int(inputs.grid_tokens(0)[1, 0])
    attention = model.attention(inputs, queries=[place], keys="all", layers=[1])
    assert "attention of patch 1, 0 at position" in head_maps(attention, inputs).title


def test_padded_rows_are_the_rows_alone(seen) -> None:
    model, inputs, attention = seen
    short = min(range(2), key=lambda i: int(inputs.lengths[i]))
    alone = inputs[short].without_padding()
    mine = head_maps(attention, inputs, layer=0, query=inputs.spans[short].last, row=short)
    theirs = head_maps(model.attention(alone, keys="all"), alone, layer=0)
    np.testing.assert_allclose(mine.maps, theirs.maps, atol=1e-9)
    for part, of in mine.shares.items():
        np.testing.assert_allclose(of, theirs.shares[part], atol=1e-9)


def test_only_image_keys_give_the_picture_and_elsewhere(seen) -> None:
    model, inputs, attention = seen
    few = model.attention(inputs[:1], keys="image", layers=[1])
    data = head_maps(few, inputs[:1])
    assert list(data.shares) == ["image", "elsewhere"]
    whole = head_maps(attention, inputs, layer=1, query=inputs.spans[0].last)
    np.testing.assert_allclose(data.shares["image"], whole.shares["image"], atol=1e-9)


@pytest.mark.parametrize(
    ("change", "telling"),
    [
        (dict(layer=None), "layer= must choose one of"),
        (dict(query=None), "query= must choose"),
        (dict(query=3), "query=3 was not recorded"),
        (dict(layer=7), "7"),
        (dict(heads=[99]), "99"),
        (dict(row=5), "row 5 does not exist"),
        (dict(image_index=4), "no image 4"),
        (dict(grid="tiles"), "'grid' or 'whole'"),
        (dict(inputs=None), "need inputs="),
        (dict(tokens=["a"]), "got 1 tokens, so position .* has no name"),
        (dict(scale="own"), "'shared' or 'each'"),
        (dict(attention=Scores(torch.zeros(2, 3), ("layer", "head"))), "give the Scores of model.attention"),
        (dict(sinks=Scores(torch.zeros(2, 3), ("layer", "head"))), "circuits.attention_sinks"),
        (dict(sinks=Scores(torch.zeros(2, 2, 3).bool(), ("batch", "layer", "pos"))), "not of these inputs"),
        (dict(patch_boxes=torch.zeros(3, 4)), "patch_boxes"),
    ],
    ids=str,
)
def test_what_cannot_be_shown_is_refused(change: dict[str, Any], telling: str, seen) -> None:
    _, inputs, attention = seen
    kw: dict[str, Any] = dict(attention=attention, inputs=inputs, layer=1, query=inputs.spans[0].last) | change
    for draw in (plots.head_view, interactive.head_view):
        with pytest.raises(ValueError, match=telling):
            draw(
                PICTURE,
                kw["attention"],
                kw["inputs"],
                **{k: v for k, v in kw.items() if k not in ("attention", "inputs")},
            )


def test_sinks_that_were_found_can_be_shown(seen) -> None:
    model, inputs, attention = seen
    sinks = attention_sinks(model, inputs, multiple=1.05, share=0.05, norm_multiple=None)
    assert bool(sinks.values.any())
    shown = plots.head_view(PICTURE, attention, inputs, layer=1, query=inputs.spans[0].last, sinks=sinks)
    assert plots.encode(shown).startswith(b"\x89PNG")


# --- what else Scores draw ----------------------------------------------------------------------------------


def test_a_layer_by_position_map_is_labelled_by_token() -> None:
    scores = Scores(torch.rand(3, 4), ("layer", "pos"), {"pos": [2, 3, 4, 5]}, name="effect")
    tokens = ["<s>", "a", "how", "do", "how", "?"]
    figure = scores.plot(tokens=tokens)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["how", "do", "how", "?"]
    same = replace(scores, meta={"token_texts": tokens}).plot()
    assert [label.get_text() for label in same.axes[0].get_xticklabels()] == ["how", "do", "how", "?"]
    hovered = scores.plot(tokens=tokens, interactive=True)
    assert list(hovered.data[0].x) == ["0 how", "1 do", "2 how", "3 ?"], "alike texts would fall into one column"
    with pytest.raises(ValueError, match="3 tokens do not name the 4 entries"):
        scores.plot(tokens=tokens[:3])


def test_curves_over_layers_have_the_interval_of_the_bootstrap() -> None:
    scores = Scores(torch.randn(9, 5), ("pair", "layer"), name="push", unit="logits")
    bounds = bootstrap(scores)
    for drawn, count in ((bounds, 1), (bootstrap(Scores(torch.randn(9, 2, 5), ("pair", "site", "layer"))), 2)):
        figure = drawn.plot()
        axes = figure.axes[0]
        assert len(axes.collections) == len([line for line in axes.lines if len(line.get_xdata()) == 5]) == count
        low, high = (drawn.select(bound=b).values.reshape(count, -1)[0].numpy() for b in ("low", "high"))
        edge = axes.collections[0].get_paths()[0].vertices[:, 1]
        assert edge.min() == pytest.approx(low.min()) and edge.max() == pytest.approx(high.max())
        hovered = drawn.plot(interactive=True)
        band = np.array(hovered.data[0].y)
        np.testing.assert_allclose(band, np.concatenate([high, low[::-1]]))
    wide = bootstrap(Scores(torch.randn(5, 12, 6), ("pair", "layer", "head"))).plot()
    assert wide.axes[0].get_xlabel() == "head" and len(wide.axes[0].images) == 1, "many lines become a map of means"
    with pytest.raises(ValueError, match="not both"):
        plots.curves(torch.rand(3), spread=torch.rand(3), interval=(torch.rand(3), torch.rand(3)))
    with pytest.raises(ValueError, match="interval has shape"):
        plots.curves(torch.rand(3), interval=(torch.rand(2), torch.rand(3)))


def test_the_colours_stay_apart_for_colour_blind_readers() -> None:
    """Machado et al. 2009: what a deuteranope and a protanope see of the lines and the parts still differs."""
    from matplotlib.colors import to_rgb

    from veena_lens.plots import theme
    from veena_lens.plots.heads import PART_COLOURS

    sights = {
        "deuteranopia": [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ],
        "protanopia": [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ],
    }
    parts = [PART_COLOURS[name] for name in ("image", "query", "other", "sinks")]
    for matrix in sights.values():
        for palette in (theme.LINE_COLOURS[:7], parts):
            seen = np.array([to_rgb(colour) for colour in palette]) @ np.array(matrix).T
            gaps = np.linalg.norm(seen[:, None] - seen[None], axis=-1) + 9 * np.eye(len(seen))
            assert gaps.min() > 0.15
