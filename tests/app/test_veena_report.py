"""The report of a run: one page that loads nothing, with every section, and words a stranger can follow."""

from __future__ import annotations

import re
from functools import cache

import pytest

from tests.app.test_html import Page
from tests.emotion.asked import bundled
from tests.emotion.small_run import MODEL, new_folder, small_run
from veena_lens.app import veena_report
from veena_lens.app.veena_report import write_veena_report
from veena_lens.emotion import tables

SECTIONS = (
    "Hit rate of each method",
    "Before and after",
    "Key layers",
    "Key heads",
    "Key neurons",
    "What was chosen, and how",
    "Controls and side effects",
    "How this was made",
)


@cache
def page() -> str:
    command = ["veena-lens", "run", "--model", MODEL, "--out", "a folder"]
    path = write_veena_report(small_run()[0], bundled(MODEL), new_folder() / "report.html", command)
    return path.read_text(encoding="utf-8")


def test_the_page_loads_nothing() -> None:
    read = Page(page())
    assert "default-src 'none'" in page() and not read.all("script") and not read.all("link")
    assert all(str(image["src"]).startswith("data:image/png;base64,") for image in read.all("img"))
    assert not re.search(r"(?:src|href)=\"(?!data:|#)|url\(|@import", page())


def test_the_page_has_every_section_in_order() -> None:
    assert tuple(re.findall(r"<h2[^>]*>([^<]+)</h2>", page())) == SECTIONS
    assert f"Emotion circuit of {MODEL}" in page() and "veena-lens run --model" in page() and "&#x27;a folder" in page()


def test_the_page_shows_every_method_and_every_picture_has_words() -> None:
    run, _ = small_run()
    for method in run.test.methods:
        assert f"<td>{'plain model' if method == 'plain' else method}</td>" in page()
    alts = [image["alt"] for image in Page(page()).all("img")]
    assert len(alts) >= 15 and all(alts)


def test_the_lead_tells_the_hit_rates_under_conflict() -> None:
    run, _ = small_run()
    plain = 100 * float(run.test.hits["conflict, plain"]["plain"].mean())
    vee = 100 * float(run.test.hits["conflict, plain"]["VEE"].mean())
    lead = re.search(r'<p class="lead">(.+?)</p>', page())
    assert lead is not None and f"in {plain:.1f} % of answers; VEE {vee:.1f} %" in lead[1]


def test_nothing_unknown_is_printed_as_nan() -> None:
    assert not re.search(r">\s*(?:nan|None)\s*<", page())


@pytest.mark.parametrize(("name", "shown"), [("3_mlp_out", "MLP 3"), ("L2H1", "L2H1")])
def test_parts_of_the_model_are_named_as_people_write_them(name: str, shown: str) -> None:
    assert tables._part("sender")({"sender": name}) == shown


def test_examples_are_evenly_spaced_and_all_where_there_are_few() -> None:
    assert veena_report._every(list(range(9)), 3) == [0, 3, 6]
    assert veena_report._every([1, 2], 3) == [1, 2] and veena_report._every([1], 0) == []
