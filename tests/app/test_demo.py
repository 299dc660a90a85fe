"""The demo: its choices, its page from made-up findings, and its steps on the embedded model."""

import json
import re

import pytest
import torch

from tests.app.test_html import Page
from veena_lens.app import demo
from veena_lens.app.demo_page import write_page
from veena_lens.app.demo_results import CaptionSteering, DemoResult, Description, Flips, Inside, Steered
from veena_lens.app.demo_steering import ALPHAS, asked, best_setting, steering
from veena_lens.app.questions import LIST
from veena_lens.checkpoints.files import bundled_pairs, bundled_pictures
from veena_lens.emotion import Method, generate_answers
from veena_lens.interventions import Steer
from veena_lens.scores import Scores
from veena_lens.zoo.people import EMOTIONS


def test_one_face_an_emotion_and_two_a_strange_style_are_shown() -> None:
    strange = [*bundled_pictures("held-out style"), *bundled_pictures("emoji")]
    shown = demo.choose(bundled_pictures("test"), strange)
    assert [p.emotion for p in shown[:8]] == list(EMOTIONS) and len({p.identity for p in shown[:8]}) == 8
    assert {(p.style, p.emotion) for p in shown[8:]} == {
        (style, emotion) for style in ("open-peeps", "micah", "emoji") for emotion in ("happy", "sad")
    }


def test_pair_that_is_named_right_on_both_sides_wins_over_one_that_is_shown() -> None:
    pairs, shown = bundled_pairs("test"), demo.choose(bundled_pictures("test"), [])
    surprised = demo.choose_pair(pairs, shown, {p.file for pair in pairs for p in pair})
    assert surprised[0].emotion == "surprised" and surprised[0].file in {p.file for p in shown}
    assert demo.choose_pair(pairs, shown, {p.file for p in pairs[5]}) == pairs[5]


def test_weaker_and_earlier_setting_wins_where_rates_are_equal() -> None:
    rates = torch.tensor([[0.0, 0.9, 0.9], [0.0, 0.8, 0.9], [1.0, 1.0, 1.0]])
    development = Scores(rates, ("setting", "layer"), {"setting": ["alpha 1", "alpha 2", "random"]})
    assert best_setting(development) == (1, ALPHAS[0])


def findings(out) -> DemoResult:
    """A result as `run_demo` makes it, with made-up numbers."""
    emotional, neutral = bundled_pairs("test")[0]
    generator = torch.Generator().manual_seed(0)
    grid = torch.rand(3, 4, 4, generator=generator) / 20
    lens = torch.rand(3, len(EMOTIONS), generator=generator)
    settings = ["alpha 1", "alpha 2", "random"]
    rates = Scores(torch.rand(3, 3, generator=generator), ("setting", "layer"), {"setting": settings}, "named", "share")
    flips = Flips({emotion: 0.5 for emotion in EMOTIONS[:-1]}, 0.75)
    inside = Inside(
        emotional=emotional,
        neutral=neutral,
        attention=Scores(grid, ("layer", "height", "width"), name="attention", unit="probability"),
        patch_boxes=None,
        lens=Scores(lens, ("layer", "emotion"), {"emotion": EMOTIONS}, "probability"),
        likeliest=[[("the", 0.5)], [(emotional.emotion, 0.6)], [(emotional.emotion, 0.9)]],
        patching=Scores(
            torch.randn(3, 2, generator=generator), ("layer", "head"), meta={"emotional": 2.0, "neutral": -2.0}
        ),
        cells=Scores(torch.stack([grid[0] * 20, grid[1]]), ("source", "height", "width")),
        view="<!doctype html><html><body><p>a view & its script</p></body></html>",
    )
    steered = Steered(
        n_pairs=8,
        development=rates,
        layer=1,
        alpha=1.0,
        n_pictures=2,
        test=flips,
        control=flips,
        picture=neutral,
        captioned=CaptionSteering(layer=2, alpha=0.7, development=0.8, test=0.75, control=0.0),
        said=[("none", "a neutral <person>.", "a neutral person."), ("happy", "a happy person.", "happy happy.")],
    )
    descriptions = [
        Description(emotional, f"a {emotional.emotion} person."),
        Description(neutral, "a sad one."),
    ]
    return DemoResult(
        model="made-up",
        out=out,
        descriptions=descriptions,
        named_right=1,
        named_of=2,
        inside=inside,
        steered=steered,
        seconds=3.0,
    )


def test_page_and_figures_are_written_from_the_findings(tmp_path) -> None:
    result = findings(tmp_path)
    page = write_page(result).read_text(encoding="utf-8")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"{name}.png" for name in demo_figures()} | {"index.html"}
    assert "a neutral &lt;person&gt;." in page and '<td class="bad">miss</td>' in page and "50%" in page
    assert json.loads(json.dumps(result.numbers))["steering"]["layer"] == 1


def demo_figures() -> tuple[str, ...]:
    return ("attention", "attention_by_layer", "cells", "logit_lens", "patching", "steering")


