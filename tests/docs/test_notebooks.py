"""Notebooks as they are kept: without outputs, in the library's names, with a way to a larger model."""

import ast
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INSTALLED = {"matplotlib", "numpy", "pandas", "PIL", "torch", "transformer_lens", "transformers", "veena_lens"}
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def cells_of(path: Path, kind: str) -> list[str]:
    return ["".join(c["source"]) for c in json.loads(path.read_text("utf-8"))["cells"] if c["cell_type"] == kind]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_kept_without_outputs(path: Path) -> None:
    cells = json.loads(path.read_text("utf-8"))["cells"]
    kept = [c["id"] for c in cells if c.get("outputs") or c.get("execution_count") is not None]
    assert not kept


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
