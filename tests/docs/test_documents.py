"""Documents that cannot lie: their code runs, their tables are fresh, their links lead somewhere."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [p for p in PAGES if FENCE.search(p.read_text("utf-8"))], ids=name_of)
def test_code_of_a_page_runs_from_top_to_bottom(page: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, names = page.read_text("utf-8"), {"__name__": "__page__"}
    for block in FENCE.finditer(text):
        line = text[: block.start()].count("\n") + 1
        exec(compile("\n" * line + block[1], str(page), "exec"), names)  # line numbers as in the page


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_of_a_page_lead_to_files(page: Path) -> None:
    missing = [link for link in LINK.findall(page.read_text("utf-8")) if not (page.parent / link).exists()]
    assert not missing


def test_generated_tables_are_fresh() -> None:
    spec = importlib.util.spec_from_file_location("fill", ROOT / "docs" / "fill.py")
    assert spec is not None and spec.loader is not None
    fill = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fill)
    old = [name_of(page) for page in fill.pages() if fill.filled(page.read_text("utf-8")) != page.read_text("utf-8")]
    assert not old, f"run `python docs/fill.py` and commit {old}"


def test_readme_example_has_at_most_fifteen_lines() -> None:
    block = FENCE.search((ROOT / "README.md").read_text("utf-8"))
    assert block is not None and len(block[1].splitlines()) <= 15
