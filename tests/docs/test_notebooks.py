"""Notebooks as they are kept: with small, clean outputs, in the library's names, with a way to a larger model."""

import ast
import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
INSTALLED = {"matplotlib", "numpy", "pandas", "PIL", "torch", "transformer_lens", "transformers", "veena_lens"}
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def cells_of(path: Path, kind: str) -> list[str]:
    return ["".join(c["source"]) for c in json.loads(path.read_text("utf-8"))["cells"] if c["cell_type"] == kind]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_kept_with_its_outputs_and_nothing_of_the_machine(path: Path) -> None:
    notebook = json.loads(path.read_text("utf-8"))
    code = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in code] == list(range(1, len(code) + 1)), "run `make notebooks-save`"
    outputs = [output for c in code for output in c["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "execute_result", "display_data"}
    assert {kind for o in outputs for kind in o.get("data", {})} <= {"image/png", "text/html", "text/plain"}
    assert not [o for o in outputs if o.get("name") == "stderr"]
    shown = ["".join(o["text"]) for o in outputs if "text" in o]
    shown += ["".join(text) for o in outputs for kind, text in o.get("data", {}).items() if kind != "image/png"]
    places = re.compile(r"(?<![\w./<])/\w+/|site-packages| at 0x|it/s\]|Warning|<script")
    assert not [text for text in shown if places.search(text)]
    assert notebook["metadata"]["language_info"] == {"name": "python"} and "widgets" not in notebook["metadata"]


def test_notebooks_are_small() -> None:
    assert sum(path.stat().st_size for path in NOTEBOOKS) < 3_000_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_opens_with_what_one_learns(path: Path) -> None:
    first = json.loads(path.read_text("utf-8"))["cells"][0]
    text = "".join(first["source"])
    assert first["cell_type"] == "markdown" and text.startswith("# ") and "**You will learn** to " in text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_imports_only_what_is_installed_with_the_library(path: Path) -> None:
    tree = ast.parse("\n".join(cells_of(path, "code")))
    named = {n.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for n in node.names}
    named |= {(node.module or "").split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert named - sys.stdlib_module_names <= INSTALLED
    assert "veena_lens" in named


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_last_cell_says_what_changes_for_a_larger_model(path: Path) -> None:
    last = json.loads(path.read_text("utf-8"))["cells"][-1]
    text = "".join(last["source"])
    assert last["cell_type"] == "markdown" and "7B" in text and "cuda" in text


def test_kept_outputs_hold_no_progress_bar_page_or_path_and_a_changed_number_is_found(monkeypatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason="needs the extra notebooks")
    pytest.importorskip("nbclient", reason="needs the extra notebooks")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    tool = importlib.import_module("notebooks")
    v4 = nbformat.v4
    bar = v4.new_output("display_data", {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "0%"})
    view = v4.new_output("execute_result", {"text/html": "x" * 100_000, "text/plain": f"View('{ROOT}/a.png')"})
    printed = [v4.new_output("stream", name="stdout", text=text) for text in ("effect ", "0.25\n")]
    kept = tool.cleaned([bar, *printed, view])
    assert [output.output_type for output in kept] == ["stream", "execute_result"]
    assert kept[0].text == "effect 0.25\n" and dict(kept[1].data) == {"text/plain": "View('a.png')"}

    def notebook(text: str) -> Any:
        return v4.new_notebook(cells=[v4.new_code_cell(outputs=[v4.new_output("stream", name="stdout", text=text)])])

    assert not tool.changes(notebook("effect 0.25\n"), notebook("effect 0.251\n"))
    assert tool.changes(notebook("effect 0.25\n"), notebook("effect 0.35\n"))
    assert tool.warnings_of(v4.new_notebook(cells=[v4.new_code_cell(outputs=[v4.new_output("stream", name="stderr")])]))
