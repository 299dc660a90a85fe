"""The demo: its choices, its page from made-up findings, and its steps on the embedded model."""

import json

import pytest
import torch

from veena_lens.app import demo, steps
from veena_lens.app.demo_page import write_page
from veena_lens.checkpoints.files import bundled_pairs, bundled_pictures
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
    assert demo.best_setting(development) == (1, 1.0)


def findings(out) -> demo.DemoResult:
    """A result as `run_demo` makes it, with made-up numbers."""
    emotional, neutral = bundled_pairs("test")[0]
    generator = torch.Generator().manual_seed(0)
    grid = torch.rand(3, 4, 4, generator=generator) / 20
    lens = torch.rand(3, len(EMOTIONS), generator=generator)
    settings = ["alpha 1", "alpha 2", "random"]
    rates = Scores(torch.rand(3, 3, generator=generator), ("setting", "layer"), {"setting": settings}, "named", "share")
    flips = steps.Flips({emotion: 0.5 for emotion in EMOTIONS[:-1]}, 0.75)
    inside = demo.Inside(
        emotional=emotional,
        neutral=neutral,
        attention=Scores(grid, ("layer", "y", "x"), name="attention", unit="probability"),
        patch_boxes=None,
        lens=Scores(lens, ("layer", "emotion"), {"emotion": EMOTIONS}, "probability"),
        likeliest=[[("the", 0.5)], [(emotional.emotion, 0.6)], [(emotional.emotion, 0.9)]],
        patching=Scores(
            torch.randn(3, 2, generator=generator), ("layer", "head"), meta={"emotional": 2.0, "neutral": -2.0}
        ),
    )
    steered = demo.Steered(
        n_pairs=8,
        development=rates,
        layer=1,
        alpha=1.0,
        n_pictures=2,
        test=flips,
        control=flips,
        picture=neutral,
        said=[("none", "a neutral <person>.", "a neutral person."), ("happy", "a happy person.", "happy happy.")],
    )
    descriptions = [
        steps.Description(emotional, f"a {emotional.emotion} person."),
        steps.Description(neutral, "a sad one."),
    ]
    numbers = demo.summary("made-up", descriptions, (1, 2), inside, steered, 3.0)
    return demo.DemoResult(
        model="made-up",
        out=out,
        descriptions=descriptions,
        named_right=1,
        named_of=2,
        inside=inside,
        steered=steered,
        seconds=3.0,
        numbers=numbers,
    )


def test_page_and_figures_are_written_from_the_findings(tmp_path) -> None:
    result = findings(tmp_path)
    page = write_page(result).read_text(encoding="utf-8")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"{name}.png" for name in demo_figures()} | {"index.html"}
    assert "a neutral &lt;person&gt;." in page and '<td class="bad">miss</td>' in page and "50%" in page
    assert json.loads(json.dumps(result.numbers))["steering"]["layer"] == 1


def demo_figures() -> tuple[str, ...]:
    return ("attention", "attention_by_layer", "logit_lens", "patching", "steering")


def test_printed_table_is_short_and_says_what_came_out(tmp_path) -> None:
    lines = repr(findings(tmp_path)).splitlines()
    assert len(lines) < 10 and all(len(line) <= 120 for line in lines[:-1])
    assert "1 of 2" in lines[1] and "from layer 1" in "".join(lines)


@pytest.fixture(scope="module")
def model():
    from veena_lens import HookedVLM

    return HookedVLM.from_pretrained("tiny-llava-emotion")


def test_lens_ends_in_what_the_model_says_and_patching_all_heads_lie_between(model) -> None:
    emotional, neutral = (steps.ask(model, steps.NAME, [picture]) for picture in bundled_pairs("test")[0])
    lens, likeliest = steps.logit_lens(model, emotional)
    with torch.no_grad():
        said = model(emotional)[0, -1].softmax(-1)
    tokens = list(steps.word_tokens(model).values())
    torch.testing.assert_close(lens.select(layer=-1).values, said[tokens], rtol=1e-4, atol=1e-6)
    assert likeliest[-1][0][1] == pytest.approx(said.max().item(), rel=1e-4)

    same = steps.head_patching(model, emotional, neutral, bundled_pairs("test")[0][0].emotion)
    assert same.shape == (model.cfg.n_layers, model.cfg.n_heads) and torch.isfinite(same.values).all()


def test_attention_to_the_picture_is_a_share(model) -> None:
    maps = steps.attention_to_picture(model, steps.ask(model, steps.NAME, bundled_pictures("test")[:1]))
    height, width = maps.shape[1:]
    assert height > 1 and width > 1 and (maps.values >= 0).all() and (maps.values.sum((1, 2)) <= 1 + 1e-5).all()


def test_random_direction_has_the_vectors_length() -> None:
    vector = torch.randn(3, 5)
    noise = steps.random_like(vector, torch.Generator().manual_seed(123))
    torch.testing.assert_close(noise.norm(dim=-1), vector.norm(dim=-1))
    assert not torch.allclose(noise, vector)


def test_steer_of_one_row_leaves_the_other_rows_alone(model) -> None:
    from veena_lens.interventions import Steer

    faces = bundled_pictures("test")[:2]
    plain = steps.steered(model, steps.NAME, faces, [None, None], 4)
    strong = Steer(layer=3, vector=100 * torch.ones(model.cfg.d_model), alpha=1.0)
    mixed = steps.steered(model, steps.NAME, faces, [None, strong], 4)
    assert mixed[0] == plain[0] and mixed[1] != plain[1]