def test_page_says_what_was_found_first_and_holds_the_view_in_a_frame_that_reaches_nothing(tmp_path) -> None:
    result = findings(tmp_path)
    text = write_page(result).read_text(encoding="utf-8")
    page = Page(text)
    headings = re.findall(r"<h2[^>]*>([^<]+)</h2>", text)
    assert headings[:3] == ["What was found", "Hover over it", "Which parts of the image decide"]
    (frame,) = page.all("iframe")
    assert frame["sandbox"] == "allow-scripts" and frame["srcdoc"] == result.inside.view and frame["title"]
    assert "default-src 'none'; script-src 'unsafe-inline'" in text and not page.all("script")
    best, control = (float(values.abs().max()) for values in result.inside.cells.values)
    assert f"by {best:.1f} of the 4.0 logits" in text and f"another neutral person by {control:.1f} at most" in text


def test_an_answer_that_stutters_is_called_broken_on_the_page(tmp_path) -> None:
    text = write_page(findings(tmp_path)).read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if "happy happy." in line)
    assert '<td>a happy person.</td><td class="good">turned</td>' in row and '<td class="bad">broken</td>' in row


def test_printed_table_is_short_and_says_what_came_out(tmp_path) -> None:
    lines = repr(findings(tmp_path)).splitlines()
    assert len(lines) < 10 and all(len(line) <= 120 for line in lines[:-1])
    assert "1 of 2" in lines[1] and "from layer 1" in "".join(lines)
    assert lines[-1] == f"page: {tmp_path / 'index.html'}"


@pytest.fixture(scope="module")
def model():
    from veena_lens import HookedVLM

    return HookedVLM.from_pretrained("tiny-llava-emotion")


def test_lens_ends_in_what_the_model_says_and_every_head_is_patched(model) -> None:
    emotional, neutral = bundled_pairs("test")[0]
    stranger = next(p for p in bundled_pictures("test") if p.emotion == "neutral" and p.identity != neutral.identity)
    inside = demo.look_inside(model, emotional, neutral, stranger)
    with torch.no_grad():
        said = model(model.prepare(text=LIST, images=emotional.open()))[0, -1].softmax(-1)
    tokens = [model.to_single_token(f" {emotion}") for emotion in EMOTIONS]
    torch.testing.assert_close(inside.lens.select(layer=-1).values, said[tokens], rtol=1e-4, atol=1e-6)
    assert inside.likeliest[-1][0][1] == pytest.approx(said.max().item(), rel=1e-4)
    assert [len(words) for words in inside.likeliest] == [5] * model.cfg.n_layers

    patching = inside.patching
    assert patching.shape == (model.cfg.n_layers, model.cfg.n_heads) and torch.isfinite(patching.values).all()
    assert patching.meta["emotional"] > patching.meta["neutral"]
    maps = inside.attention
    height, width = maps.shape[1:]
    assert height > 1 and width > 1 and (maps.values >= 0).all() and (maps.values.sum((1, 2)) <= 1 + 1e-5).all()

    cells = inside.cells
    assert cells.shape == (2, height, width) and inside.best_cell > 5 * inside.best_control
    assert "<title>" in inside.view and "openPage" in inside.view


def test_patching_is_that_of_transformer_lens(model) -> None:
    """`transformer_lens.patching` takes inputs with images in the place of tokens, and finds the same effects."""
    import contextlib
    import io

    from transformer_lens import patching

    pair = bundled_pairs("test")[0]
    inside = demo.look_inside(model, *pair, pair[1])
    assert inside.best_control < 1e-4  # patched with itself
    emotional, neutral = (model.prepare(text=LIST, images=picture.open()) for picture in pair)
    words = [model.to_single_token(f" {word}") for word in (pair[0].emotion, "neutral")]

    def measure(logits: torch.Tensor) -> torch.Tensor:
        return (logits[:, -1, words[0]] - logits[:, -1, words[1]]).mean()

    with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        logits, cache = model.run_with_cache(emotional, names_filter=lambda name: name.endswith("attn.hook_z"))
        high, low = measure(logits), measure(model(neutral))
        raw = patching.get_act_patch_attn_head_out_all_pos(model, neutral, cache, measure)
    torch.testing.assert_close(inside.patching.values, (raw - low) / (high - low), rtol=1e-3, atol=1e-4)


def test_rows_are_steered_to_each_emotion_in_turn_and_at_random_by_as_much() -> None:
    vectors = {"happy": torch.randn(3, 5), "sad": torch.randn(3, 5)}
    exact = steering("steered", vectors, 2, layer=1, alpha=2.0).interventions(None, None)
    drawn = steering("random", vectors, 2, layer=1, alpha=2.0, seed=7).interventions(None, None)
    for row, name in enumerate(["happy", "happy", "sad", "sad"]):
        ((one,), (other,)) = exact[row], drawn[row]
        assert torch.equal(one.vector, vectors[name][1]) and one.alpha == other.alpha == 2.0
        torch.testing.assert_close(other.vector.norm(), one.vector.norm())
        assert not torch.allclose(other.vector, one.vector)
    assert not torch.allclose(drawn[0][0].vector, drawn[1][0].vector)


def test_steer_of_one_row_leaves_the_other_rows_alone(model) -> None:
    faces = asked(bundled_pictures("test")[:2], LIST)
    plain = generate_answers(model, faces, max_new_tokens=4)
    strong = Steer(layer=3, vector=100 * torch.ones(model.cfg.d_model), alpha=1.0)
    mixed = generate_answers(model, faces, Method(name="x", interventions=lambda *_: [[], [strong]]), max_new_tokens=4)
    assert mixed[0] == plain[0] and mixed[1] != plain[1]
