"""The report of a run: one page that loads nothing, with every section, and words a stranger can follow."""

from __future__ import annotations

import re
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from tests.app.test_html import Page
from tests.emotion.asked import bundled
from tests.emotion.small_run import MODEL, new_folder, small_run
from veena_lens.app import veena_findings, veena_report
from veena_lens.app.veena_report import write_veena_report
from veena_lens.emotion import tables
from veena_lens.emotion.locate.layers import KeyLayers
from veena_lens.emotion.pipeline import VeenaRun

SECTIONS = (
    "What was found",
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


def test_findings_come_first_details_are_folded_and_a_small_preset_says_so() -> None:
    run, _ = small_run()
    text = page()
    assert text.count("<details") == len(SECTIONS) - 1 and text.count("<details open>") == 1
    points = re.search(r'<ul class="points">(.+?)</ul>', text)
    assert points is not None and 3 <= points[1].count("<li>") <= 5
    assert f"This run used the preset {run.settings.preset}" in text and "come from the preset full" in text
    assert text.index("This run used the preset") < text.index('<ul class="points">')
    assert text.index("random heads of the same layers") < text.index("<details")


def small_layers(restored: list, control: list, fluency: list) -> Any:
    shown = {"layer": [0, 1], "alpha": [0.1, 0.8, 3.0]}
    return Mock(
        spec=KeyLayers,
        restored=SimpleNamespace(values=torch.tensor(restored), labels=shown),
        control=SimpleNamespace(values=torch.tensor(control)),
        fluency=SimpleNamespace(values=torch.tensor(fluency)),
        best=1,
    )


def test_a_layer_is_shown_at_its_best_fluent_dose_and_not_averaged_with_doses_that_do_nothing() -> None:
    nothing, strong = [0.0, 0.0, 0.0], [0.7, 0.8, 0.9]
    layers = small_layers(
        [[nothing, [-0.1, 0.2, 0.4], strong], [nothing, strong, strong]], [[nothing] * 3] * 2,
        [[1.0, 1.1, 9.0], [1.0, 1.1, 9.0]],
    )  # fmt: skip
    assert veena_findings.best_doses(layers) == [1, 1]
    assert veena_findings.clear_layers(layers) == [1]  # that of layer 0 touches 0
    said = veena_findings.layer_finding(Mock(spec=VeenaRun, layers=layers))
    assert "in layer 1 (" in said and "80 % [70, 90]" in said and "dose 0.8" in said


def test_no_edge_whose_interval_touches_0_is_called_confirmed() -> None:
    edge = {"kept": True, "low": 0.1, "high": 0.5}
    assert tables.is_confirmed(edge) and tables.is_confirmed({"kept": True, "low": -0.5, "high": -0.1})
    for other in ({"low": 0.0}, {"low": -0.1}, {"kept": False}):
        assert not tables.is_confirmed({**edge, **other})


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.1, 0.4, "above"), (-0.4, -0.1, "below"), (-0.1, 0.4, "not distinguishable"), (None, None, "not dist")],
)
def test_a_difference_is_called_one_only_where_its_interval_is_clear_of_0(low, high, said) -> None:
    assert veena_findings._against({"difference_low": low, "difference_high": high}).startswith(said)


def test_settings_have_names_and_numbers_no_needless_digits() -> None:
    found = {"settings": {"mode": "scale", "beta": 8.0, "vector": "6d228d"}}
    assert tables._named_settings(found) == "attention mode scale; attention times 8"
    adaptive = {"beta_max": 5.0, "gamma_max": 3.0, "kind": "trust", "beta": 5.0, "gamma": 3.0}
    assert tables._named_settings({"settings": adaptive}) == (
        "attention times at most 5; neurons times at most 3; rule trust"
    )
    assert tables._rounded("x", 3)({"x": 3.06e-09}) == "0.000" and tables._rounded("x", 1, 100)({"x": 0.955}) == "95.5"
    assert tables._rounded("x", 1)({"x": None}) == ""
    assert "e-0" not in re.sub(r"base64,[^\"]+", "", page())


def test_nothing_unknown_is_printed_as_nan() -> None:
    assert not re.search(r">\s*(?:nan|None)\s*<", page())


@pytest.mark.parametrize(("name", "shown"), [("3_mlp_out", "MLP 3"), ("L2H1", "L2H1")])
def test_parts_of_the_model_are_named_as_people_write_them(name: str, shown: str) -> None:
    assert tables._part("sender")({"sender": name}) == shown


def test_examples_are_evenly_spaced_and_all_where_there_are_few() -> None:
    assert veena_report._every(list(range(9)), 3) == [0, 3, 6]
    assert veena_report._every([1, 2], 3) == [1, 2] and veena_report._every([1], 0) == []
