"""The view's modules join into one text that needs nothing, in an order where each follows what it uses."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from veena_lens.app.view.page import ENTRY, MODULES, joined, script


def test_modules_of_the_view_join_without_imports_and_keep_the_entrys_exports() -> None:
    text = script()
    assert not re.search(r"^import\b", text, re.MULTILINE)
    assert re.findall(r"^export (.*?)[({\s]*(?:[({].*)?$", text, re.MULTILINE) == [
        "function mount",
        "async function openPage",
        "default",
    ]
    for path in MODULES.glob("*.js"):  # every module is used, and is short
        body = path.read_text(encoding="utf-8")
        first = re.search(r"^(?:export )?((?:async )?(?:function|class|const) \w+)", body, re.MULTILINE)
        assert first is not None and first[1] in text, path.name
        assert len(body.splitlines()) < 400 and body.startswith("// "), path.name


def test_module_follows_what_it_imports(tmp_path: Path) -> None:
    (tmp_path / "a.js").write_text('import { b, c } from "./b.js";\nexport const a = b + c;\n')
    (tmp_path / "b.js").write_text('import { d } from "./d.js";\nexport const b = d;\nexport function c() {}\n')
    (tmp_path / "d.js").write_text("export const d = 1;\n")
    assert joined(tmp_path, "a.js") == "const d = 1;\n\nconst b = d;\nfunction c() {}\n\nexport const a = b + c;\n"


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"a.js": 'import { b } from "./b.js";\n', "b.js": 'import { a } from "./a.js";\n'}, "a.js -> b.js -> a.js"),
        ({"a.js": 'import { b } from "./b.js";\n', "b.js": "const b = 1;\n"}, "a.js imports 'b', which b.js does not"),
        ({"a.js": 'import * as b from "./b.js";\n'}, "a.js: only imports of the form"),
        (
            {"a.js": 'import { b } from "./b.js";\nconst same = 1;\n', "b.js": "export const b = 1;\nlet same = 2;\n"},
            "'same' is defined in b.js and in a.js",
        ),
    ],
    ids=["circle", "not exported", "other form", "clash"],
)
def test_modules_that_cannot_be_joined_are_refused(tmp_path: Path, files: dict[str, str], told: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=told):
        joined(tmp_path, "a.js")


def test_modules_are_correct_apart_and_joined(tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node on this machine")
    whole = tmp_path / "whole.mjs"
    whole.write_text(script(), encoding="utf-8")
    found = subprocess.run([node, "--check", str(whole)], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    apart = shutil.copytree(MODULES, tmp_path / "js")
    (apart / "package.json").write_text('{"type": "module"}')
    load = f"import('./{ENTRY}').then((m) => console.log(Object.keys(m).sort().join(' ')))"
    found = subprocess.run([node, "-e", load], capture_output=True, text=True, cwd=apart)
    assert found.stdout.split() == ["default", "mount", "openPage"], found.stderr
