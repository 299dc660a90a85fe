"""Asking streams the model's own answer, says what is wrong with a request, and exports what opens again."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

from tests.app.explorer.conftest import NAME, QUESTION
from tests.app.explorer.test_tabs import assert_same_view
from veena_lens.app.explorer import directions, look, patch, steer
from veena_lens.app.explorer.own_pairs import take_sets
from veena_lens.app.explorer.pictures import chosen, open_sample, open_upload, samples, thumbnails
from veena_lens.app.explorer.programs import Made
from veena_lens.app.explorer.state import Explorer, Limits, Session
from veena_lens.app.view import ExplorerView
from veena_lens.interventions import Circuit


def asked(explorer: Explorer, session: Session, face: Any, prompt: str = QUESTION) -> list[str]:
    return list(look.ask(explorer, session, NAME, [face], prompt, 16))


def test_answer_grows_to_what_generate_gives(explorer: Explorer, session: Session, face: Any) -> None:
    texts = asked(explorer, session, face)
    with explorer.using(NAME) as model:
        (whole,) = model.generate(model.prepare(text=QUESTION, images=face.image), max_new_tokens=16)
    assert texts[-1] == whole and len(texts) > 3
    assert all(later.startswith(sooner) for sooner, later in itertools.pairwise(texts))
    view, _ = look.look(explorer, session)
    words = [t["text"] for t in view.header["tokens"] if t.get("part") == "answer"]
    assert "".join(words) == whole


def test_answer_that_is_stopped_can_be_looked_at(explorer: Explorer, session: Session, face: Any) -> None:
    steps = look.ask(explorer, session, NAME, [face], QUESTION, 16)
    said = [next(steps), next(steps)][-1]
    steps.close()
    view, _ = look.look(explorer, session)
    assert "".join(t["text"] for t in view.header["tokens"] if t.get("part") == "answer") == said


def test_two_answers_at_once_do_not_mix(explorer: Explorer, face: Any) -> None:
    other = open_sample(next(name for name in samples() if name.startswith("sad")))
    alone = [asked(explorer, explorer.session("x"), picture)[-1] for picture in (face, other)]
    streams = [
        look.ask(explorer, explorer.session(key), NAME, [picture], QUESTION, 16)
        for key, picture in (("a", face), ("b", other))
    ]
    last = ["", ""]
    for _ in range(16):
        for i, stream in enumerate(streams):
            last[i] = next(stream, last[i])
    assert last == alone and alone[0] != alone[1]


@pytest.mark.parametrize(
    ("prompt", "told"), [("  ", "Write a question first"), ("a" * 30_000, "limit here is"), ("why " * 3_000, "context")]
)
def test_question_that_cannot_be_asked_is_told(
    explorer: Explorer, session: Session, face: Any, prompt: str, told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        asked(explorer, session, face, prompt)
    assert "asked" not in session.kept


def test_code_of_the_look_tab_runs(explorer: Explorer, session: Session, face: Any, run_code: Any) -> None:
    asked(explorer, session, face)
    twin = open_sample(next(name for name in samples() if name.startswith("neutral")))
    view, code = look.look(explorer, session, twin)
    made = run_code(code)["view"]
    assert Path("view.html").stat().st_size > 10_000
    assert_same_view(made, view)
    assert "difference" in view.header["modes"] and view.header["tokens"][-1]["part"] == "answer"


def test_export_opens_again(
    explorer: Explorer, session: Session, face: Any, run_code: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="then there is something to export"):
        look.export_look(explorer, session)
    asked(explorer, session, face)
    view, _ = look.look(explorer, session)
    explorer.show(session, "look", view)
    files = {Path(f).name: Path(f) for f in look.export_look(explorer, session)}
    assert set(files) == {"view.html", "cache.safetensors", "attention.csv", "attention.parquet", "attention.png"}
    table = pd.read_parquet(files["attention.parquet"])
    assert len(table) == 8 * 8 * 64 and len(pd.read_csv(files["attention.csv"])) == len(table)
    with Image.open(files["attention.png"]) as figure:
        assert figure.width > 400
    again, code = look.look_at_cache(explorer, files["cache.safetensors"])
    assert again.title == NAME and again.header["panels"][0]["source"] and "lens" not in again.header["modes"]
    monkeypatch.chdir(session.folder)  # where the file lies
    assert isinstance(run_code(code)["view"], ExplorerView)
    read, code = look.look_at_cache(explorer, files["cache.safetensors"], NAME)
    assert "lens" in read.header["modes"] and "lens" in run_code(code)["view"].header["modes"]
    with pytest.raises(ValueError, match="This cache is of another model than tiny-qwen2vl-emotion"):
        look.look_at_cache(explorer, files["cache.safetensors"], "tiny-qwen2vl-emotion")


def test_uploads_are_checked_before_they_are_decoded(tmp_path: Path) -> None:
    limits = Limits(upload_bytes=5_000, pixels=10_000, images=2)
    good = tmp_path / "good.png"
    Image.new("RGB", (50, 40), "red").save(good)
    shown = open_upload(str(good), limits)
    assert (shown.name, shown.made.expression, shown.image.size) == ("good.png", "'good.png'", (50, 40))
    text = tmp_path / "text.png"
    text.write_text("no picture at all")
    cut = tmp_path / "cut.png"
    cut.write_bytes(good.read_bytes()[:60])
    large = tmp_path / "large.png"
    Image.new("RGB", (400, 300)).save(large)
    heavy = tmp_path / "heavy.png"
    heavy.write_bytes(b"0" * 6_000)
    for path, told in (
        (text, r"^text\.png cannot be read as an? (picture|image).*Give a PNG, JPEG or WebP"),
        (cut, r"^cut\.png cannot be read"),
        (large, r"large\.png has 120,000 pixels; the limit here is 10,000"),
        (heavy, r"heavy\.png has 6,000 bytes; the limit here is 5,000"),
    ):
        with pytest.raises(ValueError, match=told):
            open_upload(str(path), limits)
    with pytest.raises(ValueError, match="3 images were given; the limit here is 2"):
        chosen([str(good)] * 3, None, limits)
    assert chosen(None, None, limits) == [] and len(chosen(None, next(iter(samples())), limits)) == 1


def test_captions_cannot_carry_markup() -> None:
    html = thumbnails([(Image.new("RGB", (8, 8)), '"><script>alert(1)</script>')])
    assert "<script>" not in html and "&lt;script&gt;" in html


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1)])
def test_strip_that_the_processor_would_make_enormous_is_refused(
    explorer: Explorer,
    session: Session,
    face: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    size: tuple[int, int],
) -> None:
    with explorer.using(NAME) as model:  # as CLIP's processor, which stretches the shorter edge
        monkeypatch.setattr(model.processor.image_processor, "size", {"shortest_edge": 96})
    path = tmp_path / "strip.png"
    Image.new("RGB", size).save(path)
    strip = open_upload(str(path), Limits())
    swept = patch.SweepSettings(model=NAME, clean=face, corrupted=strip, prompt=QUESTION, words=("happy", "sad"))
    circuit = Made(Circuit([]), "circuit")
    for run in (
        lambda: list(look.ask(explorer, session, NAME, [strip], QUESTION, 4)),
        lambda: patch.check(explorer, swept),
        lambda: steer.steer(explorer, session, NAME, circuit, strip, QUESTION, "happy"),
    ):
        with pytest.raises(
            ValueError, match=r"strip.png of \d+ x \d+ pixels becomes [\d,]{9,} in the model's processor"
        ):
            run()
    own = take_sets(session, [str(path)], [str(path)], "sad", Limits())
    of_own = directions.DirectionSettings(model=NAME, emotion="sad", own=own.pairs.fingerprint)
    with pytest.raises(ValueError, match="becomes"):
        directions.extract(explorer, session, of_own)
