"""The site: every page has a place, every public name an entry, and nothing is fetched from another machine."""

import importlib.util
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# What a browser fetches without a click: sources, style sheets, fonts and the like; links to click are no loads.
LOADED = re.compile(
    r"""<(?:script|img|iframe|source|audio|video)\b[^>]*\ssrc=["']?(?:https?:)?//"""
    r"""|<link\b[^>]*\shref=["']?(?:https?:)?//|url\(\s*["']?(?:https?:)?//|@import\s+["']?(?:https?:)?//"""
)


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_is_in_the_navigation() -> None:
    named = re.findall(r":\s+([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE)
    notebooks = {f"notebooks/{path.stem}.md" for path in (ROOT / "notebooks").glob("*.ipynb")}
    missing = ({page.name for page in DOCS.glob("*.md")} | notebooks) - set(named)
    assert not missing and len(named) == len(set(named))


def test_no_heading_begins_with_a_digit() -> None:
    """Its anchor would be no valid selector, and the theme's script stops there: tables and code lose their style."""
    found = {p.name: re.findall(r"^#{1,4} \d.*$", p.read_text("utf-8"), re.MULTILINE) for p in DOCS.glob("*.md")}
    assert not {name: lines for name, lines in found.items() if lines}


@pytest.mark.parametrize(
    "package", ["interventions", "sweeps", "circuits", "emotion", "checkpoints", "plots", "app.view"]
)
def test_every_public_name_has_an_entry_in_the_reference(package: str) -> None:
    reference = load("reference")
    written = "\n".join(reference.page(name) for name in reference.PAGES)
    module = import_module(f"veena_lens.{package}")
    named = [name for name in module.__all__ if hasattr(getattr(module, name), "__qualname__")]
    assert not [name for name in named if not re.search(rf"^::: veena_lens\.[\w.]+\.{name}$", written, re.MULTILINE)]


def test_the_rule_for_remote_loads_sees_them_and_lets_links_pass() -> None:
    for page in (
        '<script src="https://cdn.example/a.js">',
        '<link rel="stylesheet" href="//fonts.example/css">',
        "@import 'https://fonts.example/css'",
        "src: url(https://fonts.example/a.woff2)",
    ):
        assert LOADED.search(page), page
    assert not LOADED.search('<a href="https://www.mkdocs.org/">MkDocs</a><img src="cells.png"><script src="js/a.js">')


@pytest.mark.slow
def test_site_builds_strictly_and_loads_nothing_remote(tmp_path) -> None:
    pytest.importorskip("mkdocstrings", reason="needs the extra docs: pip install 'veena-lens[docs]'")
    pytest.importorskip("mkdocs", reason="needs the extra docs: pip install 'veena-lens[docs]'")
    shutil.copytree(DOCS, tmp_path / "docs", ignore=shutil.ignore_patterns("reference"))
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    text = (ROOT / "mkdocs.yml").read_text("utf-8").replace('paths: ["."]', f'paths: ["{ROOT}"]')
    (tmp_path / "mkdocs.yml").write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    files = [path for path in (tmp_path / "site").rglob("*") if path.suffix in (".html", ".css")]
    assert len(files) > 20
    assert not [path.name for path in files if LOADED.search(path.read_text("utf-8"))]
    first = (tmp_path / "site" / "notebooks" / "01_first_look.html").read_text("utf-8")
    assert "You will learn" in first and re.search(r'<img [^>]*src="01_first_look_\d+_\d+\.png"', first)
    assert "head_intention" in (tmp_path / "site" / "reference" / "circuits.html").read_text("utf-8")


def test_figures_of_the_concepts_are_all_there_and_all_shown() -> None:
    shown = re.findall(r"!\[[^\]]+\]\(([\w-]+\.png)\)", (DOCS / "concepts.md").read_text("utf-8"))
    drawn = re.findall(r'"([\w-]+\.png)":', (DOCS / "figures.py").read_text("utf-8"))
    assert sorted(shown) == sorted(drawn)
    assert all((DOCS / name).exists() for name in shown)


def test_calls_of_the_tasks_exist() -> None:
    from veena_lens import HookedVLM
    from veena_lens.inputs import MultimodalInputs

    roots = {"model": HookedVLM, "HookedVLM": HookedVLM, "inputs": MultimodalInputs}
    cells = re.findall(r"^\|[^|]+\|([^|]+)\|[^|]+\|$", (DOCS / "choose.md").read_text("utf-8"), re.MULTILINE)
    calls = [call for cell in cells for call in re.findall(r"`([A-Za-z_]+(?:\.\w+)*)`", cell)]
    assert len(calls) > 40
    for call in calls:
        place = roots.get(call.split(".")[0])
        for name in call.split(".")[place is not None :]:
            place = getattr(place or import_module("veena_lens"), name)
