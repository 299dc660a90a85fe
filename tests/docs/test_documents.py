"""Documents that cannot lie: their code runs, their tables are fresh, their links lead somewhere."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [p for p in PAGES if FENCE.search(p.read_text("utf-8"))], ids=name_of)
def test_code_of_a_page_runs_from_top_to_bottom(page: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    outputs = tool("outputs")
    printed = outputs.run(page)
    if page.name not in outputs.PAGES:
        return
    text = page.read_text("utf-8")
    for block, now in zip(outputs.BLOCK.finditer(text), printed, strict=True):
        assert not outputs.differences(block["text"] or "", now), f"run `python docs/outputs.py`: {block['code']}"
    saved = [name for name in outputs.PICTURE.findall(text) if Path(name).exists()]
    assert len(saved) >= 2
    for name in saved:
        kept, made = pixels(ROOT / "docs" / name), pixels(Path(name))
        assert made.shape == kept.shape and np.abs(made - kept).mean() < 1, f"run `python docs/outputs.py`: {name}"


@pytest.mark.parametrize(
    ("now", "same"),
    [
        ("value 0.251 of 8 heads", True),
        ("value 0.26 of 8 heads", False),
        ("value 0.25 of 9 heads", False),
        ("effect 0.25 of 8 heads", False),
        ("value 0.25 of 8 heads\nmore", False),
    ],
)
def test_outputs_are_compared_word_by_word_and_numbers_with_a_tolerance(now: str, same: bool) -> None:
    assert bool(tool("outputs").differences("value 0.25 of 8 heads\n", now)) is not same


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_of_a_page_lead_to_files(page: Path) -> None:
    missing = [link for link in LINK.findall(page.read_text("utf-8")) if not (page.parent / link).exists()]
    assert not missing


def tool(name: str):
    """A script of the documentation as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_tables_are_fresh() -> None:
    fill = tool("fill")
    old = [name_of(page) for page in fill.pages() if fill.filled(page.read_text("utf-8")) != page.read_text("utf-8")]
    assert not old, f"run `python docs/fill.py` and commit {old}"


def test_readme_example_has_at_most_fifteen_lines() -> None:
    assert len(tool("figures").example().splitlines()) <= 15


NOTEBOOK = """
import json, sys
from IPython.core.interactiveshell import InteractiveShell
InteractiveShell.history_manager = None
shell = InteractiveShell.instance()
done = shell.run_cell(open(sys.argv[1]).read())
shown, _ = shell.display_formatter.format(done.result)
import matplotlib.pyplot as plt
print(json.dumps([done.success, sorted(shown), len(shown["image/png"]), plt.get_fignums()]))
"""


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), dtype=float)


def test_readme_example_saves_its_picture_in_a_script_and_a_notebook_shows_it(tmp_path) -> None:
    (tmp_path / "example.py").write_text(tool("figures").example(), encoding="utf-8")
    (tmp_path / "notebook.py").write_text(NOTEBOOK, encoding="utf-8")
    kept = pixels(ROOT / "docs" / "patching.png")
    for command in (["example.py"], ["notebook.py", "example.py"]):
        (tmp_path / "patching.png").unlink(missing_ok=True)
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and "surprised" in done.stdout, done.stderr[-2000:]
        made = pixels(tmp_path / "patching.png")
        assert made.shape == kept.shape and np.abs(made - kept).mean() < 1, "run `make refresh` and commit its picture"
        assert "Warning" not in done.stderr
    success, kinds, size, windows = json.loads(done.stdout.splitlines()[-1])
    assert success and "image/png" in kinds and size > 10_000 and not windows


def test_numbers_beside_the_picture_of_the_readme_are_those_of_its_code(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "__page__"}
    exec(tool("figures").example(), names)
    model, pairs, metric, sweep = (names[name] for name in ("model", "pairs", "metric", "patch_sweep"))
    best, control = [], []
    for i, (face, neutral) in enumerate(pairs):
        stranger = pairs[(i + 1) % len(pairs)][1]
        runs = [model.prepare(text=names["question"], images=p.open()) for p in (face, neutral, stranger)]
        for source, found in ((runs[0], best), (runs[2], control)):
            effect = sweep(model, source, runs[1], "resid", "each", metric, layers=[0], progress=False)
            changes = (effect.values[0] - effect.corrupted)[runs[0].grid_tokens(0)]
            found.append(changes.max().item() if source is runs[0] else changes.abs().max().item())
            if i == 1 and source is runs[0]:
                whole = (effect.clean - effect.corrupted).item()
    text = (ROOT / "README.md").read_text("utf-8").replace("\n", " ")
    assert f"by {best[1]:.1f}, of the {whole:.1f} between the two faces" in text and 0.01 < control[1] < 0.1
    assert f"Over all eight test people the best cell reaches {min(best):.1f} to {max(best):.1f}" in text
    assert len(pairs) == 8 and 0.2 < max(control) < 0.3
