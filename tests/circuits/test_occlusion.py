"""Occlusion maps against images covered by hand, planted readers of one patch, and attribution maps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.cases import BY_NAME, hf_model
from tests.checkpoints.tiny import next_processor, word_tokenizer
from tests.circuits.runs import LLAVA, NEXT, QWEN3, difference, pair_of
from veena_lens import HookedVLM
from veena_lens.circuits.attribution import image_attribution
from veena_lens.circuits.occlusion import occlude_features, occlude_pixels, rank_agreement
from veena_lens.interventions import Ablate
from veena_lens.scores import Scores
from veena_lens.sweeps.metrics import logit_diff, project

CLOSE: dict[str, Any] = dict(rtol=1e-9, atol=1e-12)
QUIET: dict[str, Any] = dict(progress=False)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def face() -> Any:
    model = HookedVLM.from_pretrained("tiny-llava-emotion", dtype=torch.float64, casts="none")
    from veena_lens.checkpoints.files import bundled_pairs

    return model, [picture.open() for picture in bundled_pairs("test")[0]]


@pytest.fixture(scope="module")
def others() -> dict[str, Any]:
    """Models of the other layouts with their processors."""
    from veena_lens.zoo.qwen2_vl import QWEN2_VL

    case = BY_NAME["llava-next-llama"]
    tiles = next_processor(case, word_tokenizer())
    tiled = HookedVLM.from_hf(hf_model(case), processor=tiles, casts="none")
    processor = QWEN2_VL.build_processor()
    dynamic = HookedVLM.from_hf(QWEN2_VL.build_model(processor, 0).double().eval(), processor=processor, casts="none")
    return {"anyres": tiled, "dynamic": dynamic}


@torch.no_grad()
def plain(model: Any, inputs: Any, metric: Any = difference) -> torch.Tensor:
    return metric(model(inputs)[:, -1])


def test_covering_pixels_equals_painting_them_by_hand(face) -> None:
    model, (picture, other) = face
    kw: dict[str, Any] = dict(window=4, stride=4, **QUIET)  # 192 pixels, 8 x 8 cells of 24
    base = plain(model, model.prepare(text="who is it?", images=picture))
    pixels = np.asarray(picture)
    mean = np.round(pixels.reshape(-1, 3).mean(0)).astype(np.uint8)
    for fill, colour in (("grey", 128), ("mean", mean), (other, np.asarray(other))):
        found = occlude_pixels(model, "who is it?", picture, difference, fill=fill, **kw)
        assert found.axes == ("pair", "height", "width") and found.shape == (1, 8, 8) and found.mask is None
        for top in (0, 4):
            for left in (0, 4):
                painted = pixels.copy()
                box = (slice(top * 24, (top + 4) * 24), slice(left * 24, (left + 4) * 24))
                painted[box] = colour[box] if getattr(colour, "ndim", 0) == 3 else colour
                covered = plain(model, model.prepare(text="who is it?", images=Image.fromarray(painted)))
                window = found.values[0, top : top + 4, left : left + 4]
                torch.testing.assert_close(window, (base - covered).expand(4, 4), **CLOSE)
        assert float(found.values.abs().min()) > 1e-6
    blurred = occlude_pixels(model, "who is it?", picture, difference, fill="blur", **kw)
    assert float(blurred.values.abs().max()) > 0


@pytest.mark.parametrize(("layout", "text"), [("anyres", "<image> w5 w6"), ("dynamic", "who is it?")])
def test_every_layout_covers_the_pixels_of_its_cells(layout: str, text: str, others) -> None:
    model = others[layout]
    pictures = [noise(150, 80), noise(64, 130, 1)]
    prepare = dict(chat=False) if layout == "anyres" else {}
    kw: dict[str, Any] = dict(metric=difference, window=(2, 1), stride=2, **QUIET, **prepare)
    found = occlude_pixels(model, [text] * 2, pictures, fill="grey", **kw)
    for pair, picture in enumerate(pictures):
        inputs = model.prepare(text=text, images=picture, **prepare)
        _height, width = inputs.grids[0][0]
        assert bool(found.exists[pair].any(0).nonzero().max() < width)
        cells = inputs.grid_tokens(0)
        places = inputs.image_mask[0].nonzero().flatten().tolist()
        boxes = inputs.patch_boxes[0][0][[places.index(p) for p in cells[:2, 0].tolist()]]
        left, top, right, bottom = boxes[:, 0].min(), boxes[:, 1].min(), boxes[:, 2].max(), boxes[:, 3].max()
        painted = np.asarray(picture).copy()
        painted[int(top.floor()) : int(bottom.ceil()), int(left.floor()) : int(right.ceil())] = 128
        covered = plain(model, model.prepare(text=text, images=Image.fromarray(painted), **prepare))
        change = plain(model, inputs) - covered
        torch.testing.assert_close(found.values[pair, 0, 0], change[0], **CLOSE)
        assert abs(float(change)) > 1e-9
        if width > 2 and width % 2:
            assert not found.exists[pair, 0, 1]  # between windows, two cells apart
    nothing = occlude_pixels(model, [text] * 2, pictures, fill=pictures, **kw)
    assert float(nothing.values.abs().max()) < 1e-12


@pytest.mark.parametrize("name", [LLAVA, NEXT, QWEN3])
def test_replacing_features_equals_an_ablation(name: str, model_of) -> None:
    model, clean, _ = pair_of(model_of, name)
    inputs = clean[[i for i, n in enumerate(clean.n_images) if n]]
    last = inputs.spans[0].last - int((~inputs.attention_mask[0]).sum())
    image = 1 if inputs.n_images[0] > 1 and inputs.n_images[1] > 1 else 0
    kw: dict[str, Any] = dict(metric=difference, image=image, window=(1, 2), **QUIET)
    found = occlude_features(model, inputs, **kw)
    alone = inputs[0].without_padding()
    cells = alone.grid_tokens(0, image)
    chosen = torch.zeros(alone.shape, dtype=torch.bool)
    chosen[0, cells[0, :2]] = True
    sites = ["hook_image_features", *(f"deepstack.{i}.hook_out" for i in range(model.cfg.n_deepstack))]
    with torch.no_grad():
        _, cache = model.run_with_cache(alone, names_filter=sites)
        means = [cache.image_grid(site, row=0, image=image).flatten(0, 1).mean(0) for site in sites]
        edits = [Ablate(site, positions=chosen, value=mean) for site, mean in zip(sites, means, strict=True)]
        before = plain(model, alone)
        with model.intervene(edits):
            after = plain(model, alone)
        with model.intervene(edits[:1]):
            partial = plain(model, alone)
    assert last == alone.spans[0].last
    torch.testing.assert_close(found.values[0, 0, 0], (before - after)[0], **CLOSE)
    shallow = occlude_features(model, inputs, deepstack=False, **kw)
    torch.testing.assert_close(shallow.values[0, 0, 0], (before - partial)[0], **CLOSE)
    if model.cfg.n_deepstack:
        assert float((after - partial).abs()) > 1e-9


def test_cells_are_means_over_the_windows_that_cover_them(model_of) -> None:
    model, clean, _ = pair_of(model_of, QWEN3)
    one = clean[0]
    grid = one.grids[0][0]  # 2 x 3 cells
    wide = occlude_features(model, one, difference, window=(2, 2), **QUIET).values[0]
    assert grid == (2, 3)
    torch.testing.assert_close(wide[:, 1], (wide[:, 0] + wide[:, 2]) / 2, **CLOSE)
    whole = occlude_features(model, one, difference, window=9, **QUIET).values[0]
    torch.testing.assert_close(whole, whole[:1, :1].expand(grid), **CLOSE)
    apart = occlude_features(model, one, difference, window=1, stride=2, **QUIET)
    assert apart.exists[0].tolist() == [[True, False, True]] * 2
    share = occlude_features(model, one, difference, relative=True, **QUIET)
    plainly = occlude_features(model, one, difference, **QUIET)
    torch.testing.assert_close(share.values * abs(share.meta["baseline"][0]), plainly.values, **CLOSE)


def test_the_whole_view_of_a_tiled_picture_can_be_covered_too(others) -> None:
    model = others["anyres"]
    inputs = model.prepare(text="<image> w5 w6", images=noise(150, 80), chat=False)
    kw: dict[str, Any] = dict(metric=difference, window=9, fill="zero", **QUIET)
    with_views = occlude_features(model, inputs, views=True, **kw).values[0, 0, 0]
    zeroed = inputs.image_mask.clone()
    tiles = torch.tensor(inputs.token_tiles[0][0])
    zeroed[0, inputs.image_mask[0].nonzero().flatten()[tiles < 0]] = False  # newlines stay
    with torch.no_grad(), model.intervene([Ablate("hook_image_features", positions=zeroed)]):
        after = plain(model, inputs)
    torch.testing.assert_close(with_views, (plain(model, inputs) - after)[0], **CLOSE)
    without = occlude_features(model, inputs, **kw).values[0, 0, 0]
    assert float((with_views - without).abs()) > 1e-9


def test_a_reader_of_one_patch_is_found(model_of) -> None:
    model, clean, _ = pair_of(model_of, LLAVA)
    one = clean[2].without_padding()
    metric = project("blocks.0.hook_resid_pre", torch.randn(48, dtype=torch.float64), int(one.grid_tokens(0)[0, 1]))
    found = occlude_features(model, one, metric, **QUIET).values[0]
    assert float(found[0, 1].abs()) > 1e-6
    found[0, 1] = 0
    assert float(found.abs().max()) < 1e-14
    other = occlude_features(model, one, metric, fill=torch.zeros(48, dtype=torch.float64), **QUIET)
    zero = occlude_features(model, one, metric, fill="zero", **QUIET)
    assert torch.equal(other.values, zero.values)


def test_the_embedded_model_reads_a_smile_from_the_mouth() -> None:
    """Given the neutral twin's pixels window by window, two persons' answers change at the mouth."""
    from veena_lens.checkpoints.files import bundled_pairs

    model = HookedVLM.from_pretrained("tiny-llava-emotion")
    pairs = [pair for pair in bundled_pairs("test") if pair[0].emotion == "happy"][:2]
    happy, calm = ([picture.open() for picture in side] for side in zip(*pairs, strict=True))
    metric = logit_diff(model.to_single_token(" happy"), model.to_single_token(" neutral"))
    questions = ["name the emotions of the person in the picture."] * 2
    found = occlude_pixels(model, questions, [[x] for x in happy], metric, fill=calm, max_rows=32, **QUIET)
    for person in found.values:
        row, column = divmod(int(person.argmax()), 8)
        assert row >= 4 and 2 <= column <= 5
    # Attribution at the tower's input agrees; what enters the decoder has been carried elsewhere by the tower.
    sides = [model.prepare(text=questions, images=[[face] for face in side]) for side in (happy, calm)]
    tower = image_attribution(model, *sides, metric, "noising", site="vision.hook_embed")
    agreed = rank_agreement(tower, found).values
    assert float(agreed[:, 0].min()) > 0.3 and float(agreed[:, 1].max()) < 0.01
    assert agreed[:, 2].tolist() == [64, 64]


def test_agreement_is_the_rank_correlation_with_a_calibrated_p() -> None:
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(6, 7, generator=generator)
    base = Scores(a, ("height", "width"))
    same = rank_agreement(base, Scores(a.exp(), ("height", "width")), draws=200)
    assert same.values[0] == pytest.approx(1) and same.values[1] == pytest.approx(1 / 201) and same.values[2] == 42
    shifted = rank_agreement(base, Scores(-a, ("height", "width")), null="shift")
    assert shifted.values[0] == pytest.approx(-1) and shifted.values[1] == pytest.approx(1 / 42)
    ties = rank_agreement(
        Scores(torch.tensor([1.0, 1, 2, 3]), ("cell",)), Scores(torch.tensor([4.0, 5, 6, 6]), ("cell",))
    )
    # ranks 1.5 1.5 3 4 and 1 2 3.5 3.5
    assert ties.values[0] == pytest.approx(4 / 4.5)
    null = [
        float(
            rank_agreement(base, Scores(torch.randn(6, 7, generator=generator), base.axes), draws=99, seed=i).values[1]
        )
        for i in range(60)
    ]
    assert 0.35 < sum(null) / len(null) < 0.65 and min(null) >= 0.01
    hidden = torch.ones(6, 7, dtype=torch.bool)
    hidden[0] = False
    assert rank_agreement(base, Scores(a, base.axes, mask=hidden)).values[2] == 35
    smooth = torch.arange(64.0).view(1, 8, 8) / 8
    both = Scores(torch.cat([smooth, smooth]), ("pair", "height", "width"), {"pair": ["a", "b"]})
    assert rank_agreement(both, both, null="shift").labels["pair"] == ["a", "b"]


def test_maps_that_cannot_be_compared_are_refused() -> None:
    a = Scores(torch.randn(3, 4), ("height", "width"))
    for other, telling in (
        (Scores(torch.randn(4, 3), a.axes), "one shape"),
        (Scores(torch.randn(3, 4), ("y", "x")), "one shape"),
        (Scores(torch.randn(3, 4), a.axes, mask=torch.zeros(3, 4, dtype=torch.bool)), "needs 3"),
    ):
        with pytest.raises(ValueError, match=telling):
            rank_agreement(a, other)
    with pytest.raises(ValueError, match="null="):
        rank_agreement(a, a, null="turn")
    with pytest.raises(ValueError, match="without missing"):
        rank_agreement(a, Scores(torch.randn(3, 4), a.axes, mask=torch.rand(3, 4) > 0.2), null="shift")


@pytest.mark.parametrize(
    ("kw", "telling"),
    [
        (dict(fill="gray"), "gray"),
        (dict(fill=["grey", "grey"]), "2 images"),
        (dict(image=1), "no image 1"),
        (dict(window=0), "window"),
        (dict(stride=0), "stride"),
        (dict(metric=None), "metric="),
        (dict(metric=lambda logits: logits), "one number per row"),
        (dict(metric=lambda logits: logits[:, 0] / 0), "not finite"),
        (dict(max_rows=0), "max_rows"),
        (dict(text=["a", "b"]), "its images"),
    ],
)
def test_what_does_not_fit_is_refused(kw: dict[str, Any], telling: str, face) -> None:
    model, (picture, _) = face
    settings: dict[str, Any] = {"text": "who is it?", "metric": difference} | QUIET | kw
    images = [picture] if isinstance(settings["text"], list) else picture
    with pytest.raises(ValueError, match=telling):
        occlude_pixels(model, images=images, **settings)


def test_features_that_do_not_fit_are_refused(model_of) -> None:
    model, clean, _ = pair_of(model_of, LLAVA)
    for kw, telling in (
        (dict(fill="grey"), "'mean'"),
        (dict(fill=torch.zeros(3)), "vector"),
        (dict(image=5), "No image 5"),
        (dict(views=True), "model.prepare"),
        (dict(window=(0, 1)), "window"),
    ):
        with pytest.raises(ValueError, match=telling):
            occlude_features(model, clean[[0, 2]], difference, **QUIET, **kw)
    with pytest.raises(ValueError, match="No image 0"):
        occlude_features(model, clean, difference, **QUIET)
