"""The documentation, opened from disk: quiet, nothing cut off at two widths, and a search that finds."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.app.browser.conftest import ROOT

# What reaches beyond the window, and code that is wider than its box.
CUT_OFF = """() => {
  const width = document.documentElement.clientWidth;
  const cut = [...document.querySelectorAll("h1, h2, h3, p, pre, img")].filter((e) =>
    e.getBoundingClientRect().right > width + 1 || (e.tagName === "PRE" && e.scrollWidth > e.clientWidth + 1));
  return [document.documentElement.scrollWidth - width, cut.map((e) => e.textContent.slice(0, 60))];
}"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for module in ("mkdocs", "mkdocstrings"):
        pytest.importorskip(module, reason="needs the extra docs: pip install 'veena-lens[docs]'")
    folder = tmp_path_factory.mktemp("site")
    subprocess.run([sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)], cwd=ROOT, check=True)
    return folder


def test_no_page_has_a_script_error_or_cuts_anything_off(site: Path, open_page: Callable[..., Any]) -> None:
    for width in (1280, 800):
        page = open_page((site / "index.html").as_uri(), width)
        for file in sorted(set(site.rglob("*.html")) - {site / "404.html"}):  # that one is for a server
            page.goto(file.as_uri())
            page.wait_for_load_state("load")
            assert page.evaluate(CUT_OFF) == [0, []], f"{file.name} at {width} pixels"


def test_code_has_colours(site: Path, open_page: Callable[..., Any]) -> None:
    page = open_page((site / "quickstart.html").as_uri())
    colours = page.evaluate(
        "[...document.querySelectorAll('.highlight')[0].querySelectorAll('span')].map((e) => getComputedStyle(e).color)"
    )
    assert len(set(colours)) > 3


@pytest.mark.parametrize("start", ["index.html", "reference/sweeps.html"])
def test_search_finds_names_and_parts_of_names_from_disk(site: Path, open_page: Callable[..., Any], start: str) -> None:
    page = open_page((site / start).as_uri())
    page.get_by_role("link", name="Search").click()
    field = page.locator("#mkdocs-search-query")
    field.fill("patch_swe")
    found = page.locator("#mkdocs-search-results article a")
    found.first.wait_for()
    assert found.first.text_content() == "patch_sweep"
    field.fill("no such words anywhere")
    page.locator("#mkdocs-search-results p", has_text="Nothing").wait_for()
    field.fill("attention sinks")
    found.first.wait_for()
    field.press("Enter")
    page.wait_for_url("**/*.html#*")
